"""The latent space of a picture system: a codec of its own, or one whose weights lie in a checkpoint of theirs."""

from typing import Annotated, Any

from pydantic import Field, field_validator
from torch import Tensor, nn

from nexus.codecs.kl_image import KLConfig
from nexus.codecs.vq_image import VQConfig
from nexus.config import Config


class CodecConfig(Config):
    """The latent space of a system. weights: a model whose network is the codec, or None = in the same checkpoint."""

    net: Annotated[KLConfig | VQConfig, Field(discriminator="kind")]
    weights: str | None = None

    @field_validator("net", mode="before")
    @classmethod
    def _usual_kind(cls, net: Any) -> Any:
        return {"kind": "kl"} | net if isinstance(net, dict) else net

    def build(self) -> nn.Module:
        """The codec, frozen, with its initial weights."""
        return self.net.build().requires_grad_(False)

    def external(self) -> dict[str, str]:
        """What the loader attaches in its place."""
        return {"codec": self.weights} if self.weights else {}


SHARED_CODEC = {"net": KLConfig.presets["picture-codec"], "weights": "picture-codec"}
SHARED_LATENTS = KLConfig.presets["picture-codec"]["latent_channels"]


def encoded(codec: nn.Module | None, x: Tensor) -> Tensor:
    """Pictures [B, C, H, W] in [-1, 1] -> their latents in float32; without a codec the pictures themselves."""
    return x if codec is None else codec.latents(x.to(next(codec.parameters()).dtype)).float()


def decoded(codec: nn.Module | None, z: Tensor) -> Tensor:
    """The inverse of `encoded`, clipped to [-1, 1], float32."""
    return unclipped(codec, z).clamp(-1, 1)


def unclipped(codec: nn.Module | None, z: Tensor) -> Tensor:
    """The same with what overshoots, for losses: where a value is clipped, no gradient passes."""
    if codec is not None:
        z = codec.decode(z.to(next(codec.parameters()).dtype))
    return z.float()
