"""`nexus eval`: what is compared with what, and the report {"protocol": {...}, "numbers": {...}}."""

from collections.abc import Callable, Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from nexus import catalog, checkpoint
from nexus.data.folders import EXTENSIONS
from nexus.data.images import ImageSet, open_images
from nexus.errors import InputError, ModelError, UsageError
from nexus.evaluate import classify, density, disentangle, parzen, sets, sound, translation
from nexus.evaluate import judge as judges
from nexus.evaluate.bootstrap import DRAWS, mean_interval
from nexus.evaluate.features import Extractor, cached_features, features, open_extractor
from nexus.evaluate.judge import Made, Settings, Watch, order
from nexus.evaluate.kernel import FEWEST
from nexus.evaluate.likelihood import analysis, reconstruction
from nexus.evaluate.pictures import PSNR_MOST
from nexus.evaluate.sheets import write_sheet
from nexus.images import read_image, read_record
from nexus.losses.lpips import opened as lpips_opened
from nexus.media import Media, to_uint8
from nexus.process.sources import from_uint8
from nexus.requests import SampleRequest
from nexus.rng import derive
from nexus.stored import zoo_names
from nexus.text.conditioner import caption
from nexus.text.match import match

MOST = 1000             # pictures that are made or rebuilt unless a count is given
NAMES = {"psnr": "psnr (dB)", "ssim": "ssim", "elbo": "elbo (bits a dimension)", "iwae": "iwae (bits a dimension)"}

Generate = Callable[[list[str | None], list[int]], Iterator[np.ndarray]]


def evaluate(what: str, *, model: str | None = None, data: str | None = None, split: str = "pair",
             count: int | None = None, seed: int = 0, steps: int | None = None, guidance: float | None = None,
             sampler: str | None = None, duration: float | None = None, batch_size: int = 8,
             extractor: str | None = None, lpips: str | None = None, device: str = "auto", dtype: str = "auto",
             samples: str | Path | None = None, sheet: str | Path | None = None, likelihood: bool = False,
             generate: Generate | None = None, progress: Watch | None = None) -> dict:
    """Numbers on a system, a model or a folder of pictures or sounds, with the protocol that they hold for.

    what: a catalog name (with `model`, or its embedded checkpoint), a model's path or zoo name, or a folder of
    pictures or sounds (./NAME where a model is called so). data: by default the set that the model was trained on.
    count: pictures or sounds to make or rebuild (default: one for each held-out one, at most 1,000 pictures or 200
    sounds). duration: seconds of a sound.
    samples: a folder of what was made before, judged in place of new ones. likelihood: that of held-out pictures, in
    place of numbers on samples: in bits a dimension under a diffusion or flow on pixels, by a Parzen window for a GAN.
    extractor: "lite0" or "inception" of pictures, "mel" or "whisper" of sounds. lpips: a file of its weights (`nexus
    convert --to lpips`), by which rebuilt pictures are compared too. sheet: a picture file of the worst and best.
    generate(prompts, seeds): how pictures (or sounds [C, T]) are made, by default with the model itself.
    progress(done, total) counts them.
    A number is a float or {"value", "low", "high"}. Raises InputError, ModelError or UsageError.
    """
    settings = Settings(split, count, seed, extractor, device, sheet, progress or (lambda done, total: None), lpips)
    folder = samples or (what if _holds_pictures(what) else None)
    sampling = {"steps": steps, "guidance": guidance, "sampler": sampler}
    if folder is not None:
        _refuse({"model": model, "likelihood": likelihood or None, "lpips": lpips, **sampling},
                "what is there already is judged")
        return _folder(Path(folder), data, duration, settings)
    name = model or (catalog.entry(what).default or what if what in catalog.CATALOG else what)
    described = checkpoint.read_description(checkpoint.find(name))
    system = checkpoint.load(name, device=device, dtype=dtype, system=what if what in catalog.CATALOG else None)
    if analysis(system) is None:
        _refuse({"lpips": lpips}, "nothing is rebuilt")
    data = data or described.get("data")
    if not data:
        raise UsageError(f"{name} does not say what it was trained on", hint="name a data set with --data")
    if getattr(system.config, "medium", "image") == "audio":
        _refuse({"likelihood": likelihood or None, "sheet": sheet}, "this model makes sound")
        request = SampleRequest.parse({**sampling, "duration": duration})
        return sound.judged(system, data, {"system": described["system"], "model": name, **_machine(system)}, request,
                            settings, generate or from_system(system, request, batch_size))
    _refuse({"duration": duration}, "this model makes pictures")
    if hasattr(system, "translate"):
        _refuse({**sampling, "likelihood": likelihood or None, "sheet": sheet}, "this model is judged by counterparts")
        return _translated(system, data, {"system": described["system"], "model": name}, settings, batch_size)
    config = system.config
    held = open_images(data, split=split, size=getattr(config, "image_size", None),
                       channels=getattr(config, "image_channels", None))
    facts = {"system": described["system"], "model": name, **_facts(held, data, settings), **_machine(system)}
    if likelihood:
        _refuse({"guidance": guidance, "sampler": sampler, "sheet": sheet}, "pictures that are made are not judged")
        return _likely(system, held, data, facts, settings, steps, batch_size, generate)
    if analysis(system) is not None:
        _refuse({**sampling, "sheet": sheet}, "this model is judged by its reconstructions")
        return _rebuilt(system, held, facts, settings, batch_size)
    request = SampleRequest.parse(sampling)
    used = getattr(system, "used_settings", lambda request: {})(request)
    facts |= {**sampling, **used}
    found = _generated(system, held, data, facts, settings, generate or _itself(system, request, held, batch_size))
    own = getattr(system, "measures", lambda seed: {})(seed)
    return {**found, "numbers": {**found["numbers"], **own}}


def _itself(system: nn.Module, request: SampleRequest, held: ImageSet, batch_size: int) -> Generate:
    """`from_system`; what it would refuse is told now, and not after minutes of looking at real pictures."""
    system.check(request.model_copy(update={"prompt": _asked(system, held, [0])[0]}))
    return from_system(system, request, batch_size)


def _refuse(given: dict[str, Any], why: str) -> None:
    """UsageError naming the first setting that would be ignored."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--{name} has no meaning here: {why}", hint=f"leave --{name} out")


def _translated(system: nn.Module, data: str, facts: dict, settings: Settings, batch_size: int) -> dict:
    """How near translations of held-out pictures are to their counterparts."""
    numbers, how = translation.measured(system, data, split=settings.split, count=settings.count or MOST,
                                        seed=settings.seed, batch_size=batch_size, watch=settings.watch)
    return {"protocol": facts | how | _machine(system), "numbers": numbers}


def _extractor(settings: Settings) -> Extractor:
    return open_extractor(settings.extractor or "lite0", device=settings.device)


def _holds_pictures(what: str) -> bool:
    """A folder that is no model and no run; a system's or embedded model's name means that, and ./name the folder."""
    path = Path(what)
    ours = ("config.json", "model.safetensors")
    known = what in catalog.CATALOG or what in zoo_names()
    return not known and path.is_dir() and not any((path / name).exists() for name in ours)


def _facts(held: ImageSet, data: str, settings: Settings) -> dict:
    return {"data": data, "data_sha256": held.facts.digest, "split": settings.split, "held_out": len(held),
            "picture_size": held.facts.size, "seed": settings.seed}


def _machine(system: nn.Module) -> dict:
    weight = next(system.parameters())
    return {"device": weight.device.type, "dtype": str(weight.dtype).removeprefix("torch.")}


def _rebuilt(system: nn.Module, held: ImageSet, facts: dict, settings: Settings, batch_size: int) -> dict:
    """PSNR, SSIM and likelihood bounds of held-out pictures, and how far the rebuilt set is from real pictures."""
    count = min(settings.count or MOST, len(held))
    rows = order(len(held), count, settings.seed)
    batches = (held.batch(rows[i:i + batch_size]) for i in range(0, count, batch_size))
    pictures: list[np.ndarray] = []
    values = reconstruction(system, batches, seed=settings.seed, rebuilt=pictures.extend,
                            watch=lambda done: settings.watch(done, count))
    apart, how = _apart(held, rows, pictures, settings)
    facts |= {"pictures": count, "psnr": f"mean over pictures, {PSNR_MOST:g} dB at most for each",
              "interval": f"95 %, bootstrap over pictures, {DRAWS} draws"}
    if "iwae" in values:
        facts["importance_samples"] = system.config.iwae_k
    numbers = {NAMES[key]: mean_interval(v, settings.seed) for key, v in values.items()}
    followed, said = _disentangled(system, held, rows, settings.seed, batch_size)
    if settings.lpips:
        numbers["lpips"] = mean_interval(_perceived(held, rows, pictures, settings), settings.seed)
        facts["lpips"] = f"version 0.1, VGG16, pictures of {held.facts.size} px as they are"
    return {"protocol": facts | how | said, "numbers": numbers | apart | followed}


@torch.inference_mode()
def _perceived(held: ImageSet, rows: list[int], pictures: list[np.ndarray], settings: Settings) -> torch.Tensor:
    """LPIPS [N] between pictures of a set and rebuilt ones."""
    device = checkpoint.pick_device(settings.device)
    net = lpips_opened(settings.lpips, device)

    def shown(x: np.ndarray) -> torch.Tensor:
        return from_uint8(x).to(device)
    return torch.cat([net(shown(held.get(row)), shown(picture)) for row, picture in zip(rows, pictures, strict=True)])


def _disentangled(system: nn.Module, held: ImageSet, rows: list[int], seed: int,
                  batch_size: int) -> tuple[dict, dict]:
    """How far latents follow the data's classes and styles; nothing where latents are maps, or labels too rare."""
    own, labels, weight = analysis(system), held.labels_of(rows), next(system.parameters())
    factors = disentangle.usable({"class": labels["label"], "style": labels["style"]})
    if not own.is_flat(system) or not factors:
        return {}, {}
    batches = (held.batch(rows[i:i + batch_size])["image"].to(weight) for i in range(0, len(rows), batch_size))
    codes = torch.cat([own.codes(system, x) for x in batches]).cpu()
    numbers = {f"mutual information gap, {name}": disentangle.gap(codes, ids) for name, ids in factors.items()}
    if len(factors) > 1:
        numbers["beta-vae score"] = disentangle.beta_vae_score(codes, list(factors.values()), seed)
    return numbers, {"factors": ", ".join(factors), "bins": disentangle.BINS}


def _likely(system: nn.Module, held: ImageSet, data: str, facts: dict, settings: Settings, steps: int | None,
            batch_size: int, generate: Generate | None) -> dict:
    """Bits a dimension of held-out pictures, each under its caption where the model reads one; windows for a GAN."""
    if not density.is_dense(system):
        if analysis(system) is not None:
            raise UsageError(f"{facts['system']} does not denoise: it has no likelihood of this kind",
                             hint="leave --likelihood out")
        generate = generate or from_system(system, SampleRequest(steps=steps), batch_size)
        return _windowed(system, held, data, facts, settings, generate)
    count = min(settings.count or MOST, len(held))
    rows = order(len(held), count, settings.seed)
    asked = _asked(system, held, rows)
    batches = ((held.batch(rows[i:i + batch_size]), asked[i:i + batch_size]) for i in range(0, count, batch_size))
    values, how = density.bits(system, batches, seed=settings.seed, steps=steps,
                               watch=lambda done: settings.watch(done, count))
    facts |= {"pictures": count, **how, "interval": f"95 %, bootstrap over pictures, {DRAWS} draws"}
    return {"protocol": facts, "numbers": {"nll (bits a dimension)": mean_interval(values, settings.seed)}}


def _windowed(system: nn.Module, held: ImageSet, data: str, facts: dict, settings: Settings,
              generate: Generate) -> dict:
    """Log-likelihood of held-out pictures under a Parzen window of generated ones, made for captions as frequent."""
    count = min(settings.count or MOST, len(held))
    size, channels = held.facts.size, held.facts.channels
    train = open_images(data, split="train", size=size, channels=channels)
    valid = order(len(train), min(parzen.VALID, len(train)), settings.seed)
    rows = order(len(held), parzen.WINDOWS, settings.seed)
    prompts = sorted(_asked(system, held, rows), key=str)                               # equal ones share a batch
    made: list[np.ndarray] = []
    for picture in generate(prompts, [derive(settings.seed, "parzen", i) for i in range(parzen.WINDOWS)]):
        made.append(picture)
        settings.watch(len(made), parzen.WINDOWS)

    def unit(pictures: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.stack(pictures)).float() / 255
    real, near = unit([held.get(i) for i in rows[:count]]), unit([train.get(i) for i in valid])
    values, width = parzen.nats(real, unit(made), near)
    facts |= {"pictures": count, "windows": parzen.WINDOWS, "width": round(width, 4), "width_chosen_on":
              f"{len(valid)} training pictures", "interval": f"95 %, bootstrap over pictures, {DRAWS} draws"}
    return {"protocol": facts, "numbers": {"parzen log-likelihood (nats)": mean_interval(values, settings.seed)}}


def _apart(held: ImageSet, rows: list[int], rebuilt: list[np.ndarray], settings: Settings) -> tuple[dict, dict]:
    """The kernel distance of rebuilt pictures from other real ones: what generators in a codec's latents start from.

    -> (numbers, protocol); without numbers when the extractor is not installed, which the protocol then says.
    """
    if len(rows) < 2 * FEWEST:
        return {}, {}
    try:
        extractor = _extractor(settings)
    except ModelError as error:
        return {}, {"kid": f"not measured: {error}"}
    real = cached_features(extractor, [held.get(i) for i in rows], settings.watch)
    made = features(extractor, rebuilt, settings.watch)
    return sets.apart(real, made), {"kid": judges.KID, **judges.looked_at_with(extractor)}


def _generated(system: nn.Module, held: ImageSet, data: str, facts: dict, settings: Settings,
               generate: Generate) -> dict:
    """One picture for each held-out one, prompted with its caption and style if the system takes prompts."""
    count = settings.count or min(len(held), MOST)
    if count < FEWEST:
        raise UsageError(f"{count} pictures are too few to compare", hint=f"{FEWEST} at least, hundreds for a number")
    asked = getattr(system, "conditioner", None) is not None
    # First the judge: what it lacks should be known before an hour of sampling.
    judge = judges.prepare(held, data, _extractor(settings), reads=asked, seed=settings.seed, watch=settings.watch)
    rows = order(len(held), count, settings.seed)
    seeds = [derive(settings.seed, "evaluate", i) for i in range(count)]
    pictures = []
    for picture in generate(_asked(system, held, rows), seeds):
        pictures.append(picture)
        settings.watch(len(pictures), count)
    return _judged(judge, Made(pictures, rows if asked else None), facts, settings)


def prompts_of(held: ImageSet, rows: list[int], classes: bool = False) -> list[str]:
    """"red apple, noto style", in the words that the models were trained with; classes: by its class's name."""
    said = [held.facts.classes[int(held.labels[i])] if classes else held.captions[i] for i in rows]
    return [caption(text, held.facts.styles[int(held.style_ids[i])]) for text, i in zip(said, rows, strict=True)]


def _asked(system: nn.Module, held: ImageSet, rows: list[int]) -> list[str | None]:
    """What the system is asked for each of these pictures: what it reads, or the classes it knows; None for neither."""
    conditioner = getattr(system, "conditioner", None)
    if conditioner is None:
        return [None] * len(rows)
    return prompts_of(held, rows, classes=bool(getattr(conditioner.config, "classes", ())))


def from_system(system: nn.Module, request: SampleRequest, batch_size: int) -> Generate:
    """generate(prompts, seeds) with the System contract alone: neighbours with equal prompts share a batch."""
    def generate(prompts: list[str | None], seeds: list[int]) -> Iterator[np.ndarray]:
        for prompt, group in groupby(zip(prompts, seeds, strict=True), key=lambda pair: pair[0]):
            wanted = [seed for _, seed in group]
            asked = request.model_copy(update={"prompt": prompt})
            for start in range(0, len(wanted), batch_size):
                yield from _as_files_hold(system.generate(asked, seeds=wanted[start:start + batch_size]))
    return generate


def _as_files_hold(media: Media) -> np.ndarray:
    """Pictures uint8 [N, H, W, C], or sounds float32 [N, C, T]."""
    return to_uint8(media.data) if media.kind == "image" else media.data.float().cpu().numpy()


def _folder(folder: Path, data: str | None, duration: float | None, settings: Settings) -> dict:
    """A folder of pictures or of sounds; what they were to be is read from the records inside them."""
    if sound.sounds_in(folder):
        _refuse({"sheet": settings.sheet}, "these are sounds")
        if not data:
            raise UsageError("nothing says what these sounds are to be compared with",
                             hint="--data FOLDER of real ones")
        return sound.folder_judged(folder, data, duration, settings)
    _refuse({"duration": duration}, "these are pictures")
    return _pictures(folder, data or "emoji", settings)


def _pictures(folder: Path, data: str, settings: Settings) -> dict:
    files = sorted(p for p in folder.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())[:settings.count]
    if len(files) < FEWEST:
        raise InputError(f"there are {len(files)} pictures in {folder}, {FEWEST} at least are needed",
                         hint="endings: " + " ".join(sorted(EXTENSIONS)))
    pictures = [read_image(path) for path in files]
    held = open_images(data, split=settings.split)
    rows = meant([(read_record(path) or {}).get("prompt") for path in files], held)
    judge = judges.prepare(held, data, _extractor(settings), reads=rows is not None, seed=settings.seed,
                           watch=settings.watch)
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
    found = {"protocol": {**facts, **judges.protocol(judge, made)},
             "numbers": judges.numbers(judge, made, x, settings.seed)}
    held = judge.held.set
    hits = made.rows and classify.digit_hits(held.facts.classes, made.pictures, held.labels[made.rows])
    if hits is not None:
        found["numbers"]["digit accuracy"] = mean_interval(hits, settings.seed)
        found["protocol"] |= classify.protocol()
    return found
