"""The KL picture codec (AutoencoderKL of Stable Diffusion, SD3 and FLUX): pictures <-> small latent maps."""

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.codecs import tiling
from nexus.codecs.kl_blocks import KLDecoder, KLEncoder
from nexus.config import Config
from nexus.losses.kl import sample_gaussian, split_moments


class KLConfig(Config):
    """Widths and latent scaling of a KL picture codec.

    channels: the width at each resolution, halved between one and the next. blocks: residual blocks a resolution
    (the decoder has one more). attention: the resolutions, 0 the largest, that attend after each block. patch: pixels
    folded into channels before the first convolution (1 as published).
    The latents that other systems see are (z - shift) * scale. size: the side of the pictures, in pixels.
    """

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"channels": (8, 16), "blocks": 1, "groups": 4, "mid_attention": False, "quant_conv": False,
                 "size": 16},
        "sd-f8": {"scale": 0.18215, "size": 512},
        "sdxl-f8": {"scale": 0.13025, "size": 1024},
        "sd3": {"latent_channels": 16, "quant_conv": False, "scale": 1.5305, "shift": 0.0609, "size": 1024},
        "flux": {"latent_channels": 16, "quant_conv": False, "scale": 0.3611, "shift": 0.1159, "size": 1024},
        "kl-f16": {"latent_channels": 16, "channels": (128, 128, 256, 256, 512), "attention": (4,)},
        "kl-f32": {"latent_channels": 64, "channels": (128, 128, 256, 256, 512, 512), "attention": (4, 5)},
        "picture-codec": {"channels": (64, 128), "blocks": 1, "patch": 2, "groups": 16, "mid_attention": False,
                          "latent_channels": 8, "quant_conv": False, "size": 64},
    }
    kind: Literal["kl"] = "kl"
    in_channels: int = Field(3, ge=1)
    out_channels: int = Field(3, ge=1)
    latent_channels: int = Field(4, ge=1)
    channels: tuple[int, ...] = Field((128, 256, 512, 512), min_length=1)
    blocks: int = Field(2, ge=1)
    attention: tuple[int, ...] = ()
    patch: int = Field(1, ge=1)
    groups: int = Field(32, ge=1)
    eps: float = 1e-6
    mid_attention: bool = True
    quant_conv: bool = True
    scale: float = Field(1.0, gt=0)
    shift: float = 0.0
    size: int = Field(256, ge=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if bad := [c for c in self.channels if c % self.groups]:
            raise ValueError(f"a width of {bad[0]} does not divide into {self.groups} groups")
        if bad := [i for i in self.attention if not 0 <= i < len(self.channels)]:
            raise ValueError(f"attention {bad[0]}: there are resolutions 0 to {len(self.channels) - 1}")
        if self.size % self.factor:
            raise ValueError(f"a side of {self.size} pixels is not a multiple of the codec's factor {self.factor}")
        return self

    @property
    def factor(self) -> int:
        """Pixels of the picture to one latent position, along a side."""
        return self.patch * 2 ** (len(self.channels) - 1)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of the latents of a picture of side `size`."""
        return self.latent_channels, self.size // self.factor, self.size // self.factor

    def fitted(self, size: int, channels: int) -> Self:
        """The same codec for pictures of another side and number of colour channels."""
        return self.parse(self.to_json() | {"size": size, "in_channels": channels, "out_channels": channels})

    def build(self) -> "KLImage":
        return KLImage(self)


def halves(config: KLConfig, out: int) -> tuple[KLEncoder, KLDecoder]:
    """The encoder of a picture codec, whose features have `out` channels, and its decoder."""
    shared = {"patch": config.patch, "levels": config.attention, "attention": config.mid_attention,
              "norm": {"groups": config.groups, "eps": config.eps}}
    return (KLEncoder(config.in_channels, out, config.channels, config.blocks, **shared),
            KLDecoder(config.latent_channels, config.out_channels, config.channels, config.blocks, **shared))


def features(codec: nn.Module, x: Tensor) -> Tensor:
    """What the codec's encoder says of pictures x [B, C, H, W], in stripes where its `tile` asks for it."""
    return tiling.encode(codec.encoder, x) if tiling.wanted(codec.tile, *x.shape[2:]) else codec.encoder(x)


def pictures(codec: nn.Module, z: Tensor) -> Tensor:
    """What the codec's decoder makes of z [B, L, h, w], likewise."""
    striped = tiling.wanted(codec.tile, *(side * codec.config.factor for side in z.shape[2:]))
    return tiling.decode(codec.decoder, z) if striped else codec.decoder(z)


class KLImage(nn.Module):
    """Convolutional Gaussian autoencoder of pictures. Rombach et al. 2022.

    tile: "on", "off" or "auto", whether pictures go through in stripes, which is exact and needs less memory.
    """

    tile = "auto"

    def __init__(self, config: KLConfig):
        super().__init__()
        self.config = config
        moments, latents = 2 * config.latent_channels, config.latent_channels
        self.encoder, self.decoder = halves(config, moments)
        self.quant_conv = nn.Conv2d(moments, moments, 1) if config.quant_conv else None
        self.post_quant_conv = nn.Conv2d(latents, latents, 1) if config.quant_conv else None

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, H, W] in [-1, 1] -> mean and log variance [B, L, H/f, W/f] of the posterior, before scaling."""
        h = features(self, x)
        return split_moments(h if self.quant_conv is None else self.quant_conv(h))

    def latents(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """x [B, C, H, W] in [-1, 1] -> scaled latents [B, L, H/f, W/f]: the mode, or a draw that uses `noise`."""
        mean, logvar = self.encode(x)
        z = mean if noise is None else sample_gaussian(mean, logvar, noise)
        return (z - self.config.shift) * self.config.scale

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents z [B, L, h, w] -> picture [B, C, f*h, f*w], about [-1, 1] and not clipped."""
        return self.decode_raw(z / self.config.scale + self.config.shift)

    def decode_raw(self, z: Tensor) -> Tensor:
        """Latents before scaling -> picture."""
        z = z if self.post_quant_conv is None else self.post_quant_conv(z)
        return pictures(self, z)
