"""The data a system learns from: sounds, pictures, or pictures of two kinds, a and b.

Those come in any company (unaligned), or each with its counterpart (aligned).
"""

import hashlib
from pathlib import PurePosixPath
from typing import ClassVar

import torch

from nexus.config import Config
from nexus.data.audio import AudioSet, open_audio
from nexus.data.images import ImageSet, open_images
from nexus.data.spec import split_spec
from nexus.errors import InputError, UsageError
from nexus.rng import generator


class TwoSets:
    """Batches of the first set, with pictures of the second as "other" [B, C, H, W].

    aligned: places of both sets [(i, j), ...] that belong together, else None; then "other" are drawn at random.
    `facts` are those of the first, with the digest of both.
    """

    medium: ClassVar[str] = "image"

    def __init__(self, a: ImageSet, b: ImageSet, aligned: list[tuple[int, int]] | None):
        self.a, self.b, self.aligned = a, b, aligned
        digest = hashlib.sha256(f"{a.facts.digest} {b.facts.digest} {aligned is not None}".encode()).hexdigest()
        self.facts = a.facts._replace(digest=digest, count=len(self))
        self.skipped = [*a.skipped, *b.skipped]

    def __len__(self) -> int:
        return len(self.a) if self.aligned is None else len(self.aligned)

    def batch(self, indices: list[int], rng: torch.Generator | None = None, *, shift: int = 0,
              flip: float = 0.0) -> dict:
        """As of an ImageSet; counterparts are moved and mirrored alike. Without an rng b's pictures are taken in turn.

        "index" counts this set.
        """
        how = {"shift": shift, "flip": flip}
        if self.aligned is not None:
            rows, others = zip(*(self.aligned[i] for i in indices), strict=True)
            drawn = None if rng is None else int(torch.randint(2**62, (), generator=rng))
            rngs = [None if drawn is None else generator(drawn, "both") for _ in "ab"]
        else:
            rows, rngs = indices, [rng, rng]
            others = [i % len(self.b) for i in indices] if rng is None else \
                torch.randint(len(self.b), (len(indices),), generator=rng).tolist()
        batch = self.a.batch(list(rows), rngs[0], **how)
        other = self.b.batch(list(others), rngs[1], **how)["image"]
        return batch | {"other": other, "index": torch.as_tensor(indices)}


def open_for(config: Config, spec: str, *, load: int = 0, **options) -> ImageSet | TwoSets | AudioSet:
    """What `--data` names, as a system of this Config learns from it. load: see `open_data`; options: the split.

    Sounds for a Config whose `medium` is "audio", at its `rate`, `channels` and `seconds`; else pictures of its
    `image_size` and `image_channels`, one set or as its `domains` say. Raises as `open_data` and `open_audio`.
    """
    if getattr(config, "medium", "image") == "audio":
        if load:
            raise UsageError(f"train.load={load}: sounds have no side", hint="train.load=0")
        return open_audio(spec, rate=config.rate, channels=config.channels, seconds=config.seconds, **options)
    return open_data(spec, load=load, size=getattr(config, "image_size", None),
                     channels=getattr(config, "image_channels", None), domains=getattr(config, "domains", None),
                     **options)


def open_data(spec: str, *, domains: str | None = None, load: int = 0, size: int | None = None,
              **options) -> ImageSet | TwoSets:
    """The set or the two sets that `--data` names, opened as `open_images` does.

    domains: "unaligned" or "aligned" for a system that learns from two. load: the side that pictures are read at, of
    which a random part of `size` is taken. Raises UsageError where the number of sets is wrong, or load is less than
    size, InputError where no picture of one set has a counterpart in the other.
    """
    if load and (size is None or load < size):
        raise UsageError(f"train.load={load}: a part of {size or 'unknown'} pixels cannot be taken of such pictures",
                         hint=f"train.load={round((size or 256) * 286 / 256)}, or 0 to read them at their size")

    def opened(part: str) -> ImageSet:
        images = open_images(part, size=load or size, **options)
        return images.cropped(size) if load else images
    parts = split_spec(spec)
    if domains is None and len(parts) > 1:
        raise UsageError(f"--data '{spec}' is two sets, but this system learns from one", hint="name one set")
    if domains is not None and len(parts) == 1:
        raise UsageError(f"--data '{spec}' is one set, but this system learns from two kinds of pictures",
                         hint="--data A_FOLDER,B_FOLDER or emoji:STYLE,emoji:STYLE")
    if domains is None:
        return opened(parts[0])
    a, b = map(opened, parts)
    return TwoSets(a, b, counterparts(a, b, spec) if domains == "aligned" else None)


def counterparts(a: ImageSet, b: ImageSet, spec: str = "") -> list[tuple[int, int]]:
    """Places of both sets with the same name (of files: without the tar and the ending); InputError for none."""
    there = {_stem(name): j for j, name in enumerate(b.names)}
    pairs = [(i, there[_stem(name)]) for i, name in enumerate(a.names) if _stem(name) in there]
    if not pairs:
        raise InputError(f"no picture of the first set has a counterpart of the same name in the second: {spec}",
                         hint="a/1.png goes with b/1.png")
    return pairs


def _stem(name: str) -> str:
    path = PurePosixPath(name.rpartition(":")[2])
    return str(path.with_suffix("")) if path.suffix else name
