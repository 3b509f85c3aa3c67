"""The exponential moving average of the weights."""

import torch
from torch import Tensor, nn


class EMA:
    """Float32 averages of a module's trained weights and buffers, by name."""

    def __init__(self, tensors: dict[str, Tensor], decay: float, *, warmup: bool = True):
        self.decay, self.warmup = decay, warmup
        self.average = {name: t.detach().clone() for name, t in tensors.items()}

    @torch.no_grad()
    def update(self, tensors: dict[str, Tensor], step: int) -> None:
        """Move towards `tensors` after the given number of finished steps. Warm-up as in Tarvainen & Valpola 2017."""
        decay = min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay
        floating = [n for n, t in tensors.items() if t.is_floating_point()]
        torch._foreach_lerp_([self.average[n] for n in floating], [tensors[n].detach() for n in floating], 1 - decay)
        for name in tensors.keys() - set(floating):
            self.average[name].copy_(tensors[name])


@torch.no_grad()
def swap(module: nn.Module, average: dict[str, Tensor]) -> None:
    """Exchange a module's tensors with the averages in place; the same call again restores both."""
    state = module.state_dict()
    for name, value in average.items():
        kept = state[name].clone()
        state[name].copy_(value)
        value.copy_(kept)
