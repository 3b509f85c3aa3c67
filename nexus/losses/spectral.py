"""How far apart two sounds are: on mel spectrograms of several resolutions, and as waves.

N sounds, C channels, T samples, M mel bands.
"""

import math
from functools import cache

import torch
from torch import Tensor

from nexus.nn.precision import full_precision
from nexus.nn.stft import stft

FLOOR = 1e-5                # of what a logarithm is taken of


@cache
def mel_filters(rate: int, window: int, bands: int, low: float = 0.0, high: float | None = None) -> Tensor:
    """Triangles evenly apart on the mel scale (HTK's), over the bins of a window: [bands, window // 2 + 1] float32.

    low, high: Hz at the ends, high None = half the rate.
    """
    def mel(hertz: float) -> float:
        return 2595 * math.log10(1 + hertz / 700)
    with torch.inference_mode(False), torch.device("cpu"):      # what is kept must serve training too
        points = torch.linspace(mel(low), mel(high or rate / 2), bands + 2, dtype=torch.float64)
        edges = 700 * (10 ** (points / 2595) - 1)
        bins = torch.linspace(0, rate / 2, window // 2 + 1, dtype=torch.float64)
        past, width = bins - edges[:, None], edges.diff()[:, None]
        rising, falling = past[:-2] / width[:-1], -past[2:] / width[1:]
        return torch.minimum(rising, falling).clamp_min(0).float()


def mel_spectrogram(x: Tensor, rate: int, window: int, bands: int = 64) -> Tensor:
    """x [N, T] in [-1, 1] -> magnitudes [N, M, frames], float32."""
    with full_precision(x):
        return mel_filters(rate, window, bands).to(x.device) @ stft(x, window).abs()


def mel_distance(made: Tensor, x: Tensor, rate: int, exponents: tuple[int, ...] = (5, 6, 7, 8, 9, 10, 11),
                 bands: int = 64) -> Tensor:
    """Mean over windows of 2^i samples of |S - S'| and of the length of log S - log S' in each frame: a scalar.

    made, x [B, C, T]. The multi-scale loss of Defossez et al. 2022, eq. 2 (alpha = 1), with the logarithm of Gritsenko
    et al. 2020 and SoundStream in the second term. Both terms are means over bands, so that M does not weigh them.
    """
    made, x = made.flatten(0, 1), x.flatten(0, 1)
    terms = []
    for i in exponents:
        ours, theirs = (mel_spectrogram(sound, rate, 1 << i, bands) for sound in (made, x))
        logs = (ours.clamp_min(FLOOR).log() - theirs.clamp_min(FLOOR).log()).square().mean(1)
        terms.append((ours - theirs).abs().mean() + (logs + FLOOR ** 2).sqrt().mean())
    return torch.stack(terms).mean()


def si_sdr(made: Tensor, x: Tensor) -> Tensor:
    """Scale-invariant signal to distortion ratio of made [..., T] against x, in dB, one for each [...].

    Le Roux et al. 2019. Silence has none: it is given the value of a distortion as loud as itself.
    """
    made, x = made.float() - made.float().mean(-1, keepdim=True), x.float() - x.float().mean(-1, keepdim=True)
    energy = x.square().sum(-1, keepdim=True)
    target = (made * x).sum(-1, keepdim=True) / energy.clamp_min(FLOOR ** 2) * x
    kept, lost = (part.square().sum(-1) + FLOOR ** 2 for part in (target, made - target))
    return 10 * torch.log10(kept / lost)
