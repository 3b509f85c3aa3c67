"""CLIP's text model: OpenCLIP's naming, as single files hold it, and transformers' folder.

Published single files hold CLIP-L in transformers' naming, and H and G in OpenCLIP's.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from nexus.convert.keymap import Row, to_foreign, to_native
from nexus.convert.layout import Shapes

HEAD = 64                       # channels of a head in every published CLIP
TOKENS = "text_model.embeddings.token_embedding.weight"
BLOCK, LAYER = "transformer.resblocks.*.", "text_model.encoder.layers.*."
NAMES = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2",
         "attn.out_proj": "self_attn.out_proj"}


def rows() -> list[Row]:
    """OpenCLIP's names on the left, transformers' on the right."""
    found = [Row("token_embedding.weight", TOKENS),
             Row("positional_embedding", "text_model.embeddings.position_embedding.weight"),
             Row("text_projection", "text_projection.weight", op="transpose")]
    for end in ("weight", "bias"):
        qkv = tuple(f"{LAYER}self_attn.{p}_proj.{end}" for p in "qkv")
        found += [Row(f"{BLOCK}attn.in_proj_{end}", qkv), Row(f"ln_final.{end}", f"text_model.final_layer_norm.{end}"),
                  *(Row(f"{BLOCK}{ours}.{end}", f"{LAYER}{theirs}.{end}") for ours, theirs in NAMES.items())]
    return found


def from_openclip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP's tensors in transformers' naming; ModelError for a key that has no place."""
    return to_foreign(rows(), state)


def to_openclip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reverse."""
    return {key: tensor.contiguous() for key, tensor in to_native(rows(), state).items()}


def prefixed(state: Mapping[str, Any]) -> dict[str, Any]:
    """transformers' tensors, or what stands for them, with the "text_model." that its version 5 leaves out."""
    bare = TOKENS.removeprefix("text_model.") in state
    return {f"text_model.{key}" if bare else key: tensor for key, tensor in state.items()}


def folder_config(shapes: Shapes, *, openclip: bool) -> dict:
    """The config.json of a text model in transformers' naming, by its shapes and by who trained it."""
    words, width = shapes[TOKENS]
    layers = sum(key.endswith(".layer_norm1.weight") for key in shapes)
    projected = "text_projection.weight" in shapes
    return {
        "architectures": ["CLIPTextModelWithProjection" if projected else "CLIPTextModel"],
        "model_type": "clip_text_model", "vocab_size": words, "hidden_size": width, "num_hidden_layers": layers,
        "num_attention_heads": max(1, width // HEAD),
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
        "projection_dim": shapes["text_projection.weight"][0] if projected else width,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"][0],
        "hidden_act": "gelu" if openclip else "quick_gelu",
        "bos_token_id": words - 2, "eos_token_id": words - 1, "pad_token_id": 0 if openclip else words - 1,
        "attention_dropout": 0.0, "layer_norm_eps": 1e-5, "initializer_range": 0.02, "initializer_factor": 1.0,
    }
