"""The style of a few seconds of music, as a few vectors through a narrow bottleneck: MusicGen-Style's conditioner.

Rouard et al. 2024, arXiv:2407.12563. B items, F frames of features, N their width, K codebooks, D width.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from nexus.config import Config
from nexus.nn.decoder import DecoderLayer
from nexus.nn.embed import sinusoid
from nexus.nn.quantize import ResidualQuantizer


class StyleConfig(Config):
    """What an excerpt is heard by, and what is kept of it; the defaults are those of the published model.

    features: "frames", vectors of `width` numbers that a network of its own hears (MERT, 75 a second), or "tokens", the
    first `quantizers` codebooks of `bins_in` tokens of the model's codec. books, bins: of the bottleneck; books_used:
    how many of its codebooks are let through when music is made. every: of the vectors, one in so many is kept.
    shortest, longest: seconds of an excerpt in training; excerpt: of one that is followed.
    """

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"features": "tokens", "quantizers": 2, "bins_in": 16, "dim": 16, "depth": 1, "heads": 2, "books": 3,
                 "books_used": 2, "bins": 8, "every": 3, "shortest": 0.06, "longest": 0.12, "excerpt": 0.1},
    }
    features: Literal["frames", "tokens"] = "frames"
    width: int = Field(768, ge=1)
    quantizers: int = Field(3, ge=1)
    bins_in: int = Field(2048, ge=2)
    dim: int = Field(512, ge=4, multiple_of=2)
    depth: int = Field(8, ge=0)
    heads: int = Field(8, ge=1)
    books: int = Field(6, ge=1)
    books_used: int = Field(3, ge=1)
    bins: int = Field(1024, ge=2)
    every: int = Field(15, ge=1)
    shortest: float = Field(1.5, gt=0)
    longest: float = Field(4.5, gt=0)
    excerpt: float = Field(3.0, gt=0)

    def build(self) -> "StyleEncoder":
        """The encoder with its initial weights."""
        return StyleEncoder(self)


class StyleEncoder(nn.Module):
    """Features of an excerpt -> its style [B, ceil(F / every), D]: a transformer, a norm, a few codebooks."""

    def __init__(self, config: StyleConfig):
        super().__init__()
        self.config, c = config, config
        self.embed = nn.Linear(c.width, c.dim) if c.features == "frames" else \
            nn.Embedding(c.quantizers * c.bins_in, c.dim)           # all codebooks below each other
        self.layers = nn.ModuleList(DecoderLayer(c.dim, c.heads, 4 * c.dim, cross=False) for _ in range(c.depth))
        self.norm = nn.BatchNorm1d(c.dim, affine=False)
        self.quantizer = ResidualQuantizer(c.dim, c.bins, c.books, dead=0.1)

    def forward(self, heard: Tensor, rng: torch.Generator | None = None) -> Tensor:
        """heard: [B, F, N] frames, or [B, K, F] ids < bins_in. With an rng codebooks learn, a drawn number of them."""
        c = self.config
        if c.features == "tokens":
            first = c.bins_in * torch.arange(c.quantizers, device=heard.device)[:, None]
            x = self.embed(heard[:, :c.quantizers] + first).sum(1)
        else:
            x = self.embed(heard.to(self.embed.weight))
        x = x + sinusoid(torch.arange(x.shape[1], device=x.device), c.dim, shift=1.0).to(x)
        for i, layer in enumerate(self.layers):
            x = layer(x, i)
        x = self.norm(x.transpose(1, 2))
        count = c.books_used if rng is None else int(torch.randint(1, c.books + 1, (), generator=rng))
        return self.quantizer(x, count, rng).z.transpose(1, 2)[:, ::c.every]
