"""scripts/train_zoo.py: its runs are ones that `nexus train` takes, and a paced run ends at the rate's end."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nexus import catalog
from nexus.train.args import TrainArgs, overridden

SCRIPT = Path(__file__).parents[1] / "scripts" / "train_zoo.py"
spec = importlib.util.spec_from_file_location("train_zoo", SCRIPT)
train_zoo = importlib.util.module_from_spec(spec)
spec.loader.exec_module(train_zoo)
STAGES = [stage for chain in train_zoo.CHAINS for stage in chain]


@pytest.mark.parametrize("stage", STAGES, ids=lambda stage: stage.name)
def test_every_run_is_one_that_train_takes(stage):
    told = dict(zip(stage.told[::2], stage.told[1::2], strict=True))
    config = catalog.config_class(stage.system)
    preset = told.get("--preset", config.default_preset)
    sets = [value for flag, value in zip(stage.told[::2], stage.told[1::2], strict=True) if flag == "--set"]
    built, args = overridden(config.preset(preset), TrainArgs.parse(config.recipes[preset]), sets,
                             {"batch_size": stage.batch})
    assert args.batch_size == stage.batch and "--data" in told and built.to_json()


def test_a_chain_uses_its_time_up_and_what_a_run_starts_from_comes_first():
    for chain in train_zoo.CHAINS:
        assert sum(stage.share for stage in chain) == pytest.approx(1)
        made = [stage.name for stage in chain]
        for place, stage in enumerate(chain):
            named = {value.removeprefix("teacher=").removeprefix("runs/")
                     for flag, value in zip(stage.told[::2], stage.told[1::2], strict=True)
                     if flag == "--init" or value.startswith("teacher=")}
            assert not named & set(made[place:]), stage.name
    assert len({stage.name for stage in STAGES}) == len(STAGES)


@pytest.mark.skipif(not os.environ.get("NEXUS_SLOW"), reason="half a minute by the clock: make slow")
def test_a_paced_run_anneals_its_rate_in_the_time_it_has(tmp_path):
    """On the tiny DDPM: half a minute, of which the first ten seconds only measure."""
    end = time.time() + 25
    run = subprocess.Popen([sys.executable, SCRIPT, "--one", str(end), "train", "ddpm", "--preset", "tiny", "--data",
                            "mnist", "--run", "run", "--steps", str(train_zoo.ENDLESS), "--save-every", "1000000",
                            "--set", "train.samples=0", "--set", "train.schedule=linear", "--device", "cpu", "-q"],
                           cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE)
    try:
        run.wait(end - time.time())
    except subprocess.TimeoutExpired:
        run.terminate()
    assert run.wait(60) in (0, 75), run.stderr.read()
    rates = [json.loads(line)["lr"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert min(rates) >= 0 and rates[-1] < 0.3 * rates[0]
