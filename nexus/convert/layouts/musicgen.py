"""MusicGen's language model: audiocraft's state_dict.bin, and transformers' Musicgen and MusicgenMelody.

Trap: transformers hides padded text from the second attention, audiocraft lets it be seen as zero vectors. Trap: both
stack q, k and v of either attention, transformers in keys of their own. Whole folders: see `musicgen_whole`.
"""

import re

import torch
from torch import Tensor

from nexus.codecs.encodec import EncodecConfig
from nexus.convert.keymap import Row
from nexus.convert.layout import Layout, Shapes
from nexus.errors import ModelError
from nexus.nn.token_lm import TokenLMConfig

HEADS = {1024: 16, 1536: 24, 2048: 32}              # of the published models, by width
TEXT, MELODY = (f"condition_provider.conditioners.{name}.output_proj" for name in ("description", "self_wav"))
STYLE = "condition_provider.conditioners.self_wav."         # of MusicGen-Style; a melody has nothing there to learn
STYLE_HEADS = {256: 8, 512: 8, 1024: 16}                    # by width
# Settings that this network has in one value only (the first; absent counts as it).
FIXED = {"norm": ("layer_norm",), "norm_first": (True,), "bias_proj": (False,), "bias_ff": (False,),
         "bias_attn": (False,), "activation": ("gelu",), "causal": (True,), "past_context": (None,),
         "positional_embedding": ("sin",), "layer_scale": (None,), "qk_layer_norm": (False,),
         "qk_layer_norm_cross": (False,), "kv_repeat": (1,)}
PARTS = ("text_encoder", "audio_encoder")           # of a transformers folder, beside the language model


def _codec(codebooks: int, bins: int) -> dict:
    """The codec that published models of so many tokens stand on."""
    usual = EncodecConfig.presets["32khz"] | {"bins": bins}
    stereo = {"quantizers": codebooks // 2, "channels": 2, "interleave": "rows"}
    return {"net": usual | (stereo if codebooks == 8 else {"quantizers": codebooks}), "weights": ""}


def _system(net: dict) -> dict:
    return {"net": net, "codec": _codec(net["codebooks"], net["bins"]), "p_uncond": 0.2 if net["chroma"] else 0.3,
            "melody": {"bins": net["chroma"] or 12}}


def _count(shapes: Shapes, pattern: str) -> int:
    return sum(re.fullmatch(pattern, key) is not None for key in shapes)


def _delays(codebooks: int, channels: int) -> list[int]:
    return [k // channels for k in range(codebooks)]


# --- audiocraft ----------------------------------------------------------------------------------------------------

def _original_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return {"emb.0.weight", "transformer.layers.0.self_attn.in_proj_weight", "out_norm.weight",
            "linears.0.weight"} <= shapes.keys()


def _original_config(shapes: Shapes, foreign: dict | None) -> dict:
    said = (foreign or {}).get("xp.cfg") or {}
    lm = said.get("transformer_lm") or {}
    for name, allowed in FIXED.items():
        if lm.get(name, allowed[0]) not in allowed:
            raise ModelError(f"transformer_lm.{name} is {lm[name]!r}, this network has {allowed[0]!r}")
    rows, dim = shapes["emb.0.weight"]
    cross = "transformer.layers.0.norm_cross.weight" in shapes
    books = _count(shapes, r"emb\.\d+\.weight")
    pattern = said.get("codebooks_pattern") or {}
    late = (pattern.get("delay") or {}).get("delays") or _delays(books, 2 if books == 8 else 1)
    if pattern.get("modeling", "delay") != "delay":
        raise ModelError(f"its codebooks follow the pattern {pattern['modeling']!r}, this network has 'delay'")
    net = {"codebooks": books, "bins": rows - 1, "dim": dim, "heads": lm.get("num_heads") or HEADS.get(dim),
           "depth": _count(shapes, r"transformer\.layers\.\d+\.norm1\.weight"),
           "mlp_ratio": shapes["transformer.layers.0.linear1.weight"][0] / dim, "delays": _padded(late, books),
           "text": ("cross" if cross else "prepend") if f"{TEXT}.weight" in shapes else "none",
           "chroma": shapes.get(f"{MELODY}.weight", (0, 0))[1]}
    if net["text"] != "none":
        net["context_dim"] = shapes[f"{TEXT}.weight"][1]
    if style := _style(shapes, (said.get("conditioners") or {}).get("self_wav") or {}):
        return _system(net | {"style": style}) | {"melody": {}} | _guidance(said)
    return _system(net) | _guidance(said)


def _style(shapes: Shapes, said: dict) -> dict | None:
    """What hears the style of an excerpt; None where a melody is followed, or nothing."""
    book = f"{STYLE}rvq.vq.layers.0._codebook.embed"
    if book not in shapes:
        return None
    told, (bins, dim) = said.get("style") or {}, shapes[book]
    frames = shapes.get(f"{STYLE}embed.weight")
    heard = {"features": "frames", "width": frames[1]} if frames else {
        "features": "tokens", "bins_in": shapes[f"{STYLE}embed.0.weight"][0],
        "quantizers": _count(shapes, re.escape(STYLE) + r"embed\.\d+\.weight")}
    names = {"eval_q": "books_used", "ds_factor": "every", "length": "excerpt"}
    heard |= {ours: told[theirs] for theirs, ours in names.items() if isinstance(told.get(theirs), int | float)}
    lengths = told.get("varying_lengths")
    if isinstance(lengths, list) and len(lengths) == 2:
        heard |= {"shortest": lengths[0], "longest": lengths[1]}
    return heard | {"dim": dim, "bins": bins, "heads": STYLE_HEADS.get(dim, 8),
                    "books": _count(shapes, re.escape(STYLE) + r"rvq\.vq\.layers\.\d+\._codebook\.embed"),
                    "depth": _count(shapes, re.escape(STYLE) + r"transformer\.layers\.\d+\.norm1\.weight")}


def _padded(late: list[int], books: int) -> list[int]:
    """audiocraft gives codebooks that are not named the delay of the last one that is."""
    return [*late, *[late[-1]] * (books - len(late))][:books]


def _guidance(said: dict) -> dict:
    free, seconds = said.get("classifier_free_guidance") or {}, (said.get("dataset") or {}).get("segment_duration")
    told = {"p_uncond": free.get("training_dropout"), "guidance": free.get("inference_coef"), "seconds": seconds}
    told |= {"stride": 0.6 * seconds} if isinstance(seconds, int | float) and seconds != 30 else {}
    return {key: value for key, value in told.items() if isinstance(value, int | float)}


def _original_unsaid(shapes: Shapes, foreign: dict | None) -> tuple[str, ...]:
    said = (foreign or {}).get("xp.cfg") or {}
    return ("codec.weights", *(() if said else ("net.heads", "net.delays")))


def _original_table(config: dict) -> list[Row]:
    net = TokenLMConfig.parse(config["net"])
    if net.text != "none" and not net.project_text:
        raise ModelError("audiocraft projects every text, this model puts it in as it is", hint="--to transformers")
    mine, theirs = "decoder.layers.*.", "transformer.layers.*."
    return [
        *(_style_rows(net) if net.style else ()),
        Row("emb.weight", tuple(f"emb.{k}.weight" for k in range(net.codebooks))),
        Row("heads.weight", tuple(f"linears.{k}.weight" for k in range(net.codebooks))),
        *_affine("decoder.norm", "out_norm"), *_affine("text", TEXT), *_affine("melody", MELODY),
        *(row for name in ("norm1", "norm2", "norm_cross") for row in _affine(f"{mine}{name}", f"{theirs}{name}")),
        Row(f"{mine}qkv.weight", f"{theirs}self_attn.in_proj_weight"),
        Row(f"{mine}proj.weight", f"{theirs}self_attn.out_proj.weight"),
        Row(f"{mine}cross_qkv.weight", f"{theirs}cross_attention.in_proj_weight"),
        Row(f"{mine}cross_proj.weight", f"{theirs}cross_attention.out_proj.weight"),
        Row(f"{mine}fc1.weight", f"{theirs}linear1.weight"),
        Row(f"{mine}fc2.weight", f"{theirs}linear2.weight"),
    ]


def _style_rows(net: TokenLMConfig) -> list[Row]:
    mine, theirs = "style.layers.*.", f"{STYLE}transformer.layers.*."
    books = [f"{STYLE}embed.{k}.weight" for k in range(net.style.quantizers)]
    embed = _affine("style.embed", f"{STYLE}embed") if net.style.features == "frames" else \
        [Row("style.embed.weight", tuple(books))]
    names = {"qkv": "self_attn.in_proj_weight", "proj": "self_attn.out_proj.weight", "fc1": "linear1.weight",
             "fc2": "linear2.weight"}
    return [
        *embed, *(row for name in ("norm1", "norm2") for row in _affine(f"{mine}{name}", f"{theirs}{name}")),
        *(Row(f"{mine}{ours}.weight", theirs + there) for ours, there in names.items()),
        *(Row(f"style.norm.{name}", f"{STYLE}batch_norm.{name}")
          for name in ("running_mean", "running_var", "num_batches_tracked")),
        *(Row(f"style.quantizer.books.*.{name}", f"{STYLE}rvq.vq.layers.*._codebook.{name}")
          for name in ("embed", "cluster_size", "embed_avg")),
    ]


def _started(config: dict) -> dict[str, Tensor]:
    """audiocraft says of every codebook of a style that it has been started."""
    style = TokenLMConfig.parse(config["net"]).style
    return {f"{STYLE}rvq.vq.layers.{i}._codebook.inited": torch.ones(1) for i in range(style.books if style else 0)}


def _affine(native: str, foreign: str) -> list[Row]:
    return [Row(f"{native}.{end}", f"{foreign}.{end}") for end in ("weight", "bias")]


# --- transformers --------------------------------------------------------------------------------------------------

def _new_matches(shapes: Shapes, foreign: dict | None) -> bool:
    return {"decoder.model.decoder.embed_tokens.0.weight", "decoder.lm_heads.0.weight",
            "decoder.model.decoder.layers.0.self_attn.q_proj.weight"} <= shapes.keys()


def _new_config(shapes: Shapes, foreign: dict | None) -> dict:
    if foreign is None or not isinstance(foreign.get("decoder"), dict):
        raise ModelError("a MusicGen of transformers needs the config.json beside its weights",
                         hint="convert the folder, not the file in it")
    said, at = foreign["decoder"], "decoder.model.decoder."
    for name, usual in (("activation_function", "gelu"), ("scale_embedding", False)):
        if said.get(name, usual) != usual:
            raise ModelError(f"config.json: decoder.{name} is {said[name]!r}, this network has {usual!r}")
    books, (rows, dim) = _count(shapes, r"decoder\.lm_heads\.\d+\.weight"), shapes[f"{at}embed_tokens.0.weight"]
    cross = f"{at}layers.0.encoder_attn.q_proj.weight" in shapes
    projected = "enc_to_dec_proj.weight" in shapes          # text of the network's own width has none
    net = {"codebooks": books, "bins": rows - 1, "dim": dim, "heads": said.get("num_attention_heads", 16),
           "depth": _count(shapes, re.escape(at) + r"layers\.\d+\.fc1\.weight"),
           "mlp_ratio": shapes[f"{at}layers.0.fc1.weight"][0] / dim, "padding": "hidden",
           "delays": _delays(books, said.get("audio_channels", 1)), "text": "cross" if cross else "prepend",
           "context_dim": shapes["enc_to_dec_proj.weight"][1] if projected else dim, "project_text": projected,
           "chroma": shapes.get("audio_enc_to_dec_proj.weight", (0, 0))[1]}
    return _system(net)


def new_table(config: dict) -> list[Row]:
    """The rows of transformers' language model with its projections; ModelError for a model that follows a style."""
    net = TokenLMConfig.parse(config["net"])
    if net.style:
        raise ModelError("transformers' MusicGen follows no style", hint="--to original, for its language model")
    mine, at = "decoder.layers.*.", "decoder.model.decoder."
    theirs = f"{at}layers.*."
    names = {"norm1": "self_attn_layer_norm", "norm2": "final_layer_norm", "norm_cross": "encoder_attn_layer_norm"}
    rows = [
        Row("emb.weight", tuple(f"{at}embed_tokens.{k}.weight" for k in range(net.codebooks))),
        Row("heads.weight", tuple(f"decoder.lm_heads.{k}.weight" for k in range(net.codebooks))),
        *_affine("decoder.norm", f"{at}layer_norm"), *(_affine("text", "enc_to_dec_proj") if net.project_text else ()),
        *_affine("melody", "audio_enc_to_dec_proj"),
        *(row for name, there in names.items() for row in _affine(f"{mine}{name}", f"{theirs}{there}")),
        *(Row(f"{mine}{name}.weight", f"{theirs}{name}.weight") for name in ("fc1", "fc2")),
    ]
    for name, there in (("", "self_attn"), ("cross_", "encoder_attn")):
        rows += [Row(f"{mine}{name}qkv.weight", tuple(f"{theirs}{there}.{p}_proj.weight" for p in "qkv")),
                 Row(f"{mine}{name}proj.weight", f"{theirs}{there}.out_proj.weight")]
    return rows


def new_config(config: dict) -> dict:
    """transformers' config.json without its encoders; ModelError for what that cannot say."""
    net = TokenLMConfig.parse(config["net"])
    channels = config["codec"]["net"].get("channels", 1)
    if (net.text, bool(net.chroma)) not in (("cross", False), ("prepend", True)):
        raise ModelError("transformers has text in a second attention, or a melody and text in front of the music",
                         hint="only a model of either kind can be written")
    if net.project_text and net.context_dim == net.dim:
        raise ModelError(f"transformers puts a text of the network's own width ({net.dim}) in as it is, this model "
                         "projects it", hint="--to original")
    if list(net.pattern) != _delays(net.codebooks, channels):
        raise ModelError(f"transformers delays the codebooks by {_delays(net.codebooks, channels)}, this model by "
                         f"{list(net.pattern)}")
    kind = "musicgen_melody" if net.chroma else "musicgen"
    decoder = {
        "model_type": f"{kind}_decoder", "vocab_size": net.bins, "num_hidden_layers": net.depth,
        "ffn_dim": int(net.dim * net.mlp_ratio), "num_attention_heads": net.heads, "hidden_size": net.dim,
        "num_codebooks": net.codebooks, "audio_channels": channels, "pad_token_id": net.bins,
        "bos_token_id": net.bins, "activation_function": "gelu", "scale_embedding": False,
        "max_position_embeddings": 2048, "dtype": "float32"}
    melody = {"num_chroma": net.chroma, "chroma_length": _length(config)} if net.chroma else {}
    name = "MusicgenMelodyForConditionalGeneration" if net.chroma else "MusicgenForConditionalGeneration"
    return {"architectures": [name], "model_type": kind, "is_encoder_decoder": True, "decoder": decoder,
            "dtype": "float32", **melody}


def _length(config: dict) -> int:
    """Frames of chroma in a window."""
    hop = (1 << config["melody"].get("exponent", 14)) // 4
    return 1 + int(config.get("seconds", 30) * config["codec"]["net"].get("rate", 24_000)) // hop


LAYOUTS: tuple[Layout, ...] = (
    Layout("original", "musicgen", "net", _original_matches, _original_config, _original_table,
           constants=_started, unsaid=_original_unsaid),
    Layout("transformers", "musicgen", "net", _new_matches, _new_config, new_table, new_config, "model.safetensors",
           drop=tuple(f"{part}.*" for part in PARTS), unsaid=lambda shapes, foreign: ("codec.weights",)),
)
