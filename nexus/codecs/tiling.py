"""Large pictures through the KL codec in little memory, exactly: in stripes of rows, block by block.

Group norms look at the whole picture, so tiles that are decoded alone and blended cannot give what the whole picture
gives. Here every block walks the picture in stripes instead: once for the statistics of each of its norms, once more
for its output, each stripe with the rows above and below it that its 3x3 convolutions reach. A block writes over its
own input, and what doubles the sides is computed again for each stripe rather than kept, so that of the largest
resolution one feature map is in memory, not six. The price: a block's first convolution is computed twice, what
doubles the sides three times.

B = batch, C = channels, H = rows, W = columns of a feature map; a stripe is its first row and the one behind its last.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.codecs.kl_blocks import KLDecoder, KLEncoder, Middle, Stage
from nexus.memory import MIN_ROWS, STRIPE_BYTES, tiled
from nexus.nn.attention import attend, merge_heads, split_heads
from nexus.nn.resnet import ResBlock, SelfAttention2d


class Rows(NamedTuple):
    """A feature map read in stripes: get(a, b) -> [1, C, b - a, W]; kept: the map itself where it is in memory."""

    get: Callable[[int, int], Tensor]
    height: int
    width: int
    kept: Tensor | None = None

    def reach(self, a: int, b: int, halo: int) -> tuple[int, int]:
        """A stripe with `halo` more rows on either side, as far as the picture goes."""
        return max(a - halo, 0), min(b + halo, self.height)

    def stripes(self, channels: int) -> Iterator[tuple[int, int]]:
        """Stripes that hold about STRIPE_BYTES of `channels` in float32."""
        step = max(MIN_ROWS, STRIPE_BYTES // (4 * channels * self.width))
        for a in range(0, self.height, step):
            yield a, min(a + step, self.height)


class Norm(NamedTuple):
    """A group norm with the statistics of a whole picture: x * scale + shift, each [1, C, 1, 1] in float32."""

    scale: Tensor
    shift: Tensor

    def silu(self, x: Tensor) -> Tensor:
        """SiLU of the normalised x, in x's dtype."""
        return F.silu(torch.addcmul(self.shift, x.to(self.scale), self.scale).to(x.dtype), inplace=True)


def wanted(mode: str, height: int, width: int) -> bool:
    """Whether a picture of so many pixels goes through the codec in stripes; never where gradients are needed."""
    return not torch.is_grad_enabled() and tiled(mode, height, width)


def decode(decoder: KLDecoder, z: Tensor) -> Tensor:
    """What decoder(z) gives, but for rounding: z [B, L, h, w] -> picture [B, O, f*h, f*w]."""
    return torch.cat([_decode_one(decoder, item) for item in z.split(1)])


def encode(encoder: KLEncoder, x: Tensor) -> Tensor:
    """What encoder(x) gives, but for rounding: x [B, C, H, W] -> features [B, O, H/f, W/f]."""
    return torch.cat([_encode_one(encoder, item) for item in x.split(1)])


def _decode_one(decoder: KLDecoder, z: Tensor) -> Tensor:
    rows = _kept(_middle(decoder.middle, decoder.conv_in(z)))
    for stage in decoder.stages:
        rows = _blocks(stage, rows)
        if stage.resample is not None:
            rows = _doubled(stage.resample.conv, rows.kept)
    norm = _norm(decoder.norm_out, rows)
    parts = [_conv(decoder.conv_out, norm.silu(rows.get(*rows.reach(a, b, 1))), rows.height, a, b)
             for a, b in rows.stripes(decoder.conv_out.in_channels)]
    return F.pixel_shuffle(torch.cat(parts, 2), decoder.patch)


def _encode_one(encoder: KLEncoder, x: Tensor) -> Tensor:
    rows = _kept(encoder.conv_in(F.pixel_unshuffle(x, encoder.patch)))
    for stage in encoder.stages:
        rows = _blocks(stage, rows)
        if stage.resample is not None:
            rows = _kept(_halved(stage.resample.conv, rows))
    return encoder.conv_out(F.silu(encoder.norm_out(_middle(encoder.middle, rows.kept))))


def _kept(x: Tensor) -> Rows:
    return Rows(lambda a, b: x[:, :, a:b], x.shape[2], x.shape[3], x)


# --- layers ---------------------------------------------------------------------------------------------------------

def _conv(conv: nn.Conv2d, x: Tensor, height: int, a: int, b: int) -> Tensor:
    """A 3x3 convolution's rows a to b; x is those and one more on either side, zero beyond the picture's `height`."""
    return F.conv2d(F.pad(x, (0, 0, int(a == 0), int(b == height))), conv.weight, conv.bias, padding=(0, 1))


def _norm(norm: nn.GroupNorm, rows: Rows) -> Norm:
    """A norm's statistics of all rows, gathered in stripes and merged in float64. Chan et al. 1979."""
    count, mean, square = 0, 0.0, 0.0
    for a, b in rows.stripes(norm.num_channels):
        groups = rows.get(a, b).float().reshape(norm.num_groups, -1)
        var, here = (v.double() for v in torch.var_mean(groups, 1, correction=0))
        n = groups.shape[1]
        gap = here - mean
        mean = mean + gap * (n / (count + n))
        square = square + var * n + gap.square() * (count * n / (count + n))
        count += n
    each = norm.num_channels // norm.num_groups
    scale = (square / count + norm.eps).rsqrt().repeat_interleave(each) * norm.weight.double()
    shift = norm.bias.double() - mean.repeat_interleave(each) * scale
    return Norm(*(v.float().view(1, -1, 1, 1) for v in (scale, shift)))


def _doubled(conv: nn.Conv2d, x: Tensor) -> Rows:
    """Nearest neighbour and a 3x3 convolution, computed for each stripe that is asked for."""
    height = 2 * x.shape[2]

    def get(a: int, b: int) -> Tensor:
        low, high = max(a - 1, 0), min(b + 1, height)
        first = low // 2
        wide = F.interpolate(x[:, :, first:(high + 1) // 2], scale_factor=2.0, mode="nearest")
        return _conv(conv, wide[:, :, low - 2 * first:high - 2 * first], height, a, b)
    return Rows(get, height, 2 * x.shape[3])


def _halved(conv: nn.Conv2d, rows: Rows) -> Tensor:
    """A 3x3 convolution of stride 2, padded right and bottom only."""
    parts = []
    for a, b in Rows(rows.get, rows.height // 2, rows.width).stripes(2 * conv.in_channels):
        x = rows.get(2 * a, min(2 * b + 1, rows.height))
        parts.append(conv(F.pad(x, (0, 1, 0, 2 * b + 1 - 2 * a - x.shape[2]))))
    return torch.cat(parts, 2)


# --- blocks ---------------------------------------------------------------------------------------------------------

def _res(block: ResBlock, rows: Rows) -> Tensor:
    """A residual block, written over its input where that is in memory and as wide as the output."""
    stripes = list(rows.stripes(max(block.conv1.in_channels, block.conv2.in_channels)))
    if len(stripes) == 1:
        return block(rows.get(0, rows.height))
    first = _norm(block.norm1, rows)

    def inner(a: int, b: int) -> Tensor:
        return _conv(block.conv1, first.silu(rows.get(*rows.reach(a, b, 1))), rows.height, a, b)
    second = _norm(block.norm2, rows._replace(get=inner))
    out, above = rows.kept if block.skip is None else None, None
    over = out is not None
    for a, b in stripes:
        low, high = rows.reach(a, b, 2)
        x = rows.get(low, high) if above is None else torch.cat([above, rows.get(a, high)], 2)
        if over:                                        # the next stripe reaches up into what is written over now
            above = rows.get(b - 2, b).clone()
        h = _conv(block.conv1, first.silu(x), rows.height, *rows.reach(a, b, 1))
        h = _conv(block.conv2, second.silu(h), rows.height, a, b)
        x = x[:, :, a - low:b - low]
        h += x if block.skip is None else block.skip(x)
        if out is None:
            out = h.new_empty(1, h.shape[1], rows.height, rows.width)
        out[:, :, a:b] = h
    return out


def _blocks(stage: Stage, rows: Rows) -> Rows:
    """A stage without its change of resolution."""
    for block, attention in stage.pairs():
        x = _res(block, rows)
        rows = _kept(x if attention is None else _attention(attention, x))
    return rows


def _middle(middle: Middle, x: Tensor) -> Tensor:
    x = middle.block1(x)
    return middle.block2(x if middle.attention is None else _attention(middle.attention, x))


def _attention(attention: SelfAttention2d, x: Tensor) -> Tensor:
    """All positions see all, some queries at a time, so that a kernel that writes its scores down needs little."""
    tokens = attention.norm(x).flatten(2).transpose(1, 2)
    q, k, v = (split_heads(p, attention.heads) for p in attention.qkv(tokens).chunk(3, -1))
    step = max(1024, STRIPE_BYTES // (4 * attention.heads * k.shape[2]))
    seen = torch.cat([attend(part, k, v) for part in q.split(step, 2)], 2)
    return x + attention.proj(merge_heads(seen)).transpose(1, 2).unflatten(2, x.shape[2:])
