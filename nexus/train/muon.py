"""Muon: momentum, orthogonalised, for the hidden matrices of a network. Jordan et al. 2024.

torch's own does the same one matrix at a time and always in bfloat16, which processors without it only emulate: there
the optimiser would take longer than everything else. This one takes matrices of equal shape together, in bfloat16
where the device has it and else in float32.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from nexus.nn.precision import has_bfloat16

A, B, C = 3.4445, -4.7750, 2.0315       # of Jordan's quintic, steepest at 0
STEPS, TINY = 5, 1e-7


def orthogonalised(x: Tensor) -> Tensor:
    """Matrices x [K, A, B] with every singular value brought near 1 (into 0.7 to 1.2), by Newton and Schulz's steps.

    In x's dtype; the result of all of a stack is that of each alone.
    """
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(TINY)
    for _ in range(STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), x, beta=A)
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Steps of lr * sqrt(max(1, A / B)) along the orthogonalised Nesterov momentum of matrices [A, B].

    weight_decay: decoupled, as of AdamW. State: "momentum_buffer", as of torch.optim.Muon.
    """

    def __init__(self, params: Iterable[nn.Parameter] | Iterable[dict], lr: float, weight_decay: float = 0.0,
                 momentum: float = 0.95):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """One update of every parameter that has a gradient."""
        for group in self.param_groups:
            moved = [p for p in group["params"] if p.grad is not None]
            for alike in _alike(moved):
                self._update(alike, group)

    def _update(self, params: list[nn.Parameter], group: dict) -> None:
        """params: of one shape, device and dtype."""
        for p in params:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        buffers, grads = [self.state[p]["momentum_buffer"] for p in params], [p.grad for p in params]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        ahead = torch._foreach_lerp(grads, buffers, group["momentum"])
        kept = params[0].dtype
        dtype = torch.bfloat16 if has_bfloat16(params[0].device) else torch.float32
        straight = orthogonalised(torch.stack(ahead).to(dtype)).to(kept)
        rows, columns = params[0].shape
        torch._foreach_mul_(params, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(straight.unbind()), alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)


def _alike(params: list[nn.Parameter]) -> list[list[nn.Parameter]]:
    """Parameters in stacks of one shape, device and dtype; those that FSDP2 has cut over the ranks each alone."""
    stacks: dict[tuple, list[nn.Parameter]] = {}
    for i, p in enumerate(params):
        alone = i if isinstance(p, DTensor) else None
        stacks.setdefault((p.shape, p.device, p.dtype, alone), []).append(p)
    return list(stacks.values())
