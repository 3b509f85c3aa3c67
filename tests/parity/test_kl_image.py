"""The KL picture codec against diffusers' AutoencoderKL, sd3-ref's SDVAE and FLUX's AutoEncoder."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus import checkpoint
from nexus.codecs.kl_image import KLConfig
from nexus.convert.convert import convert
from nexus.convert.keymap import to_foreign, to_native
from nexus.convert.layouts.kl_image import LAYOUTS
from nexus.errors import ModelError
from tests.parity.codecs import assert_same_weights_back, blocks, diffusers_codec, near, with_ours

CASES = Path(os.environ.get("NEXUS_PARITY") or Path(__file__).parents[2].parent / "shared/parity")
NOT_OURS = ("latents_mean", "latents_std")               # always null
BY_NAME = {layout.name: layout for layout in LAYOUTS}
CONFIGS = {
    "quant": {"block_out_channels": (8, 16), "norm_num_groups": 4},
    "sixteen-channels": {"block_out_channels": (16, 16, 32), "norm_num_groups": 8, "latent_channels": 16,
                         "layers_per_block": 2, "use_quant_conv": False, "use_post_quant_conv": False,
                         "scaling_factor": 1.5305, "shift_factor": 0.0609},
    "no-attention": {"block_out_channels": (8, 24), "norm_num_groups": 8, "mid_block_add_attention": False},
    "attends": {"block_out_channels": (8, 16, 24), "norm_num_groups": 4, **blocks(3, (1, 2))},
    "one-level": {"block_out_channels": (32,), "in_channels": 1, "out_channels": 1},
}


def diffusers_model(fields: dict):
    return diffusers_codec("AutoencoderKL", fields)


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request, tmp_path_factory):
    """diffusers' model, its folder, and the native system converted from it."""
    return with_ours(diffusers_model(CONFIGS[request.param]), tmp_path_factory.mktemp(request.param))


@torch.no_grad()
def test_encodes_and_decodes_as_diffusers(pair):
    model, _, ours = pair
    x = torch.randn(2, model.config.in_channels, 16, 24)
    posterior = model.encode(x).latent_dist
    mean, logvar = ours.net.encode(x)
    assert near(mean, posterior.mean) and near(logvar, posterior.logvar)
    assert near(ours.net.decode_raw(posterior.mean), model.decode(posterior.mean).sample)
    scaled = (posterior.mean - (model.config.shift_factor or 0)) * model.config.scaling_factor
    assert near(ours.net.latents(x), scaled)
    assert near(ours.net.decode(scaled), model.decode(posterior.mean).sample)


def test_folder_round_trip_is_exact(pair):
    model, folder, _ = pair
    assert_same_weights_back(folder)
    said, again = (json.loads((folder / name / "config.json").read_text()) for name in ("theirs", "back"))
    assert all(again[key] == value for key, value in said.items() if key not in ("_diffusers_version", *NOT_OURS))


def test_names_of_2022_are_read(tmp_path):
    model = diffusers_model(CONFIGS["quant"])
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = model.state_dict()
    for new, old in names.items():
        state = {key.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): t for key, t in state.items()}
    model.save_pretrained(tmp_path / "theirs")
    save_file(state, tmp_path / "theirs/diffusion_pytorch_model.safetensors")
    assert convert(tmp_path / "theirs", tmp_path / "ours").layout == "vae/diffusers-2022"
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        assert near(checkpoint.load(str(tmp_path / "ours")).net.encode(x)[0], model.encode(x).latent_dist.mean)


def case(name: str):
    folder = CASES / name
    if not folder.is_dir():
        pytest.skip(f"the parity case {folder} is not here (NEXUS_PARITY names the folder of cases)")
    return folder, json.loads((folder / "case.json").read_text()), load_file(folder / "tensors.safetensors")


def converted(folder: Path, tmp_path: Path, said: dict):
    """The native system of a published single file, after checking its count and the way back."""
    report = convert(folder / "checkpoint.safetensors", tmp_path / "ours")
    assert report.parameters == said["params"] and {"net.scale", "net.shift"} <= report.assumed.keys()
    convert(tmp_path / "ours", tmp_path / "back.safetensors", to=report.layout.split("/")[1])
    before, after = load_file(folder / "checkpoint.safetensors"), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    return checkpoint.load(str(tmp_path / "ours"))


@torch.no_grad()
def test_sd3(tmp_path):
    folder, said, saved = case("sd3-vae")
    net = converted(folder, tmp_path, said).net
    mean, logvar = net.encode(saved["x"])
    assert near(torch.cat([mean, logvar], 1), saved["moments"].clamp(-30, 20))
    assert near(net.latents(saved["x"], saved["noise"]), saved["latent_in"])
    assert near(net.decode_raw(saved["z_in"]), saved["output"])
    assert near((saved["z_in"] - net.config.shift) * net.config.scale, (saved["z_in"] - 0.0609) * 1.5305)
    assert near(saved["z_in"] / net.config.scale + net.config.shift, saved["latent_out"])


@torch.no_grad()
def test_flux(tmp_path):
    folder, said, saved = case("flux-ae")
    net = converted(folder, tmp_path, said).net
    assert near(torch.cat(net.encode(saved["x"]), 1), saved["moments"])
    assert near(net.latents(saved["x"]), saved["z"])
    assert near(net.decode(saved["z_in"]), saved["output"])


@pytest.mark.parametrize("name", ["original", "original-sd", "diffusers"])
@pytest.mark.parametrize("preset", ["sd-f8", "sd3"])
def test_published_sizes_round_trip_on_meta(name, preset):
    layout, config = BY_NAME[name], {"net": KLConfig.preset(preset).to_json()}
    with torch.device("meta"):
        native = KLConfig.preset(preset).build().state_dict()
    foreign = to_foreign(layout.table(config), native)
    shapes = {key: tuple(t.shape) for key, t in foreign.items()}
    said = layout.foreign_config(config) if layout.foreign_config else None
    assert [one.name for one in LAYOUTS if one.matches(shapes, said)] == [name]
    back = to_native(layout.table(config), foreign)
    assert {k: t.shape for k, t in back.items()} == {k: t.shape for k, t in native.items()}
    found = layout.config(shapes, said)["net"]
    if (name, preset) != ("original", "sd3"):           # alone in a file it is taken for FLUX's, of the same shapes
        assert KLConfig.parse(found) == KLConfig.preset(preset)


def test_what_no_layout_can_say_is_refused():
    folded = {"net": KLConfig.preset("picture-codec").to_json()}
    few_groups = {"net": KLConfig.preset("tiny").to_json()}
    with pytest.raises(ModelError, match="patch 2"):
        BY_NAME["diffusers"].foreign_config(folded)
    with pytest.raises(ModelError, match="32 groups"):
        BY_NAME["original"].constants(few_groups)
    with pytest.raises(ModelError, match="conv"):
        BY_NAME["diffusers"].constants({"net": {"kind": "conv"}})


def test_settings_that_this_codec_has_not_are_refused():
    good = BY_NAME["diffusers"].foreign_config({"net": KLConfig.preset("sd-f8").to_json()})
    for bad in ({"use_quant_conv": False}, {"latents_mean": [0.0]}, {"down_block_types": ["AttnDownEncoderBlock2D"]},
                {"down_block_types": ["DownBlock2D"]}):
        with pytest.raises(ModelError):
            BY_NAME["diffusers"].config({}, good | bad)
    with pytest.raises(ModelError, match=r"config\.json"):
        BY_NAME["diffusers"].config({}, None)
