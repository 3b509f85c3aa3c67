"""A language model of several codebooks of tokens at once, as MusicGen has it. Copet et al. 2023, arXiv:2306.05284.

B items, K codebooks, V tokens of each, n steps, D width, L text or chroma vectors, C and N their widths.
"""

from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.config import Config
from nexus.nn.cache import KVCache
from nexus.nn.decoder import Decoder, Source
from nexus.nn.embed import sinusoid
from nexus.nn.rows import linear
from nexus.nn.style import StyleConfig

SIZES = {"small": {}, "medium": {"dim": 1536, "depth": 48, "heads": 24},
         "large": {"dim": 2048, "depth": 48, "heads": 32}}
_MELODY = {"text": "prepend", "chroma": 12}
_STEREO = {"codebooks": 8, "delays": (0, 0, 1, 1, 2, 2, 3, 3)}


class TokenLMConfig(Config):
    """The language model; the defaults are MusicGen-small.

    delays: by how many steps each codebook comes late; () = one after the other. text: where text vectors of width
    context_dim go, into a second attention or in front of the music; without project_text as they are. chroma: bins of
    a melody, which goes in front of the text; 0 = it takes none. style: what hears the style of an excerpt, whose
    vectors of width `chroma` then go in the melody's place. padding: whether the second attention sees the zero vectors
    of padded text (audiocraft) or not (transformers), which matters only where texts of several lengths meet.
    """

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"codebooks": 2, "bins": 16, "dim": 32, "depth": 2, "heads": 2, "context_dim": 16, **_MELODY},
        "tiny-style": {"codebooks": 2, "bins": 16, "dim": 32, "depth": 2, "heads": 2, "context_dim": 16,
                       "text": "prepend", "chroma": 16, "style": StyleConfig.presets["tiny"]},
        "style": SIZES["medium"] | {"text": "prepend", "chroma": 512, "style": {}},
        "music": {"bins": 1024, "dim": 160, "depth": 8, "heads": 4, "context_dim": 128, **_MELODY},
    } | {f"{kind}{size}{end}": fields | more | (_STEREO if end else {})
         for size, fields in SIZES.items() for kind, more in (("", {}), ("melody-", _MELODY))
         for end in ("", "-stereo")}
    codebooks: int = Field(4, ge=1)
    bins: int = Field(2048, ge=2)
    dim: int = Field(1024, ge=4)
    depth: int = Field(24, ge=1)
    heads: int = Field(16, ge=1)
    mlp_ratio: float = Field(4.0, gt=0)
    delays: tuple[int, ...] = ()
    text: Literal["cross", "prepend", "none"] = "cross"
    context_dim: int = Field(768, ge=1)
    project_text: bool = True
    chroma: int = Field(0, ge=0)
    style: StyleConfig | None = None
    padding: Literal["seen", "hidden"] = "seen"

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.dim % self.heads or self.dim % 2:
            raise ValueError(f"dim {self.dim} is not a multiple of heads {self.heads}, or odd")
        if self.delays and (len(self.delays) != self.codebooks or min(self.delays) != 0):
            raise ValueError(f"delays: one for each of {self.codebooks} codebooks, the smallest 0")
        if not self.project_text and self.context_dim != self.dim:
            raise ValueError(f"project_text false: a text of {self.context_dim} numbers a word does not fit {self.dim}")
        if self.style and self.chroma != self.style.dim:
            raise ValueError(f"chroma {self.chroma}: vectors of a style have {self.style.dim} numbers")
        return self

    @property
    def pattern(self) -> tuple[int, ...]:
        """The delay of each codebook."""
        return self.delays or tuple(range(self.codebooks))

    def build(self) -> "TokenLM":
        """The network with its initial weights."""
        return TokenLM(self)


class Prepared(NamedTuple):
    """What stays the same over a run: vectors in front of the music [B, L, D], and the second attention's sources."""

    prefix: Tensor | None
    sources: list[Source] | None


class TokenLM(nn.Module):
    """ids [B, K, n] < V, or V = no code -> scores [B, K, n, V] of the step behind each.

    cond: "context" [B, L, C] of a text, "melody" [B, L, N], each with a mask [B, L] of what is more than padding; the
    rest, and a condition that is dropped, are zero vectors.
    """

    def __init__(self, config: TokenLMConfig):
        super().__init__()
        self.config, c = config, config
        self.emb = nn.Embedding(c.codebooks * (c.bins + 1), c.dim)      # all codebooks below each other
        self.text = nn.Linear(c.context_dim, c.dim) if c.text != "none" and c.project_text else None
        self.melody = nn.Linear(c.chroma, c.dim) if c.chroma else None
        self.style = c.style.build() if c.style else None
        self.decoder = Decoder(c.dim, c.depth, c.heads, int(c.dim * c.mlp_ratio), cross=c.text == "cross")
        self.heads = nn.Linear(c.dim, c.codebooks * c.bins, bias=False)
        for table in (self.emb.weight, self.heads.weight):
            nn.init.normal_(table, std=c.dim ** -0.5)

    def prepare(self, cond: dict[str, Tensor] | None) -> Prepared:
        """What a condition is to every step of a run."""
        cond, c = cond or {}, self.config
        front = [_masked(self.melody(cond["melody"].to(self.melody.weight)), cond.get("melody_mask"))] \
            if self.melody is not None and "melody" in cond else []
        sources = None
        if c.text != "none" and "context" in cond:
            mask, words = cond.get("context_mask"), cond["context"].to(self.emb.weight)
            words = _masked(words if self.text is None else self.text(words), mask)
            if c.text == "prepend":
                front.append(words)
            else:
                sources = self.decoder.sources(words, mask if c.padding == "hidden" else None)
        return Prepared(torch.cat(front, 1) if front else None, sources)

    def forward(self, ids: Tensor, cond: dict[str, Tensor] | None = None, prepared: Prepared | None = None,
                cache: KVCache | None = None, last: bool = False) -> Tensor:
        """prepared: of `prepare`, for the same cond. cache: then ids follow what it has seen. last: n = 1, the last."""
        c, ready = self.config, prepared or self.prepare(cond)
        first = (c.bins + 1) * torch.arange(c.codebooks, device=ids.device)[:, None]
        x, before = self.emb(ids + first).sum(1), 0 if cache is None else cache.used
        if ready.prefix is not None and before == 0:
            x = torch.cat([ready.prefix.to(x), x], 1)
        place = torch.arange(before, before + x.shape[1], device=x.device)
        x = self.decoder(x + sinusoid(place, c.dim, shift=1.0).to(x), ready.sources, cache)
        x = x[:, -1:] if last else x[:, -ids.shape[-1]:]
        return linear(self.heads, x).unflatten(-1, (c.codebooks, c.bins)).transpose(1, 2)

    def cache(self, batch: int, steps: int, prepared: Prepared) -> KVCache:
        """Room for a run of so many steps."""
        return self.decoder.cache(batch, steps + (0 if prepared.prefix is None else prepared.prefix.shape[1]))


def _masked(x: Tensor, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask[..., None].to(x)
