"""A whole picture set encoded once, for training on a codec's latents."""

from collections.abc import Callable

import torch
from torch import Tensor

from nexus.data.images import ImageSet
from nexus.rng import generator

CHUNK = 64      # pictures encoded at once; fixed, so that the same set always gives the same latents


class LatentSet:
    """Batches like those of its ImageSet, with "latent" [B, C, h, w] float32 in place of "image".

    encode: pictures [B, C, H, W] in [-1, 1] -> latents. variants: how many randomly shifted (by up to `shift` pixels)
    and mirrored copies of every picture are kept; a batch takes one of them at random.
    """

    def __init__(self, images: ImageSet, encode: Callable[[Tensor], Tensor], *, shift: int = 0, flip: float = 0.0,
                 variants: int = 1, watch: Callable[[int, int], None] = lambda done, total: None):
        self.images, self.facts = images, images.facts
        plain = not shift and not flip
        self._latents = []
        for variant in range(1 if plain else variants):
            rng = generator(0, "latents", variant)
            parts = []
            for start in range(0, len(images), CHUNK):
                indices = list(range(start, min(start + CHUNK, len(images))))
                parts.append(encode(images.batch(indices, rng, shift=shift, flip=flip)["image"]).float().cpu())
                watch(variant * len(images) + start, len(images) * variants)
            self._latents.append(torch.cat(parts))

    def __len__(self) -> int:
        return len(self.images)

    def batch(self, indices: list[int], rng: torch.Generator) -> dict:
        """The latents and labels of some pictures, each in a variant drawn from rng."""
        which = torch.randint(len(self._latents), (len(indices),), generator=rng)
        stacked = torch.stack([self._latents[v][i] for v, i in zip(which.tolist(), indices, strict=True)])
        return {"latent": stacked, **self.images.labels_of(indices)}
