"""Intervals: they hold the truth as often as they say, and depend on the seed alone."""

import pytest
import torch

from nexus.errors import InputError
from nexus.evaluate.bootstrap import mean_interval, normal_interval


def test_the_interval_holds_the_true_mean_about_as_often_as_it_says():
    trials = 200
    values = torch.randn(trials, 40, generator=torch.Generator().manual_seed(0)) + 3
    found = [mean_interval(row, seed) for seed, row in enumerate(values)]
    assert 0.89 < sum(f["low"] <= 3 <= f["high"] for f in found) / trials < 0.985


def test_its_width_is_that_of_the_normal_interval_for_many_values():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(1)).double()
    found, error = mean_interval(values), float(values.std(correction=0)) / 1000**0.5
    want = normal_interval(float(values.mean()), error)
    assert found["value"] == want["value"]
    assert found["high"] - found["low"] == pytest.approx(want["high"] - want["low"], rel=0.08)


def test_equal_values_leave_no_doubt_and_a_seed_decides_the_draws():
    assert mean_interval(torch.full((5,), 0.25)) == {"value": 0.25, "low": 0.25, "high": 0.25}
    values = torch.arange(9.0).exp()
    assert mean_interval(values, 1) == mean_interval(values, 1) != mean_interval(values, 2)


def test_no_values_are_refused():
    with pytest.raises(InputError):
        mean_interval(torch.zeros(0))
