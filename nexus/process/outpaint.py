"""Painting around a picture: it becomes the known middle of a larger one, and its surroundings a mask."""

from typing import NamedTuple

import numpy as np

from nexus.errors import InputError, UsageError
from nexus.images import PIXEL_LIMIT, read_image
from nexus.requests import SampleRequest, margins


class Frame(NamedTuple):
    """Pixels that are painted on each side of a picture."""

    left: int
    top: int
    right: int
    bottom: int


def asked(text: str, width: int, height: int) -> Frame:
    """The pixels that LEFT,TOP,RIGHT,BOTTOM stand for around a picture of this size."""
    sides = zip(margins(text), (width, height, width, height), strict=True)
    return Frame(*(round(side * float(part[:-1]) / 100) if part.endswith("%") else int(part) for part, side in sides))


def sized(request: SampleRequest, multiple: int) -> SampleRequest:
    """The request with the size of its picture and what is painted around it, up to a multiple of the model's.

    Raises UsageError without a picture, with a size of its own, and for a side that does not fit and stays as it is.
    """
    if request.image is None:
        raise UsageError("--outpaint needs --image: the picture that is painted around", hint="add -i FILE")
    if request.width is not None or request.height is not None:
        raise UsageError("--outpaint says how large the result is: --width and --height have no meaning with it",
                         hint="leave them out")
    height, width = read_image(request.image).shape[:2]
    frame = asked(request.outpaint, width, height)
    sides = {}
    for name, side, more in (("width", width, frame.left + frame.right), ("height", height, frame.top + frame.bottom)):
        if side % multiple and not more:
            raise UsageError(f"{name} {side}: this model makes multiples of {multiple}",
                             hint=f"paint a little on a side there too, or bring the picture to a {name} of "
                                  f"{max(multiple, round(side / multiple) * multiple)}")
        sides[name] = -(-(side + more) // multiple) * multiple
    if sides["width"] * sides["height"] > PIXEL_LIMIT:
        raise InputError(f"{sides['width']}x{sides['height']} pixels is too large (limit {PIXEL_LIMIT:,})",
                         hint="smaller margins in --outpaint")
    return request.model_copy(update=sides)


def framed(text: str, files: tuple[np.ndarray, np.ndarray | None], width: int, height: int
           ) -> tuple[np.ndarray, np.ndarray]:
    """A picture uint8 [H, W, C] and its mask [H, W, 1] or None -> both in the size that `sized` gave the run.

    The border is the picture's edge carried outwards, and white in the mask. What rounding up to the model's multiple
    added goes to the wider of two opposite sides.
    """
    array, mask = files
    frame = asked(text, array.shape[1], array.shape[0])
    left, right = _grown(frame.left, frame.right, width - array.shape[1])
    top, bottom = _grown(frame.top, frame.bottom, height - array.shape[0])
    border = ((top, bottom), (left, right), (0, 0))
    inner = np.zeros((*array.shape[:2], 1), np.uint8) if mask is None else mask
    return np.pad(array, border, mode="edge"), np.pad(inner, border, constant_values=255)


def _grown(first: int, second: int, total: int) -> tuple[int, int]:
    rest = total - first - second
    return (first + rest, second) if first > second else (first, second + rest)
