"""Pictures of fixed seeds at points of a training run; of sounds, their spectrograms."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from nexus.images import contact_sheet, enlarged, write_image
from nexus.media import Media, to_uint8
from nexus.requests import SampleRequest
from nexus.sounds import write_sound
from nexus.spectrograms import spectrogram
from nexus.train.ema import swap
from nexus.train.report import write_report
from nexus.train.state import TrainState

__all__ = ["prompts_of", "sheet", "write_report", "write_samples"]

TOGETHER = 16       # seeds of one prompt generated at once
SPECTROGRAM = 480   # pixels at most
SHOWN = 128         # small pictures are enlarged to about this many pixels, without smoothing


def write_samples(state: TrainState, run: Path, device: torch.device, pictures: Any = None) -> None:
    """Write RUN/samples/step-NNNNNNN.webp: seeds 0 .. args.samples - 1 with the averaged weights.

    Of a system that translates pictures: the first of `pictures` (its data set), each beside what is made of it.
    Of one that makes sound: spectrograms, for captions of its data set, and beside them a .flac of all the sounds.

    Weights, train/eval modes and PyTorch's random streams are left as they were. A system cut over ranks (FSDP2)
    makes no pictures, since one rank alone cannot run it. Raises OutputError.
    """
    cut = any(isinstance(p, DTensor) for p in state.system.parameters())
    if state.args.samples and not cut:
        prompts = prompts_of(state.system, state.args.samples, pictures)
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), _averaged(state):
            made = [] if hasattr(state.system, "translate") else [_made(state.system, *p) for p in _groups(prompts)]
            images = [image for media in made for image in shown(media)] or _translated(state, pictures, device)
        cells = [enlarged(image, SHOWN) for image in images]
        joined = contact_sheet(cells, math.ceil(math.sqrt(len(cells))), prompts if prompts[0] else None)
        record = {"step": state.step, "seeds": list(range(len(images))), "prompts": prompts}
        if made and made[0].kind == "audio":
            _write_sound(made, sheet(run, state.step).with_suffix(".flac"), record)
        write_image(sheet(run, state.step), joined, record, exists="overwrite")


def sheet(run: Path, step: int) -> Path:
    """Where the pictures after `step` steps are."""
    return run / "samples" / f"step-{step:07d}.webp"


def prompts_of(system: nn.Module, count: int, data: Any = None) -> list[str | None]:
    """`count` prompts spread evenly over the class names that a system knows; all None when it knows none.

    Of a system of sounds, over the captions of its data.
    """
    conditioner = getattr(system, "conditioner", None)
    config = getattr(conditioner, "config", None)
    names = data.captions if conditioner is not None and getattr(data, "medium", "") == "audio" else \
        getattr(config, "classes", ()) or getattr(getattr(config, "encoder", None), "words", ())
    if not names:
        return [None] * count
    return [names[i * len(names) // count] for i in range(count)]


def _groups(prompts: list[str | None]) -> Iterator[tuple[str | None, list[int]]]:
    """Neighbouring equal prompts with their seeds, at most TOGETHER at once."""
    start = 0
    for i in range(1, len(prompts) + 1):
        if i == len(prompts) or prompts[i] != prompts[start] or i - start == TOGETHER:
            yield prompts[start], list(range(start, i))
            start = i


@torch.inference_mode()
def _translated(state: TrainState, pictures: Any, device: torch.device) -> list:
    """Pictures of each kind that the system starts from, each followed by its translation."""
    ways = state.system.directions
    count = max(1, state.args.samples // (2 * len(ways)))
    batch, shown = pictures.batch(list(range(min(count, len(pictures))))), []
    for way, kind in zip(ways, ("image", "other"), strict=False):
        x = batch[kind].to(device)
        shown += [picture for pair in zip(to_uint8(x), to_uint8(state.system.translate(x, way)), strict=True)
                  for picture in pair]
    return shown


def _made(system: nn.Module, prompt: str | None, seeds: list[int]) -> Media:
    return system.generate(SampleRequest(prompt=prompt), seeds=seeds)


def shown(media: Media) -> list:
    """What is looked at of each item: uint8 [H, W, C]."""
    if media.kind == "audio":
        return [spectrogram(sound, media.rate, SPECTROGRAM) for sound in media.data.float().cpu()]
    return list(to_uint8(media.data))


def _write_sound(made: list[Media], path: Path, record: dict) -> None:
    """All sounds one after the other, each with a rest before the next."""
    rate = made[0].rate
    rested = [F.pad(sound.float().cpu(), (0, rate // 4)) for media in made for sound in media.data]
    write_sound(path, torch.cat(rested, 1).numpy(), rate, record, exists="overwrite")


@contextmanager
def _averaged(state: TrainState) -> Iterator[None]:
    """The system in eval mode with its averaged weights, and back, whatever happens inside."""
    modes = {m: m.training for m in state.system.modules()}
    average = state.ema.average if state.ema else {}
    swap(state.system.eval(), average)
    try:
        yield
    finally:
        swap(state.system, average)
        for module, mode in modes.items():
            module.training = mode
