"""GAN, conditional GAN, WGAN, CycleGAN: what is minimised by whom, what is logged, and what a request may ask."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from nexus.codecs.kl_image import KLConfig
from nexus.errors import InputError, UsageError
from nexus.images import read_image
from nexus.losses.adversarial import LOSSES
from nexus.models.gan.base_gan import GANConfig
from nexus.models.gan.conditional_gan import ConditionalGANConfig
from nexus.models.gan.cycle_gan import CycleGANConfig
from nexus.models.gan.wgan import WGANConfig
from nexus.requests import SampleRequest
from nexus.rng import ItemNoise, generator
from nexus.train.args import TrainArgs
from nexus.train.optim import build_optimizers, lr_scale


def batch(n=4, side=16, seed=0):
    rng = torch.Generator().manual_seed(seed)
    a, b = (torch.rand(n, 3, side, side, generator=rng) * 2 - 1 for _ in range(2))
    return {"image": a, "other": b, "label": torch.arange(n) % 3, "style": torch.zeros(n, dtype=torch.int64)}


class Facts:
    """Of a set with three classes."""

    classes, styles, size, channels = ("red ball", "green tree", "seven"), ("noto", "flat"), 16, 3


def built(config):
    torch.manual_seed(0)
    return config.build()


def grads(module):
    return [p.grad is not None and bool(p.grad.abs().sum()) for p in module.parameters()]


@pytest.mark.parametrize("cls, preset", [(GANConfig, "tiny"), (GANConfig, "tiny-modern"), (GANConfig, "tiny-latent"),
                                         (WGANConfig, "tiny"),
                                         (WGANConfig, "tiny-clip"), (ConditionalGANConfig, "tiny-pix2pix"),
                                         (CycleGANConfig, "tiny")])
def test_each_phase_teaches_its_own_network_alone(cls, preset):
    system = built(cls.preset(preset))
    for phase in system.phases():
        system.zero_grad(set_to_none=True)
        phase.loss(batch(), generator(0, phase.name), 0)["loss"].backward()
        other = system.critic if phase.module is system.net else system.net
        assert any(grads(phase.module)) and not any(grads(other)), phase.name


def test_a_conditional_gan_without_classes_yet_makes_pictures():
    made = built(ConditionalGANConfig.preset("tiny")).eval().generate(SampleRequest(), seeds=[1, 2])
    assert made.data.shape == (2, 3, 16, 16) and made.notes == ({}, {})


def test_the_losses_are_those_of_their_names():
    for name in LOSSES:
        system = built(GANConfig.preset("tiny").model_copy(update={"loss": name}))
        found = system.critic_loss(batch(), generator(1), 0)
        again = built(GANConfig.preset("tiny").model_copy(update={"loss": name}))
        z = torch.randn(4, 16, generator=generator(1))
        with torch.no_grad():
            fake = again.net(z)
        expected = LOSSES[name].critic(again.critic(batch()["image"])[0], again.critic(fake)[0])
        assert torch.allclose(found["loss"], expected, atol=1e-5), name
        assert 0 < system.generator_loss(batch(), generator(2), 0)["diversity"] < 2


def test_penalties_are_added_with_their_weights_and_logged():
    plain = built(GANConfig.preset("tiny-modern").model_copy(update={"r1": 0.0, "r2": 0.0}))
    full = built(GANConfig.preset("tiny-modern").model_copy(update={"r1": 3.0, "r2": 5.0, "drift": 2.0, "gp": 1.5}))
    one, two = (s.critic_loss(batch(), generator(1), 0) for s in (plain, full))
    extra = 3 * two["r1"] + 5 * two["r2"] + 2 * two["drift"] + 1.5 * two["gp"]
    assert torch.allclose(two["loss"], one["loss"] + extra, rtol=1e-4) and two["r1"] > 0 and "r1" not in one


def test_penalties_of_every_fourth_step_weigh_four_times():
    config = GANConfig.preset("tiny-modern").model_copy(update={"r1": 3.0, "r2": 5.0, "drift": 2.0})
    always, lazy = (built(config.model_copy(update={"penalty_every": n})) for n in (1, 4))
    for step in range(8):
        one, two = (s.critic_loss(batch(), generator(1, step), step) for s in (always, lazy))
        extra = 3 * one["r1"] + 5 * one["r2"]
        due = step % 4 == 3
        assert torch.allclose(two["loss"], one["loss"] + (3 if due else -1) * extra, rtol=1e-4) and "drift" in two
        assert ("r1" in two) == ("r2" in two) == due


def test_a_gan_of_latents_is_trained_on_them_and_decodes_what_it_makes():
    system = built(GANConfig.preset("tiny-latent")).eval()
    assert not any(p.requires_grad for p in system.codec.parameters())
    latents = system.encode(batch()["image"])
    assert latents.shape == (4, 4, 8, 8)
    for phase in system.phases():
        of_pictures, of_latents = (phase.loss(b, generator(1), 0)["loss"] for b in (batch(), {"latent": latents}))
        assert torch.equal(of_pictures, of_latents), phase.name
    made = system.generate(SampleRequest(), seeds=[1, 2]).data
    z = ItemNoise([1, 2]).draw((16,))
    assert made.shape == (2, 3, 16, 16) and torch.equal(made, system.codec.decode(system.net(z)).clamp(-1, 1))


@pytest.mark.parametrize("cls", [GANConfig, WGANConfig, ConditionalGANConfig])
def test_presets_of_emoji_see_whole_pictures_and_make_latents(cls):
    config = cls.preset("emoji")
    assert (config.image_size, config.image_channels, config.net.size, config.net.channels) == (64, 3, 16, 8)


def test_the_wasserstein_estimate_is_logged_and_weights_are_clipped():
    system = built(WGANConfig.preset("tiny-clip"))
    critic, net = system.phases()
    found = critic.loss(batch(), generator(0), 0)
    assert torch.allclose(found["distance"], found["real"] - found["fake"], atol=1e-6)
    assert torch.allclose(found["loss"], -found["distance"])
    critic.after(0)
    assert all(p.abs().max() <= 0.01 for p in system.critic.parameters())
    assert net.after is None and critic.repeat == 2


def test_a_phase_can_learn_at_its_own_rate():
    system = built(GANConfig.preset("tiny").model_copy(update={"critic_rate": 4.0}))
    args = TrainArgs(lr=1e-3, optimizer="adam")
    rates = [build_optimizers(p.module, args, p.rate)["adam"].param_groups[0]["lr"] for p in system.phases()]
    assert rates == [4e-3, 1e-3]


def test_constant_then_linear():
    args = TrainArgs(steps=200, schedule="constant-linear", final_lr=0.0)
    assert [lr_scale(s, args) for s in (0, 100)] == [1.0, 1.0]
    assert lr_scale(150, args) == pytest.approx(0.5) and lr_scale(199, args) == pytest.approx(0.01)


def test_a_wrong_combination_is_refused_by_its_name():
    for fields, word in (({"gp": 1.0}, "norm"), ({"critic": {"kind": "dcgan", "label": "map"}}, "label"),
                         ({"critic": {"kind": "resnet", "widths": (8, 8)}}, "widths"),
                         ({"codec": {"net": KLConfig.presets["tiny"]}}, "latents")):
        with pytest.raises(InputError, match=word):
            GANConfig.parse(fields)
    with pytest.raises(InputError, match="patch"):
        ConditionalGANConfig.parse({"net": {"kind": "unet"}, "critic": {"kind": "dcgan"},
                                    "conditioner": {"kind": "none"}})
    with pytest.raises(InputError, match="channels"):
        CycleGANConfig.parse({"net": {"kind": "resnet", "out_channels": 1}})


# --- labels ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("preset", ["tiny", "tiny-projection", "tiny-auxiliary"])
def test_a_class_is_asked_for_or_drawn_by_the_seed(preset):
    system = built(ConditionalGANConfig.preset(preset).adapt(Facts)).eval()
    asked = system.generate(SampleRequest(prompt="red ball, flat style"), seeds=[0, 1])
    assert [n["class"] for n in asked.notes] == ["red ball"] * 2 and asked.notes[0]["style"] == "flat"
    assert system.generate(SampleRequest(prompt="7"), seeds=[0]).notes[0]["class"] == "seven"
    drawn = system.generate(SampleRequest(), seeds=list(range(30)))
    assert {n["class"] for n in drawn.notes} == set(Facts.classes)
    alone = system.generate(SampleRequest(), seeds=[17])
    assert alone.notes[0] == drawn.notes[17] and (alone.data[0] - drawn.data[17]).abs().max() < 1e-5


def test_the_auxiliary_critic_learns_classes_from_both_kinds():
    system = built(ConditionalGANConfig.preset("tiny-auxiliary").adapt(Facts))
    found = system.critic_loss(batch(), generator(0), 0)
    plain = system.config.model_copy(update={"auxiliary": 0.0})
    again = built(ConditionalGANConfig.preset("tiny-auxiliary").adapt(Facts))
    again.config = plain
    gap = (found["loss"] - again.critic_loss(batch(), generator(0), 0)["loss"]).item()
    rng, third = generator(0), built(again.config)
    with torch.no_grad():
        fake = third.net(torch.randn(4, 8, generator=rng), {"label": batch()["label"], "style": batch()["style"]})
    logits = [third.critic(x)[1] for x in (batch()["image"], fake)]
    assert gap == pytest.approx(sum(F.cross_entropy(said, batch()["label"]).item() for said in logits), rel=1e-4)
    assert found["accuracy"].item() == (logits[0].argmax(1) == batch()["label"]).float().mean().item()


# --- requests --------------------------------------------------------------------------------------------------------

def test_walks_truncation_and_what_is_refused():
    system = built(GANConfig.preset("tiny")).eval()
    walk = system.generate(SampleRequest(interpolate=5), seeds=[4, 5])
    ends = system.generate(SampleRequest(), seeds=[4, 5, 6]).data
    assert walk.data.shape == (2, 5, 3, 16, 16)
    assert torch.allclose(walk.data[0, 0], ends[0], atol=1e-4) and torch.allclose(walk.data[0, 4], ends[1], atol=1e-4)
    assert torch.allclose(walk.data[1, 4], ends[2], atol=1e-4)
    assert not torch.allclose(system.generate(SampleRequest(truncation=0.5), seeds=[4]).data, ends[:1], atol=1e-4)
    for name, value in (("steps", 3), ("image", "x.png"), ("direction", "ab"), ("width", 32)):
        with pytest.raises(UsageError, match=name):
            system.generate(SampleRequest(**{name: value}), seeds=[0])
    with pytest.raises(InputError, match="prompt"):
        system.generate(SampleRequest(prompt="cat"), seeds=[0])


@pytest.fixture
def photo(tmp_path):
    draw = np.random.default_rng(0)
    Image.fromarray(draw.integers(0, 256, (37, 53, 3), dtype=np.uint8)).save(tmp_path / "photo.png")
    return str(tmp_path / "photo.png")


def test_cyclegan_translates_pictures_of_any_size_both_ways(photo):
    system = built(CycleGANConfig.preset("tiny")).eval()
    ab, ba = (system.generate(SampleRequest(image=photo, direction=way), seeds=[0]).data for way in ("ab", "ba"))
    assert ab.shape == (1, 3, 37, 53) and not torch.equal(ab, ba)
    assert torch.equal(ab, system.generate(SampleRequest(image=photo), seeds=[9]).data)
    x = torch.from_numpy(read_image(photo).copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
    whole = F.pad(x, (0, 3, 0, 3), mode="replicate")
    with torch.no_grad():
        assert torch.allclose(ab, system.net(whole, "ab")[:, :, :37, :53].clamp(-1, 1), atol=1e-5)
    with pytest.raises(UsageError, match="prompt"):
        system.generate(SampleRequest(image=photo, prompt="x"), seeds=[0])


def test_batch_norms_and_dropout_of_a_translator_are_those_of_the_published_test(photo):
    config = CycleGANConfig.preset("tiny").override(["net.norm=batch", "net.dropout=true", "two_way=false"])
    system = built(config).eval()
    one, two, again = (system.generate(SampleRequest(image=photo), seeds=s).data for s in ([1, 2], [2], [1]))
    assert not torch.equal(one[0], one[1]) and torch.equal(one[1], two[0]) and torch.equal(one[0], again[0])
    plain = built(config.override(["net.dropout=false"])).eval()
    x = torch.randn(1, 3, 16, 16, generator=generator(3))
    with torch.no_grad():
        made = plain.translate(x)
        assert torch.allclose(made, plain.train().net(x), atol=1e-5)        # which never called eval()
        assert not torch.allclose(made, plain.eval().net(x), atol=1e-3)


def test_grey_pictures_have_a_critic_of_their_own():
    system = built(CycleGANConfig.preset("tiny").override(["net.in_channels=1", "net.out_channels=1"]))
    grey = {name: x[:, :1] if name in ("image", "other") else x for name, x in batch().items()}
    assert all(phase.loss(grey, generator(0), 0)["loss"].isfinite() for phase in system.phases())
    with pytest.raises(InputError, match="critic.in_channels 3"):
        CycleGANConfig.preset("tiny").override(["net.in_channels=1", "net.out_channels=1", "critic.in_channels=3"])


def test_a_model_of_one_way_says_so(photo):
    system = built(CycleGANConfig.preset("tiny").model_copy(update={"two_way": False})).eval()
    assert system.generate(SampleRequest(image=photo), seeds=[0]).data.shape == (1, 3, 37, 53)
    with pytest.raises(UsageError, match="ba"):
        system.generate(SampleRequest(image=photo, direction="ba"), seeds=[0])
    with pytest.raises(UsageError, match="one way"):
        system.phases()


def test_pix2pix_draws_its_dropout_by_the_seed(photo):
    config = ConditionalGANConfig.preset("tiny-pix2pix").override(["net.depth=6", "net.dropout=true", "size=64"])
    system = built(config).eval()
    one, two = (system.generate(SampleRequest(image=photo), seeds=s).data for s in ([1, 2], [2]))
    assert not torch.equal(one[0], one[1]) and torch.allclose(one[1], two[0], atol=1e-5)


def test_cyclegans_loss_is_the_papers():
    system = built(CycleGANConfig.preset("tiny"))
    b = batch()
    found = system.generator_loss(b, generator(0), 0)
    a, o = b["image"], b["other"]
    g, f, d = (lambda x: system.net(x, "ab")), (lambda x: system.net(x, "ba")), system.critic
    with torch.no_grad():
        fake_b, fake_a = g(a), f(o)
        expected = (d["b"](fake_b) - 1).square().mean() + (d["a"](fake_a) - 1).square().mean() \
            + 10 * ((f(fake_b) - a).abs().mean() + (g(fake_a) - o).abs().mean()) \
            + 5 * ((g(o) - o).abs().mean() + (f(a) - a).abs().mean())
    assert torch.allclose(found["loss"], expected, rtol=1e-5)
    critic = system.critic_loss(b, generator(0), 0)["loss"]
    with torch.no_grad():
        expected = sum(0.5 * ((d[k](real) - 1).square().mean() + d[k](fake).square().mean())
                       for k, real, fake in (("a", a, fake_a), ("b", o, fake_b)))
    assert torch.allclose(critic, expected, rtol=1e-5)


def test_turned_colours_go_in_and_the_critics_see_real_ones():
    b = batch()
    grey = {key: value.mean(1, keepdim=True).expand(-1, 3, -1, -1) if value.ndim == 4 else value
            for key, value in b.items()}
    for data, same in ((b, False), (grey, True)):
        plain, turned = (built(CycleGANConfig.preset("tiny").override([f"hue={share}"])) for share in (0, 1))
        one, two = (system.generator_loss(data, generator(0), 0)["cycle"] for system in (plain, turned))
        assert torch.allclose(one, two, atol=1e-5) == same
        one, two = (system.critic_loss(data, generator(0), 0) for system in (plain, turned))
        assert one["real_a"] == two["real_a"] and one["real_b"] == two["real_b"]
        one, two = (system.pools["b"].pictures[:4] for system in (plain, turned))
        assert torch.allclose(one, two, atol=1e-5) == same
