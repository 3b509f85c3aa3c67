"""Sinusoids and position tables."""

import math

import torch
from torch import Tensor, nn

from nexus.errors import InputError


def sinusoid(t: Tensor, dim: int, *, max_period: float = 10_000.0, shift: float = 0.0,
             sin_first: bool = False) -> Tensor:
    """t [N] -> [N, dim]: cosines then sines (or sines first) at geometric frequencies. Vaswani et al. 2017.

    `shift` is subtracted from the number of frequencies in the exponent's denominator: 0 as in improved-diffusion
    and DiT, 1 as in the original DDPM. An odd `dim` is padded with a zero.
    """
    half = dim // 2
    freqs = torch.exp(-math.log(max_period) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - shift))
    angles = t.float()[:, None] * freqs
    pair = (angles.sin(), angles.cos()) if sin_first else (angles.cos(), angles.sin())
    out = torch.cat(pair, -1)
    return nn.functional.pad(out, (0, 1)) if dim % 2 else out


class TimestepMLP(nn.Module):
    """Sinusoid -> Linear -> SiLU -> Linear: t [N] -> [N, out]; `extra` [N, freqs] joins the sinusoid."""

    def __init__(self, freqs: int, out: int, *, hidden: int | None = None, shift: float = 0.0,
                 sin_first: bool = False):
        super().__init__()
        self.freqs, self.shift, self.sin_first = freqs, shift, sin_first
        self.fc1 = nn.Linear(freqs, hidden or out)
        self.fc2 = nn.Linear(hidden or out, out)

    def forward(self, t: Tensor, extra: Tensor | None = None) -> Tensor:
        wave = sinusoid(t, self.freqs, shift=self.shift, sin_first=self.sin_first).to(self.fc1.weight.dtype)
        return self.fc2(nn.functional.silu(self.fc1(wave if extra is None else wave + extra)))


def with_ids(emb: Tensor, cond: dict[str, Tensor], label: nn.Embedding | None, style: nn.Embedding | None, *,
             null_label: bool = True) -> Tensor:
    """emb [B or 1, E] plus the rows of cond's "label" and "style" [B]; a missing one takes its table's last, the null.

    A table that is None takes no part. Raises InputError for a missing label where `null_label` says there is no null.
    """
    if label is not None and "label" not in cond and not null_label:
        raise InputError("this network has no null label, so it needs a label", hint="give a prompt")
    for name, table in (("label", label), ("style", style)):
        if table is not None:
            emb = emb + (table(cond[name]) if name in cond else table.weight[-1])
    return emb


def sincos_2d(dim: int, rows: int, cols: int, *, scale: float = 1.0, top: int = 0, left: int = 0) -> Tensor:
    """Fixed 2-D sine-cosine table [rows * cols, dim] in float32: first half encodes the column (w), second the row.

    Positions start at `top` and `left` and are divided by `scale`. MAE / DiT.
    """
    omega = 1.0 / 10_000 ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    r = torch.arange(top, top + rows, dtype=torch.float64) / scale
    c = torch.arange(left, left + cols, dtype=torch.float64) / scale

    def encode(p: Tensor) -> Tensor:
        angles = p[:, None] * omega
        return torch.cat([angles.sin(), angles.cos()], -1)          # [n, dim / 2]

    wide = encode(c)[None].expand(rows, -1, -1)                      # [rows, cols, dim / 2]
    high = encode(r)[:, None].expand(-1, cols, -1)
    return torch.cat([wide, high], -1).flatten(0, 1).float()
