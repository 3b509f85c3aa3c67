"""A critic that looks through a denoiser: what its blocks say, of what, and who learns."""

import pytest
import torch
from safetensors.torch import load_file

from nexus import checkpoint
from nexus.codecs.kl_image import KLConfig
from nexus.errors import ModelError
from nexus.models.diffusion.dit import DiTConfig
from nexus.models.diffusion.unet import UNetConfig
from nexus.models.gan.base_gan import GANConfig
from nexus.models.gan.conditional_gan import ConditionalGANConfig
from nexus.models.gan.wgan import WGANConfig
from nexus.nn.denoiser_critic import DenoiserCriticConfig
from nexus.process.looked_through import looked_through
from nexus.rng import generator
from nexus.train.start import train
from tests.played import played

NET = {"kind": "resnet", "widths": (16, 8), "blocks": 1, "channels": 4, "latents": 16, "norm": "batch"}
TINY = {"net": NET, "codec": {"net": KLConfig.presets["tiny"]}, "loss": "hinge"}
CRITIC = {"kind": "denoiser", "hidden": 32, "seen": (0, 1), "width": 8, "spectral": True}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A tiny DiT of 4 x 8 x 8 latents with blocks that do something, as a model on disk."""
    torch.manual_seed(0)
    config = DiTConfig.preset("tiny").override(["net.in_channels=4", "net.learn_sigma=false", "learned_variance=false"])
    config = config.model_copy(update={"codec": GANConfig.parse(TINY).codec})
    system = config.build()
    for p in system.net.parameters():
        torch.nn.init.normal_(p, std=0.1)
    folder = tmp_path_factory.mktemp("teacher") / "dit"
    checkpoint.save_model(folder, "dit", config.to_json(), checkpoint.released_state(system))
    return str(folder)


def built(teacher, cls=GANConfig, **more):
    """A game whose critic looks through the teacher."""
    torch.manual_seed(0)
    config = cls.parse(TINY | {"critic": CRITIC | {"model": teacher}} | more)
    system = config.build()
    checkpoint.attach_external(system)
    return system


def latents(n=4):
    return torch.randn(n, 4, 8, 8, generator=generator(1, "latents"))


def test_the_last_block_is_what_the_network_goes_on_from(teacher):
    net = checkpoint.load(teacher, device="cpu").net
    path, x, share = DiTConfig.preset("tiny").path, latents(2), torch.tensor([0.1, 0.5])
    maps = looked_through(net, path, x, share, generator(0), (0, 1))
    assert maps.shape == (2, 64, 4, 4) and not torch.allclose(maps[:, :32], maps[:, 32:])
    t = path.t_of_log_snr(-torch.log(torch.tan(share.double() * torch.pi / 2))).float()
    alpha, sigma = path.at(t)
    assert torch.allclose(sigma / alpha, torch.tensor([0.1584, 1.0]), atol=1e-3)
    noise = torch.randn(x.shape, generator=generator(0))
    noisy = alpha.float()[:, None, None, None] * x + sigma.float()[:, None, None, None] * noise
    seen = []
    hook = net.blocks[-1].register_forward_hook(lambda block, given, out: seen.append(out))
    net(noisy, t)
    hook.remove()
    last = seen[0].flatten(1)
    last = (last - last.mean(1, keepdim=True)) / last.std(1, keepdim=True, correction=0)
    assert torch.allclose(maps[:, 32:].flatten(2).transpose(1, 2).flatten(1), last, atol=1e-4)
    assert torch.equal(looked_through(net, path, x, share, generator(0), (1,)), maps[:, 32:])
    assert not any(block._forward_hooks for block in net.blocks)


def test_who_learns(teacher):
    system = built(teacher)
    critic, maker = system.phases()
    critic.loss({"latent": latents()}, generator(0), 0)["loss"].backward()
    assert all(p.grad is not None for p in system.critic.parameters())
    assert all(p.grad is None for p in (*system.net.parameters(), *system.teacher.parameters()))
    system.zero_grad(set_to_none=True)
    maker.loss({"latent": latents()}, generator(0), 0)["loss"].backward()
    assert all(p.grad is not None for p in system.net.parameters()) and system.net.code.weight.grad.any()
    assert all(p.grad is None for p in (*system.critic.parameters(), *system.teacher.parameters()))


def test_the_critic_learns_to_tell_latents_apart(teacher):
    system = built(teacher)
    critic, _ = system.phases()
    losses = played(critic, {"latent": torch.linspace(-2, 2, 8).expand(16, 4, 8, 8)}, steps=40, lr=3e-3)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


@pytest.mark.parametrize("loss, more", [("relativistic", {"r1": 1.0, "r2": 1.0}),
                                        ("hinge", {"augment": ["translation"]})])
def test_other_games_are_played_with_features_too(teacher, loss, more):
    """Penalties are on what the critic sees, so that no gradient goes through the denoiser twice."""
    for phase in built(teacher, **more | {"loss": loss}).phases():
        values = phase.loss({"latent": latents()}, generator(0), 0)
        values["loss"].backward()
        assert values["loss"].isfinite()
        assert phase.name != "critic" or ("r1" in values) == ("r1" in more)


def test_a_wasserstein_game_is_played_with_features(teacher):
    system = built(teacher, WGANConfig, loss="wasserstein", critic=CRITIC | {"model": teacher, "spectral": False})
    assert not any("parametrizations" in name for name in system.critic.state_dict())
    values = system.phases()[0].loss({"latent": latents()}, generator(0), 0)
    assert values["gp"] > 0 and values["distance"].isfinite()


def test_labels_move_the_scores(teacher):
    class Facts:
        classes, styles = ("a", "b", "c"), ()
    config = ConditionalGANConfig.parse(TINY | {"critic": CRITIC | {"model": teacher, "label": "projection"}})
    system = config.adapt(Facts).build().eval()
    h = torch.randn(2, 64, 4, 4, generator=generator(0))
    one, other = (system.critic(h, {"label": torch.tensor(ids)})[0] for ids in ([0, 1], [0, 2]))
    assert torch.equal(one[0], other[0]) and not torch.allclose(one[1], other[1])


@pytest.mark.parametrize("change, words", [
    ({"hidden": 16}, "32 wide"), ({"patch": 1}, "32 wide"), ({"seen": (0, 2)}, "2 blocks"),
    ({"model": "gan"}, "no diffusion"), ({"model": "dit"}, r"\(8, 16, 16\)")])
def test_a_denoiser_that_does_not_fit_is_refused(teacher, change, words):
    with pytest.raises(ModelError, match=words):
        built(teacher, critic=CRITIC | {"model": teacher} | change)


def test_a_unet_is_refused(tmp_path):
    from nexus.models.diffusion.conditional_diffusion import ConditionalConfig
    config = ConditionalConfig.preset("tiny")
    assert isinstance(config.net, UNetConfig)
    checkpoint.save_model(tmp_path / "unet", "conditional", config.to_json(),
                          checkpoint.released_state(config.build()))
    with pytest.raises(ModelError, match="no diffusion transformer"):
        built(str(tmp_path / "unet"))


def test_levels_in_order_and_a_critic_alone_says_what_it_lacks():
    with pytest.raises(Exception, match="least"):
        DenoiserCriticConfig.parse({"least": 0.5, "most": 0.2})
    system = GANConfig.parse(TINY | {"critic": CRITIC}).build()
    with pytest.raises(ModelError, match="not loaded"):
        system.critic_loss({"latent": latents()}, generator(0), 0)


def test_a_run_keeps_no_weight_of_the_denoiser_and_samples_without_it(teacher, tmp_path):
    from tests.drawn import drawn
    pictures = drawn(tmp_path / "pictures", ("circle", "square"), count=4, side=16, seed=5)
    file = {"config": TINY | {"critic": CRITIC | {"model": teacher}}, "train": {"steps": 2, "samples": 0}}
    train("gan", data=str(pictures), run=tmp_path / "run", preset="tiny", config=file, device="cpu")
    kept = load_file(tmp_path / "run" / "step-0000002" / "model.safetensors")
    assert any(name.startswith("critic.") for name in kept) and not any(name.startswith("teacher.") for name in kept)
    loaded = checkpoint.load(str(tmp_path / "run"), device="cpu")
    assert loaded.teacher is None and loaded.critic is None
