"""Randomness as a pure function of names and numbers, so that nothing needs to be saved to resume."""

import hashlib

import torch


def derive(*key: int | str) -> int:
    """A 63-bit seed mixed from a key such as (seed, "noise", rank, step)."""
    text = "\x1f".join(f"{type(part).__name__}:{part}" for part in key)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def generator(*key: int | str) -> torch.Generator:
    """A CPU generator seeded from the key; equal keys give equal draws on every machine."""
    return torch.Generator().manual_seed(derive(*key))


class ItemNoise:
    """Gaussian noise in which item i depends on its own seed alone, never on its batch.

    Calling it with x [B, ...] returns fresh noise of x's shape, drawn in float32 on the CPU, on x's device.
    """

    def __init__(self, seeds: list[int], stream: str = "noise"):
        self._generators = [generator(seed, stream) for seed in seeds]

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return self.draw(tuple(x.shape[1:])).to(x)

    def draw(self, shape: tuple[int, ...]) -> torch.Tensor:
        """One draw of `shape` an item: float32 [B, *shape] on the CPU."""
        return torch.stack([torch.randn(shape, generator=g) for g in self._generators])
