"""Latents that follow factors, and latents that do not: the numbers have their known values."""

import math

import pytest
import torch

from nexus.evaluate.disentangle import beta_vae_score, gap, information, usable
from nexus.evaluate.run import evaluate

N = 4000


def drawn(values: int, seed: int) -> torch.Tensor:
    return torch.randint(values, (N,), generator=torch.Generator().manual_seed(seed))


def noise(latents: int, seed: int = 9) -> torch.Tensor:
    return torch.randn(N, latents, generator=torch.Generator().manual_seed(seed))


def test_a_latent_that_is_the_factor_knows_all_of_it_and_noise_nothing():
    ids = drawn(5, 0)
    known, entropy = information(torch.cat([ids[:, None].float(), noise(2)], 1), ids)
    assert entropy.item() == pytest.approx(math.log(5), abs=0.01)
    assert known[0].item() == pytest.approx(entropy.item(), rel=1e-9)
    assert (known[1:] < 0.02).all() and (known >= 0).all()         # 4 x 19 free cells bias it by 76 / 2N


def test_information_is_that_of_the_counts():
    """A latent of two values and a factor of two that agree three times in four: log 2 - H(1/4)."""
    ids = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    codes = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0, 0.0])[:, None]
    want = math.log(2) + 0.75 * math.log(0.75) + 0.25 * math.log(0.25)
    assert information(codes, ids)[0][0].item() == pytest.approx(want, rel=1e-9)


def test_the_gap_is_one_for_one_latent_and_none_for_two_alike():
    ids = drawn(4, 1)
    one = torch.cat([ids[:, None].float(), noise(3)], 1)
    assert gap(one, ids) > 0.98 and gap(ids[:, None].float(), ids) == pytest.approx(1)
    assert gap(torch.cat([one, ids[:, None].float()], 1), ids) == pytest.approx(0, abs=1e-9)
    assert abs(gap(one, drawn(4, 2))) < 0.02


def test_the_score_is_right_for_separate_latents_and_chance_for_noise():
    factors = [drawn(6, 3), drawn(6, 4)]
    apart = torch.stack(factors, 1) + 0.05 * noise(2)
    assert beta_vae_score(apart, factors, 0) > 0.99
    assert abs(beta_vae_score(noise(2), factors, 0) - 0.5) < 0.1
    assert beta_vae_score(apart, factors, 0) == beta_vae_score(apart, factors, 0)


def test_factors_of_one_value_or_of_rare_ones_say_nothing():
    many, single = torch.arange(N), torch.zeros(N, dtype=torch.int64)
    assert list(usable({"many": many, "single": single, "few": drawn(3, 5)})) == ["few"]


def test_a_flat_vae_is_told_how_its_latents_follow_the_classes():
    report = evaluate("vae", model="beta-vae", count=200, device="cpu")
    value = report["numbers"]["mutual information gap, class"]
    assert 0 < value < 1 and report["protocol"]["factors"] == "class"
    assert "mutual information gap, class" not in evaluate("vae", count=16, device="cpu")["numbers"]
