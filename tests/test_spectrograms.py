"""A picture of a sound: a rising tone is a rising line, silence is dark, and any length and rate has a picture."""

import numpy as np
import pytest
import torch

from nexus.spectrograms import BANDS, WIDEST, spectrogram


def test_a_rising_tone_is_a_rising_line():
    t = np.arange(48_000) / 16_000
    x = 0.5 * np.sin(2 * np.pi * (200 + 800 * t) * t).astype(np.float32)
    picture = spectrogram(x[None], 16_000).astype(int).sum(2)
    rows = picture.argmax(0)[5:-5]
    assert rows[0] - rows[-1] > BANDS / 3 and (np.diff(rows) <= 1).all()


def test_notes_are_where_they_sound():
    x = np.zeros((1, 32_000), np.float32)
    x[0, 16_000:] = np.sin(2 * np.pi * 440 * np.arange(16_000) / 16_000)
    picture = spectrogram(x, 16_000).astype(int).sum((0, 2))
    half = len(picture) // 2
    assert picture[half + 4:].min() > 3 * picture[:half - 4].max()


@pytest.mark.parametrize("rate,samples", [(1600, 1), (1600, 400), (16_000, 7), (44_100, 44_100), (48_000, 48_000 * 40)])
def test_any_length_has_a_picture(rate, samples):
    made = spectrogram(torch.rand(2, samples) - 0.5, rate)
    assert made.dtype == np.uint8 and made.shape[0] == BANDS and 1 <= made.shape[1] <= WIDEST and made.shape[2] == 3
    assert spectrogram(torch.rand(2, samples), rate, 50).shape[1] <= 50


def test_silence_is_dark():
    assert spectrogram(np.zeros((1, 16_000), np.float32), 16_000).max() < 60
