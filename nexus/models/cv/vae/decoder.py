"""Small decoders of a VAE: flat latent -> picture (or its logits)."""

import math

from torch import Tensor, nn


class ConvDecoder(nn.Module):
    """The mirror of ConvEncoder: z [B, L] -> [B, C, S, S]; `widths` are the encoder's, read backwards."""

    def __init__(self, channels: int, size: int, widths: tuple[int, ...], hidden: int, latents: int):
        super().__init__()
        self.start = (widths[-1], size // 2 ** len(widths), size // 2 ** len(widths))
        self.fc = nn.Linear(latents, hidden)
        self.grid = nn.Linear(hidden, math.prod(self.start))
        after = (*widths[-2::-1], channels)
        self.convs = nn.ModuleList(nn.ConvTranspose2d(c, o, 4, 2, 1) for c, o in zip(widths[::-1], after, strict=True))

    def forward(self, z: Tensor) -> Tensor:
        x = self.grid(self.fc(z).relu()).relu().unflatten(1, self.start)
        for conv in self.convs[:-1]:
            x = conv(x).relu()
        return self.convs[-1](x)


class MLPDecoder(nn.Module):
    """Fully connected tanh layers, `hidden` read backwards: z [B, L] -> [B, *shape]. Kingma & Welling 2013."""

    def __init__(self, shape: tuple[int, int, int], hidden: tuple[int, ...], latents: int):
        super().__init__()
        self.shape = shape
        widths = hidden[::-1]
        before = (latents, *widths[:-1])
        self.layers = nn.ModuleList(nn.Linear(c, o) for c, o in zip(before, widths, strict=True))
        self.out = nn.Linear(widths[-1], math.prod(shape))

    def forward(self, z: Tensor) -> Tensor:
        for layer in self.layers:
            z = layer(z).tanh()
        return self.out(z).unflatten(1, self.shape)
