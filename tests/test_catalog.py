"""What every system of the catalog must do, on its smallest preset; a new system is tested by being named there."""

import hashlib
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from nexus import api, catalog, checkpoint
from nexus.catalog import CATALOG
from nexus.errors import StoppedError, UsageError
from nexus.requests import SampleRequest
from nexus.train.start import train
from tests.drawn import drawn, sung

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = {"steps": 2, "batch_size": 4, "accumulate": 1, "save_every": 1, "log_every": 1, "samples": 2}

every_system = pytest.mark.parametrize("name", CATALOG)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Pictures, and beside them sounds."""
    labels, folder = ("red ball", "green tree", "blue door"), tmp_path_factory.mktemp("catalog")
    sung(folder / "sounds", labels, count=4, seconds=2, rate=1600, seed=7)
    return drawn(folder / "pictures", labels, count=4, side=32, seed=7)


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """The run folder of a system after two steps, made once."""
    runs = {}

    def of(name):
        if name not in runs:
            run = tmp_path_factory.mktemp(name) / "run"
            train(name, data=data_of(name, pictures), run=run, preset="tiny", flags=FLAGS, device="cpu")
            runs[name] = run
        return runs[name]
    return of


def data_of(name, pictures):
    """What a system is trained on: pictures, two kinds of them for one that learns from two, or sounds."""
    config = catalog.config_class(name).preset("tiny")
    if getattr(config, "medium", "image") == "audio":
        return str(pictures.parent / "sounds")
    return f"{pictures / 'red ball'},{pictures / 'green tree'}" if getattr(config, "domains", None) else str(pictures)


def given(name, pictures):
    """What a request must hold: a picture, for a system that makes one of another."""
    return {"image": str(pictures / "red ball/0.png")} if "," in data_of(name, pictures) else {}


def contents(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


@every_system
def test_the_entry_is_complete(name):
    entry = CATALOG[name]
    assert re.fullmatch(r"[a-z][a-z0-9-]*", name) and entry.kind in ("image", "audio", "video")
    assert entry.summary and len(entry.summary) < 100 and entry.summary[-1] != "."
    cls = catalog.config_class(name)
    assert {"tiny", cls.default_preset} <= cls.presets.keys() and cls.recipes.keys() <= cls.presets.keys()
    assert cls.__doc__


@every_system
def test_every_preset_goes_to_json_and_back(name):
    cls = catalog.config_class(name)
    for preset in cls.presets:
        config = cls.preset(preset)
        assert cls.parse(json.loads(json.dumps(config.to_json()))) == config
        assert config.override([]) == config


@every_system
def test_every_preset_builds_on_the_meta_device(name):
    cls = catalog.config_class(name)
    for preset in cls.presets:
        with torch.device("meta"):
            built = cls.preset(preset).build()
        assert all(p.device.type == "meta" for p in built.parameters())
        assert sum(p.numel() for p in built.net.parameters()) > 0
        assert built.config == cls.preset(preset) and isinstance(built.external, dict)


@every_system
def test_every_recipe_is_valid(name):
    from nexus.train.args import TrainArgs
    cls = catalog.config_class(name)
    for recipe in cls.recipes.values():
        TrainArgs.parse(recipe)


@every_system
def test_phases_cover_what_is_saved_and_leave_frozen_parts_alone(name):
    cls = catalog.config_class(name)
    built = checkpoint.build(name, cls.preset("tiny").to_json())
    phases = built.phases()
    assert phases and len({p.name for p in phases}) == len(phases) and all(p.repeat >= 1 for p in phases)
    inside = [id(p) for phase in phases for p in phase.module.parameters() if p.requires_grad]
    own = {n: p for n, p in built.named_parameters() if n in checkpoint.own_state(built)}
    assert {id(p) for p in own.values() if p.requires_grad} == set(inside)
    for part in built.external:
        assert not any(p.requires_grad for p in getattr(built, part).parameters())
        assert not any(n.startswith(f"{part}.") for n in own)


@every_system
def test_two_steps_have_finite_losses_and_change_weights(name, trained):
    run = trained(name)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert [r["step"] for r in rows] == [1, 2]
    for row in rows:
        losses = [v for k, v in row.items() if k.endswith("loss")]
        assert losses and all(v == v and abs(v) < float("inf") for k, v in row.items())
    first, second = (checkpoint.read_tensors(run / f"step-000000{i}/model.safetensors") for i in (1, 2))
    assert first.keys() == second.keys() and any(not torch.equal(first[n], second[n]) for n in first)
    assert (run / "report.html").exists() and len(list((run / "samples").glob("*.webp"))) == 1


@every_system
@pytest.mark.parametrize("changed", [{}, {"accumulate": 2}, {"precision": "bfloat16"}, {"optimizer": "muon"}],
                         ids=["plain", "parts", "bfloat16", "muon"])
def test_a_stopped_run_goes_on_bit_for_bit(name, changed, trained, pictures, tmp_path):
    def go(run, progress=lambda row: None):
        return train(name, data=data_of(name, pictures), run=run, preset="tiny", flags=FLAGS | changed, device="cpu",
                     progress=progress)

    def stop(row):
        if row.get("step") == 1:
            os.kill(os.getpid(), signal.SIGTERM)
    if changed:
        go(tmp_path / "whole")
    whole = tmp_path / "whole" if changed else trained(name)
    with pytest.raises(StoppedError):
        go(tmp_path / "run", stop)
    assert go(tmp_path / "run")["resumed"] == 1
    for part in ("step-0000002", "samples"):
        assert contents(tmp_path / "run" / part) == contents(whole / part)
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


@every_system
def test_a_loaded_model_is_the_saved_one(name, trained):
    run = trained(name)
    loaded = checkpoint.load(str(run), device="cpu", system=name)
    stored = checkpoint.read_tensors(run / "step-0000002/ema.safetensors") \
        if (run / "step-0000002/ema.safetensors").exists() \
        else checkpoint.read_tensors(run / "step-0000002/model.safetensors")
    own = checkpoint.own_state(loaded)
    assert all(torch.equal(own[n], t) for n, t in stored.items()) and not loaded.training
    description = checkpoint.read_description(run / "step-0000002")
    assert loaded.config == catalog.config_class(name).parse(description["config"])


def request(config, **more):
    """Three steps of what samples in steps."""
    return SampleRequest(**({"steps": 3} if "steps" in config.model_fields else {}), **more)


def made(system, seeds, **more):
    return system.generate(request(type(system.config), **more), seeds=seeds).data.float()


@every_system
def test_an_item_depends_on_its_seed_alone(name, trained, pictures):
    more = given(name, pictures)
    system = checkpoint.load(str(trained(name)), device="cpu")
    together = made(system, [3, 1, 4, 7], **more)
    assert together.shape[0] == 4 and together.shape[1] in (1, 3) and together.isfinite().all()
    assert together.min() >= -1 - 1e-5 and together.max() <= 1 + 1e-5
    assert torch.equal(together, made(system, [3, 1, 4, 7], **more))
    assert more or not torch.equal(together[0], together[1])
    for seeds, rows in (([3], [0]), ([7, 4], [3, 2]), ([1, 3, 7], [1, 0, 3])):
        assert (made(system, seeds, **more) - together[rows]).abs().max() <= 2 / 255      # 1/255 of [-1, 1]


@every_system
def test_items_of_the_interface_carry_their_record(name, trained, pictures):
    run = trained(name)
    asked = request(catalog.config_class(name), **given(name, pictures))
    items = list(api.sample(name, asked, seeds=[5, 6, 9], batch_size=2, model=str(run), device="cpu"))
    assert [i.seed for i in items] == [5, 6, 9]
    for item in items:
        assert (item.kind, item.data.dtype, item.data.ndim) in (("image", np.uint8, 3), ("audio", np.float32, 2))
        assert (item.kind == "audio") == (item.rate > 0) and item.kind == CATALOG[name].kind
        assert item.record["seed"] == item.seed and item.record["schema"] == "nexus/1"
        json.dumps(item.record)


@every_system
def test_conditional_systems_follow_their_prompt(name, trained):
    system = checkpoint.load(str(trained(name)), device="cpu")
    if getattr(system, "conditioner", None) is None:
        pytest.skip("takes no prompt")
    media = system.generate(request(type(system.config), prompt="red ball"), seeds=[0, 1])
    assert len(media.notes) == 2 and any("red ball" in str(v) for v in media.notes[0].values())
    mixed = made(system, [0, 1, 2], prompt="red ball")
    assert (mixed[:2] - media.data).abs().max() <= 2 / 255


@every_system
def test_the_command_line_names_it(name):
    import subprocess
    import sys
    root = Path(__file__).parent.parent
    out = subprocess.run([sys.executable, "-m", "nexus_cli", "models", "--json"], capture_output=True, text=True,
                         cwd=root, timeout=120)
    assert out.returncode == 0 and name in out.stdout
    assert name in CATALOG and any(r["system"] == name for r in api.models())


def test_a_wrong_name_gets_the_nearest():
    with pytest.raises(UsageError, match="flwo") as caught:
        catalog.entry("flwo")
    assert "'flow'" in caught.value.hint
