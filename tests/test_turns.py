"""--offload: the same pictures to the byte, with fewer weights in memory at once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nexus import api, catalog, checkpoint, turns
from nexus.errors import ModelError, UsageError
from nexus.images import write_image
from nexus.requests import SampleRequest

ROOT = Path(__file__).parent.parent
SYSTEMS = [("ddpm", "tiny"), ("dit", "tiny"), ("sd", "tiny"), ("mmdit", "tiny"), ("mmdit", "tiny-flux"),
           ("pixart", "tiny"), ("consistency", "tiny"), ("vae", "tiny-codec"), ("conditional", "inpaint-tiny")]


@pytest.fixture
def stored(tmp_path):
    """stored(name, preset, **changes) -> the folder of a model with random weights."""
    def make(name, preset="tiny", dtype=torch.float32, **changes):
        torch.manual_seed(0)
        config = catalog.config_class(name).preset(preset)
        config = config.model_copy(update=changes)
        built = config.build()
        state = {n: t + 0.05 * torch.randn(t.shape) if t.is_floating_point() else t
                 for n, t in checkpoint.released_state(built).items()}
        checkpoint.save_model(tmp_path / name, name, config.to_json(), {n: t.to(dtype) for n, t in state.items()})
        return str(tmp_path / name)
    return make


def pictures(model, request=None, **settings):
    system = api.load(model, device="cpu", **settings)
    made = api.sample(system, request or SampleRequest(), seeds=[3, 4, 5], batch_size=2)
    return system, [item.image for item in made]


def in_memory(system, part):
    tensors = list(system.get_submodule(part).state_dict().values())
    return sum(t.untyped_storage().nbytes() for t in tensors) >= sum(t.nbytes for t in tensors)


@pytest.mark.parametrize("name, preset", SYSTEMS)
def test_the_pictures_are_the_same(stored, name, preset):
    model = stored(name, preset)
    _, whole = pictures(model)
    system, taking_turns = pictures(model, offload=True)
    assert all(np.array_equal(a, b) for a, b in zip(whole, taking_turns, strict=True))
    if getattr(system, "codec", None) is not None:
        assert in_memory(system, "codec") and not in_memory(system, "net")


@pytest.mark.parametrize("dtype", ["bfloat16", "auto"])
def test_half_precision_files_too(stored, dtype):
    model = stored("sd", dtype=torch.bfloat16)
    _, whole = pictures(model, SampleRequest(prompt="a cat"), dtype=dtype)
    system, taking_turns = pictures(model, SampleRequest(prompt="a cat"), dtype=dtype, offload=True)
    assert all(np.array_equal(a, b) for a, b in zip(whole, taking_turns, strict=True))
    assert next(system.net.parameters()).dtype == (torch.bfloat16 if dtype == "bfloat16" else torch.float32)


def test_starting_from_a_picture_the_codec_has_two_turns(stored, tmp_path):
    model = stored("dit")
    image = str(write_image(tmp_path / "in.png", np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)))
    request = SampleRequest(image=image, strength=0.5)
    assert np.array_equal(pictures(model, request)[1], pictures(model, request, offload=True)[1])


def test_nothing_is_read_before_it_is_called(stored):
    model = stored("sd")
    system = api.load(model, device="cpu", offload=True)
    whole = api.load(model, device="cpu")
    for part in turns.PARTS:
        assert not in_memory(system, part)
    assert {n: t.shape for n, t in system.state_dict().items()} == {n: t.shape for n, t in whole.state_dict().items()}
    system.encode(torch.zeros(1, 3, 16, 16))
    assert in_memory(system, "codec") and not in_memory(system, "net")
    for name, value in whole.codec.state_dict().items():
        assert torch.equal(system.codec.state_dict()[name], value)


def test_a_part_that_stays_keeps_what_was_changed(stored):
    system = api.load(stored("dit"), device="cpu", offload=True)
    with system.turns.staying("net"):
        system.net.final.bias.data += 1
        changed = system.net.final.bias.clone()
        system.decode(torch.zeros(1, *system.config.latent_shape))
        assert torch.equal(system.net.final.bias, changed)
    assert not in_memory(system, "net")
    system.turns.take("net")
    torch.testing.assert_close(system.net.final.bias, changed - 1)


def test_the_embedded_models_share_a_codec_of_another_file():
    request = SampleRequest(prompt="red apple", steps=2)
    whole, taking_turns = (next(iter(api.sample("dit", request, seeds=[0], device="cpu", offload=offload))).image
                           for offload in (False, True))
    assert np.array_equal(whole, taking_turns)


def test_a_wrong_file_is_told_at_once(stored, tmp_path):
    model = Path(stored("dit"))
    tensors = checkpoint.read_tensors(model / "model.safetensors")
    tensors.pop("net.final.bias")
    described = json.loads((model / "config.json").read_text())
    checkpoint.save_model(tmp_path / "less", "dit", described["config"], tensors)
    with pytest.raises(ModelError, match="lacks net.final.bias"):
        api.load(str(tmp_path / "less"), device="cpu", offload=True)
    checkpoint.save_model(tmp_path / "lora", "dit", described["config"], tensors, facts={"lora": {"rank": 4}})
    with pytest.raises(UsageError, match="LoRA"):
        api.load(str(tmp_path / "lora"), device="cpu", offload=True)


# --- peak memory ----------------------------------------------------------------------------------------------------

MAKE = """
import sys, torch
sys.path.insert(0, "tests/text")
import encoders
from nexus import catalog, checkpoint
folder = sys.argv[1]
torch.manual_seed(0)
encoders.save(__import__("pathlib").Path(folder) / "text", encoders.clip(768, layers=5))
net = {"in_channels": 4, "out_channels": 4, "channels": 128, "mult": (1, 2, 3), "blocks": 1, "attention": (2,),
       "heads": 4, "context_dim": 768}
codec = {"net": {"channels": (96, 192, 352), "blocks": 2, "groups": 32, "size": 32}}
config = catalog.config_class("sd").parse({"net": net, "codec": codec, "steps": 2, "conditioner": {
    "kind": "pretrained", "recipe": "sd", "encoders": ["./text"], "cache": False}})
built = config.build()
with torch.no_grad():
    for p in built.parameters():
        p.add_(torch.randn(p.shape) * 0.01)
print({n: sum(p.numel() for p in m.parameters()) * 4 / 2**20 for n, m in built.named_children()})
checkpoint.save_model(__import__("pathlib").Path(folder) / "model", "sd", config.to_json(), built.state_dict())
import shutil
shutil.move(folder + "/text", folder + "/model/text")
"""
RUN = """
import hashlib, sys
from nexus import api
from nexus.requests import SampleRequest
import nexus.models.diffusion.stable_diffusion, transformers
from transformers import CLIPTextModel, AutoTokenizer

def high():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmHWM"))
base = high()
system = api.load(sys.argv[1], device="cpu", offload=sys.argv[2] == "on")
made = list(api.sample(system, SampleRequest(prompt="a cat"), seeds=[0, 1], batch_size=1))
print(high() - base, hashlib.sha256(b"".join(i.image.tobytes() for i in made)).hexdigest())
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A model of about 90 MB of text encoder, 155 MB of network and 103 MB of codec."""
    folder = tmp_path_factory.mktemp("large")
    made = process(MAKE, folder)
    assert made.returncode == 0, made.stderr[-2000:]
    return folder / "model"


def process(code, *arguments):
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True,
                          env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}, timeout=300)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_the_peak_is_below_the_sum_of_the_parts(large):
    (whole, first), (less, second) = (process(RUN, large, mode).stdout.split() for mode in ("off", "on"))
    weights = sum(f.stat().st_size for f in large.rglob("*.safetensors")) / 2**20
    assert first == second
    assert float(less) < weights < float(whole), (less, weights, whole)
