"""A sound as a picture: its mel spectrogram, low below and high above, silent dark and loud light."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus.losses.spectral import mel_filters
from nexus.nn.stft import stft

BANDS = 128                             # of pitch: the picture's height in pixels
WIDEST = 1600                           # pixels; up to it, FINE of them a second
FINE = 80
RANGE = 80.0                            # dB below the loudest that are still told from silence
QUIET = -20.0                           # dB of what is shown as loudest at least, so that silence stays dark
WINDOW = 0.064                          # seconds
# From silence to the loudest; each step is about as much lighter as the last one.
COLOURS = ((0, 0, 8), (58, 12, 94), (140, 41, 99), (212, 72, 66), (246, 141, 36), (252, 255, 190))


def spectrogram(x: Tensor | np.ndarray, rate: int, widest: int = WIDEST) -> np.ndarray:
    """x [C, T] in [-1, 1], T samples at `rate` a second -> uint8 [BANDS, W, 3], W <= widest, from left to right."""
    mono = torch.as_tensor(np.asarray(x)).float().mean(0)
    window = max(32, 2 ** round(math.log2(WINDOW * rate)))
    hop = max(1, round(max(rate / FINE, len(mono) / widest)))
    power = stft(F.pad(mono, (0, window + 1))[None], window, hop).abs().square()[0, :, :-(-len(mono) // hop)]
    mel = mel_filters(rate, window, BANDS, low=min(40.0, rate / 8)) @ power
    decibels = 10 * mel.clamp_min(1e-10).log10()
    loud = ((decibels - max(float(decibels.max()), QUIET)) / RANGE + 1).clamp(0, 1).flip(0)
    return _coloured(loud.numpy())


def _coloured(values: np.ndarray) -> np.ndarray:
    """[H, W] in [0, 1] -> uint8 [H, W, 3]."""
    places = np.linspace(0, 1, len(COLOURS))
    return np.stack([np.interp(values, places, [c[i] for c in COLOURS]) for i in range(3)], -1).round().astype(np.uint8)
