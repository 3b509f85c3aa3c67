"""nexus train through the real command line: runs, plans, refusals."""

import json
import re
import signal
import time

import pytest

from nexus import stored
from nexus.train.start import resolve

TINY = ("--preset", "tiny", "--batch-size", 4, "--set", "train.samples=0", "--device", "cpu")


def test_a_run_is_printed_and_goes_on(warm, pictures, tmp_path):
    command = ("train", "ddpm", *TINY, "--data", pictures, "--run", "r")
    first = warm(*command, "--steps", 1, cwd=tmp_path)
    assert (first.returncode, first.stdout) == (0, b"r\n"), first.stderr.decode()
    second = warm(*command, "--steps", 2, "--json", cwd=tmp_path)
    assert second.returncode == 0, second.stderr.decode()
    last = json.loads(second.stdout.splitlines()[-1])
    assert last["status"] == "ok" and last["step"] == 2 and last["resumed"] == 1
    assert b"resumed from step 1" in second.stderr
    assert warm(*command, "--steps", 2, "--resume", "never", cwd=tmp_path).returncode == 2


@pytest.mark.parametrize("system", ["ddpm", "gan"])
def test_the_speed_is_printed_whatever_else_is(warm, pictures, tmp_path, system):
    """Also of short runs, and before what a game logs, which is more than a line shows."""
    done = warm("train", system, *TINY, "--data", pictures, "--run", "r", "--steps", 3, cwd=tmp_path)
    last = done.stderr.decode().splitlines()[-1]
    assert re.match(r"3/3 steps, [0-9.e-]+ s each  [0-9.]+ items/s  .+ [0-9.e+-]+$", last), last


def test_a_dry_run_prints_the_settings_and_makes_nothing(warm, pictures, tmp_path):
    done = warm("train", "ddpm", *TINY, "--data", pictures, "--run", "r", "--steps", 7, "--lr", "0.5", "--dry-run",
                "--json",
                 cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    plan = json.loads(done.stdout)
    assert plan["train"]["steps"] == 7 and plan["train"]["lr"] == 0.5 and plan["pictures"] == 12
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_of_a_run_says_what_the_same_command_would_do(warm, pictures, tmp_path):
    command = ("train", "ddpm", *TINY, "--data", pictures, "--run", "r")
    assert warm(*command, "--steps", 1, cwd=tmp_path).returncode == 0
    done = warm(*command, "--steps", 9, "--dry-run", "--json", cwd=tmp_path)
    plan = json.loads(done.stdout)
    assert plan["resumes"] and plan["train"]["steps"] == 9 and plan["pictures"] == 12
    assert warm(*command, "--lr", "0.5", "--dry-run", cwd=tmp_path).returncode == 2
    assert warm(*command, "--steps", 9, cwd=tmp_path).returncode == 0


def test_a_dry_run_names_a_missing_start(warm, tmp_path):
    done = warm("train", "vae", "--data", "emoji", "--run", "r", "--preset", "picture-codec-decoder", "--dry-run",
                cwd=tmp_path)
    assert done.returncode == 2 and b"--init MODEL" in done.stderr


@pytest.mark.parametrize("more,code", [
    (("--preset", "nothing"), 3), (("--set", "nothing=1"), 3), (("--set", "nothing"), 3), (("--batch-size", 3,
                                                                                            "--accumulate", 2), 2),
    (("--init", "no-such-model"), 4),
])
def test_refusals(warm, pictures, tmp_path, more, code):
    done = warm("train", "ddpm", "--data", pictures, "--run", "r", "--device", "cpu", *more, cwd=tmp_path)
    assert done.returncode == code, done.stderr.decode()
    assert b"Traceback" not in done.stderr and b"error: " in done.stderr


def test_settings_files(warm, pictures, tmp_path):
    (tmp_path / "a.toml").write_text("[train]\nsteps = 3\n")
    (tmp_path / "bad.toml").write_text("[train\n")
    (tmp_path / "unknown.json").write_text('{"train": {"stepz": 3}}')
    command = ("train", "ddpm", "--preset", "tiny", "--data", pictures, "--run", "r", "--dry-run", "--json", "--config")
    done = warm(*command, "a.toml", cwd=tmp_path)
    assert done.returncode == 0 and json.loads(done.stdout)["train"]["steps"] == 3
    assert warm(*command, "bad.toml", cwd=tmp_path).returncode == 3
    assert warm(*command, "unknown.json", cwd=tmp_path).returncode == 3


def test_every_embedded_checkpoint_can_be_trained_again_from_its_settings():
    """The command on each card: its config.json is a settings file that names what it was trained with."""
    for file in sorted(stored.ZOO.glob("*/config.json")):
        facts = json.loads(file.read_text())
        config, args = resolve(facts["system"], file=facts)
        assert config == config.parse(facts["config"]), file
        told = args.to_json()
        assert told.pop("precision") in ("auto", "float32"), file       # not that of the machine it was trained on
        assert told.items() <= args.parse(facts["train"]).to_json().items(), file


@pytest.mark.parametrize("number,code", [(signal.SIGTERM, 75), (signal.SIGUSR1, 75), (signal.SIGINT, 130)])
def test_a_signal_saves_and_the_same_command_goes_on(nexus, pictures, tmp_path, number, code):
    command = ("train", "ddpm", *TINY, "--data", pictures, "--run", "r", "--steps", 100_000, "--json", "--set",
               "train.log_every=1")
    running = nexus(*command, cwd=tmp_path, wait=False)
    seen = running.stdout.readline()
    while b'"step"' not in seen and running.poll() is None:
        seen = running.stdout.readline()
    time.sleep(0.2)
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == code, errors.decode()
    assert list((tmp_path / "r").glob("step-*")) and "Traceback" not in errors.decode()


def test_two_processes_cannot_share_a_run(nexus, pictures, tmp_path):
    command = ("train", "ddpm", *TINY, "--data", pictures, "--run", "r", "--steps", 100_000)
    running = nexus(*command, cwd=tmp_path, wait=False)
    while not (tmp_path / "r" / "config.json").exists() and running.poll() is None:
        time.sleep(0.05)
    second = nexus(*command, cwd=tmp_path)
    running.terminate()
    running.communicate(timeout=60)
    assert second.returncode == 8 and f"pid {running.pid}" in second.stderr.decode()


@pytest.mark.parametrize("system, more, said", [
    ("lcm", ["--set", "teacher=nope"], "there is no model 'nope'"), ("ddpm", ["--init", "dit"], "no tensor"),
    ("lcm", ["--set", "teacher=flow"], "teacher"),
    ("consistency", ["--set", "distance=lpips", "--set", "lpips=gone.safetensors"], "no file of LPIPS weights")])
def test_a_model_that_training_needs_is_missed_by_the_plan_and_leaves_nothing(warm, pictures, tmp_path, system, more,
                                                                              said):
    for plan in (["--dry-run"], []):
        done = warm("train", system, "--preset", "tiny", "--data", pictures, "--run", "r", *more, *plan, cwd=tmp_path)
        assert done.returncode == 4 and said in done.stderr.decode(), done.stderr.decode()
        assert not (tmp_path / "r").exists()
