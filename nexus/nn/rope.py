"""Rotary positions on several axes. Su et al. 2021 (RoFormer), arXiv:2104.09864; the axes are FLUX's."""

import torch
from torch import Tensor

Rotation = tuple[Tensor, Tensor]         # cosines and sines, each [L, D / 2] float32


def axial_rotation(positions: Tensor, axes: tuple[int, ...], *, theta: float = 10_000.0) -> Rotation:
    """positions [L, A] -> the rotation of heads of width sum(axes); axis a turns the next axes[a] (even) channels.

    Frequencies fall geometrically from 1 to about 1/theta within each axis; a token at 0 everywhere is not turned.
    """
    angles = []
    for place, dim in zip(positions.double().unbind(-1), axes, strict=True):
        omega = theta ** -(torch.arange(0, dim, 2, dtype=torch.float64, device=positions.device) / dim)
        angles.append(place[:, None] * omega)
    angle = torch.cat(angles, -1)
    return angle.cos().float(), angle.sin().float()


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """x [..., L, D] with each pair of neighbouring channels turned, in float32; returned in x's dtype."""
    cos, sin = rotation
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2).to(x.dtype)


def grid_positions(rows: int, cols: int, *, first: int = 0) -> Tensor:
    """(first, row, column) of every place of a grid: [rows * cols, 3], row by row."""
    row, col = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    return torch.stack([torch.full_like(row, first), row, col], -1).flatten(0, 1)
