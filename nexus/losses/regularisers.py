"""What keeps a critic smooth: penalties on its gradient in the picture, and on the size of its scores.

All take critic(x) -> scores [B, ...] and pictures x [B, C, H, W]; all are scalars that can be differentiated again.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

Critic = Callable[[Tensor], Tensor]


def picture_gradient(scores: Tensor, x: Tensor) -> Tensor:
    """The gradient of each picture's summed scores in that picture, flat: [B, C * H * W] float32."""
    gradient, = torch.autograd.grad(scores.float().sum(), x, create_graph=True)
    return gradient.float().flatten(1)


def gradient_square(scores: Tensor, x: Tensor) -> Tensor:
    """Half the mean squared length of the gradient: R1 where x is real, R2 where it is made. Mescheder et al. 2018."""
    return 0.5 * picture_gradient(scores, x).square().sum(1).mean()


def gradient_penalty(critic: Critic, real: Tensor, fake: Tensor, rng: torch.Generator) -> Tensor:
    """Mean (|gradient| - 1)^2 between real and made pictures. Gulrajani et al. 2017, eq. 3."""
    share = torch.rand(len(real), 1, 1, 1, generator=rng).to(real)
    between = (share * real + (1 - share) * fake).detach().requires_grad_()
    # A length of 0 has no gradient; the square under the root keeps clear of it.
    length = (picture_gradient(critic(between), between).square().sum(1) + 1e-12).sqrt()
    return (length - 1).square().mean()


def drift(real: Tensor) -> Tensor:
    """The mean squared score of real pictures, which a Wasserstein critic is else free to move. Karras et al. 2018."""
    return real.float().square().mean()


@torch.no_grad()
def clip_weights(module: nn.Module, limit: float) -> None:
    """Every weight cut to [-limit, limit]. Arjovsky et al. 2017, algorithm 1."""
    for p in module.parameters():
        p.clamp_(-limit, limit)
