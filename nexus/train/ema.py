"""The exponential moving average of the weights."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


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
        for cut in (True, False):       # tensors that FSDP2 has cut over the ranks do not mix with whole ones
            names = [n for n in floating if isinstance(tensors[n], DTensor) == cut]
            if names:
                torch._foreach_lerp_([self.average[n] for n in names], [tensors[n].detach() for n in names], 1 - decay)
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
