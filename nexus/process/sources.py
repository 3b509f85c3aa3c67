"""What a run starts from besides fresh noise: a user's picture and mask, or stored noise."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nexus.errors import InputError, UsageError
from nexus.images import read_image
from nexus.requests import SampleRequest


class Known(NamedTuple):
    """picture [1, C, H, W] in [-1, 1]; mask bool [1, 1, H, W], True where it is painted anew, or None."""

    picture: Tensor
    mask: Tensor | None


def read_known(request: SampleRequest, shape: tuple[int, int, int], config, device: torch.device) -> Known | None:
    """The request's picture (resized to the run) and mask (which must have the picture's size), or None."""
    if request.image is None:
        if request.mask is not None:
            raise UsageError("--mask needs --image: the picture that is painted in", hint="add -i FILE")
        return None
    factor = config.codec.net.factor if config.codec else 1
    size = (shape[2] * factor, shape[1] * factor)
    mode = "L" if config.image_channels == 1 else "RGB"
    array = read_image(request.image, mode=mode)
    picture = torch.from_numpy(_resized(array, size, Image.Resampling.LANCZOS)).permute(2, 0, 1)[None]
    picture = picture.to(device, torch.float32) / 127.5 - 1
    if request.mask is None:
        return Known(picture, None)
    mask = read_image(request.mask, mode="L")
    if mask.shape[:2] != array.shape[:2]:
        raise InputError(f"the mask is {mask.shape[1]}x{mask.shape[0]}, its picture {array.shape[1]}x{array.shape[0]}",
                         hint="give a mask of the picture's size; white is painted anew")
    small = _resized(mask, size, Image.Resampling.BOX)
    return Known(picture, torch.from_numpy(small > 127).permute(2, 0, 1)[None].to(device))


def _resized(array: np.ndarray, size: tuple[int, int], how: Image.Resampling) -> np.ndarray:
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    out = np.asarray(image if image.size == size else image.resize(size, how))
    return np.array(out[:, :, None] if out.ndim == 2 else out)


def read_noise(path: str, shape: tuple[int, int, int], seeds: list[int]) -> Tensor:
    """Key `noise` of a safetensors file as float32 [B, *shape]; item i takes row i, a single row serves all."""
    if not Path(path).is_file():
        raise InputError(f"there is no noise file '{path}'", hint="a .safetensors file with the key 'noise'")
    try:
        with safe_open(path, "pt") as file:
            if "noise" not in file.keys():
                raise InputError(f"{path} has no key 'noise'", hint=f"keys: {', '.join(list(file.keys())[:5])}")
            noise = file.get_tensor("noise").float()
    except (SafetensorError, OSError, RuntimeError) as error:
        raise InputError(f"cannot read the noise file {path}: {error}") from None
    rows = noise[None] if noise.shape == shape else noise
    if rows.shape[1:] != shape or len(rows) not in (1, len(seeds)):
        raise InputError(f"the noise is {list(noise.shape)}, [{len(seeds)}, {', '.join(map(str, shape))}] expected",
                         hint="one row an item, in the model's latent shape; --batch-size must hold them all")
    return rows.expand(len(seeds), *shape)
