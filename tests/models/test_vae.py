"""VAEs: the bound in closed form and by Monte Carlo, the laws that weigh it, and what `generate` promises."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, distributions

from nexus import checkpoint
from nexus.errors import InputError, UsageError
from nexus.images import write_image
from nexus.losses.kl import (
    free_bits,
    kl_standard,
    log_likelihood,
    log_normal,
    ramp,
    sample_gaussian,
    split_moments,
)
from nexus.losses.perceptual import edge_distance
from nexus.models.cv.vae.analysis import elbo, iwae_nll, rebuild, traverse
from nexus.models.cv.vae.vae import VAE, VAEConfig, psnr, rate_cost
from nexus.requests import SampleRequest
from nexus.rng import ItemNoise

MLP = {"net": {"kind": "mlp", "size": 4, "hidden": (16,), "latents": 2}}


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=rng(seed))


def system(preset: str = "tiny", **changes) -> VAE:
    torch.manual_seed(0)
    return VAEConfig.parse(VAEConfig.presets[preset] | changes).build().eval()


def small(**changes) -> VAE:
    torch.manual_seed(0)
    return VAEConfig.parse(MLP | changes).build()


def pictures(count: int, vae: VAE) -> Tensor:
    side, channels = vae.config.image_size, vae.config.image_channels
    return random(count, channels, side, side, seed=5).clamp(-1, 1)


# The evidence lower bound's pieces

def test_kl_is_the_closed_form_of_torch_and_zero_at_the_prior():
    mean, logvar = random(3, 5), random(3, 5, seed=1)
    posterior = distributions.Normal(mean, (logvar / 2).exp())
    want = distributions.kl_divergence(posterior, distributions.Normal(torch.zeros(3, 5), 1.0))
    torch.testing.assert_close(kl_standard(mean, logvar), want)
    assert not kl_standard(torch.zeros(2), torch.zeros(2)).any()


def test_kl_is_what_sampling_says():
    mean, logvar = torch.tensor([[0.7, -1.2]]), torch.tensor([[-0.5, 0.4]])
    z = sample_gaussian(mean, logvar, random(200_000, 2))
    log_ratio = log_normal(z, mean, logvar) - log_normal(z)
    error = log_ratio.std() / math.sqrt(len(z))
    assert abs(log_ratio.mean() - kl_standard(mean, logvar).sum()) < 4 * error < 0.02


def test_reparameterised_draws_have_the_asked_moments_and_a_gradient():
    mean, logvar = torch.tensor([0.3], requires_grad=True), torch.tensor([-1.0], requires_grad=True)
    z = sample_gaussian(mean, logvar, random(100_000, 1))
    assert z.mean().item() == pytest.approx(0.3, abs=0.01) and z.std().item() == pytest.approx(math.exp(-0.5), abs=0.01)
    z.square().mean().backward()                        # d E[z^2] = 2 mean, and the variance itself
    assert mean.grad.item() == pytest.approx(0.6, abs=0.02)
    assert logvar.grad.item() == pytest.approx(math.exp(-1), abs=0.02)


def test_moments_are_split_and_the_log_variance_is_held():
    mean, logvar = split_moments(torch.tensor([[1.0, 2.0, -99.0, 99.0]]))
    assert mean.tolist() == [[1.0, 2.0]] and logvar.tolist() == [[-30.0, 20.0]]


@pytest.mark.parametrize("kind", ["gaussian", "laplace", "bernoulli"])
@pytest.mark.parametrize("spread", [1.0, 0.3])
def test_likelihoods_are_summed_over_pixels(kind, spread):
    output, white = random(2, 3, 4, 4), (random(2, 3, 4, 4, seed=1) > 0).float()
    x = 2 * white - 1
    want = {"gaussian": distributions.Normal(output, spread).log_prob(x),
            "laplace": distributions.Laplace(output, spread).log_prob(x),
            "bernoulli": distributions.Bernoulli(logits=output).log_prob(white)}[kind]
    torch.testing.assert_close(log_likelihood(kind, output, x, spread), want.sum((1, 2, 3)))


def test_an_unknown_likelihood_is_refused():
    with pytest.raises(InputError, match="cauchy"):
        log_likelihood("cauchy", torch.zeros(1, 1), torch.zeros(1, 1))


def test_log_normal_is_torchs():
    z, mean, logvar = random(3, 2, 2), random(3, 2, 2, seed=1), random(3, 2, 2, seed=2)
    want = distributions.Normal(mean, (logvar / 2).exp()).log_prob(z).sum((1, 2))
    torch.testing.assert_close(log_normal(z, mean, logvar), want)
    torch.testing.assert_close(log_normal(z), distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2)))


# What the rate costs

def test_free_bits_hold_each_latents_batch_mean_above_the_floor():
    kl = torch.tensor([[0.0, 2.0, 0.4], [0.2, 4.0, 0.8]], requires_grad=True)       # means 0.1, 3.0, 0.6
    assert free_bits(kl).item() == pytest.approx(3.7)
    held = free_bits(kl, 0.5)
    assert held.item() == pytest.approx(0.5 + 3.0 + 0.6)
    held.backward()
    assert kl.grad.tolist() == [[0.0, 0.5, 0.5]] * 2


def test_ramp_is_straight_then_flat():
    assert [ramp(step, 4, 2.0) for step in (0, 1, 2, 4, 9)] == [0.0, 0.5, 1.0, 2.0, 2.0]
    assert ramp(0, 0, 3.0) == 3.0


def test_beta_warm_up_and_capacity_laws():
    kl = torch.full((2, 5), 2.0)                                                     # 10 nats
    beta = VAEConfig(beta=4.0, kl_warmup_steps=100)
    assert [rate_cost(beta, kl, step).item() for step in (0, 25, 100, 500)] == [0.0, 10.0, 40.0, 40.0]
    capacity = VAEConfig(beta=30.0, capacity=25.0, capacity_steps=50)
    assert [rate_cost(capacity, kl, step).item() for step in (0, 20, 50, 99)] == [300.0, 0.0, 450.0, 450.0]


def test_edge_distance_ignores_a_constant_and_measures_a_ramp():
    x = random(2, 3, 16, 16)
    torch.testing.assert_close(edge_distance(x, x + 0.5), torch.tensor(0.0), atol=1e-6, rtol=0)
    slope = torch.arange(16.0).expand(1, 1, 16, 16)                                  # 1, then 2, then 4 a pixel
    assert edge_distance(slope, torch.zeros_like(slope)).item() == pytest.approx((1 + 2 + 4) / 3)


@pytest.mark.parametrize("side, expected", [(1, 0.0), (2, 1.0), (4, 1.5), (8, 7 / 3), (9, 7 / 3)])
def test_edge_distance_of_small_pictures_uses_the_scales_they_have(side, expected):
    slope = torch.arange(float(side)).expand(1, 1, side, side)
    assert edge_distance(slope, torch.zeros_like(slope)).item() == pytest.approx(expected)


# The loss

def test_the_loss_is_minus_the_bound_at_beta_one():
    vae = small()
    x = pictures(3, vae)
    found = vae.loss({"image": x}, rng(), 0)
    torch.testing.assert_close(found["loss"], -elbo(vae, x, rng()).mean())
    torch.testing.assert_close(found["loss"], found["distortion"] + found["rate"])
    assert found["loss"].requires_grad and not found["psnr"].requires_grad


def test_per_value_divides_by_the_pixels_and_extra_terms_add_to_each():
    x = pictures(2, small())
    base = {"likelihood": "gaussian", "per_value": True}
    whole, each = (small(**base | {"per_value": on}).loss({"image": x}, rng(), 0)["loss"] for on in (False, True))
    torch.testing.assert_close(each * 16, whole)
    vae = small(**base)
    shown = vae.rebuild(x, rng())[0]
    for name, term in (("l1_weight", (shown - x).abs().mean()), ("l2_weight", (shown - x).square().mean()),
                       ("edge_weight", edge_distance(shown, x))):
        more = small(**base, **{name: 2.0}).loss({"image": x}, rng(), 0)["loss"]
        torch.testing.assert_close(more - each, 2 * term, atol=1e-5, rtol=1e-4)


def test_loss_is_decided_by_the_generator():
    vae = system()
    batch = {"image": pictures(2, vae)}
    first, again, other = (vae.loss(batch, rng(seed), 0)["loss"].item() for seed in (3, 3, 4))
    assert first == again != other
    assert torch.equal(vae.rebuild(batch["image"], rng(3))[0], vae.rebuild(batch["image"], rng(3))[0])
    assert torch.equal(vae.rebuild(batch["image"], None)[0], vae.rebuild(batch["image"], None)[0])


def test_psnr_of_known_errors():
    x = torch.zeros(2, 1, 4, 4)
    assert psnr(x + 0.2, x).item() == pytest.approx(20.0, abs=1e-4)
    assert psnr(x, x).item() == pytest.approx(10 * math.log10(4e10), rel=1e-4)


@pytest.mark.parametrize("preset", ["tiny", "tiny-codec"])
def test_a_tiny_batch_is_learnt(preset):
    vae = system(preset)
    phase = vae.phases()[0]
    x = torch.zeros(2, vae.config.image_channels, 16, 16) - 1
    x[0, :, :8], x[1, :, :, 8:] = 1, 1
    optimizer = torch.optim.Adam(phase.module.parameters(), lr=5e-3)
    losses = []
    for step in range(60):
        loss = phase.loss({"image": x}, rng(step), step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    drop = losses[0] - sum(losses[-5:]) / 5
    assert drop > 0.3 * abs(losses[0])
    assert psnr(rebuild(vae, x), x) > psnr(rebuild(system(preset), x), x) + 3


# What is measured

def test_importance_samples_tighten_the_bound_towards_the_likelihood():
    """Burda et al. 2016, theorem 1; two latents let a grid integrate p(x) to compare with."""
    vae = small()
    x = pictures(4, vae)
    bound = torch.stack([-elbo(vae, x, rng(seed)) for seed in range(200)]).mean(0)
    few, many = (torch.stack([iwae_nll(vae, x, rng(seed), k) for seed in range(50)]).mean(0) for k in (2, 50))
    line = torch.linspace(-6, 6, 121)
    z = torch.cartesian_prod(line, line)
    with torch.no_grad():
        outputs = vae.net.decode_raw(z)
        joint = [log_likelihood("bernoulli", outputs, one.expand_as(outputs)) + log_normal(z) for one in x]
        exact = -torch.stack(joint).logsumexp(1) - 2 * math.log(12 / 120)
    assert (bound > few).all() and (few > many - 1e-3).all()
    torch.testing.assert_close(many, exact, atol=0.02, rtol=0)


def test_one_importance_sample_is_the_bound_in_expectation():
    vae = small()
    x = pictures(2, vae)
    one = torch.stack([iwae_nll(vae, x, rng(seed), 1) for seed in range(1000)])
    bound = torch.stack([-elbo(vae, x, rng(seed)) for seed in range(1000)])
    error = (one.var(0) / 1000 + bound.var(0) / 1000).sqrt()
    assert ((one.mean(0) - bound.mean(0)).abs() < 4 * error).all()


@pytest.mark.parametrize("preset", ["tiny", "tiny-codec"])
def test_traversal_changes_one_latent_only(preset):
    vae = system(preset)
    image = pictures(1, vae)[0]
    with torch.no_grad():
        mean = vae.net.encode(image[None])[0]
        z = mean.flatten(1).repeat(3, 1)
        z[:, 2] = torch.tensor([-3.0, z[0, 2].item(), 3.0])
        want = vae.picture(vae.net.decode_raw(z.unflatten(1, mean.shape[1:]))).clamp(-1, 1)
    shown = traverse(vae, image, 2, z[:, 2].tolist())
    torch.testing.assert_close(shown, want)
    torch.testing.assert_close(shown[1:2], rebuild(vae, image[None]))
    assert not torch.allclose(shown[0], shown[2])
    for dim in (-1, mean[0].numel()):
        with pytest.raises(InputError, match="no latent"):
            traverse(vae, image, dim, [0.0])


# What is made

@pytest.mark.parametrize("preset", ["tiny", "tiny-codec"])
def test_prior_draws_are_one_a_seed_and_independent_of_the_batch(preset):
    vae = system(preset)
    media = vae.generate(SampleRequest(), seeds=[1, 2, 3])
    assert media.kind == "image" and media.data.shape == (3, vae.config.image_channels, 16, 16)
    assert media.data.abs().max() <= 1 and not torch.equal(media.data[0], media.data[1])
    alone = vae.generate(SampleRequest(strength=None), seeds=[2]).data[0]
    torch.testing.assert_close(alone, media.data[1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("preset", ["tiny", "tiny-codec"])
def test_a_picture_is_rebuilt_with_each_seeds_own_draw(preset, tmp_path):
    vae = system(preset)
    side, channels = vae.config.image_size, vae.config.image_channels
    array = np.random.default_rng(0).integers(0, 256, (side, side, channels), dtype=np.uint8)
    file = str(write_image(tmp_path / "in.png", array))
    made = vae.generate(SampleRequest(image=file), seeds=[7, 8]).data
    x = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1
    with torch.no_grad():
        mean, logvar = vae.net.encode(x)
        noise = torch.cat([ItemNoise([seed])(mean) for seed in (7, 8)])
        want = vae.picture(vae.net.decode_raw(sample_gaussian(mean, logvar, noise))).clamp(-1, 1)
    torch.testing.assert_close(made, want, atol=1e-5, rtol=1e-4)


def test_a_picture_of_another_shape_is_cut_to_its_middle_square(tmp_path):
    vae = system("tiny-codec")
    array = np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8)
    wide, square = (str(write_image(tmp_path / f"{i}.png", a)) for i, a in enumerate((array, array[:, 16:32])))
    a, b = (vae.generate(SampleRequest(image=file), seeds=[1]).data for file in (wide, square))
    assert torch.equal(a, b)


def test_what_cannot_be_read_or_steered_is_refused(tmp_path):
    vae = system()
    (tmp_path / "bad.png").write_bytes(b"not a picture")
    for wrong, says in (({"prompt": "a cat"}, "unconditional"), ({"negative_prompt": "blur"}, "unconditional"),
                        ({"mask": "m.png"}, "mask"), ({"image": str(tmp_path / "none.png")}, "no picture"),
                        ({"image": str(tmp_path / "bad.png")}, "not a picture")):
        with pytest.raises(InputError, match=says):
            vae.generate(SampleRequest(**wrong), seeds=[0])


@pytest.mark.parametrize("flag, value", [("width", 32), ("height", 16), ("steps", 3), ("guidance", 0), ("eta", 0),
                                         ("sampler", "ddim"), ("schedule", "karras"), ("strength", 0.5),
                                         ("guidance_rescale", 0.5), ("guidance_interval", (0.1, 1.0)),
                                         ("initial_noise", "n.safetensors")])
@pytest.mark.parametrize("preset", ["tiny", "tiny-codec"])
def test_what_would_be_ignored_is_refused_by_its_flag(preset, flag, value):
    with pytest.raises(UsageError, match=f"^--{flag.replace('_', '-')}: ") as caught:
        system(preset).generate(SampleRequest(**{flag: value}), seeds=[0])
    assert f"--{flag.replace('_', '-')} out" in caught.value.hint


def test_every_setting_of_a_request_is_used_or_refused():
    """A setting that is added to SampleRequest and forgotten here would be ignored in silence."""
    refused = {n for n in SampleRequest.model_fields if n != "image"}
    values = {"prompt": "x", "negative_prompt": "x", "mask": "m.png", "sampler": "euler", "schedule": "native",
              "guidance_interval": (0.0, 0.5), "initial_noise": "n"}
    for name in refused:
        data = {name: values.get(name, 1)}
        with pytest.raises((InputError, UsageError)):
            system().generate(SampleRequest.parse(data), seeds=[0])


def test_watch_sees_the_one_step_and_the_picture():
    vae, seen = system(), []
    data = vae.generate(SampleRequest(), seeds=[0], watch=lambda *call: seen.append(call)).data
    (step, steps, x0, decode), = seen
    assert (step, steps) == (0, 1) and torch.equal(decode(x0), data)


# Configurations

@pytest.mark.parametrize("name", sorted(VAEConfig.presets))
def test_every_preset_builds_and_rebuilds_on_meta(name):
    with torch.device("meta"):
        vae = VAEConfig.preset(name).build()
        c = vae.config
        x = torch.empty(2, c.image_channels, c.image_size, c.image_size)
        found = vae.net.encode(x)
        assert vae.rebuilt(x).shape == x.shape
    means = [found] if c.net.kind == "vq" else found
    assert all(m.shape == (2, *c.net.latent_shape) for m in means)
    assert VAEConfig.parse(c.to_json()) == c


@pytest.mark.parametrize("name", sorted(VAEConfig.recipes))
def test_every_recipe_belongs_to_a_preset(name):
    assert name in VAEConfig.presets


@pytest.mark.parametrize("name", ["tiny", "tiny-codec", "mlp-500"])
def test_adapting_fits_the_network_to_the_data(name):
    adapted = VAEConfig.preset(name).adapt(SimpleNamespace(size=32, channels=3))
    assert (adapted.image_size, adapted.image_channels) == (32, 3)
    with torch.device("meta"):
        assert adapted.build().rebuild(torch.empty(1, 3, 32, 32), None)[0].shape == (1, 3, 32, 32)


def test_networks_of_the_papers_have_their_sizes():
    """Burgess et al. 2018 (10 latents, 64x64) and the 500-unit network, counted by hand from their layers."""
    with torch.device("meta"):
        conv, mlp = (VAEConfig.preset(n).build() for n in ("beta-vae-dsprites", "mlp-500"))
    down = 1 * 32 * 16 + 32 + 3 * (32 * 32 * 16 + 32)
    up = 3 * (32 * 32 * 16 + 32) + 32 * 16 + 1
    dense = 512 * 256 + 256 + 256 * 20 + 20 + 10 * 256 + 256 + 256 * 512 + 512
    assert sum(p.numel() for p in conv.parameters()) == down + up + dense
    layers = ((784, 500), (500, 40), (20, 500), (500, 784))
    assert sum(p.numel() for p in mlp.parameters()) == sum(i * o + o for i, o in layers)


def test_a_side_that_cannot_be_halved_is_refused():
    with pytest.raises(InputError):
        VAEConfig.parse({"net": {"kind": "conv", "size": 30, "widths": (8, 8)}})


def codec(**critic):
    return VAEConfig.parse(VAEConfig.preset("tiny-codec").to_json() | {"critic": {"width": 4, **critic}}).build()


def test_the_critic_term_starts_at_its_step_and_has_its_share_of_the_gradient():
    torch.manual_seed(0)
    system, x = codec(start=5, lead=2, weight=0.5, feature_weight=0.0), torch.rand(2, 3, 16, 16) * 2 - 1
    batch, last = {"image": x}, system.net.decoder.conv_out.weight

    def gradient(step):
        loss = system.loss(batch, torch.Generator().manual_seed(1), step)["loss"]
        return torch.autograd.grad(loss, last)[0]
    alone, both = gradient(4), gradient(5)
    assert torch.equal(gradient(0), alone)
    torch.testing.assert_close((both - alone).norm(), 0.5 * alone.norm(), rtol=1e-3, atol=0)


def test_the_critic_learns_from_its_lead_on_and_leaves_the_codec_alone():
    torch.manual_seed(0)
    system, batch = codec(start=5, lead=2), {"image": torch.rand(2, 3, 16, 16) * 2 - 1}
    for step, learns in ((2, False), (3, True)):
        for p in system.parameters():
            p.grad = None
        system.critic_loss(batch, torch.Generator().manual_seed(1), step)["loss"].backward()
        assert (system.critic.first.weight.grad is not None) == learns
        assert all(p.grad is None for p in system.net.parameters())


def test_a_critic_needs_a_codec():
    with pytest.raises(InputError, match="critic"):
        VAEConfig.parse({"critic": {}})


def test_a_released_codec_has_no_critic(tmp_path):
    system = codec()
    checkpoint.save_model(tmp_path / "whole", "vae", system.config.to_json(), checkpoint.own_state(system))
    checkpoint.save_model(tmp_path / "released", "vae", system.config.to_json(), checkpoint.released_state(system))
    for name in ("whole", "released"):
        loaded = checkpoint.load(str(tmp_path / name), device="cpu")
        assert loaded.critic is None and len(loaded.phases()) == 1
        assert torch.equal(loaded.net.decoder.conv_out.weight, system.net.decoder.conv_out.weight)


# The codec with a codebook

def test_a_vq_codec_rebuilds_a_picture_and_draws_none(tmp_path):
    vq = system("tiny-vq")
    array = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    file = str(write_image(tmp_path / "in.png", array))
    made = vq.generate(SampleRequest(image=file), seeds=[7, 8]).data
    x = torch.from_numpy(array).permute(2, 0, 1)[None].float() / 127.5 - 1
    assert made.shape == (2, 3, 16, 16)
    torch.testing.assert_close(made, rebuild(vq, x).expand(2, -1, -1, -1))
    with pytest.raises(InputError, match="no prior"):
        vq.generate(SampleRequest(), seeds=[0])
    with pytest.raises(InputError, match="takes no prompt"):
        vq.generate(SampleRequest(image=file, prompt="a cat"), seeds=[0])


def test_the_loss_of_a_vq_codec_is_its_terms():
    vq = system("tiny-vq", commitment=0.7, critic=None, edge_weight=0.0, per_value=False)
    x = pictures(3, vq)
    vq.net.start(vq.net.encode(x), rng())
    coded = vq.net.coded(vq.net.encode(x))
    distortion = (vq.net.decode_raw(coded.z) - x).abs().sum() / 3 + math.log(2) * x[0].numel()     # laplace of scale 1
    found = vq.loss({"image": x}, rng(), 0)
    want = distortion + x[0].numel() * (coded.to_z + 0.7 * coded.to_rows)
    torch.testing.assert_close(found["loss"], want, rtol=1e-4, atol=1e-3)
    assert found["usage"] == len(coded.ids.unique()) / 16


def test_a_new_codebook_starts_from_its_first_latents_and_a_trained_one_stays():
    vq = system("tiny-vq", critic=None)
    x = pictures(6, vq)
    found = vq.loss({"image": x}, rng(), 0)
    assert found["usage"] > 0.8                                             # 12 of 16 rows or more
    kept = vq.net.codes.weight.detach().clone()
    vq.loss({"image": pictures(3, vq)}, rng(1), 0)
    assert torch.equal(vq.net.codes.weight, kept)
    fresh = system("tiny-vq", critic=None)
    with torch.no_grad():                                                   # nor is anything learnt without gradients
        before = fresh.net.codes.weight.clone()
        fresh.loss({"image": x}, rng(), 0)
    assert torch.equal(fresh.net.codes.weight, before)


def test_a_vq_codec_learns_a_few_pictures_with_its_codebook():
    vq = system("tiny-vq", critic=None).train()
    x = pictures(4, vq).round()
    optimizer = torch.optim.Adam(vq.parameters(), lr=3e-3)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = vq.loss({"image": x}, rng(), 0)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0] and len(vq.net.ids(vq.net.encode(x)).unique()) > 1


def test_what_a_vq_codec_has_not_is_refused():
    for given, says in (({"latent_noise": 0.1}, "latent_noise"), ({"decoder_only": True}, "decoder_only"),
                        ({"likelihood": "bernoulli"}, "likelihood")):
        with pytest.raises(InputError, match=says):
            VAEConfig.parse(VAEConfig.presets["tiny-vq"] | given)
