"""PSNR and SSIM: identities, closed forms and loops."""

import math

import pytest
import torch

from nexus.errors import InputError
from nexus.evaluate.pictures import PSNR_MOST, psnr, ssim


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed)).float()


def test_a_picture_equals_itself():
    x = noise(2, 3, 12, 13)
    assert psnr(x, x).tolist() == [PSNR_MOST] * 2 == [100] * 2
    torch.testing.assert_close(ssim(x, x), torch.ones(2).double())


def test_psnr_of_known_errors():
    x = torch.zeros(3, 1, 4, 4)
    y = x.clone()
    y[0], y[1], y[2, 0, 0, 0] = 255, 1, 4           # mean squares 255^2, 1, 1
    torch.testing.assert_close(psnr(x, y), torch.tensor([0, 1, 1]).double() * 20 * math.log10(255))


def test_psnr_is_capped_for_each_picture_and_its_mean_stays_a_number():
    """One grey level in one of 2^24 values is 120 dB; a lossless picture among others does not hide them."""
    x = torch.zeros(1, 1, 4096, 4096)
    y = x.clone()
    y[0, 0, 0, 0] = 1
    assert psnr(x, y).tolist() == [PSNR_MOST]
    x, y = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)
    y[1] = 255
    assert float(psnr(x, y).mean()) == PSNR_MOST / 2


def test_ssim_of_flat_pictures_compares_their_lightness():
    a, b, c1 = 100.0, 180.0, (0.01 * 255) ** 2
    found = ssim(torch.full((1, 1, 11, 14), a), torch.full((1, 1, 11, 14), b))
    assert float(found) == pytest.approx((2 * a * b + c1) / (a * a + b * b + c1), rel=1e-9)


def test_ssim_equals_loops_over_every_whole_window():
    x, y = noise(1, 2, 13, 12).double(), noise(1, 2, 13, 12, seed=1).double()
    line = [math.exp(-((i - 5) ** 2) / (2 * 1.5**2)) for i in range(11)]
    weight = torch.tensor([[a * b for b in line] for a in line]).double()
    weight /= weight.sum()
    values = []
    for c in range(2):
        for i in range(3):
            for j in range(2):
                p, q = x[0, c, i:i + 11, j:j + 11], y[0, c, i:i + 11, j:j + 11]
                mp, mq = (weight * p).sum(), (weight * q).sum()
                vp, vq, vpq = ((weight * u).sum() for u in ((p - mp) ** 2, (q - mq) ** 2, (p - mp) * (q - mq)))
                c1, c2 = 2.55**2, 7.65**2
                values.append((2 * mp * mq + c1) * (2 * vpq + c2) / ((mp**2 + mq**2 + c1) * (vp + vq + c2)))
    torch.testing.assert_close(ssim(x, y)[0], torch.stack(values).mean())


def test_both_are_symmetric_and_a_picture_alone():
    x, y = noise(3, 1, 12, 12), noise(3, 1, 12, 12, seed=1)
    for measure in (psnr, ssim):
        torch.testing.assert_close(measure(x, y), measure(y, x))
        torch.testing.assert_close(measure(x, y)[1:2], measure(x[1:2], y[1:2]))


@pytest.mark.parametrize("other", [(1, 3, 12, 12), (1, 1, 12, 11)])
def test_unlike_shapes_are_refused(other):
    with pytest.raises(InputError):
        psnr(noise(1, 1, 12, 12), noise(*other))


def test_pictures_smaller_than_the_window_are_refused():
    with pytest.raises(InputError):
        ssim(noise(1, 1, 10, 20), noise(1, 1, 10, 20))
