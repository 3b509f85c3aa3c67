"""The Parzen window of samples from a law that is known."""

import math

import pytest
import torch

from nexus.evaluate.parzen import WIDTHS, nats

STD = 0.2


def drawn(n, seed, dims=2):
    return 0.5 + STD * torch.randn(n, dims, generator=torch.Generator().manual_seed(seed))


def test_many_windows_give_the_density_of_the_law_blurred_by_their_width():
    real = drawn(500, 1)
    found, width = nats(real, drawn(20_000, 2), drawn(500, 3))
    blurred = torch.distributions.Normal(0.5, math.hypot(STD, width)).log_prob(real.double()).sum(1)
    assert found.shape == (500,) and (found - blurred).abs().mean() < 0.05
    assert width == float(WIDTHS[0])                            # with so many windows the narrowest say most


def test_the_width_is_the_best_for_pictures_that_are_not_judged():
    far = drawn(8, 4) + 3
    assert nats(far, drawn(50, 5), far)[1] == float(WIDTHS[-1])
    assert nats(far, drawn(50, 5), drawn(100, 6))[1] < float(WIDTHS[-1])


def test_one_window_is_a_gaussian_of_any_shape():
    made, real = torch.zeros(1, 2, 2, 3), torch.full((1, 2, 2, 3), 0.25)
    found, width = nats(real, made, real)
    want = -12 * (0.25**2 / (2 * width**2) + math.log(width * math.sqrt(2 * math.pi)))
    assert found.item() == pytest.approx(want, abs=1e-9)
