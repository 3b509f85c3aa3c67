"""Critics that look at the complex spectrogram of a sound, one for each resolution. Defossez et al. 2022, section 3.3.

B items, C channels, T samples; a map is over time (rows) and frequency (columns).
"""

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from nexus.config import Config
from nexus.nn.stft import stft

SLOPE = 0.2


class StftCritic(nn.Module):
    """x [B, C, T] -> a map of scores [B, 1, frames, bins'] and the hidden maps before it.

    window: samples; a quarter of it is a step. width: channels. dilations: of the strided layers, over time.
    """

    def __init__(self, channels: int, window: int, width: int, dilations: tuple[int, ...]):
        super().__init__()
        self.window = window
        strided = [nn.Conv2d(width, width, (3, 9), stride=(1, 2), dilation=(d, 1), padding=(d, 4)) for d in dilations]
        layers = [nn.Conv2d(2 * channels, width, (3, 9), padding=(1, 4)), *strided,
                  nn.Conv2d(width, width, 3, padding=1)]
        self.layers = nn.ModuleList(weight_norm(layer) for layer in layers)
        self.last = weight_norm(nn.Conv2d(width, 1, 3, padding=1))

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        h, seen = self._spectrogram(x), []
        for layer in self.layers:
            h = F.leaky_relu(layer(h), SLOPE)
            seen.append(h)
        return self.last(h), seen

    def _spectrogram(self, x: Tensor) -> Tensor:
        """Real and imaginary parts of all channels, [B, 2C, frames, bins], with a window of unit energy."""
        made = torch.view_as_real(stft(x.flatten(0, 1), self.window))
        return made.permute(0, 3, 2, 1).unflatten(0, x.shape[:2]).flatten(1, 2)


class StftCriticConfig(Config):
    """windows: samples of each critic's. width: channels. dilations: of the layers that halve the frequencies.

    start: the first step at which the codec is trained against them, who begin to learn `lead` steps earlier.
    """

    windows: tuple[int, ...] = Field((2048, 1024, 512, 256, 128), min_length=1)
    width: int = Field(32, ge=1)
    dilations: tuple[int, ...] = (1, 2, 4)
    start: int = Field(0, ge=0)
    lead: int = Field(0, ge=0)

    def build(self, channels: int) -> "StftCritics":
        """The critics of sound of so many channels."""
        return StftCritics(self, channels)


class StftCritics(nn.Module):
    """All resolutions: x [B, C, T] -> each one's scores, and all hidden maps in one list."""

    def __init__(self, config: StftCriticConfig, channels: int):
        super().__init__()
        self.critics = nn.ModuleList(StftCritic(channels, window, config.width, config.dilations)
                                     for window in config.windows)

    def forward(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        scores, hidden = zip(*(critic(x) for critic in self.critics), strict=True)
        return list(scores), [h for maps in hidden for h in maps]
