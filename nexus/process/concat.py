"""A picture as condition: channels beside the noisy ones, the key "concat" of a cond dict.

Both kinds add C + 1 channels to a network's C. The picture is never dropped in training (p_uncond drops words and
labels alone) and stands on both sides of guidance, which is of the words, as in Stable Diffusion's inpainting.
"""

import math
from collections.abc import Callable
from typing import Annotated, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nexus.config import Config
from nexus.errors import InputError, UsageError
from nexus.process.predictions import over
from nexus.process.sources import Known, read_known
from nexus.requests import SampleRequest
from nexus.rng import ItemNoise

BOXES = 4                       # a random mask is the union of at most so many rectangles


class Given(NamedTuple):
    """concat [N, C + 1, h, w] of a run; known: the picture and mask that the result keeps to, or None."""

    concat: Tensor
    known: Known | None


class InpaintConcat(Config):
    """The mask (1 = painted anew), then the picture without what it covers. Rombach et al. 2022.

    With Stable Diffusion's codec: 4 + 1 + 4 channels, in the order of its published weights. full: share of training
    items of which nothing is shown; without --image a run is one of those.
    """

    kind: Literal["inpaint"] = "inpaint"
    full: float = Field(0.25, ge=0, le=1)

    def training(self, image: Tensor, encode: Callable, rng: torch.Generator) -> Tensor:
        """Pictures [B, C, H, W] under random masks -> the condition, in the size of encode's latents."""
        mask = random_masks(len(image), *image.shape[2:], rng, self.full).to(image.device)
        return hidden(image, mask, encode)

    def check(self, request: SampleRequest, shape: tuple[int, int, int]) -> None:
        """UsageError for a picture without a mask."""
        if request.image is not None and request.mask is None and request.outpaint is None:
            raise UsageError("this model paints in what a mask shows, and there is none", hint="add --mask FILE")

    def given(self, request: SampleRequest, shape: tuple[int, int, int], system, noise: ItemNoise, n: int,
              device: torch.device) -> Given:
        """The request's picture and mask, or a mask of everything."""
        c = system.config
        known = read_known(request, shape, c, device)
        if known is None:
            factor = c.codec.net.factor if c.codec else 1
            nothing = torch.zeros(1, c.image_channels, shape[1] * factor, shape[2] * factor, device=device)
            return Given(_rows(hidden(nothing, torch.ones_like(nothing[:, :1]).bool(), system.encode), n), None)
        return Given(_rows(hidden(known.picture, known.mask, system.encode), n), known)


class UpscaleConcat(Config):
    """A small picture, resized bilinearly, then the level of the noise that was added to it. Ho et al. 2021 (CDM).

    factor: how much smaller. level: the noise at sampling unless the request says otherwise: 0 = none, 1 = nothing of
    the picture is left, which is also a run without --image. Training draws it evenly from [0, 1]. The level is a
    constant channel, where the paper adds an embedding to the time's: any network can read it.
    """

    kind: Literal["upscale"] = "upscale"
    factor: int = Field(4, ge=2)
    level: float = Field(0.1, ge=0, le=1)

    def training(self, image: Tensor, encode: Callable, rng: torch.Generator) -> Tensor:
        """Pictures [B, C, H, W] -> the condition that their small, noised copies are."""
        low = F.interpolate(image, scale_factor=1 / self.factor, mode="area")
        level = torch.rand(len(image), generator=rng).to(image.device)
        return enlarged(low, level, torch.randn(low.shape, generator=rng).to(low), image.shape[2:], encode)

    def check(self, request: SampleRequest, shape: tuple[int, int, int]) -> None:
        """UsageError for a size or settings that do not fit."""
        for name in ("mask", "outpaint", "strength"):
            if getattr(request, name) is not None:
                raise UsageError(f"--{name} has no meaning with a model that enlarges pictures", hint="leave it out")
        if shape[1] % self.factor or shape[2] % self.factor:
            raise UsageError(f"this model enlarges {self.factor} times: {shape[2]}x{shape[1]} is no multiple of it",
                             hint="another --size")

    def given(self, request: SampleRequest, shape: tuple[int, int, int], system, noise: ItemNoise, n: int,
              device: torch.device) -> Given:
        """The request's picture at the run's size / factor."""
        c = system.config
        factor = c.codec.net.factor if c.codec else 1
        known = read_known(request, (shape[0], shape[1] // self.factor, shape[2] // self.factor), c, device)
        size = (shape[1] * factor, shape[2] * factor)
        drawn = noise.draw((c.image_channels, size[0] // self.factor, size[1] // self.factor)).to(device)
        if known is None:
            return Given(enlarged(drawn * 0, torch.ones(n, device=device), drawn, size, system.encode), None)
        level = self.level if request.image_noise is None else request.image_noise
        levels = torch.full((n,), level, device=device)
        return Given(enlarged(_rows(known.picture, n), levels, drawn, size, system.encode), None)


AnyConcat = Annotated[InpaintConcat | UpscaleConcat, Field(discriminator="kind")]


def training_picture(batch: dict) -> Tensor:
    """The pictures of a training batch; InputError when only their latents were kept."""
    if "image" not in batch:
        raise InputError("this system is conditioned on pictures, which cached latents do not hold",
                         hint="--set train.cache_latents=false")
    return batch["image"]


def hidden(image: Tensor, mask: Tensor, encode: Callable) -> Tensor:
    """Pictures [B, C, H, W], masks bool [B, 1, H, W] -> [B, 1 + C', h, w]: the mask, the picture grey where it is set.

    The small mask takes the nearest value, as the published weights were trained with.
    """
    seen = encode(image * ~mask)
    return torch.cat([F.interpolate(mask.to(seen), size=seen.shape[2:], mode="nearest"), seen], 1)


def enlarged(low: Tensor, level: Tensor, noise: Tensor, size: tuple[int, int], encode: Callable) -> Tensor:
    """Small pictures [B, C, h, w] noised to `level` [B], resized -> [B, C' + 1, ...]: the picture, its level.

    The noise keeps variance: cos and sin of level pi / 2.
    """
    angle = over(level * (math.pi / 2), low)
    # cos(pi / 2) is not exactly 0: at level 1 nothing of the picture may be left
    kept = torch.where(angle < math.pi / 2 - 1e-6, angle.cos(), 0.0)
    seen = encode(F.interpolate(kept * low + angle.sin() * noise, size=size, mode="bilinear", align_corners=False))
    return torch.cat([seen, over(level, seen).expand(-1, 1, *seen.shape[2:]).to(seen)], 1)


def random_masks(n: int, height: int, width: int, rng: torch.Generator, full: float) -> Tensor:
    """Masks bool [n, 1, height, width]: everything for a share `full` of them, else a few rectangles."""
    masks = torch.zeros(n, 1, height, width, dtype=torch.bool)
    for mask in masks:
        if torch.rand((), generator=rng) < full:
            mask.fill_(True)
            continue
        count = int(torch.randint(1, BOXES + 1, (), generator=rng))
        for top, left, high, wide in torch.rand(count, 4, generator=rng).tolist():
            rows, cols = (max(1, round((0.1 + 0.4 * share) * side)) for share, side in ((high, height), (wide, width)))
            y, x = round(top * (height - rows)), round(left * (width - cols))
            mask[:, y:y + rows, x:x + cols] = True
    return masks


def _rows(x: Tensor, n: int) -> Tensor:
    return x.expand(n, *x.shape[1:])
