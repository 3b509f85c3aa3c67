"""Notes read from sounds whose notes are known; skipped where Basic Pitch's network is not installed."""

import numpy as np
import pytest

from nexus.evaluate import sound_notes

RATE = 16_000


def tones(keys, seconds=3.0):
    """float32 [1, T] of keys (MIDI) with three harmonics, one after the other."""
    at = np.arange(round(seconds / len(keys) * RATE)) / RATE
    pitches = [440 * 2 ** ((key - 69) / 12) for key in keys]
    parts = [sum(0.2 / n * np.sin(2 * np.pi * n * pitch * at) for n in (1, 2, 3)) for pitch in pitches]
    return np.concatenate(parts)[None].astype(np.float32)


def test_windows_cover_every_frame_once():
    for length in (1, 256, 142 * 256, 142 * 256 + 1, 160_000):
        x = np.arange(1, length + 1, dtype=np.float32)
        windows, count = sound_notes._windows(x)
        edge, inner = sound_notes.EDGE * 256, 142 * 256
        joined = np.concatenate([w[edge:edge + inner, 0] for w in windows])
        assert count == -(-length // 256) and np.array_equal(joined[:length], x[:len(joined)])


def test_agreement_is_an_f_score():
    a, b = np.zeros((4, 88)), np.zeros((6, 88))
    a[:, 48], b[:, 48], b[:2, 50] = 1, 1, 1
    assert sound_notes.agreement(a, b) == pytest.approx(2 * 4 / (4 + 6))
    assert sound_notes.agreement(a, np.zeros((4, 88))) == 0 == sound_notes.agreement(np.zeros((4, 88)), b * 0)


@pytest.fixture(scope="module")
def read():
    found = sound_notes.reader()
    if found is None:
        pytest.skip(sound_notes.HINT)
    return found


def test_played_notes_are_read(read):
    """Six seconds are several windows; the key that sounds is the likeliest in nearly every frame, at its time."""
    keys = [60, 64, 67, 72]
    notes = read(tones(keys, 6.0), RATE)
    wanted = np.repeat(keys, -(-len(notes) // 4))[:len(notes)] - 21
    assert abs(len(notes) - 6 * sound_notes.RATE / sound_notes.HOP) <= 1
    assert (notes.argmax(1) == wanted).mean() > 0.9


def test_the_same_melody_agrees_and_another_does_not(read):
    one, same, other = (read(tones(keys), RATE) for keys in ([60, 64, 67], [60, 64, 67], [61, 66, 70]))
    assert sound_notes.agreement(one, same) == 1
    assert sound_notes.agreement(one, other) < 0.3
