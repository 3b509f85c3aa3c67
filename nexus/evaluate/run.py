"""`nexus eval`: which pictures to compare with which, and the report: {"protocol": {...}, "numbers": {...}}."""

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nexus import catalog, checkpoint
from nexus.data.images import ImageSet, open_images
from nexus.data.order import permutation
from nexus.errors import InputError, UsageError
from nexus.evaluate import captions, sets
from nexus.evaluate.bootstrap import DRAWS, mean_interval
from nexus.evaluate.features import Extractor, cached_features, features, open_extractor
from nexus.evaluate.likelihood import analysis, reconstruction
from nexus.images import read_image, read_record
from nexus.requests import SampleRequest
from nexus.rng import derive
from nexus.text.conditioner import caption
from nexus.text.match import match

MOST = 1000             # pictures that are made unless a count is given
MOST_REAL = 5000        # real pictures that they are compared with

Generate = Callable[[list[str | None], list[int]], Iterator[np.ndarray]]
Watch = Callable[[int, int], Any]


class Made(NamedTuple):
    """Pictures to judge; rows: the place in the held-out set of the picture each one stands for, or None."""

    pictures: list[np.ndarray]
    rows: list[int] | None


def evaluate(what: str, *, model: str | None = None, data: str | None = None, split: str = "pair",
             count: int | None = None, seed: int = 0, steps: int | None = None, guidance: float | None = None,
             sampler: str | None = None, batch_size: int = 8, extractor: str = "lite0", device: str = "auto",
             dtype: str = "auto", samples: str | Path | None = None, generate: Generate | None = None,
             progress: Watch | None = None) -> dict:
    """Numbers on a system, a model or a folder of pictures, with the protocol that they hold for.

    what: a catalog name (with `model`, or its embedded checkpoint), a model's path or zoo name, or a folder of
    pictures. data: default the set that the model was trained on. count: pictures made (default: one for each
    held-out picture, at most 1,000). samples: a folder of pictures made before, judged in place of new ones.
    generate(prompts, seeds): how pictures are made, by default with the model. progress(done, total) counts pictures.
    Raises InputError, ModelError or UsageError.
    """
    watch = progress or (lambda done, total: None)
    folder = samples or (what if _holds_pictures(what) else None)
    if folder is not None:
        return _folder(Path(folder), data or "emoji", split, seed, extractor, device, watch)
    name = _name(what, model)
    described = checkpoint.read_description(checkpoint.find(name))
    system = checkpoint.load(name, device=device, dtype=dtype)
    held = _held_out(data or described.get("data"), system, split)
    protocol = {"system": described["system"], "model": name, **_facts(held, data or described["data"], split, seed)}
    if analysis(system) is not None:
        return _rebuilt(system, held, protocol, count, batch_size, seed, watch)
    request = SampleRequest.parse({"steps": steps, "guidance": guidance, "sampler": sampler})
    used = getattr(system, "used_settings", lambda request: {})(request)
    protocol |= {"sampler": sampler, "steps": steps, "guidance": guidance, **used, "device": _device(system)}
    made = _made(system, held, count, seed, generate or from_system(system, request, batch_size), watch)
    return _judged(made, held, data or described["data"], protocol, open_extractor(extractor, device=device), seed, watch)


def _holds_pictures(what: str) -> bool:
    """A folder that is no model and no run."""
    path = Path(what)
    return (what not in catalog.CATALOG and path.is_dir() and not (path / "config.json").exists()
            and not (path / "model.safetensors").exists())


def _name(what: str, model: str | None) -> str:
    """The model that is meant: `what` itself, or the one of a catalog system."""
    if model is not None:
        return model
    return catalog.entry(what).default or what if what in catalog.CATALOG else what


def _held_out(data: str | None, system: nn.Module | None, split: str) -> ImageSet:
    if not data:
        raise UsageError("the model does not say what it was trained on", hint="name a data set with --data")
    config = getattr(system, "config", None)
    return open_images(data, split=split, size=getattr(config, "image_size", None),
                       channels=getattr(config, "image_channels", None))


def _facts(held: ImageSet, data: str, split: str, seed: int) -> dict:
    return {"data": data, "data_sha256": held.facts.digest, "split": split, "held_out": len(held),
            "picture_size": held.facts.size, "seed": seed}


def _device(system: nn.Module) -> str:
    return next(system.parameters()).device.type


def _rebuilt(system: nn.Module, held: ImageSet, protocol: dict, count: int | None, batch_size: int, seed: int,
             watch: Watch) -> dict:
    """PSNR, SSIM and likelihood bounds of held-out pictures."""
    rows = _rows(len(held), min(count or len(held), len(held)), seed)
    batches = (held.batch(rows[i:i + batch_size]) for i in range(0, len(rows), batch_size))
    done = 0

    def count_up(more: int) -> None:
        nonlocal done
        done += more
        watch(done, len(rows))

    values = reconstruction(system, batches, seed=seed, watch=count_up)
    names = {"psnr": "psnr (dB)", "ssim": "ssim", "elbo": "elbo (bits a dimension)", "iwae": "iwae (bits a dimension)"}
    return {"protocol": protocol | {"pictures": len(rows), "device": _device(system), "batch_size": batch_size,
                                    "interval": f"95 %, bootstrap over pictures, {DRAWS} draws"},
            "numbers": {names[key]: mean_interval(each, seed) for key, each in values.items()}}


def _rows(n: int, count: int, seed: int) -> list[int]:
    """`count` places of range(n), each equally often and in a fixed random order."""
    order = permutation(n, seed, 0)
    return [int(order[i % n]) for i in range(count)]


def _made(system: nn.Module, held: ImageSet, count: int | None, seed: int, generate: Generate, watch: Watch) -> Made:
    """One picture for each held-out (concept, style), prompted with them if the system takes prompts."""
    rows = _rows(len(held), count or min(len(held), MOST), seed)
    seeds = [derive(seed, "evaluate", i) for i in range(len(rows))]
    asked = getattr(system, "conditioner", None) is not None
    pictures = []
    for picture in generate(prompts_of(held, rows) if asked else [None] * len(rows), seeds):
        pictures.append(picture)
        watch(len(pictures), len(rows))
    return Made(pictures, rows if asked else None)


def prompts_of(held: ImageSet, rows: list[int]) -> list[str | None]:
    """"red apple, noto style", in the words that the models were trained with."""
    styles = held.facts.styles
    return [caption(held.captions[i], styles[int(held.style_ids[i])]) for i in rows]


def from_system(system: nn.Module, request: SampleRequest, batch_size: int) -> Generate:
    """generate(prompts, seeds) with the System contract alone: neighbours with equal prompts share a batch."""
    def generate(prompts: list[str | None], seeds: list[int]) -> Iterator[np.ndarray]:
        for prompt, group in groupby(zip(prompts, seeds, strict=True), key=lambda pair: pair[0]):
            wanted = [seed for _, seed in group]
            for start in range(0, len(wanted), batch_size):
                asked = request.model_copy(update={"prompt": prompt})
                data = system.generate(asked, seeds=wanted[start:start + batch_size]).data
                yield from (((data.float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
                            .permute(0, 2, 3, 1).numpy())
    return generate


def _folder(folder: Path, data: str, split: str, seed: int, extractor: str, device: str, watch: Watch) -> dict:
    """A folder of pictures against a data set; what they were to show is read from the records inside them."""
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
    if not files:
        raise InputError(f"there are no pictures in {folder}", hint="PNG, JPEG and WebP are read")
    pictures = [read_image(path) for path in files]
    held = open_images(data, split=split)
    prompts = [(read_record(path) or {}).get("prompt") for path in files]
    protocol = {"folder": str(folder), **_facts(held, data, split, seed)}
    return _judged(Made(pictures, _meant(prompts, held)), held, data, protocol, open_extractor(extractor, device=device),
                   seed, watch)


def _meant(prompts: list[Any], held: ImageSet) -> list[int] | None:
    """The held-out picture of each prompt, or None when not every prompt names one exactly."""
    places = {(int(label), int(style)): i for i, (label, style) in enumerate(zip(held.labels, held.style_ids))}
    rows = []
    for prompt in prompts:
        try:
            found = match(str(prompt or ""), held.facts.classes, held.facts.styles)
        except InputError:
            return None
        row = places.get((found.label, found.style or 0)) if found.exact else None
        if row is None:
            return None
        rows.append(row)
    return rows


def _judged(made: Made, held: ImageSet, data: str, protocol: dict, extractor: Extractor, seed: int,
            watch: Watch) -> dict:
    """All numbers on a set of generated pictures, and those of real ones beside them."""
    rows = _rows(len(held), min(len(held), MOST_REAL), seed)
    real = cached_features(extractor, [held.get(i) for i in rows], watch)
    x = features(extractor, made.pictures, watch)
    styles = torch.from_numpy(held.style_ids)
    numbers = sets.compare(real, x, seed)
    numbers |= _against_training(made, x, held, rows, real, data, extractor, seed, watch)
    numbers |= sets.yardstick(real, styles[rows], held.facts.styles, seed)
    size = f"to {extractor.size} px, bilinear, antialiased" if extractor.size else "by the extractor"
    return {"protocol": protocol | {
        "made": len(made.pictures), "real": len(rows), "extractor": extractor.name, "extractor_sha256": extractor.digest,
        "resize": size, "kid": "polynomial of degree 3, unbiased, all pairs",
        "interval": f"95 %: jackknife (kid), bootstrap over pictures with {DRAWS} draws (others)",
    }, "numbers": numbers}


def _against_training(made: Made, x: Tensor, held: ImageSet, rows: list[int], real: Tensor, data: str,
                      extractor: Extractor, seed: int, watch: Watch) -> sets.Numbers:
    """Captions and styles by a probe that has seen training pictures only, and copies of those."""
    train = open_images(data, split="train", size=held.facts.size, channels=held.facts.channels)
    places = _rows(len(train), min(len(train), 2 * MOST_REAL), seed)
    seen = cached_features(extractor, [train.get(i) for i in places], watch)
    numbers = sets.near_copies(seen, real, x, seed)
    if made.rows is None or len(held.facts.classes) < 2:
        return numbers
    labels, styles = torch.from_numpy(train.labels)[places], torch.from_numpy(train.style_ids)[places]
    probe = captions.fit(seen, labels, styles, captions.embed_texts(list(held.facts.classes)))
    held_labels, held_styles = torch.from_numpy(held.labels), torch.from_numpy(held.style_ids)
    asked = [rows.index(i) for i in made.rows if i in set(rows)]
    for prefix, y, which in (("", x, made.rows), ("real ", real[asked], [rows[i] for i in asked])):
        numbers |= sets.caption_scores(probe, y, held_labels[which], seed, prefix)
        numbers |= sets.style_scores(probe, y, held_styles[which], seed, prefix)
    share = numbers["caption top-5"]["value"] / max(numbers["real caption top-5"]["value"], 1e-9)
    return numbers | {"caption top-5, share of real": share}
