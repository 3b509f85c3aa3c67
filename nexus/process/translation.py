"""A picture through a network that makes another of it: any size, in overlapping tiles when it is large."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus.errors import UsageError
from nexus.images import fitted, read_image
from nexus.process.sources import from_uint8
from nexus.requests import SampleRequest, refuse

LARGE = 1024            # pixels a side, above which a picture is cut into tiles
OVERLAP = 64            # pixels that neighbouring tiles share

TRANSLATES = frozenset({"image", "width", "height", "direction"})      # what a request to a translator may set

ONE_OF_ANOTHER = "this model makes one picture of another"

Translate = Callable[[Tensor], Tensor]


def read_source(request: SampleRequest, channels: int) -> Tensor:
    """The request's picture [1, channels, H, W] in [-1, 1], in its own size or fitted to a given width and height.

    Raises InputError for a file that is no picture.
    """
    array = read_image(request.image, mode="L" if channels == 1 else "RGB")
    if request.width or request.height:
        high, wide = array.shape[:2]
        width = request.width or max(1, round(wide * request.height / high))
        array = fitted(array, width, request.height or max(1, round(high * request.width / wide)))
    return from_uint8(array)


def check_translation(request: SampleRequest, directions: tuple[str, ...]) -> None:
    """UsageError for a request without a picture, for a way that the model lacks, and for what steers other models."""
    refuse(request, TRANSLATES, ONE_OF_ANOTHER)
    if request.image is None:
        raise UsageError(ONE_OF_ANOTHER, hint="add --image FILE")
    check_direction(request.direction or "ab", directions)


def check_direction(direction: str, directions: tuple[str, ...]) -> None:
    """UsageError for a way that the model lacks."""
    if direction not in directions:
        raise UsageError(f"--direction {direction}: this model goes one way, from a to b", hint="leave --direction out")


def translated(translate: Translate, x: Tensor, multiple: int, *, large: int = LARGE,
               overlap: int = OVERLAP) -> Tensor:
    """translate(x) for x [B, C, H, W] of any size; it is asked for sides that are multiples of `multiple` only.

    Tiles are blended linearly where they overlap. A network with instance norms sees each tile's statistics alone.
    """
    if max(x.shape[2:]) <= large:
        return _padded(translate, x, multiple)
    total, weights = None, None
    for top, bottom in _cuts(x.shape[2], large, overlap):
        for left, right in _cuts(x.shape[3], large, overlap):
            made = _padded(translate, x[:, :, top:bottom, left:right], multiple)
            if total is None:
                total = made.new_zeros(len(x), made.shape[1], *x.shape[2:])
                weights = made.new_zeros(x.shape[2:])
            weight = (_ramp(bottom - top, overlap, top > 0, bottom < x.shape[2])[:, None]
                      * _ramp(right - left, overlap, left > 0, right < x.shape[3])).to(made)
            total[:, :, top:bottom, left:right] += weight * made
            weights[top:bottom, left:right] += weight
    return total / weights


def _padded(translate: Translate, x: Tensor, multiple: int) -> Tensor:
    """Translated with its right and lower edge repeated up to a multiple, which is cut off again."""
    h, w = x.shape[2:]
    step = max(multiple, 16)        # reflecting paddings need some pixels to reflect
    down, right = (-(-side // multiple) * multiple if side > step else step for side in (h, w))
    wide = F.pad(x, (0, right - w, 0, down - h), mode="replicate")
    return translate(wide)[:, :, :h, :w]


def _cuts(side: int, large: int, overlap: int) -> list[tuple[int, int]]:
    """Equal tiles that cover a side, each sharing at least `overlap` pixels with the next."""
    if side <= large:
        return [(0, side)]
    count = -(-(side - overlap) // (large - overlap))
    starts = [round(i * (side - large) / (count - 1)) for i in range(count)]
    return [(start, start + large) for start in starts]


def _ramp(length: int, overlap: int, before: bool, after: bool) -> Tensor:
    """Weights [length], rising over the overlap where a tile has a neighbour."""
    weight, rise = torch.ones(length), torch.arange(1, overlap + 1) / (overlap + 1)
    if before:
        weight[:overlap] = rise
    if after:
        weight[-overlap:] = torch.minimum(weight[-overlap:], rise.flip(0))
    return weight
