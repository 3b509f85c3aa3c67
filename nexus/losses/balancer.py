"""The loss balancer: weights that say which share of the gradient each loss has. Defossez et al. 2022, section 3.4."""

from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from nexus.nn.ranks import averaged

TINY = 1e-12


class Balancer(nn.Module):
    """Losses of what a network made, scaled so that each pulls at it with its share of a gradient of length `total`.

    weights: the shares by the losses' names, before they are made to sum to 1. decay: of the average length of each
    loss's gradient, which is kept as a buffer, because a run that goes on has to go on with it.
    """

    def __init__(self, weights: Mapping[str, float], *, decay: float = 0.999, total: float = 1.0):
        super().__init__()
        self.weights, self.decay, self.total = dict(weights), decay, total
        self.register_buffer("length", torch.zeros(len(self.weights)))      # decayed sums of lengths, and of ones
        self.register_buffer("seen", torch.zeros(len(self.weights)))

    def forward(self, losses: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """losses: scalars of x [B, ...] -> a scalar with the balanced gradient at x and the value of their sum.

        The value is weighed by the plain weights. Gradients that are not finite leave the averages as they are.
        """
        names = [name for name in self.weights if name in losses]
        grads = [torch.autograd.grad(losses[name], x, retain_graph=True)[0].float() for name in names]
        lengths = averaged(torch.stack([g.flatten(1).norm(dim=1).mean() for g in grads]))
        share = self.total / sum(self.weights[name] for name in names)
        usual = self._usual(names, lengths)
        pull = sum(share * self.weights[name] * g / (length + TINY)
                   for name, g, length in zip(names, grads, usual.unbind(), strict=True))
        value = sum(self.weights[name] * losses[name].detach() for name in names)
        held = (x.float() * pull).sum()
        return value + held - held.detach()

    @torch.no_grad()
    def _usual(self, names: Collection[str], lengths: Tensor) -> Tensor:
        """The average length of each of the named losses' gradients, this one included."""
        at = torch.tensor([list(self.weights).index(name) for name in names], device=lengths.device)
        if lengths.isfinite().all():
            self.length[at] = self.decay * self.length[at] + lengths
            self.seen[at] = self.decay * self.seen[at] + 1
        return self.length[at] / self.seen[at].clamp_min(TINY)
