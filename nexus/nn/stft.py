"""The short-time Fourier transform that losses, critics and pictures of sounds look at."""

import torch
from torch import Tensor


def stft(x: Tensor, window: int, hop: int | None = None) -> Tensor:
    """x [N, T] -> complex [N, window // 2 + 1, frames]: a Hann window of unit energy, a quarter of it a step.

    Its ends are mirrored, so T has to be above window // 2.
    """
    hann = torch.hann_window(window, device=x.device)
    return torch.stft(x.float(), window, hop or window // 4, window=hann / hann.norm(), return_complex=True)
