"""Latent consistency models: guided latent diffusion in one to eight steps. Luo et al. 2023, arXiv:2310.04378.

f(z, w, c, t) = c_skip(t) z + c_out(t) z0_hat(z, w, c, t): the scale of guidance w is an input of the network, learned
from a teacher that is guided by w while it solves the probability-flow ODE.
"""

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from nexus.codecs.kl_image import KLConfig
from nexus.config import not_above
from nexus.errors import ModelError, UsageError
from nexus.models.diffusion.unet import UNetConfig
from nexus.process import consistency as cm
from nexus.process.codec import SHARED_CODEC
from nexus.process.guidance import combine
from nexus.process.jump import Consistency, JumpConfig, Pair, null_like, told
from nexus.process.paths import DiscretePath
from nexus.process.predictions import denoiser, noised, over, x0_of
from nexus.text.conditioner import Cond, LabelCondConfig, NoCondConfig, TextCondConfig
from nexus.text.pretrained import PretrainedCondConfig


class SkippingPath(DiscretePath):
    """The teacher's chain, of which training and sampling see every (steps / points)-th index, the last among them."""

    points: int = Field(50, ge=1)

    _coarser = not_above("points", "steps")

    @property
    def skip(self) -> int:
        """k: indices between two points of the solver's grid."""
        return self.steps // self.points

    def times(self, steps: int, *, schedule: str = "native", shape=None, strength: float = 1.0) -> Tensor:
        """Indices of a run, spread over the grid's cleanest `strength`; UsageError for a schedule, or too many steps.

        A run that has fewer points left than steps visits every one.
        """
        if schedule != "native":
            raise UsageError("a latent consistency model visits the times it was trained at",
                             hint="leave --schedule out")
        if steps > self.points:
            raise UsageError(f"{steps} steps, but this model was trained at {self.points} times",
                             hint=f"use --steps {self.points} or fewer")
        left = int(self.points * strength)
        count = min(steps, left)
        chosen = torch.arange(count) * left // max(count, 1)
        return (left - chosen).double() * self.skip - 1


class LCMConfig(JumpConfig):
    """A student of the latent diffusion model `teacher`, whose path, prediction, codec and conditioner it shares.

    w_min, w_max: the guidance (scale - 1) drawn in training. mu: how much of itself the target keeps a step.
    scaling: of time in c_skip and c_out.
    """

    net: UNetConfig = UNetConfig.preset("lcm")
    path: SkippingPath = SkippingPath(beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012)
    conditioner: TextCondConfig | LabelCondConfig | PretrainedCondConfig | NoCondConfig = Field(
        NoCondConfig(), discriminator="kind")
    prediction: Literal["eps", "x0", "v"] = "eps"
    p_uncond: float = Field(0.0, ge=0, le=1)
    w_min: float = Field(2.0, ge=0)
    w_max: float = Field(14.0, ge=0)
    mu: float = Field(0.95, ge=0, lt=1)
    scaling: float = Field(10.0, gt=0)
    distance: Literal[tuple(cm.DISTANCES)] = "huber"
    huber_c: float = Field(0.001, gt=0)
    steps: int = Field(4, ge=1)
    guidance: float = Field(8.0, ge=0)

    _ordered = not_above("w_min", "w_max")

    def build(self) -> Consistency:
        """The system; its guidance embedding starts silent, so that a student begins as its teacher."""
        built = Consistency(self)
        if built.net.guidance is not None:
            torch.nn.init.zeros_(built.net.guidance.weight)
        return built

    def decay(self, step: int) -> float | None:
        """mu; None with mu = 0, where the target is the network itself."""
        return self.mu or None

    def jump(self, net, x: Tensor, t: Tensor, cond: Cond | None = None, prepared: dict | None = None) -> Tensor:
        """f(x, w, c, t), w being cond["guidance"]."""
        clock = t.to(x.device, torch.float32).expand(len(x))
        out = net(x, clock, cond, prepared).to(x.dtype)
        c_skip, c_out = cm.discrete_boundary(t.double(), self.scaling)
        if t.ndim:
            c_skip, c_out = over(c_skip, x).to(x), over(c_out, x).to(x)
        return c_skip * x + c_out * x0_of(self.path, self.prediction, out, x, t)

    def neighbours(self, system: Consistency, x0: Tensor, cond: Cond | None, rng: torch.Generator, step: int) -> Pair:
        """A point of the grid, and where one DDIM step over k indices leads under guidance w. Algorithm 1."""
        n, k, device = len(x0), self.path.skip, x0.device
        index = (torch.randint(self.path.points, (n,), generator=rng) + 1) * k - 1
        w = (self.w_min + (self.w_max - self.w_min) * torch.rand(n, generator=rng)).to(device)
        eps = torch.randn(x0.shape, generator=rng).to(x0)
        t, s = index.double().to(device), (index - k).clamp(min=0).double().to(device)
        x, end = noised(self.path, x0, eps, t).to(x0), x0
        if system.teacher is not None:
            null = null_like(system, cond, n, device)
            alone, other = (denoiser(system.teacher, self.path, self.prediction, c)(x, t) for c in (cond, null))
            end = combine(alone, other, over(1 + w, x))
        return Pair(x, t, cm.ddim_step(self.path, end, x, t, s), s, told(cond, w))

    def check_teacher(self, other: Any) -> None:
        """ModelError for a teacher on another chain, of another prediction or with other words."""
        path = getattr(other, "path", None)
        chain = isinstance(path, DiscretePath) and torch.equal(path.alpha_bar(), self.path.alpha_bar())
        if not chain or other.prediction != self.prediction or other.learned_variance:
            raise ModelError(f"teacher {self.teacher} does not predict {self.prediction} on this student's chain",
                             hint="give the student the teacher's path and prediction")
        if other.conditioner != self.conditioner:
            raise ModelError(f"teacher {self.teacher} reads its prompts otherwise than this student",
                             hint="give the student the teacher's conditioner and the data it was trained on")

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": UNetConfig.presets["tiny-words"] | {"guidance_dim": 16}, "size": 16,
                 "conditioner": TextCondConfig.presets["tiny"]},
        "emoji": {"net": UNetConfig.presets["emoji"] | {"guidance_dim": 256}, "codec": SHARED_CODEC,
                  "prediction": "v", "teacher": "conditional", "conditioner": TextCondConfig.presets["emoji"],
                  "path": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}, "w_min": 0.0,
                  "w_max": 7.0, "guidance": 3.0},
        "dreamshaper-v7": {"size": 96, "codec": {"net": KLConfig.presets["sd-f8"] | {"size": 768}},
                           "conditioner": {"kind": "pretrained", "recipe": "sd"}},
    }
    default_preset: ClassVar[str] = "emoji"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "emoji": {"steps": 4000, "batch_size": 32, "lr": 2e-4, "warmup": 100, "precision": "auto", "ema": 0.99,
                  "save_every": 250, "cache_latents": True, "betas": (0.9, 0.99)},
    }
