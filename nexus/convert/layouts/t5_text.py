"""T5's encoder in transformers' naming, as single files hold it too: the config.json that such a file lacks."""

from nexus.convert.layout import Shapes
from nexus.errors import ModelError

FIRST = "encoder.block.0.layer."


def folder_config(shapes: Shapes) -> dict:
    """The config.json of an encoder, by its shapes; ModelError for what is not one."""
    try:
        words, width = shapes["shared.weight"]
        buckets, heads = shapes[f"{FIRST}0.SelfAttention.relative_attention_bias.weight"]
        inner, gated = shapes[f"{FIRST}0.SelfAttention.q.weight"][0], f"{FIRST}1.DenseReluDense.wi_0.weight" in shapes
        middle = shapes[f"{FIRST}1.DenseReluDense.{'wi_0' if gated else 'wi'}.weight"][0]
    except KeyError as error:
        raise ModelError(f"the T5 in this file lacks {error.args[0]}", hint="is it another text encoder?") from None
    return {
        "architectures": ["T5EncoderModel"], "model_type": "t5", "vocab_size": words, "d_model": width,
        "d_kv": inner // heads, "d_ff": middle, "num_heads": heads,
        "num_layers": sum(key.endswith(".SelfAttention.q.weight") for key in shapes),
        "relative_attention_num_buckets": buckets, "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu" if gated else "relu", "layer_norm_epsilon": 1e-6, "dropout_rate": 0.1,
        "pad_token_id": 0, "eos_token_id": 1, "decoder_start_token_id": 0, "is_encoder_decoder": True,
        "tie_word_embeddings": False, "initializer_factor": 1.0,
    }
