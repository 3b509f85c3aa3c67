"""Joint attention of two token streams, each with weights of its own. Esser et al. 2024 (SD3), arXiv:2403.03206.

B = batch, L = text tokens, N = picture tokens, D = width, V = distinct conditions of a batch, S = times of a run.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.errors import InputError
from nexus.nn.attention import attend, merge_heads, split_heads
from nexus.nn.modulation import gated, modulate
from nexus.nn.norm import QKNorm
from nexus.nn.rope import Rotation, rotate

PREPARED_BYTES = 1 << 30         # above this, a run's modulations cost more memory than they save in time


class Attention(nn.Module):
    """One stream's projections: x [B, N, D] -> its queries, keys and values, each [B, H, N, D/H]."""

    def __init__(self, dim: int, heads: int, *, qk_norm: bool, out: bool = True):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.norm = QKNorm(dim // heads) if qk_norm else None
        self.proj = nn.Linear(dim, dim) if out else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = (split_heads(part, self.heads) for part in self.qkv(x).chunk(3, -1))
        return (q, k, v) if self.norm is None else (*self.norm(q, k), v)


class Stream(nn.Module):
    """One side of a joint block. `second`: an attention of its own besides the joint one (SD3.5).

    `last`: its tokens are only looked at, and leave as they came: no output projection, no MLP.
    """

    def __init__(self, dim: int, heads: int, mlp: int, *, qk_norm: bool, second: bool = False, last: bool = False):
        super().__init__()
        self.adaln = nn.Linear(dim, (2 if last else 9 if second else 6) * dim)
        self.attn = Attention(dim, heads, qk_norm=qk_norm, out=not last)
        self.attn2 = Attention(dim, heads, qk_norm=qk_norm) if second else None
        self.fc1 = None if last else nn.Linear(dim, mlp)
        self.fc2 = None if last else nn.Linear(mlp, dim)

    def parts(self, mod: Tensor) -> tuple[Tensor, ...]:
        """mod [B, 2D, 6D or 9D] -> shift, scale[, gate, then shift, scale, gate of the MLP[, and of attn2]]."""
        return mod.chunk(self.adaln.out_features // self.adaln.in_features, -1)

    def finish(self, x: Tensor, attended: Tensor, parts: tuple[Tensor, ...]) -> Tensor:
        """x [B, N, D] and what the joint attention gave its tokens -> the block's output."""
        if self.fc1 is None:
            return x
        h = gated(x, parts[2], self.attn.proj(attended))
        if self.attn2 is not None:
            own = merge_heads(attend(*self.attn2(modulate(x, *parts[6:8]))))
            h = gated(h, parts[8], self.attn2.proj(own))
        inner = F.gelu(self.fc1(modulate(h, *parts[3:5])), approximate="tanh")
        return gated(h, parts[5], self.fc2(inner))


class JointBlock(nn.Module):
    """Text [B, L, D] and picture [B, N, D] attend to both; every token keeps to its stream's weights."""

    def __init__(self, dim: int, heads: int, mlp: int, *, qk_norm: bool, second: bool = False, last: bool = False):
        super().__init__()
        self.x = Stream(dim, heads, mlp, qk_norm=qk_norm, second=second)
        self.context = Stream(dim, heads, mlp, qk_norm=qk_norm, last=last)

    def forward(self, x: Tensor, context: Tensor, mod_x: Tensor, mod_context: Tensor, *, mask: Tensor | None = None,
                rotation: Rotation | None = None) -> tuple[Tensor, Tensor]:
        """-> the new x and context. Text comes first in mask [B, 1, 1, L + N] and in `rotation`."""
        mx, mc = self.x.parts(mod_x), self.context.parts(mod_context)
        pairs = zip(self.context.attn(modulate(context, *mc[:2])), self.x.attn(modulate(x, *mx[:2])), strict=True)
        q, k, v = (torch.cat(pair, 2) for pair in pairs)
        if rotation is not None:
            q, k = rotate(q, rotation), rotate(k, rotation)
        words, pixels = merge_heads(attend(q, k, v, mask)).split([context.shape[1], x.shape[1]], 1)
        return self.x.finish(x, pixels, mx), self.context.finish(context, words, mc)


def vector_mlp(dim: int, out: int) -> nn.Sequential:
    """Linear -> SiLU -> Linear: [B, dim] -> [B, out]."""
    return nn.Sequential(nn.Linear(dim, out), nn.SiLU(), nn.Linear(out, out))


def needed(cond: dict[str, Tensor] | None, key: str) -> Tensor:
    """cond[key], or InputError."""
    if cond is None or key not in cond:
        raise InputError(f"this network reads text and needs '{key}' in its condition",
                         hint="the model has no text encoder; a system with one gives a context and a pooled vector")
    return cond[key]


def joint_mask(cond: dict[str, Tensor], tokens: int) -> Tensor | None:
    """"context_mask" [B, L], if there is one, extended over picture tokens that all may see: [B, 1, 1, L + N]."""
    mask = cond.get("context_mask")
    return None if mask is None else F.pad(mask, (0, tokens), value=True)[:, None, None]


def alone(mask: Tensor | None, words: int, tokens: int, device: torch.device) -> Tensor:
    """`mask` with every picture token seeing itself and the text, and no other one. Ahn et al. 2024.

    [B or 1, 1, L + N, L + N]; text sees everything, as before.
    """
    seen = torch.ones(words + tokens, words + tokens, dtype=torch.bool, device=device)
    seen[words:, words:] = torch.eye(tokens, dtype=torch.bool, device=device)
    return seen[None, None] if mask is None else seen & mask


def modulations(net: nn.Module, t: Tensor, cond: dict[str, Tensor], prepared: dict | None) -> list[Tensor]:
    """What each of `net.adalns()` says of t [B] and cond, [B, k D]; read from `prepared` where it holds them."""
    step = prepared["steps"].get(float(t[0])) if prepared and len(prepared["item"]) == len(t) else None
    if step is None:
        return _each_adaln(net, net.embed(t, cond))
    return [mod[step][prepared["item"]] for mod in prepared["mods"]]


def prepared_modulations(net: nn.Module, times: Tensor, cond: dict[str, Tensor], keys: tuple[str, ...]) -> dict:
    """"mods": every modulation of a run with times [S], each [S, V, k D]; which of the V an item has is in "item" [B].

    keys: the parts of cond that `net.embed` looks at; a batch has few distinct ones. No steps when it would not fit.
    """
    rows = [needed(cond, key).float().reshape(len(cond[key]), -1) for key in keys]
    distinct, item = torch.cat(rows, 1).unique(dim=0, return_inverse=True)
    width = sum(layer.out_features for layer in net.adalns())
    if len(times) * len(distinct) * width * net.final.weight.element_size() > PREPARED_BYTES:
        return {"steps": {}, "item": item, "mods": []}
    first = [item.tolist().index(v) for v in range(len(distinct))]
    each = {key: cond[key][first].repeat(len(times), *[1] * (cond[key].ndim - 1)) for key in keys}
    c = net.embed(times.repeat_interleave(len(distinct)), each).unflatten(0, (len(times), len(distinct)))
    return {"steps": {t: s for s, t in enumerate(times.float().tolist())}, "item": item, "mods": _each_adaln(net, c)}


def _each_adaln(net: nn.Module, c: Tensor) -> list[Tensor]:
    c = F.silu(c)
    return [layer(c) for layer in net.adalns()]
