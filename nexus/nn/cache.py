"""Keys and values that a decoder has made already, owned by its caller.

B items, H heads, L places, D numbers a head.
"""

import torch
from torch import Tensor


class KVCache:
    """Room for the keys and values of `layers` layers, L = `length` places each, filled in place from the left.

    used: places that every layer has. Written in place, so a cache serves one run of decoding.
    """

    def __init__(self, layers: int, batch: int, heads: int, length: int, dim: int, *,
                 device: torch.device | None = None, dtype: torch.dtype | None = None):
        shape = (layers, batch, heads, length, dim)
        self.keys, self.values = (torch.empty(shape, device=device, dtype=dtype) for _ in range(2))
        self.used = 0

    def extend(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add k and v [B, H, n, D] of new places; -> all of this layer's, [B, H, used + n, D]. ValueError when full."""
        end = self.used + k.shape[2]
        if end > self.keys.shape[3]:
            raise ValueError(f"a cache of {self.keys.shape[3]} places cannot hold {end}")
        self.keys[layer, :, :, self.used:end], self.values[layer, :, :, self.used:end] = k, v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, count: int) -> None:
        """Every layer has `count` more places."""
        self.used += count
