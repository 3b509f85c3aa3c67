"""Captions read; tempos of click tracks, keys of scales and timbres of tones told apart."""

import numpy as np
import pytest
import torch

from nexus.evaluate.sound_attributes import Told, fit, logistic, read_by, told
from nexus.evaluate.sound_features import RATE, described, heard
from nexus.evaluate.sound_listen import BEATS, beat, features, listen, log_mel, pitch_classes, rotated
from nexus.keys import TONICS

SCALES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}


def clicks(tempo, *, seconds=5.0, at=0.1):
    """[1, T]: a short burst on every beat."""
    x = np.zeros(round(seconds * RATE), np.float32)
    burst = np.random.default_rng(0).standard_normal(200).astype(np.float32) * np.exp(-np.arange(200) / 40)
    for start in np.arange(at, seconds - 0.05, 60 / tempo):
        place = round(start * RATE)
        x[place:place + 200] += 0.5 * burst
    return x[None]


def tones(notes, *, each=0.3, overtones=(1.0, 0.5, 0.25), decay=0.0):
    """[1, T]: MIDI notes one after another."""
    at = np.arange(round(each * RATE)) / RATE
    shape = np.minimum(1, np.minimum(at, each - at) / 0.02) * np.exp(-decay * at)
    waves = [sum(level * np.sin(2 * np.pi * 440 * 2 ** ((note - 69) / 12) * (i + 1) * at)
                 for i, level in enumerate(overtones)) * shape for note in notes]
    return 0.2 * np.concatenate(waves)[None].astype(np.float32)


def scale(tonic, mode, draw):
    """A melody that begins and ends at home."""
    steps = SCALES[mode]
    walk = [0, 2, 4, *draw.integers(0, 7, 6), 4, 2, 0]
    return tones([60 + tonic + steps[step] for step in walk])


def looked_at(sounds):
    return features(described(sounds, RATE, listen, len(sounds)))


def test_captions_are_read():
    assert told("slow sad harp in e flat minor, lullaby, 65 bpm, 3/4") == Told("harp", 65.0, 3 + 12)
    assert told("Rock for Electric Guitar in F# major, 150bpm") == Told("electric guitar", 150.0, 6)
    assert told("a music box and a flute in c major or a minor") == Told(None, None, None)
    assert told("a piano piece, 4/4") == Told("piano", None, None) and told("") == Told()
    assert told("in d flat major").key == told("in c sharp major").key == 1


def test_logistic_regression_finds_the_line_and_is_the_same_each_time():
    x = torch.randn(400, 1, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    right = (2 * x[:, 0, 0] - x[:, 0, 1] > 0.3).long()
    found, again = (logistic(x, torch.nn.functional.one_hot(right, 2)) for _ in range(2))
    assert (found(x).argmax(1) == right).double().mean() > 0.97
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    step = (found.weight[:, 1] - found.weight[:, 0]) / found.spread
    assert float(step[0] / -step[1]) == pytest.approx(2, rel=0.15)
    moved = logistic(5 * x + 3, torch.nn.functional.one_hot(right, 2))
    assert torch.allclose(moved(5 * x + 3), found(x), atol=1e-2)


@pytest.mark.parametrize("tempo", [61, 90, 123, 171])
def test_the_beat_of_a_click_track_is_its_tempo(tempo):
    found = beat(log_mel(heard(clicks(tempo), RATE)))[-1]
    assert float(BEATS[found.argmax()]) == pytest.approx(tempo, rel=0.04)


def test_tempos_are_told_apart_from_examples():
    tempos = [60, 80, 100, 120, 140, 160]
    train = [(t, clicks(t, at=0.05 * i)) for i in range(4) for t in tempos]
    probe = fit(looked_at([x for _, x in train]), [f"{t} bpm" for t, _ in train])
    unseen = [(t, clicks(t, at=0.33)) for t in tempos]
    found = read_by(probe, looked_at([x for _, x in unseen]), [f"{t} bpm" for t, _ in unseen], 0)
    assert found["tempo within 8 %"]["value"] == 1 and set(found) == {"tempo within 8 %"}
    wrong = read_by(probe, looked_at([x for _, x in unseen]), [f"{round(t * 1.1)} bpm" for t, _ in unseen], 0)
    assert wrong["tempo within 8 %"]["value"] == 0


def test_a_scale_sounds_its_own_notes_and_moves_with_its_tonic():
    found, up = (pitch_classes(heard(tones([first + step for step in SCALES["major"]], each=0.8), RATE))
                 for first in (60, 63))
    assert set(found[1].topk(7).indices.tolist()) == set(SCALES["major"])
    whole, moved = found.sum(0), up.sum(0)
    assert torch.corrcoef(torch.stack([whole, moved.roll(-3)]))[0, 1] > 0.9
    assert torch.corrcoef(torch.stack([whole, moved]))[0, 1] < 0.5
    assert torch.equal(rotated(found[None])[0, 0], found.flatten())


def test_keys_are_heard_from_tonics_that_were_never_shown():
    draw = np.random.default_rng(0)

    def some(tonics, count):
        rows = [(f"in {TONICS[t]} {mode}", scale(t, mode, draw))
                for t in tonics for mode in SCALES for _ in range(count)]
        return [caption for caption, _ in rows], looked_at([x for _, x in rows])
    captions, x = some((0, 1, 2, 4, 5, 6, 8, 9, 10, 11), 4)
    probe = fit(x, captions)
    captions, x = some((3, 7), 5)
    found = read_by(probe, x, captions, 0)
    assert found["mode"]["value"] >= 0.9 and found["key"]["value"] >= 0.9
    other = [" ".join((*c.split()[:-1], {"major": "minor", "minor": "major"}[c.split()[-1]])) for c in captions]
    swapped = read_by(probe, x, other, 0)
    assert swapped["mode"]["value"] == pytest.approx(1 - found["mode"]["value"]) and swapped["key"]["value"] <= 0.1


def test_instruments_are_told_apart_and_unknown_ones_not_counted():
    draw = np.random.default_rng(0)
    players = {"piano": {"decay": 9.0}, "flute": {"overtones": (1.0, 0.1)},
               "organ": {"overtones": (1.0, 0.2, 0.8, 0.1, 0.6)}}

    def some(count):
        rows = [(name, tones(draw.integers(55, 75, 8), **how)) for name, how in players.items() for _ in range(count)]
        return [name for name, _ in rows], looked_at([x for _, x in rows])
    names, x = some(8)
    probe = fit(x, names)
    names, x = some(3)
    assert read_by(probe, x, names, 0)["instrument"]["value"] == 1
    assert read_by(probe, x, ["tuba"] * 9, 0) == {}
    assert fit(x, names) == (("flute", "organ", "piano"), None, None, None)         # 9 clips are too few
