"""What is published in parts: a network alone, a file without text encoders, classes beside the usual one."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus import checkpoint
from nexus.convert.convert import convert
from nexus.errors import ModelError
from nexus.requests import SampleRequest

diffusers = pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent))
import pipelines  # noqa: E402

from tests.parity import published  # noqa: E402

PIPES = {"sd": pipelines.sd, "sdxl": pipelines.sdxl}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("name", PIPES)
def test_a_unet_alone_is_stable_diffusions(name, tmp_path):
    PIPES[name]().unet.save_pretrained(tmp_path / "unet")
    report = convert(tmp_path / "unet", tmp_path / "ours")
    assert (report.system, report.layout) == ("sd", "sd/diffusers")
    assert report.config["conditioner"]["recipe"] == ("sdxl" if name == "sdxl" else "sd")
    convert(tmp_path / "ours", tmp_path / "back", to="sd/diffusers")
    file = "diffusion_pytorch_model.safetensors"
    assert equal(load_file(tmp_path / "back" / file), load_file(tmp_path / "unet" / file))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_unet_in_the_original_names_alone(prefix, tmp_path):
    pipelines.sd().save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "whole.safetensors", to="original")
    there = "model.diffusion_model."
    whole = load_file(tmp_path / "whole.safetensors")
    net = {k.removeprefix(there): t for k, t in whole.items() if k.startswith(there)}
    save_file({prefix + k: t for k, t in net.items()}, tmp_path / "net.safetensors")
    report = convert(tmp_path / "net.safetensors", tmp_path / "ours", overrides=["net.heads=2"])
    assert (report.system, report.layout) == ("sd", "sd/original")
    whole = load_file(tmp_path / "whole/model.safetensors")
    assert equal({k: t for k, t in whole.items() if k.startswith("net.")},
                 {k: t for k, t in load_file(tmp_path / "ours/model.safetensors").items() if k.startswith("net.")})


def test_what_the_original_code_would_build_otherwise_is_refused(tmp_path):
    pipe = pipelines.sd()
    said = {k: v for k, v in pipe.unet.config.items() if k[0] != "_"}
    pipe.unet = diffusers.UNet2DConditionModel(**said | {"norm_num_groups": 8})
    pipe.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    with pytest.raises(ModelError, match="groups 32, this one has 8"):
        convert(tmp_path / "ours", tmp_path / "x.safetensors", to="original")


@pytest.mark.parametrize("sibling", ["StableDiffusionControlNetPipeline", "StableDiffusionPAGPipeline"])
def test_a_class_that_uses_the_same_model_otherwise_is_that_model(sibling, tmp_path):
    pipelines.sd().save_pretrained(tmp_path / "theirs")
    index = tmp_path / "theirs/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": sibling}))
    assert convert(tmp_path / "theirs", tmp_path / "ours").layout == "sd/diffusers"
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers")
    assert json.loads((tmp_path / "back/model_index.json").read_text())["_class_name"] == "StableDiffusionPipeline"


def test_of_a_class_that_is_unknown_the_network_is_taken_and_not_the_codec(tmp_path):
    pipelines.sd().save_pretrained(tmp_path / "theirs")
    index = tmp_path / "theirs/model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "SomeoneElsesPipeline"}))
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    assert report.system == "sd" and "took the component unet, not vae" in report.notes


@pytest.mark.parametrize("given", [False, True], ids=["none", "a pipeline's"])
def test_sd3_without_its_text_encoders_keeps_its_codec(given, tmp_path):
    """As sd3_medium.safetensors is published: a network and a codec."""
    pipe = published.sd3()
    pipe.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "whole")
    convert(tmp_path / "whole", tmp_path / "all.safetensors", to="original")
    state = {k: t for k, t in load_file(tmp_path / "all.safetensors").items() if not k.startswith("text_encoders.")}
    save_file(state, tmp_path / "sd3.safetensors")
    told = ["net.heads=3", "net.size=8", *([f"encoders={tmp_path / 'theirs'}"] if given else [])]
    report = convert(tmp_path / "sd3.safetensors", tmp_path / "ours", overrides=told)
    assert (report.layout, report.problems, report.dropped) == ("mmdit/original", (), ())
    assert given or "has no text encoders" in report.notes[-1]
    convert(tmp_path / "ours", tmp_path / "back.safetensors", to="original")
    assert equal(load_file(tmp_path / "back.safetensors"), state)
    if given:
        one, two = (checkpoint.load(str(tmp_path / name), device="cpu") for name in ("ours", "whole"))
        words = [system.conditioner.prompts(["a red ball"], torch.device("cpu"))[0] for system in (one, two)]
        assert equal(*words)
        assert one.generate(SampleRequest(prompt="a red ball", steps=1), seeds=[0]).data.shape[1] == 3


def test_half_precision_in_shards_with_their_own_index(tmp_path):
    pipe = pipelines.sd().to(torch.float16)
    pipe.save_pretrained(tmp_path / "theirs", variant="fp16", max_shard_size="100KB")
    assert list((tmp_path / "theirs/unet").glob("*.index.fp16.json"))
    convert(tmp_path / "theirs", tmp_path / "ours")
    assert {t.dtype for t in load_file(tmp_path / "ours/model.safetensors").values()} == {torch.float16}
    system = checkpoint.load(str(tmp_path / "ours"), device="cpu")
    assert system.generate(SampleRequest(prompt="a red ball", steps=1), seeds=[0]).data.isfinite().all()
