"""nexus convert on the command line: names, notes and refusals; what it computes is tested in tests/convert."""

import json

import pytest
import torch
from safetensors.torch import load_file

from nexus import catalog, checkpoint

OPENAI = {"channels": 32, "mult": [1, 2], "blocks": 1, "attention": [1], "heads": 2}


@pytest.fixture
def saved(tmp_path):
    """saved(system, **changes) -> the folder of a new random model of the preset tiny."""
    def make(system, **changes):
        torch.manual_seed(0)
        cls = catalog.config_class(system)
        config = cls.parse(cls.preset("tiny").to_json() | changes)
        checkpoint.save_model(tmp_path / system, system, config.to_json(), checkpoint.own_state(config.build()))
        return tmp_path / system
    return make


def test_what_is_not_carried_is_one_line_on_stderr(saved, tmp_path, warm):
    model = saved("ddpm")
    done = warm("convert", model, tmp_path / "x", "--to", "diffusers")
    assert done.returncode == 0 and done.stdout.count(b"\n") == 1, done.stderr.decode()
    assert done.stderr.decode().splitlines().count("not carried: steps") == 1
    done = warm("convert", model, tmp_path / "x", "--to", "diffusers", "-f", "--json")
    assert done.stderr == b"not carried: steps\n" and json.loads(done.stdout)["notes"] == ["not carried: steps"]
    assert warm("convert", model, tmp_path / "x", "--to", "diffusers", "-fq").stderr == b""


def test_a_layout_is_named_with_from(saved, tmp_path, warm):
    model, file = saved("ddpm", net=OPENAI), tmp_path / "x.safetensors"
    assert warm("convert", model, file, "--to", "openai-thirds").returncode == 0
    done = warm("convert", file, tmp_path / "y", "--from", "openai-thirds", "--set", "net.heads=2", "--set", "size=16")
    assert done.returncode == 0, done.stderr.decode()
    a, b = (load_file(folder / "model.safetensors") for folder in (model, tmp_path / "y"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    shown = " ".join(warm("convert", "--help").stdout.decode().replace("│", " ").split())
    assert "--from LAYOUT" in shown and "if its keys do not tell" in shown


@pytest.mark.parametrize("arguments, code, said", [
    (["x"], 2, "name the layout that it is to be written in"),
    (["x", "--to", "original"], 2, "has no layout 'original'"), (["x", "--to", "diffusers"], 2, "predicts as flow"),
    (["x", "--to", "ddpm/diffusers", "--from", "openai"], 2, "--from"),
    (["x", "--to", "ddpm/diffusers", "--set", "a=1"], 2, "--set"), (["x", "--to", "ddpm/openai"], 2, "is one file")])
def test_a_flow_model_is_refused_in_one_line_with_a_next_step(saved, tmp_path, warm, arguments, code, said):
    done = warm("convert", saved("flow"), tmp_path / arguments[0], *arguments[1:])
    lines = done.stderr.decode().splitlines()
    assert done.returncode == code and len(lines) == 2 and said in lines[0] and lines[1].startswith("hint: ")
    assert not (tmp_path / "x").exists()


def test_an_embedded_model_goes_by_its_name(tmp_path, warm):
    if "ddpm" not in checkpoint.zoo_names():
        pytest.skip("no embedded checkpoint")
    done = warm("convert", "ddpm", tmp_path / "x", "--to", "diffusers")
    assert done.returncode == 0, done.stderr.decode()
    size = checkpoint.read_description(checkpoint.find("ddpm"))["config"]["size"]
    assert json.loads((tmp_path / "x" / "config.json").read_text())["sample_size"] == size
    assert warm("convert", "dppm", tmp_path / "y").returncode == 4


def test_an_average_of_another_length_is_written_from_a_runs_profiles(tmp_path, warm):
    run, out = tmp_path / "run", tmp_path / "averaged"
    trained = warm("train", "ddpm", "--data", "mnist", "--preset", "tiny", "--run", run, "--steps", "8",
                   "--set", "train.samples=0", "--set", "train.ema_profiles=[0.05,0.1]", "--set", "train.save_every=2")
    assert trained.returncode == 0, trained.stderr.decode()
    done = warm("convert", run, out, "--ema", "0.08", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["ema"] == 0.08, done.stderr.decode()
    assert json.loads((out / "config.json").read_text())["ema_profile"] == 0.08
    ours, usual = (load_file(folder / file) for folder, file in (
        (out, "model.safetensors"), (run / "step-0000008", "ema.safetensors")))
    assert ours.keys() == usual.keys() and any(not torch.equal(ours[name], usual[name]) for name in ours)
    new = tmp_path / "new"
    for target, arguments, code in ((new, ["--ema", "0.5"], 2), (new, ["--ema", "0.08", "--to", "diffusers"], 2),
                                    (out, ["--ema", "0.08"], 6)):
        refused = warm("convert", run, target, *arguments)
        assert refused.returncode == code and refused.stderr.decode().startswith("error: "), arguments
    assert not new.exists()


def test_what_is_converted_and_what_is_no_model_is_never_replaced(saved, tmp_path, warm):
    model = saved("ddpm")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/thesis.tex").write_text("all of it")
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "here").mkdir()
    before = sorted(tmp_path.rglob("*"))
    for target, code, said in ((model, 2, "is or holds"), (tmp_path, 2, "is or holds"), ("", 2, "name a folder"),
                               (tmp_path / "notes", 6, "holds no model"), (tmp_path / "link", 6, "is a link")):
        done = warm("convert", model, target, "--to", "diffusers", "-f", cwd=tmp_path / "here")
        assert done.returncode == code and said in " ".join(done.stderr.decode().split()), (target, done.stderr)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "notes/thesis.tex").read_text() == "all of it"
