"""The shape that DDPM, DiT, Stable Diffusion, FLUX, PixArt and flow matching share: a network on a path."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, Literal, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.config import Config
from nexus.errors import InputError, ModelError, UsageError
from nexus.losses import lpips
from nexus.media import Media
from nexus.phase import Phase
from nexus.process import coupling, samplers
from nexus.process.codec import CodecConfig, decoded, encoded, unclipped
from nexus.process.concat import AnyConcat, training_picture
from nexus.process.likelihood import hybrid_vlb
from nexus.process.outpaint import sized
from nexus.process.paths import AnyPath, DiscretePath
from nexus.process.predictions import (
    masked,
    network_input,
    noised,
    paste,
    target,
    x0_of,
)
from nexus.process.schedules import Grid, grid, tail
from nexus.process.sources import read_known, read_noise
from nexus.process.steer import OWN_SCALES, Task, beside, cached, check_guide, check_steering, scale_of, steered
from nexus.requests import SampleRequest
from nexus.rng import ItemNoise
from nexus.text.conditioner import LabelCondConfig, NoCondConfig, TextCondConfig, dropped

DEFAULT_STRENGTH = 0.6


class DiffusionConfig(Config):
    """What every diffusion system is made of; each system narrows `net` and gives its own defaults.

    prediction: what the network outputs. learned_variance: it also outputs where the variance lies (iDDPM).
    p_uncond: share of training items whose condition is dropped. min_snr: caps the loss weight of clean times
    (Hang et al. 2023); 0 = off. pairing: how data and noise are matched in a batch. clip: x0 is kept in [-1, 1].
    steps, guidance, sampler, schedule: what sampling does unless the request says otherwise.
    size: side of what the network denoises, in its own pixels, where there is no codec.
    pools_words: whether the network also reads one vector for the whole caption of the small text encoder.
    guided_channels: guidance acts on the first so many channels only (DiT: 3); None = all.
    concat: a picture as condition (see concat.py): the network's in_channels are then 2 C + 1.
    """

    net: Any
    size: int = Field(32, ge=1)
    path: AnyPath = DiscretePath()
    prediction: Literal["eps", "x0", "v", "flow", "edm"] = "eps"
    conditioner: LabelCondConfig | TextCondConfig | NoCondConfig = Field(NoCondConfig(), discriminator="kind")
    codec: CodecConfig | None = None
    concat: AnyConcat | None = None
    learned_variance: bool = False
    variance: Literal["small", "large"] = "small"
    p_uncond: float = Field(0.1, ge=0, le=1)
    min_snr: float = Field(0.0, ge=0)
    pairing: Literal["none", "exact", "sinkhorn"] = "none"
    clip: bool = False
    steps: int = Field(50, ge=1)
    guidance: float = Field(1.0, ge=0)
    guided_channels: int | None = None
    sampler: Literal[tuple(samplers.SAMPLERS)] = "ddim"
    schedule: Literal["native", "linear", "karras", "exponential", "log-snr", "shifted"] = "native"
    pools_words: ClassVar[bool] = True

    @model_validator(mode="after")
    def _edm_on_its_path(self) -> Self:
        if self.prediction == "edm" and not getattr(self.path, "log_clock", 0):
            raise ValueError("prediction edm needs path.kind ve with a log_clock (EDM: 0.25)")
        return self

    @model_validator(mode="after")
    def _gives_what_it_denoises(self) -> Self:
        given, channels = getattr(self.net, "out_channels", None), self.latent_shape[0]
        if given == (1 if self.learned_variance else 2) * channels:
            raise ValueError(f"net.out_channels {given}: of {channels} channels a network gives {channels}, and "
                             f"{2 * channels} with learned_variance (which is {str(self.learned_variance).lower()})")
        return self

    @model_validator(mode="after")
    def _room_for_the_picture(self) -> Self:
        if self.concat:
            channels = self.latent_shape[0]
            if self.net.in_channels != 2 * channels + 1 or self.net.out_channels not in (channels, 2 * channels):
                raise ValueError(f"concat: a network of {channels} channels takes {2 * channels + 1} and gives "
                                 f"{channels} (twice that with a learned variance)")
        return self

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of what the network denoises."""
        return self.codec.net.latent_shape if self.codec else (self.image_channels, self.size, self.size)

    @property
    def image_size(self) -> int:
        """Side of the pictures it is trained on, in pixels."""
        return self.codec.net.size if self.codec else self.size

    @property
    def image_channels(self) -> int:
        """Colour channels of the pictures."""
        if self.codec:
            return self.codec.net.in_channels
        return (self.net.in_channels - 1) // 2 if self.concat else self.net.in_channels

    def adapt(self, facts: Any) -> Config:
        """A copy fitted to a data set: its class and style names, and the network's tables for them."""
        styles = tuple(s for s in facts.styles if s)
        conditioner = self.conditioner.adapt(facts.classes, styles)
        fitted = self.model_copy(update={"conditioner": conditioner})
        return fitted.model_copy(update={"net": fitted.net.model_copy(update=fitted.net_facts())})

    def net_facts(self) -> dict:
        """Fields of the network that follow from the conditioner."""
        c = self.conditioner
        if isinstance(c, LabelCondConfig) and c.classes:
            return {"num_classes": len(c.classes), "num_styles": len(c.styles), "null_class": True}
        if isinstance(c, TextCondConfig):
            return {"context_dim": c.encoder.dim} | ({"pooled_dim": c.encoder.dim} if self.pools_words else {})
        return {}

    def build(self) -> "Diffusion":
        """The system with its initial weights; an external codec is attached by the loader."""
        return Diffusion(self)


class Run(NamedTuple):
    """One call of generate: its items' noise, its grid, what is known of the result, a picture as condition."""

    noise: ItemNoise
    grid: Grid
    start: Tensor
    mask: Tensor | None
    known: Tensor | None
    pixels: tuple[Tensor, Tensor] | None
    concat: Tensor | None = None


class Diffusion(nn.Module):
    """A network on a path, between an optional codec and an optional conditioner."""

    denoises = True                     # step by step, so that pictures have a likelihood

    def __init__(self, config: DiffusionConfig):
        super().__init__()
        self.config = config
        self.net: nn.Module = config.net.build()
        self.conditioner = config.conditioner.build()
        self.codec = config.codec.build() if config.codec else None
        self.external = config.codec.external() if config.codec else {}

    def phases(self) -> tuple[Phase, ...]:
        """The network, together with a conditioner that has weights."""
        learns = self.conditioner is not None and any(True for _ in self.conditioner.parameters())
        trained = nn.ModuleDict({"net": self.net, "cond": self.conditioner}) if learns else self.net
        return (Phase("denoise", trained, self.loss),)

    def encode(self, x: Tensor) -> Tensor:
        """Pictures [B, C, H, W] in [-1, 1] -> what the network denoises."""
        return encoded(self.codec, x)

    def decode(self, z: Tensor) -> Tensor:
        """The inverse of `encode`, clipped to [-1, 1]."""
        return decoded(self.codec, z)

    def perceived(self, file: str, x: Tensor, y: Tensor, pooling: Literal["max", "avg"] = "max") -> Tensor:
        """The LPIPS distance [B] of what x and y [B, C, H, W] are as pictures, with the weights in a file."""
        net = lpips.opened(file, x.device, pooling)
        return net(*(lpips.enlarged(unclipped(self.codec, z)) for z in (x, y)))

    def loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """Mean squared error of the prediction; with a learned variance, iDDPM's hybrid loss."""
        c = self.config
        with torch.no_grad():
            x0 = batch["latent"] if "latent" in batch else self.encode(batch["image"])
        t = c.path.sample_t(len(x0), rng)
        eps = torch.randn(x0.shape, generator=rng).to(x0)
        if c.pairing != "none":
            eps = eps[coupling.pairing(x0, eps, method=c.pairing, rng=rng).to(eps.device)]
        drop = torch.rand(len(x0), generator=rng) < c.p_uncond
        x, t = noised(c.path, x0, eps, t), t.to(x0.device)
        seen = network_input(c.path, c.prediction, x, t)
        out = self.predicted(seen, c.path.network_time(t), self._training_cond(batch, drop, rng)).float()
        mean, fraction = (out.chunk(2, 1)) if c.learned_variance else (out, None)
        error = (mean - target(c.path, c.prediction, x0, eps, t)).square().flatten(1).mean(1)
        values = {"loss": (error * self._weight(t)).mean()}
        if c.learned_variance:
            vlb = hybrid_vlb(c.path, x0, t, x0_of(c.path, c.prediction, mean, x, t), (fraction + 1) / 2)
            values = {"loss": values["loss"] + vlb.mean(), "mse": values["loss"], "vlb": vlb.mean()}
        return values

    def predicted(self, x: Tensor, t: Tensor, cond: dict | None) -> Tensor:
        """What the loss compares with its target."""
        return self.net(x, t, cond)

    def _weight(self, t: Tensor) -> Tensor | float:
        """Min-SNR weights, expressed for the prediction at hand. Hang et al. 2023, section 3.4."""
        c = self.config
        if not c.min_snr:
            return 1.0
        alpha, sigma = c.path.at(t)
        snr = (alpha / sigma).square()
        capped = snr.clamp(max=c.min_snr)
        if c.prediction == "edm":                       # an error of F is one of x0 over c_out
            data = c.path.sigma_data ** 2
            return capped * data / (1 + data * snr)
        if c.prediction == "flow":                      # one of the velocity is one of x0 times the turning rate
            d_alpha, d_sigma = c.path.rates(t)
            return capped * (sigma / (d_sigma * alpha - d_alpha * sigma)).square()
        return {"x0": capped, "eps": capped / snr, "v": capped / (snr + 1)}[c.prediction]

    def _training_cond(self, batch: dict, drop: Tensor, rng: torch.Generator) -> dict | None:
        cond = None
        if self.conditioner is not None:
            cond = self.conditioner.training_cond(batch, rng)
            drop = drop.to(next(iter(cond.values())).device)
            cond = dropped(cond, self.conditioner.null(len(drop), drop.device), drop)
        if self.config.concat is None:
            return cond
        with torch.no_grad():
            return beside(cond, self.config.concat.training(training_picture(batch), self.encode, rng))

    def used_settings(self, request: SampleRequest) -> dict:
        """What a request's open settings become with this model."""
        c = self.config
        used = {"steps": c.steps, "sampler": c.sampler, "schedule": c.schedule}
        if self.conditioner is not None or request.guidance_kind in OWN_SCALES:
            used["guidance"] = scale_of(c, request)
        return {name: value for name, value in used.items() if getattr(request, name) is None}

    def check(self, request: SampleRequest) -> None:
        """InputError or UsageError for what this model cannot do, as far as that shows without weights."""
        c = self.config
        if request.prompt is not None and self.conditioner is None and request.guidance_kind != "classifier":
            raise InputError("this model is unconditional: it takes no prompt", hint="leave --prompt out")
        shape = self.run_shape(request)
        if c.concat is not None:
            c.concat.check(request, shape)
        self._points(request, shape)
        self._check_steering(request)
        if request.initial_noise is not None:
            read_noise(request, shape)

    def check_guide(self, request: SampleRequest, guide: nn.Module) -> None:
        """UsageError for a system that cannot guide this one as the request asks; see `check`."""
        check_guide(self, request, self._points(request, self.run_shape(request)), guide)

    def _check_steering(self, request: SampleRequest) -> None:
        check_steering(self, request)
        samplers.check_sampler(request.sampler or self.config.sampler, request.eta)

    @torch.no_grad()
    def generate(self, request: SampleRequest, *, seeds: list[int], watch: Callable[..., Any] | None = None,
                 guide: nn.Module | None = None) -> Media:
        """One picture a seed. Raises InputError or UsageError for what this model cannot do.

        guide: the loaded system that request.guide_model names.
        """
        self.check(request)
        device = next(self.net.parameters()).device
        run = self._prepare(request, seeds, device)
        if run.grid.steps == 0:
            return Media("image", self._finish(run.start, run))
        denoise, notes = self._denoiser(request, run.grid, len(seeds), device, guide=guide, concat=run.concat)
        if run.mask is not None:
            denoise = masked(denoise, run.mask, run.known)
        seen = None
        if watch is not None:
            def seen(i: int, x: Tensor, x0: Tensor) -> None:
                watch(i, run.grid.steps, x0, self.decode)
        return Media("image", self._finish(self._solve(request, denoise, run, seen), run), notes)

    def _solve(self, request: SampleRequest, denoise: Callable, run: Run, watch: Callable | None) -> Tensor:
        """From the run's start to x0."""
        c = self.config
        options = {"variance": c.variance} if (request.sampler or c.sampler) == "ddpm" else {}
        return samplers.sample(request.sampler or c.sampler, denoise, run.start, run.grid, eta=request.eta,
                               noise=run.noise, watch=watch, **options)

    def _prepare(self, request: SampleRequest, seeds: list[int], device: torch.device) -> Run:
        c = self.config
        shape = self.run_shape(request)
        noise = ItemNoise(seeds)
        drawn = noise.draw(shape) if request.initial_noise is None else read_noise(request, shape, len(seeds))
        drawn = drawn.to(device)
        points = self._points(request, shape)
        concat, known = (None, read_known(request, shape, c, device)) if c.concat is None else \
            c.concat.given(request, shape, self, noise, len(seeds), device)
        if known is None or not self._redoes(request):
            first = float(points.sigma[0])
            scale = c.path.start(first) if isinstance(c.path, DiscretePath) else first
            return Run(noise, points, scale * drawn, None, None, known and (known.mask, known.picture), concat)
        x0 = self.encode(known.picture)
        start = self._start(points, x0, drawn, known.mask is not None)
        if known.mask is None or concat is not None:        # a network that sees the mask needs no help at each step
            pixels = None if known.mask is None else (known.mask, known.picture)
            return Run(noise, points, start, None, None, pixels, concat)
        small = F.adaptive_max_pool2d(known.mask.float(), shape[1:]).bool()
        return Run(noise, points, start, small, x0.expand_as(drawn), (known.mask, known.picture))

    def _redoes(self, request: SampleRequest) -> bool:
        """Whether a run begins at the request's picture, noised, and not at noise alone."""
        return request.image is not None and (self.config.concat is None or request.strength not in (None, 1))

    def _points(self, request: SampleRequest, shape: tuple[int, int, int]) -> Grid:
        """The levels of noise of a run, of its end alone where it begins at a picture. UsageError for too few steps."""
        c = self.config
        steps, schedule = request.steps or c.steps, request.schedule or c.schedule
        short = getattr(c.path, "ends_at_first", False) and (request.sampler or c.sampler) in samplers.ENDS_AT_FIRST
        points = grid(c.path, c.path.times(steps, schedule=schedule, shape=shape), to_data=not short)
        if not self._redoes(request):
            return points
        holed = request.mask is not None or request.outpaint is not None
        usual = 1.0 if holed else DEFAULT_STRENGTH                  # a hole is filled from pure noise
        strength = usual if request.strength is None else request.strength
        points = self._tail(points, strength)
        if strength > 0 and points.steps == 0:
            raise UsageError(f"--strength {strength:g} of {steps} steps is less than one step: nothing would change",
                             hint=f"--steps {math.ceil(1 / strength)} or more, or a greater --strength"
                             if strength > 1e-5 else "a greater --strength")
        return points

    def _start(self, points: Grid, x0: Tensor, drawn: Tensor, masked: bool) -> Tensor:
        """Where a run [N, C, H, W] begins that changes a picture x0 [1, C, H, W]; masked: or a part of it."""
        if points.steps == 0:
            return x0.expand_as(drawn)
        return float(points.alpha[0]) * x0 + float(points.sigma[0]) * drawn

    def _tail(self, points: Grid, strength: float) -> Grid:
        """The part of a run that starts from a picture."""
        return tail(points, strength)

    def _finish(self, x: Tensor, run: Run) -> Tensor:
        """Latents -> pictures; outside an inpainting mask the user's own pixels."""
        if run.mask is not None:
            x = paste(x, run.mask, run.known)
        shown = self.decode(x)
        return shown if run.pixels is None else paste(shown, *run.pixels)

    def run_shape(self, request: SampleRequest) -> tuple[int, int, int]:
        """The latent shape of the asked-for size; UsageError when the codec or network cannot make it."""
        channels, rows, cols = self.config.latent_shape
        factor = self.config.codec.net.factor if self.config.codec else 1
        multiple = factor * self.config.net.multiple
        if request.outpaint is not None:
            request = sized(request, multiple)
        for name, side in (("width", request.width), ("height", request.height)):
            if side is not None and side % multiple:
                near = max(multiple, round(side / multiple) * multiple)
                raise UsageError(f"{name} {side}: this model makes multiples of {multiple}", hint=f"for example {near}")
        return channels, (request.height or rows * factor) // factor, (request.width or cols * factor) // factor

    def _denoiser(self, request: SampleRequest, points: Grid, n: int, device: torch.device, **more):
        """denoise(x, t) with guidance, and each item's notes; more: the guide and the picture of a `steer.Task`."""
        return steered(Task(self, request, points, n, device, **more))

    def _cached(self, points: Grid, cond: dict | None) -> dict | None:
        """What the network can compute once for all steps of the run."""
        return cached(self, points, cond)


def check_teacher(system: Any, student: DiffusionConfig) -> None:
    """ModelError when what a teacher makes is not what its student denoises."""
    if not isinstance(system, Diffusion):
        raise ModelError(f"the teacher {student.teacher} is no diffusion or flow model",
                         hint="a system such as flow, rectified-flow, dit or ddpm")
    its = system.config
    if its.latent_shape != student.latent_shape:
        raise ModelError(f"the teacher makes {its.latent_shape}, this model {student.latent_shape}",
                         hint="choose another teacher, or its size and codec")
    names = getattr(its.conditioner, "classes", None)
    if names and names != getattr(student.conditioner, "classes", None):
        raise ModelError("the teacher has other classes than the data set", hint="use the set it was trained on")
