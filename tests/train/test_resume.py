"""A run that was cut off at any moment, in any way, ends in the bytes of one that was not."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import toys

from nexus import checkpoint
from nexus.errors import BusyError, InputError, ModelError, OutputError, StoppedError, UsageError
from nexus.train import run as runs
from nexus.train.start import train

SLOW = os.environ.get("NEXUS_SLOW") == "1"
CASES = {"plain": ("toy", {}), "accumulate": ("toy", {"accumulate": 3}), "bfloat16": ("toy", {"precision": "bfloat16"}),
         "muon": ("toy", {"optimizer": "muon"}), "rmsprop": ("toy", {"optimizer": "rmsprop"}),
         "no ema": ("toy", {"ema": 0.0}), "cosine": ("toy", {"schedule": "cosine", "warmup": 3}),
         "augmented": ("toy", {"shift": 2, "flip": 0.5}), "two phases": ("toy-gan", {}),
         "two phases, muon, parts": ("toy-gan", {"optimizer": "muon", "accumulate": 2})}


def go(data, run, system="toy", flags=None, **options):
    return train(system, data=str(data), run=run, device="cpu", flags=flags or {}, **options)


@pytest.fixture(scope="module")
def uncut(pictures, tmp_path_factory):
    """contents() of the run of a case that nothing disturbed, made once."""
    made = {}

    def of(case, **more):
        key = (case, *sorted(more.items()))
        if key not in made:
            run = tmp_path_factory.mktemp("uncut") / "run"
            go(pictures, run, CASES[case][0], CASES[case][1] | more)
            made[key] = toys.contents(run)
        return made[key]
    return of


def stop_after(step):
    """A progress callback that asks for a stop once `step` is finished."""
    def progress(row):
        if row.get("step") == step:
            os.kill(os.getpid(), signal.SIGTERM)
    return progress


def damage_of(folder: Path, how: str) -> None:
    """Harm one checkpoint."""
    file = folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    if how == "flipped bit":
        data[-9] ^= 4
        file.write_bytes(data)
    elif how == "cut":
        file.write_bytes(data[:len(data) // 2])
    elif how == "zeroed":
        file.write_bytes(bytes(len(data)))
    elif how == "no manifest":
        (folder / "manifest.json").unlink()
    elif how == "half a manifest":
        text = (folder / "manifest.json").read_bytes()
        (folder / "manifest.json").write_bytes(text[:len(text) // 2])
    elif how == "empty":
        shutil.rmtree(folder)
        folder.mkdir()
    elif how == "swapped":
        ema = folder / "ema.safetensors"
        file.write_bytes(ema.read_bytes())
        ema.write_bytes(data)
    else:
        (folder / how).unlink()


@pytest.mark.parametrize("case", CASES)
def test_stopping_after_any_step_changes_nothing(case, pictures, uncut, tmp_path):
    system, flags = CASES[case]
    steps = range(1, 12) if SLOW or case in ("plain", "two phases") else (1, 4, 6, 11)
    for step in steps:
        run = tmp_path / str(step)
        with pytest.raises(StoppedError):
            go(pictures, run, system, flags, progress=stop_after(step))
        assert go(pictures, run, system, flags)["resumed"] == step
        assert toys.contents(run) == uncut(case), f"stopped after step {step}"


def test_stopping_after_every_step_changes_nothing(pictures, uncut, tmp_path):
    for step in range(1, 12):
        with pytest.raises(StoppedError):
            go(pictures, tmp_path / "run", progress=stop_after(step))
    go(pictures, tmp_path / "run")
    assert toys.contents(tmp_path / "run") == uncut("plain")


def test_the_same_command_after_the_end_does_nothing(pictures, uncut, tmp_path):
    go(pictures, tmp_path / "run")
    assert go(pictures, tmp_path / "run") == {"run": str(tmp_path / "run"), "step": 12, "resumed": 12}
    assert toys.contents(tmp_path / "run") == uncut("plain")


def test_more_steps_go_on_from_the_end(pictures, uncut, tmp_path):
    go(pictures, tmp_path / "run")
    assert go(pictures, tmp_path / "run", flags={"steps": 15})["resumed"] == 12
    assert runs.checkpoints(tmp_path / "run")[-1] == 15


# --- SIGKILL: children of a server that has imported torch once, so that a trial costs no import -------------------

@pytest.fixture(scope="module")
def children():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["toys", "nexus.train.start"])
    return context


def run_child(children, data, run, system="toy", options=None, environment=None, kill_after=None):
    """Train in a child process, kill -9 it `kill_after` seconds after its beginning; -> its exit code."""
    begun = children.Event()
    child = children.Process(target=toys.train_alone,
                             args=(begun, system, str(data), str(run), options or {}, environment or {}))
    child.start()
    if not begun.wait(60):
        child.kill()
    elif kill_after is not None:
        child.join(kill_after)
        child.kill()
    child.join(120)
    return child.exitcode


@pytest.mark.parametrize("case", ["plain", "two phases"])
def test_kill_9_at_any_moment_changes_nothing(case, pictures, uncut, tmp_path, children):
    system, flags = CASES[case]
    flags = flags | {"save_every": 1, "sample_every": 2}
    begin = time.monotonic()
    assert run_child(children, pictures, tmp_path / "whole", system, {"flags": flags}) == 0
    whole = time.monotonic() - begin
    assert toys.contents(tmp_path / "whole") == uncut(case, save_every=1, sample_every=2)
    draw = random.Random(case)
    for trial in range(30 if SLOW else 6):
        run = tmp_path / str(trial)
        run_child(children, pictures, run, system, {"flags": flags}, kill_after=draw.uniform(0, whole))
        go(pictures, run, system, flags)
        assert toys.contents(run) == uncut(case, save_every=1, sample_every=2), f"trial {trial}"
        assert not list(run.rglob("*.tmp")), f"trial {trial} left a temporary file"


def test_a_chain_of_kills_changes_nothing(pictures, uncut, tmp_path, children):
    draw, flags, run = random.Random(1), {"save_every": 1}, tmp_path / "run"
    for _ in range(20 if SLOW else 5):
        run_child(children, pictures, run, options={"flags": flags}, kill_after=draw.uniform(0.05, 0.3))
    go(pictures, run, flags=flags)
    assert toys.contents(run) == uncut("plain", save_every=1)


NUMBERS = {"rename": (1, 2, 3, 6, 7, 8), "fsync": (1, 4, 9, 20), "write": (1, 5, 11), "open": (1, 6)}
FAULTS = [(point, n) for point, numbers in NUMBERS.items() for n in numbers]


@pytest.mark.parametrize("point, number", [("any", n) for n in range(1, 120)] if SLOW else FAULTS)
def test_kill_9_inside_a_save_changes_nothing(point, number, pictures, uncut, tmp_path, children):
    run = tmp_path / "run"
    code = run_child(children, pictures, run, environment={"NEXUS_FAULT": f"{point}:{number}:kill"})
    assert code == -signal.SIGKILL
    go(pictures, run)
    assert toys.contents(run) == uncut("plain")
    assert not list(run.rglob("*.tmp"))


@pytest.mark.parametrize("point, code", [("write", "ENOSPC"), ("fsync", "EIO"), ("rename", "EACCES"),
                                         ("open", "EMFILE")])
def test_a_disk_that_fails_keeps_the_last_checkpoint(point, code, pictures, uncut, tmp_path, monkeypatch):
    run = tmp_path / "run"
    with pytest.raises(StoppedError):
        go(pictures, run, progress=stop_after(5))
    monkeypatch.setenv("NEXUS_FAULT", f"{point}:4:{code}")
    with pytest.raises(OutputError):
        go(pictures, run)
    monkeypatch.delenv("NEXUS_FAULT")
    assert 5 in runs.checkpoints(run) and not checkpoint.verify(runs.step_folder(run, 5))
    go(pictures, run)
    assert toys.contents(run) == uncut("plain")


# --- damage --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", ["flipped bit", "cut", "zeroed", "no manifest", "half a manifest", "empty", "swapped",
                                 "model.safetensors", "ema.safetensors", "config.json", "train/state.json",
                                 "train/denoise.adamw.safetensors"])
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_is_used(how, pictures, uncut, tmp_path):
    run, said = tmp_path / "run", []
    with pytest.raises(StoppedError):
        go(pictures, run, progress=stop_after(9))
    damage_of(run / "step-0000009", how)
    assert go(pictures, run, report=said.append)["resumed"] == 8
    assert any("step-0000009" in line and "damaged" in line for line in said)
    assert (run / "step-0000009.bad").is_dir() and toys.contents(run) == uncut("plain")


def test_when_all_checkpoints_are_damaged_nothing_is_trained_or_deleted(pictures, tmp_path):
    run = tmp_path / "run"
    go(pictures, run)
    for step in runs.checkpoints(run):
        damage_of(runs.step_folder(run, step), "flipped bit")
    for _ in range(2):
        with pytest.raises(ModelError) as caught:
            go(pictures, run)
        assert caught.value.code == 4
    assert len(list(run.glob("step-*.bad/model.safetensors"))) == 3


@pytest.mark.parametrize("end", [b'{"step": 6, "lo', b"\xff\xfe", b'{"step": 6, "loss": 1}\n{"st'])
def test_a_torn_line_of_metrics_is_written_anew(end, pictures, uncut, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(StoppedError):
        go(pictures, run, progress=stop_after(5))
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(end)
    go(pictures, run)
    assert toys.contents(run) == uncut("plain")


def test_what_the_codec_made_of_the_pictures_is_kept_for_going_on(pictures, tmp_path, monkeypatch):
    latent = {"preset": "tiny-latent", "flags": {"steps": 8, "batch_size": 4, "shift": 1, "variants": 2}}
    go(pictures, tmp_path / "uncut", "gan", **latent)
    with pytest.raises(StoppedError):
        go(pictures, tmp_path / "run", "gan", **latent, progress=stop_after(5))

    def never(codec, x):
        raise AssertionError("encoded again")
    monkeypatch.setattr("nexus.process.adversarial.encoded", never)
    go(pictures, tmp_path / "run", "gan")
    assert toys.contents(tmp_path / "run") == toys.contents(tmp_path / "uncut")


# --- what may not change -------------------------------------------------------------------------------------------

@pytest.fixture
def stopped(pictures, tmp_path):
    """A run that waits after step 5."""
    with pytest.raises(StoppedError):
        go(pictures, tmp_path / "run", progress=stop_after(5))
    return tmp_path / "run"


@pytest.mark.parametrize("name, value", [("lr", 0.5), ("batch_size", 12), ("seed", 1), ("optimizer", "muon"),
                                         ("accumulate", 2), ("ema", 0.5), ("precision", "bfloat16"), ("flip", 0.1)])
def test_another_value_of_a_setting_is_refused_by_its_name(name, value, stopped, pictures):
    with pytest.raises(UsageError, match=name):
        go(pictures, stopped, flags={name: value})
    with pytest.raises(UsageError, match=name):
        go(pictures, stopped, overrides=[f"train.{name}={json.dumps(value)}"])


@pytest.mark.parametrize("fast, precision", [(True, "bfloat16"), (False, "float32")])
def test_precision_auto_is_settled_by_the_device_when_a_run_begins(fast, precision, pictures, tmp_path, monkeypatch):
    run = tmp_path / "run"
    monkeypatch.setattr("nexus.train.start.has_bfloat16", lambda device: fast)
    with pytest.raises(StoppedError):
        go(pictures, run, flags={"precision": "auto"}, progress=stop_after(5))
    monkeypatch.setattr("nexus.train.start.has_bfloat16", lambda device: not fast)      # it goes on elsewhere
    said = []
    go(pictures, run, flags={"precision": "auto"}, report=said.append)
    assert checkpoint.read_description(run)["train"]["precision"] == precision
    assert any("emulates bfloat16" in line for line in said) == (precision == "bfloat16")
    go(pictures, tmp_path / "whole", flags={"precision": precision})
    assert toys.contents(run) == toys.contents(tmp_path / "whole")


def test_another_system_setting_is_refused(stopped, pictures):
    with pytest.raises(UsageError, match="hidden"):
        go(pictures, stopped, overrides=["hidden=32"])


def test_another_settings_file_is_refused(stopped, pictures):
    with pytest.raises(UsageError, match="lr"):
        go(pictures, stopped, config={"train": {"lr": 0.5}})
    with pytest.raises(UsageError, match="hidden"):
        go(pictures, stopped, config={"config": {"hidden": 32}})


def test_a_run_that_learnt_nothing_takes_other_settings(pictures, tmp_path, uncut):
    """Its first step failed, for want of a file say: it is not a reason to look for another name."""
    with pytest.raises(ZeroDivisionError):
        go(pictures, tmp_path / "run", flags={"lr": 0.5}, progress=lambda row: 1 / 0)
    assert not runs.checkpoints(tmp_path / "run")
    kept = checkpoint.read_description(tmp_path / "run")["train"]
    assert kept["lr"] == 0.5
    assert go(pictures, tmp_path / "run", flags={"lr": 1e-2})["resumed"] == 0
    assert checkpoint.read_description(tmp_path / "run")["train"] == kept | {"lr": 1e-2}
    assert toys.contents(tmp_path / "run") == uncut("plain")


def test_another_system_or_another_data_set_is_refused(stopped, pictures, tmp_path):
    with pytest.raises(UsageError, match="toy-gan"):
        go(pictures, stopped, "toy-gan")
    other = shutil.copytree(pictures, tmp_path / "other")
    with pytest.raises(UsageError, match="other"):
        go(other, stopped)


def test_changed_data_is_refused(pictures, tmp_path):
    data = shutil.copytree(pictures, tmp_path / "data")
    with pytest.raises(StoppedError):
        go(data, tmp_path / "run", progress=stop_after(5))
    (data / "circle/0.png").write_bytes((data / "square/0.png").read_bytes())
    with pytest.raises(InputError, match="data"):
        go(data, tmp_path / "run")


def test_resume_never_refuses_a_run_that_is_there(stopped, pictures):
    with pytest.raises(UsageError):
        go(pictures, stopped, resume="never")


@pytest.mark.parametrize("name, value", [("keep", 1), ("log_every", 1), ("save_every", 2), ("on_nan", "skip")])
def test_what_does_not_shape_the_weights_may_change(name, value, stopped, pictures, uncut):
    go(pictures, stopped, flags={name: value})
    for file in ("step-0000012/ema.safetensors", "step-0000012/train/denoise.adamw.safetensors"):
        assert toys.contents(stopped)[file] == uncut("plain")[file]


def test_the_same_preset_and_settings_go_on_and_others_do_not(pictures, tmp_path):
    same = {"preset": "tiny", "config": {"config": {"hidden": 24}, "train": {"lr": 0.02}}, "overrides": ["noise=0.25"]}
    with pytest.raises(StoppedError):
        go(pictures, tmp_path / "run", progress=stop_after(5), **same)
    with pytest.raises(UsageError, match="hidden"):
        go(pictures, tmp_path / "run", preset="tiny")
    assert go(pictures, tmp_path / "run", **same)["resumed"] == 5
    assert go(pictures, tmp_path / "run")["resumed"] == 12


def test_a_model_folder_is_no_run(pictures, tmp_path):
    with pytest.raises(UsageError, match="not a run"):
        checkpoint.save_model(tmp_path / "model", "toy", {}, {})
        go(pictures, tmp_path / "model")


def test_a_run_in_use_is_refused(pictures, tmp_path, children):
    run, seen = tmp_path / "run", []
    started = children.Event()
    child = children.Process(target=toys.train_alone,
                             args=(started, "toy", str(pictures), str(run), {"flags": {"steps": 100_000}}, {}))
    child.start()
    try:
        deadline = time.monotonic() + 60
        while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        with pytest.raises(BusyError) as caught:
            go(pictures, run, report=seen.append)
        assert caught.value.code == 8 and str(child.pid) in str(caught.value)
    finally:
        child.kill()
        child.join(60)
    held = runs.lock(run)           # the lock of a dead process holds nobody up
    held.release()


def test_sigterm_to_a_process_saves_at_that_step(pictures, uncut, tmp_path, children):
    run = tmp_path / "run"
    started = children.Event()
    child = children.Process(target=toys.train_alone,
                             args=(started, "toy", str(pictures), str(run), {"flags": {"steps": 100_000}}, {}))
    child.start()
    while not (run / "metrics.jsonl").exists() and child.is_alive():
        time.sleep(0.02)
    child.terminate()
    child.join(60)
    assert child.exitcode == 1 and runs.newest_good(run, print)     # StoppedError, which nexus_cli turns into 75
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    assert runs.checkpoints(run)[-1] == last


def test_warm_starts_survive_a_kill_before_the_first_checkpoint(pictures, tmp_path, monkeypatch):
    donor = tmp_path / "donor"
    go(pictures, donor)
    go(pictures, tmp_path / "a", init=str(donor))
    monkeypatch.setenv("NEXUS_FAULT", "rename:3:EIO")
    with pytest.raises(OutputError):
        go(pictures, tmp_path / "b", init=str(donor))
    monkeypatch.delenv("NEXUS_FAULT")
    assert not runs.checkpoints(tmp_path / "b") and (tmp_path / "b/config.json").exists()
    go(pictures, tmp_path / "b")            # the run remembers what it starts from
    assert toys.contents(tmp_path / "a") == toys.contents(tmp_path / "b")
    with pytest.raises(UsageError, match="init"):
        go(pictures, tmp_path / "b", init=str(tmp_path / "a"))
