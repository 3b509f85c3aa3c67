"""Rectified flow's stages: pairs from a teacher, killed and resumed; distillation of a map; inversion; refusals."""

import hashlib
import json
import multiprocessing
import os
import signal
from functools import lru_cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from nexus import checkpoint
from nexus.errors import InputError, ModelError, UsageError
from nexus.images import write_image
from nexus.models.diffusion import rectified_flow
from nexus.models.diffusion.rectified_flow import RectifiedFlow, RectifiedFlowConfig
from nexus.process import pairs
from nexus.process.predictions import denoiser
from nexus.process.samplers import sample
from nexus.process.schedules import grid
from nexus.requests import SampleRequest
from nexus.train.start import train
from tests.drawn import drawn
from tests.exact import mixture_flow

FLAGS = {"steps": 3, "batch_size": 4, "save_every": 1, "log_every": 1, "samples": 0}
COUNT = 40                                  # three shards of 16


@pytest.fixture(scope="module", autouse=True)
def small_shards(one_thread):
    usual = pairs.SHARD, rectified_flow.SEEN
    pairs.SHARD, rectified_flow.SEEN = 16, 1 / 4            # twelve looks at forty pairs
    yield
    pairs.SHARD, rectified_flow.SEEN = usual


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return drawn(tmp_path_factory.mktemp("pictures"), ("ball", "tree"), count=5, side=16, seed=3)


@pytest.fixture(scope="module")
def teacher(data, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    train("rectified-flow", data=str(data), run=run, preset="tiny", flags=FLAGS | {"lr": 0.02}, device="cpu",
          overrides=["straightness_every=2", "size=8"])
    return run


def reflow(data, run, teacher, stage="reflow", *more, flags=None):
    settings = [f"stage={stage}", f"teacher={teacher}", f"pairs={COUNT}", "pair_sampler=euler", "pair_steps=2",
                "pair_guidance=1.5", "size=8", *more]
    return train("rectified-flow", data=str(data), run=run, preset="tiny", flags=FLAGS | (flags or {}), device="cpu",
                 overrides=settings)


def contents(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


def results(run):
    """What a resumed run must reproduce."""
    return contents(run / "pairs") | contents(run / "step-0000003") | {"m": (run / "metrics.jsonl").read_bytes()}


@pytest.fixture(scope="module")
def whole(data, teacher, tmp_path_factory):
    run = tmp_path_factory.mktemp("reflow") / "run"
    reflow(data, run, teacher)
    return run


def child(fault, *arguments):
    os.environ["NEXUS_FAULT"] = fault
    torch.set_num_threads(1)
    reflow(*arguments)


# --- InstaFlow ------------------------------------------------------------------------------------------------------

def test_stable_diffusion_teaches_a_straight_flow(data, tmp_path):
    """As InstaFlow was made: the student is Stable Diffusion's network, words and all, on pairs of its own ODE."""
    train("sd", data=str(data), run=tmp_path / "sd", preset="tiny", flags=FLAGS, device="cpu")
    train("rectified-flow", data=str(data), run=tmp_path / "flow", preset="tiny-instaflow", flags=FLAGS, device="cpu",
          overrides=["stage=reflow", f"teacher={tmp_path / 'sd'}", "pairs=8", "pair_sampler=ddim", "pair_steps=2"])
    assert checkpoint.read_description(tmp_path / "flow")["init"] == str(tmp_path / "sd")
    before, after = (checkpoint.load(str(tmp_path / name), device="cpu") for name in ("sd", "flow"))
    assert before.net.state_dict().keys() == after.net.state_dict().keys()
    assert before.conditioner.state_dict().keys() == after.conditioner.state_dict().keys()
    made = after.generate(SampleRequest(prompt="ball", steps=1), seeds=[0, 1]).data
    assert made.shape[0] == 2 and made.isfinite().all()


# --- pairs ----------------------------------------------------------------------------------------------------------

def test_straightness_is_logged_at_its_steps(teacher):
    rows = [json.loads(line) for line in (teacher / "metrics.jsonl").read_text().splitlines()]
    assert [("straightness" in row) for row in rows] == [False, True, False] and rows[1]["straightness"] >= 0


def test_a_student_starts_as_its_teacher_and_trains_on_its_pairs(whole, teacher):
    described = checkpoint.read_description(whole)
    assert described["init"] == str(teacher)
    facts = pairs.read_facts(whole / "pairs")
    assert facts["count"] == COUNT and facts["guidance"] == 1.5 and len(list((whole / "pairs").glob("*.safet*"))) == 3
    loaded = checkpoint.load(str(whole), device="cpu")
    assert getattr(loaded, "teacher", None) is None         # sampling needs no teacher
    assert not any(name.startswith("teacher.") for name in checkpoint.read_tensors(
        whole / "step-0000003/model.safetensors"))


def test_a_short_training_makes_no_more_pairs_than_it_looks_at(data, teacher, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(rectified_flow, "SEEN", 1)
    reflow(data, tmp_path / "run", teacher)
    assert pairs.read_facts(tmp_path / "run/pairs")["count"] == 16
    reflow(data, tmp_path / "run", teacher, flags={"steps": 7})                     # a longer one goes on with more
    assert pairs.read_facts(tmp_path / "run/pairs")["count"] == 32
    made = contents(tmp_path / "run/pairs")
    assert {n: d for n, d in made.items() if n.endswith("tensors")}.items() <= contents(whole / "pairs").items()


def test_pairs_are_what_the_teacher_makes_of_their_noise(whole, teacher, data, tmp_path):
    from nexus.data.images import open_images
    images = open_images(str(data), size=8)
    batch = pairs.PairSet(whole / "pairs", images).batch([0, 1, 9, 39])
    system = checkpoint.load(str(teacher), device="cpu")
    for row, label in enumerate(batch["label"].tolist()):
        save_file({"noise": batch["noise"][row]}, tmp_path / "noise.safetensors")
        request = SampleRequest(prompt=images.facts.classes[label], guidance=1.5, sampler="euler", steps=2,
                                initial_noise=str(tmp_path / "noise.safetensors"))
        made = system.generate(request, seeds=[0]).data[0]
        assert (made - batch["latent"][row].clamp(-1, 1)).abs().max() < 1e-5


@pytest.mark.parametrize("fault", ["link:1:kill", "link:3:kill", "fsync:9:kill", "write:6:kill", "rename:3:kill"])
def test_kill_9_while_pairs_are_made_or_trained_on_changes_nothing(fault, data, teacher, whole, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=child, args=(fault, data, tmp_path / "run", teacher))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    before = contents(tmp_path / "run" / "pairs") if (tmp_path / "run/pairs").is_dir() else {}
    reflow(data, tmp_path / "run", teacher)
    assert results(tmp_path / "run") == results(whole)
    kept = {name: digest for name, digest in before.items() if not name.startswith(".")}
    assert kept.items() <= contents(tmp_path / "run" / "pairs").items()
    assert not list((tmp_path / "run").rglob("*.tmp"))


def test_a_folder_of_pairs_serves_another_run_without_the_teacher(whole, data, tmp_path):
    train("rectified-flow", data=str(data), run=tmp_path / "run", preset="tiny", flags=FLAGS, device="cpu",
          overrides=["stage=distil", f"pairs={whole / 'pairs'}", "size=8", "k=2", "distance=edges"])
    rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert all({"loss", "l2", "edges"} <= row.keys() for row in rows) and not (tmp_path / "run/pairs").exists()
    (tmp_path / "mine").mkdir()
    for name in ("x", "y"):
        Image.fromarray(np.full((16, 16, 3), 9, np.uint8)).save(tmp_path / "mine" / f"{name}.png")
    for source, size, word in ((data, 16, "shape"), (tmp_path / "mine", 8, "data")):
        with pytest.raises(InputError, match=word):
            train("rectified-flow", data=str(source), run=tmp_path / word, preset="tiny", flags=FLAGS, device="cpu",
                  overrides=["stage=reflow", f"pairs={whole / 'pairs'}", f"size={size}"])


def test_another_teacher_or_seed_is_refused(whole, data, teacher, tmp_path):
    with pytest.raises(UsageError, match="teacher"):
        reflow(data, whole, whole)
    reflow(data, tmp_path / "run", teacher, flags={"steps": 1})
    weights = checkpoint.read_tensors(teacher / "step-0000003/model.safetensors")
    changed = tmp_path / "changed"
    checkpoint.save_model(changed, "rectified-flow", checkpoint.read_description(teacher)["config"],
                          {name: t + 1 for name, t in weights.items()})
    described = json.loads((tmp_path / "run/config.json").read_text())
    described["config"]["teacher"] = described["init"] = str(changed)
    (tmp_path / "run/config.json").write_text(json.dumps(described))
    with pytest.raises(InputError, match="another teacher"):
        train("rectified-flow", data=str(data), run=tmp_path / "run", flags={"steps": 2}, device="cpu")


def test_a_teacher_that_does_not_fit_is_refused(data, teacher, tmp_path):
    with pytest.raises(ModelError, match="makes"):
        reflow(data, tmp_path / "a", teacher, "reflow", "size=16")
    with pytest.raises(ModelError, match="no diffusion"):
        reflow(data, tmp_path / "b", "picture-codec")
    with pytest.raises(InputError, match="needs a teacher"):
        RectifiedFlowConfig.parse({"stage": "distil"})
    with pytest.raises(InputError, match="straight"):
        RectifiedFlowConfig.parse({"spread": 0.1, "path": {"kind": "rectified"}})


# --- distillation ----------------------------------------------------------------------------------------------------

class Plane(nn.Module):
    """A velocity of the plane: x [B, 2, 1, 1]."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

    def forward(self, x, t, cond=None, prepared=None):
        return self.layers(torch.cat([x.flatten(1), t[:, None] / 999], 1)).view_as(x)


def plane(**fields) -> RectifiedFlow:
    torch.manual_seed(0)
    net = {"channels": 16, "mult": (1, 1), "blocks": 1, "attention": (), "block": "biggan"}
    system = RectifiedFlowConfig.parse({"pairs": "elsewhere", "size": 4, "straightness_every": 0,
                                        "net": net, **fields}).build()
    system.net = Plane()
    return system


def the_map(z):
    """Two modes a coordinate, through the flow that is exact in one dimension."""
    points = torch.tensor([[-1.2], [0.8]], dtype=torch.float64)
    both = [mixture_flow(z[:, i:i + 1].double(), points, 0.5, (0.0, 1.0), (1.0, 0.0)) for i in range(2)]
    return torch.cat(both, 1).float()


@lru_cache(maxsize=2)
def mapped(seed):
    """2048 draws of noise and where the map takes them."""
    z = torch.randn(2048, 2, generator=torch.Generator().manual_seed(seed))
    return z, the_map(z)


def fitted(system, steps, *, paired=True):
    """Adam on pairs of the map, or on its data alone."""
    (z, x1), optimizer = mapped(1), torch.optim.Adam(system.net.parameters(), 4e-3)
    for step in range(steps):
        rng = torch.Generator().manual_seed(step)
        rows = torch.randint(len(z), (256,), generator=rng)
        batch = {"latent": x1[rows].view(-1, 2, 1, 1)}
        batch |= {"noise": z[rows].view(-1, 2, 1, 1)} if paired else {}
        for group in optimizer.param_groups:
            group["lr"] = 4e-3 * (1 - step / steps)
        optimizer.zero_grad()
        system.loss(batch, rng, step)["loss"].backward()
        optimizer.step()
    return system


def off_by(system, steps):
    """Root mean square error of a run of so many Euler steps, on noise not trained on."""
    (z, x1), path = mapped(2), system.config.path
    with torch.no_grad():
        made = sample("euler", denoiser(system.net, path, "flow"), z.view(-1, 2, 1, 1), grid(path, path.times(steps)))
    return (made.view(-1, 2) - x1).square().mean().sqrt().item()


def test_one_step_distillation_reproduces_the_map():
    assert off_by(fitted(plane(stage="distil", k=1), 300), 1) < 0.12 < 0.3 < off_by(plane(stage="distil"), 1)
    assert off_by(fitted(plane(stage="distil", k=1, distance="l1"), 300), 1) < 0.12


def test_k_step_distillation_is_trained_where_k_steps_go():
    system = plane(stage="distil", k=4)
    t = system._times(4000, torch.Generator().manual_seed(0))
    values, counts = t.unique(return_counts=True)
    assert values.tolist() == [0.25, 0.5, 0.75, 1.0] and counts.min() > 900
    assert plane(stage="distil", k=1)._times(5, torch.Generator()).tolist() == [1.0] * 5
    assert torch.equal(system.config.path.times(4).float(), values.flip(0))
    assert off_by(fitted(system, 300), 4) < 0.12


def test_reflow_makes_the_flow_straighter():
    """Trained on random pairs the paths bend; trained on the map's pairs they hardly do."""
    z = torch.randn(500, 2, 1, 1, generator=torch.Generator().manual_seed(2))
    straight, curved = fitted(plane(stage="reflow"), 300), fitted(plane(), 300, paired=False)
    bent, flat = (float(system._measured(None, z).mean()) for system in (curved, straight))
    assert flat < 0.01 and bent > 20 * flat


# --- inversion and measures -----------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def gentle(teacher) -> RectifiedFlow:
    """The teacher with an output layer small enough that its flow keeps pictures inside [-1, 1]."""
    system = checkpoint.load(str(teacher), device="cpu")
    with torch.no_grad():
        system.net.out.conv.weight.normal_(0, 0.05, generator=torch.Generator().manual_seed(0))
    return system


def test_noise_found_by_inversion_makes_the_picture_again(gentle):
    x1 = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(4)) - 0.5
    noise = gentle.invert(x1, steps=24)
    denoise = denoiser(gentle.net, gentle.config.path, "flow", gentle.conditioner.null(2, torch.device("cpu")))
    with torch.no_grad():
        again = sample("rk4", denoise, noise, grid(gentle.config.path, gentle.config.path.times(12)))
    assert (noise - x1).abs().max() > 0.05 and (again - x1).abs().max() < 5e-3


def test_img2img_keeps_what_no_prompt_changes(gentle, tmp_path):
    picture = np.random.default_rng(0).integers(90, 160, (8, 8, 3), dtype=np.uint8)
    write_image(tmp_path / "x.png", picture)
    request = SampleRequest(image=str(tmp_path / "x.png"), strength=0.8, steps=20, sampler="heun")
    given = torch.from_numpy(picture).permute(2, 0, 1) / 127.5 - 1
    made = gentle.generate(request, seeds=[1, 2]).data
    assert (made - given).abs().max() < 0.02 and torch.equal(made[0], made[1])
    prompted = gentle.generate(request.model_copy(update={"prompt": "tree", "guidance": 3.0}), seeds=[1]).data
    assert (prompted - made[:1]).abs().max() > 1e-3
    kept, gentle.config = gentle.config, gentle.config.model_copy(update={"edit": "noise"})
    noised = gentle.generate(request, seeds=[1, 2]).data
    gentle.config = kept
    assert (noised - given).abs().max() > 0.1 and not torch.equal(noised[0], noised[1])
    nothing = gentle.generate(request.model_copy(update={"strength": 0.0}), seeds=[1]).data
    assert (nothing - given).abs().max() < 1e-6


def test_straightness_is_a_measure_of_its_own_and_leaves_the_network_as_it_was(gentle, monkeypatch):
    monkeypatch.setattr(rectified_flow, "MEASURED", 3)
    gentle.net.train()
    first = gentle.measures(0)
    assert gentle.net.training and first == gentle.measures(0) != gentle.measures(1) and first["straightness"] > 0
    gentle.net.eval()


def test_dopri5_has_the_papers_tolerance_and_euler_takes_noise(gentle):
    kept, calls = gentle.config, []
    hook = gentle.net.register_forward_hook(lambda *_: calls.append(1))
    gentle.config = kept.model_copy(update={"tolerance": 1e-2})
    fine = gentle.generate(SampleRequest(sampler="dopri5"), seeds=[0]).data
    exact = len(calls)
    gentle.config = kept.model_copy(update={"tolerance": 0.3})
    rough = gentle.generate(SampleRequest(sampler="dopri5"), seeds=[0]).data
    hook.remove()
    assert kept.tolerance == 1e-5 and exact > 1.2 * (len(calls) - exact) and 0 < (rough - fine).abs().max() < 0.3
    gentle.config = kept.model_copy(update={"spread": 0.3})
    drawn = gentle.generate(SampleRequest(sampler="euler", steps=10), seeds=[0, 1]).data
    alone = gentle.generate(SampleRequest(sampler="euler", steps=10), seeds=[1]).data
    gentle.config = kept
    assert (drawn[:1] - fine).abs().max() > 0.05 and (drawn[1:] - alone).abs().max() < 1e-5
