"""`evaluate` on tiny systems of sound that were trained here, on folders of sounds, and the real command line."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nexus.data.audio import open_audio
from nexus.errors import InputError, UsageError
from nexus.evaluate import sound, sound_melody
from nexus.evaluate.run import evaluate
from nexus.evaluate.sound_features import Clips
from nexus.models.audio.musicgen import MusicGenConfig
from nexus.requests import SampleRequest
from nexus.sounds import write_sound
from nexus.train.start import train
from tests.drawn import sung
from tests.evaluate.test_run import whole

SAID = ("slow piano in c major, 60 bpm", "fast harp in a minor, 120 bpm")
REAL = {f"real kad, {name}" for name in ("two halves", "with noise", "other music")}


@pytest.fixture(autouse=True)
def few(monkeypatch):
    """Made to few melodies, and few clips sent through a codec."""
    monkeypatch.setattr(sound_melody, "MOST", 2)
    monkeypatch.setattr(sound, "MOST_REBUILT", 6)


@pytest.fixture(scope="module")
def songs(tmp_path_factory):
    """28 chords of a second, with captions; 1,600 samples a second, as the tiny codec hears them."""
    folder = sung(tmp_path_factory.mktemp("songs"), SAID, count=14, seconds=1, rate=1600)
    rows = [{"file_name": str(path.relative_to(folder)), "text": path.parent.name}
            for path in sorted(folder.rglob("*.wav"))]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture(scope="module")
def trained(songs, tmp_path_factory):
    """trained(system) -> a run folder of two steps."""
    runs = {}

    def make(system: str) -> str:
        if system not in runs:
            runs[system] = tmp_path_factory.mktemp("runs") / system
            train(system, data=str(songs), run=runs[system], preset="tiny", device="cpu",
                  flags={"steps": 2, "batch_size": 4, "samples": 0})
        return str(runs[system])
    return make


def test_a_codec_is_judged_by_what_it_rebuilds(trained):
    seen = []
    report = evaluate(trained("encodec"), split="all", count=8, duration=0.5, device="cpu",
                      progress=lambda done, total: seen.append((done, total)))
    assert whole(report) and (8, 8) in seen
    facts, numbers = report["protocol"], report["numbers"]
    assert {"si-sdr (dB)", "log-mel distance (dB)", "codebook 2, entries used", "codebook 2, perplexity",
            "kad, rebuilt half from the other real half"} | REAL <= set(numbers)
    assert numbers["bitrate (kbit/s)"] == pytest.approx(2 * 4 * 1600 / 8 / 1000, rel=0.02)
    assert (facts["system"], facts["clips"], facts["seconds"], facts["codebooks"]) == ("encodec", 8, 0.5, "2 of 16")


def test_a_model_of_music_is_judged_by_what_it_makes_the_same_twice(trained):
    reports = [evaluate(trained("musicgen"), split="all", count=4, duration=0.5, device="cpu") for _ in range(2)]
    assert whole(reports[0]) and reports[0] == reports[1]
    facts, numbers = reports[0]["protocol"], reports[0]["numbers"]
    assert {"kad", "loudness (LUFS)", "clipped samples", "longest silence of all (s)", "instrument",
            "real instrument", "rebuilt instrument", "mode", "real mode", "tempo within 8 %", "seam sharpness, rank",
            "chroma cosine to the melody", "chroma cosine to another melody"} | REAL <= set(numbers)
    assert (facts["made"], facts["real"], facts["seconds"], facts["seams"]) == (4, 28, 0.5, 2)
    assert facts["temperature"] == 1.0 and facts["melodies"] == 2 and facts["extractor"] == "mel"


def test_real_clips_are_as_good_as_real(trained, songs):
    held = open_audio(str(songs), rate=1600, seconds=0.25, split="all")

    def generate(prompts, seeds):
        assert set(prompts) == set(SAID) and len(prompts) == len(set(seeds)) == 28
        taken = {name: iter([i for i, c in enumerate(held.captions) if c == name]) for name in SAID}
        yield from (held.crops([next(taken[prompt])], [0.0])[0].numpy() for prompt in prompts)
    numbers = evaluate(trained("musicgen"), split="all", generate=generate, device="cpu")["numbers"]
    assert numbers["precision"]["value"] == numbers["coverage"]["value"] == 1
    assert numbers["kad"]["value"] < numbers["real kad, with noise"]["value"]
    assert numbers["instrument, share of real"] == pytest.approx(1)


def test_settings_that_would_be_ignored_are_refused(trained, songs):
    for given in ({"steps": 3}, {"sampler": "ddim"}, {"sheet": "a.png"}, {"likelihood": True}):
        with pytest.raises(UsageError, match=f"^--{min(given)}"):
            evaluate(trained("musicgen"), split="all", device="cpu", **given)
    with pytest.raises(UsageError, match="^--guidance"):
        evaluate(trained("encodec"), split="all", device="cpu", guidance=2.0)
    with pytest.raises(UsageError, match="lite0"):
        evaluate(trained("encodec"), split="all", device="cpu", extractor="lite0")
    with pytest.raises(UsageError, match="2 sounds are too few"):
        evaluate(trained("musicgen"), split="all", device="cpu", count=2)


def test_a_folder_of_sounds_is_read_against_the_prompts_inside(songs, tmp_path):
    held = open_audio(str(songs), rate=1600, seconds=1.0, split="all")
    for i in range(0, 28, 2):
        write_sound(tmp_path / f"{i:02}.flac", held.get(i), 1600, {"prompt": held.captions[i]})
    report = evaluate(str(tmp_path), data=str(songs), split="all")
    assert whole(report) and report["protocol"]["made"] == 14 and report["protocol"]["seconds"] == 1.0
    assert report["numbers"]["precision"]["value"] == 1 and "instrument" in report["numbers"]
    write_sound(tmp_path / "x.wav", held.get(0), 1600)
    assert "instrument" not in evaluate(str(tmp_path), data=str(songs), split="all")["numbers"]
    with pytest.raises(UsageError, match="compared with"):
        evaluate(str(tmp_path))
    with pytest.raises(UsageError, match="^--guidance"):
        evaluate(str(tmp_path), data=str(songs), guidance=1.0)
    for path in sorted(tmp_path.glob("*.flac"))[1:]:
        path.unlink()
    with pytest.raises(InputError, match="2 sounds"):
        evaluate(str(tmp_path), data=str(songs))


def test_a_system_that_plays_what_it_is_given_follows_the_melody(songs):
    class Echo:
        takes, config = frozenset({"melody"}), MusicGenConfig.preset("tiny")

        def generate(self, request, *, seeds):
            import torch

            from nexus.media import Media
            from nexus.sounds import read_sound
            return Media("audio", torch.from_numpy(read_sound(request.melody))[None], rate=1600)
    held = open_audio(str(songs), rate=1600, seconds=0.25, split="all")
    numbers, facts = sound_melody.measured(Echo(), SampleRequest(), Clips(held, [0, 1, 2]), [None] * 3, [0, 1, 2],
                              lambda done, total: None)
    assert numbers["chroma cosine to the melody"]["value"] == pytest.approx(1) and facts["melodies"] == 3
    assert numbers["chroma cosine to another melody"]["value"] < 0.9
    assert sound_melody.measured(Echo(), SampleRequest(), Clips(held, [0]), [None], [0], print) == ({}, {})


def test_the_command_line(trained, songs, tmp_path):
    """In a process of its own, as a user calls it: a report as JSON and in a file, and what is wrong."""
    def nexus(*arguments):
        surroundings = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "nexus_cli", "eval", *map(str, arguments)]
        return subprocess.run(command, env=surroundings, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    done = nexus(trained("musicgen"), "--split", "all", "--num", 3, "--duration", "0.25s", "--device", "cpu", "--json",
                 "-o", "report.json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert whole(report) and report["numbers"] == json.loads((tmp_path / "report.json").read_text())["numbers"]
    done = nexus(trained("encodec"), "--extractor", "vggish")
    assert done.returncode == 2 and "unknown embedding of sound 'vggish'" in done.stderr
    assert "mel or whisper" in done.stderr and "Traceback" not in done.stderr
