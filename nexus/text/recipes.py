"""How published models use CLIP and T5: which layer, which width, what is cut, what is pooled.

SD = Rombach et al. 2022; SDXL = Podell et al. 2023; SD3 = Esser et al. 2024; FLUX = Black Forest Labs 2024;
PixArt-alpha = Chen et al. 2023; t5 = MusicGen, Copet et al. 2023. D, E = widths of two CLIPs, F = width of
T5, L = 77, S = T5's length.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus.errors import ModelError
from nexus.text import chunks
from nexus.text.folders import EXTRA, Place
from nexus.text.weighting import Part

T5_WIDTH = 4096                     # of the place that SD3 leaves for a T5 that is not there
OPENCLIP_H = (1024, 23)             # width and layers of the SD 2 encoders that are saved without their last layer


class Loaded(NamedTuple):
    """An encoder in memory with its tokenizer."""

    model: Any
    tokenizer: Any

    @property
    def length(self) -> int:
        """Ids in a CLIP's window."""
        return self.model.config.max_position_embeddings


class Encoded(NamedTuple):
    """One prompt's conditions, the batch of 1 first, and the text that found no place."""

    cond: dict[str, Tensor]
    cut: str = ""


class Recipe(NamedTuple):
    """kinds: the transformers class of each encoder, in order. optional: how many of the last may be missing.

    encode(encoders, parts, length, skip) -> Encoded, skip = CLIP layers left out beyond the recipe's own.
    length: ids of T5. lower: prompts are made lower case, without blanks around.
    """

    kinds: tuple[str, ...]
    encode: Callable[[list[Loaded | None], list[Part], int, int], Encoded]
    length: int = 0
    optional: int = 0
    lower: bool = False


def load(place: Place, kind: str, device: torch.device) -> Loaded:
    """An encoder and its tokenizer from their folders; ModelError when transformers or a file is missing or damaged.

    Stored half precision is kept, except on a CPU, which computes in float32.
    """
    try:
        import transformers
    except ImportError:
        raise ModelError("pretrained text encoders need the package transformers, which is not installed",
                         hint=EXTRA) from None
    transformers.utils.logging.disable_progress_bar()
    dtype = torch.float32 if device.type == "cpu" else "auto"
    options = {"local_files_only": True, "trust_remote_code": False}
    try:
        model = getattr(transformers, kind).from_pretrained(place.encoder, dtype=dtype, use_safetensors=True,
                                                            local_files_only=True)
        tokenizer = transformers.AutoTokenizer.from_pretrained(place.tokenizer, **options)
    except Exception as error:              # whatever a stranger's file makes these libraries raise
        raise ModelError(f"cannot load the text encoder in {place.encoder}: {str(error).splitlines()[0]:.200}",
                         hint="safetensors weights, config.json and tokenizer files are needed") from error
    if not tokenizer.is_fast:
        raise ModelError(f"the tokenizer in {place.tokenizer} has no tokenizer.json, nor files to make one from")
    return Loaded(model.eval().requires_grad_(False).to(device), tokenizer)


def _run(encoder: Loaded, rows: list[chunks.Row], skip: int, *, norm: bool = False) -> tuple[Tensor, Tensor]:
    """Rows through a CLIP -> hidden [1, n L, D], `skip` layers before the last, and the first window's pooled [1, P].

    norm: an earlier layer too goes through the final norm, as the last one always does.
    """
    ids = torch.tensor([row.ids for row in rows], device=encoder.model.device)
    out = encoder.model(ids, output_hidden_states=skip > 0)
    hidden = out.hidden_states[-1 - skip] if skip else out.last_hidden_state
    if norm and skip:
        hidden = getattr(encoder.model, "text_model", encoder.model).final_layer_norm(hidden)
    pooled = out.text_embeds if "text_embeds" in out else out.pooler_output
    return _weighted(hidden, rows).flatten(0, 1)[None], pooled[:1]


def _weighted(hidden: Tensor, rows: list[chunks.Row]) -> Tensor:
    """hidden [n, L, D] times the rows' weights, each window keeping its mean, as AUTOMATIC1111 does it.

    A window whose weights are all 1 is untouched.
    """
    weights = torch.tensor([row.weights for row in rows], device=hidden.device, dtype=torch.float32)
    changed = (weights != 1).any(1)
    if not changed.any():
        return hidden
    heavy = hidden.float() * weights[..., None]
    ratio = hidden.float().mean((1, 2)) / heavy.mean((1, 2))
    # A mean near zero, as after a layer norm, says nothing about size: then the weights alone count.
    ratio = torch.where((ratio > 0.5) & (ratio < 2), ratio, 1.0)
    return torch.where(changed[:, None, None], heavy * ratio[:, None, None], hidden.float()).to(hidden.dtype)


def _clip_context(encoders: list[Loaded], parts: list[Part], length: int, skip: int, *, own: int) -> Encoded:
    """SD 1 and 2: the last or an earlier hidden layer, always through the final norm; windows side by side."""
    clip, = encoders
    config = clip.model.config
    cut_already = own and (config.hidden_size, config.num_hidden_layers) == OPENCLIP_H
    skip += 0 if cut_already else own
    rows = chunks.clip_rows(clip.tokenizer, parts, clip.length)
    return Encoded({"context": _run(clip, rows, skip, norm=True)[0]})


def sd(encoders: list[Loaded], parts: list[Part], length: int, skip: int) -> Encoded:
    """CLIP-L's last hidden layer, normalised: context [1, n L, D]."""
    return _clip_context(encoders, parts, length, skip, own=0)


def sd2(encoders: list[Loaded], parts: list[Part], length: int, skip: int) -> Encoded:
    """OpenCLIP-H's penultimate layer, normalised: context [1, n L, D]."""
    return _clip_context(encoders, parts, length, skip, own=1)


def sdxl(encoders: list[Loaded], parts: list[Part], length: int, skip: int) -> Encoded:
    """The penultimate layers of CLIP-L and OpenCLIP-G side by side [1, n L, D + E], G's projected pooled vector."""
    rows = [chunks.clip_rows(clip.tokenizer, parts, clip.length) for clip in encoders]
    count = max(len(r) for r in rows)
    empty = [Part("", ())]
    for clip, own in zip(encoders, rows, strict=True):
        own += chunks.clip_rows(clip.tokenizer, empty, clip.length) * (count - len(own))
    hidden, pooled = zip(*(_run(clip, own, 1 + skip) for clip, own in zip(encoders, rows, strict=True)), strict=True)
    return Encoded({"context": torch.cat(hidden, -1), "pooled": pooled[-1]})


def sd3(encoders: list[Loaded | None], parts: list[Part], length: int, skip: int) -> Encoded:
    """CLIP-L and G as in SDXL, filled up with zeros to T5's width, then T5: context [1, 77 + S, F]; both pooled."""
    *clips, t5 = encoders
    rows, cuts = zip(*(chunks.clip_row(clip.tokenizer, parts, clip.length) for clip in clips), strict=True)
    hidden, pooled = zip(*(_run(clip, [row], 1 + skip) for clip, row in zip(clips, rows, strict=True)), strict=True)
    words = torch.cat(hidden, -1)
    if t5 is None:
        far, cut = words.new_zeros(1, length, T5_WIDTH), cuts[0]
    else:
        far, _, cut = _t5(t5, parts, length, masked=False)      # what CLIP lacks, T5 still has
    words = F.pad(words, (0, far.shape[-1] - words.shape[-1]))
    return Encoded({"context": torch.cat([words, far.to(words.dtype)], 1), "pooled": torch.cat(pooled, -1)}, cut)


def flux(encoders: list[Loaded], parts: list[Part], length: int, skip: int) -> Encoded:
    """T5: context [1, S, F]; CLIP-L's pooled vector."""
    clip, t5 = encoders
    row, _ = chunks.clip_row(clip.tokenizer, parts, clip.length)
    _, pooled = _run(clip, [row], 0)
    words, _, cut = _t5(t5, parts, length, masked=False)
    return Encoded({"context": words, "pooled": pooled}, cut)


def pixart(encoders: list[Loaded], parts: list[Part], length: int, skip: int) -> Encoded:
    """T5 that does not look at padding: context [1, S, F] and its mask [1, S]."""
    words, mask, cut = _t5(encoders[0], parts, length, masked=True)
    return Encoded({"context": words, "context_mask": mask}, cut)


def t5(encoders: list[Loaded], parts: list[Part], length: int, skip: int) -> Encoded:
    """T5 of the prompt's own length, without padding: context [1, S, F] and its mask [1, S]; S <= length."""
    encoder, = encoders
    row, cut = chunks.t5_row(encoder.tokenizer, parts, length)
    row = row._replace(ids=row.ids[:row.used], weights=row.weights[:row.used])
    hidden = encoder.model(torch.tensor([row.ids], device=encoder.model.device)).last_hidden_state
    hidden = _weighted(hidden, [row])
    return Encoded({"context": hidden, "context_mask": torch.ones_like(hidden[..., 0], dtype=torch.bool)}, cut)


def _t5(encoder: Loaded, parts: list[Part], length: int, *, masked: bool) -> tuple[Tensor, Tensor, str]:
    row, cut = chunks.t5_row(encoder.tokenizer, parts, length)
    device = encoder.model.device
    mask = (torch.arange(length, device=device) < row.used)[None]
    hidden = encoder.model(torch.tensor([row.ids], device=device),
                           attention_mask=mask.long() if masked else None).last_hidden_state
    return _weighted(hidden, [row]), mask, cut


L, G, T5 = "CLIPTextModel", "CLIPTextModelWithProjection", "T5EncoderModel"
RECIPES: dict[str, Recipe] = {
    "sd": Recipe((L,), sd),
    "sd2": Recipe((L,), sd2),
    "sdxl": Recipe((L, G), sdxl),
    "sd3": Recipe((G, G, T5), sd3, length=256, optional=1),
    "flux": Recipe((L, T5), flux, length=512),
    "pixart": Recipe((T5,), pixart, length=120, lower=True),
    "t5": Recipe((T5,), t5, length=512),
}
