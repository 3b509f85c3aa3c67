"""What a MusicGen follows besides its text: a melody by its chroma, or the style of an excerpt.

B clips, K codebooks, T frames of codes, L vectors of what is followed, N their width.
"""

import json
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.codecs.chroma import chroma
from nexus.errors import ModelError
from nexus.rng import generator
from nexus.text.folders import located

MERT_RATE = 24_000      # samples a second that MERT hears


class Heard(NamedTuple):
    """vectors [B, L, N] and what stands for nothing, none [B, L, N].

    hides: nothing is zeros, and a mask [B, L] says so as well.
    learnt [T]: which frames of the clip the model is still to learn, all but the excerpt; None = all.
    """

    vectors: Tensor
    none: Tensor
    hides: bool = False
    learnt: Tensor | None = None

    def cond(self, quiet: Tensor | bool) -> dict[str, Tensor]:
        """The network's condition; quiet: [B] or all of them, who follows nothing."""
        quiet = torch.as_tensor(quiet, device=self.vectors.device).expand(len(self.vectors))[:, None, None]
        melody = torch.where(quiet, self.none, self.vectors)
        return {"melody": melody} | ({"melody_mask": melody.any(-1)} if self.hides else {})


def melody_of_clips(system: nn.Module, batch: dict, codes: Tensor) -> Heard:
    """The chroma of a batch; silence where it holds codes alone."""
    c = system.config
    if "chroma" in batch:
        heard = batch["chroma"]
    elif "audio" in batch:
        heard = chroma(batch["audio"].mean(1), c.rate, c.melody)
    else:
        heard = codes.new_zeros(len(codes), c.melody.frames(codes.shape[-1] * c.codec.net.hop), c.net.chroma).float()
        heard = silence(heard)
    return Heard(heard, silence(heard))


def style_of_clips(system: nn.Module, codes: Tensor, rng: torch.Generator) -> Heard:
    """The style of an excerpt of each clip, of drawn length, at one drawn place; its codebooks learn.

    ModelError for a style that is heard by MERT: the batch has no sound of its rate.
    """
    c, style = system.config, system.config.net.style
    if style.features != "tokens":
        raise ModelError("a style that MERT hears is not trained here", hint="--set net.style.features=tokens")
    drawn = style.shortest + (style.longest - style.shortest) * float(torch.rand((), generator=rng))
    total = codes.shape[-1]
    frames = min(c.frames(drawn), total - 1)
    start = int(torch.randint(total - frames + 1, (), generator=rng))
    vectors = system.net.style(codes[..., start:start + frames], rng if torch.is_grad_enabled() else None)
    place = torch.arange(total, device=codes.device)
    return Heard(vectors, torch.zeros_like(vectors), True, (place < start) | (place >= start + frames))


def melody_in_window(system: nn.Module, sound: Tensor | None, start: int, many: bool, n: int) -> Heard:
    """The chroma of sound [1, T] over a whole window that begins at sample `start`; a short one is repeated.

    As published: in a piece of several windows it is the sound that is repeated, in a piece of one its chroma.
    """
    c, device = system.config, system.net.emb.weight.device
    samples = int(c.seconds * c.rate)
    frames = c.melody.frames(samples)
    if sound is None:
        heard = silence(torch.zeros(n, frames, c.net.chroma, device=device))
        return Heard(heard, heard)
    if many:
        sound = sound[:, torch.arange(start, start + samples, device=device) % sound.shape[-1]]
    heard = chroma(sound, c.rate, c.melody)
    heard = heard.repeat(1, -(-frames // heard.shape[1]), 1)[:, :frames].expand(n, -1, -1)
    return Heard(heard, silence(heard))


def style_of_sound(system: nn.Module, path: str, seeds: list[int], read: Callable[[str, int, int], Tensor]) -> Heard:
    """The style of an excerpt of a file, its place drawn by each seed. ModelError where nothing can hear it.

    read(path, rate, channels) -> [C, T].
    """
    c, style = system.config, system.config.net.style
    device = system.net.emb.weight.device
    tokens = style.features == "tokens"
    rate = c.rate if tokens else MERT_RATE
    sound = read(path, rate, c.channels if tokens else 1).to(device)
    length = min(int(style.excerpt * rate), sound.shape[-1])
    places = [int(torch.randint(sound.shape[-1] - length + 1, (), generator=generator(s, "excerpt"))) for s in seeds]
    excerpts = torch.stack([sound[:, at:at + length] for at in places])
    heard = system.encode(excerpts) if tokens else _mert(system)(excerpts[:, 0]).last_hidden_state
    vectors = system.net.style(heard)
    return Heard(vectors, torch.zeros_like(vectors), True)


def no_style(system: nn.Module, n: int) -> Heard:
    """One vector of nothing, as published."""
    none = torch.zeros(n, 1, system.config.net.chroma, device=system.net.emb.weight.device)
    return Heard(none, none, True)


def silence(like: Tensor) -> Tensor:
    """The chroma of no melody, which is a 1 on the first bin."""
    return F.one_hot(torch.zeros(like.shape[:2], dtype=torch.long, device=like.device), like.shape[2]).to(like)


def _mert(system: nn.Module) -> nn.Module:
    """MERT (Li et al. 2023, arXiv:2306.00107) in a transformers folder, by transformers' HuBERT, which it is.

    ModelError for one that is not named, not there, or hears by a constant-Q transform as well.
    """
    if not system.config.hearing:
        raise ModelError("this model hears a style by MERT, and none is named",
                         hint="convert it again with --set hearing=FOLDER, of m-a-p/MERT-v1-95M")
    folder = located(system.config.hearing, system.base)
    from transformers import HubertConfig, HubertModel
    said = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if said.get("feature_extractor_cqt"):
        raise ModelError(f"{folder} hears by a constant-Q transform, too", hint="MERT-v1-95M does not")
    known = HubertConfig().to_dict().keys() - {"model_type", "architectures", "transformers_version", "dtype"}
    net, told = HubertModel.from_pretrained(
        folder, config=HubertConfig(**{key: value for key, value in said.items() if key in known}),
        use_safetensors=True, local_files_only=True, output_loading_info=True)
    if lost := sorted(told["missing_keys"] - {"masked_spec_embed"}):
        raise ModelError(f"{folder} lacks {lost[0]}", hint="a folder of m-a-p/MERT-v1-95M")
    return net.to(system.net.emb.weight.device).eval()
