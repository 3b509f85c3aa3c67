"""Latents as a generator gets them wrong, for a decoder that learns to mend them.

Pictures' latents are noised part of the way and denoised again by a trained generator, as SDEdit does (Meng et al.
2022, arXiv:2108.01073): what they show stays, their details are the generator's.
"""

from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from nexus.config import Config, not_above
from nexus.errors import ModelError
from nexus.process import samplers
from nexus.process.diffusion import Diffusion
from nexus.process.schedules import grid, tail
from nexus.process.taught import taught


class MistakesConfig(Config):
    """generator: a model of this codec's latents. share: of each batch, what goes through it.

    least, most: the shares of its run that are taken, drawn anew for each batch. steps: of a whole run.
    """

    generator: str
    share: float = Field(0.5, gt=0, le=1)
    least: float = Field(0.2, gt=0, le=1)
    most: float = Field(0.45, gt=0, le=1)
    steps: int = Field(20, ge=1)

    _ordered = not_above("least", "most")


class Mistakes:
    """What the generator `system` makes of pictures; ModelError when its latents are not of `shape`."""

    def __init__(self, config: MistakesConfig, system: Any, shape: tuple[int, int, int]):
        if not isinstance(system, Diffusion) or system.codec is None or system.config.concat is not None:
            raise ModelError(f"the generator {config.generator} is no diffusion or flow model of a codec's latents",
                             hint="a model such as dit, flow or sd")
        if system.config.latent_shape != shape:
            raise ModelError(f"the generator {config.generator} makes latents of {system.config.latent_shape}, this "
                             f"codec of {shape}", hint="a model that was trained on this codec")
        self.config, self.system, self._known = config, system, False

    @torch.no_grad()
    def __call__(self, batch: dict, mean: Tensor, encoder: nn.Module, rng: torch.Generator) -> Tensor:
        """What `encoder` says of the first n pictures of a batch, mean [n, L, h, w] -> the same, a little wrong.

        The generator samples as it does by itself, with their labels and its own guidance. ModelError when it learnt
        the latents of another codec than the one with this `encoder`.
        """
        self._recognise(encoder)
        part = {name: values[:len(mean)] for name, values in batch.items()}
        system, c = self.system.to(mean.device), self.system.config
        its = system.codec.config
        z = (mean - its.shift) * its.scale
        strength = self.config.least + (self.config.most - self.config.least) * float(torch.rand((), generator=rng))
        times = c.path.times(self.config.steps, schedule=c.schedule, shape=c.latent_shape)
        points = tail(grid(c.path, times, to_data=True), strength)
        if points.steps:
            def noise(x: Tensor) -> Tensor:
                return torch.randn(x.shape, generator=rng).to(x)
            start = float(points.alpha[0]) * z + float(points.sigma[0]) * noise(z)
            scale = 1.0 if system.conditioner is None else c.guidance
            z = samplers.sample(c.sampler, taught(system, part, scale, rng), start, points, noise=noise)
        return z / its.scale + its.shift

    def _recognise(self, encoder: nn.Module) -> None:
        if not self._known:         # at the first pictures: before them a run's weights may not be read yet
            its = self.system.codec.encoder.state_dict()
            if any(n not in its or not torch.equal(its[n], t.to(its[n])) for n, t in encoder.state_dict().items()):
                raise ModelError(f"the generator {self.config.generator} was trained on the latents of another codec",
                                 hint="begin with the codec that it names: --init")
            self._known = True
