"""The codec of sound that a system of tokens stands on: its own copy, or another model's network by reference."""

from torch import nn

from nexus.codecs.encodec import EncodecConfig
from nexus.config import Config


class SoundCodecConfig(Config):
    """weights: a model whose network is the codec; None = in the same checkpoint; "" = there is none, tokens alone."""

    net: EncodecConfig = EncodecConfig()
    weights: str | None = None

    def build(self) -> nn.Module | None:
        """The codec, frozen, with its initial weights."""
        return None if self.weights == "" else self.net.build().requires_grad_(False)

    def external(self) -> dict[str, str]:
        """What the loader attaches in its place."""
        return {"codec": self.weights} if self.weights else {}


MUSIC_CODEC = {"net": EncodecConfig.presets["music"], "weights": "music-codec"}
