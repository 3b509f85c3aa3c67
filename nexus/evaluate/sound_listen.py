"""What the probes of sound look at: timbre from mel bands, the beat from their onsets, keys from pitch classes.

T samples, M mel bands, F frames.
"""

import math
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus.evaluate.sound_attributes import Features
from nexus.evaluate.sound_features import BANDS, HOP, RATE, log_mel
from nexus.nn.stft import stft

PARTS = 4                               # of the bands, low to high, that onsets are counted in; and all of them
BEATS = torch.exp(torch.linspace(math.log(20), math.log(600), 150, dtype=torch.float64))    # a minute
LAGS = round(60 / 20 * RATE / HOP) + 2  # frames
SEMITONES = torch.arange(28, 101, dtype=torch.float64)          # MIDI numbers, E1 to E7
REGISTERS = ((28, 52), (52, 76), (76, 101))                     # bass, middle, above
PITCH_WINDOW = 8192                     # samples, half a second: semitones are told apart from C3 up
BINS, WIDTH = 0.35, 0.25                # how far around a note its frequencies lie: in bins or semitones, the wider
TIMBRE, BEAT, PITCH = 5 * BANDS, (PARTS + 1) * len(BEATS), len(REGISTERS) * 12
NAME = f"timbre {BANDS} beat {PARTS} {len(BEATS)} pitch {PITCH_WINDOW} {REGISTERS} {BINS} {WIDTH}"


def listen(x: Tensor) -> Tensor:
    """x [T] -> what `features` takes apart: one row of numbers."""
    mel = log_mel(x)
    return torch.cat([timbre(mel), beat(mel).flatten(), pitch_classes(x).flatten()])


def features(rows: Tensor) -> Features:
    """Rows [N, TIMBRE + BEAT + PITCH] as the probes see them."""
    timbre_part, beat_part, pitch_part = rows.split((TIMBRE, BEAT, PITCH), 1)
    return Features(timbre_part[:, None], beat_part[:, None], rotated(pitch_part.unflatten(1, (-1, 12))))


def timbre(mel: Tensor) -> Tensor:
    """mel [M, F] -> [5 M]: each band's mean, deviation, restlessness, quietest and loudest tenth."""
    ends = torch.quantile(mel, torch.tensor([0.1, 0.9]), dim=1)
    return torch.cat([mel.mean(1), mel.std(1), mel.diff(dim=1).abs().mean(1), *ends])


def beat(mel: Tensor) -> Tensor:
    """mel [M, F] -> [PARTS + 1, 150]: how alike the onsets are to themselves a beat later, for each tempo in BEATS.

    Onsets are what bands gain from a frame to the next; their autocorrelation is 1 at no lag.
    """
    gains = mel.diff(dim=1).clamp_min(0)
    onsets = torch.stack([part.mean(0) for part in (*gains.split(len(gains) // PARTS), gains)]).double()
    onsets = onsets - onsets.mean(1, keepdim=True)
    size = 1 << (onsets.shape[1] + LAGS - 1).bit_length()
    alike = torch.fft.irfft(torch.fft.rfft(onsets, size).abs().square(), size)[:, :LAGS]
    alike = alike / alike[:, :1].clamp_min(1e-9)
    lag = 60 / BEATS * RATE / HOP
    below = lag.floor().long()
    return torch.lerp(alike[:, below], alike[:, below + 1], lag - below).float()


def pitch_classes(x: Tensor) -> Tensor:
    """x [T] -> [3, 12]: how much more than the others each note, from C, sounds in the bass, the middle and above."""
    x = F.pad(x, (0, max(0, PITCH_WINDOW - len(x))))
    notes = note_bank() @ stft(x[None], PITCH_WINDOW, PITCH_WINDOW // 8)[0].abs()
    notes = (1 + 10 * notes / notes.mean().clamp_min(1e-9)).log().mean(1)
    rows = []
    for low, high in REGISTERS:
        places = torch.arange(low, high) % 12
        folded = torch.zeros(12).index_add_(0, places, notes[low - 28:high - 28])
        rows.append(folded - folded.mean())
    return torch.stack(rows)


def rotated(classes: Tensor) -> Tensor:
    """classes [N, 3, 12] -> [N, 12, 36]: place r begins with the note r semitones above C, as tonic r hears it."""
    return torch.stack([classes.roll(-r, 2).flatten(1) for r in range(12)], 1)


@cache
def note_bank() -> Tensor:
    """float32 [73, PITCH_WINDOW // 2 + 1]: for each semitone, the mean of the frequencies about it."""
    hertz = torch.arange(PITCH_WINDOW // 2 + 1, dtype=torch.float64) * RATE / PITCH_WINDOW
    notes = 69 + 12 * torch.log2(hertz.clamp_min(1e-3) / 440)
    width = (BINS * 12 / math.log(2) * (RATE / PITCH_WINDOW) / hertz.clamp_min(1)).clamp_min(WIDTH)   # semitones
    bank = torch.exp(-0.5 * ((notes - SEMITONES[:, None]) / width).square())
    return (bank / bank.sum(1, keepdim=True)).float()
