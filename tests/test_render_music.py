"""The composer of scripts/render_music.py: what a caption says is what is played. No soundfont is needed."""

import argparse
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from nexus.data.audio import open_audio
from nexus.keys import key_name

PATH = Path(__file__).parents[1] / "scripts" / "render_music.py"
spec = importlib.util.spec_from_file_location("render_music", PATH)
music = importlib.util.module_from_spec(spec)
spec.loader.exec_module(music)

CLIPS = [music.drawn(0, i) for i in range(300)]


@pytest.mark.parametrize("index", range(0, 300, 7))
def test_the_melody_is_in_its_key_and_on_beats_in_its_chord(index):
    found = CLIPS[index]
    notes, degrees = music.composed(found, 10.0)
    beat, beats = 60 / found["tempo"], music.BEATS[found["metre"]]
    scale = {(found["tonic"] + step) % 12 for step in music.SEMITONES[found["mode"]]}
    low = music.PLAYERS[found["instrument"]].low
    melody = [note for note in notes if note.channel == 0]
    assert len(degrees) >= 4 and degrees[0] == 0 and len(degrees) * beats * beat >= 10
    for note in melody:
        chord = set(music._pitches(found, degrees[int(note.start / (beat * beats) + 1e-6)]))
        assert note.pitch % 12 in scale | chord and low - 6 <= note.pitch <= low + 22
        on_beat = abs(note.start / beat - round(note.start / beat)) < 1e-6
        assert not on_beat or note.pitch % 12 in chord
    ends = sorted((note.start, note.start + note.length) for note in melody)
    assert all(end <= start + 1e-6 for (_, end), (start, _) in zip(ends, ends[1:], strict=False))


@pytest.mark.parametrize("index", range(0, 300, 11))
def test_the_accompaniment_is_of_the_chord(index):
    found = CLIPS[index]
    notes, degrees = music.composed(found, 10.0)
    bar = 60 / found["tempo"] * music.BEATS[found["metre"]]
    for note in notes:
        if note.channel in (1, 2):
            assert note.pitch % 12 in music._pitches(found, degrees[int(note.start / bar + 1e-6)])
        assert 0 <= note.start < len(degrees) * bar and note.length > 0 and 0 < note.velocity < 128


def test_chords_are_those_of_the_books():
    c, a = ({"tonic": tonic, "mode": mode} for tonic, mode in ((0, "major"), (9, "minor")))
    assert [music._pitches(c, d) for d in (0, 3, 4, 5)] == [[0, 4, 7], [5, 9, 0], [7, 11, 2], [9, 0, 4]]
    assert [music._pitches(a, d) for d in (0, 3, 4, 5)] == [[9, 0, 4], [2, 5, 9], [4, 8, 11], [5, 9, 0]]


def test_a_caption_says_what_is_played():
    for found in CLIPS:
        text = found["caption"]
        assert all(found[name] in text for name in ("instrument", "key", "style")) and f"{found['tempo']} bpm" in text
        assert key_name(found["key"]) == found["key"] == f"{music.TONICS[found['tonic']]} {found['mode']}"
        low, high = music.STYLES[found["style"]].tempos
        assert low <= found["tempo"] <= high and found["metre"] == music.STYLES[found["style"]].metre
        assert (found["speed"] == "slow") == (found["tempo"] < 84) and found["mood"] in music.MOODS[found["mode"]]


def test_everything_is_drawn_and_a_clip_depends_on_its_number_alone():
    assert {found["instrument"] for found in CLIPS} == set(music.PLAYERS)
    assert {found["style"] for found in CLIPS} == set(music.STYLES)
    assert len({found["key"] for found in CLIPS}) == 24 and CLIPS[250] == music.drawn(0, 250) != music.drawn(1, 250)
    assert music.composed(CLIPS[3], 10.0) == music.composed(CLIPS[3], 10.0)


@pytest.mark.parametrize("name", music.STYLES)
def test_a_pattern_and_its_rhythms_fill_a_bar(name):
    style = music.STYLES[name]
    beats = music.BEATS[style.metre]
    assert all(sum(rhythm) == pytest.approx(beats) for rhythm in style.rhythms)
    assert all(0 <= at < beats and what in "bc012KSH" for at, what, _ in style.pattern)


class Whistle:
    """A band of one sine, so that rendering needs no soundfont."""

    def __init__(self, soundfont):
        self.played = []

    def play(self, found, notes, seconds, rate):
        self.played.append(found["index"])
        return (0.1 * np.sin(np.arange(round(seconds * rate)) * (0.1 + 0.01 * found["index"])))[None]


def test_rendering_goes_on_where_it_stopped(tmp_path, monkeypatch):
    bands = []
    monkeypatch.setattr(music, "Band", lambda soundfont: bands.append(Whistle(soundfont)) or bands[-1])
    options = argparse.Namespace(out=tmp_path, soundfont=Path("x.sf3"), count=4, seed=0, seconds=1.0, rate=16_000,
                                 format="flac")
    music.render(options)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "000002.json").unlink()
    (tmp_path / "000002.flac").write_bytes(b"torn")
    music.render(options)
    assert bands[1].played == [2] and whole == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    music.render(argparse.Namespace(**vars(options) | {"count": 5}))
    assert bands[2].played == [4] and "5 clips" in (tmp_path / "README.md").read_text()
    data = open_audio(str(tmp_path), seconds=0.5)
    assert data.captions == [CLIPS[i]["caption"] for i in range(5)] and not data.skipped
    stored = json.loads((tmp_path / "000001.json").read_text())
    assert stored["degrees"][0] == 0 and stored["melody"] and all(row[0] < 1.0 for row in stored["melody"])


def test_a_listener_hears_the_key():
    """The profiles of Krumhansl and Kessler (1982) find nearly every key in the notes alone."""
    profiles = {"major": (6.35, 2.23, 3.48, 2.33, 4.38, 4.09, 2.52, 5.19, 2.39, 3.66, 2.29, 2.88),
                "minor": (6.33, 2.68, 3.52, 5.38, 2.60, 3.53, 2.54, 4.75, 3.98, 2.69, 3.34, 3.17)}
    heard = []
    for found in CLIPS[::2]:
        sounding = np.zeros(12)
        for note in music.composed(found, 10.0)[0]:
            sounding[note.pitch % 12] += note.length * (note.channel != music.DRUMS)
        fit = {(tonic, mode): np.corrcoef(np.roll(profile, tonic), sounding)[0, 1]
               for tonic in range(12) for mode, profile in profiles.items()}
        heard.append(max(fit, key=fit.get) == (found["tonic"], found["mode"]))
    assert np.mean(heard) > 0.9
