"""A whole set of pictures or sounds encoded once, for training on what a codec makes of it."""

from collections.abc import Callable
from itertools import groupby, islice

import numpy as np
import torch
from torch import Tensor

from nexus.data.audio import AudioSet, crop, drawn_places
from nexus.data.images import ImageSet
from nexus.rng import generator

CHUNK = 64      # pictures encoded at once; fixed, so that the same set always gives the same latents
TOGETHER = 8    # sounds, likewise


class LatentSet:
    """Batches like those of its ImageSet, with "latent" [B, C, h, w] float32 in place of "image".

    encode: pictures [B, C, H, W] in [-1, 1] -> latents. variants: how many randomly shifted (by up to `shift` pixels)
    and mirrored copies of every picture are kept; a batch takes one of them at random.
    """

    def __init__(self, images: ImageSet, encode: Callable[[Tensor], Tensor], *, shift: int = 0, flip: float = 0.0,
                 variants: int = 1, watch: Callable[[int, int], None] = lambda done, total: None):
        self.images, self.facts = images, images.facts
        plain = not shift and not flip
        parts = []
        for variant in range(1 if plain else variants):
            rng = generator(0, "latents", variant)
            for start in range(0, len(images), CHUNK):
                indices = list(range(start, min(start + CHUNK, len(images))))
                parts.append(encode(images.batch(indices, rng, shift=shift, flip=flip)["image"]).float().cpu())
                watch(variant * len(images) + start, len(images) * variants)
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
    within a frame.
    """

    def __init__(self, sounds: AudioSet, encode: Callable[[Tensor], Tensor], *,
                 watch: Callable[[int, int], None] = lambda done, total: None):
        self.sounds, self.facts = sounds, sounds.facts
        self._codes = []
        self.frames = encode(torch.zeros(1, sounds.facts.channels, sounds.length)).shape[-1]
        for _, alike in groupby(map(self._long_enough, range(len(sounds))), lambda whole: whole.shape):
            while part := list(islice(alike, TOGETHER)):
                self._codes.extend(encode(torch.stack(part)).to("cpu", torch.int16).numpy())
                watch(len(self._codes), len(sounds))

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
