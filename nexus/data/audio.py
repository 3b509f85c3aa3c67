"""Sound sets: a user's folder or tars of sound files with captions.

Letters: B sounds, C channels, T samples of a crop, N sounds in a set.
"""

import hashlib
from collections.abc import Iterable
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import torch

from nexus import sounds
from nexus.data.folders import Found, find
from nexus.data.opened import Files, nothing_usable
from nexus.data.spec import SOUND_SETS, is_embedded
from nexus.data.split import SPLITS, chosen
from nexus.errors import InputError, UsageError
from nexus.text.match import normal

ENDINGS = ".wav .flac .ogg .oga .mp3 .aif .aiff .m4a .aac .opus .wma".split()  # the last ones only to be told of
SHORTEST = 0.1  # seconds; shorter ones are clicks
KEEP_BYTES = 2**30  # a user's sounds stay in memory, at the set's rate, up to this much
DEFAULT_RATE, DEFAULT_SECONDS = 16_000, 10.0


class Facts(NamedTuple):
    """What a set is: a model's config takes its words from here, a run records the digest."""

    rate: int  # samples a second
    channels: int
    count: int  # sounds in this split
    digest: str  # sha256 over names, captions and bytes of this split
    seconds: float  # of a crop
    words: tuple[str, ...] = ()  # of all captions of the whole set, whatever the split
    classes: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()


class AudioSet:
    """Sounds with captions, of which a batch holds crops of one length."""

    medium: ClassVar[str] = "audio"

    def __init__(self, facts: Facts, files: Files, skipped: Iterable[tuple[str, str]] = ()):
        self.facts = facts
        self.captions = [file.caption for file in files.found]
        self.names = [file.name for file in files.found]
        self.skipped = list(skipped)  # (name, reason) of every sound that was left out
        self.length = round(facts.seconds * facts.rate)  # samples of a crop
        self._files = files

    def __len__(self) -> int:
        return len(self.captions)

    def get(self, i: int) -> np.ndarray:
        """The whole of sound i -> float32 [C, T] in [-1, 1]; InputError if its file has changed since opening."""
        return self._files.get(i).astype(np.float32) / 2**15

    def batch(self, indices: list[int], rng: torch.Generator | None = None, *,
              shift: int = 0, flip: float = 0.0) -> dict:
        """Crops as "audio" float32 [B, C, T] in [-1, 1], with "caption" and "index" [B].

        Their places are drawn from rng; without one they are beginnings. A sound that is too short ends in silence.
        Raises UsageError for a shift or flip, which sounds have not, InputError as `get` does.
        """
        if shift or flip:
            raise UsageError("sounds are neither shifted nor flipped", hint="train.shift=0 and train.flip=0")
        places = [0.0] * len(indices) if rng is None else drawn_places(len(indices), rng)
        return {"audio": self.crops(indices, places), **self.labels_of(indices)}

    def crops(self, indices: list[int], places: list[float]) -> torch.Tensor:
        """float32 [B, C, T]: the crops of sounds that begin at places in [0, 1) of where they can."""
        cut = [crop(self._files.get(i), self.length, place) for i, place in zip(indices, places, strict=True)]
        return torch.from_numpy(np.stack(cut).astype(np.float32) / 2**15)

    def labels_of(self, indices: list[int]) -> dict:
        """What `batch` says of sounds besides their samples: "caption" and "index" [B]."""
        return {"caption": [self.captions[i] for i in indices], "index": torch.as_tensor(indices, dtype=torch.int64)}


def drawn_places(count: int, rng: torch.Generator) -> list[float]:
    """Where each of `count` crops begins, uniform in [0, 1)."""
    return torch.rand(count, generator=rng, dtype=torch.float64).tolist()


def crop(x: np.ndarray, length: int, place: float) -> np.ndarray:
    """x [..., T] -> [..., length]; place in [0, 1): 0 is its beginning. Zeros follow what is too short."""
    start = int(place * max(x.shape[-1] - length + 1, 1))
    cut = x[..., start:start + length]
    return np.pad(cut, [(0, 0)] * (x.ndim - 1) + [(0, length - cut.shape[-1])])


def open_audio(spec: str, *, rate: int | None = None, channels: int | None = None, seconds: float | None = None,
               split: str = "train") -> AudioSet:
    """Opens a folder, or a .tar (or a glob of them), of sound files at `rate` samples a second in 1 or 2 channels.

    seconds: of the crops. Captions, and what is held out of training, are those of a folder of pictures. Without
    them: 16,000 samples a second, 1 channel, 10 seconds. Raises UsageError for a bad option, InputError when there is
    nothing to hear; single bad files land in `.skipped` instead.
    """
    rate, channels, seconds = rate or DEFAULT_RATE, channels or 1, seconds or DEFAULT_SECONDS
    if split not in SPLITS:
        raise UsageError(f"split {split!r} is unknown, expected one of {', '.join(SPLITS)}")
    if channels not in (1, 2) or not 0 < seconds <= sounds.SECONDS_LIMIT or not 1 <= rate <= 384_000:
        raise UsageError(f"{seconds} s of {channels} channels at {rate} are out of range",
                         hint=f"1 or 2 channels, up to {sounds.SECONDS_LIMIT} s and 384,000 samples a second")
    if is_embedded(spec):
        raise UsageError(f"--data '{spec}' are pictures, but this system learns from sound", hint=SOUND_SETS)
    found, skipped = find(spec, ENDINGS, SOUND_SETS)
    files = Files.opened(found, skipped, partial(_check, rate=rate, channels=channels), KEEP_BYTES)
    if not files.found:
        raise nothing_usable("sound", spec, ", ".join(sounds.BITS), skipped)
    words = {word for file in files.found for word in normal(file.caption).split()}
    files = files.part(chosen([file.name for file in files.found], split, spec))
    facts = Facts(rate, channels, len(files.found), files.digest(), seconds, tuple(sorted(words)))
    return AudioSet(facts, files, skipped)


def _check(file: Found, *, rate: int, channels: int) -> tuple[np.ndarray | None, str]:
    """(the sound int16 [C, T], sha256 of its bytes), or (None, why it cannot be used)."""
    try:
        if file.place.length > sounds.FILE_LIMIT:
            return None, f"{file.place.length} bytes, more than the {sounds.FILE_LIMIT} allowed"
        data = file.place.read()
        x = sounds.decode(data, rate, channels)
        if x.shape[1] < SHORTEST * rate:
            return None, f"{x.shape[1] / rate:.3f} s, shorter than {SHORTEST}"
        return (x * 2**15).round().clip(-2**15, 2**15 - 1).astype(np.int16), hashlib.sha256(data).hexdigest()
    except (InputError, OSError) as error:
        return None, " ".join(str(error).split())
