"""Consistency models and LCM as systems: sizes, training with and without a teacher, resuming, requests."""

import hashlib

import numpy as np
import pytest
import torch

from nexus import checkpoint
from nexus.errors import InputError, ModelError, StoppedError, UsageError
from nexus.images import write_image
from nexus.models.diffusion.consistency_model import ConsistencyConfig
from nexus.models.diffusion.dit import DiTNetConfig
from nexus.models.diffusion.lcm import LCMConfig
from nexus.process.predictions import denoiser, noised
from nexus.process.schedules import grid
from nexus.requests import SampleRequest
from nexus.train.start import train
from tests.drawn import drawn

FLAGS = {"steps": 3, "batch_size": 4, "save_every": 1, "log_every": 1, "samples": 0}
CD = {"scales": "fixed", "s0": 40, "levels": "uniform", "target": "fixed", "weighting": "uniform", "distance": "l2"}


def system(cls=ConsistencyConfig, preset="tiny", **changes):
    torch.manual_seed(0)
    config = cls.parse(cls.preset(preset).to_json() | changes)
    built = config.build().eval()
    with torch.no_grad():                       # zero-initialised layers would make every network say nothing
        for p in built.net.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    return built


def batch(n=4):
    return {"image": torch.randn(n, 3, 16, 16).clamp(-1, 1), "label": torch.zeros(n, dtype=torch.long),
            "style": torch.zeros(n, dtype=torch.long), "caption": ["red apple", "cat"] * (n // 2)}


def seed(n=0):
    return torch.Generator().manual_seed(n)


def parameters(config):
    with torch.device("meta"):
        return sum(p.numel() for p in config.build().net.parameters())


def test_parameter_counts_of_the_published_models():
    assert parameters(ConsistencyConfig.preset("imagenet-64")) == 295_899_267
    assert parameters(ConsistencyConfig.preset("bedroom-256")) == 526_304_771
    assert parameters(LCMConfig.preset("dreamshaper-v7")) == 859_602_884
    assert parameters(ConsistencyConfig.preset("emoji")) <= 4_000_000


# --- training -------------------------------------------------------------------------------------------------------

def test_the_target_follows_the_network_and_is_made_as_training_begins():
    built = system(**CD)
    assert built.target is None and not any(n.startswith("target.") for n in built.state_dict())
    phase, = built.phases()
    assert all(torch.equal(a, b) for a, b in zip(built.net.parameters(), built.target.parameters(), strict=True))
    with torch.no_grad():
        for p in built.net.parameters():
            p.add_(1.0)
    phase.after(0)
    for a, b in zip(built.net.parameters(), built.target.parameters(), strict=True):
        torch.testing.assert_close(b, a - 0.95, atol=1e-5, rtol=1e-5)
    assert not any(p.requires_grad for p in built.target.parameters())
    assert {id(p) for p in phase.module.parameters()} == {id(p) for p in built.net.parameters()}


def test_without_a_decay_the_target_is_the_network():
    built = system()
    built.phases()
    assert built.target is None and built.config.decay(7) is None
    assert ConsistencyConfig.preset("imagenet-64-ct").decay(0) == pytest.approx(0.9025)


@pytest.mark.parametrize("cls, changes", [(ConsistencyConfig, {}), (ConsistencyConfig, CD), (LCMConfig, {})])
def test_the_loss_is_a_function_of_its_generator(cls, changes):
    built = system(cls, **changes)
    built.phases()
    built.train()
    items = batch()
    first, again, other = (built.loss(items, seed(s), 0)["loss"] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    first.backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in built.net.parameters())
    assert built.target is None or all(p.grad is None for p in built.target.parameters())


def test_both_jumps_see_one_dropout_mask():
    """At one level for both, the jumps differ by nothing but dropout."""
    built = system(net=ConsistencyConfig.preset("tiny").net.to_json() | {"dropout": 0.5}, s0=2, s1=2, scales="fixed",
                   path={"sigma_min": 1.0, "sigma_max": 1.0 + 1e-9}, weighting="uniform")
    built.train()
    assert built.loss(batch(), seed(), 0)["loss"] < 1e-6


def test_a_guided_teacher_is_followed_along_its_chain():
    """LCM's neighbour: DDIM from t to t - 20 with x0 = cond + w (cond - null). Algorithm 1."""
    built, teacher = system(LCMConfig), system(LCMConfig)
    plain = teacher.config.net.model_copy(update={"guidance_dim": 0}).build()
    plain.load_state_dict({n: p for n, p in teacher.net.state_dict().items() if not n.startswith("guidance")})
    built.teacher, c = plain.eval(), built.config
    x0, cond = torch.randn(4, 3, 16, 16), built.conditioner.training_cond(batch(), seed())
    with torch.no_grad():
        pair = c.neighbours(built, x0, cond, seed(5), 0)
        w = pair.cond["guidance"]
        assert c.w_min <= w.min() and w.max() <= c.w_max
        assert ((pair.t + 1) % 20 == 0).all() and torch.equal(pair.s, (pair.t - 20).clamp(min=0))
        null = built.conditioner.null(4, torch.device("cpu"))
        alone, none = (denoiser(plain, c.path, "eps", one)(pair.x, pair.t) for one in (cond, null))
        end = alone + w[:, None, None, None] * (alone - none)
        alpha, sigma = (v[:, None, None, None].float() for v in c.path.at(pair.t))
        eps = (pair.x - alpha * end) / sigma
        torch.testing.assert_close(pair.near, noised(c.path, end, eps, pair.s).float(), atol=1e-3, rtol=1e-4)


def test_a_student_starts_as_its_teacher():
    """Its guidance embedding is silent: whatever w is, the network answers as the teacher's."""
    student = LCMConfig.preset("tiny").build()
    assert not student.net.guidance.weight.any()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return str(drawn(tmp_path_factory.mktemp("pictures"), ("red ball", "green tree"), count=4, side=16, seed=7))


@pytest.fixture(scope="module")
def teachers(pictures, tmp_path_factory):
    """An EDM teacher for CD, a latent diffusion (without a codec) for LCM, and one on the chain that predicts v."""
    folder = tmp_path_factory.mktemp("teachers")
    for name, preset, sets in (("edm", "edm-tiny", ["p_uncond=0"]), ("chain", "tiny", ["prediction=v"]),
                               ("ldm", "tiny-text", ["path.beta_schedule=scaled_linear", "path.beta_start=0.00085",
                                                     "path.beta_end=0.012"])):
        train("conditional", data=pictures, run=folder / name, preset=preset, flags=FLAGS | {"steps": 1},
              overrides=sets, device="cpu")
    return folder


def contents(folder):
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
            for p in sorted(folder.rglob("*")) if p.is_file()}


OF_CD = [f"{k}={v}" for k, v in CD.items()]
ON_THE_CHAIN = ["prediction=v", "teacher_guidance=2", 'path.native={"kind": "discrete", "spacing": "linspace"}']
DISTILLED = {"edm": ("consistency", OF_CD), "chain": ("consistency", OF_CD + ON_THE_CHAIN), "ldm": ("lcm", [])}


@pytest.mark.parametrize("teacher", DISTILLED)
def test_distillation_resumes_bit_for_bit_and_sampling_needs_no_teacher(teacher, teachers, pictures, tmp_path):
    name, sets = DISTILLED[teacher]

    def go(run, progress=lambda row: None, **more):
        return train(name, data=pictures, run=run, preset="tiny", flags=FLAGS, device="cpu", progress=progress,
                     overrides=[*sets, f"teacher={teachers / teacher}"], **more)
    go(tmp_path / "whole")
    with pytest.raises(StoppedError):
        go(tmp_path / "run", max_time=1e-9)
    assert go(tmp_path / "run")["resumed"] == 1
    assert contents(tmp_path / "run/step-0000003") == contents(tmp_path / "whole/step-0000003")
    saved = checkpoint.read_tensors(tmp_path / "run/step-0000003/model.safetensors")
    assert any(n.startswith("target.") for n in saved) and not any(n.startswith("teacher.") for n in saved)
    assert any(not torch.equal(saved[n], saved["target" + n[3:]]) for n in saved if n.startswith("net."))
    averaged = checkpoint.read_tensors(tmp_path / "run/step-0000003/ema.safetensors")
    assert averaged and not any(n.startswith("target.") for n in averaged)
    loaded = checkpoint.load(str(tmp_path / "run"), device="cpu")
    assert loaded.teacher is None and loaded.target is None
    assert loaded.generate(SampleRequest(prompt="red ball"), seeds=[0]).data.isfinite().all()
    assert not checkpoint.misfits(tmp_path / "run/step-0000003")


def test_training_begins_with_the_teachers_weights(teachers, pictures, tmp_path):
    train("lcm", data=pictures, run=tmp_path / "run", preset="tiny", flags=FLAGS | {"steps": 1, "lr": 1e-12},
          overrides=[f"teacher={teachers / 'ldm'}"], device="cpu")
    student = checkpoint.read_tensors(tmp_path / "run/step-0000001/model.safetensors")
    teacher = checkpoint.load(str(teachers / "ldm"), device="cpu").state_dict()
    assert {n for n in student if not n.startswith("target.")} - teacher.keys() == {"net.guidance.weight"}
    assert all((student[n] - t).abs().max() < 1e-6 for n, t in teacher.items())
    words = [n for n in teacher if n.startswith("conditioner.")]
    assert words and all(torch.equal(student[n], teacher[n]) for n in words)          # frozen


@pytest.mark.parametrize("name, teacher, sets, match",
                         [("consistency", "ldm", [], "EDM denoiser"), ("lcm", "edm", [], "chain"),
                          ("consistency", "edm", ON_THE_CHAIN, "path.native"),
                          ("consistency", "chain", ["prediction=eps", *ON_THE_CHAIN[1:]], "does not predict eps")])
def test_a_teacher_that_does_not_fit_is_refused(name, teacher, sets, match, teachers, pictures, tmp_path):
    with pytest.raises(ModelError, match=match):
        train(name, data=pictures, run=tmp_path / "run", preset="tiny", flags=FLAGS, device="cpu",
              overrides=[f"teacher={teachers / teacher}", *sets])


# --- requests -------------------------------------------------------------------------------------------------------

@pytest.fixture
def picture(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16, 1), dtype=np.uint8)
    mask[:, 8:] = 255
    return (str(write_image(tmp_path / "in.png", array)), str(write_image(tmp_path / "mask.png", mask)),
            torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1)


@pytest.mark.parametrize("cls", [ConsistencyConfig, LCMConfig])
@pytest.mark.parametrize("steps", [1, 4])
def test_editing_by_image_and_mask(cls, steps, picture):
    path, mask, pixels = picture
    built = system(cls)
    unmasked = built.generate(SampleRequest(image=path, strength=0.0, steps=steps), seeds=[0]).data[0]
    torch.testing.assert_close(unmasked, pixels, atol=2e-3, rtol=0)
    near, far = (built.generate(SampleRequest(image=path, strength=s, steps=steps), seeds=[0]).data[0]
                 for s in (0.1, 1.0))
    assert (near - pixels).abs().mean() < (far - pixels).abs().mean()
    painted = built.generate(SampleRequest(image=path, mask=mask, steps=steps), seeds=[0]).data[0]
    torch.testing.assert_close(painted[..., :8], pixels[..., :8], atol=2e-3, rtol=0)
    assert (painted - pixels)[..., 8:].abs().max() > 0.05


def test_guidance_reaches_the_embedding():
    built = system(LCMConfig)
    default, same, other = (built.generate(SampleRequest(prompt="red apple", guidance=g), seeds=[0]).data
                            for g in (None, 8.0, 2.0))
    assert torch.equal(default, same) and not torch.equal(default, other)
    assert built.used_settings(SampleRequest()) == {"steps": 4, "guidance": 8.0}
    assert system().used_settings(SampleRequest()) == {"steps": 2}


@pytest.mark.parametrize("setting", [{"sampler": "ddim"}, {"eta": 0.5}, {"negative_prompt": "cat"},
                                     {"schedule": "karras"}, {"guidance_rescale": 0.5},
                                     {"guidance_interval": (0.1, 0.9)}, {"guidance": 3.0}, {"steps": 41}])
def test_what_a_jump_cannot_do_is_refused_by_name(setting):
    with pytest.raises(UsageError):
        system().generate(SampleRequest(**setting), seeds=[0])


def test_what_a_run_computes_once_is_what_each_jump_would():
    """A transformer's modulations are looked up by the clock of its native path."""
    config = {**ConsistencyConfig.presets["emoji-distil"], "teacher": None, "codec": None, "size": 16,
              "net": DiTNetConfig.presets["tiny"] | {"in_channels": 3, "learn_sigma": False, "size": 16},
              "conditioner": {"kind": "label", "classes": ["a", "b", "c"], "styles": []}}
    built = system(**config)
    cond, _ = built.conditioner.prompts(["b"], torch.device("cpu"))
    points, x = grid(built.config.path, built.config.path.times(2)), torch.randn(1, 3, 16, 16)
    prepared = built._cached(points, cond)
    for t in points.t[:-1]:
        clock = built.config.path.network_time(t).float()
        assert float(clock) in prepared["steps"]
        torch.testing.assert_close(built.config.jump(built.net, x, t, cond, prepared),
                                   built.config.jump(built.net, x, t, cond), atol=1e-5, rtol=1e-5)


def test_a_model_of_classes_alone_wants_one():
    built = system(net=ConsistencyConfig.preset("tiny").net.to_json() | {"num_classes": 3, "null_class": False},
                   conditioner={"kind": "label", "classes": ["0", "1", "2"]})
    with pytest.raises(InputError, match="none was named"):
        built.generate(SampleRequest(), seeds=[0])
    one, two = (built.generate(SampleRequest(prompt=p), seeds=[0]) for p in ("1", "2"))
    assert one.notes == ({"class": "1", "exact": True},) and not torch.equal(one.data, two.data)
