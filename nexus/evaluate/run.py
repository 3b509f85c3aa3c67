"""`nexus eval`: what is compared with what, and the report {"protocol": {...}, "numbers": {...}}."""

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import nn

from nexus import catalog, checkpoint
from nexus.data.images import EXTENSIONS, ImageSet, open_images
from nexus.errors import InputError, UsageError
from nexus.evaluate import judge as judges
from nexus.evaluate.bootstrap import DRAWS, mean_interval
from nexus.evaluate.features import features, open_extractor
from nexus.evaluate.judge import Made, Watch, order
from nexus.evaluate.kernel import FEWEST
from nexus.evaluate.likelihood import analysis, reconstruction
from nexus.evaluate.sheets import write_sheet
from nexus.images import read_image, read_record
from nexus.media import to_uint8
from nexus.requests import SampleRequest
from nexus.rng import derive
from nexus.text.conditioner import caption
from nexus.text.match import match

MOST = 1000             # pictures that are made or rebuilt unless a count is given
NAMES = {"psnr": "psnr (dB)", "ssim": "ssim", "elbo": "elbo (bits a dimension)", "iwae": "iwae (bits a dimension)"}

Generate = Callable[[list[str | None], list[int]], Iterator[np.ndarray]]


class Settings(NamedTuple):
    """What all of an evaluation shares."""

    split: str
    count: int | None
    seed: int
    extractor: str
    device: str
    sheet: str | Path | None
    watch: Watch


def evaluate(what: str, *, model: str | None = None, data: str | None = None, split: str = "pair",
             count: int | None = None, seed: int = 0, steps: int | None = None, guidance: float | None = None,
             sampler: str | None = None, batch_size: int = 8, extractor: str = "lite0", device: str = "auto",
             dtype: str = "auto", samples: str | Path | None = None, sheet: str | Path | None = None,
             generate: Generate | None = None, progress: Watch | None = None) -> dict:
    """Numbers on a system, a model or a folder of pictures, with the protocol that they hold for.

    what: a catalog name (with `model`, or its embedded checkpoint), a model's path or zoo name, or a folder of
    pictures. data: by default the set that the model was trained on. count: pictures to make or rebuild (default: one
    for each held-out picture, at most 1,000). samples: a folder of pictures made before, judged in place of new ones.
    sheet: a picture file to write, of the worst and best beside real ones. generate(prompts, seeds): how pictures are
    made, by default with the model itself. progress(done, total) counts pictures.
    A number is a float or {"value", "low", "high"}. Raises InputError, ModelError or UsageError.
    """
    settings = Settings(split, count, seed, extractor, device, sheet, progress or (lambda done, total: None))
    folder = samples or (what if _holds_pictures(what) else None)
    if folder is not None:
        return _folder(Path(folder), data or "emoji", settings)
    name = model or (catalog.entry(what).default or what if what in catalog.CATALOG else what)
    described = checkpoint.read_description(checkpoint.find(name))
    system = checkpoint.load(name, device=device, dtype=dtype, system=what if what in catalog.CATALOG else None)
    data = data or described.get("data")
    if not data:
        raise UsageError(f"{name} does not say what it was trained on", hint="name a data set with --data")
    config = system.config
    held = open_images(data, split=split, size=getattr(config, "image_size", None),
                       channels=getattr(config, "image_channels", None))
    facts = {"system": described["system"], "model": name, **_facts(held, data, settings), **_machine(system)}
    if analysis(system) is not None:
        return _rebuilt(system, held, facts, settings, batch_size)
    request = SampleRequest.parse({"steps": steps, "guidance": guidance, "sampler": sampler})
    used = getattr(system, "used_settings", lambda request: {})(request)
    facts |= {"sampler": sampler, "steps": steps, "guidance": guidance, **used}
    return _generated(system, held, data, facts, settings, generate or from_system(system, request, batch_size))


def _holds_pictures(what: str) -> bool:
    """A folder that is no model and no run."""
    path = Path(what)
    ours = ("config.json", "model.safetensors")
    return what not in catalog.CATALOG and path.is_dir() and not any((path / name).exists() for name in ours)


def _facts(held: ImageSet, data: str, settings: Settings) -> dict:
    return {"data": data, "data_sha256": held.facts.digest, "split": settings.split, "held_out": len(held),
            "picture_size": held.facts.size, "seed": settings.seed}


def _machine(system: nn.Module) -> dict:
    weight = next(system.parameters())
    return {"device": weight.device.type, "dtype": str(weight.dtype).removeprefix("torch.")}


def _rebuilt(system: nn.Module, held: ImageSet, facts: dict, settings: Settings, batch_size: int) -> dict:
    """PSNR, SSIM and likelihood bounds of held-out pictures."""
    count = min(settings.count or MOST, len(held))
    rows = order(len(held), count, settings.seed)
    batches = (held.batch(rows[i:i + batch_size]) for i in range(0, count, batch_size))
    values = reconstruction(system, batches, seed=settings.seed, watch=lambda done: settings.watch(done, count))
    facts |= {"pictures": count, "interval": f"95 %, bootstrap over pictures, {DRAWS} draws"}
    if "iwae" in values:
        facts["importance_samples"] = system.config.iwae_k
    return {"protocol": facts, "numbers": {NAMES[key]: mean_interval(v, settings.seed) for key, v in values.items()}}


def _generated(system: nn.Module, held: ImageSet, data: str, facts: dict, settings: Settings,
               generate: Generate) -> dict:
    """One picture for each held-out one, prompted with its caption and style if the system takes prompts."""
    count = settings.count or min(len(held), MOST)
    if count < FEWEST:
        raise UsageError(f"{count} pictures are too few to compare", hint=f"{FEWEST} at least, hundreds for a number")
    asked = getattr(system, "conditioner", None) is not None
    # First the judge: what it lacks should be known before an hour of sampling.
    judge = judges.prepare(held, data, open_extractor(settings.extractor, device=settings.device), reads=asked,
                           seed=settings.seed, watch=settings.watch)
    rows = order(len(held), count, settings.seed)
    seeds = [derive(settings.seed, "evaluate", i) for i in range(count)]
    pictures = []
    for picture in generate(prompts_of(held, rows) if asked else [None] * count, seeds):
        pictures.append(picture)
        settings.watch(len(pictures), count)
    return _judged(judge, Made(pictures, rows if asked else None), facts, settings)


def prompts_of(held: ImageSet, rows: list[int]) -> list[str]:
    """"red apple, noto style", in the words that the models were trained with."""
    return [caption(held.captions[i], held.facts.styles[int(held.style_ids[i])]) for i in rows]


def from_system(system: nn.Module, request: SampleRequest, batch_size: int) -> Generate:
    """generate(prompts, seeds) with the System contract alone: neighbours with equal prompts share a batch."""
    def generate(prompts: list[str | None], seeds: list[int]) -> Iterator[np.ndarray]:
        for prompt, group in groupby(zip(prompts, seeds, strict=True), key=lambda pair: pair[0]):
            wanted = [seed for _, seed in group]
            asked = request.model_copy(update={"prompt": prompt})
            for start in range(0, len(wanted), batch_size):
                yield from to_uint8(system.generate(asked, seeds=wanted[start:start + batch_size]).data)
    return generate


def _folder(folder: Path, data: str, settings: Settings) -> dict:
    """A folder of pictures; what they were to show is read from the records inside them."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())[:settings.count]
    if len(files) < FEWEST:
        raise InputError(f"there are {len(files)} pictures in {folder}, {FEWEST} at least are needed",
                         hint="endings: " + " ".join(sorted(EXTENSIONS)))
    pictures = [read_image(path) for path in files]
    held = open_images(data, split=settings.split)
    rows = meant([(read_record(path) or {}).get("prompt") for path in files], held)
    judge = judges.prepare(held, data, open_extractor(settings.extractor, device=settings.device),
                           reads=rows is not None, seed=settings.seed, watch=settings.watch)
    return _judged(judge, Made(pictures, rows), {"folder": str(folder), **_facts(held, data, settings)}, settings)


def meant(prompts: list[Any], held: ImageSet) -> list[int] | None:
    """The held-out picture that each prompt names, or None when one of them names none exactly."""
    ids = zip(held.labels.tolist(), held.style_ids.tolist(), strict=True)
    places = {pair: i for i, pair in enumerate(ids)}
    rows = []
    for prompt in prompts:
        try:
            found = match(str(prompt or ""), held.facts.classes, held.facts.styles)
        except InputError:
            return None
        rows.append(places.get((found.label, found.style or 0)) if found.exact else None)
    return None if None in rows else rows


def _judged(judge: judges.Judge, made: Made, facts: dict, settings: Settings) -> dict:
    x = features(judge.extractor, made.pictures, settings.watch)
    if settings.sheet is not None:
        write_sheet(settings.sheet, judge, made, x)
    return {"protocol": {**facts, **judges.protocol(judge, made)},
            "numbers": judges.numbers(judge, made, x, settings.seed)}
