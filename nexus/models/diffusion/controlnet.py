"""ControlNet: a copy of a UNet's way down that reads a picture and adds to the original's skips through convolutions
that start at zero. Zhang et al. 2023, arXiv:2302.05543.

B = batch, C = channels of latents, H, W = pixels of the hint, h, w = of the latents.
"""

from collections.abc import Callable
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.codecs.kl_image import KLConfig
from nexus.errors import ModelError
from nexus.media import Media
from nexus.models.diffusion.unet import UNet, UNetConfig
from nexus.nn.perturb import Perturb
from nexus.process.codec import SHARED_CODEC, CodecConfig
from nexus.process.concat import training_picture
from nexus.process.control import HINTS, controlled, hint_of
from nexus.process.diffusion import Diffusion, DiffusionConfig
from nexus.process.paths import AnyPath, DiscretePath
from nexus.requests import SampleRequest
from nexus.text.conditioner import NoCondConfig, TextCondConfig
from nexus.text.pretrained import PretrainedCondConfig

PUBLISHED_WIDTHS = (16, 32, 96, 256)        # of the hint's convolutions, before latents of an eighth of its side


class ControlNetConfig(UNetConfig):
    """The UNet that it is for, and hint_widths: channels of the hint's convolutions, each after the first halves it."""

    hint_channels: int = Field(3, gt=0)
    hint_widths: tuple[int, ...] = Field(PUBLISHED_WIDTHS, min_length=1)

    def unet(self) -> UNetConfig:
        """The configuration of the UNet that is controlled."""
        return UNetConfig.parse({k: v for k, v in self.to_json().items() if k in UNetConfig.model_fields})

    def build(self) -> "ControlNet":
        """The network with its initial weights."""
        return ControlNet(self)

    presets: ClassVar[dict[str, dict]] = {
        "tiny": UNetConfig.presets["tiny-sd"] | {"hint_widths": (8, 16)},
        "sd15": UNetConfig.presets["sd15"], "sd21": UNetConfig.presets["sd21"], "sdxl": UNetConfig.presets["sdxl"],
    }


def _zero(layer: nn.Conv2d) -> nn.Conv2d:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


class ControlNet(UNet):
    """x [B, C, h, w], t [B], cond as for the UNet and "hint" [B, 3, H, W] in [0, 1] -> residuals, one for each skip and
    at last the middle's. In place of "hint", "features" is what `look` made of it.
    """

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        self.up = nn.ModuleList()
        del self.norm_out, self.conv_out
        self.layers, self.middle = 0, 0                 # its attentions are not those that guidance weakens
        wide = config.hint_widths
        self.hint_in = nn.Conv2d(config.hint_channels, wide[0], 3, 1, 1)
        pairs = zip(wide, wide[1:], strict=False)
        self.hint_blocks = nn.ModuleList(layer for a, b in pairs for layer in (
            nn.Conv2d(a, a, 3, 1, 1), nn.Conv2d(a, b, 3, 2, 1)))
        self.hint_out = _zero(nn.Conv2d(wide[-1], config.widths[0], 3, 1, 1))
        last = len(config.mult) - 1
        skips = [config.widths[0]]
        for level, width in enumerate(config.widths):
            skips += [width] * (config.blocks + (level < last))
        self.zero = nn.ModuleList(_zero(nn.Conv2d(width, width, 1)) for width in skips)
        self.zero_mid = _zero(nn.Conv2d(config.widths[-1], config.widths[-1], 1))

    def look(self, hint: Tensor) -> Tensor:
        """hint [B, 3, H, W] -> features [B, C', h, w], which no step of a sampling run changes."""
        h = F.silu(self.hint_in(hint.to(self.hint_in.weight.dtype)))
        for layer in self.hint_blocks:
            h = F.silu(layer(h))
        return self.hint_out(h)

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None, prepared: dict | None = None,
                perturb: Perturb = Perturb()) -> list[Tensor]:
        cond = cond or {}
        features = cond["features"] if "features" in cond else self.look(self._need(cond, "hint"))
        h, skips, _, _ = self.encode(x, t, cond, prepared, perturb, features)
        return [zero(skip) for zero, skip in zip(self.zero, skips, strict=True)] + [self.zero_mid(h)]


class ControlConfig(DiffusionConfig):
    """Trains a ControlNet for the Stable Diffusion `base`, whose path, prediction, codec and words it has.

    base: the model that is controlled; None = one of random weights, for tests. hint: what is shown of a training
    picture. p_uncond is higher than usual, so that the hint alone has to say what is wanted.
    """

    net: ControlNetConfig = ControlNetConfig.preset("sd15")
    path: AnyPath = DiscretePath.preset("stable-diffusion")         # the base's own takes its place
    prediction: Literal["eps", "v"] = "eps"
    conditioner: PretrainedCondConfig | TextCondConfig | NoCondConfig = Field(
        PretrainedCondConfig.parse({"recipe": "sd", "encoders": ["openai/clip-vit-large-patch14"]}),
        discriminator="kind")
    codec: CodecConfig | None = CodecConfig(net=KLConfig.preset("sd-f8"))
    base: str | None = None
    hint: Literal[HINTS] = "edges"
    p_uncond: float = Field(0.5, ge=0, le=1)
    guidance: float = Field(7.5, ge=0)
    pools_words: ClassVar[bool] = False

    @model_validator(mode="after")
    def _hint_of_the_latents_size(self) -> Self:
        factor = self.codec.net.factor if self.codec else 1
        if 2 ** (len(self.net.hint_widths) - 1) != factor:
            raise ValueError(f"net.hint_widths {list(self.net.hint_widths)} make a hint "
                             f"{2 ** (len(self.net.hint_widths) - 1)} times smaller, the codec makes latents {factor}")
        return self

    def fitting(self, base: dict) -> dict:
        """Fields of the network that follow from a base's configuration: the hint ends in the size of its latents."""
        factor = CodecConfig.parse(base["codec"]).net.factor if base.get("codec") else 1
        widths, count = self.net.hint_widths, factor.bit_length()
        usual = (*PUBLISHED_WIDTHS[:count], *PUBLISHED_WIDTHS[-1:] * (count - len(PUBLISHED_WIDTHS)))
        return {"hint_widths": widths if len(widths) == count else usual}

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": ControlNetConfig.presets["tiny"], "codec": {"net": KLConfig.presets["tiny"]}, "steps": 4,
                 "conditioner": TextCondConfig.presets["tiny"]},
        "emoji": {"base": "sd", "codec": SHARED_CODEC, "prediction": "v", "steps": 20, "guidance": 3.0,
                  "sampler": "dpmpp-2m", "path": DiscretePath.presets["stable-diffusion-even"],
                  "net": UNetConfig.presets["emoji-sd"] | {"hint_widths": (8, 16, 32)},
                  "conditioner": TextCondConfig.presets["emoji"]},
        "sd15": {},
    }
    default_preset: ClassVar[str] = "emoji"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "emoji": {"steps": 4000, "batch_size": 32, "lr": 3e-4, "warmup": 200, "precision": "auto", "ema": 0.998,
                  "save_every": 500},
        "sd15": {"steps": 50_000, "batch_size": 32, "lr": 1e-5, "precision": "auto", "ema": 0.0},
    }

    def build(self) -> "Control":
        """The system; a named base is attached by the loader."""
        return Control(self)


class Control(Diffusion):
    """A frozen Stable Diffusion, and the ControlNet that learns to steer it."""

    def __init__(self, config: ControlConfig):
        super().__init__(config)
        self.backbone = config.net.unet().build().requires_grad_(False)
        if config.base:
            self.external = self.external | {"backbone": config.base}
        else:                                           # a last layer of zeros would let no gradient through
            nn.init.normal_(self.backbone.conv_out.weight, std=0.02)
        if self.conditioner is not None:
            self.conditioner.requires_grad_(False)

    def admit(self, part: str, other: nn.Module) -> None:
        """ModelError for a base of another kind than this configuration says; its words and codec are taken over."""
        if part != "backbone":
            return
        ours = {"net": self.config.net.unet(), "prediction": self.config.prediction, "codec": self.config.codec,
                "conditioner": self.config.conditioner}
        for name, wanted in ours.items():
            if getattr(other.config, name, None) != wanted:
                raise ModelError(f"the base {self.config.base} has another {name} than this ControlNet",
                                 hint="a new run takes the base's: nexus train controlnet --set base=MODEL")
        self.load_state_dict({f"conditioner.{k}": v for k, v in other.conditioner.state_dict().items()}, strict=False)

    def predicted(self, x: Tensor, t: Tensor, cond: dict | None) -> Tensor:
        """The base's prediction with the ControlNet's residuals."""
        cond = dict(cond or {})
        added = self.net(x, t, cond)
        return self.backbone(x, t, cond | {"control": added})

    def _training_cond(self, batch: dict, drop: Tensor, rng: torch.Generator) -> dict:
        cond = super()._training_cond(batch, drop, rng) or {}
        return cond | {"hint": hint_of(training_picture(batch), self.config.hint)}

    def generate(self, request: SampleRequest, *, seeds: list[int], watch: Callable[..., Any] | None = None,
                 guide: nn.Module | None = None) -> Media:
        """One picture a seed, steered by request.control_image; without one, the base's pictures."""
        if request.control_image is None:
            before, self.net = self.net, self.backbone
            try:
                return super().generate(request, seeds=seeds, watch=watch, guide=guide)
            finally:
                self.net = before
        with controlled(self, self.backbone, self.net, request):
            return super().generate(request, seeds=seeds, watch=watch, guide=guide)
