"""The system that consistency models and latent consistency models share: a network that jumps to the data."""

import copy
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor, nn

from nexus.errors import UsageError
from nexus.losses import lpips
from nexus.phase import Phase
from nexus.process.consistency import DISTANCES, multistep, replayed
from nexus.process.diffusion import Diffusion, DiffusionConfig, Run, check_teacher
from nexus.process.predictions import clipped
from nexus.process.schedules import Grid, grid, tail
from nexus.process.steer import check_prompts
from nexus.requests import SampleRequest, refuse
from nexus.text.conditioner import Cond, dropped

# What a request may set; the path refuses every schedule but its own.
OPEN = frozenset({"prompt", "steps", "guidance", "width", "height", "image", "strength", "mask", "outpaint",
                  "initial_noise", "schedule", "lora", "embedding", "control", "control_image", "control_scale"})


class JumpConfig(DiffusionConfig):
    """What both kinds are made of. A kind adds `jump`, `neighbours`, `decay`, and a path whose times take a strength.

    jump(net, x, t, cond, prepared) -> x0: the consistency function f, for t [] or [B].
    neighbours(system, x0, cond, rng, step) -> Pair: two points of one trajectory.
    decay(step) -> how much of itself the target keeps at a step; None = the target is the network itself.

    teacher: the model whose trajectories are learned (distillation); None = those of the data (consistency training).
    distance, huber_c: how far apart two jumps are, and the constant of the Huber distances.
    """

    teacher: str | None = None
    # what only a sampler of many steps, or the loss of one, would read:
    min_snr: float = Field(0.0, ge=0, le=0)
    pairing: Literal["none"] = "none"
    sampler: Literal["ddim"] = "ddim"
    schedule: Literal["native"] = "native"
    variance: Literal["small"] = "small"
    guided_channels: None = None
    learned_variance: Literal[False] = False
    distance: Literal[tuple(DISTANCES)] = "l2"
    huber_c: float = Field(0.00054, gt=0)
    steps: int = Field(1, ge=1)

    def build(self) -> "Consistency":
        """The system with its initial weights; teacher and codec are attached by the loader."""
        return Consistency(self)


class Pair(NamedTuple):
    """x at t [B] and its neighbour `near` at s [B], less noisy; the condition of both jumps; weight [B] or a number."""

    x: Tensor
    t: Tensor
    near: Tensor
    s: Tensor
    cond: Cond | None
    weight: Tensor | float = 1.0


class Consistency(Diffusion):
    """A Diffusion whose network ends the trajectory it is on in one step.

    Training adds the teacher (frozen, from its own checkpoint) and the target, a slow copy of the network that the far
    jump is compared with; a loaded model has neither.
    """

    denoises = False
    training_only = ("teacher", "target")

    def __init__(self, config: JumpConfig):
        super().__init__(config)
        self.teacher: nn.Module | None = None
        self.target: nn.Module | None = None
        if config.teacher is not None:
            self.external = self.external | {"teacher": config.teacher}
            if self.conditioner is not None:            # the teacher's words are the student's
                self.conditioner.requires_grad_(False)

    def admit(self, part: str, other: nn.Module) -> None:
        """ModelError when a teacher makes something else, or its trajectories are not on this path."""
        if part == "teacher":
            self.config.check_teacher(other.config)
            check_teacher(other, self.config)

    def phases(self) -> tuple[Phase, ...]:
        """The network; the target is made here, as training begins, of the weights that the network then has."""
        if self.config.distance == "lpips":         # a file that is not there is missed before anything is encoded
            lpips.opened(self.config.lpips, next(self.net.parameters()).device, "avg")
        if self.target is None and self.config.decay(0) is not None:
            self.target = copy.deepcopy(self.net).requires_grad_(False)
        conditioner = self.conditioner if self.config.teacher is None else None
        learns = conditioner is not None and any(True for _ in conditioner.parameters())
        trained = nn.ModuleDict({"net": self.net, "cond": conditioner}) if learns else self.net
        return (Phase("jump", trained, self.loss, after=self.follow),)

    @torch.no_grad()
    def follow(self, step: int) -> None:
        """After an update the target moves towards the network."""
        if self.target is not None:
            torch._foreach_lerp_(list(self.target.parameters()), list(self.net.parameters()),
                                 1 - self.config.decay(step))

    def loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """How far apart the jumps from two neighbours of one trajectory end; the less noisy one's is the target."""
        c = self.config
        with torch.no_grad():
            x0 = batch["latent"] if "latent" in batch else self.encode(batch["image"])
        drop = torch.rand(len(x0), generator=rng) < c.p_uncond
        cond = self._training_cond(batch, drop, rng)
        with torch.no_grad():
            pair = c.neighbours(self, x0, cond, rng, step)
        slow = self.net if self.target is None else self.target.train(self.net.training)

        def target() -> Tensor:
            with torch.no_grad():
                return c.jump(slow, pair.near, pair.s, pair.cond)
        here, there = replayed(lambda: c.jump(self.net, pair.x, pair.t, pair.cond), target, x0.device)
        far = (self.perceived(c.lpips, here, there, "avg") if c.distance == "lpips" else
               DISTANCES[c.distance](here, there, c.huber_c))
        return {"loss": (far * pair.weight).mean(), "distance": far.detach().mean()}

    def used_settings(self, request: SampleRequest) -> dict:
        """What a request's open settings become with this model."""
        used = {"steps": self.config.steps}
        if self._guides():
            used["guidance"] = self.config.guidance
        return {name: value for name, value in used.items() if getattr(request, name) is None}

    def _guides(self) -> bool:
        return bool(getattr(self.config.net, "guidance_dim", 0))

    def _check_steering(self, request: SampleRequest) -> None:
        """UsageError for what steers a sampler of many steps, InputError for a prompt that cannot be followed."""
        refuse(request, OPEN, "a consistency model jumps, there is nothing to set")
        if not self._guides() and request.guidance not in (None, 1):
            raise UsageError("this consistency model has not learned a guidance", hint="leave --guidance out")
        check_prompts(self, request)

    def _denoiser(self, request: SampleRequest, points: Grid, n: int, device: torch.device, **more):
        """jump(x, t), told the scale of guidance where the network has learned it; and each item's notes."""
        c, cond, notes = self.config, None, ()
        if self.conditioner is not None:
            cond, notes = self.conditioner.prompts([request.prompt] * n, device)
        if self._guides():
            scale = c.guidance if request.guidance is None else request.guidance
            cond = told(cond, torch.full((n,), scale - 1.0, device=device))
        prepared = self._cached(points, cond)

        def jump(x: Tensor, t: Tensor) -> Tensor:
            return c.jump(self.net, x, t, cond, prepared)
        return (clipped(jump) if c.clip else jump), notes

    def _solve(self, request: SampleRequest, denoise: Callable, run: Run, watch: Callable | None) -> Tensor:
        return multistep(denoise, run.start, run.grid, noise=run.noise, watch=watch,
                         floor=getattr(self.config.path, "sigma_min", 0.0))

    def _tail(self, points: Grid, strength: float) -> Grid:
        """All steps are spent on the share that is redone: a run of few steps has none to leave out."""
        if strength == 1:
            return points
        times = self.config.path.times(points.steps, strength=strength)
        return grid(self.config.path, times) if len(times) else tail(points, 0.0)


def told(cond: Cond | None, w: Tensor) -> Cond:
    """The condition with w [B] = guidance scale - 1, for the embedding."""
    return (cond or {}) | {"guidance": w}


def null_like(system: Consistency, cond: Cond | None, n: int, device: torch.device) -> Cond | None:
    """What the teacher is asked without a condition, in the shape of `cond`."""
    if system.conditioner is None:
        return cond
    return dropped(cond, system.conditioner.null(n, device), torch.ones(n, dtype=torch.bool, device=device))
