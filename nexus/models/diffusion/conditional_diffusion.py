"""Conditional diffusion: a UNet steered by text, labels or pictures. Dhariwal & Nichol 2021; Ho & Salimans 2022.

With a network of kind "classifier" the same system is the classifier of noisy pictures that guides another model.
B = batch, C = channels, E = width of the embedding, K = classes, L = pixels.
"""

from typing import ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.config import Config
from nexus.errors import InputError
from nexus.media import Media
from nexus.models.diffusion.unet import EMOJI_RECIPE, UNetConfig
from nexus.nn.attention import attend, merge_heads, split_heads
from nexus.nn.embed import TimestepMLP
from nexus.nn.resnet import ResBlock, SelfAttention2d
from nexus.phase import Phase
from nexus.process.codec import SHARED_CODEC, SHARED_LATENTS
from nexus.process.diffusion import Diffusion, DiffusionConfig
from nexus.process.paths import AnyPath, DiscretePath
from nexus.process.predictions import noised
from nexus.requests import SampleRequest
from nexus.text.conditioner import LabelCondConfig, NoCondConfig, TextCondConfig

_EDM = {"path": {"kind": "ve", "log_clock": 250.0}, "prediction": "edm", "sampler": "heun"}


class ClassifierNetConfig(Config):
    """ADM's encoder: the downward half of a UNet, pooled by attention. The defaults are its ImageNet-64 classifier."""

    kind: Literal["classifier"]
    in_channels: int = Field(3, gt=0)
    channels: int = Field(128, gt=0, description="base width")
    mult: tuple[int | float, ...] = Field((1, 2, 3, 4), min_length=1)
    blocks: int = Field(4, gt=0, description="residual blocks of a level")
    attention: tuple[int, ...] = Field((1, 2, 3), description="levels with attention, 0 = full resolution")
    head_dim: int = Field(64, gt=0)
    groups: int = Field(32, gt=0)
    num_classes: int = Field(1000, ge=0)
    size: int = Field(0, ge=0, description="side of x, whose places the pooling then knows; 0 = any, without places")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.size % self.multiple:
            raise ValueError(f"size {self.size}: not a multiple of {self.multiple}, by which {len(self.mult)} levels "
                             "shrink it")
        return self

    @property
    def widths(self) -> tuple[int, ...]:
        """Channels of the levels."""
        return tuple(round(m * self.channels) for m in self.mult)

    @property
    def multiple(self) -> int:
        """The sides of x are multiples of this."""
        return 2 ** (len(self.mult) - 1)

    def build(self) -> "ClassifierNet":
        """The network with its initial weights."""
        return ClassifierNet(self)


class ClassifierNet(nn.Module):
    """x [B, C, H, W] at times t [B] -> logits of the classes [B, K]; with `size` H = W = size (ADM)."""

    def __init__(self, config: ClassifierNetConfig):
        super().__init__()
        self.config, c = config, config
        widths, emb = c.widths, 4 * c.channels
        shared = {"emb": emb, "groups": c.groups, "scale_shift": True, "zero_last": True}
        self.head_dim = c.head_dim
        self.time = TimestepMLP(c.channels, emb)
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, 1, 1)
        self.body, here = nn.ModuleList(), widths[0]
        for level, width in enumerate(widths):
            for _ in range(c.blocks):
                self.body.append(ResBlock(here, width, **shared))
                here = width
                if level in c.attention:
                    self.body.append(self._attention(width))
            if level + 1 < len(widths):
                self.body.append(ResBlock(width, width, resample="down", **shared))
        self.body.extend([ResBlock(here, here, **shared), self._attention(here), ResBlock(here, here, **shared)])
        self.norm_out = nn.GroupNorm(c.groups, here)
        places = (c.size // c.multiple) ** 2 + 1
        self.positions = nn.Parameter(torch.randn(here, places) / here**0.5) if c.size else None
        self.qkv = nn.Linear(here, 3 * here)
        self.out = nn.Linear(here, c.num_classes)

    def _attention(self, width: int) -> SelfAttention2d:
        return SelfAttention2d(width, width // self.head_dim, groups=self.config.groups, zero_last=True)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        emb = self.time(t)
        h = self.conv_in(x.to(self.conv_in.weight.dtype))
        for module in self.body:
            h = module(h, emb) if isinstance(module, ResBlock) else module(h)
        tokens = F.silu(self.norm_out(h)).flatten(2).transpose(1, 2)
        tokens = torch.cat([tokens.mean(1, keepdim=True), tokens], 1)       # the mean asks, as in CLIP's pooling
        if self.positions is not None:
            tokens = tokens + self.positions.T
        q, k, v = (split_heads(p, p.shape[-1] // self.head_dim) for p in self.qkv(tokens).chunk(3, -1))
        return self.out(merge_heads(attend(q[:, :, :1], k, v))[:, 0])


class Classifier(nn.Module):
    """log p(class | x_t) on a path, learned from noised pictures, by which other models are guided."""

    encode = Diffusion.encode           # the latents of the model it guides

    def __init__(self, config: "ConditionalConfig"):
        super().__init__()
        self.config = config
        self.net: nn.Module = config.net.build()
        self.conditioner = config.conditioner.build()
        self.codec = config.codec.build() if config.codec else None
        self.external = config.codec.external() if config.codec else {}

    def phases(self) -> tuple[Phase, ...]:
        """The network."""
        return (Phase("classify", self.net, self.loss),)

    def loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """Cross-entropy of the label at a random time, and the accuracy."""
        path = self.config.path
        with torch.no_grad():
            x0 = batch["latent"] if "latent" in batch else self.encode(batch["image"])
        t = path.sample_t(len(x0), rng)
        x = noised(path, x0, torch.randn(x0.shape, generator=rng).to(x0), t)
        logits = self.net(x, path.network_time(t.to(x.device))).float()
        right = (logits.argmax(1) == batch["label"]).float().mean()
        return {"loss": F.cross_entropy(logits, batch["label"]), "accuracy": right}

    def log_prob(self, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """log p(label | x, t) [B] for x [B, C, H, W], t [] or [B], label [B]; differentiable in x."""
        clock = self.config.path.network_time(t).to(x.device, torch.float32).expand(len(x))
        return self.net(x, clock).float().log_softmax(1).gather(1, label[:, None])[:, 0]

    def check(self, request: SampleRequest) -> None:
        """A classifier makes nothing: InputError."""
        raise InputError("this model is a classifier of noisy pictures: it makes none, it guides another model",
                         hint="nexus sample SYSTEM -p TEXT --guidance-kind classifier --guide-model THIS")

    def generate(self, request: SampleRequest, *, seeds: list[int], watch=None, guide=None) -> Media:
        """See `check`."""
        self.check(request)


class ConditionalConfig(DiffusionConfig):
    """A UNet on pixels or on a codec's latents; classifier-free guidance over text, or over labels as in ADM."""

    net: UNetConfig | ClassifierNetConfig = UNetConfig()
    path: AnyPath = DiscretePath(spacing="linspace")
    conditioner: TextCondConfig | LabelCondConfig | NoCondConfig = Field(LabelCondConfig(), discriminator="kind")
    steps: int = Field(50, ge=1)
    guidance: float = Field(3.0, ge=0)

    @model_validator(mode="after")
    def _classes(self) -> Self:
        if self.is_classifier and not isinstance(self.conditioner, LabelCondConfig):
            raise ValueError("a classifier needs conditioner.kind label")
        return self

    @property
    def is_classifier(self) -> bool:
        """Whether this describes a classifier of noisy pictures, which makes none."""
        return isinstance(self.net, ClassifierNetConfig)

    def net_facts(self) -> dict:
        """Fields of the network that follow from the conditioner."""
        if self.is_classifier:
            return {"num_classes": len(self.conditioner.classes)}
        return super().net_facts()

    def build(self) -> "Diffusion | Classifier":
        """The system with its initial weights; an external codec is attached by the loader."""
        return Classifier(self) if self.is_classifier else Diffusion(self)

    presets: ClassVar[dict[str, dict]] = {
        "tiny-text": {"net": UNetConfig.presets["tiny-words"], "size": 16, "steps": 4,
                      "conditioner": TextCondConfig.presets["tiny"]},
        "tiny": {"net": UNetConfig.presets["tiny"], "size": 16, "steps": 4},
        "edm-tiny": _EDM | {"net": UNetConfig.presets["tiny"], "size": 16, "steps": 4},
        "inpaint-tiny": {"net": UNetConfig.presets["tiny"] | {"in_channels": 7}, "size": 16, "steps": 4,
                         "concat": {"kind": "inpaint"}},
        "upscale-tiny": {"net": UNetConfig.presets["tiny"] | {"in_channels": 7}, "size": 16, "steps": 4,
                         "concat": {"kind": "upscale"}, "conditioner": {"kind": "none"}},
        "classifier-tiny": {"size": 16, "net": {"kind": "classifier", "channels": 16, "mult": (1, 2), "blocks": 1,
                                                "attention": (1,), "head_dim": 16, "groups": 8, "num_classes": 3}},
        "emoji": {"net": UNetConfig.presets["emoji"], "codec": SHARED_CODEC, "prediction": "v", "steps": 20,
                  "sampler": "dpmpp-2m", "conditioner": TextCondConfig.presets["emoji"]},
        "edm": _EDM | {"net": UNetConfig.presets["emoji-labels"], "codec": SHARED_CODEC, "steps": 18,
                       "path": _EDM["path"] | {"sigma_data": 1.0}, "guidance": 1.5,
                       "conditioner": LabelCondConfig.presets["emoji"]},
        "inpaint": {"net": UNetConfig.presets["emoji"] | {"in_channels": 2 * SHARED_LATENTS + 1}, "codec": SHARED_CODEC,
                    "prediction": "v", "steps": 20, "sampler": "dpmpp-2m", "concat": {"kind": "inpaint"},
                    "conditioner": TextCondConfig.presets["emoji"]},
        "upscale": {"net": {"in_channels": 7, "channels": 48, "mult": (1, 2, 3), "blocks": 1, "attention": (2,),
                            "head_dim": 48, "groups": 12}, "size": 64, "prediction": "v", "clip": True, "steps": 20,
                    "concat": {"kind": "upscale"}, "conditioner": {"kind": "none"}},
        "classifier": {"codec": SHARED_CODEC,
                       "net": {"kind": "classifier", "in_channels": SHARED_LATENTS, "channels": 48, "mult": (1, 2, 3),
                               "blocks": 1, "attention": (1, 2), "head_dim": 48, "groups": 12, "num_classes": 0}},
        "imagenet-64": {"net": UNetConfig.presets["imagenet-64"] | {"out_channels": 6}, "size": 64, "clip": True,
                        "learned_variance": True, "path": {"kind": "discrete", "beta_schedule": "cosine"},
                        "steps": 250, "sampler": "ddpm"},
        "classifier-imagenet-64": {"net": {"kind": "classifier", "size": 64}, "size": 64,
                                   "path": {"kind": "discrete", "beta_schedule": "cosine"}},
        "edm-imagenet-64": _EDM | {"net": UNetConfig.presets["imagenet-64"] | {"null_class": True, "dropout": 0.1},
                                   "size": 64, "steps": 40, "guidance": 1.0},
    }
    default_preset: ClassVar[str] = "emoji"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "emoji": EMOJI_RECIPE,
        "edm": EMOJI_RECIPE | {"steps": 10_000},
    }
    recipes |= {
        "inpaint": EMOJI_RECIPE | {"cache_latents": False},
        "upscale": EMOJI_RECIPE | {"cache_latents": False},
        "classifier-tiny": {"steps": 20, "batch_size": 4, "samples": 0},
        "classifier": EMOJI_RECIPE | {"steps": 5000, "weight_decay": 0.05, "samples": 0},
        "classifier-imagenet-64": {"steps": 300_000, "batch_size": 1024, "lr": 6e-4, "weight_decay": 0.05,
                                   "samples": 0},
    }
