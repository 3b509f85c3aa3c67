"""Rectified flow: straight lines from noise to data, straightened again by reflow, one step by distillation.

Liu et al. 2022, arXiv:2209.03003; with Stable Diffusion's network and words (InstaFlow): Liu et al. 2023,
arXiv:2309.06380; logit-normal times: Esser et al. 2024, arXiv:2403.03206.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from nexus.codecs.kl_image import KLConfig
from nexus.errors import InputError
from nexus.losses import lpips
from nexus.losses.perceptual import edge_distance
from nexus.models.diffusion.dit import DiTConfig, DiTNetConfig
from nexus.models.diffusion.dit_llama import LlamaDiTConfig
from nexus.models.diffusion.ncsnpp import NCSNppConfig
from nexus.models.diffusion.unet import UNetConfig
from nexus.process import coupling, pairs, rectified, samplers
from nexus.process.codec import SHARED_CODEC
from nexus.process.diffusion import Diffusion, DiffusionConfig, Run, check_teacher
from nexus.process.paths import DiscretePath, RectifiedPath
from nexus.process.predictions import noised, over, target
from nexus.process.rectified import InstaFlowPath, StraightPath
from nexus.process.schedules import Grid, grid
from nexus.process.taught import taught
from nexus.requests import SampleRequest
from nexus.rng import ItemNoise, derive, generator
from nexus.text.conditioner import LabelCondConfig, NoCondConfig, TextCondConfig
from nexus.text.pretrained import PretrainedCondConfig

SEEN = 8                # times that training looks at each pair, at least: a short one needs fewer pairs
TOGETHER = 64           # pairs made at once; fixed, so that the same pairs have the same bytes
WATCHED = 8             # paths that a training step measures straightness on
MEASURED = 64           # paths that `nexus eval` measures it on

_EMOJI = {"net": DiTNetConfig.presets["emoji-small"], "codec": SHARED_CODEC, "steps": 20, "sampler": "euler",
          "guidance": 3.0, "conditioner": LabelCondConfig.presets["emoji"]}
# Guidance is in the pairs already; a student that is guided again overshoots.
_TAUGHT = {"teacher": "flow", "pairs": 8192, "pair_sampler": "midpoint", "pair_steps": 16, "guidance": 1.0}


class RectifiedFlowConfig(DiffusionConfig):
    """A network that outputs velocity on straight lines; one config for its three stages.

    stage: "flow" trains on pictures; "reflow" on pairs (noise, what `teacher` makes of it); "distil" on such pairs at
    the k times of a k-step Euler run only (k = 1: pure noise). teacher: a model; a student starts as it.
    pairs: how many are made, in the run folder, before the first step; or a folder that holds some.
    pair_sampler, pair_steps, pair_guidance: how the teacher makes them (None = its own guidance).
    distance: "l2" or "l1" of velocities; "edges" adds to l2 the edge distance of the one-step results; "lpips" is that
    of these results alone, as the paper distils, with the weights in the file `lpips`.
    tolerance: dopri5's, relative and absolute. spread: the sampler "euler" adds noise of (1 - s) spread (0 = none).
    edit: how `--image` starts: "invert" runs the flow backwards from it, "noise" mixes it with noise (SDEdit).
    straightness_every: S is logged at the steps that are multiples of this; 0 = never.
    """

    net: DiTNetConfig | NCSNppConfig | LlamaDiTConfig | UNetConfig = NCSNppConfig()
    path: Annotated[StraightPath | InstaFlowPath | RectifiedPath, Field(discriminator="kind")] = StraightPath()
    prediction: Literal["flow"] = "flow"
    conditioner: LabelCondConfig | TextCondConfig | PretrainedCondConfig | NoCondConfig = Field(
        NoCondConfig(), discriminator="kind")
    concat: None = None                 # not every network here takes a picture as condition
    pools_words: ClassVar[bool] = False
    steps: int = Field(100, ge=1)
    sampler: str = "dopri5"
    stage: Literal["flow", "reflow", "distil"] = "flow"
    teacher: str | None = None
    pairs: Annotated[int, Field(ge=1)] | str = 10_000
    pair_sampler: Literal["euler", "heun", "midpoint", "rk4", "dopri5", "ddim", "dpmpp-2m", "unipc"] = "dopri5"
    pair_steps: int = Field(100, ge=1)
    pair_guidance: float | None = Field(None, ge=0)
    k: int = Field(1, ge=1)
    distance: Literal["l2", "l1", "edges", "lpips"] = "l2"
    lpips: str = ""
    tolerance: float = Field(1e-5, gt=0, lt=1)
    spread: float = Field(0.0, ge=0)
    edit: Literal["invert", "noise"] = "invert"
    straightness_every: int = Field(100, ge=0)

    @model_validator(mode="after")
    def _has_pairs(self) -> Self:
        if self.stage != "flow" and not self.teacher and isinstance(self.pairs, int):
            raise ValueError(f"stage {self.stage} needs a teacher, or pairs=FOLDER")
        if self.distance == "lpips" and not self.lpips:
            raise ValueError(lpips.NEEDED)
        if self.spread and self.path.kind != "straight":
            raise ValueError("spread needs path.kind straight")
        return self

    @property
    def makes_pairs(self) -> bool:
        """Whether training begins with making pairs."""
        return self.stage != "flow" and isinstance(self.pairs, int)

    def build(self) -> "RectifiedFlow":
        """The system with its initial weights; codec and teacher are attached by the loader."""
        return RectifiedFlow(self)

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": NCSNppConfig.presets["tiny"], "size": 16, "steps": 4, "sampler": "euler", "guidance": 2.0,
                 "conditioner": {"kind": "label"}},
        "tiny-instaflow": {"net": UNetConfig.presets["tiny-sd"], "path": {"kind": "instaflow"}, "steps": 2,
                           "sampler": "euler", "codec": {"net": KLConfig.presets["tiny"]},
                           "conditioner": TextCondConfig.presets["tiny"]},
        "emoji": _EMOJI,
        "reflow": _EMOJI | _TAUGHT | {"stage": "reflow", "steps": 8},
        "distil": _EMOJI | _TAUGHT | {"stage": "distil", "steps": 1, "distance": "edges"},
        "cifar10": {"net": NCSNppConfig.presets["cifar10"]},
        "celeba-256": {"net": NCSNppConfig.presets["ncsnpp-256"], "size": 256},
        "instaflow": {"net": UNetConfig.presets["sd15"], "path": {"kind": "instaflow"}, "steps": 1, "sampler": "euler",
                      "guidance": 1.0, "codec": {"net": KLConfig.presets["sd-f8"]},
                      "conditioner": {"kind": "pretrained", "recipe": "sd",
                                      "encoders": ["openai/clip-vit-large-patch14"]}},
        "mnist": {"net": LlamaDiTConfig.presets["mnist"], "steps": 50, "sampler": "euler", "guidance": 2.0,
                  "path": {"kind": "rectified", "time_scale": 1.0, "time_sampling": "logit-normal"},
                  "conditioner": {"kind": "label"}},
    }
    default_preset: ClassVar[str] = "emoji"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "tiny-instaflow": {"steps": 20, "batch_size": 4},
        "emoji": DiTConfig.recipes["emoji"] | {"steps": 10_000},    # the same network on the same latents
        "reflow": DiTConfig.recipes["emoji"] | {"steps": 4_000, "cache_latents": False},
        "distil": DiTConfig.recipes["emoji"] | {"steps": 4_000, "cache_latents": False},
        "cifar10": {"steps": 800_000, "batch_size": 128, "optimizer": "adam", "lr": 2e-4, "warmup": 5000, "flip": 0.5,
                    "ema": 0.999999, "save_every": 10_000},
        "mnist": {"steps": 20_000, "batch_size": 256, "optimizer": "adam", "lr": 5e-4},
    }


class RectifiedFlow(Diffusion):
    """A velocity network with the three stages of training, inversion, and straightness."""

    training_only = ("teacher",)
    config: RectifiedFlowConfig

    def __init__(self, config: RectifiedFlowConfig):
        super().__init__(config)
        self.external |= {"teacher": config.teacher} if config.makes_pairs else {}
        self._source: tuple[Diffusion, ...] = ()

    def admit(self, part: str, system: Any) -> None:
        """Keep the teacher's system; ModelError when what it makes is not what this one denoises."""
        if part != "teacher":
            return
        check_teacher(system, self.config)
        self._source = (system,)        # in a tuple: its network is the submodule `teacher`, the rest has no weights

    # --- data -------------------------------------------------------------------------------------------------------

    def prepare_data(self, images: Any, run: Path, *, seed: int, draws: int | None = None,
                     part: tuple[int, int] = (0, 1),
                     watch: Callable[[int, int], Any] = lambda done, total: None) -> Callable[[], Any] | None:
        """Make this process's part of the pairs of reflow and distil; -> what opens them all once every part is there.

        None: train on the pictures themselves. A killed making goes on; the bytes depend on the seed, the teacher and
        the settings, not on the kill. draws: how often training will look at a pair; a short one gets whole shards for
        SEEN looks each.
        """
        c = self.config
        if c.distance == "lpips":           # before the pairs, which take long, are made for nothing
            lpips.opened(c.lpips, next(self.net.parameters()).device)
        if c.stage == "flow":
            return None
        if not c.makes_pairs:
            return partial(self._open_folder, Path(c.pairs), images)
        net = self._source[0].net
        facts = {"teacher": pairs.fingerprint(net), "seed": seed, "sampler": c.pair_sampler, "steps": c.pair_steps,
                 "guidance": self._pair_guidance(), "tolerance": c.tolerance, "shape": list(c.latent_shape),
                 "data": images.facts.digest}

        def make(numbers: list[int]) -> dict[str, Tensor]:
            parts = [self._made(numbers[i:i + TOGETHER], images, seed) for i in range(0, len(numbers), TOGETHER)]
            return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        enough = c.pairs if draws is None else math.ceil(draws / (SEEN * pairs.SHARD)) * pairs.SHARD
        pairs.write_pairs(run / "pairs", min(c.pairs, enough), make, facts, part=part, watch=watch)
        return partial(pairs.PairSet, run / "pairs", images)

    def _open_folder(self, folder: Path, images: Any) -> pairs.PairSet:
        """Pairs that another run made; InputError when they are not for this model and data set."""
        opened = pairs.PairSet(folder, images)
        wanted = {"shape": list(self.config.latent_shape)}
        wanted |= {} if self.conditioner is None else {"data": images.facts.digest}     # whose labels the pairs have
        if wrong := [name for name, value in wanted.items() if opened.facts.get(name) != value]:
            raise InputError(f"the pairs in {folder} are of another {wrong[0]}",
                             hint="use the data set and the size that they were made for")
        return opened

    def _pair_guidance(self) -> float:
        teacher = self._source[0]
        if teacher.conditioner is None:
            return 1.0
        return teacher.config.guidance if self.config.pair_guidance is None else self.config.pair_guidance

    @torch.no_grad()
    def _made(self, numbers: list[int], images: Any, seed: int) -> dict[str, Tensor]:
        """Pairs by number: noise of a seed of its own, and the labels of a picture in turn."""
        noise = ItemNoise([derive(seed, "pairs", i) for i in numbers]).draw(self.config.latent_shape)
        index = [i % len(images) for i in numbers]
        made = self.couple(noise, images.labels_of(index))
        return {"noise": noise, "latent": made.float(), "index": torch.tensor(index)}

    @torch.no_grad()
    def couple(self, noise: Tensor, batch: dict) -> Tensor:
        """What the teacher makes of noise [B, C, H, W] with a batch's labels, on the teacher's device."""
        c, teacher = self.config, self._source[0]
        its, device = teacher.config, next(teacher.net.parameters()).device
        denoise = taught(teacher, batch, self._pair_guidance(), generator(0, "pairs"))
        points = grid(its.path, its.path.times(c.pair_steps, schedule=its.schedule, shape=c.latent_shape))
        size = 1.0 if isinstance(its.path, DiscretePath) else float(points.sigma[0])   # as `generate` starts
        options = {"rtol": c.tolerance, "atol": c.tolerance} if c.pair_sampler == "dopri5" else {}
        return samplers.sample(c.pair_sampler, denoise, size * noise.to(device), points, **options)

    # --- training ---------------------------------------------------------------------------------------------------

    def loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """The distance of the network's velocity from the straight line's. Liu et al. 2022, eq. 1."""
        c = self.config
        with torch.no_grad():
            x1 = batch["latent"] if "latent" in batch else self.encode(batch["image"])
        z0 = batch["noise"] if "noise" in batch else torch.randn(x1.shape, generator=rng).to(x1)
        if c.pairing != "none" and "noise" not in batch:
            z0 = z0[coupling.pairing(x1, z0, method=c.pairing, rng=rng).to(z0.device)]
        t = self._times(len(x1), rng)
        drop = torch.rand(len(x1), generator=rng) < c.p_uncond
        cond = self._training_cond(batch, drop, rng)
        state = c.path.trained_at(t) if c.path.kind == "straight" else t
        x, t, state = noised(c.path, x1, z0, state), t.to(x1.device), state.to(x1.device)
        out = self.net(x, c.path.network_time(t), cond).float()
        off = out - target(c.path, "flow", x1, z0, t)
        error = off.abs() if c.distance == "l1" else off.square()
        values = {"loss": (error.flatten(1).mean(1) * self._weight(t)).mean()}
        def jumped() -> Tensor:
            return x1 + over(state, off) * off                          # one step from x misses x1 by state x off
        if c.distance == "edges":
            edges = edge_distance(jumped(), x1)
            values = {"loss": values["loss"] + edges, "l2": values["loss"], "edges": edges}
        if c.distance == "lpips":
            values = {"loss": self.perceived(c.lpips, jumped(), x1).mean(), "l2": values["loss"].detach()}
        if c.straightness_every and (step + 1) % c.straightness_every == 0:
            values["straightness"] = self._measured(cond, torch.randn(x1[:WATCHED].shape, generator=rng).to(x1)).mean()
        return values

    def _times(self, n: int, rng: torch.Generator) -> Tensor:
        """Times [n] that are trained at: the path's, or those of a k-step run."""
        c = self.config
        if c.stage == "distil":
            return 1 - torch.randint(c.k, (n,), generator=rng) / c.k
        return c.path.sample_t(n, rng)

    # --- the flow ---------------------------------------------------------------------------------------------------

    def velocity(self, cond: dict | None = None) -> rectified.Velocity:
        """velocity(x [B, C, H, W], t []) -> dx/ds towards the data, with the network as it is."""
        path, weight = self.config.path, next(self.net.parameters())

        def velocity(x: Tensor, t: Tensor) -> Tensor:
            clock = path.network_time(t).to(x.device, torch.float32).expand(len(x))
            return float(path.rates(t)[0]) * self.net(x.to(weight.dtype), clock, cond).to(x.dtype)
        return velocity

    @torch.no_grad()
    def invert(self, x1: Tensor, cond: dict | None = None, *, until: float = 1.0, steps: int = 50) -> Tensor:
        """The noise of data x1 [B, C, H, W] (latents, see `encode`), by the flow backwards with Heun's rule.

        cond: None = the null condition. until: where to stop, in shares of the way to the noise.
        """
        if cond is None and self.conditioner is not None:
            cond = self.conditioner.null(len(x1), x1.device)
        return rectified.invert(self.velocity(cond), x1.float(), until=until, steps=steps)

    @torch.no_grad()
    def _measured(self, cond: dict | None, z0: Tensor) -> Tensor:
        """S [B] of paths from z0, without dropout."""
        training = self.net.training
        self.net.eval()
        try:
            first = None if cond is None else {name: value[:len(z0)] for name, value in cond.items()}
            return rectified.straightness(self.velocity(first), z0)
        finally:
            self.net.train(training)

    def measures(self, seed: int) -> dict[str, float]:
        """What `nexus eval` adds for this system: S over paths from noise without a prompt."""
        device = next(self.net.parameters()).device
        z0 = ItemNoise([derive(seed, "straightness", i) for i in range(MEASURED)]).draw(self.config.latent_shape)
        cond = None if self.conditioner is None else self.conditioner.null(MEASURED, device)
        return {"straightness": float(self._measured(cond, z0.to(device)).mean())}

    # --- sampling ---------------------------------------------------------------------------------------------------

    def _start(self, points: Grid, x0: Tensor, drawn: Tensor, masked: bool) -> Tensor:
        """A picture to change is carried back along the flow, not mixed with noise, unless `edit` says so."""
        if masked or points.steps == 0 or self.config.edit == "noise":
            return super()._start(points, x0, drawn, masked)
        return self.invert(x0, until=float(points.t[0]), steps=points.steps).expand_as(drawn)

    def _solve(self, request: SampleRequest, denoise: Callable, run: Run, watch: Callable | None) -> Tensor:
        c, name = self.config, request.sampler or self.config.sampler
        if name == "dopri5":
            return samplers.sample(name, denoise, run.start, run.grid, eta=request.eta, watch=watch,
                                   rtol=c.tolerance, atol=c.tolerance)
        if name == "euler" and c.spread:
            return rectified.euler_sde(denoise, run.start, run.grid, spread=c.spread, noise=run.noise, watch=watch)
        return super()._solve(request, denoise, run, watch)
