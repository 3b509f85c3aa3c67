"""Loudness, clipping, silence and clicks of sounds that are known; where windows of a piece meet."""

import numpy as np
import pytest

from nexus.evaluate.sound_melody import cosine
from nexus.evaluate.sound_quality import clipping, longest_silence, numbers, seam_ranks, seams
from nexus.models.audio.encodec import EncodecSystemConfig
from nexus.models.audio.musicgen import MusicGenConfig

RATE = 16_000


def sine(seconds=4.0, hertz=220.0, level=0.5):
    """[1, T]."""
    return level * np.sin(2 * np.pi * hertz * np.arange(round(seconds * RATE)) / RATE)[None].astype(np.float32)


def test_clipping_is_the_share_of_samples_at_full_scale():
    x = np.zeros((2, 10), np.float32)
    x[0, :3], x[1, 7] = 1.0, -1.0
    assert clipping(x) == 4 / 20 and clipping(sine()) == 0


def test_the_longest_silence_is_found_wherever_it_lies():
    x = sine()
    for start, stop in ((0, 0.5), (1, 2.5), (3.8, 4)):
        x[:, round(start * RATE):round(stop * RATE)] = 0
    assert longest_silence(x, RATE) == pytest.approx(1.5)
    assert longest_silence(sine(), RATE) == 0 and longest_silence(0 * sine(), RATE) == pytest.approx(4)
    both = np.concatenate([x, sine()])
    assert longest_silence(both, RATE) == 0


def test_a_click_at_a_seam_is_sharper_than_the_rest_and_no_click_is_not():
    rng = np.random.default_rng(0)
    x = sine() + 0.05 * rng.standard_normal((1, 4 * RATE)).astype(np.float32)
    places = [RATE, 2 * RATE, 3 * RATE]
    assert all(0.01 < rank < 0.99 for rank in seam_ranks(x, RATE, places))
    many = seam_ranks(x, RATE, list(range(400, 4 * RATE, 2500)))
    assert 0.4 < np.mean(many) < 0.85       # the sharper of two blocks, which is above the middle a little
    torn = x.copy()
    torn[:, 2 * RATE:] *= -1
    torn[:, 2 * RATE:] += 0.4
    ranks = seam_ranks(torn, RATE, places)
    assert ranks[1] == 1.0 and ranks[0] < 0.99 and ranks[2] < 0.99


def test_numbers_of_sounds_without_and_with_windows():
    found = numbers([sine(), 0 * sine()], RATE, [], 0)
    assert found["loudness (LUFS)"]["low"] == -70 and found["longest silence of all (s)"] == pytest.approx(4)
    assert not any(name.startswith("seam") for name in found)
    found = numbers([sine()] * 2, RATE, [RATE], 0)
    assert found["loudness (LUFS)"]["value"] == pytest.approx(-9.6, abs=0.5)     # -3.01 of a full sine at 997 Hz
    assert 0 <= found["seam sharpness, rank"]["value"] <= 1


def test_windows_meet_where_the_tokens_of_one_end():
    config = MusicGenConfig.preset("music")
    assert seams(config, 10.0) == [] and seams(EncodecSystemConfig.preset("tiny"), 10.0) == []
    assert [s / config.rate for s in seams(config, 25.0)] == pytest.approx([10.0, 16.0, 22.0])


def test_the_cosine_of_melodies():
    import torch
    a = torch.eye(12)
    assert cosine(a, a) == pytest.approx(1) and cosine(a, a.roll(1, 1)) == 0 and cosine(a, a[:5]) == pytest.approx(1)
    assert cosine(a, torch.ones(12, 12)) == pytest.approx(12 ** -0.5)
