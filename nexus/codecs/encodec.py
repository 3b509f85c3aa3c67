"""EnCodec: sound as a few ids a frame, and back. Defossez et al. 2022; the 32 kHz one: Copet et al. 2023 (MusicGen).

B items, C channels, T samples, F frames, K rows of ids, D numbers a frame.
"""

import math
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.config import Config
from nexus.errors import InputError, ModelError
from nexus.nn.quantize import ResidualQuantizer
from nexus.nn.seanet import ConvNorm, Decoder, Encoder, Kind, Padding, Shape, in_pieces

WHOLE_SECONDS, PIECE_SECONDS = 60, 20       # longer sound goes through in pieces, unless told otherwise
QUIET = 1e-8                                # added to the loudness that sound is divided by

_SMALL = {"filters": 16, "decay": 0.95, "causal": False, "padding": "constant", "shortcut": "identity"}


class EncodecConfig(Config):
    """Sizes of an EnCodec and what it hears.

    rate: samples a second. channels: of the sound. interleave: a mono network heard for each of two channels, the ids
    of both in alternate rows ("rows", as the published stereo MusicGen) or frames ("frames"). ratios: of the decoder,
    first to last; the encoder has them backwards. blocks: residual blocks a resolution, block j with dilation ** j.
    compress: how much narrower a block is inside. lstm: layers, 0 = none. trim_right: see Kind. quantizers: codebooks,
    of `bins` rows each.
    choices: numbers of codebooks of which training draws one for each batch and a listener may take any; () = all of
    them always. decay, dead: see ResidualQuantizer. normalize: sound is divided by its loudness, which is kept beside
    the ids. segment: seconds that are encoded alone, `overlap` (a share) of them shared with the next ones.
    """

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"rate": 1600, "dim": 8, "filters": 4, "ratios": (4, 2), "lstm": 1, "quantizers": 2, "bins": 16,
                 "causal": False, "padding": "constant", "shortcut": "identity", "choices": (1, 2), "dead": 0.5},
        "music": _SMALL | {"rate": 16_000, "quantizers": 4, "dead": 0.05},
        "speech": _SMALL | {"rate": 16_000, "quantizers": 8, "dead": 0.05, "choices": (2, 4, 8), "causal": True,
                            "padding": "reflect"},
        "24khz": {"choices": (2, 4, 8, 16, 32)},
        "32khz": {"rate": 32_000, "filters": 64, "ratios": (8, 5, 4, 4), "causal": False, "padding": "constant",
                  "shortcut": "identity", "quantizers": 4, "bins": 2048},
        "48khz": {"rate": 48_000, "channels": 2, "causal": False, "norm": "group", "quantizers": 16,
                  "normalize": True, "segment": 1.0, "overlap": 0.01, "choices": (2, 4, 8, 16)},
    }
    kind: Literal["encodec"] = "encodec"
    rate: int = Field(24_000, ge=1)
    channels: int = Field(1, ge=1, le=2)
    interleave: Literal["none", "rows", "frames"] = "none"
    dim: int = Field(128, ge=1)
    filters: int = Field(32, ge=1)
    ratios: tuple[int, ...] = Field((8, 5, 4, 2), min_length=1)
    blocks: int = Field(1, ge=1)
    kernel: int = Field(7, ge=1)
    last_kernel: int = Field(7, ge=1)
    block_kernel: int = Field(3, ge=1)
    dilation: int = Field(2, ge=1)
    compress: int = Field(2, ge=1)
    lstm: int = Field(2, ge=0)
    causal: bool = True
    padding: Padding = "reflect"
    norm: ConvNorm = "weight"
    trim_right: float = Field(1.0, ge=0, le=1)
    shortcut: Literal["conv", "identity"] = "conv"
    quantizers: int = Field(32, ge=1)
    bins: int = Field(1024, ge=2)
    choices: tuple[int, ...] = ()
    decay: float = Field(0.99, gt=0, lt=1)
    dead: float = Field(2.0, ge=0)
    normalize: bool = False
    segment: float | None = Field(None, gt=0)
    overlap: float = Field(0.0, ge=0, lt=1)

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if min(self.ratios) < 1 or self.filters < self.compress:
            raise ValueError("ratios are at least 1, and filters at least compress")
        if self.choices and not 1 <= min(self.choices) <= max(self.choices) <= self.quantizers:
            raise ValueError(f"choices: from 1 to {self.quantizers} codebooks")
        if self.interleave != "none" and (self.channels != 2 or self.normalize or self.segment):
            raise ValueError("interleave: needs two channels, and neither normalize nor segment")
        if self.interleave == "frames" and math.prod(self.ratios) % 2:
            raise ValueError("interleave frames: needs an even number of samples a frame")
        return self

    @property
    def hop(self) -> int:
        """Samples of sound to one frame of ids."""
        return math.prod(self.ratios) // (2 if self.interleave == "frames" else 1)

    @property
    def codebooks(self) -> int:
        """Rows of ids a frame."""
        return self.quantizers * (2 if self.interleave == "rows" else 1)

    @property
    def frame_rate(self) -> float:
        """Frames of ids a second."""
        return self.rate / self.hop

    @property
    def shape(self) -> Shape:
        """The sizes of the two networks."""
        return Shape(1 if self.interleave != "none" else self.channels, self.dim, self.filters, self.ratios,
                     self.blocks, self.kernel, self.last_kernel, self.block_kernel, self.dilation, self.compress,
                     self.lstm, self.shortcut == "conv", Kind(self.causal, self.padding, self.norm, self.trim_right))

    @property
    def reach(self) -> int:
        """Frames of the networks on either side of one on which it depends, the LSTM left aside."""
        samples, jump = self.kernel + self.last_kernel, 1
        for ratio in reversed(self.ratios):
            inside = sum((self.block_kernel - 1) * self.dilation ** j for j in range(self.blocks))
            samples += jump * (inside + 2 * ratio)
            jump *= ratio
        return -(-samples // jump) + 1

    def build(self) -> "EncodecNet":
        """The codec with its initial weights."""
        return EncodecNet(self)


class Encoded(NamedTuple):
    """Sound, or a segment of it: ids [B, K, F], and the loudness [B, 1, 1] it was divided by, if any."""

    ids: Tensor
    scale: Tensor | None


class Rebuilt(NamedTuple):
    """Sound [B, C, T] out of its codes, with gradients, and what the encoder pays for its distance from them."""

    audio: Tensor
    commitment: Tensor
    ids: Tensor


class EncodecNet(nn.Module):
    """An encoder, codebooks and a decoder.

    tile: "on", "off" or "auto" (sound above a minute): whether sound goes through in pieces, which is exact and needs
    less memory; never where a norm looks at all of it, or gradients are needed.
    """

    tile = "auto"

    def __init__(self, config: EncodecConfig):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config.shape), Decoder(config.shape)
        self.quantizer = ResidualQuantizer(config.dim, config.bins, config.quantizers, decay=config.decay,
                                           dead=config.dead)

    def frames(self, samples: int) -> int:
        """How many frames of ids so many samples of sound become."""
        whole = -(-samples // math.prod(self.config.ratios))
        return whole * (2 if self.config.interleave == "frames" else 1)

    def latents(self, x: Tensor) -> Tensor:
        """x [B, C, T] of the network's own channels -> [B, D, F], before the codebooks."""
        x = x.to(self.decoder.last.conv.weight.dtype)
        fast = self.encoder.fast
        if self._tiled(x.shape[-1]):
            return self.encoder.slow(in_pieces(fast, x, unit=math.prod(self.config.ratios), **self._piece()))
        return self.encoder.slow(fast(x))

    def decode_latents(self, z: Tensor) -> Tensor:
        """z [B, D, F] -> [B, C, T] float32 of the network's own channels, a whole number of frames."""
        h = self.decoder.slow(z.to(self.decoder.last.conv.weight.dtype))
        if self._tiled(z.shape[-1] * math.prod(self.config.ratios)):
            return in_pieces(self.decoder.fast, h, unit=1, **self._piece()).float()
        return self.decoder.fast(h).float()

    def codes(self, x: Tensor, count: int | None = None) -> Tensor:
        """x [B, C, T] in [-1, 1] -> ids [B, K, F] int64 < bins; count: codebooks to use, None = all.

        Raises ModelError for a codec whose ids do not say all, InputError for another number of channels.
        """
        self.check_ids()
        return self._rows(self.quantizer.encode(self.latents(self._heard(x)), count))

    def from_codes(self, ids: Tensor) -> Tensor:
        """ids [B, K, F] -> sound [B, C, F * hop] float32, about [-1, 1] and not clipped; K may be fewer than all.

        Raises ModelError as `codes` does.
        """
        self.check_ids()
        return self._made(self.decode_latents(self.quantizer.decode(self._unrowed(ids))))

    def encode(self, x: Tensor, count: int | None = None) -> list[Encoded]:
        """x [B, C, T] in [-1, 1] -> its segments; one, where the codec has none. Raises InputError as `codes`."""
        size, step = self._segment() or (x.shape[-1], x.shape[-1])
        parts = []
        for start in range(0, x.shape[-1], step):
            part, scale = self._leveled(self._heard(x[..., start:start + size]))
            parts.append(Encoded(self._rows(self.quantizer.encode(self.latents(part), count)), scale))
        return parts

    def decode(self, parts: list[Encoded], length: int | None = None) -> Tensor:
        """The inverse of `encode`: sound [B, C, T] float32, cut to `length` samples."""
        made = [self._made(self.decode_latents(self.quantizer.decode(self._unrowed(ids)))) * (1 if s is None else s)
                for ids, s in parts]
        segment = self._segment()
        whole = made[0] if segment is None else overlapped(made, segment[1])
        return whole[..., :length]

    def forward(self, x: Tensor, count: int | None = None, rng: torch.Generator | None = None, *,
                decoder_only: bool = False) -> Rebuilt:
        """x [B, C, T] -> the sound rebuilt from the first `count` codebooks; with an rng they learn from it.

        decoder_only: nothing before the decoder learns, by gradient or otherwise.
        """
        heard, scale = self._leveled(self._heard(x))
        with torch.set_grad_enabled(torch.is_grad_enabled() and not decoder_only):
            found = self.quantizer(self.latents(heard), count, None if decoder_only else rng)
        made = self.decode_latents(found.z) * (1 if scale is None else scale)
        return Rebuilt(self._made(made)[..., :x.shape[-1]], found.commitment, found.ids)

    def _tiled(self, samples: int) -> bool:
        wanted = self.tile == "on" or self.tile == "auto" and samples > WHOLE_SECONDS * self.config.rate
        return wanted and self.config.norm != "group" and not torch.is_grad_enabled()

    def _piece(self) -> dict[str, int]:
        frames = int(PIECE_SECONDS * self.config.rate) // math.prod(self.config.ratios)
        return {"size": max(1, frames), "context": self.config.reach}

    def _segment(self) -> tuple[int, int] | None:
        """Samples of a segment, and from the start of one to the start of the next."""
        if self.config.segment is None:
            return None
        size = int(self.config.segment * self.config.rate)
        return size, max(1, int((1 - self.config.overlap) * size))

    def check_ids(self) -> None:
        """ModelError for a codec whose ids do not say all."""
        if self.config.normalize or self.config.segment:
            raise ModelError("this codec keeps the loudness of each segment, which ids alone do not say",
                             hint="encode and decode, or a codec without net.normalize and net.segment")

    def _leveled(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """x divided by its root mean square over time, of all channels together, and that [B, 1, 1]."""
        if not self.config.normalize:
            return x, None
        scale = x.mean(1, keepdim=True).square().mean(2, keepdim=True).sqrt() + QUIET
        return x / scale, scale

    def _heard(self, x: Tensor) -> Tensor:
        """x [B, C, T] as the network takes it: with interleaving [2B, 1, T], all left channels first."""
        if x.shape[1] != self.config.channels:
            raise InputError(f"sound of {x.shape[1]} channels, this codec hears {self.config.channels}")
        return x if self.config.interleave == "none" else x.transpose(0, 1).flatten(0, 1)[:, None]

    def _made(self, x: Tensor) -> Tensor:
        return x if self.config.interleave == "none" else torch.cat(x.chunk(2), 1)

    def _rows(self, ids: Tensor) -> Tensor:
        """ids [2B, K, F] of both channels, interleaved."""
        if self.config.interleave == "none":
            return ids
        if self.config.interleave == "rows":
            return torch.stack(ids.chunk(2), 2).flatten(1, 2)
        return torch.stack(ids.chunk(2), 3).flatten(2)

    def _unrowed(self, ids: Tensor) -> Tensor:
        if self.config.interleave == "none":
            return ids
        if self.config.interleave == "rows":
            return torch.cat([ids[:, 0::2], ids[:, 1::2]])
        return torch.cat([ids[..., 0::2], ids[..., 1::2]])


def overlapped(parts: list[Tensor], step: int) -> Tensor:
    """Segments [B, C, T] that begin `step` samples apart as one sound, each fading into the next in a straight line.

    The first is the longest; one before the last may end after it.
    """
    size = parts[0].shape[-1]
    ramp = torch.arange(size, device=parts[0].device)
    weight = torch.minimum(ramp + 1, size - ramp).to(parts[0])
    out = parts[0].new_zeros(*parts[0].shape[:-1], max(i * step + part.shape[-1] for i, part in enumerate(parts)))
    total = torch.zeros_like(out[0, 0])
    for i, part in enumerate(parts):
        end = i * step + part.shape[-1]
        out[..., i * step:end] += weight[:part.shape[-1]] * part
        total[i * step:end] += weight[:part.shape[-1]]
    return out / total
