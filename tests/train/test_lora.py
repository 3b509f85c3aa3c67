"""LoRA runs: only the branches are trained and saved, a killed run ends in the bytes of one that was not."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import toys

from nexus import api, checkpoint
from nexus.convert import lora_merge
from nexus.convert.lora import merge_files
from nexus.errors import InputError, ModelError, StoppedError, UsageError
from nexus.nn.lora import LoRAConfig
from nexus.requests import SampleRequest
from nexus.train.start import train
from tests.drawn import drawn

FLAGS = {"steps": 4, "batch_size": 4, "save_every": 1, "log_every": 1, "samples": 2, "keep": 9}
SPEC = LoRAConfig(rank=3, alpha=6)
SYSTEMS = ("sd", "dit", "flow", "mmdit", "pixart", "lcm")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("data"), ("red ball", "green tree"), count=3, side=32, seed=7)


@pytest.fixture(scope="module")
def bases(data, tmp_path_factory):
    """A tiny trained model of a system, made once."""
    made = {}

    def of(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name) / "base"
            train(name, data=str(data), run=made[name], preset="tiny", device="cpu",
                  flags=FLAGS | {"steps": 2, "samples": 0, "lr": 0.01})
        return made[name]
    return of


def go(name, data, base, run, flags=None, spec=SPEC, **more):
    return train(name, data=str(data), run=run, init=str(base), lora=spec, device="cpu", flags=FLAGS | (flags or {}),
                 **more)


def pictures(model, name, **request):
    system = checkpoint.load(str(model), device="cpu") if not isinstance(model, torch.nn.Module) else model
    settings = SampleRequest(steps=2, prompt="red ball", **request)
    return np.stack([item.image for item in api.sample(system, settings, seeds=[0, 1])]).astype(int)


@pytest.mark.parametrize("name", SYSTEMS)
def test_only_branches_are_trained_and_the_run_is_base_and_adapter(name, data, bases, tmp_path):
    base, run = bases(name), tmp_path / "run"
    before = toys.contents(base)
    go(name, data, base, run, {"lr": 0.01})
    assert toys.contents(base) == before
    step = run / "step-0000004"
    tensors = checkpoint.read_tensors(step / "model.safetensors")
    assert tensors and all(".lora." in n for n in tensors)
    assert any(t.any() for n, t in tensors.items() if n.endswith(".up"))
    assert checkpoint.verify(step) == [] and checkpoint.misfits(step) == []
    loaded, plain = checkpoint.load(str(run), device="cpu"), checkpoint.load(str(base), device="cpu")
    merge_files(plain, [str(step / "adapter.safetensors")])
    theirs = plain.state_dict()
    assert all(torch.equal(t, theirs[n]) for n, t in loaded.state_dict().items())
    assert not any(".lora." in n for n in theirs)
    fresh = checkpoint.load(str(base), device="cpu")
    if name not in ("flow",):
        assert np.abs(pictures(loaded, name) - pictures(fresh, name)).max() > 0
    with_lora = pictures(fresh, name, lora=(str(run),))
    assert np.abs(with_lora - pictures(loaded, name)).max() <= 1
    assert (pictures(fresh, name) == pictures(base, name)).all()                # and it is gone again


@pytest.mark.parametrize("flags", [{}, {"ema": 0.5, "accumulate": 2}, {"optimizer": "muon"}, {"precision": "bfloat16"}],
                         ids=["plain", "ema", "muon", "bfloat16"])
def test_a_stopped_run_goes_on_bit_for_bit(flags, data, bases, tmp_path):
    def stop(row):
        if row.get("step") == 2:
            os.kill(os.getpid(), signal.SIGTERM)
    base = bases("sd")
    go("sd", data, base, tmp_path / "whole", flags)
    with pytest.raises(StoppedError):
        go("sd", data, base, tmp_path / "cut", flags, progress=stop)
    assert go("sd", data, base, tmp_path / "cut", flags)["resumed"] == 2
    assert toys.contents(tmp_path / "cut") == toys.contents(tmp_path / "whole")


KILLED = """
import sys
from nexus.nn.lora import LoRAConfig
from nexus.train.start import train
train("sd", data=sys.argv[1], init=sys.argv[2], run=sys.argv[3], lora=LoRAConfig(rank=3, alpha=6), device="cpu",
      flags={"steps": 400, "batch_size": 4, "save_every": 1, "log_every": 1, "samples": 0, "keep": 9})
"""


def test_a_killed_run_goes_on_bit_for_bit(data, bases, tmp_path):
    base, run = bases("sd"), tmp_path / "cut"
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(data), str(base), str(run)],
                             env={**os.environ, "OMP_NUM_THREADS": "1",
                                  "PYTHONPATH": str(Path(__file__).parents[2])})
    limit = time.monotonic() + 120
    while not (run / "step-0000003").exists() and child.poll() is None and time.monotonic() < limit:
        time.sleep(0.01)
    child.send_signal(signal.SIGKILL)
    child.wait()
    torch.set_num_threads(1)
    reached = max(int(p.name[5:]) for p in run.glob("step-*"))
    steps = {"steps": reached + 2, "samples": 0}
    assert go("sd", data, base, run, steps)["resumed"] == reached
    go("sd", data, base, tmp_path / "whole", steps)
    assert toys.contents(run) == toys.contents(tmp_path / "whole")


def test_a_student_of_stable_diffusion_is_an_lcm_lora(data, bases, tmp_path):
    """LCM-LoRA: no guidance embedding, the base is the teacher, and the file fits both systems."""
    base, run = bases("sd"), tmp_path / "run"
    go("lcm", data, base, run, {"lr": 0.01})
    described = checkpoint.read_description(run)
    assert described["config"]["net"]["guidance_dim"] == 0 and described["config"]["teacher"].startswith(str(base))
    loaded = checkpoint.load(str(run), device="cpu", system="lcm")
    assert loaded.net.guidance is None and loaded.teacher is None
    file = str(run / "step-0000004/adapter.safetensors")
    student = checkpoint.load(str(base), device="cpu", system="lcm", student=True)
    assert np.abs(pictures(student, "lcm", lora=(file,)) - pictures(loaded, "lcm")).max() <= 1
    merge_files(checkpoint.load(str(base), device="cpu"), [file])
    with pytest.raises(ModelError, match="checkpoint of 'sd'"):
        checkpoint.load(str(base), device="cpu", system="dit", student=True)


def test_merging_makes_a_model_and_layouts_are_written(data, bases, tmp_path):
    base, run = bases("sd"), tmp_path / "run"
    go("sd", data, base, run, {"lr": 0.01})
    wanted = pictures(run, "sd")
    lora_merge.merged(base, tmp_path / "merged", [str(run)])
    lora_merge.merged(run, tmp_path / "own", [])
    for folder in ("merged", "own"):
        assert checkpoint.verify(tmp_path / folder) == []
        assert np.abs(pictures(tmp_path / folder, "sd") - wanted).max() <= 1
    step = lora_merge.run_of(run)
    for form, name in (("diffusers", "d.safetensors"), ("kohya", "k.safetensors"), ("peft", "p")):
        lora_merge.write_run(step, tmp_path / name, form)
        assert np.abs(pictures(base, "sd", lora=(str(tmp_path / name),)) - wanted).max() <= 1
    with pytest.raises(UsageError, match="no LoRA layout"):
        lora_merge.write_run(step, tmp_path / "x", "openai")
    with pytest.raises(UsageError, match="is a folder"):
        lora_merge.write_run(step, tmp_path / "x.safetensors", "peft")
    lora_merge.merged(base, tmp_path / "half", [f"{run}:0"])
    assert (pictures(tmp_path / "half", "sd") == pictures(base, "sd")).all()
    with pytest.raises(ModelError, match="is a LoRA run"):
        go("sd", data, run, tmp_path / "again")


def test_a_transformers_lora_has_no_kohya_names(data, bases, tmp_path):
    go("mmdit", data, bases("mmdit"), tmp_path / "run")
    step = lora_merge.run_of(tmp_path / "run")
    with pytest.raises(UsageError, match="is a transformer"):
        lora_merge.write_run(step, tmp_path / "k.safetensors", "kohya")
    lora_merge.write_run(step, tmp_path / "d.safetensors", "diffusers")


def test_what_cannot_go_on_says_so(data, bases, tmp_path):
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(bases("sd"), base)
    go("sd", data, base, run, {"steps": 1})
    with pytest.raises(UsageError, match="another value of lora"):
        go("sd", data, base, run, spec=LoRAConfig(rank=4))
    assert go("sd", data, base, run, {"steps": 2}, spec=None)["resumed"] == 1
    with pytest.raises(ModelError, match="checkpoint of 'sd', not of 'dit'"):
        go("dit", data, base, tmp_path / "x")
    with pytest.raises(UsageError, match="another value of lora"):
        train("sd", data=str(data), run=bases("sd"), lora=SPEC, device="cpu", flags=FLAGS | {"steps": 2})
    file = base / "step-0000002" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-3] ^= 1
    file.write_bytes(raw)
    ema = base / "step-0000002" / "ema.safetensors"
    if ema.exists():
        ema.write_bytes(bytes(raw))
    with pytest.raises(InputError, match="is not what"):
        go("sd", data, base, run, {"steps": 3})
