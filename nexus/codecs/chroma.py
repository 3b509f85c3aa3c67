"""Chroma: how loud each of the twelve notes of the octave is, over time; a melody without its instrument.

The bank is that of librosa (Ellis 2007), the use of its loudest bin alone that of MusicGen (Copet et al. 2023).
B items, T samples, F frames, N bins.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from nexus.config import Config

A0 = 27.5                       # Hz: octaves are counted from here
CENTRE, SPREAD = 5.0, 2.0       # octaves above A0: where the bank hears best, and how far around it


class ChromaConfig(Config):
    """exponent: the window is 2 ** exponent samples, and the hop a quarter of it. bins: notes an octave.

    loudest: each frame is a 1 at its loudest bin, else all bins over the loudest.
    """

    exponent: int = Field(14, ge=5, le=20)
    bins: int = Field(12, ge=2, le=96)
    loudest: bool = True

    @property
    def hop(self) -> int:
        """Samples from a frame to the next."""
        return (1 << self.exponent) // 4

    def frames(self, samples: int) -> int:
        """Frames of so many samples."""
        return 1 + max(samples, 1 << self.exponent) // self.hop


def chroma(x: Tensor, rate: int, config: ChromaConfig) -> Tensor:
    """x [B, T] in [-1, 1] of `rate` samples a second -> [B, F, N] in [0, 1].

    Sound shorter than a window has silence put around it; silence itself is all on bin 0.
    """
    size = 1 << config.exponent
    if (short := size - x.shape[-1]) > 0:
        x = F.pad(x, (short // 2, short - short // 2))
    window = torch.hann_window(size, device=x.device)
    spectrum = torch.stft(x.float(), size, config.hop, window=window, pad_mode="reflect", return_complex=True)
    power = spectrum.abs().square() / window.square().sum()                     # [B, size / 2 + 1, F]
    found = (bank(rate, size, config.bins).to(x.device) @ power).transpose(1, 2)
    found = found / found.amax(-1, keepdim=True).clamp_min(1e-6)
    return F.one_hot(found.argmax(-1), config.bins).float() if config.loudest else found


@lru_cache(maxsize=8)
def bank(rate: int, size: int, bins: int) -> Tensor:
    """float32 [N, size / 2 + 1]: how much each note hears of each frequency of a window of `size` samples.

    A note's ear is a Gaussian on the circle of the octave, as wide as the step between neighbouring frequencies but at
    least one note; columns have unit length, and are weighted by a Gaussian over octaves. Bin 0 is C.
    """
    with torch.inference_mode(False), torch.device("cpu"):
        hertz = torch.arange(1, size, dtype=torch.float64) * rate / size
        note = bins * torch.log2(hertz / A0)
        note = torch.cat([note[:1] - 1.5 * bins, note])                         # 0 Hz lies far below
        width = torch.cat([note.diff().clamp_min(1.0), torch.ones(1, dtype=torch.float64)])
        half = round(bins / 2)
        away = torch.remainder(note - torch.arange(bins)[:, None] + half, bins) - half
        heard = torch.exp(-2 * (away / width).square())
        heard = heard / heard.norm(dim=0, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        heard = heard * torch.exp(-0.5 * ((note / bins - CENTRE) / SPREAD).square())
        return heard.roll(-3 * (bins // 12), 0)[:, :size // 2 + 1].float().contiguous()     # from A to C
