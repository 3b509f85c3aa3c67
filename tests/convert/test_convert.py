"""Conversion through real files, both ways and byte for byte, and refusals that name the key."""

import hashlib
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus import checkpoint
from nexus.convert.convert import convert
from nexus.convert.keymap import to_foreign
from nexus.convert.layouts import every_layout
from nexus.errors import ModelError, OutputError, UsageError
from nexus.models.diffusion.dit import DiTNetConfig

NET = DiTNetConfig(size=8, hidden=16, depth=2, heads=2, num_classes=3)
ORIGINAL = next(layout for layout in every_layout() if (layout.system, layout.name) == ("dit", "original"))
HEADS = ["net.heads=2"]


def original_state(dtype=torch.float32) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    config = {"net": NET.to_json()}
    net = NET.build()
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    state = to_foreign(ORIGINAL.table(config), net.state_dict()) | ORIGINAL.constants(config)
    return {key: tensor.to(dtype) for key, tensor in state.items()}


@pytest.fixture
def source(tmp_path):
    torch.save(original_state(), tmp_path / "source.pt")
    return tmp_path / "source.pt"


@pytest.fixture
def plain(tmp_path):
    """The same as safetensors: no child process to wait for."""
    save_file(original_state(), tmp_path / "plain.safetensors")
    return tmp_path / "plain.safetensors"


def digest(folder):
    return hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()


def test_pt_to_nexus_to_every_layout_and_back(source, tmp_path):
    report = convert(source, tmp_path / "native", overrides=HEADS)
    assert (report.system, report.layout, report.written) == ("dit", "dit/original", tmp_path / "native")
    assert report.parameters == sum(p.numel() for p in NET.build().parameters())
    assert report.config["net"] == NET.to_json() and not report.problems
    assert checkpoint.verify(tmp_path / "native") == []
    convert(tmp_path / "native", tmp_path / "back.pt", to="original")
    for name, to, said in (("back.safetensors", "original", HEADS), ("folder", "diffusers", ["net.freq_shift=0"])):
        notes = convert(tmp_path / "native", tmp_path / name, to=to).notes
        assert ("not carried: net.freq_shift" in notes) == (to == "diffusers")      # its sinusoid is another one
        convert(tmp_path / name, tmp_path / f"again-{name}", overrides=said)
        assert digest(tmp_path / f"again-{name}") == digest(tmp_path / "native")
    for back in (torch.load(tmp_path / "back.pt", weights_only=True), load_file(tmp_path / "back.safetensors")):
        wanted = original_state()
        assert back.keys() == wanted.keys() and all(torch.equal(back[key], wanted[key]) for key in wanted)


def test_foreign_to_foreign_in_one_go(plain, tmp_path):
    convert(plain, tmp_path / "folder", to="diffusers", overrides=HEADS)
    convert(tmp_path / "folder", tmp_path / "back.safetensors", to="original")
    assert (tmp_path / "back.safetensors").read_bytes() == convert_bytes(tmp_path, plain)


def convert_bytes(tmp_path, plain) -> bytes:
    convert(plain, tmp_path / "native", overrides=HEADS)
    convert(tmp_path / "native", tmp_path / "direct.safetensors", to="original")
    return (tmp_path / "direct.safetensors").read_bytes()


def test_diffusers_opens_what_is_written(plain, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    convert(plain, tmp_path / "folder", to="diffusers", overrides=HEADS)
    reference = diffusers.DiTTransformer2DModel.from_pretrained(tmp_path / "folder", low_cpu_mem_usage=False)
    state = load_file(tmp_path / "folder" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(tensor, state[key]) for key, tensor in reference.state_dict().items())


def test_a_codec_of_diffusers_goes_through_and_back(tmp_path):
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.AutoencoderKL(block_out_channels=(8, 16), norm_num_groups=4, sample_size=16,
                                        down_block_types=["DownEncoderBlock2D"] * 2,
                                        up_block_types=["UpDecoderBlock2D"] * 2)
    reference.save_pretrained(tmp_path / "pipe" / "vae")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    report = convert(tmp_path / "pipe", tmp_path / "native")
    assert (report.system, report.layout) == ("vae", "vae/diffusers") and report.notes == ("took the component vae",)
    assert checkpoint.load(str(tmp_path / "native"), device="cpu").config.net.channels == (8, 16)
    convert(tmp_path / "native", tmp_path / "back", to="diffusers")
    back = load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors")
    wanted = reference.state_dict()
    assert back.keys() == wanted.keys() and all(torch.equal(back[key], wanted[key]) for key in wanted)


def test_the_converted_network_is_the_original(plain, tmp_path):
    convert(plain, tmp_path / "native", overrides=HEADS)
    system = checkpoint.load(str(tmp_path / "native"), device="cpu")
    assert system.config.net == NET
    assert torch.equal(system.net.blocks[1].qkv.weight, original_state()["blocks.1.attn.qkv.weight"])


def test_half_precision_is_kept(tmp_path):
    save_file(original_state(torch.bfloat16), tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "native", overrides=HEADS)
    assert {t.dtype for t in load_file(tmp_path / "native" / "model.safetensors").values()} == {torch.bfloat16}
    convert(tmp_path / "native", tmp_path / "back.safetensors", to="original")
    back, wanted = load_file(tmp_path / "back.safetensors"), original_state(torch.bfloat16)
    assert back.keys() == wanted.keys() and all(torch.equal(back[key], wanted[key]) for key in wanted)


def test_check_reports_and_writes_nothing(plain, tmp_path):
    before = sorted(tmp_path.iterdir())
    report = convert(plain, tmp_path / "native", check=True, overrides=HEADS)
    assert report.written is None and report.problems == () and report.tensors == len(original_state())
    assert sorted(tmp_path.iterdir()) == before


def test_every_problem_is_named_with_the_nearest_key(tmp_path):
    state = original_state()
    state["blocks.0.attn.qvk.bias"] = state.pop("blocks.0.attn.qkv.bias")
    state["t_embedder.mlp.0.bias"] = torch.ones(5)
    save_file(state, tmp_path / "x.safetensors")
    problems = convert(tmp_path / "x.safetensors", tmp_path / "y", check=True, overrides=HEADS).problems
    assert problems == (
        "blocks.0.attn.qkv.bias is missing; the nearest key is blocks.0.attn.qvk.bias",
        "blocks.0.attn.qvk.bias has no place in this layout; the nearest key is blocks.0.attn.qkv.bias",
        "t_embedder.mlp.0.bias is [5], [16] expected")
    with pytest.raises(ModelError, match=r"qkv\.bias is missing.*\(3 problems\)"):
        convert(tmp_path / "x.safetensors", tmp_path / "y", overrides=HEADS)
    assert not (tmp_path / "y").exists()


@pytest.mark.parametrize("change", ["missing", "surplus"])
def test_one_key_too_few_or_too_many(tmp_path, change):
    state = original_state()
    if change == "missing":
        del state["final_layer.linear.bias"]
    else:
        state["blocks.1.attn.q_norm.weight"] = torch.ones(4)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"final_layer\.linear\.bias is missing|q_norm\.weight has no place"):
        convert(tmp_path / "x.safetensors", tmp_path / "y", overrides=HEADS)


def test_unequal_copies_are_refused(plain, tmp_path):
    convert(plain, tmp_path / "folder", to="diffusers", overrides=HEADS)
    file = tmp_path / "folder" / "diffusion_pytorch_model.safetensors"
    state = load_file(file)
    state["transformer_blocks.1.norm1.emb.timestep_embedder.linear_1.bias"] += 1
    save_file(state, file)
    for _ in range(2):                                  # the same key each time: the order is the file's
        with pytest.raises(ModelError, match=r"blocks\.1\.norm1\.\S*linear_1\.bias should repeat "
                                             r"transformer_blocks\.0\.norm1"):
            convert(tmp_path / "folder", tmp_path / "native")


def test_whole_numbers_are_no_weights(tmp_path):
    state = original_state()
    state["final_layer.linear.bias"] = torch.ones_like(original_state()["final_layer.linear.bias"], dtype=torch.int8)
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"\.bias is of int8, which is no weight's kind of number"):
        convert(tmp_path / "x.safetensors", tmp_path / "y", overrides=HEADS)


@pytest.mark.parametrize("change, said", [
    ({"block_out_channels": None}, "ddpm/diffusers: it lacks 'block_out_channels'"),
    ({"down_block_types": 5}, "ddpm/diffusers: 'int' object is not iterable"),
    ({}, r"down_blocks\.0\.resnets\.0\.norm1\.weight is missing")])
def test_a_unet_that_lacks_something_is_told_what(tmp_path, change, said):
    diffusers = pytest.importorskip("diffusers")
    diffusers.UNet2DModel(sample_size=8, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4,
                          down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",)).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    if not change:
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        state = load_file(file)
        del state["down_blocks.0.resnets.0.norm1.weight"]
        save_file(state, file)
    with pytest.raises(ModelError, match=said):
        convert(tmp_path, tmp_path / "native")


def test_a_learned_position_table_is_refused(tmp_path):
    state = original_state()
    state["pos_embed"] += 0.1
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match="pos_embed is not the fixed table"):
        convert(tmp_path / "x.safetensors", tmp_path / "y", overrides=HEADS)


def test_what_the_file_does_not_tell_is_asked_for_or_reported(plain, tmp_path):
    with pytest.raises(ModelError, match=r"does not tell net\.heads") as caught:
        convert(plain, tmp_path / "native")
    assert "--set net.heads=" in caught.value.hint
    state = original_state()
    del state["pos_embed"]
    save_file(state, tmp_path / "x.safetensors")
    assert convert(tmp_path / "x.safetensors", tmp_path / "y", check=True, overrides=HEADS).assumed == {"net.size": 32}


def test_names_that_do_not_fit(plain, tmp_path):
    native = tmp_path / "native"
    convert(plain, native, overrides=HEADS)
    for arguments, message in (
            ({"src": native, "dst": tmp_path / "x"}, "already"),
            ({"src": native, "dst": tmp_path / "x", "to": "diffuser"}, "no layout 'diffuser'"),
            ({"src": native, "dst": tmp_path / "x", "to": "original"}, "is one file"),
            ({"src": native, "dst": tmp_path / "x.pt", "to": "diffusers"}, "is a folder"),
            ({"src": native, "dst": tmp_path / "x", "to": "diffusers", "overrides": HEADS}, "--set")):
        with pytest.raises(UsageError, match=message):
            convert(**arguments)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["native", "plain.safetensors"]


def test_nothing_is_replaced_unasked(plain, tmp_path):
    (tmp_path / "native").mkdir()
    (tmp_path / "native" / "mine.txt").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        convert(plain, tmp_path / "native", overrides=HEADS)
    with pytest.raises(OutputError, match="holds no model"):
        convert(plain, tmp_path / "native", overrides=HEADS, exists="overwrite")
    assert (tmp_path / "native" / "mine.txt").read_text() == "mine"
    convert(plain, tmp_path / "other", overrides=HEADS)
    convert(plain, tmp_path / "other", overrides=HEADS, exists="overwrite")
    assert checkpoint.verify(tmp_path / "other") == []


def test_averaged_weights_of_a_training_run_are_what_goes_out(plain, tmp_path):
    convert(plain, tmp_path / "native", overrides=HEADS)
    file = tmp_path / "native" / "model.safetensors"
    save_file({key: tensor + 1 for key, tensor in load_file(file).items()}, tmp_path / "native" / "ema.safetensors")
    convert(tmp_path / "native", tmp_path / "x.safetensors", to="original")
    key = "blocks.0.mlp.fc1.bias"
    assert torch.equal(load_file(tmp_path / "x.safetensors")[key], original_state()[key] + 1)


def test_a_model_that_the_layout_cannot_hold_is_refused(tmp_path):
    net = DiTNetConfig(size=8, hidden=16, depth=1, heads=2, num_classes=3, num_styles=2)
    config = {"net": net.to_json()}
    checkpoint.save_model(tmp_path / "native", "dit", config,
                          {f"net.{key}": tensor for key, tensor in net.build().state_dict().items()})
    for to, name in (("original", "x.pt"), ("diffusers", "x")):
        with pytest.raises(ModelError, match="no style table"):
            convert(tmp_path / "native", tmp_path / name, to=to)
    assert json.loads((tmp_path / "native" / "config.json").read_text())["system"] == "dit"
