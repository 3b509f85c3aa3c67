"""Distances of sounds: mel filters, spectra of known sounds, scale-invariant distortion."""

import math

import pytest
import torch

from nexus.losses.spectral import mel_distance, mel_filters, mel_spectrogram, si_sdr, stft


def tone(hertz, rate=8000, samples=4000, size=1.0):
    return size * torch.sin(2 * math.pi * hertz / rate * torch.arange(samples))


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_filters_are_triangles_that_share_every_bin_between_two():
    filters = mel_filters(16_000, 2048, 32)
    assert filters.shape == (32, 1025) and (filters >= 0).all() and filters.max() <= 1
    inside = filters.sum(0)[filters.argmax(1).min() + 1:filters.argmax(1).max()]
    torch.testing.assert_close(inside, torch.ones_like(inside))         # neighbours' slopes add to one
    assert (filters.argmax(1).diff() > 0).all()


def test_filters_first_made_while_sampling_serve_training():
    with torch.inference_mode():
        mel_filters(7000, 256, 9)                                       # a kind that no other test asks for
    x = noise(1, 1, 512).requires_grad_()
    mel_distance(x, noise(1, 1, 512, seed=1), 7000, exponents=(8,), bands=9).backward()
    assert x.grad.abs().sum() > 0


def test_filters_lie_where_the_mel_scale_says():
    """HTK: 1000 Hz are 1000 mel; the peaks are as far apart in mel."""
    filters = mel_filters(16_000, 16_384, 40)
    peaks = filters.argmax(1) * 16_000 / 16_384
    mels = 2595 * torch.log10(1 + peaks / 700)
    assert mels.diff().std() < 1.5 and 2595 * math.log10(1 + 1000 / 700) == pytest.approx(1000, abs=0.1)


@pytest.mark.parametrize("hertz", [300, 1000, 2500])
def test_a_tone_is_loudest_in_its_band(hertz):
    spectrum = mel_spectrogram(tone(hertz)[None], 8000, 1024, 32).mean(2)[0]
    assert mel_filters(8000, 1024, 32)[spectrum.argmax(), round(hertz * 1024 / 8000)] > 0.4


def test_the_window_has_unit_energy():
    spectrum = stft(noise(4, 60_000), 512).abs().square()
    assert spectrum.mean() == pytest.approx(1.0, abs=0.02)              # white noise of variance 1


def test_the_distance_is_zero_of_equals_and_grows_with_noise():
    x = tone(440)[None, None]
    exponents = (5, 8, 10)
    at = [mel_distance(x + level * noise(1, 1, 4000), x, 8000, exponents, 32).item() for level in (0, 0.01, 0.1, 1)]
    assert at[0] < 1e-4 and at == sorted(at)
    assert mel_distance(-x, x, 8000, exponents, 32) < 1e-4              # the ear does not hear the sign


def test_the_distance_has_a_gradient_at_equals():
    x = tone(440)[None, None]
    made = x.clone().requires_grad_()
    mel_distance(made, x, 8000, (6,), 16).backward()
    assert made.grad.isfinite().all()


def test_the_distance_takes_the_mean_over_sounds_channels_and_windows():
    made, x = noise(3, 2, 4000), noise(3, 2, 4000, seed=1)
    each = [mel_distance(made[i:i + 1, j:j + 1], x[i:i + 1, j:j + 1], 8000, (k,), 16)
            for i in range(3) for j in range(2) for k in (6, 9)]
    torch.testing.assert_close(mel_distance(made, x, 8000, (6, 9), 16), torch.stack(each).mean())


def test_mixed_precision_changes_nothing():
    made, x = noise(1, 1, 4000), noise(1, 1, 4000, seed=1)
    exact = mel_distance(made, x, 8000, (8,), 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(mel_distance(made, x, 8000, (8,), 16), exact)


@pytest.mark.parametrize("decibels", [-10.0, 0.0, 5.0, 30.0])
def test_distortion_of_a_known_size(decibels):
    x = noise(4, 8000)
    x = x - x.mean(1, keepdim=True)
    other = noise(4, 8000, seed=1)
    other = other - other.mean(1, keepdim=True)
    other = other - (other * x).sum(1, keepdim=True) / x.square().sum(1, keepdim=True) * x
    other = other * (x.norm(dim=1) / other.norm(dim=1))[:, None] * 10 ** (-decibels / 20)
    found = si_sdr(3.0 * (x + other), x)
    torch.testing.assert_close(found, torch.full((4,), decibels), atol=1e-2, rtol=0)


def test_silence_has_a_finite_distortion():
    assert si_sdr(torch.zeros(2, 100), noise(2, 100)).isfinite().all()
    assert si_sdr(noise(2, 100), torch.zeros(2, 100)).isfinite().all()
