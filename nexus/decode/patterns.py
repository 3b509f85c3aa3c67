"""How several codebooks become one row of steps, and how a long piece becomes windows. Copet et al. 2023 (MusicGen).

B items, K codebooks, T frames, S = T + 1 + the largest delay steps.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def delay(codes: Tensor, delays: tuple[int, ...], special: int) -> Tensor:
    """codes [B, K, T] -> [B, K, S]: a step of `special`, then codebook k shifted right by delays[k].

    What holds no code holds `special`.
    """
    frames = codes.shape[-1]
    out = codes.new_full((*codes.shape[:-1], frames + 1 + max(delays)), special)
    for k, late in enumerate(delays):
        out[:, k, 1 + late:1 + late + frames] = codes[:, k]
    return out


def undelay(sequence: Tensor, delays: tuple[int, ...]) -> Tensor:
    """The inverse of `delay`: [B, K, S, ...] -> [B, K, T, ...]."""
    frames = sequence.shape[2] - 1 - max(delays)
    return torch.stack([sequence[:, k, 1 + late:1 + late + frames] for k, late in enumerate(delays)], 1)


def holds(delays: tuple[int, ...], frames: int, device: torch.device | None = None) -> Tensor:
    """bool [K, S]: the steps that hold a code."""
    step = torch.arange(frames + 1 + max(delays), device=device)
    late = torch.tensor(delays, device=device)[:, None]
    return (step > late) & (step <= late + frames)


def windows(total: int, size: int, stride: int, known: int = 0) -> Iterator[tuple[int, int]]:
    """(start, stop) of the windows that fill frames known .. total, each of at most `size` frames.

    Each begins `stride` frames after the last, so that it is shown size - stride frames of what is there. What is
    known and longer than a window is shown as far as a later window would be.
    """
    start = 0 if known < size else known - (size - stride)
    while known < total:
        known = min(start + size, total)
        yield start, known
        start += stride
