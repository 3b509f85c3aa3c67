"""How near a translated picture is to its withheld counterpart, which an unpaired training never showed beside it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from nexus.data.domains import counterparts
from nexus.data.images import ImageSet, open_images
from nexus.data.spec import split_spec
from nexus.errors import UsageError
from nexus.evaluate.bootstrap import DRAWS, mean_interval
from nexus.evaluate.judge import order
from nexus.evaluate.pictures import psnr, ssim
from nexus.media import levels

Numbers = dict[str, dict[str, float]]


def pairs(data: str, split: str, **options) -> tuple[ImageSet, ImageSet, list[tuple[int, int]]]:
    """Held-out pictures of the first kind, all of the second, and the places of those that belong together.

    UsageError for data of one kind; InputError where nothing belongs together.
    """
    parts = split_spec(data)
    if len(parts) != 2:
        raise UsageError(f"--data '{data}' is one set, but a translator is judged by two", hint="--data A,B")
    a, b = open_images(parts[0], split=split, **options), open_images(parts[1], split="all", **options)
    return a, b, counterparts(a, b, data)


def grey(x: Tensor) -> Tensor:
    """Pictures [B, C, H, W] without their colours: ITU-R BT.601 luma of three channels, one channel as it is."""
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor((0.299, 0.587, 0.114)).view(3, 1, 1)).sum(1, keepdim=True).expand_as(x)


@torch.inference_mode()
def measured(system: nn.Module, data: str, *, split: str, count: int, seed: int, batch_size: int,
             watch: Callable[[int, int], Any]) -> tuple[Numbers, dict]:
    """SSIM and PSNR of translations to counterparts, each way, beside two baselines; the protocol.

    The baselines are the given picture, untouched and in grey. A model of both ways is also asked to come back: "cycle
    l1" is the mean absolute difference to the given picture, both in [-1, 1].
    """
    config = system.config
    a, b, known = pairs(data, split, size=config.image_size, channels=config.image_channels)
    chosen = [known[i] for i in order(len(known), min(count, len(known)), seed)]
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(chosen), batch_size):
        rows, others = zip(*chosen[start:start + batch_size], strict=True)
        x = {"ab": a.batch(list(rows))["image"], "ba": b.batch(list(others))["image"]}
        for way in system.directions:
            given, right = x[way], x[way[::-1]]
            made = system.translate(given.to(next(system.parameters())), way)
            if len(system.directions) == 2:
                cycle = (system.translate(made, way[::-1]).cpu() - given).abs().flatten(1).mean(1)
                found.setdefault(f"cycle l1, {way}", []).append(cycle)
            for name, picture in (("", made), (", untouched", given), (", grey", grey(given))):
                for measure, of in (("ssim", ssim), ("psnr (dB)", psnr)):
                    found.setdefault(f"{measure}, {way}{name}", []).append(of(levels(picture), levels(right)))
        watch(start + len(rows), len(chosen))
    facts = {"data": data, "split": split, "pairs": len(chosen), "digests": [a.facts.digest, b.facts.digest],
             "picture_size": a.facts.size, "seed": seed, "interval": f"95 %, bootstrap over pictures, {DRAWS} draws"}
    return {name: mean_interval(torch.cat(values), seed) for name, values in found.items()}, facts
