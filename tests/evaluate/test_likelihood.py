"""Reconstructions and likelihood bounds of a VAE: networks whose bounds are known, and the same in any batch."""

import math

import pytest
import torch

from nexus.errors import ModelError
from nexus.evaluate.likelihood import analysis, reconstruction
from nexus.evaluate.pictures import PSNR_MOST
from nexus.models.cv.vae.analysis import elbo, rebuild
from nexus.models.cv.vae.vae import VAE, VAEConfig
from nexus.models.diffusion.base_diffusion import DDPMConfig
from nexus.rng import generator


def system(preset: str = "tiny", **changes) -> VAE:
    torch.manual_seed(0)
    return VAEConfig.parse(VAEConfig.presets[preset] | {"iwae_k": 4} | changes).build().eval()


def silent(**changes) -> VAE:
    """A network of zeros: its posterior is the prior, its output is zero."""
    vae = system(net={"kind": "mlp", "size": 12, "hidden": (8,), "latents": 2}, **changes)
    with torch.no_grad():
        for weight in vae.parameters():
            weight.zero_()
    return vae


def pictures(count: int, side: int, channels: int = 1) -> torch.Tensor:
    return torch.rand(count, channels, side, side, generator=torch.Generator().manual_seed(3)) * 2 - 1


def test_a_silent_network_needs_one_bit_for_every_black_or_white_pixel():
    found = reconstruction(silent(), [{"image": pictures(3, 12).sign()}], seed=0)
    for name in ("elbo", "iwae"):
        torch.testing.assert_close(found[name], torch.ones(3).double(), rtol=1e-5, atol=1e-5)


def test_a_silent_network_with_a_gaussian_pays_for_its_spread_alone_on_grey():
    spread = 0.3
    found = reconstruction(silent(likelihood="gaussian", spread=spread), [{"image": torch.zeros(2, 1, 12, 12)}], seed=0)
    want = torch.full((2,), math.log2(spread * math.sqrt(2 * math.pi))).double()
    torch.testing.assert_close(found["elbo"], want, rtol=1e-5, atol=1e-5)
    assert found["psnr"].tolist() == [PSNR_MOST] * 2 and found["ssim"].tolist() == [1, 1]


def test_values_are_those_of_the_pictures_whatever_the_batches():
    vae, x, seen = system(), pictures(5, 16), []
    whole = reconstruction(vae, [{"image": x}], seed=7)
    parts = reconstruction(vae, [{"image": x[:2]}, {"image": x[2:]}], seed=7, watch=seen.append)
    assert seen == [2, 5] and set(whole) == {"psnr", "ssim", "elbo", "iwae"}
    for name in whole:
        torch.testing.assert_close(whole[name], parts[name], rtol=1e-4, atol=1e-4)
    bits = -elbo(vae, x[3:4], generator(7, "elbo", 3)) / (math.log(2) * 256)
    torch.testing.assert_close(whole["elbo"][3:4], bits.double(), rtol=1e-4, atol=1e-4)
    error = ((rebuild(vae, x[:1]) - x[:1]) * 127.5).square().mean()
    assert float(whole["psnr"][0]) == pytest.approx(float(10 * torch.log10(255**2 / error)), abs=0.01)


def test_more_importance_samples_tighten_the_bound():
    x = pictures(8, 16)
    loose, tight = (reconstruction(system(iwae_k=k), [{"image": x}], seed=0)["iwae"].mean() for k in (1, 64))
    assert tight < loose


def test_a_codec_has_no_importance_weighted_bound():
    codec = system("tiny-codec")
    x = pictures(2, codec.config.image_size, codec.config.image_channels)
    assert set(reconstruction(codec, [{"image": x}], seed=0)) == {"psnr", "ssim", "elbo"}


def test_a_diffusion_model_cannot_rebuild_pictures():
    ddpm = DDPMConfig.preset("tiny").build()
    assert analysis(ddpm) is None
    with pytest.raises(ModelError):
        reconstruction(ddpm, [], seed=0)
