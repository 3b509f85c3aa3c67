"""The residual block and the self-attention block of UNets and picture codecs."""

import torch.nn.functional as F
from torch import Tensor, nn

from nexus.nn.attention import attend, merge_heads, split_heads
from nexus.nn.conv import Downsample, Upsample


class ResBlock(nn.Module):
    """GroupNorm, SiLU, 3x3 convolution, twice, around a skip: x [B, C, H, W] -> [B, O, H', W'].

    emb: width of the embedding [B, E] added (or, with `scale_shift`, applied as AdaGN) between the convolutions;
    0 = none. resample: "up" | "down" halves or doubles both branches without weights (ADM's resblock_updown).
    zero_last starts the block as the identity. Ho et al. 2020; Dhariwal & Nichol 2021.
    """

    def __init__(self, channels: int, out: int | None = None, *, emb: int = 0, groups: int = 32, eps: float = 1e-5,
                 scale_shift: bool = False, dropout: float = 0.0, resample: str = "", zero_last: bool = False):
        super().__init__()
        out = out or channels
        self.scale_shift, self.dropout = scale_shift, dropout
        self.norm1 = nn.GroupNorm(groups, channels, eps)
        self.conv1 = nn.Conv2d(channels, out, 3, 1, 1)
        self.emb_proj = nn.Linear(emb, 2 * out if scale_shift else out) if emb else None
        self.norm2 = nn.GroupNorm(groups, out, eps)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1)
        self.skip = nn.Conv2d(channels, out, 1) if out != channels else None
        self.resample = {"": None, "up": Upsample(channels, conv=False),
                         "down": Downsample(channels, conv=False)}[resample]
        if zero_last:
            nn.init.zeros_(self.conv2.weight)
            nn.init.zeros_(self.conv2.bias)

    def forward(self, x: Tensor, emb: Tensor | None = None) -> Tensor:
        """emb [B, E] is the embedding BEFORE its SiLU."""
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv1(h)
        if self.emb_proj is None:
            h = self.norm2(h)
        else:
            e = self.emb_proj(F.silu(emb))[:, :, None, None]
            if self.scale_shift:
                scale, shift = e.chunk(2, 1)
                h = self.norm2(h) * (1 + scale) + shift
            else:
                h = self.norm2(h + e)
        h = self.conv2(F.dropout(F.silu(h), self.dropout, self.training))
        return h + (x if self.skip is None else self.skip(x))


class SelfAttention2d(nn.Module):
    """Every pixel attends to every pixel, around a skip: x [B, C, H, W] -> [B, C, H, W]. Ho et al. 2020."""

    def __init__(self, channels: int, heads: int = 1, *, groups: int = 32, eps: float = 1e-5, zero_last: bool = False):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels, eps)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj = nn.Linear(channels, channels)
        if zero_last:
            nn.init.zeros_(self.proj.weight)
            nn.init.zeros_(self.proj.bias)

    def forward(self, x: Tensor, identity: bool = False) -> Tensor:
        """identity: every pixel attends to itself alone."""
        tokens = self.norm(x).flatten(2).transpose(1, 2)                     # [B, HW, C]
        q, k, v = (split_heads(p, self.heads) for p in self.qkv(tokens).chunk(3, -1))
        out = self.proj(merge_heads(attend(q, k, v, identity=identity)))
        return x + out.transpose(1, 2).unflatten(2, x.shape[2:])
