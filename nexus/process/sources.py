"""What a run starts from besides fresh noise: a user's picture and mask, or stored noise."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nexus.errors import InputError, UsageError
from nexus.images import fitted, read_image
from nexus.process import outpaint
from nexus.requests import SampleRequest


class Known(NamedTuple):
    """picture [1, C, H, W] in [-1, 1]; mask bool [1, 1, H, W], True where it is painted anew, or None."""

    picture: Tensor
    mask: Tensor | None


def from_uint8(picture: np.ndarray) -> Tensor:
    """uint8 [H, W, C], as a file holds it -> float32 [1, C, H, W] in [-1, 1]; the array is copied."""
    return torch.from_numpy(picture.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1


def read_files(request: SampleRequest, mode: str = "RGB") -> tuple[np.ndarray, np.ndarray | None] | None:
    """The request's picture uint8 [H, W, C] and mask [H, W, 1] as they are in their files, or None without a picture.

    Raises UsageError for a mask alone, InputError for a file that is no picture and for a mask of another size.
    """
    if request.image is None:
        if request.mask is not None:
            raise UsageError("--mask needs --image: the picture that is painted in", hint="add -i FILE")
        return None
    array = read_image(request.image, mode=mode)
    if request.mask is None:
        return array, None
    mask = read_image(request.mask, mode="L")
    if mask.shape[:2] != array.shape[:2]:
        raise InputError(f"the mask {request.mask} is {mask.shape[1]}x{mask.shape[0]} pixels, its picture "
                         f"{array.shape[1]}x{array.shape[0]}",
                         hint="give a mask of the picture's size; white is painted anew")
    return array, mask


def read_known(request: SampleRequest, shape: tuple[int, int, int], config, device: torch.device) -> Known | None:
    """The request's picture and mask (which must have the picture's size), or None; raises as `read_files` does.

    Both keep their proportions: they are resized to cover the run's size, and their middle is taken. A picture that is
    painted around keeps its pixels.
    """
    files = read_files(request, "L" if config.image_channels == 1 else "RGB")
    if files is None:
        return None
    factor = config.codec.net.factor if config.codec else 1
    width, height = shape[2] * factor, shape[1] * factor
    if request.outpaint is not None:
        files = outpaint.framed(request.outpaint, files, width, height)
    picture = from_uint8(fitted(files[0], width, height)).to(device)
    if files[1] is None:
        return Known(picture, None)
    mask = torch.from_numpy(fitted(files[1], width, height, mask=True)).permute(2, 0, 1)[None]
    return Known(picture, (mask > 127).to(device))


def noise_rows(path: str, shape: tuple[int, ...]) -> Tensor:
    """Key `noise` of a safetensors file as float32 [rows, *shape]; InputError for a file that has none such."""
    if not Path(path).is_file():
        raise InputError(f"there is no noise file '{path}'", hint="a .safetensors file with the key 'noise'")
    try:
        with safe_open(path, "pt") as file:
            if "noise" not in file.keys():
                raise InputError(f"{path} has no key 'noise'", hint=f"keys: {', '.join(list(file.keys())[:5])}")
            noise = file.get_tensor("noise")
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"cannot read the noise file {path}: {error}",
                         hint="a .safetensors file with the key 'noise'") from None
    if not noise.is_floating_point() or not noise.isfinite().all():
        raise InputError(f"{path}: its noise is not all finite numbers", hint="draws of a normal distribution")
    rows = noise.float()[None] if noise.shape == shape else noise.float()
    if rows.shape[1:] != shape or not len(rows):
        raise InputError(f"the noise is {list(noise.shape)}, [N, {', '.join(map(str, shape))}] expected",
                         hint="one row an item, in the model's latent shape")
    return rows


def read_noise(request: SampleRequest, shape: tuple[int, ...], count: int = 1) -> Tensor:
    """`noise_rows` of a request as [count, *shape]: items take a row each from its `noise_row` on, or all the only one.

    InputError where there are fewer.
    """
    rows, first = noise_rows(request.initial_noise, shape), request.noise_row or 0
    if len(rows) == 1:
        return rows.expand(count, *shape)
    if first + count > len(rows):
        raise InputError(f"{request.initial_noise} has {len(rows)} rows of noise, item {first + count} has none",
                         hint="one row an item, or one for all")
    return rows[first:first + count]
