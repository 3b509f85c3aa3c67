"""SIGKILL of adversarial trainings, also between the critic's turns and the generator's: the uncut run's bytes."""

import multiprocessing
import random
import signal

import killed
import pytest
import toys

from nexus import checkpoint
from nexus.errors import DivergedError
from nexus.models.gan.base_gan import GANConfig
from nexus.train.start import train
from tests.drawn import drawn

pytestmark = pytest.mark.usefixtures("one_thread")
FLAGS = {"steps": 6, "batch_size": 4, "save_every": 2, "log_every": 1, "samples": 4, "flip": 0.5, "shift": 1}
CASES = {"gan": ("gan", "tiny-modern", 1), "wgan": ("wgan", "tiny", 2), "clip": ("wgan", "tiny-clip", 2),
         "cgan": ("cgan", "tiny-projection", 1), "pix2pix": ("cgan", "tiny-pix2pix", 1),
         "cyclegan": ("cyclegan", "tiny", 1)}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One set or two, by case."""
    folder = drawn(tmp_path_factory.mktemp("data"), ("a", "b"), count=7, side=20, seed=3)
    return lambda case: f"{folder}/a,{folder}/b" if case in ("pix2pix", "cyclegan") else str(folder)


@pytest.fixture(scope="module")
def uncut(data, tmp_path_factory):
    made = {}

    def of(case):
        if case not in made:
            run = tmp_path_factory.mktemp("uncut") / "run"
            go(case, data, run)
            made[case] = toys.contents(run)
        return made[case]
    return of


@pytest.fixture(scope="module")
def children():
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["killed", "nexus.train.start", "nexus.models.gan.wgan"])
    return context


def go(case, data, run):
    system, preset, _ = CASES[case]
    return train(system, data=data(case), run=run, preset=preset, flags=FLAGS, device="cpu")


@pytest.mark.parametrize("case", CASES)
def test_kill_9_between_the_turns_changes_nothing(case, data, uncut, tmp_path, children):
    system, preset, repeat = CASES[case]
    draw = random.Random(case)
    for phase, times in (("critic", repeat), ("generator", 1)):
        turn = draw.randint(1, FLAGS["steps"] * times)
        run = tmp_path / phase
        child = children.Process(target=killed.train_until,
                                 args=(system, data(case), str(run), preset, FLAGS, phase, turn))
        child.start()
        child.join(120)
        assert child.exitcode == -signal.SIGKILL
        assert go(case, data, run)["resumed"] == (turn - 1) // times // 2 * 2
        assert toys.contents(run) == uncut(case), f"{phase}, turn {turn}"


def test_the_pools_are_part_of_what_is_saved(data, uncut, tmp_path):
    run = tmp_path / "run"
    go("cyclegan", data, run)
    stored = checkpoint.read_tensors(run / "step-0000006/model.safetensors")
    assert int(stored["pools.a.count"]) == 6 and stored["pools.b.pictures"].abs().sum() > 0
    released = checkpoint.read_tensors(run / "step-0000006/ema.safetensors")
    assert not any(name.startswith(("pools.", "critic.")) for name in released)


@pytest.mark.parametrize("case", ["gan", "clip", "cyclegan"])
def test_a_divergence_ends_the_run_and_keeps_the_last_checkpoint(case, data, tmp_path):
    system, preset, _ = CASES[case]
    with pytest.raises(DivergedError) as caught:
        train(system, data=data(case), run=tmp_path / "run", preset=preset, device="cpu",
              flags=FLAGS | {"lr": 1e30, "save_every": 1, "steps": 40},
              overrides=["clip=0.0"] if case == "clip" else [])
    assert caught.value.code == 9 and caught.value.hint
    assert all(not checkpoint.verify(p) for p in (tmp_path / "run").glob("step-*"))


def test_a_running_statistic_that_overflows_is_a_divergence(data, tmp_path):
    with pytest.raises(DivergedError, match="running_var is not finite"):
        train("gan", data=data("gan"), run=tmp_path / "run", preset="tiny", device="cpu",
              flags=FLAGS | {"lr": 1e8, "save_every": 40, "steps": 40})


def test_a_run_that_starts_from_a_run_has_its_critic_too(data, tmp_path):
    said = []
    go("gan", data, tmp_path / "one")
    train("gan", data=data("gan"), run=tmp_path / "two", preset="tiny-modern", device="cpu", init=str(tmp_path / "one"),
          flags=FLAGS | {"steps": 1, "lr": 1e-12, "save_every": 1}, report=said.append)
    old, new = (checkpoint.read_tensors(tmp_path / run / "model.safetensors")
                for run in ("one/step-0000006", "two/step-0000001"))
    assert all((old[name] - new[name]).abs().max() < 1e-4 for name in old if name.startswith("critic."))
    count = len(checkpoint.own_state(GANConfig.preset("tiny-modern").build()))
    assert any(f"took {count} of {count} tensors" in line for line in said)
