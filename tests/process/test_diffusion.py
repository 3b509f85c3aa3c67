"""The shared diffusion system: what a request decides, on tiny random networks."""

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from nexus import catalog
from nexus.errors import InputError, UsageError
from nexus.images import write_image
from nexus.process.paths import DiscretePath, RectifiedPath
from nexus.process.predictions import x0_of
from nexus.requests import SampleRequest
from nexus.rng import ItemNoise

CLASSES, STYLES = ("red apple", "green pear", "cat"), ("noto", "flat")


def system(name="dit", preset="tiny", **changes):
    config = catalog.config_class(name).preset(preset)
    conditioner = config.conditioner.adapt(CLASSES, STYLES)
    config = config.model_copy(update={"conditioner": conditioner, **changes})
    config = config.model_copy(update={"net": config.net.model_copy(update=config.net_facts())})
    return randomised(config)


def randomised(config):
    torch.manual_seed(0)
    built = config.build().eval()
    with torch.no_grad():                       # zero-initialised layers would make every network say nothing
        for p in built.net.parameters():
            p.add_(torch.randn(p.shape) * 0.05)
    return built


def made(built, *, seeds=(0,), **request):
    return built.generate(SampleRequest(**request), seeds=list(seeds)).data


@pytest.fixture
def picture(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    return str(write_image(tmp_path / "in.png", array)), torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1


@pytest.mark.parametrize("name, preset", [("ddpm", "tiny"), ("ddpm", "iddpm-tiny"), ("conditional", "tiny"),
                                          ("conditional", "tiny-text"), ("dit", "tiny"), ("flow", "tiny")])
def test_an_item_depends_on_its_seed_and_not_on_its_batch(name, preset):
    built = system(name, preset)
    prompt = None if name == "ddpm" else "red apple, flat style"
    whole = made(built, seeds=(3, 4, 5), prompt=prompt)
    alone = made(built, seeds=(4,), prompt=prompt)
    assert (whole[1] - alone[0]).abs().max() <= 2 / 255
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("prediction", ["eps", "x0", "v", "flow"])
def test_min_snr_weighs_the_error_of_x0(prediction):
    """min(SNR, gamma) |x0 error|^2, whatever is predicted. Hang et al. 2023, section 3.4."""
    path = RectifiedPath() if prediction == "flow" else DiscretePath()
    built = system("conditional", "tiny", path=path, prediction=prediction, min_snr=5.0)
    t = torch.tensor([0.1, 0.4, 0.9], dtype=torch.float64) * (1 if prediction == "flow" else 1000)
    x, said, meant = torch.randn(3, 3, 3, 2, 2, dtype=torch.float64)
    error = [x0_of(path, prediction, out, x, t) for out in (said, meant)]
    alpha, sigma = path.at(t)
    want = (alpha / sigma).square().clamp(max=5) * (error[0] - error[1]).square().flatten(1).mean(1)
    torch.testing.assert_close(built._weight(t) * (said - meant).square().flatten(1).mean(1), want)


def test_guidance_1_is_the_condition_alone_and_0_the_null():
    built = system()
    shared = {"prompt": "cat", "sampler": "ddim"}
    guided, plain = made(built, guidance=3.0, **shared), made(built, guidance=1.0, **shared)
    null = built.generate(SampleRequest(sampler="ddim"), seeds=[0]).data
    assert (guided - plain).abs().max() > 1e-3
    assert (made(built, guidance=0.0, **shared)[:, :1] - null[:, :1]).abs().max() < 0.5
    torch.testing.assert_close(made(built, guidance=3.0, guidance_interval=(0.0, 0.0), **shared), plain)


def test_styles_and_classes_change_the_picture_and_are_noted():
    built = system()
    result = built.generate(SampleRequest(prompt="red aple, flat style"), seeds=[0])
    assert result.notes == ({"class": "red apple", "exact": False, "style": "flat"},)
    assert not torch.equal(made(built, prompt="red apple, noto style"), result.data)


def test_a_prompt_that_matches_nothing_lists_the_nearest():
    with pytest.raises(InputError, match="quantum chromodynamics") as caught:
        made(system(), prompt="quantum chromodynamics")
    assert "red apple" in caught.value.hint


def test_an_unconditional_model_refuses_a_prompt():
    with pytest.raises(InputError, match="unconditional"):
        made(system("ddpm"), prompt="cat")


def test_without_a_null_class_one_is_named_and_guidance_is_away_from_another():
    cls = catalog.config_class("conditional")
    tiny = cls.presets["tiny"]
    built = randomised(cls.parse(tiny | {"net": tiny["net"] | {"num_classes": len(CLASSES), "null_class": False},
                                         "conditioner": {"kind": "label", "classes": CLASSES}}))
    with pytest.raises(InputError, match="none was named"):
        made(built)
    with pytest.raises(UsageError, match="no null class"):
        made(built, prompt="cat", guidance=3.0)
    alone = made(built, prompt="cat", guidance=1.0)
    away = made(built, prompt="cat", guidance=3.0, negative_prompt="red apple")
    assert alone.isfinite().all() and away.isfinite().all() and (away - alone).abs().max() > 1e-3


def test_strength_0_returns_the_picture_and_1_forgets_it(picture):
    path, pixels = picture
    built = system("ddpm")
    torch.testing.assert_close(made(built, image=path, strength=0.0)[0], pixels)
    with pytest.raises(UsageError, match="less than one step"):
        made(built, image=path, strength=0.04, steps=10)
    other = made(built, image=path, strength=1.0, sampler="ddim")
    # the chain's noisiest point still has alpha = 0.006 of the picture in it
    assert (other - made(built, sampler="ddim")).abs().mean() < 0.2


@pytest.mark.parametrize("name", ["ddpm", "dit", "flow"])
@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp-2m", "rk4"])
def test_inpainting_keeps_every_pixel_outside_the_mask(name, sampler, picture, tmp_path):
    path, pixels = picture
    mask = np.zeros((16, 16, 1), dtype=np.uint8)
    mask[4:9, 3:12] = 255
    write_image(tmp_path / "mask.png", mask)
    prompt = None if name == "ddpm" else "cat"
    out = made(system(name), image=path, mask=str(tmp_path / "mask.png"), sampler=sampler, prompt=prompt)[0]
    hole = torch.from_numpy(mask[:, :, 0] > 127)
    assert torch.equal(out[:, ~hole], pixels[:, ~hole])
    assert not torch.equal(out[:, hole], pixels[:, hole])


def test_a_mask_needs_a_picture_of_its_size(picture, tmp_path):
    write_image(tmp_path / "mask.png", np.zeros((8, 8, 1), dtype=np.uint8))
    with pytest.raises(UsageError, match="--image"):
        made(system("ddpm"), mask=str(tmp_path / "mask.png"))
    with pytest.raises(InputError, match="8x8"):
        made(system("ddpm"), image=picture[0], mask=str(tmp_path / "mask.png"))


def test_stored_noise_replaces_the_drawn_one(tmp_path):
    built = system("ddpm")
    save_file({"noise": ItemNoise([7]).draw((3, 16, 16))}, tmp_path / "noise.safetensors")
    given = made(built, seeds=(0,), sampler="ddim", initial_noise=str(tmp_path / "noise.safetensors"))
    assert torch.equal(given, made(built, seeds=(7,), sampler="ddim"))
    save_file({"noise": torch.zeros(2, 2)}, tmp_path / "bad.safetensors")
    with pytest.raises(InputError, match=r"\[2, 2\]"):
        made(built, initial_noise=str(tmp_path / "bad.safetensors"))


def test_an_adaptive_solver_guides_each_item_by_its_own_time():
    built = system("conditional")
    both = made(built, seeds=(1, 2), sampler="dopri5", prompt="cat", guidance=3.0, steps=2)
    alone = torch.cat([made(built, seeds=(seed,), sampler="dopri5", prompt="cat", guidance=3.0, steps=2)
                       for seed in (1, 2)])
    assert (both - alone).abs().mean() < 1e-3 < (both[0] - both[1]).abs().mean()


def test_sizes_that_fit_are_made_and_others_named():
    built = system("ddpm")
    assert made(built, width=24, height=16).shape == (1, 3, 16, 24)
    with pytest.raises(UsageError, match="width 23"):
        made(built, width=23)


@pytest.mark.parametrize("name, preset", [("ddpm", "iddpm-tiny"), ("conditional", "tiny-text"), ("flow", "tiny")])
def test_the_loss_is_a_function_of_the_batch_and_the_rng_alone(name, preset):
    built = system(name, preset).train()
    batch = {"image": torch.randn(4, 3, 16, 16).clamp(-1, 1), "label": torch.tensor([0, 1, 2, 0]),
             "style": torch.tensor([0, 1, 1, 0]), "caption": ["red apple", "cat", "green pear", "cat"]}
    first, again, other = (built.loss(batch, torch.Generator().manual_seed(s), 0)["loss"] for s in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)
    first.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in built.parameters())


def test_a_condition_is_dropped_as_often_as_asked():
    built = system("conditional", "tiny", p_uncond=1.0)
    batch = {"image": torch.zeros(2, 3, 16, 16), "label": torch.tensor([0, 1]), "style": torch.tensor([0, 1]),
             "caption": ["", ""]}
    swapped = {**batch, "label": batch["label"].flip(0)}
    losses = [built.loss(b, torch.Generator().manual_seed(0), 0)["loss"] for b in (batch, swapped)]
    assert torch.equal(*losses)
