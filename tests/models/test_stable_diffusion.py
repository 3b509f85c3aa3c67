"""Stable Diffusion as a system: the published sizes, its chain, what its networks are told."""

import pytest
import torch

from nexus import checkpoint
from nexus.convert.layouts import clip_text, t5_text
from nexus.errors import InputError
from nexus.models.diffusion.stable_diffusion import StableDiffusionConfig
from nexus.models.diffusion.unet import UNetConfig
from nexus.process.schedules import grid, intervals
from nexus.requests import SampleRequest

COUNTS = {"sd15": 859_520_964, "sd15-inpaint": 859_535_364, "sd21": 865_910_724, "sdxl": 2_567_463_684}


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("preset", COUNTS)
def test_published_sizes(preset):
    with torch.device("meta"):
        built = StableDiffusionConfig.preset(preset).build()
    assert count(built.net) == COUNTS[preset] and count(built.codec) == 83_653_863
    assert not list(built.conditioner.parameters()) and len(built.phases()) == 1
    assert built.phases()[0].module is built.net


def test_the_small_preset_fits_its_budget():
    config = StableDiffusionConfig.preset("emoji")
    words = tuple(f"word{i}" for i in range(1500))
    encoder = config.conditioner.encoder.model_copy(update={"words": words})
    with torch.device("meta"):
        assert count(config.net.build()) + count(encoder.build()) <= 4_500_000
    assert config.net_facts() == {"context_dim": config.net.context_dim} and not config.net.pooled_dim


def test_the_chain_is_the_published_one():
    path = StableDiffusionConfig.preset("sd15").path
    beta = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
    torch.testing.assert_close(path.alpha_bar(), torch.cumprod(1 - beta, 0))
    assert path.times(50).tolist() == [20.0 * i + 1 for i in reversed(range(50))]


def test_ddim_may_stop_at_the_first_index():
    path = StableDiffusionConfig.preset("sd15").path
    points = grid(path, path.times(4), to_data=False)
    last = list(intervals(points))[-1]
    assert (last.a1, last.s1) == (pytest.approx(float(path.alpha_bar()[0]) ** 0.5), pytest.approx(0.00085 ** 0.5))
    assert list(intervals(grid(path, path.times(4))))[-1][5:] == (1.0, 0.0)


def test_sdxl_is_told_its_size_where_nobody_says_it():
    config = UNetConfig.parse(UNetConfig.presets["tiny"] | {
        "in_channels": 4, "context_dim": 8, "heads": 2, "pooled_dim": 8, "micro": 6, "micro_freqs": 8, "pixels": 2})
    torch.manual_seed(0)
    net = config.build().eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.2)
    x, t = torch.randn(2, 4, 8, 12), torch.tensor([7.0, 7.0])
    cond = {"context": torch.randn(2, 3, 8), "pooled": torch.randn(2, 8)}
    said = cond | {"micro": torch.tensor([[16.0, 24, 0, 0, 16, 24]] * 2)}
    with torch.no_grad():
        assert torch.equal(net(x, t, cond), net(x, t, said))
        cropped = {"micro": torch.tensor([[16.0, 24, 4, 0, 16, 24]] * 2)}
        assert not torch.equal(net(x, t, cond), net(x, t, cond | cropped))
    with pytest.raises(InputError, match="pooled"):
        net(x, t, {"context": cond["context"]})


def test_a_long_prompt_and_a_short_one_share_a_run(tmp_path, monkeypatch):
    """A caption of the small encoder has a mask; the samplers see a joined batch."""
    system = checkpoint.build("sd", StableDiffusionConfig.preset("tiny").to_json()).eval()
    made = system.generate(SampleRequest(prompt="red ball", negative_prompt="a very long caption of many words"),
                           seeds=[0, 1])
    assert made.data.shape == (2, 3, 16, 16) and made.notes[0]["caption"] == "red ball"


def test_published_text_models_by_shape():
    """CLIP ViT-L/14 and OpenCLIP bigG as single files hold them."""
    for width, layers, inner, projection, total in (
            (768, 12, 3072, 0, 123_060_480), (768, 12, 3072, 768, 123_650_304),
            (1280, 32, 5120, 1280, 694_659_840)):
        block = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (width, width),
                 "self_attn.v_proj": (width, width), "self_attn.out_proj": (width, width),
                 "mlp.fc1": (inner, width), "mlp.fc2": (width, inner)}
        shapes = {clip_text.TOKENS: (49408, width), "text_model.embeddings.position_embedding.weight": (77, width)}
        for i in range(layers):
            at = f"text_model.encoder.layers.{i}"
            for name, shape in block.items():
                shapes |= {f"{at}.{name}.weight": shape, f"{at}.{name}.bias": shape[:1]}
            for norm in ("layer_norm1", "layer_norm2"):
                shapes |= {f"{at}.{norm}.weight": (width,), f"{at}.{norm}.bias": (width,)}
        shapes |= {f"text_model.final_layer_norm.{end}": (width,) for end in ("weight", "bias")}
        if projection:
            shapes["text_projection.weight"] = (projection, width)
        assert sum(torch.Size(s).numel() for s in shapes.values()) == total
        said = clip_text.folder_config(shapes, openclip=width == 1280)
        assert (said["num_attention_heads"], said["num_hidden_layers"]) == (width // 64, layers)
        assert said["hidden_act"] == ("gelu" if width == 1280 else "quick_gelu") and said["eos_token_id"] == 49407


@pytest.mark.parametrize("width, inner, heads, middle, layers, gated, total", [
    (4096, 4096, 64, 10_240, 24, True, 4_762_310_656), (768, 768, 12, 3072, 12, False, 109_628_544)],
    ids=["v1.1-xxl", "base"])
def test_published_t5_encoders_by_shape(width, inner, heads, middle, layers, gated, total):
    """The encoder that a config.json describes, which is made of the shapes in a file, has the published size."""
    transformers = pytest.importorskip("transformers")
    at = "encoder.block.{}.layer."
    shapes = {"shared.weight": (32_128, width),
              f"{at.format(0)}0.SelfAttention.relative_attention_bias.weight": (32, heads)}
    for i in range(layers):
        shapes |= {f"{at.format(i)}0.SelfAttention.q.weight": (inner, width)}
        shapes |= {f"{at.format(i)}1.DenseReluDense.{name}.weight": (middle, width)
                   for name in (("wi_0", "wi_1") if gated else ("wi",))}
    said = t5_text.folder_config(shapes)
    with torch.device("meta"):
        encoder = transformers.T5EncoderModel(transformers.T5Config(**said))
    assert sum(p.numel() for p in encoder.parameters()) == total
