"""EDM2's averages: the profiles themselves, any other from their snapshots, and runs that were cut off."""

import hashlib
import os
import signal

import numpy as np
import pytest
import torch
import toys

from nexus import checkpoint
from nexus.errors import InputError, ModelError, StoppedError, UsageError
from nexus.train.ema import (
    EMA,
    Snapshot,
    coefficients,
    gamma_of,
    overlap,
    profiles,
    reconstruct,
    snapshots,
    write_reconstruction,
)
from nexus.train.start import resolve, train

FLAGS = {"ema_profiles": [0.05, 0.1], "steps": 40, "save_every": 4, "samples": 0}


def go(data, run, flags=FLAGS, **options):
    return train("toy", data=str(data), run=run, device="cpu", flags=flags, **options)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("profiles") / "run"


@pytest.fixture
def run(place, pictures):
    """A finished run, trained once: inside a test, where the toys have their names."""
    if not place.exists():
        go(pictures, place)
    return place


def digests(run):
    return {str(f.relative_to(run)): hashlib.sha256(f.read_bytes()).hexdigest() for f in run.glob("profiles/*/*")}


@pytest.mark.parametrize("sigma_rel, gamma", [(0.05, 16.97), (0.10, 6.94)])
def test_the_papers_two_profiles(sigma_rel, gamma):
    assert gamma_of(sigma_rel) == pytest.approx(gamma, abs=0.005)       # of the paper


@pytest.mark.parametrize("sigma_rel", [0.01, 0.05, 0.1, 0.2, 0.288])
def test_sigma_rel_is_the_standard_deviation_of_the_profile(sigma_rel):
    gamma, u = gamma_of(sigma_rel), (np.arange(200_000) + 0.5) / 200_000
    p = u ** gamma / (u ** gamma).sum()
    assert np.sqrt((p * u * u).sum() - (p * u).sum() ** 2) == pytest.approx(sigma_rel, rel=1e-3)


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_an_average_weighs_step_s_as_s_to_the_gamma(sigma_rel):
    steps, gamma = 400, gamma_of(sigma_rel)
    ema = EMA({"w": torch.zeros(steps)}, 0.0, gamma=gamma)
    for step in range(1, steps + 1):
        ema.update({"w": torch.eye(steps)[step - 1]}, step)
    weights, s = ema.average["w"].double().numpy(), np.arange(1, steps + 1) - 0.5
    assert weights.sum() == pytest.approx(1, abs=1e-5)
    want = s ** gamma / (s ** gamma).sum()
    assert np.abs(weights - want).sum() < 0.03                          # the recursion is its discretisation


def test_overlaps_are_integrals():
    u = (np.arange(400_000) + 0.5) / 400_000 * 30
    for a, b in ((Snapshot(30, 6.94), Snapshot(20, 16.97)), (Snapshot(10, 2.0), Snapshot(10, 5.0))):
        p, q = ((s.gamma + 1) * u ** s.gamma / s.step ** (s.gamma + 1) * (u <= s.step) for s in (a, b))
        assert overlap(a, b) == pytest.approx((p * q).sum() * (u[1] - u[0]), rel=1e-3)
        assert overlap(a, b) == pytest.approx(overlap(b, a))


def test_a_stored_profile_is_itself():
    stored = [Snapshot(s, g) for s in (4, 8, 12) for g in (16.97, 6.94)]
    for i, one in enumerate(stored):
        found = coefficients(stored, one)
        np.testing.assert_allclose(found, np.eye(len(stored))[i], atol=1e-6)
    assert coefficients(stored, Snapshot(12, 10.0)).sum() == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("sigma_rel", [0.04, 0.075, 0.15, 0.25])
@pytest.mark.parametrize("end", [256, 512])
def test_any_profile_comes_from_two(sigma_rel, end):
    # a random walk: what is rebuilt from 2 x 32 snapshots against the average that was kept all along
    walk = torch.randn(512, 50, generator=torch.Generator().manual_seed(0)).cumsum(0)
    averages = profiles({"w": torch.zeros(50)}, (0.05, 0.1)) | {"want": EMA({"w": torch.zeros(50)}, 0.0,
                                                                            gamma=gamma_of(sigma_rel))}
    stored, values, want = [], [], None
    for step in range(1, 513):
        for ema in averages.values():
            ema.update({"w": walk[step - 1]}, step)
        if step % 16 == 0 and step <= end:
            for name in ("0.05", "0.1"):
                stored.append(Snapshot(step, gamma_of(float(name))))
                values.append(averages[name].average["w"].clone())
        if step == end:
            want = averages["want"].average["w"].clone()
    weights = torch.from_numpy(coefficients(stored, Snapshot(end, gamma_of(sigma_rel)))).float()
    error = (weights @ torch.stack(values) - want).norm() / (want - walk[end - 1]).norm()
    assert error < 0.03, error


def test_a_run_keeps_every_snapshot(run):
    assert [(s.step, s.file.parent.name) for s in snapshots(run)] == [
        (step, name) for step in range(4, 41, 4) for name in ("0.05", "0.1")]
    assert len(list(run.glob("step-*"))) == 3                           # of checkpoints it keeps the newest


def test_a_kept_profile_is_rebuilt_to_the_bit_of_rounding(run):
    for name in ("0.05", "0.1"):
        kept = checkpoint.read_tensors(run / f"profiles/{name}/step-0000040.safetensors")
        rebuilt = reconstruct(run, float(name))
        assert kept.keys() == rebuilt.keys()
        for key, value in kept.items():
            torch.testing.assert_close(rebuilt[key], value, rtol=1e-4, atol=1e-5)
    early = reconstruct(run, 0.1, step=20)
    kept = checkpoint.read_tensors(run / "profiles/0.1/step-0000020.safetensors")
    torch.testing.assert_close(early["net.0.weight"], kept["net.0.weight"], rtol=1e-4, atol=1e-5)


def test_a_reconstruction_is_a_model(run, tmp_path):
    write_reconstruction(run, tmp_path / "model", 0.075)
    loaded = checkpoint.load(str(tmp_path / "model"), device="cpu", system="toy")
    assert torch.equal(loaded.net[0].weight, reconstruct(run, 0.075)["net.0.weight"])
    assert checkpoint.read_description(tmp_path / "model")["ema_profile"] == 0.075
    assert not checkpoint.verify(tmp_path / "model")


@pytest.mark.parametrize("step", [3, 4, 17, 39])
def test_a_stopped_run_ends_in_the_same_bytes(step, pictures, run, tmp_path):
    def stop(row):
        if row.get("step") == step:
            os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(StoppedError):
        go(pictures, tmp_path / "run", progress=stop)
    assert go(pictures, tmp_path / "run")["resumed"] == step
    assert toys.contents(tmp_path / "run") == toys.contents(run) and digests(tmp_path / "run") == digests(run)


def test_profiles_change_nothing_else(pictures, run, tmp_path):
    go(pictures, tmp_path / "run", {k: v for k, v in FLAGS.items() if k != "ema_profiles"})
    plain, with_profiles = (toys.contents(folder) for folder in (tmp_path / "run", run))
    for file in ("step-0000040/ema.safetensors", "step-0000040/train/state.json", "metrics.jsonl"):
        assert plain[file] == with_profiles[file]
    one, other = (checkpoint.read_tensors(f / "step-0000040/model.safetensors") for f in (tmp_path / "run", run))
    assert all(torch.equal(one[n], other[n]) for n in one)


def test_what_cannot_be_rebuilt_is_said(run, tmp_path):
    with pytest.raises(UsageError, match="0.5"):
        reconstruct(run, 0.5)
    with pytest.raises(UsageError, match="step 99"):
        reconstruct(run, 0.1, step=99)
    with pytest.raises(UsageError, match="step 2"):
        reconstruct(run, 0.1, step=2)
    with pytest.raises(ModelError, match="no EMA profiles"):
        reconstruct(tmp_path, 0.1)
    with pytest.raises(InputError, match="ema_profiles"):
        resolve("toy", overrides=["train.ema_profiles=[0.5]"])
    assert resolve("toy", overrides=["train.ema_profiles=[0.05,0.1]"])[1].ema_profiles == (0.05, 0.1)
