"""Patches of a transformer over pictures: how many there are, and back from tokens to a picture.

B = batch, C = channels, L = patches, p = side of a patch.
"""

from torch import Tensor

from nexus.errors import InputError


def grid_of(x: Tensor, patch: int, what: str = "latent") -> tuple[int, int]:
    """Rows and columns of the patches of x [B, C, H, W]; InputError naming `what` when its sides do not divide."""
    height, width = x.shape[-2:]
    if height % patch or width % patch:
        raise InputError(f"a {what} of {height}x{width} does not divide into patches of {patch}x{patch}",
                         hint=f"choose sides that are multiples of {patch}")
    return height // patch, width // patch


def unpatched(tokens: Tensor, rows: int, cols: int, patch: int) -> Tensor:
    """tokens [B, L, p * p * C] -> [B, C, rows * p, cols * p]."""
    x = tokens.unflatten(2, (patch, patch, -1)).unflatten(1, (rows, cols))                # [B, h, w, p, q, C]
    return x.permute(0, 5, 1, 3, 2, 4).reshape(len(tokens), -1, rows * patch, cols * patch)
