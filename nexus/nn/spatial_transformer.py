"""Words steer pixels: the transformers inside a text-conditional UNet. Rombach et al. 2022, arXiv:2112.10752.

B = batch, C = channels, L = pixels, S = words, D = width of a word.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from nexus.nn.attention import attend, merge_heads, split_heads

KeyValue = tuple[Tensor, Tensor]         # each [B, heads, S, C / heads]


class TokenBlock(nn.Module):
    """Self-attention, cross-attention and a GEGLU MLP, each after a LayerNorm: x [B, L, C] -> [B, L, C]."""

    def __init__(self, channels: int, heads: int, context_dim: int):
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(channels)
        self.qkv = nn.Linear(channels, 3 * channels, bias=False)
        self.proj1 = nn.Linear(channels, channels)
        self.norm2 = nn.LayerNorm(channels)
        self.q = nn.Linear(channels, channels, bias=False)
        self.kv = nn.Linear(context_dim, 2 * channels, bias=False)
        self.proj2 = nn.Linear(channels, channels)
        self.norm3 = nn.LayerNorm(channels)
        self.fc1 = nn.Linear(channels, 8 * channels)
        self.fc2 = nn.Linear(4 * channels, channels)

    def words(self, context: Tensor) -> KeyValue:
        """context [B, S, D] -> its keys and values, which no step of a sampling run changes."""
        k, v = self.kv(context).chunk(2, -1)
        return split_heads(k, self.heads), split_heads(v, self.heads)

    def forward(self, x: Tensor, words: KeyValue, mask: Tensor | None = None, identity: bool = False) -> Tensor:
        """mask [B, 1, 1, S] bool, True = a word that may be seen. identity: pixels attend to themselves alone."""
        q, k, v = (split_heads(p, self.heads) for p in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj1(merge_heads(attend(q, k, v, identity=identity)))
        q = split_heads(self.q(self.norm2(x)), self.heads)
        x = x + self.proj2(merge_heads(attend(q, *words, mask)))
        h, gate = self.fc1(self.norm3(x)).chunk(2, -1)
        return x + self.fc2(h * F.gelu(gate))


class SpatialTransformer(nn.Module):
    """`depth` token blocks over the pixels of a picture, around a skip: x [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int, heads: int, depth: int, context_dim: int, *, groups: int = 32):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels)
        self.blocks = nn.ModuleList(TokenBlock(channels, heads, context_dim) for _ in range(depth))
        self.proj_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def words(self, context: Tensor) -> list[KeyValue]:
        """The keys and values of every block for context [B, S, D]."""
        return [block.words(context) for block in self.blocks]

    def forward(self, x: Tensor, words: list[KeyValue], mask: Tensor | None = None, identity: bool = False) -> Tensor:
        tokens = self.proj_in(self.norm(x).flatten(2).transpose(1, 2))
        for block, pair in zip(self.blocks, words, strict=True):
            tokens = block(tokens, pair, mask, identity)
        return x + self.proj_out(tokens).transpose(1, 2).unflatten(2, x.shape[2:])
