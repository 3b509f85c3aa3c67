"""The small text encoder of the embedded models: words and their letter groups through a short transformer."""

import zlib
from functools import lru_cache
from typing import Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nexus.config import Config
from nexus.nn.attention import attend, merge_heads, split_heads
from nexus.text.match import normal


class TextEncoderConfig(Config):
    """words: the vocabulary, filled from the data set; any other word still has its letter groups."""

    words: tuple[str, ...] = ()
    buckets: int = Field(2048, ge=1)        # rows for hashed letter groups
    dim: int = Field(128, ge=8)
    depth: int = Field(2, ge=0)
    heads: int = Field(2, ge=1)
    length: int = Field(12, ge=2)           # words a caption, one place of which is the caption's own vector

    def adapt(self, texts: list[str]) -> Self:
        """A copy whose vocabulary holds every word of the texts, unless it has one already."""
        words = tuple(sorted({word for text in texts for word in normal(text).split()}))
        return self.model_copy(update={"words": self.words or words})

    def build(self) -> "TextEncoder":
        """The encoder with its initial weights."""
        return TextEncoder(self)


def letter_groups(word: str, buckets: int) -> list[int]:
    """Rows of the 3- and 4-letter groups of <word>. Bojanowski et al. 2017 (fastText)."""
    marked = f"<{word}>"
    groups = {marked[i:i + n] for n in (3, 4) for i in range(len(marked) - n + 1)} or {marked}
    return sorted(zlib.crc32(g.encode()) % buckets for g in groups)


class Block(nn.Module):
    """Pre-norm attention and MLP: x [B, L, D], mask [B, 1, 1, L] -> [B, L, D]."""

    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.fc1, self.fc2 = nn.Linear(dim, 4 * dim), nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (split_heads(p, self.heads) for p in self.qkv(self.norm1(x)).chunk(3, -1))
        x = x + self.proj(merge_heads(attend(q, k, v, mask)))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TextEncoder(nn.Module):
    """Captions -> {"context" [B, L, D], "context_mask" [B, L], "pooled" [B, D]}; L = config.length.

    Place 0 is the caption's own vector (it is all there is of an empty caption); the words follow.
    """

    def __init__(self, config: TextEncoderConfig):
        super().__init__()
        self.config = config
        self.rows = {word: i for i, word in enumerate(config.words)}
        self.word = nn.Embedding(len(config.words) + 1, config.dim)         # the last row: a word not in the list
        self.group = nn.EmbeddingBag(config.buckets, config.dim, mode="mean")
        self.place = nn.Parameter(torch.zeros(config.length, config.dim))
        self.blocks = nn.ModuleList(Block(config.dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        for table in (self.word.weight, self.group.weight, self.place):
            nn.init.normal_(table, std=0.05)

    def remarks(self, text: str) -> dict:
        """What a user should know of a caption: words that were cut off, words never seen in training."""
        words = normal(text).split()
        cut, unknown = words[self.config.length - 1:], [w for w in words if w not in self.rows]
        return ({"cut": " ".join(cut)} if cut else {}) | ({"unknown": unknown} if unknown else {})

    def forward(self, texts: list[str]) -> dict[str, Tensor]:
        """texts: any captions; those longer than L - 1 words are cut (see `remarks`)."""
        length, device = self.config.length, self.place.device
        split = [tuple(normal(text).split()[:length - 1]) for text in texts]
        vectors = self._words(sorted({w for words in split for w in words}), device)
        x = torch.stack([F.pad(torch.stack([vectors[w] for w in words]) if words else self.place[:0],
                               (0, 0, 1, length - 1 - len(words))) for words in split]) + self.place
        count = torch.tensor([1 + len(words) for words in split], device=device)
        mask = torch.arange(length, device=device) < count[:, None]                     # [B, L]
        for block in self.blocks:
            x = block(x, mask[:, None, None])
        x = self.norm(x)
        return {"context": x, "context_mask": mask, "pooled": x[:, 0]}

    def _words(self, words: list[str], device: torch.device) -> dict[str, Tensor]:
        if not words:
            return {}
        groups = [_groups(w, self.config.buckets) for w in words]
        starts = torch.tensor([0, *(len(g) for g in groups[:-1])]).cumsum(0)
        flat = torch.tensor([row for g in groups for row in g])
        ids = torch.tensor([self.rows.get(w, len(self.rows)) for w in words])
        vectors = self.word(ids.to(device)) + self.group(flat.to(device), starts.to(device))
        return dict(zip(words, vectors.unbind(), strict=True))


_groups = lru_cache(maxsize=65_536)(letter_groups)
