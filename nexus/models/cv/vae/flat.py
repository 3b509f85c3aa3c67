"""VAEs whose latent is one flat vector: convolutional (beta-VAE) and fully connected (the original)."""

from typing import Literal, Self

from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.config import Config
from nexus.losses.kl import split_moments
from nexus.models.cv.vae.decoder import ConvDecoder, MLPDecoder
from nexus.models.cv.vae.encoder import ConvEncoder, MLPEncoder


class ConvVAEConfig(Config):
    """The convolutional VAE of Burgess et al. 2018; the side must halve once for each of `widths`."""

    kind: Literal["conv"] = "conv"
    channels: int = Field(1, ge=1)
    size: int = Field(64, ge=2)
    widths: tuple[int, ...] = Field((32, 32, 32, 32), min_length=1)
    hidden: int = Field(256, ge=1)
    latents: int = Field(10, ge=1)

    @model_validator(mode="after")
    def _halves(self) -> Self:
        if self.size % 2 ** len(self.widths):
            raise ValueError(f"a side of {self.size} pixels cannot be halved {len(self.widths)} times")
        return self

    @property
    def latent_shape(self) -> tuple[int]:
        """(number of latents,)."""
        return (self.latents,)

    def fitted(self, size: int, channels: int) -> Self:
        """The same network for pictures of another side and number of colour channels."""
        return self.parse(self.to_json() | {"size": size, "channels": channels})

    def build(self) -> "FlatVAE":
        shape = (self.channels, self.size, self.widths, self.hidden)
        return FlatVAE(self, ConvEncoder(*shape, 2 * self.latents), ConvDecoder(*shape, self.latents))


class MLPVAEConfig(Config):
    """The fully connected VAE of Kingma & Welling 2013."""

    kind: Literal["mlp"] = "mlp"
    channels: int = Field(1, ge=1)
    size: int = Field(28, ge=1)
    hidden: tuple[int, ...] = Field((500,), min_length=1)
    latents: int = Field(20, ge=1)

    @property
    def latent_shape(self) -> tuple[int]:
        """(number of latents,)."""
        return (self.latents,)

    def fitted(self, size: int, channels: int) -> Self:
        """The same network for pictures of another side and number of colour channels."""
        return self.parse(self.to_json() | {"size": size, "channels": channels})

    def build(self) -> "FlatVAE":
        shape = (self.channels, self.size, self.size)
        return FlatVAE(self, MLPEncoder(shape, self.hidden, 2 * self.latents),
                       MLPDecoder(shape, self.hidden, self.latents))


class FlatVAE(nn.Module):
    """An encoder and a decoder around a flat latent; latents need no scaling, so `decode` is `decode_raw`."""

    def __init__(self, config: ConvVAEConfig | MLPVAEConfig, encoder: nn.Module, decoder: nn.Module):
        super().__init__()
        self.config, self.encoder, self.decoder = config, encoder, decoder

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [B, C, S, S] in [-1, 1] -> mean and log variance [B, L] of the posterior."""
        return split_moments(self.encoder(x))

    def decode_raw(self, z: Tensor) -> Tensor:
        """z [B, L] -> what the likelihood reads, [B, C, S, S]: the picture, or logits of white."""
        return self.decoder(z)

    def decode(self, z: Tensor) -> Tensor:
        """The same as decode_raw."""
        return self.decoder(z)
