"""Low-rank branches of linear layers and convolutions: W x + s B A x. Hu et al. 2021, arXiv:2106.09685 (LoRA).

A branch is a child `lora` of its layer, and a forward hook adds what it computes. A wrapping module would rename every
weight and hide `weight` and `in_features` from code that asks a layer for them; torch.nn.utils.parametrize renames
too, changes the layer's class, makes the whole W + s B A in every pass, and rounds small updates away in bfloat16.
Here a layer stays what it was, and its keys stay as they were.
"""

import math
from collections.abc import Iterable
from typing import Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nexus.config import Config
from nexus.errors import InputError, UsageError

MARK = ".lora."                         # in the name of every tensor of a branch
Rows = tuple[int, int]                  # the first row of a weight that a part updates, and the row after its last


class LoRAConfig(Config):
    """rank: of every update. alpha: the update is scaled by alpha / rank; None = the rank, a scale of 1.

    targets: attn = the projections of attentions, linear = every linear layer, all = convolutions too.
    """

    rank: int = Field(8, ge=1, le=4096)
    alpha: float | None = Field(None, gt=0, le=1e6)
    targets: Literal["attn", "linear", "all"] = "attn"

    @classmethod
    def read(cls, text: str) -> Self:
        """"rank=8,alpha=8,targets=attn", in any order and each optional; else UsageError."""
        pairs, hint = [part.partition("=") for part in text.split(",")], "rank=8,alpha=8,targets=attn"
        for i, (name, mark, _) in enumerate(pairs):
            if not mark:
                raise UsageError(f"--lora '{text}': '{name}' is not NAME=VALUE", hint=hint)
            if name.strip() not in cls.model_fields:
                raise UsageError(f"--lora '{text}': there is no setting '{name.strip()}'", hint=hint)
            if name.strip() in (other.strip() for other, _, _ in pairs[:i]):
                raise UsageError(f"--lora '{text}': {name.strip()} is said twice", hint=hint)
        try:
            return cls.parse({name.strip(): value.strip() for name, _, value in pairs})
        except InputError as error:
            raise UsageError(f"--lora '{text}': {str(error).removeprefix('LoRAConfig: ')}", hint=hint) from None

    @property
    def scale(self) -> float:
        """What an update is multiplied by."""
        return 1.0 if self.alpha is None else self.alpha / self.rank


class Branch(nn.Module):
    """s B A x for the input x of a linear layer or a convolution.

    parts: the rows of the weight that are updated, each with A and B of its own, so that a fused layer (q, k and v) is
    adapted as the separate layers of public files are. down: the As [parts * rank, in, *kernel]; up: the Bs
    [updated rows, rank]. B starts at zero: a new branch changes nothing.
    """

    def __init__(self, layer: nn.Linear | nn.Conv2d, parts: tuple[Rows, ...], rank: int, scale: float):
        super().__init__()
        self.parts, self.rank, self.scale, self.shape = parts, rank, scale, layer.weight.shape
        self.conv = (layer.stride, layer.padding, layer.dilation) if isinstance(layer, nn.Conv2d) else None
        self.sizes = [stop - start for start, stop in parts]
        self.hook = None
        where = layer.weight.device
        self.down = nn.Parameter(torch.empty(len(parts) * rank, *self.shape[1:], device=where))
        self.up = nn.Parameter(torch.zeros(sum(self.sizes), rank, device=where))
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))         # as the layers themselves start

    def pieces(self) -> list[tuple[Rows, Tensor, Tensor]]:
        """Each part's rows, its A [rank, in, *kernel] and its B [rows, rank]."""
        return list(zip(self.parts, self.down.chunk(len(self.parts)), self.up.split(self.sizes), strict=True))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.down.dtype)
        h = self.scale * (F.linear(x, self.down) if self.conv is None else F.conv2d(x, self.down, None, *self.conv))
        axis = -1 if self.conv is None else 1
        made = [F.linear(part, up) if self.conv is None else F.conv2d(part, up[..., None, None])
                for part, up in zip(h.chunk(len(self.parts), axis), self.up.split(self.sizes), strict=True)]
        if len(self.up) == self.shape[0]:
            return torch.cat(made, axis) if made[1:] else made[0]
        inner = (0, 0, 0, 0) if self.conv else ()
        return sum(F.pad(one, (*inner, start, self.shape[0] - stop))
                   for one, (start, stop) in zip(made, self.parts, strict=True))

    def delta(self) -> Tensor:
        """What the branch adds to its layer's weight, float32 in the weight's shape."""
        whole = torch.zeros(self.shape, device=self.up.device)
        for (start, stop), down, up in self.pieces():
            whole[start:stop] = self.scale * (up.float() @ down.float().flatten(1)).unflatten(1, self.shape[1:])
        return whole


def _add(layer: nn.Module, inputs: tuple, out: Tensor) -> Tensor:
    return out + layer.lora(inputs[0]).to(out.dtype)


def attach(net: nn.Module, targets: dict[str, tuple[Rows, ...]], rank: int, scale: float = 1.0) -> None:
    """Give each named layer a branch over its parts. Raises UsageError for a layer that can have none."""
    for name, parts in targets.items():
        layer = net.get_submodule(name)
        if not isinstance(layer, nn.Linear | nn.Conv2d) or getattr(layer, "groups", 1) != 1:
            raise UsageError(f"{name} is a {type(layer).__name__}, which has no low-rank branch")
        layer.lora = Branch(layer, parts, rank, scale)
        layer.lora.hook = layer.register_forward_hook(_add)


def branches(net: nn.Module) -> dict[str, Branch]:
    """Layer name -> its branch."""
    return {name.removesuffix(".lora"): m for name, m in net.named_modules() if isinstance(m, Branch)}


def detach(net: nn.Module) -> None:
    """Take all branches away."""
    for name, branch in branches(net).items():
        branch.hook.remove()
        del net.get_submodule(name).lora


@torch.no_grad()
def merge(net: nn.Module, deltas: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Add to the weight of each named layer, summed in float32; returns the weights as they were, for `unmerge`."""
    kept = {}
    for name, delta in deltas:
        weight = net.get_submodule(name).weight
        kept[name] = weight.clone()
        weight.copy_(weight.float() + delta.to(weight.device, torch.float32))
    return kept


@torch.no_grad()
def unmerge(net: nn.Module, kept: dict[str, Tensor]) -> None:
    """Put back what `merge` returned, bit for bit (subtracting would leave rounding behind)."""
    for name, weight in kept.items():
        net.get_submodule(name).weight.copy_(weight)


def bake(net: nn.Module) -> None:
    """Merge all branches for good."""
    merge(net, ((name, branch.delta()) for name, branch in branches(net).items()))
    detach(net)
