"""Pictures as condition: the channels a network gets, in training and from a user's files."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus import catalog
from nexus.errors import InputError, UsageError
from nexus.images import write_image
from nexus.models.diffusion.unet import UNetConfig
from nexus.process.concat import InpaintConcat, UpscaleConcat, enlarged, hidden, random_masks
from nexus.requests import SampleRequest
from tests.process.test_diffusion import made, system

CONDITIONAL = catalog.config_class("conditional")


def pictures(n=4, side=16):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)


def batch(n=4):
    return {"image": pictures(n), "label": torch.zeros(n, dtype=torch.long), "style": torch.zeros(n, dtype=torch.long),
            "caption": ["cat"] * n}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def files(tmp_path):
    """(picture file, mask file, the picture [3, 16, 16] in [-1, 1], the hole [16, 16])."""
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    mask = np.zeros((16, 16, 1), dtype=np.uint8)
    mask[4:9, 3:12] = 255
    names = [str(write_image(tmp_path / name, data)) for name, data in (("in.png", array), ("mask.png", mask))]
    return *names, torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1, torch.from_numpy(mask[:, :, 0] > 127)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.integers(0, 99))
def test_random_masks_cover_something_and_everything_as_often_as_asked(height, width, seed):
    masks = random_masks(6, height, width, rng(seed), 0.0)
    assert masks.shape == (6, 1, height, width) and masks.flatten(1).any(1).all()
    assert random_masks(6, height, width, rng(seed), 1.0).all()
    assert torch.equal(masks, random_masks(6, height, width, rng(seed), 0.0))


def test_what_is_hidden_is_not_seen():
    image, mask = pictures(), random_masks(4, 16, 16, rng(), 0.0)
    concat = hidden(image, mask, lambda x: x)
    assert torch.equal(concat[:, :1].bool(), mask)
    other = torch.where(mask, torch.rand_like(image), image)
    assert torch.equal(concat, hidden(other, mask, lambda x: x))
    assert torch.equal(concat[:, 1:].where(~mask, 0.0), image.where(~mask, 0.0))


def test_the_order_is_that_of_stable_diffusion():
    # 4 noisy + 1 mask + 4 of the masked picture; masks are sampled at the nearest pixel, as diffusers does it
    image, mask = pictures(side=32), random_masks(4, 32, 32, rng(), 0.0)
    def encode(x):
        return torch.nn.functional.avg_pool2d(x, 8).repeat(1, 2, 1, 1)[:, :4]
    concat = hidden(image, mask, encode)
    assert concat.shape == (4, 5, 4, 4)
    assert torch.equal(concat[:, 0], torch.nn.functional.interpolate(mask.float(), size=(4, 4))[:, 0])
    assert torch.equal(concat[:, 1:], encode(image * (mask < 0.5)))


def test_level_0_is_the_picture_and_level_1_nothing_of_it():
    low, noise = torch.full((2, 3, 4, 4), 0.25), torch.randn(2, 3, 4, 4)
    clean, gone = (enlarged(low, torch.full((2,), v), noise, (16, 16), lambda x: x) for v in (0.0, 1.0))
    assert torch.equal(clean[:, :3], torch.full((2, 3, 16, 16), 0.25)) and (clean[:, 3] == 0).all()
    assert torch.equal(gone, enlarged(-low, torch.ones(2), noise, (16, 16), lambda x: x)) and (gone[:, 3] == 1).all()


def test_noise_keeps_the_variance():
    low, noise = torch.randn(2, 500, 3, 8, 8, generator=rng())
    for level in (0.0, 0.3, 0.9):
        seen = enlarged(low, torch.full((500,), level), noise, (8, 8), lambda x: x)[:, :3]
        assert seen.std().item() == pytest.approx(1.0, abs=0.02)


def test_the_small_picture_is_the_mean_of_its_pixels():
    image = pictures()
    concat = UpscaleConcat(factor=4).training(image, lambda x: x, rng())
    assert concat.shape == (4, 4, 16, 16)
    level = concat[:, 3, 0, 0]
    assert len(set(level.tolist())) == 4 and ((level >= 0) & (level <= 1)).all()


@pytest.mark.parametrize("preset", ["inpaint-tiny", "upscale-tiny"])
def test_the_loss_depends_on_the_picture_beside(preset):
    built = system("conditional", preset).train()
    loss = built.loss(batch(), rng(1), 0)["loss"]
    loss.backward()
    assert loss.isfinite() and built.net.conv_in.weight.grad[:, 3:].abs().max() > 0
    assert torch.equal(loss, built.loss(batch(), rng(1), 0)["loss"])


def test_a_dropped_condition_keeps_its_picture():
    built = system("conditional", "inpaint-tiny", p_uncond=1.0)
    seen = []
    built.net.register_forward_pre_hook(lambda module, args: seen.append(args[2]))
    built.loss(batch(), rng(1), 0)
    assert (seen[0]["label"] == 3).all() and seen[0]["concat"].abs().max() > 0


def test_cached_latents_hold_no_pictures():
    built = system("conditional", "inpaint-tiny")
    with pytest.raises(InputError, match="cached latents"):
        built.loss({"latent": pictures()} | {k: v for k, v in batch().items() if k != "image"}, rng(), 0)


@pytest.mark.parametrize("sampler", ["ddim", "heun", "dpmpp-2m"])
def test_inpainting_keeps_the_rest_and_follows_it(sampler, files):
    image, mask, pixels, hole = files
    built = system("conditional", "inpaint-tiny")
    shared = {"mask": mask, "prompt": "cat", "sampler": sampler}
    out = made(built, image=image, **shared)[0]
    assert torch.equal(out[:, ~hole], pixels[:, ~hole]) and not torch.equal(out[:, hole], pixels[:, hole])
    together = made(built, seeds=(4, 0), image=image, **shared)
    assert (together[1] - out).abs().max() <= 2 / 255
    softly = made(built, image=image, strength=0.5, **shared)[0]
    assert torch.equal(softly[:, ~hole], pixels[:, ~hole]) and not torch.equal(softly, out)


def test_without_a_picture_everything_is_painted(files):
    built = system("conditional", "inpaint-tiny")
    assert made(built, prompt="cat").isfinite().all()
    with pytest.raises(UsageError, match="mask"):
        made(built, prompt="cat", image=files[0])


def test_enlarging_starts_from_a_small_picture(files, tmp_path):
    built = system("conditional", "upscale-tiny")
    small = str(write_image(tmp_path / "small.png", np.full((4, 4, 3), 200, dtype=np.uint8)))
    dark = str(write_image(tmp_path / "dark.png", np.full((4, 4, 3), 20, dtype=np.uint8)))
    one = made(built, image=small)
    assert one.shape == (1, 3, 16, 16) and not torch.equal(one, made(built, image=dark))
    assert (made(built, seeds=(7, 0), image=small)[1] - one[0]).abs().max() <= 2 / 255
    assert not torch.equal(one, made(built, image=small, image_noise=0.8))
    gone = made(built, image=small, image_noise=1.0)
    torch.testing.assert_close(gone, made(built, image=dark, image_noise=1.0))
    torch.testing.assert_close(gone, made(built))
    assert made(built, image=small, width=24, height=8).shape == (1, 3, 8, 24)


@pytest.mark.parametrize("more", [{"mask": "x"}, {"strength": 0.5}])
def test_enlarging_takes_no_mask_and_no_strength(files, more):
    more = {"mask": files[1]} if "mask" in more else more
    with pytest.raises(UsageError, match="enlarges"):
        made(system("conditional", "upscale-tiny"), image=files[0], **more)


def test_the_channels_must_fit():
    with pytest.raises(InputError, match="takes 7 and gives 3"):
        CONDITIONAL.parse(CONDITIONAL.presets["inpaint-tiny"] | {"net": {"in_channels": 8}})
    with pytest.raises(InputError, match="takes 9 and gives 4"):        # Stable Diffusion's
        CONDITIONAL.parse({"net": UNetConfig.presets["sd15"], "concat": {"kind": "inpaint"},
                           "codec": {"net": {"latent_channels": 4}}})
    CONDITIONAL.parse({"net": UNetConfig.presets["sd15-inpaint"], "concat": {"kind": "inpaint"},
                       "codec": {"net": {"latent_channels": 4}}})


def test_shapes_leave_the_picture_out():
    latent = CONDITIONAL.preset("emoji").latent_shape
    for preset, shape in (("inpaint-tiny", (3, 16, 16)), ("upscale-tiny", (3, 16, 16)), ("inpaint", latent),
                          ("upscale", (3, 64, 64))):
        config = CONDITIONAL.preset(preset)
        assert config.latent_shape == shape and config.image_channels == 3


@pytest.mark.parametrize("kind", ["cfg-zero", "pag", "autoguidance"])
def test_guidance_keeps_the_picture_on_both_sides(kind, files):
    built = system("conditional", "inpaint-tiny")
    request = SampleRequest(prompt="cat", guidance_kind=kind, image=files[0], mask=files[1], sampler="ddim",
                            guide_model="it" if kind == "autoguidance" else None)
    assert built.generate(request, seeds=[0], guide=built).data.isfinite().all()


def test_configurations_round_trip():
    for concat in (InpaintConcat(full=0.5), UpscaleConcat(factor=2, level=0.0)):
        preset = "inpaint-tiny" if concat.kind == "inpaint" else "upscale-tiny"
        config = CONDITIONAL.preset(preset).model_copy(update={"concat": concat})
        assert CONDITIONAL.parse(config.to_json()) == config
