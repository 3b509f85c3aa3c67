"""Pretrained text encoders as a conditioner: frozen, never in the model's own file, each prompt encoded once.

The encoders come from a folder or a hub name, through the packages transformers and tokenizers (extra `text`). A
prompt's tensors are kept on disk under a hash of the encoders, the recipe and the text, so that a second run of the
same prompt loads no encoder at all.
"""

import contextlib
import hashlib
import json
from collections import OrderedDict
from pathlib import Path
from typing import Literal, Self

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from nexus.atomic import cache_folder, write_bytes
from nexus.config import Config
from nexus.errors import InputError, OutputError
from nexus.text.conditioner import aligned
from nexus.text.folders import Place, digest, is_here, places
from nexus.text.recipes import RECIPES, Encoded, Loaded, load
from nexus.text.weighting import parse, plain

MADE_BY = 1             # changes when the same text and encoders would give other tensors
RECENT = 16             # prompts kept in memory


class PretrainedCondConfig(Config):
    """Which pretrained encoders, and how they are used.

    encoders: one pipeline folder, or a folder or hub name for each encoder of the recipe; "./x" lies in the model's
    own folder. length: T5's ids; 0 = the recipe's (sd3 256, flux and t5 512, pixart 120). clip_skip: CLIP layers left
    out beyond the recipe's own. null: what no prompt is, the encoded empty text or zeros (SDXL). weighting: brackets
    weigh words. keep: encoders stay in memory between prompts. cache: encoded prompts are kept on disk.
    """

    kind: Literal["pretrained"] = "pretrained"
    recipe: Literal[tuple(RECIPES)] = "sd"
    encoders: tuple[str, ...] = ()
    length: int = Field(0, ge=0, le=4096)
    clip_skip: int = Field(0, ge=0, le=23)
    null: Literal["empty", "zeros"] = "empty"
    weighting: bool = True
    keep: bool = True
    cache: bool = True

    def adapt(self, classes: tuple[str, ...], styles: tuple[str, ...]) -> Self:
        """Nothing to fit: the encoders know their words."""
        return self

    def build(self) -> "PretrainedConditioner":
        """The conditioner; nothing is loaded before the first prompt."""
        return PretrainedConditioner(self)


class PretrainedConditioner(nn.Module):
    """Prompts -> the recipe's conditions. It has no parameters: the encoders are no part of the model.

    base: the model's folder, set by the loader, from which "./x" counts.
    """

    def __init__(self, config: PretrainedCondConfig):
        super().__init__()
        self.config = config
        self.recipe = RECIPES[config.recipe]
        self.base: Path | None = None
        self._loaded: list[Loaded | None] | None = None     # a list, so that no encoder becomes a submodule
        self._recent: OrderedDict[str, Encoded] = OrderedDict()
        self._found: tuple[list[Place | None], str] | None = None
        self.extras: tuple = ()                             # see `dress`

    def dress(self, extras: tuple) -> None:
        """Change the encoders and prompts by these from now on; () = by nothing.

        Each has a digest; apply(encoders), called with the list of freshly loaded ones; and words(prompt) -> prompt.
        """
        self.extras = tuple(extras)
        self.drop()

    def training_cond(self, batch: dict, rng: torch.Generator) -> dict[str, Tensor]:
        """The encoded captions of a training batch."""
        device = next(value.device for value in batch.values() if isinstance(value, Tensor))
        return self.prompts(list(batch["caption"]), device)[0]

    def prompts(self, prompts: list[str | None], device: torch.device) -> tuple[dict[str, Tensor], tuple[dict, ...]]:
        """Each prompt encoded, with a note of what was cut; None is the null. Raises InputError and ModelError."""
        made = {prompt: self._null(device) if prompt is None else self._encoded(prompt, device)
                for prompt in dict.fromkeys(prompts)}
        if not self.config.keep:
            self.drop()
        notes = tuple({} if p is None else {"caption": p} | ({"cut": made[p].cut} if made[p].cut else {})
                      for p in prompts)
        return _stacked([made[p].cond for p in prompts]), notes

    def check(self, prompt: str) -> None:
        """InputError for brackets that weigh a word absurdly; no encoder is loaded."""
        if self.config.weighting:
            parse(prompt)

    def widths(self) -> list[int]:
        """How many numbers a word of each encoder has, by their configurations; none where one is not on this disk."""
        if not all(is_here(name, self.base) for name in self.config.encoders):
            return []
        found = places(self.config.encoders, len(self.recipe.kinds), self.base, optional=self.recipe.optional)
        return [json.loads((place.encoder / "config.json").read_text("utf-8")).get("hidden_size") for place in found
                if place]

    def null(self, n: int, device: torch.device) -> dict[str, Tensor]:
        """n times no prompt."""
        return self.prompts([None] * n, device)[0]

    def drop(self) -> None:
        """Free the encoders' memory; the next new prompt loads them again."""
        self._loaded = None

    def _null(self, device: torch.device) -> Encoded:
        empty = self._encoded("", device)
        if self.config.null == "empty":
            return empty
        return Encoded({name: torch.zeros_like(value) for name, value in empty.cond.items()})     # masks too: no word

    def _encoded(self, prompt: str, device: torch.device) -> Encoded:
        """From memory, from disk, or made and kept in both."""
        key = self._key(prompt, device)
        found = self._recent.get(key) or (_read(key) if self.config.cache else None)
        if found is None:
            found = self._encode(prompt, device)
            if self.config.cache:
                _write(key, found)
        self._recent[key] = found
        if len(self._recent) > RECENT:
            self._recent.popitem(last=False)
        return Encoded({name: value.to(device) for name, value in found.cond.items()}, found.cut)

    @torch.no_grad()
    def _encode(self, prompt: str, device: torch.device) -> Encoded:
        if self._loaded is None or any(e is not None and e.model.device != device for e in self._loaded):
            self._loaded = [place and load(place, kind, device)
                            for place, kind in zip(self._where()[0], self.recipe.kinds, strict=True)]
            for extra in self.extras:
                extra.apply(self._loaded)
        for extra in self.extras:
            prompt = extra.words(prompt)
        text = prompt.lower().strip() if self.recipe.lower else prompt
        parts = parse(text) if self.config.weighting else [plain(text)]
        cond, cut = self.recipe.encode(self._loaded, parts, self._length(), self.config.clip_skip)
        for name, value in cond.items():
            if value.is_floating_point() and not value.isfinite().all():
                raise InputError(f"the text encoders give no finite {name} for the prompt '{prompt:.80}'",
                                 hint="smaller weights, or --dtype float32")
        return Encoded({name: value.contiguous() for name, value in cond.items()}, cut)

    def _length(self) -> int:
        return self.config.length or self.recipe.length

    def _where(self) -> tuple[list[Place | None], str]:
        """The encoders' folders, and the digest of all that is in them."""
        if self._found is None:
            found = places(self.config.encoders, len(self.recipe.kinds), self.base, optional=self.recipe.optional)
            self._found = found, "-".join(digest(place) if place else "none" for place in found)
        return self._found

    def _key(self, prompt: str, device: torch.device) -> str:
        c, precise = self.config, device.type == "cpu"          # elsewhere a stored half precision is computed in
        facts = [MADE_BY, self._where()[1], c.recipe, self._length(), c.clip_skip, c.weighting, precise, prompt]
        facts += [extra.digest for extra in self.extras]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _stacked(conds: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    conds = aligned(*conds)
    return {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}


def _file(key: str) -> Path:
    return cache_folder("text") / key[:2] / f"{key}.safetensors"


def _read(key: str) -> Encoded | None:
    """What an earlier run stored, or None; a damaged file is made anew."""
    try:
        with safe_open(_file(key), "pt") as file:
            return Encoded({name: file.get_tensor(name) for name in file.keys()},        # noqa: SIM118
                           (file.metadata() or {}).get("cut", ""))
    except (OSError, SafetensorError, RuntimeError, ValueError):
        return None


def _write(key: str, found: Encoded) -> None:
    """A folder that cannot be written costs the time, not the picture."""
    with contextlib.suppress(OutputError, OSError):
        tensors = {name: value.cpu().contiguous() for name, value in found.cond.items()}
        write_bytes(_file(key), to_bytes(tensors, {"cut": found.cut}), exists="overwrite")

