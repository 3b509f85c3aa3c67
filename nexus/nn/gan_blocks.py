"""What the networks of adversarial training share: norms without hidden counters, labels, initial weights."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from nexus.nn.embed import with_ids

Norm = Literal["instance", "batch", "layer", "none"]
LabelUse = Literal["none", "map", "projection", "auxiliary"]
MOMENTUM, EPS = 0.1, 1e-5


class BatchNorm(nn.Module):
    """x [B, C, H, W] with zero mean and unit variance a channel, then scaled and shifted. Ioffe & Szegedy 2015.

    In eval mode with the running statistics, or, where a call says `own`, with those of each picture by itself: what a
    published test that leaves its network in train mode and takes pictures one by one does.
    torch's own layer also counts its batches, which old checkpoints do not.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor, own: bool = False) -> Tensor:
        if own and not self.training:
            return F.instance_norm(x, weight=self.weight, bias=self.bias, eps=EPS)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, self.training, MOMENTUM,
                            EPS)


class LabelledNorm(nn.Module):
    """A batch norm whose scale and shift depend on an embedding [B, E]. De Vries et al. 2017; Miyato & Koyama 2018."""

    def __init__(self, channels: int, emb: int):
        super().__init__()
        self.norm = BatchNorm(channels)
        self.scale_shift = nn.Linear(emb, 2 * channels)
        nn.init.zeros_(self.scale_shift.weight)
        nn.init.zeros_(self.scale_shift.bias)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        scale, shift = self.scale_shift(emb)[:, :, None, None].chunk(2, 1)
        return self.norm(x) * (1 + scale) + shift


def norm_of(kind: Norm, channels: int) -> nn.Module:
    """A norm of C channels; "layer" is over all of a picture's values, "instance" has no weights."""
    if kind == "layer":
        return nn.GroupNorm(1, channels)
    return {"instance": nn.InstanceNorm2d, "batch": BatchNorm, "none": nn.Identity}[kind](channels)


def normed(norm: nn.Module, x: Tensor, own: bool) -> Tensor:
    """The norm of x, by each picture's own statistics where `own` says so and the norm would take others."""
    return norm(x, own) if isinstance(norm, BatchNorm) else norm(x)


def gaussian_weights(module: nn.Module, spread: float = 0.02) -> None:
    """DCGAN's start: convolutions from N(0, 0.02), gains from N(1, 0.02), biases 0. Radford et al. 2015."""
    for part in module.modules():
        if isinstance(part, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(part.weight, 0.0, spread)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, BatchNorm):
            nn.init.normal_(part.weight, 1.0, spread)


def lipschitz(module: nn.Module, spectral: bool) -> nn.Module:
    """The module, with `spectral` every layer's weight divided by its largest singular value. Miyato et al. 2018."""
    for part in list(module.modules()) if spectral else ():
        if isinstance(part, nn.Conv2d | nn.Linear | nn.Embedding):
            spectral_norm(part)
    return module


class Labels(nn.Module):
    """Class and style ids of a condition -> their summed rows [B, E]; nothing where there are no classes."""

    def __init__(self, num_classes: int, num_styles: int, dim: int):
        super().__init__()
        self.dim = dim if num_classes else 0
        self.label = nn.Embedding(num_classes, dim) if num_classes else None
        self.style = nn.Embedding(num_styles, dim) if num_classes and num_styles else None

    def forward(self, cond: dict[str, Tensor] | None, like: Tensor) -> Tensor | None:
        """cond "label" and "style" [B] -> [B, E] of like's device, or None. Raises InputError for a missing label."""
        if self.label is None:
            return None
        start = like.new_zeros(len(like), self.dim)
        return with_ids(start, cond or {}, self.label, self.style, null_label=False)


class LabelHead(nn.Module):
    """How a critic uses the label: h [B, D] -> what is added to the scores [B, 1], and class logits [B, K] or None.

    "projection" adds the inner product of h and the label's row (Miyato & Koyama 2018); "auxiliary" guesses the class
    (AC-GAN, Odena et al. 2017).
    """

    def __init__(self, use: LabelUse, dim: int, num_classes: int, num_styles: int):
        super().__init__()
        known = num_classes if use in ("projection", "auxiliary") else 0
        self.rows = Labels(known if use == "projection" else 0, num_styles, dim)
        self.guess = nn.Linear(dim, known) if use == "auxiliary" and known else None

    def forward(self, h: Tensor, cond: dict[str, Tensor] | None) -> tuple[Tensor, Tensor | None]:
        rows = self.rows(cond, h)
        more = h.new_zeros(len(h), 1) if rows is None else (rows * h).sum(1, keepdim=True)
        return more, None if self.guess is None else self.guess(h)


class LabelledScore(nn.Module):
    """h [B, C, a, b] (and rows [B, told] of labels) -> scores [B, 1, k, k]: a convolution of `side` pixels.

    With told > 0 a score is the inner product of what the convolution sees and of the row (Miyato & Koyama 2018).
    """

    def __init__(self, channels: int, side: int, told: int):
        super().__init__()
        self.conv = nn.Conv2d(channels, told or 1, side, bias=False)
        self.row = nn.Linear(told, told) if told else None

    def forward(self, h: Tensor, rows: Tensor | None) -> Tensor:
        h = self.conv(h)
        if rows is None:
            return h
        return (h * self.row(rows)[:, :, None, None]).sum(1, keepdim=True) / rows.shape[1] ** 0.5


class LabelMap(nn.Module):
    """The label as one more channel of the picture: x [B, C, H, W] -> [B, C + 1, H, W]. Mirza & Osindero 2014."""

    def __init__(self, use: LabelUse, size: int, num_classes: int, num_styles: int):
        super().__init__()
        self.size = size
        self.rows = Labels(num_classes if use == "map" else 0, num_styles, size * size)

    @property
    def channels(self) -> int:
        """How many channels it adds."""
        return 1 if self.rows.dim else 0

    def forward(self, x: Tensor, cond: dict[str, Tensor] | None) -> Tensor:
        rows = self.rows(cond, x)
        return x if rows is None else torch.cat([x, rows.view(-1, 1, self.size, self.size)], 1)


@contextmanager
def frozen(module: nn.Module) -> Iterator[nn.Module]:
    """The module, whose weights get no gradient from what is computed in the block; that of its input passes."""
    learning = [p for p in module.parameters() if p.requires_grad]
    for p in learning:
        p.requires_grad_(False)
    try:
        yield module
    finally:
        for p in learning:
            p.requires_grad_(True)
