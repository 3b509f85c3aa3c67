"""Conditioners: prompts and labels -> the `cond` dict of a network, and its null.

A Cond is a dict of tensors with the batch first: "label" [B], "style" [B], "context" [B, L, D],
"context_mask" [B, L], "pooled" [B, D].
"""

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nexus.config import Config
from nexus.text.encoder import TextEncoder, TextEncoderConfig
from nexus.text.match import match, split_style

Cond = dict[str, Tensor]


def _styled(config: Config, styles: tuple[str, ...]) -> dict:
    """The styles of a conditioner, its own or the data's, and its default style if they have it."""
    styles = config.styles or styles
    return {"styles": styles, "default_style": config.default_style if config.default_style in styles else ""}


class NoCondConfig(Config):
    """No condition: a prompt is refused by the caller."""

    kind: Literal["none"] = "none"

    def adapt(self, classes: tuple[str, ...], styles: tuple[str, ...]) -> Self:
        """Nothing to fit."""
        return self

    def build(self) -> None:
        """No conditioner."""


class LabelCondConfig(Config):
    """Class and style names, in the order of the network's tables; filled from the data set when training starts."""

    presets: ClassVar[dict[str, dict]] = {
        "emoji": {"kind": "label", "default_style": "noto", "style_dropout": 0.1},
    }
    kind: Literal["label"] = "label"
    classes: tuple[str, ...] = ()
    styles: tuple[str, ...] = ()
    default_style: str = ""         # "" = the null style
    style_dropout: float = Field(0.0, ge=0, le=1)       # share of training pictures whose style is not said

    def adapt(self, classes: tuple[str, ...], styles: tuple[str, ...]) -> Self:
        """A copy with the data set's names, where none were given; a default style that they lack is none."""
        return self.model_copy(update={"classes": self.classes or classes} | _styled(self, styles))

    def build(self) -> "LabelConditioner":
        """The conditioner; it has no weights."""
        return LabelConditioner(self)


class LabelConditioner(nn.Module):
    """Class and style ids; the null of each is the id after the last."""

    def __init__(self, config: LabelCondConfig):
        super().__init__()
        self.config = config

    def training_cond(self, batch: dict, rng: torch.Generator) -> Cond:
        """The ids of a training batch, most of them with their style."""
        cond = {"label": batch["label"]}
        if not self.config.styles:
            return cond
        style = batch["style"]
        if self.config.style_dropout:
            quiet = torch.rand(len(style), generator=rng) < self.config.style_dropout
            style = style.masked_fill(quiet.to(style.device), len(self.config.styles))
        return cond | {"style": style}

    def prompts(self, prompts: list[str | None], device: torch.device) -> tuple[Cond, tuple[dict, ...]]:
        """Each prompt as ids, with a note of what it was matched to; None is the null. Raises InputError."""
        cond, notes = self.null(len(prompts), device), []
        default = self.config.styles.index(self.config.default_style) if self.config.default_style else None
        for i, prompt in enumerate(prompts):
            if prompt is None or not self.config.classes:
                notes.append({})
                continue
            found = match(prompt, self.config.classes, self.config.styles)
            style = default if found.style is None else found.style
            cond["label"][i] = found.label
            note = {"class": self.config.classes[found.label], "exact": found.exact}
            if style is not None:
                cond["style"][i] = style
                note["style"] = self.config.styles[style]
            notes.append(note)
        return cond, tuple(notes)

    def check(self, prompt: str) -> None:
        """InputError for a prompt that names none of the classes."""
        if self.config.classes:
            match(prompt, self.config.classes, self.config.styles)

    def null(self, n: int, device: torch.device) -> Cond:
        """n times no class and no style."""
        cond = {"label": torch.full((n,), len(self.config.classes), device=device)}
        if self.config.styles:
            cond["style"] = torch.full((n,), len(self.config.styles), device=device)
        return cond


class TextCondConfig(Config):
    """Captions through the small text encoder, trained with the network or taken from another model's checkpoint."""

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"kind": "text", "encoder": {"dim": 16, "depth": 1, "buckets": 64}},
        "emoji": {"kind": "text", "default_style": "noto", "encoder": {"buckets": 1024}},
    }
    kind: Literal["text"] = "text"
    encoder: TextEncoderConfig = TextEncoderConfig()
    styles: tuple[str, ...] = ()
    default_style: str = ""
    style_dropout: float = Field(0.1, ge=0, le=1)       # share of training captions that do not name their style

    def adapt(self, classes: tuple[str, ...], styles: tuple[str, ...]) -> Self:
        """A copy with the data set's words and styles, where none were given; a default style they lack is none."""
        texts = [*classes, *(caption("", s) for s in styles)]
        return self.model_copy(update={"encoder": self.encoder.adapt(texts)} | _styled(self, styles))

    def build(self) -> "TextConditioner":
        """The conditioner with its encoder."""
        return TextConditioner(self)


def caption(concept: str, style: str) -> str:
    """The one way a concept and a style are put in words."""
    return f"{concept}, {style} style" if style else concept


class TextConditioner(nn.Module):
    """Captions as word vectors in context; the null is the empty caption."""

    def __init__(self, config: TextCondConfig):
        super().__init__()
        self.config = config
        self.encoder: TextEncoder = config.encoder.build()

    def training_cond(self, batch: dict, rng: torch.Generator) -> Cond:
        """The encoded captions of a training batch, most of them naming their style."""
        quiet = (torch.rand(len(batch["caption"]), generator=rng) < self.config.style_dropout).tolist()
        styles = self.config.styles
        texts = [caption(text, "" if q or not styles else styles[int(s)])
                 for text, s, q in zip(batch["caption"], batch["style"].tolist(), quiet, strict=True)]
        return self.encoder(texts)

    def prompts(self, prompts: list[str | None], device: torch.device) -> tuple[Cond, tuple[dict, ...]]:
        """Each prompt encoded, the default style added where none is named."""
        texts = ["" if p is None else self._with_style(p) for p in prompts]
        notes = tuple({"caption": t, **self.encoder.remarks(t)} if t else {} for t in texts)
        unique = sorted(set(texts))
        rows = torch.tensor([unique.index(t) for t in texts], device=device)
        return {name: value[rows] for name, value in self.encoder(unique).items()}, notes

    def check(self, prompt: str) -> None:
        """Nothing: any text is read."""

    def _with_style(self, prompt: str) -> str:
        text, style = split_style(prompt, self.config.styles)
        named = self.config.default_style if style is None else self.config.styles[style]
        return caption(text, named)

    def null(self, n: int, device: torch.device) -> Cond:
        """n times the empty caption."""
        return {name: value.expand(n, *value.shape[1:]) for name, value in self.encoder([""]).items()}


def aligned(*conds: Cond) -> tuple[Cond, ...]:
    """The same conditions with contexts of one length, for one batch; what a shorter one lacks is masked."""
    lengths = {cond["context"].shape[1] for cond in conds if "context" in cond}
    masks = sum("context_mask" in cond for cond in conds)
    return conds if len(lengths) < 2 and masks in (0, len(conds)) else tuple(_longer(c, max(lengths)) for c in conds)


def _longer(cond: Cond, length: int) -> Cond:
    context = cond["context"]
    mask = cond.get("context_mask", torch.ones(context.shape[:2], dtype=torch.bool, device=context.device))
    more = length - context.shape[1]
    return cond | {"context": F.pad(context, (0, 0, 0, more)), "context_mask": F.pad(mask, (0, more))}


def dropped(cond: Cond, null: Cond, drop: Tensor) -> Cond:
    """Where drop [B] is True, the null takes the condition's place. Ho & Salimans 2022."""
    cond, null = aligned(cond, null)
    return {name: torch.where(drop.view(-1, *[1] * (value.ndim - 1)), null[name].to(value.dtype), value)
            for name, value in cond.items()}


def joined(first: Cond, second: Cond) -> Cond:
    """Two conditions as one batch, first then second."""
    first, second = aligned(first, second)
    return {name: torch.cat([value, second[name].to(value.dtype)]) for name, value in first.items()}
