"""The UNet against diffusers' models (tiny, random) and OpenAI's published layout."""

import json
import os
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from diffusers.pipelines.latent_consistency_models.pipeline_latent_consistency_text2img import (
    LatentConsistencyModelPipeline,
)
from safetensors.torch import load_file

from nexus import checkpoint
from nexus.convert import convert as converting
from nexus.convert.keymap import to_foreign, to_native
from nexus.convert.layouts import unet, unet_diffusers, unet_openai
from nexus.errors import ModelError
from nexus.models.diffusion.unet import UNetConfig
from nexus.requests import SampleRequest
from tests.parity.whole import assert_close, randomise, shapes

CASES = Path(os.environ.get("NEXUS_PARITY", Path(__file__).parents[3] / "shared" / "parity"))
CASE = CASES / "consistency-unet-a"
BASE = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
DEEP = {"block_out_channels": (32, 32, 64),
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D")}
PLAIN = {
    "plain": {},
    "ddpm": DEEP | {"attention_head_dim": None, "downsample_padding": 0, "flip_sin_to_cos": False,
                    "freq_shift": 1, "norm_eps": 1e-6, "layers_per_block": 2},
    "consistency": {"down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
                    "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"),
                    "downsample_type": "resnet", "upsample_type": "resnet", "attention_head_dim": 16,
                    "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32,
                    "num_class_embeds": 10},
    "labels": {"num_class_embeds": 5, "norm_num_groups": 16, "layers_per_block": 3, "in_channels": 4,
               "out_channels": 6},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift", "add_attention": False, "dropout": 0.1},
    "everywhere": DEEP | {"down_block_types": ("AttnDownBlock2D",) * 3,
                          "up_block_types": ("AttnUpBlock2D",) * 3, "attention_head_dim": 32,
                          "norm_num_groups": 8},
}
TEXT = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "cross_attention_dim": 24,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "attention_head_dim": 4,
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
CROSS = {
    "sd1": {},
    "sd2": {"use_linear_projection": True, "attention_head_dim": (2, 4), "in_channels": 9},
    "sdxl": {"use_linear_projection": True, "attention_head_dim": (2, 4),
             "transformer_layers_per_block": (1, 2),
             "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "addition_embed_type": "text_time",
             "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "addition_time_embed_dim": 256,
             "projection_class_embeddings_input_dim": 6 * 256 + 20},
    "lcm": {"time_cond_proj_dim": 32},
}
OPENAI = {
    "ddpm": {"mult": (1, 2, 2), "attention": (1,)},
    "improved": {"scale_shift": True, "heads": 4, "out_channels": 6, "blocks": 3},
    "adm": {"channels": 64, "mult": (1, 2), "scale_shift": True, "resblock_updown": True, "head_dim": 64,
            "num_classes": 7, "null_class": False, "attention": (0, 1), "in_channels": 6},
    "adm-variance": {"channels": 64, "mult": (1, 2), "scale_shift": True, "resblock_updown": True, "head_dim": 64,
                     "num_classes": 7, "null_class": False, "attention": (1,), "out_channels": 6},
    "adm-512": {"channels": 128, "mult": (0.5, 1, 2), "resblock_updown": True, "head_dim": 64, "blocks": 1},
    "one-level": {"mult": (2,), "attention": (), "mid_attention": False},
}
LATENT = {
    "sd1": {"heads": 8},
    "sdxl": {"linear_proj": True, "head_dim": 64, "channels": 64, "mult": (1, 2, 4), "attention": (1, 2),
             "depth": (1, 2, 3), "pooled_dim": 40, "micro": 6},
    "lcm": {"heads": 8, "guidance_dim": 16},
}


def layout_of(state: dict, foreign: dict | None):
    found = [layout for layout in unet.LAYOUTS if layout.auto and layout.matches(shapes(state), foreign)]
    assert len(found) == 1
    return found[0]


def check_round_trip(table: list, state: dict, native: dict) -> None:
    back = to_foreign(table, native)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def convert(state: dict, config: dict, table) -> torch.nn.Module:
    """The native network with a foreign checkpoint in it; the checkpoint comes back byte for byte."""
    native = to_native(table(config), state)
    net = UNetConfig.parse(config["net"]).build().eval()
    net.load_state_dict(native)
    check_round_trip(table(config), state, native)
    return net


@pytest.mark.parametrize("name", PLAIN)
def test_diffusers(name):
    theirs = randomise(UNet2DModel(**BASE | PLAIN[name]))
    foreign = json.loads(theirs.to_json_string())
    state = theirs.state_dict()
    layout = layout_of(state, foreign)
    assert layout.system == ("conditional" if "num_class_embeds" in PLAIN[name] else "ddpm")
    config = layout.config(shapes(state), foreign)
    ours = convert(state, config, layout.table)
    x, t = torch.randn(2, theirs.config.in_channels, 16, 16), torch.tensor([3.0, 987.25])
    label = torch.tensor([1, 4])
    with torch.no_grad():
        labels = {"class_labels": label} if theirs.class_embedding is not None else {}
        assert_close(ours(x, t, {"label": label}), theirs(x, t, **labels).sample)
    # The config.json written back builds the same network, here and there.
    written = layout.foreign_config(config)
    assert layout.config(shapes(state), written) == config
    UNet2DModel.from_config(written).load_state_dict(state)


@pytest.mark.parametrize("name", CROSS)
def test_diffusers_with_words(name):
    theirs = randomise(UNet2DConditionModel(**TEXT | CROSS[name]))
    foreign = json.loads(theirs.to_json_string())
    state = theirs.state_dict()
    assert unet_diffusers.matches(shapes(state), words=True)
    config = {"net": unet_diffusers.config_of(shapes(state), foreign)}
    ours = convert(state, config, unet_diffusers.table)
    x, t = torch.randn(2, theirs.config.in_channels, 16, 16), torch.tensor([3.0, 987.0])
    words = torch.randn(2, 7, 24)
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    cond, said = {"context": words, "context_mask": mask}, {"encoder_attention_mask": mask}
    if name == "sdxl":
        cond |= {"pooled": torch.randn(2, 20), "micro": torch.tensor([[512.0, 640, 0, 32, 1024, 1024]] * 2)}
        said["added_cond_kwargs"] = {"text_embeds": cond["pooled"], "time_ids": cond["micro"]}
    if name == "lcm":
        cond["guidance"] = torch.tensor([7.0, 2.5])
        embed = LatentConsistencyModelPipeline.get_guidance_scale_embedding
        said["timestep_cond"] = embed(None, cond["guidance"], embedding_dim=32)
    with torch.no_grad():
        expected = theirs(x, t, words, **said).sample
        assert_close(ours(x, t, cond), expected)
        first = {k: v[:1] for k, v in cond.items()}
        assert_close(ours(x[:1], t[:1], first, ours.prepare(t, first)), expected[:1])
    written = unet_diffusers.foreign_config(config)
    assert unet_diffusers.config_of(shapes(state), written) == config["net"]
    UNet2DConditionModel.from_config(written).load_state_dict(state)


def test_names_of_2022():
    theirs = randomise(UNet2DModel(**BASE))
    names = dict(zip(unet_diffusers.NEW_ATTENTION, unet_diffusers.OLD_ATTENTION, strict=True))
    state = {}
    for key, value in theirs.state_dict().items():
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.")
        state[key] = value
    foreign = json.loads(theirs.to_json_string())
    layout = layout_of(state, foreign)
    assert layout.name == "diffusers-2022"
    ours = convert(state, layout.config(shapes(state), foreign), layout.table)
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([10.0])
    with torch.no_grad():
        assert_close(ours(x, t), theirs(x, t).sample)


@pytest.mark.parametrize("setting, value", [
    ("time_embedding_type", "fourier"), ("act_fn", "gelu"), ("center_input_sample", True),
    ("down_block_types", ["SkipDownBlock2D", "AttnDownBlock2D"]), ("mid_block_scale_factor", 1.41),
    ("down_block_types", ["AttnDownBlock2D", "AttnDownBlock2D"]), ("attn_norm_num_groups", 8),
    ("down_block_types", ["ResnetDownsampleBlock2D", "AttnDownBlock2D"]), ("time_embedding_dim", 7),
])
def test_other_architectures_are_refused(setting, value):
    theirs = UNet2DModel(**BASE)
    foreign = json.loads(theirs.to_json_string()) | {setting: value}
    with pytest.raises(ModelError, match="config.json"):
        unet_diffusers.config_of(shapes(theirs.state_dict()), foreign)


def meta(config: dict) -> dict[str, torch.Tensor]:
    with torch.device("meta"):
        return UNetConfig.parse(config["net"]).build().state_dict()


@pytest.mark.parametrize("name", OPENAI)
@pytest.mark.parametrize("kind", ["openai", "consistency"])
def test_openai_by_shapes(name, kind):
    """A native network written in OpenAI's layout is recognised, its configuration read from shapes."""
    settings = UNetConfig.parse(OPENAI[name])
    config = {"net": settings.to_json()}
    table = next(layout.table for layout in unet.LAYOUTS if layout.name == kind)
    foreign = to_foreign(table(config), meta(config))
    layout = layout_of(foreign, None)
    attends = settings.attention or settings.mid_attention
    assert layout.name == (kind if attends else "openai")
    assert layout.system == ("conditional" if settings.num_classes else "ddpm")
    read = layout.config(shapes(foreign), None)["net"]
    if kind == "consistency" and not settings.head_dim and attends:     # taken for heads of 64 there
        read |= {"head_dim": 0, "heads": settings.heads}
    assert UNetConfig.parse(read) == settings
    heads = {"net.heads", "net.head_dim"} if attends else set()
    assert heads | {"size", "path.beta_schedule"} == set(layout.unsaid(shapes(foreign), None))
    native = to_native(layout.table({"net": settings.to_json()}), foreign)
    assert shapes(native) == shapes(meta(config))


@pytest.mark.parametrize("name", LATENT)
def test_latent_diffusion_by_shapes(name):
    base = {"in_channels": 4, "out_channels": 4, "channels": 64, "context_dim": 24, "mult": (1, 2),
            "attention": (0,)}
    settings = UNetConfig.parse(base | LATENT[name])
    config = {"net": settings.to_json()}
    foreign = to_foreign(unet.OPENAI(config), meta(config))
    assert UNetConfig.parse(unet_openai.config_of(shapes(foreign))) == settings


@pytest.mark.parametrize("name", ["improved", "adm-variance", "adm-512"])
def test_a_file_with_a_learned_variance_is_sampled(name, tmp_path):
    net = UNetConfig.parse(OPENAI[name])
    torch.save(to_foreign(unet.OPENAI({"net": net.to_json()}), randomise(net.build()).state_dict()), tmp_path / "a.pt")
    said = ["size=16", "path.beta_schedule=cosine"]
    report = converting.convert(tmp_path / "a.pt", tmp_path / "native", overrides=said)
    assert report.config["learned_variance"] is (net.out_channels == 6) and report.config["clip"]
    system = checkpoint.load(str(tmp_path / "native"), device="cpu")
    prompt = "3" if net.num_classes else None
    made = system.generate(SampleRequest(steps=2, prompt=prompt), seeds=[0]).data
    assert made.shape == (1, 3, 16, 16) and made.isfinite().all()


def test_openai_names():
    """Key names of guided-diffusion's class-conditional model, spelled out."""
    config = {"net": UNetConfig.parse(OPENAI["adm"]).to_json()}
    keys = shapes(to_foreign(unet.OPENAI(config), meta(config)))
    assert keys["input_blocks.3.0.in_layers.2.weight"] == (64, 64, 3, 3)     # the residual block that halves
    assert keys["input_blocks.4.0.skip_connection.weight"] == (128, 64, 1, 1)
    assert keys["input_blocks.4.1.qkv.weight"] == (384, 128, 1)
    assert keys["middle_block.1.proj_out.weight"] == (128, 128, 1)
    assert keys["output_blocks.2.2.out_layers.3.bias"] == (128,)             # and the one that doubles
    assert keys["output_blocks.5.0.emb_layers.1.weight"] == (128, 256)
    assert keys["label_emb.weight"] == (7, 256)


def test_order_within_qkv():
    """The same attention, its q, k, v ordered head by head in one file and in whole thirds in the other."""
    settings = UNetConfig(channels=32, mult=(1,), blocks=1, attention=(0,), heads=2)
    config, state = {"net": settings.to_json()}, randomise(settings.build()).state_dict()
    by_head, thirds = (to_foreign(table(config), state) for table in (unet.OPENAI, unet.OPENAI_THIRDS))
    key = "middle_block.1.qkv.bias"
    q, k, v = thirds[key].chunk(3)
    assert torch.equal(by_head[key], torch.cat([q[:16], k[:16], v[:16], q[16:], k[16:], v[16:]]))
    for table, foreign in ((unet.OPENAI, by_head), (unet.OPENAI_THIRDS, thirds)):
        native = to_native(table(config), foreign)
        assert all(torch.equal(value, state[name]) for name, value in native.items())


def test_our_own_conditions_have_no_public_place():
    config = {"net": UNetConfig.preset("tiny").model_copy(update={"num_styles": 3}).to_json()}
    for table in (unet.OPENAI, unet_diffusers.table):
        with pytest.raises(ModelError, match="num_styles"):
            table(config)


@pytest.mark.skipif(not CASE.exists(), reason=f"no parity cases at {CASES}")
def test_consistency_case():
    state = torch.load(CASE / "checkpoint.pt", weights_only=True)
    tensors = load_file(CASE / "tensors.safetensors")
    layout = layout_of(state, None)
    assert (layout.name, layout.system) == ("consistency", "conditional")
    config = layout.config(shapes(state), None)
    assert config["net"]["head_dim"] is None           # widths 32 and 64: not the published heads of 64
    config["net"]["head_dim"] = 16
    ours = convert(state, config, layout.table)
    assert sum(p.numel() for p in ours.parameters()) == json.loads((CASE / "case.json").read_text())["params"]
    with torch.no_grad():
        out = ours(tensors["x"], tensors["timesteps"], {"label": tensors["y"].long()})
    assert_close(out, tensors["output"])
