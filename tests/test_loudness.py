"""Loudness against the values that the standards print: ITU-R BS.1770-4 and EBU Tech 3341 (2016), table 1."""

import math

import numpy as np
import pytest
from scipy.signal import lfilter

import nexus.loudness as module
from nexus.loudness import PEAK, levelled, loudness

RATES = (8_000, 16_000, 32_000, 44_100, 48_000, 96_000)


def tones(*parts, rate=48_000, hertz=1000, channels=2):
    """(dBFS, seconds) one after the other, in every channel."""
    one = np.concatenate([10 ** (level / 20) * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)
                          for level, seconds in parts])
    return np.stack([one] * channels)


@pytest.mark.parametrize("rate", RATES)
def test_full_scale_in_one_channel(rate):
    assert loudness(tones((0, 3), rate=rate, hertz=997, channels=1), rate) == pytest.approx(-3.01, abs=0.01)


@pytest.mark.parametrize("parts,lufs", [
    (((-23, 20),), -23), (((-33, 20),), -33), (((-36, 10), (-23, 60), (-36, 10)), -23),
    (((-72, 10), (-36, 10), (-23, 60), (-36, 10), (-72, 10)), -23), (((-26, 20), (-20, 20.1), (-26, 20)), -23)])
def test_the_cases_of_tech_3341(parts, lufs):
    assert loudness(tones(*parts, rate=16_000), 16_000) == pytest.approx(lufs, abs=0.1)


def test_the_filters_are_those_that_the_standard_prints():
    noise = np.random.default_rng(0).normal(size=(2, 48_000))
    expected = noise
    for b, a in (module._SHELF, module._HIGH_PASS):
        expected = lfilter(b, a, expected)
    assert np.abs(module._weighted(noise, 48_000) - expected).max() < 1e-9


def test_long_sound_is_filtered_in_pieces_without_seams(monkeypatch):
    noise = np.random.default_rng(0).normal(size=(1, 10 * 48_000)) * 0.1
    whole = module._weighted(noise, 48_000)
    monkeypatch.setattr(module, "_PIECE", 3)
    assert np.abs(module._weighted(noise, 48_000) - whole).max() < 1e-9


def test_silence_and_short_sounds():
    assert loudness(np.zeros((1, 48_000)), 48_000) == -math.inf
    assert np.array_equal(levelled(np.zeros((1, 100), np.float32), 48_000), np.zeros((1, 100)))
    assert loudness(tones((-20, 0.05)), 48_000) == pytest.approx(-20, abs=0.5)
    assert loudness(np.full((1, 1), 0.5), 48_000) > -70


@pytest.mark.parametrize("level", (-60, -40, -14, -3))
def test_a_sound_gets_the_target_and_never_clips(level):
    made = levelled(tones((level, 3), rate=16_000).astype(np.float32), 16_000, -14)
    assert loudness(made, 16_000) == pytest.approx(-14, abs=0.02) and made.dtype == np.float32
    click = np.zeros((1, 48_000), np.float32)
    click[0, ::6000] = 0.3
    assert np.abs(levelled(click, 16_000, -5)).max() == pytest.approx(PEAK)
