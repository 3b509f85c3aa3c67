"""What the way to a public layout and back keeps, what it says that it loses, and which layouts a model has."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus import catalog, checkpoint
from nexus.convert.convert import convert
from nexus.convert.export import layouts_of
from nexus.convert.keymap import to_foreign
from nexus.convert.layouts import every_layout
from nexus.errors import ModelError, UsageError

DIT = {"size": 8, "hidden": 32, "depth": 2, "heads": 2, "num_classes": 3, "learn_sigma": False}
OPENAI = {"channels": 32, "mult": [1, 2], "blocks": 1, "attention": [1], "heads": 2}
WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def saved(tmp_path):
    """saved(system, config) -> the folder of a new random model."""
    def make(system, config):
        torch.manual_seed(0)
        config = catalog.config_class(system).parse(config)
        built = config.build()
        folder = tmp_path / f"native-{system}"
        checkpoint.save_model(folder, system, config.to_json(), checkpoint.own_state(built))
        return folder
    return make


def preset(system, name="tiny", **changes):
    return catalog.config_class(system).preset(name).to_json() | changes


def described(folder):
    return json.loads((folder / "config.json").read_text())


def weights(folder):
    return load_file(folder / "model.safetensors")


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# What a pixel model keeps and loses

@pytest.mark.parametrize("said, size, assumed", [(48, 48, {}), ([24, 24], 24, {}), (None, 32, {"size": 32}),
                                                 ([24, 16], 32, {"size": 32})])
def test_a_pixel_model_keeps_its_side(tmp_path, said, size, assumed):
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.UNet2DModel(block_out_channels=(16, 32), norm_num_groups=8, layers_per_block=1,
                                      down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                      up_block_types=("AttnUpBlock2D", "UpBlock2D"), sample_size=said)
    reference.save_pretrained(tmp_path / "foreign")
    report = convert(tmp_path / "foreign", tmp_path / "native")
    assert report.config["size"] == size and report.assumed == assumed
    convert(tmp_path / "native", tmp_path / "back", to="diffusers")
    assert described(tmp_path / "back")["sample_size"] == size
    assert same(load_file(tmp_path / "back" / WEIGHTS), reference.state_dict())
    assert diffusers.UNet2DModel.from_pretrained(tmp_path / "back").config.sample_size == size
    assert convert(tmp_path / "back", tmp_path / "again").config == report.config


def test_settings_without_a_place_are_named_once(saved, tmp_path):
    model = saved("ddpm", preset("ddpm", sampler="heun"))           # tiny: size 16, steps 4
    report = convert(model, tmp_path / "foreign", to="diffusers")
    assert report.notes == ("not carried: sampler, steps",)
    assert convert(model, tmp_path / "x", to="diffusers", check=True).notes == report.notes
    back = convert(tmp_path / "foreign", tmp_path / "back")
    usual = catalog.config_class("ddpm")()
    assert (back.config["size"], back.config["steps"], back.config["sampler"]) == (16, usual.steps, usual.sampler)
    assert same(weights(tmp_path / "back"), weights(model))


def test_a_model_with_the_usual_settings_loses_nothing(saved, tmp_path):
    model = saved("ddpm", preset("ddpm", size=32, steps=1000))
    assert convert(model, tmp_path / "foreign", to="diffusers").notes == ()


def test_a_file_that_tells_less_loses_more(saved, tmp_path):
    model = saved("ddpm", preset("ddpm", steps=1000, net=OPENAI))
    note, = convert(model, tmp_path / "x.safetensors", to="openai").notes
    assert note == "not carried: net.heads, size"
    told = convert(tmp_path / "x.safetensors", tmp_path / "back", overrides=["net.heads=2", "size=16"])
    assert told.config["size"] == 16 and told.config["net"]["heads"] == 2
    assert same(weights(tmp_path / "back"), weights(model))
    assert convert(tmp_path / "x.safetensors", tmp_path / "y", check=True).assumed["size"] == 32


def test_a_setting_that_one_file_was_told_is_not_the_next_ones(saved, tmp_path):
    convert(saved("ddpm", preset("ddpm", steps=1000, net=OPENAI)), tmp_path / "x.safetensors", to="openai")
    told = convert(tmp_path / "x.safetensors", tmp_path / "a",
                   overrides=["net.heads=2", "path.beta_schedule=cosine"]).config
    assert told["path"]["beta_schedule"] == "cosine"
    assumed = convert(tmp_path / "x.safetensors", tmp_path / "b", check=True).assumed
    assert assumed["path.beta_schedule"] == "linear"


@pytest.mark.parametrize("name, value", [("groups", 8), ("eps", 1e-6), ("corner_pad", True), ("sin_first", True)])
def test_a_network_that_its_readers_would_build_otherwise_is_refused(saved, tmp_path, name, value):
    model = saved("ddpm", preset("ddpm", net=OPENAI | {name: value}))
    with pytest.raises(ModelError, match=f"have {name} ") as caught:
        convert(model, tmp_path / "x.safetensors", to="openai")
    assert "--to diffusers" in caught.value.hint
    convert(model, tmp_path / "x", to="diffusers")
    assert convert(tmp_path / "x", tmp_path / "y").config["net"][name] == value


def test_an_unknown_setting_is_asked_for_though_another_is_given(tmp_path):
    original = next(layout for layout in every_layout() if (layout.system, layout.name) == ("dit", "original"))
    config = preset("dit")
    state = catalog.config_class("dit").parse(config).build().net.state_dict()
    save_file(to_foreign(original.table(config), state), tmp_path / "x.safetensors")
    with pytest.raises(ModelError, match=r"does not tell net\.heads"):
        convert(tmp_path / "x.safetensors", tmp_path / "y", overrides=["net.size=8"])


# Layouts by name

@pytest.fixture
def thirds(saved, tmp_path):
    """A native model, and its file with q, k, v in whole thirds: the keys and shapes of another layout."""
    model = saved("ddpm", preset("ddpm", net=OPENAI))
    convert(model, tmp_path / "thirds.safetensors", to="openai-thirds")
    return model, tmp_path / "thirds.safetensors"


@pytest.mark.parametrize("name", ["openai-thirds", "ddpm/openai-thirds"])
def test_a_layout_that_keys_do_not_tell_is_read_by_its_name(thirds, tmp_path, name):
    model, file = thirds
    report = convert(file, tmp_path / "named", read_as=name, overrides=["net.heads=2", "size=16"])
    assert report.layout == "ddpm/openai-thirds" and same(weights(tmp_path / "named"), weights(model))
    convert(file, tmp_path / "guessed", overrides=["net.heads=2"])
    assert not same(weights(tmp_path / "guessed"), weights(model))
    back = tmp_path / "back.safetensors"
    convert(tmp_path / "named", back, to="openai-thirds")
    assert back.read_bytes() == file.read_bytes()


def test_a_labelled_file_goes_to_the_system_with_labels(saved, tmp_path):
    model = saved("conditional", preset("conditional", net=OPENAI | {"num_classes": 3, "null_class": False}))
    convert(model, tmp_path / "x.safetensors", to="openai-thirds")
    report = convert(tmp_path / "x.safetensors", tmp_path / "y", read_as="openai-thirds", overrides=["net.heads=2"])
    assert report.system == "conditional" and same(weights(tmp_path / "y"), weights(model))


def test_a_name_that_does_not_fit_is_refused(thirds, tmp_path):
    model, file = thirds
    with pytest.raises(UsageError, match="no layout 'openai-third'") as caught:
        convert(file, tmp_path / "y", read_as="openai-third")
    assert "did you mean 'openai-thirds'?" in caught.value.hint
    with pytest.raises(ModelError, match="nearest to|no known layout"):
        convert(file, tmp_path / "y", read_as="dit/original")
    with pytest.raises(UsageError, match="--from is for foreign"):
        convert(model, tmp_path / "y", read_as="openai", to="diffusers")


# Systems without layouts of their own

@pytest.fixture
def flow(saved):
    return saved("flow", preset("flow", net=DIT, size=8))


def test_a_flow_is_not_passed_off_as_a_model_of_noise(flow, tmp_path):
    with pytest.raises(UsageError, match="dit/original can .* takes for eps what this one predicts as flow") as caught:
        convert(flow, tmp_path / "x.safetensors", to="original")
    assert "--to dit/original writes the network alone" in caught.value.hint
    assert not (tmp_path / "x.safetensors").exists()


@pytest.mark.parametrize("to, name, said", [("dit/original", "x.safetensors", "net.heads=2"),
                                            ("dit/diffusers", "x", "net.freq_shift=0")])
def test_its_network_goes_out_when_that_is_what_was_asked_for(flow, tmp_path, to, name, said):
    report = convert(flow, tmp_path / name, to=to)
    assert report.layout == to and report.notes[0].startswith("not carried: ") and "prediction" in report.notes[0]
    back = convert(tmp_path / name, tmp_path / "back", overrides=[said])
    assert back.system == "dit" and same(weights(tmp_path / "back"), weights(flow))
    sought = catalog.config_class("dit").parse({"net": DIT, "learned_variance": False}).to_json()
    assert back.config["net"] == sought["net"] and not back.config["learned_variance"]


def test_a_flow_of_a_unet_has_the_layouts_of_a_unet(saved, tmp_path):
    model = saved("flow", preset("flow"))
    convert(model, tmp_path / "x", to="ddpm/diffusers")
    assert described(tmp_path / "x")["_class_name"] == "UNet2DModel"
    count = sum(tensor.numel() for tensor in weights(model).values())
    assert sum(tensor.numel() for tensor in load_file(tmp_path / "x" / WEIGHTS).values()) == count


def test_a_native_model_needs_a_layout_and_is_told_which(flow, saved, tmp_path):
    for source, names in ((flow, "dit/original, dit/diffusers"), (saved("dit", preset("dit")), "original, diffusers")):
        with pytest.raises(UsageError, match="is a Nexus model already: name the layout") as caught:
            convert(source, tmp_path / "x")
        assert names in caught.value.hint


@pytest.mark.parametrize("system", catalog.CATALOG)
def test_a_layout_of_another_system_has_a_place_for_every_tensor(system):
    config = catalog.config_class(system).preset("tiny")
    with torch.device("meta"):
        state = config.build().net.state_dict()
    own = sum(layout.system == system for layout in every_layout())
    found = layouts_of(system, config)
    assert all(layout.system == system for layout in found[:own])
    for layout in found[own:]:
        assert layout.system != system and layout.part == "net"
        foreign = to_foreign(layout.table(config.to_json()), state)
        assert sum(t.numel() for t in foreign.values()) == sum(t.numel() for t in state.values())
