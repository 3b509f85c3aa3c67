"""Which checkpoint is this: wrappers, folders, shards, pipelines, and messages that name what is wrong."""

import json

import pytest
import torch
from safetensors.torch import save_file

from nexus.convert.detect import detect, opened, read
from nexus.convert.keymap import to_foreign
from nexus.convert.layouts import every_layout
from nexus.errors import ModelError
from nexus.models.diffusion.dit import DiTNetConfig

CONFIG = {"net": DiTNetConfig(size=8, hidden=16, depth=2, heads=2, num_classes=3).to_json()}
LAYOUTS = {layout.name: layout for layout in every_layout() if layout.system == "dit"}


def state_of(name: str = "original") -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    layout, net = LAYOUTS[name], DiTNetConfig.parse(CONFIG["net"]).build()
    return to_foreign(layout.table(CONFIG), net.state_dict(), copies=2) | layout.constants(CONFIG)


def found(path):
    with opened(path) as sources:
        result = detect(sources)
        return result, read(result.source)


def assert_same(state, wanted):
    assert state.keys() == wanted.keys() and all(torch.equal(state[key], wanted[key]) for key in wanted)


def folder(path, name: str = "diffusers"):
    path.mkdir(parents=True)
    config = LAYOUTS[name].foreign_config(CONFIG)
    (path / "config.json").write_text(json.dumps(config))
    save_file(state_of(name), path / LAYOUTS[name].file)
    return path


@pytest.mark.parametrize("prefix", ["", "ema.", "model.", "module.", "state_dict.net.", "state_dict.ema_model.module."])
def test_wrappers_are_stripped(tmp_path, prefix):
    save_file({prefix + key: tensor for key, tensor in state_of().items()}, tmp_path / "x.safetensors")
    result, state = found(tmp_path / "x.safetensors")
    assert result.layout is LAYOUTS["original"]
    assert_same(state, state_of())
    assert bool(result.notes) == bool(prefix)


def test_averaged_weights_go_first_and_it_says_so(tmp_path):
    state = state_of()
    both = {f"ema.{key}": tensor for key, tensor in state.items()}
    both |= {f"model.{key}": tensor + 1 for key, tensor in state.items()}
    save_file(both, tmp_path / "x.safetensors")
    result, taken = found(tmp_path / "x.safetensors")
    assert_same(taken, state)
    assert result.notes == ("took the averaged weights under 'ema'", "left alone: model")


def test_a_folder_gives_its_configuration(tmp_path):
    result, state = found(folder(tmp_path / "x"))
    assert result.layout is LAYOUTS["diffusers"] and result.source.config["num_attention_heads"] == 2
    assert_same(state, state_of("diffusers"))


@pytest.mark.parametrize("variant", ["", ".fp16"])
def test_shards_are_joined(variant, tmp_path):
    path, state = folder(tmp_path / "x"), state_of("diffusers")
    whole = path / LAYOUTS["diffusers"].file
    whole.unlink()
    keys = sorted(state)
    halves = {"m-1.safetensors": keys[::2], "m-2.safetensors": keys[1::2]}
    for name, part in halves.items():
        save_file({key: state[key] for key in part}, path / name)
    index = {"weight_map": {key: name for name, part in halves.items() for key in part}}
    (path / f"{whole.name}.index{variant}.json").write_text(json.dumps(index))
    assert_same(found(path)[1], state)
    (path / "m-2.safetensors").unlink()
    with pytest.raises(ModelError, match=r"m-2\.safetensors is missing"):
        found(path)


def test_a_shard_outside_the_folder_is_refused(tmp_path):
    path = folder(tmp_path / "x")
    (path / "m.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    with pytest.raises(ModelError, match="weight_map"):
        found(path)


def test_the_component_of_a_pipeline_is_found(tmp_path):
    folder(tmp_path / "pipe" / "transformer")
    (tmp_path / "pipe" / "model_index.json").write_text("{}")
    result, _ = found(tmp_path / "pipe")
    assert result.layout is LAYOUTS["diffusers"] and result.notes == ("took the component transformer",)


def test_half_precision_twin_is_not_an_ambiguity(tmp_path):
    path = folder(tmp_path / "x")
    save_file({"a": torch.ones(1)}, path / "diffusion_pytorch_model.fp16.safetensors")
    assert found(path)[0].layout is LAYOUTS["diffusers"]
    save_file({"a": torch.ones(1)}, path / "other.safetensors")
    with pytest.raises(ModelError, match="several weight files"):
        found(path)


def test_safetensors_under_another_name_are_read_as_what_they_are(tmp_path):
    save_file(state_of(), tmp_path / "x.ckpt")
    assert_same(found(tmp_path / "x.ckpt")[1], state_of())


@pytest.mark.parametrize("suffix", [".safetensors", ".gguf", ".pkl", ".png", ""])
def test_a_pickle_under_another_name_is_refused_unopened(tmp_path, suffix):
    torch.save(state_of(), tmp_path / f"x{suffix}")
    with pytest.raises(ModelError, match="is a pickle|no checkpoint that can be read"):
        found(tmp_path / f"x{suffix}")


@pytest.mark.parametrize("keep", [0, 5, 9, 200, -1])
def test_truncated_safetensors_are_damaged(tmp_path, keep):
    save_file(state_of(), tmp_path / "x.safetensors")
    data = (tmp_path / "x.safetensors").read_bytes()
    (tmp_path / "x.safetensors").write_bytes(data[:keep])
    with pytest.raises(ModelError, match="damaged"):
        found(tmp_path / "x.safetensors")


@pytest.mark.parametrize("text", ["", "[1]", "{", "[" * 100_000])
def test_a_damaged_configuration_is_named(tmp_path, text):
    path = folder(tmp_path / "x")
    (path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        found(path)


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(ModelError, match="there is no file"):
        found(tmp_path / "x")
    (tmp_path / "x").mkdir()
    with pytest.raises(ModelError, match="holds no weights"):
        found(tmp_path / "x")


def test_a_strange_checkpoint_names_the_layouts_tried(tmp_path):
    save_file({"encoder.embed": torch.ones(2), "head.bias": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"no known layout.*2 tensors.*encoder\.embed") as caught:
        found(tmp_path / "x.safetensors")
    assert "dit (original, diffusers)" in caught.value.hint


def test_a_checkpoint_without_a_key_that_tells_names_the_nearest_layout_and_the_key(tmp_path):
    state = state_of()
    del state["final_layer.linear.weight"]
    save_file({f"ema.{key}": tensor for key, tensor in state.items()}, tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"nearest to dit/original, but lacks 1 of .* final_layer\.linear\.weight"):
        found(tmp_path / "x.safetensors")
