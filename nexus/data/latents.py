"""A whole set of pictures or sounds encoded once, for training on what a codec makes of it."""

from collections.abc import Callable
from itertools import groupby

import numpy as np
import torch
from torch import Tensor

from nexus.data.audio import AudioSet, crop, drawn_places
from nexus.data.images import ImageSet
from nexus.data.kept import Make, Watch, unkept
from nexus.rng import generator

Keep = Callable[[int, Make, Watch], list[Tensor]]       # a Shelf, or `unkept`

CHUNK = 64      # pictures encoded at once; fixed, so that the same set always gives the same latents
TOGETHER = 8    # sounds, likewise


class LatentSet:
    """Batches like those of its ImageSet, with "latent" [B, C, h, w] float32 in place of "image".

    encode: pictures [B, C, H, W] in [-1, 1] -> latents. variants: how many randomly cropped, shifted (by up to `shift`
    pixels) and mirrored copies of every picture are made; a batch takes one of them at random. keep: makes all parts,
    or reads those that are kept. watch: is told pictures.
    """

    def __init__(self, images: ImageSet, encode: Callable[[Tensor], Tensor], *, shift: int = 0, flip: float = 0.0,
                 variants: int = 1, keep: Keep = unkept, watch: Watch = lambda done, total: None):
        self.images, self.facts = images, images.facts
        copies, chunks = variants if shift or flip or images.cut else 1, -(-len(images) // CHUNK)

        def make(number: int) -> list[Tensor]:
            variant, start = number // chunks, number % chunks * CHUNK
            indices = list(range(start, min(start + CHUNK, len(images))))
            pictures = images.batch(indices, generator(0, "latents", variant, start), shift=shift, flip=flip)
            return [encode(pictures["image"]).float().cpu()]

        def told(done: int, total: int) -> None:
            watch(done * len(images) // chunks, total * len(images) // chunks)
        parts = keep(copies * chunks, make, told)
        self._latents = torch.cat(parts).unflatten(0, (-1, len(images)))    # [variants, pictures, C, h, w]

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: list[int], rng: torch.Generator) -> dict:
        """The latents and labels of some pictures, each in a variant drawn from rng."""
        which = torch.randint(len(self._latents), (len(indices),), generator=rng)
        return {"latent": self._latents[which, torch.as_tensor(indices)], **self.images.labels_of(indices)}


class CodeSet:
    """Batches like those of its AudioSet, with "codes" [B, K, F] int64 beside "audio" (the same places of the sounds).

    encode: sounds [B, C, T] in [-1, 1] -> ids [B, K, F] < 2^15. Every sound is encoded whole, once, neighbours of one
    length together; a batch takes the frames of one crop's length at places drawn from rng, and the samples there, to
    within a frame. keep: makes all parts, or reads those that are kept. watch: is told sounds.
    """

    def __init__(self, sounds: AudioSet, encode: Callable[[Tensor], Tensor], *, keep: Keep = unkept,
                 watch: Watch = lambda done, total: None):
        self.sounds, self.facts = sounds, sounds.facts
        self.frames = encode(torch.zeros(1, sounds.facts.channels, sounds.length)).shape[-1]

        def make(number: int) -> list[Tensor]:
            places = range(number * TOGETHER, min((number + 1) * TOGETHER, len(sounds)))
            alike = (list(part) for _, part in groupby(map(self._long_enough, places), lambda whole: whole.shape))
            return [ids for part in alike for ids in encode(torch.stack(part)).to("cpu", torch.int16)]

        parts = keep(-(-len(sounds) // TOGETHER), make, lambda done, _: watch(min(done * TOGETHER, len(sounds)),
                                                                              len(sounds)))
        self._codes = [ids.numpy() for ids in parts]

    def _long_enough(self, i: int) -> Tensor:
        whole = self.sounds.get(i)
        return torch.from_numpy(crop(whole, max(self.sounds.length, whole.shape[-1]), 0.0))

    def __len__(self) -> int:
        return len(self.sounds)

    def batch(self, indices: list[int], rng: torch.Generator) -> dict:
        """The codes, samples and labels of some sounds."""
        places = drawn_places(len(indices), rng)
        codes = [crop(self._codes[i], self.frames, place) for i, place in zip(indices, places, strict=True)]
        return {"codes": torch.tensor(np.stack(codes), dtype=torch.int64), "audio": self.sounds.crops(indices, places),
                **self.sounds.labels_of(indices)}
