"""A causal transformer for decode loops: pre-norm, no biases but those of the norms, an optional second attention.

Vaswani et al. 2017, as MusicGen has it (Copet et al. 2023). B items, n new places, L places read before, S places of
what the second attention reads, D width, H heads, E = D / H.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.nn.attention import attend, merge_heads, split_heads
from nexus.nn.cache import KVCache
from nexus.nn.rows import linear, product


class Source(NamedTuple):
    """What a layer's second attention reads: k and v [B, H, S, E], and mask [B, 1, 1, S], True = may be seen."""

    k: Tensor
    v: Tensor
    mask: Tensor | None = None


class DecoderLayer(nn.Module):
    """Attention over what came before, over a source where there is one, and an MLP: x [B, n, D] -> [B, n, D]."""

    def __init__(self, dim: int, heads: int, hidden: int, *, cross: bool):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.fc1, self.fc2 = nn.Linear(dim, hidden, bias=False), nn.Linear(hidden, dim, bias=False)
        self.norm_cross = nn.LayerNorm(dim) if cross else None
        self.cross_qkv = nn.Linear(dim, 3 * dim, bias=False) if cross else None
        self.cross_proj = nn.Linear(dim, dim, bias=False) if cross else None

    def source(self, context: Tensor, mask: Tensor | None = None) -> Source:
        """Keys and values of context [B, S, D]; mask [B, S]."""
        dim = context.shape[-1]
        kv = product(context, self.cross_qkv.weight[dim:])
        k, v = (split_heads(part, self.heads).contiguous() for part in kv.chunk(2, -1))     # read at every step
        return Source(k, v, None if mask is None else mask[:, None, None])

    def forward(self, x: Tensor, index: int, source: Source | None = None, cache: KVCache | None = None,
                mask: Tensor | None = None) -> Tensor:
        """index: which layer of the cache this is. mask [n, L + n]: None where every place may see all before it."""
        q, k, v = (split_heads(part, self.heads) for part in linear(self.qkv, self.norm1(x)).chunk(3, -1))
        k, v = (k, v) if cache is None else cache.extend(index, k, v)
        x = x + linear(self.proj, merge_heads(attend(q, k, v, mask)))
        if source is not None:
            q = product(self.norm_cross(x), self.cross_qkv.weight[:x.shape[-1]])
            found = attend(split_heads(q, self.heads), source.k, source.v, source.mask)
            x = x + linear(self.cross_proj, merge_heads(found))
        return x + linear(self.fc2, F.gelu(linear(self.fc1, self.norm2(x))))


class Decoder(nn.Module):
    """`depth` layers and a norm: x [B, n, D] -> [B, n, D]. With a cache, x follows what the cache has seen."""

    def __init__(self, dim: int, depth: int, heads: int, hidden: int, *, cross: bool):
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(dim, heads, hidden, cross=cross) for _ in range(depth))
        self.norm = nn.LayerNorm(dim)
        for i, layer in enumerate(self.layers):
            for part in layer.modules():
                if isinstance(part, nn.Linear):         # deeper layers add less, so that the sum stays of one size
                    nn.init.normal_(part.weight, std=(2 * (i + 1) * part.in_features) ** -0.5)

    def sources(self, context: Tensor, mask: Tensor | None = None) -> list[Source]:
        """What every layer's second attention reads of context [B, S, D]; mask [B, S], True = may be seen.

        An item with nothing to see sees all of it.
        """
        mask = None if mask is None else mask | ~mask.any(-1, keepdim=True)
        return [layer.source(context, mask) for layer in self.layers]

    def forward(self, x: Tensor, sources: list[Source] | None = None, cache: KVCache | None = None) -> Tensor:
        """sources: of `sources`, None = the second attention adds nothing."""
        new, before = x.shape[1], 0 if cache is None else cache.used
        mask = None
        if new > 1:
            mask = torch.ones(new, before + new, dtype=torch.bool, device=x.device).tril(before)
        for i, layer in enumerate(self.layers):
            x = layer(x, i, None if sources is None else sources[i], cache, mask)
        if cache is not None:
            cache.advance(new)
        return self.norm(x)

    def cache(self, batch: int, length: int) -> KVCache:
        """Room for so many places of so many items."""
        layer, weight = self.layers[0], self.layers[0].proj.weight
        return KVCache(len(self.layers), batch, layer.heads, length, weight.shape[0] // layer.heads,
                       device=weight.device, dtype=weight.dtype)
