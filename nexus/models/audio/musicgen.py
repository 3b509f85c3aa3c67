"""MusicGen: music as the tokens of a codec, written by one language model. Copet et al. 2023, arXiv:2306.05284.

B items, K codebooks, V tokens of each, T frames, S steps of the delayed pattern, D width, L text or chroma vectors.
"""

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.codecs.chroma import ChromaConfig
from nexus.codecs.encodec import EncodecConfig
from nexus.codecs.sound import MUSIC_CODEC, SoundCodecConfig
from nexus.config import Config
from nexus.decode.choose import chooser, guided
from nexus.decode.loops import UNKNOWN, autoregressive
from nexus.decode.patterns import delay, holds, undelay, windows
from nexus.errors import InputError, ModelError, UsageError
from nexus.media import Media
from nexus.nn.precision import full_precision
from nexus.nn.token_lm import SIZES, Prepared, TokenLM, TokenLMConfig
from nexus.phase import Phase
from nexus.process import followed
from nexus.process.followed import Heard
from nexus.requests import SampleRequest, refuse
from nexus.rng import generator
from nexus.text.conditioner import Cond, NoCondConfig, TextCondConfig, aligned, joined
from nexus.text.pretrained import PretrainedCondConfig

T5 = {"kind": "pretrained", "recipe": "t5", "encoders": ("google-t5/t5-base",), "weighting": False}


class MusicGenConfig(Config):
    """A language model on a codec's tokens, its text encoder, and how it is trained and sampled.

    seconds: of the clips it is trained on, which is also its window; a longer piece is made in windows that begin
    `stride` seconds after one another. p_uncond: share of clips that are learnt without any condition; p_melody: of
    the others, share without their melody or style. guidance, guidance_style: see `guided`; the second, where it is
    asked for, makes guidance double. temperature, top_k, top_p: see `choose`. hearing: a folder of MERT, for a style
    that is heard by it.
    """

    medium: ClassVar[str] = "audio"
    net: TokenLMConfig = TokenLMConfig()
    codec: SoundCodecConfig = SoundCodecConfig(net=EncodecConfig.preset("32khz"))
    conditioner: TextCondConfig | PretrainedCondConfig | NoCondConfig = Field(PretrainedCondConfig(**T5),
                                                                             discriminator="kind")
    melody: ChromaConfig = ChromaConfig()
    hearing: str = ""
    seconds: float = Field(30.0, gt=0)
    stride: float = Field(18.0, gt=0)
    p_uncond: float = Field(0.3, ge=0, le=1)
    p_melody: float = Field(0.5, ge=0, le=1)
    guidance: float = Field(3.0, ge=0)
    temperature: float = Field(1.0, ge=0)
    top_k: int = Field(250, ge=0)
    top_p: float = Field(0.0, ge=0, le=1)

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": TokenLMConfig.presets["tiny"], "codec": {"net": EncodecConfig.presets["tiny"]},
                 "conditioner": TextCondConfig.presets["tiny"], "melody": {"exponent": 7}, "seconds": 0.25,
                 "stride": 0.15, "top_k": 8},
        "tiny-style": {"net": TokenLMConfig.presets["tiny-style"], "codec": {"net": EncodecConfig.presets["tiny"]},
                       "conditioner": TextCondConfig.presets["tiny"], "seconds": 0.25, "stride": 0.15, "top_k": 8},
        "music": {"net": TokenLMConfig.presets["music"], "codec": MUSIC_CODEC, "melody": {"exponent": 13},
                  "conditioner": {"kind": "text", "encoder": {"buckets": 1024, "length": 32}}, "seconds": 10.0,
                  "stride": 6.0, "p_uncond": 0.2, "top_k": 100},
    } | {name: {"net": fields} | ({"p_uncond": 0.2} if "melody" in name else {})
         | ({"codec": {"net": EncodecConfig.presets["32khz"] | {"channels": 2, "interleave": "rows"}}}
            if "stereo" in name else {})
         for name, fields in TokenLMConfig.presets.items() if name not in ("tiny", "tiny-style", "music")}
    default_preset: ClassVar[str] = "music"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "tiny-style": {"steps": 20, "batch_size": 4},
        "music": {"steps": 12_000, "batch_size": 16, "lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.1,
                  "warmup": 200, "schedule": "cosine", "final_lr": 0.05, "precision": "auto", "ema": 0.998,
                  "save_every": 250, "cache_latents": True},
    } | {size: {"steps": 1_000_000, "batch_size": 192, "lr": 1e-4, "betas": (0.9, 0.95), "weight_decay": 0.1,
                "warmup": 4000, "schedule": "cosine", "ema": 0.99, "save_every": 2000} for size in SIZES}

    @model_validator(mode="after")
    def _fits(self) -> Self:
        n, c = self.net, self.codec.net
        if (n.codebooks, n.bins) != (c.codebooks, c.bins):
            raise ValueError(f"net: {n.codebooks} codebooks of {n.bins}, the codec has {c.codebooks} of {c.bins}")
        if n.style and n.style.features == "tokens" and (n.style.bins_in != c.bins or n.style.quantizers > c.codebooks):
            raise ValueError(f"net.style: tokens of {n.style.quantizers} codebooks of {n.style.bins_in}, the codec has "
                             f"{c.codebooks} of {c.bins}")
        if n.style and n.style.longest >= self.seconds:
            raise ValueError(f"net.style.longest {n.style.longest}: less than the {self.seconds} seconds of a clip")
        if n.chroma and not n.style and n.chroma != self.melody.bins:
            raise ValueError(f"net.chroma {n.chroma}: the melody has {self.melody.bins} bins")
        if self.stride >= self.seconds:
            raise ValueError(f"stride {self.stride}: less than the {self.seconds} seconds of a window")
        return self

    @property
    def rate(self) -> int:
        """Samples a second of the sounds it is trained on."""
        return self.codec.net.rate

    @property
    def channels(self) -> int:
        """Channels of the sounds."""
        return self.codec.net.channels

    def adapt(self, facts: Any) -> Self:
        """A copy fitted to a data set: the words of its captions, and the network's width for them."""
        words = facts.words or facts.classes
        conditioner = self.conditioner.adapt(words, tuple(s for s in facts.styles if s))
        width = {"context_dim": conditioner.encoder.dim} if isinstance(conditioner, TextCondConfig) else {}
        return self.model_copy(update={"conditioner": conditioner, "net": self.net.model_copy(update=width)})

    def frames(self, seconds: float) -> int:
        """Frames of so many seconds, at least one."""
        return max(1, int(seconds * self.codec.net.frame_rate + 1e-6))

    def build(self) -> "MusicGen":
        """The system with its initial weights; an external codec is attached by the loader."""
        return MusicGen(self)


class Piece(NamedTuple):
    """One call of generate: text conditions, each side of guidance, what is followed, and how tokens fall.

    melody [1, T] or None; style: of the whole piece, or None.
    """

    sides: tuple[Cond, ...]
    melody: Tensor | None
    score: Callable[[Tensor], Tensor]
    pick: Callable[[Tensor], Tensor]
    frames: int
    style: Heard | None = None


class MusicGen(nn.Module):
    """A language model between a frozen codec of sound and a text encoder."""

    takes = frozenset({"prompt", "negative_prompt", "guidance", "guidance_style", "duration", "temperature", "top_k",
                       "top_p", "melody", "continued"})

    def __init__(self, config: MusicGenConfig):
        super().__init__()
        self.config = config
        self.base: Path | None = None               # the model's own folder, where it has MERT
        self.net: TokenLM = config.net.build()
        self.conditioner = config.conditioner.build() if config.net.text != "none" else None
        self.codec = config.codec.build()
        self.external = config.codec.external()

    def admit(self, part: str, system: nn.Module) -> None:
        """ModelError for a codec whose tokens are not those that the network was built for."""
        ours, theirs = self.config.codec.net, system.config.net
        same = ("kind", "rate", "codebooks", "bins", "hop", "channels")
        if any(getattr(ours, name) != getattr(theirs, name, None) for name in same):
            raise ModelError(f"the codec {self.external[part]} makes other tokens than this model was trained on",
                             hint="--set codec.weights=NAME of the codec that it was trained with")

    def phases(self) -> tuple[Phase, ...]:
        """The language model, together with a conditioner that has weights."""
        learns = self.conditioner is not None and any(True for _ in self.conditioner.parameters())
        trained = nn.ModuleDict({"net": self.net, "cond": self.conditioner}) if learns else self.net
        return (Phase("tokens", trained, self.loss),)

    def encode(self, x: Tensor) -> Tensor:
        """Sounds [B, C, T] in [-1, 1] -> codes [B, K, T]; nothing is learnt from."""
        with full_precision(x):
            return self._its_codec().codes(x)

    def decode(self, codes: Tensor) -> Tensor:
        """The inverse of `encode`, clipped to [-1, 1]."""
        return self._its_codec().from_codes(codes).float().clamp(-1, 1)

    def _its_codec(self) -> nn.Module:
        if self.codec is None:
            raise _without_codec()
        return self.codec

    def loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        """Cross entropy of the next token, a mean over codebooks of the mean over their codes; each to log.

        Steps that some codebook has no code for are left out, and so is the excerpt whose style is told. "codes"
        [B, K, T] may stand in for "audio" in the batch, and "chroma" [B, F, N] for its melody.
        """
        n = self.config.net
        with torch.no_grad():
            codes = batch["codes"] if "codes" in batch else self.encode(batch["audio"])
        frames = codes.shape[-1]
        sequence = delay(codes, n.pattern, n.bins)[..., :frames + 1]
        counted = holds(n.pattern, frames, codes.device)[:, 1:frames + 1]
        cond, learnt = self._training_cond(batch, codes, rng)
        if learnt is not None:
            places = learnt.long().expand(1, n.codebooks, -1)
            counted = counted & delay(places, n.pattern, 0)[0, :, 1:frames + 1].bool()
        scores = self.net(sequence[..., :-1], cond).float()
        surprise = F.cross_entropy(scores.movedim(-1, 1), sequence[..., 1:].clamp_max(n.bins - 1), reduction="none")
        each = (surprise * counted).sum((0, 2)) / (len(codes) * counted.sum(1).clamp_min(1))
        return {"loss": each.mean()} | {f"codebook_{k}": value.detach() for k, value in enumerate(each)}

    def _training_cond(self, batch: dict, codes: Tensor, rng: torch.Generator) -> tuple[Cond, Tensor | None]:
        """The clips' conditions, some of them dropped: text becomes zero vectors, a melody that of silence.

        Also which frames are to be learnt, None = all.
        """
        c, count = self.config, len(codes)
        drop, quiet = (torch.rand(count, generator=rng) < p for p in (c.p_uncond, c.p_melody))
        drop, quiet = drop.to(codes.device), (drop | quiet).to(codes.device)
        cond: Cond = {}
        if self.conditioner is not None:
            words = self.conditioner.training_cond(batch | {"style": torch.zeros_like(codes[:, 0, 0])}, rng)
            cond = {"context": words["context"], "context_mask": _mask(words) & ~drop[:, None]}
        if not c.net.chroma:
            return cond, None
        if c.net.style:
            heard = followed.style_of_clips(self, codes, rng)
        else:
            with torch.no_grad():
                heard = followed.melody_of_clips(self, batch, codes)
        return cond | heard.cond(quiet), heard.learnt

    def used_settings(self, request: SampleRequest) -> dict:
        """What a request's open settings become with this model."""
        c = self.config
        used = {"duration": c.seconds, "guidance": c.guidance, "temperature": c.temperature, "top_k": c.top_k,
                "top_p": c.top_p}
        return {name: value for name, value in used.items() if getattr(request, name) is None}

    def check(self, request: SampleRequest) -> None:
        """UsageError or InputError for what this model cannot do, ModelError where it has no codec."""
        refuse(request, self.takes, "this model writes tokens one after another: it has no such setting")
        if self.codec is None and not self.external:
            raise _without_codec()
        if request.prompt is not None and self.conditioner is None:
            raise InputError("this model reads no text: it takes no prompt", hint="leave --prompt out")
        if request.melody is not None and not self.config.net.chroma:
            raise UsageError("--melody: this model follows none", hint="a melody or style model does")
        if request.guidance_style is not None and (request.melody is None or request.prompt is None):
            raise UsageError("--guidance-style weighs a melody against a prompt", hint="give both, or leave it out")
        for prompt in (request.prompt, request.negative_prompt):
            if prompt is not None and self.conditioner is not None:
                self.conditioner.check(prompt)
        if request.continued is not None and request.duration is not None:
            self._check_length(request.continued, request.duration)

    def _check_length(self, path: str, seconds: float) -> None:
        """InputError for a sound that leaves nothing to go on with."""
        from nexus.sounds import facts  # training and eval do without a reader of files
        heard, c = facts(path), self.config
        given = heard.samples / heard.rate
        if -(-round(given * c.rate) // c.codec.net.hop) >= c.frames(seconds):
            raise InputError(f"{path} is {given:.4g} s long, and the {seconds:g} s asked for count from its beginning",
                             hint=f"--duration {math.floor(given) + 10}, or none")

    @torch.inference_mode()
    def generate(self, request: SampleRequest, *, seeds: list[int], watch: Callable[..., Any] | None = None) -> Media:
        """One piece a seed, of request.duration seconds, a continued sound included.

        watch(step, steps, codes, decode): decode(codes) is what there is so far. Raises as `check` does.
        """
        self.check(request)
        c = self.config
        known = self._known(request, len(seeds))
        seconds = request.duration or (c.seconds + known.shape[-1] / c.codec.net.frame_rate)
        piece, notes = self._piece(request, seeds, c.frames(seconds))
        codes = self.write(piece, known, watch)
        samples = min(max(1, round(seconds * c.rate)), codes.shape[-1] * c.codec.net.hop)
        sound = torch.cat([self.decode(one) for one in codes.split(1)])     # of a batch's shape it would be rounded
        return Media("audio", sound[..., :samples], notes, c.rate)

    def _known(self, request: SampleRequest, count: int) -> Tensor:
        """The codes [N, K, T] of the sound that is gone on with; T = 0 where there is none."""
        device, c = self.net.emb.weight.device, self.config
        if request.continued is None:
            return torch.empty(count, c.net.codebooks, 0, dtype=torch.long, device=device)
        sound = _sound(request.continued, c.rate, c.channels)
        return self.encode(sound[None].to(device)).expand(count, -1, -1)

    def _piece(self, request: SampleRequest, seeds: list[int], frames: int) -> tuple[Piece, tuple[dict, ...]]:
        c, device = self.config, self.net.emb.weight.device
        melody, style = None, followed.no_style(self, len(seeds)) if c.net.style else None
        if request.melody is not None:
            if c.net.style:
                style = followed.style_of_sound(self, request.melody, seeds, _sound)
            else:
                melody = _sound(request.melody, c.rate, 1).to(device)
        scale = c.guidance if request.guidance is None else request.guidance
        sides, notes = self._sides(request, len(seeds), scale, device)
        settings = {name: getattr(c if getattr(request, name) is None else request, name)
                    for name in ("temperature", "top_k", "top_p")}
        rngs = [generator(seed, "tokens") for seed in seeds]
        score = combined(len(sides), scale, request.guidance_style)
        return Piece(sides, melody, score, chooser(rngs, **settings), frames, style), notes

    def _sides(self, request: SampleRequest, n: int, scale: float,
               device: torch.device) -> tuple[tuple[Cond, ...], tuple[dict, ...]]:
        """The text of each side of guidance: all conditions, the melody alone for double guidance, none."""
        double = request.guidance_style is not None
        told = request.prompt is not None or request.melody is not None
        alone = not told or scale == 1 and not double
        count = 1 if alone else 3 if double else 2
        if self.conditioner is None:
            return ({},) * count, ({},) * n
        words, notes = self._words(request.prompt, n, device)
        null = {"context": torch.zeros_like(words["context"]), "context_mask": torch.zeros_like(words["context_mask"])}
        away = self._words(request.negative_prompt, n, device)[0] if request.negative_prompt else null
        return aligned(*((words,), (words, away), (words, null, away))[count - 1]), notes

    def _words(self, prompt: str | None, n: int, device: torch.device) -> tuple[Cond, tuple[dict, ...]]:
        """A prompt's vectors and their mask, [n, L, C] and [n, L]; of no prompt, zeros."""
        if prompt:
            cond, notes = self.conditioner.prompts([prompt] * n, device)
            return {"context": cond["context"], "context_mask": _mask(cond)}, notes
        encoder = getattr(self.config.conditioner, "encoder", None)
        length = encoder.length if encoder is not None else 1
        return {"context": torch.zeros(n, length, self.config.net.context_dim, device=device),
                "context_mask": torch.zeros(n, length, dtype=torch.bool, device=device)}, ({},) * n

    def write(self, piece: Piece, known: Tensor, watch: Callable[..., Any] | None = None) -> Tensor:
        """The piece's codes [N, K, T], of which those known [N, K, t] come first."""
        c, codes = self.config, known
        size, stride = c.frames(c.seconds), c.frames(c.stride)
        spans = list(windows(piece.frames, size, stride, known.shape[-1]))
        late, at = max(c.net.pattern), known.shape[-1]
        steps = piece.frames - at + late * len(spans)
        done = 0
        for start, stop in spans:
            seen = watch and partial(self._watch, watch, codes[..., :start], done, steps)
            prepared = self.net.prepare(self._window_cond(piece, start, len(spans) > 1, len(known)))
            made = self._window(piece, prepared, codes[..., start:], stop - start, seen)
            done += stop - codes.shape[-1] + late
            codes = torch.cat([codes[..., :start], made], -1)
        return codes

    def _window(self, piece: Piece, prepared: Prepared, known: Tensor, frames: int, watch: Callable | None) -> Tensor:
        """Codes [N, K, frames] that begin with the known ones [N, K, t]."""
        n, count = self.config.net, len(piece.sides)
        open_places = known.new_full((*known.shape[:2], frames - known.shape[-1]), UNKNOWN)
        sequence = delay(torch.cat([known, open_places], -1), n.pattern, n.bins)
        cache = self.net.cache(count * len(known), sequence.shape[-1], prepared)

        def logits(new: Tensor, position: int) -> Tensor:
            scores = self.net(new.repeat(count, 1, 1), prepared=prepared, cache=cache, last=True)
            return piece.score(scores[:, :, 0].float())
        return undelay(autoregressive(logits, sequence, piece.pick, watch=watch), n.pattern)

    def _window_cond(self, piece: Piece, start: int, many: bool, n: int) -> Cond:
        """The sides of guidance below one another, with the melody as the window from frame `start` hears it."""
        c = self.config
        sides = piece.sides
        if c.net.chroma:
            heard = piece.style or followed.melody_in_window(self, piece.melody, start * c.codec.net.hop, many, n)
            sides = tuple(side | heard.cond(quiet=i > 0 and i == len(sides) - 1) for i, side in enumerate(sides))
        cond = sides[0]
        for side in sides[1:]:
            cond = joined(cond, side)
        return cond

    def _watch(self, watch: Callable[..., Any], before: Tensor, done: int, steps: int, step: int, of: int,
               sequence: Tensor) -> None:
        """From a window's steps to those of the piece."""
        def decode(part: Tensor) -> Tensor:
            whole = F.pad(part, (0, max(0, 1 + max(self.config.net.pattern) + 1 - part.shape[-1])))
            codes = undelay(whole, self.config.net.pattern).clamp(0, self.config.net.bins - 1)
            return self.decode(torch.cat([before, codes], -1))
        watch(done + step, steps, sequence, decode)


def _without_codec() -> ModelError:
    return ModelError("this model was converted without its codec: it makes tokens and no sound",
                      hint="convert it again with --set codec.weights=CODEC, a model of encodec")


def _mask(cond: Cond) -> Tensor:
    """Which of a text's vectors [B, L] are more than padding."""
    context = cond["context"]
    return cond.get("context_mask", torch.ones(context.shape[:2], dtype=torch.bool, device=context.device))


def combined(count: int, scale: float, outer: float | None) -> Callable[[Tensor], Tensor]:
    """Scores [count * B, ...] of the sides of guidance, the one without conditions last -> [B, ...]; see `guided`."""
    def score(scores: Tensor) -> Tensor:
        if count == 1:
            return scores
        cond, *style, null = scores.chunk(count)
        return guided(cond, null, scale, style=style[0], outer=outer) if style else guided(cond, null, scale)
    return score


def _sound(path: str, rate: int, channels: int) -> Tensor:
    """A file as [C, T] at this rate."""
    from nexus.sounds import read_sound  # training and eval do without a reader of files
    return torch.from_numpy(read_sound(path, rate, channels))
