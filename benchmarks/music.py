"""MusicGen's decoder against transformers' generate: `python benchmarks/music.py [CASE]...` prints a table.

Nothing else may run on the machine meanwhile. Weights are random and go through the key table of `nexus convert`; both
sides have the same ones, dtype and threads, are guided and take the likeliest token, so that in float32 all must agree
(in bfloat16 near ties fall either way).
"""

import sys
from collections.abc import Callable
from types import SimpleNamespace

import torch
from compare import DTYPES, Result, compare, table
from transformers import (
    EncodecConfig,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    T5Config,
)

from nexus.convert.keymap import to_native
from nexus.convert.layouts.musicgen import LAYOUTS
from nexus.decode.choose import chooser
from nexus.models.audio.musicgen import MusicGenConfig, Piece, combined

FRAMES, WORDS, SCALE = 32, 12, 3.0
LAYOUT = next(one for one in LAYOUTS if one.name == "transformers")
WHAT = ("decoder.", "enc_to_dec_proj.")                  # of the peer's keys, those of the language model


def peer_of(net, dtype: torch.dtype) -> MusicgenForConditionalGeneration:
    """A random model of this size, whose encoders are small: they are not what is measured."""
    torch.manual_seed(0)
    decoder = MusicgenDecoderConfig(
        vocab_size=net.bins, hidden_size=net.dim, num_hidden_layers=net.depth, num_attention_heads=net.heads,
        ffn_dim=int(net.dim * net.mlp_ratio), num_codebooks=net.codebooks, pad_token_id=net.bins, bos_token_id=net.bins)
    text = T5Config(vocab_size=32, d_model=net.context_dim, d_kv=8, d_ff=8, num_layers=1, num_heads=1)
    sound = EncodecConfig(num_filters=4, hidden_size=8, upsampling_ratios=[4, 2], codebook_size=net.bins)
    config = MusicgenConfig(text_encoder=text.to_dict(), audio_encoder=sound.to_dict(), decoder=decoder.to_dict())
    model = MusicgenForConditionalGeneration(config).to(dtype).eval()
    model.generation_config.update(decoder_start_token_id=net.bins, pad_token_id=net.bins, bos_token_id=net.bins)
    model.audio_encoder.decode = lambda codes, **more: SimpleNamespace(audio_values=codes)     # tokens, not sound
    return model


def guided(dtype: torch.dtype, preset: str = "small", count: int = 1) -> Result:
    """A whole guided run of `count` pieces."""
    config = MusicGenConfig.preset(preset)
    config = config.model_copy(update={"codec": config.codec.model_copy(update={"weights": ""})})
    peer = peer_of(config.net, dtype)
    with torch.device("meta"):
        system = config.build()
    state = {key: value for key, value in peer.state_dict().items() if key.startswith(WHAT)}
    system.net.load_state_dict(to_native(LAYOUT.table(config.to_json()), state), assign=True)
    system.eval()
    ids = torch.randint(2, 32, (count, WORDS), generator=torch.Generator().manual_seed(0))
    seen = torch.ones_like(ids)
    with torch.inference_mode():
        words = peer.text_encoder(ids, seen).last_hidden_state
    sides = tuple({"context": words, "context_mask": torch.full((count, WORDS), told)} for told in (True, False))
    piece = Piece(sides, None, combined(2, SCALE, None), chooser([], temperature=0), FRAMES)
    empty = torch.empty(count, config.net.codebooks, 0, dtype=torch.long)

    def theirs() -> torch.Tensor:
        return peer.generate(input_ids=ids, attention_mask=seen, do_sample=False, guidance_scale=SCALE,
                             max_new_tokens=FRAMES + max(config.net.pattern))[0]
    return compare(f"MusicGen-{preset}, guided, {FRAMES} frames, {count} at once", dtype,
                   lambda: system.write(piece, empty), theirs)


CASES: dict[str, Callable[[torch.dtype], Result]] = {
    "small": guided, "small-4": lambda dtype: guided(dtype, count=4), "medium": lambda dtype: guided(dtype, "medium"),
}


def main(names: list[str]) -> None:
    """Run the named cases, or all."""
    print(table([CASES[name](dtype) for name in names or CASES for dtype in DTYPES]))


if __name__ == "__main__":
    main(sys.argv[1:])
