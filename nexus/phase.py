"""One optimiser's turn in a training step."""

from collections.abc import Callable
from typing import NamedTuple

from torch import nn


class Phase(NamedTuple):
    """`loss(batch, rng, step)` is minimised over `module`, `repeat` times a step; `after(step)` follows each update.

    batch: dict from the data set ("image" [B, C, H, W] in [-1, 1], "label" [B], "style" [B], "caption" list[str],
    "index" [B]). rng: a CPU generator, the only source of randomness. step: the number of finished steps.
    The result is a scalar Tensor, or a dict of scalars whose "loss" is minimised and whose rest is logged.
    Diffusion has one phase; a GAN has the critic (repeat=5), then the generator. rate: times the learning rate of the
    arguments, for phases that learn at their own (Heusel et al. 2017).
    """

    name: str
    module: nn.Module
    loss: Callable
    repeat: int = 1
    after: Callable | None = None
    rate: float = 1.0
