"""The VQ picture codec (VQGAN, VQModel of latent diffusion): pictures <-> maps of ids of a codebook's rows.

Esser et al. 2021, arXiv:2012.09841; Rombach et al. 2022. D = width of a row.
"""

from typing import ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from nexus.codecs.kl_image import KLConfig, features, halves, pictures
from nexus.nn.quantize import kmeans, nearest


class VQConfig(KLConfig):
    """A picture codec as KLConfig says, with a codebook of `bins` rows of `dim` numbers in its middle.

    quant_conv, always there, goes from latent_channels to dim, and another one back. The latents that other systems see
    are those before the codebook, which decoding rounds to its rows.
    """

    presets: ClassVar[dict[str, dict]] = {
        "tiny-vq": KLConfig.presets["tiny"] | {"quant_conv": True, "latent_channels": 4, "bins": 16, "dim": 4},
        "picture-vq": KLConfig.presets["picture-codec"] | {"quant_conv": True, "bins": 1024, "dim": 8},
        "vq-f4": {"channels": (128, 256, 512), "latent_channels": 3, "bins": 8192, "dim": 3},
        "vq-f8": {"channels": (128, 256, 256, 512), "attention": (3,), "latent_channels": 4, "bins": 16384, "dim": 4},
        "vq-f16": {"channels": (128, 128, 256, 256, 512), "attention": (4,), "latent_channels": 8, "bins": 16384,
                   "dim": 8},
        "vqgan-imagenet": {"channels": (128, 128, 256, 256, 512), "attention": (4,), "latent_channels": 256,
                           "bins": 1024, "dim": 256},
    }
    kind: Literal["vq"] = "vq"
    latent_channels: int = Field(3, ge=1)
    bins: int = Field(8192, ge=2)
    dim: int = Field(3, ge=1)
    quant_conv: Literal[True] = True

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(D, height, width) of the latents of a picture of side `size`."""
        return self.dim, *super().latent_shape[1:]

    def build(self) -> "VQImage":
        return VQImage(self)


class Coded(NamedTuple):
    """z [B, D, h, w] in rows of the codebook, with the gradient of z; their ids [B, h, w]; how far rows and z are.

    to_rows: mean squared distance whose gradient moves z; to_z: the same number, whose gradient moves the rows.
    """

    z: Tensor
    ids: Tensor
    to_rows: Tensor
    to_z: Tensor


class VQImage(nn.Module):
    """Convolutional autoencoder of pictures through a codebook. tile: as of the KL codec."""

    tile = "auto"

    def __init__(self, config: VQConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = halves(config, config.latent_channels)
        self.quant_conv = nn.Conv2d(config.latent_channels, config.dim, 1)
        self.codes = nn.Embedding(config.bins, config.dim)
        self.post_quant_conv = nn.Conv2d(config.dim, config.latent_channels, 1)
        nn.init.uniform_(self.codes.weight, -1 / config.bins, 1 / config.bins)

    def encode(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] in [-1, 1] -> z [B, D, H/f, W/f], before scaling and before the codebook."""
        return self.quant_conv(features(self, x))

    def ids(self, z: Tensor) -> Tensor:
        """z [B, D, h, w] before scaling -> the number of each place's nearest row, [B, h, w]."""
        flat = z.movedim(1, -1)
        return nearest(flat.flatten(0, 2), self.codes.weight).view(flat.shape[:3])

    def rows(self, ids: Tensor) -> Tensor:
        """ids [B, h, w] < bins -> z [B, D, h, w] before scaling."""
        return self.codes(ids).movedim(-1, 1)

    @torch.no_grad()
    def start(self, z: Tensor, rng: torch.Generator) -> None:
        """Give a codebook that has learnt nothing the centres of z [B, D, h, w]: of its own, few would be chosen."""
        if self.codes.weight.abs().max() <= 1 / self.config.bins:
            self.codes.weight.copy_(kmeans(z.movedim(1, -1).flatten(0, 2).float(), self.config.bins, rng)[0])

    def coded(self, z: Tensor) -> Coded:
        """z [B, D, h, w] before scaling, rounded to the codebook."""
        ids = self.ids(z.detach())
        rows = self.rows(ids)
        return Coded(z + (rows - z).detach(), ids, F.mse_loss(z, rows.detach()), F.mse_loss(rows, z.detach()))

    def latents(self, x: Tensor) -> Tensor:
        """x [B, C, H, W] in [-1, 1] -> scaled latents [B, D, H/f, W/f], not rounded."""
        return (self.encode(x) - self.config.shift) * self.config.scale

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents z [B, D, h, w] -> picture [B, C, f*h, f*w], about [-1, 1] and not clipped."""
        return self.decode_rounded(z / self.config.scale + self.config.shift)

    def decode_rounded(self, z: Tensor) -> Tensor:
        """Latents before scaling, which are rounded to the codebook -> picture."""
        return self.decode_raw(self.rows(self.ids(z)).to(z.dtype))

    def decode_raw(self, z: Tensor) -> Tensor:
        """Rows of the codebook z [B, D, h, w] -> picture."""
        return pictures(self, self.post_quant_conv(z))
