"""Textual inversion: a new word of CLIP's, whose vectors were learned from a few pictures. Gal et al. 2022,
arXiv:2208.01618.
"""

import hashlib
import re

import torch
from torch import Tensor

from nexus.errors import InputError

# Keys of files that hold one word and do not name it; the number of the encoder that their vectors are for.
UNNAMED = {"emb_params": 0, "string_to_param.*": 0, "clip_l": 0, "clip_g": 1, "text_encoder": 0, "text_encoder_2": 1,
           "tensor": 0}
CLIP_ALONE = ("sd", "sd2", "sdxl")      # recipes in which no other kind of encoder reads the prompt
MOST = 75                               # vectors that a window of CLIP has room for


class Word:
    """An extra of `PretrainedConditioner`: a word of prompts that stands for learned vectors.

    vectors: number of the encoder -> [n, D], the same n in each. In the prompt the word, in any case, becomes n new
    tokens. source: for messages.
    """

    def __init__(self, word: str, vectors: dict[int, Tensor], source: str):
        self.word, self.vectors, self.source = word, vectors, source
        total = hashlib.sha256(word.encode())
        for number, rows in sorted(vectors.items()):
            total.update(f"{number} {tuple(rows.shape)}".encode() + rows.float().numpy().tobytes())
        self.digest = total.hexdigest()
        count = len(next(iter(vectors.values())))
        self.tokens = [f"<word{self.digest[:12]}n{i}>" for i in range(count)]
        self._found = re.compile(rf"(?<!\w){re.escape(word)}(?!\w)", re.IGNORECASE)

    def words(self, prompt: str) -> str:
        """The prompt with the word's tokens in its place."""
        return self._found.sub(" ".join(self.tokens), prompt)

    def check(self, widths: list[int]) -> None:
        """InputError for an encoder that it has no vectors for; widths: the numbers of a word, of each."""
        for number, width in enumerate(widths):
            rows = self.vectors.get(number)
            if rows is None or rows.shape[1] != width:
                has = "no vectors" if rows is None else f"vectors of {rows.shape[1]} numbers"
                raise InputError(f"{self.source} has {has} for text encoder {number + 1}, whose words have {width}",
                                 hint="was it learned with another model, such as SD 2 or SDXL?")

    @torch.no_grad()
    def apply(self, encoders: list) -> None:
        """Teach the word to encoders that were just loaded. Raises as `check`."""
        self.check([model.config.hidden_size for model, _ in encoders])
        for number, (model, tokenizer) in enumerate(encoders):
            rows = self.vectors[number]
            tokenizer.add_tokens(self.tokens)
            ids = tokenizer.convert_tokens_to_ids(self.tokens)
            model.resize_token_embeddings(max(*ids, model.config.vocab_size - 1) + 1, mean_resizing=False)
            table = model.get_input_embeddings().weight
            table[ids] = rows.to(table)
            for part in model.modules():        # an old config finds the end of a text by its highest id
                if getattr(part, "eos_token_id", None) == 2:
                    part.eos_token_id = tokenizer.eos_token_id


def word_of(tensors: dict[str, Tensor], name: str, source: str) -> Word:
    """The word that a file's tensors are of; name: what it is called, "" = by the file itself.

    AUTOMATIC1111's files (string_to_param, emb_params; clip_l and clip_g for SDXL) name no word, and diffusers' have it
    as their only key. Raises InputError for tensors that are no word's.
    """
    vectors = {UNNAMED[key]: _rows(tensor, source) for key, tensor in tensors.items() if key in UNNAMED}
    if not vectors and len(tensors) == 1:
        (key, tensor), = tensors.items()
        name, vectors = name or key, {0: _rows(tensor, source)}
    if not vectors or len({len(rows) for rows in vectors.values()}) > 1:
        raise InputError(f"{source} is no textual inversion: its tensors are {', '.join(sorted(tensors)[:4])}",
                         hint="a file of AUTOMATIC1111's or diffusers' layout")
    name = name or re.sub(r"(.*/)?([^/]*?)(\.\w+)?", r"\2", source)
    if not name.strip() or set(name) & set("()[]\\:"):
        raise InputError(f"'{name}' cannot be a word of prompts", hint="name it: --embedding FILE:WORD")
    return Word(name, vectors, source)


def _rows(tensor: Tensor, source: str) -> Tensor:
    rows = tensor[None] if tensor.ndim == 1 else tensor
    if rows.ndim != 2 or not 1 <= len(rows) <= MOST or not rows.isfinite().all():
        raise InputError(f"{source}: vectors of the shape {list(tensor.shape)} are no word's, or not finite",
                         hint=f"1 to {MOST} vectors are needed")
    return rows.float()


def check(conditioner: object, source: str) -> None:
    """InputError for a conditioner that a word cannot be taught to."""
    if getattr(getattr(conditioner, "config", None), "recipe", None) not in CLIP_ALONE:
        raise InputError(f"{source}: this model's text encoder learns no words",
                         hint="a Stable Diffusion with CLIP does: " + ", ".join(CLIP_ALONE))
