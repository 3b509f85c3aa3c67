"""Tiny random text encoders with real tokenizers, in folders as transformers writes them."""

from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

BEGIN, END = "<|startoftext|>", "<|endoftext|>"
WORDS = ("a", "red", "green", "blue", "ball", "house", "of", "the", "cat", "photo")
PAIRS = (("b", "a"), ("ba", "l"), ("bal", "l</w>"), ("r", "e"), ("re", "d</w>"), ("c", "a"), ("ca", "t</w>"))


def clip_tokenizer(pad: str = END) -> CLIPTokenizer:
    """Every byte, every byte at a word's end, and a few merges; the begin and end marks come last."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = [*letters, *(f"{c}</w>" for c in letters), *("".join(pair) for pair in PAIRS), BEGIN, END]
    return CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=list(PAIRS), pad_token=pad,
                         model_max_length=77)


def t5_tokenizer() -> T5Tokenizer:
    """Unigram pieces: some words, and single letters for all others."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS]
    pieces += [(c, -6.0) for c in "abcdefghijklmnopqrstuvwxyz,.()[]:0123456789"]
    return T5Tokenizer(vocab=pieces, extra_ids=0)


def randomised(kind, config, seed: int) -> torch.nn.Module:
    """The same weights for the same seed; no scale stays 1, no bias 0."""
    torch.manual_seed(seed)
    model = kind(config)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape) * 0.1)
    return model.eval()


def clip(width: int = 32, *, projected: bool = False, layers: int = 3, pad: str = END, seed: int = 0):
    """A text model and its tokenizer."""
    tokenizer = clip_tokenizer(pad)
    config = CLIPTextConfig(vocab_size=len(tokenizer), hidden_size=width, intermediate_size=2 * width,
                            num_hidden_layers=layers, num_attention_heads=2, projection_dim=width + 8,
                            hidden_act="gelu" if projected else "quick_gelu", bos_token_id=tokenizer.bos_token_id,
                            eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id)
    kind = CLIPTextModelWithProjection if projected else CLIPTextModel
    return randomised(kind, config, seed), tokenizer


def t5(width: int = 96, seed: int = 5):
    """An encoder of T5 1.1's kind and its tokenizer."""
    tokenizer = t5_tokenizer()
    config = T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
                      feed_forward_proj="gated-gelu", pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    return randomised(T5EncoderModel, config, seed), tokenizer


def save(folder: Path, *encoders) -> Path:
    """A pipeline's folders: text_encoder, tokenizer, text_encoder_2, ..."""
    for i, (model, tokenizer) in enumerate(encoders):
        end = f"_{i + 1}" if i else ""
        model.save_pretrained(folder / f"text_encoder{end}")
        tokenizer.save_pretrained(folder / f"tokenizer{end}")
    return folder
