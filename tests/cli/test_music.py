"""Sounds from the command line: files, records, spectrograms, batches, with a codec that the same command line trained.

A codec makes sounds of no particular kind, which is enough for all that the command itself does.
"""

import hashlib
import json

import numpy as np
import pytest

from nexus import catalog
from nexus.atomic import read_records
from nexus.images import read_image, read_record
from nexus.loudness import loudness
from nexus.requests import SampleRequest
from nexus.sounds import facts, read_sound, write_sound
from nexus.sounds import read_record as sound_record
from nexus_cli import music as command
from nexus_cli import plan
from nexus_cli.jobs import worded
from nexus_cli.main import main
from nexus_cli.media import KINDS, PICTURES, SOUNDS, Style
from tests.drawn import sung

RATE = 1600


@pytest.fixture(scope="module")
def codec(warm, tmp_path_factory):
    """The run folder of a tiny codec after two steps."""
    folder = tmp_path_factory.mktemp("codec")
    data = sung(folder / "data", ["low", "high"], count=3, seconds=1, rate=RATE)
    done = warm("train", "encodec", "--preset", "tiny", "--data", data, "--run", folder / "run", "--steps", 2,
                "--batch-size", 2, "--set", "train.samples=2", "--device", "cpu")
    assert done.returncode == 0, done.stderr.decode()
    return folder / "run"


@pytest.fixture(scope="module")
def music(warm, codec):
    """music(*arguments) -> the finished `nexus music` with the tiny codec, half a second long."""
    def call(*arguments, **more):
        return warm("music", "-m", codec, "--device", "cpu", "--duration", "0.5", *arguments, **more)
    return call


def test_a_run_shows_and_sounds_its_samples(codec):
    (picture,), (sound,) = (list((codec / "samples").glob(f"*{end}")) for end in (".webp", ".flac"))
    assert read_record(picture)["step"] == 2 == sound_record(sound)["step"]
    assert read_image(picture).shape[0] > 100 and read_sound(sound).shape == (1, 2 * (400 + 400))
    assert f'<audio controls preload="none" src="samples/{sound.name}">' in (codec / "report.html").read_text()


def test_a_plan_of_training_counts_sounds(warm, codec):
    done = warm("train", "encodec", "--preset", "tiny", "--data", codec.parent / "data", "--run", codec.parent / "new",
                "--dry-run")
    assert done.returncode == 0 and json.loads(done.stdout)["sounds"] == 6


def test_a_piece_has_its_length_its_loudness_and_its_record(music, codec, tmp_path):
    done = music("-s", 5, "-o", "a.wav", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines() == ["a.wav"]
    x, record = read_sound(tmp_path / "a.wav"), sound_record(tmp_path / "a.wav")
    assert x.shape == (1, 800) and np.abs(x).max() <= 10 ** (-1 / 20) + 1e-3
    assert loudness(x, RATE) == pytest.approx(-14, abs=0.1) or np.abs(x).max() > 0.88
    assert record["seed"] == 5 and record["duration"] == 0.5 and record["loudness"] == -14
    assert record["schema"] == "nexus/1" and record["model"] == "run"


def test_the_same_command_gives_the_same_bytes_and_another_seed_others(music, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert music("-s", seed, "-o", f"{name}.flac", cwd=tmp_path).returncode == 0
    one, two, three = ((tmp_path / f"{name}.flac").read_bytes() for name in "abc")
    assert one == two != three


@pytest.mark.parametrize("arguments,form,bits", [
    (["--format", "flac"], "FLAC", "PCM_16"), (["--format", "flac", "--bits", 24], "FLAC", "PCM_24"),
    (["--bits", 32], "WAV", "FLOAT"), ([], "WAV", "PCM_16")])
def test_formats_and_automatic_names(music, tmp_path, arguments, form, bits):
    import soundfile
    done = music("-s", 3, "-N", 2, "-o", "new/", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    names = done.stdout.decode().splitlines()
    assert len(names) == 2 and all(name.endswith(f".{form.lower()}") for name in names)
    with soundfile.SoundFile(tmp_path / names[0]) as file:
        assert (file.format, file.subtype) == (form, bits)
    lines = read_records(tmp_path / "new" / "manifest.jsonl")
    assert [line["sha256"] for line in lines] == \
        [hashlib.sha256((tmp_path / name).read_bytes()).hexdigest() for name in names]


def test_standard_output(music, tmp_path):
    done = music("-s", 3, "-o", "-", "--format", "flac", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout[:4] == b"fLaC" and not list(tmp_path.iterdir())
    assert facts(done.stdout)[:3] == (RATE, 1, 800)


def test_spectrograms_beside_and_a_sheet(music, tmp_path):
    done = music("-s", 3, "-N", 2, "-o", "{seed}.wav", "--spectrogram", "{seed}.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert read_image(tmp_path / "4.png").shape[0] == 128 and read_record(tmp_path / "4.png")["seed"] == 4
    several = music("-s", 3, "-N", 2, "-o", "{seed}-x.wav", "--spectrogram", "one.png", cwd=tmp_path)
    assert several.returncode == 2 and b"{seed}" in several.stderr
    again = music("-s", 3, "-o", "new.wav", "--spectrogram", "4.png", cwd=tmp_path)
    assert again.returncode == 6 and not (tmp_path / "new.wav").exists()


def test_loudness_off_leaves_the_sound_as_it_was_made(music, tmp_path):
    for name, more in (("off", ["--loudness", "off"]), ("low", ["--loudness", "-30"])):
        assert music("-s", 1, "-o", f"{name}.wav", "--bits", 32, *more, cwd=tmp_path).returncode == 0
    off, low = (read_sound(tmp_path / f"{name}.wav") for name in ("off", "low"))
    assert "loudness" not in sound_record(tmp_path / "off.wav")
    assert loudness(low, RATE) == pytest.approx(-30, abs=0.1)
    assert np.allclose(off * (np.abs(low).max() / np.abs(off).max()), low, atol=1e-5)


def test_a_batch_makes_what_is_missing(music, tmp_path):
    (tmp_path / "b.jsonl").write_text('{"id": "x", "seed": 1}\n{"id": "y", "seed": 2, "duration": 0.25}\n')
    done = music("-b", "b.jsonl", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    folder = tmp_path / "outputs" / "b"
    assert facts(folder / "x.wav").samples == 800 and facts(folder / "y.wav").samples == 400
    (folder / "y.wav").unlink()
    kept = (folder / "x.wav").stat().st_mtime_ns
    assert music("-b", "b.jsonl", cwd=tmp_path).returncode == 0
    assert (folder / "x.wav").stat().st_mtime_ns == kept and (folder / "y.wav").exists()


def test_tempo_and_key_of_a_batch_and_of_a_file_again(warm, codec, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"prompt": "sad piano"}\n{"id": "x"}\n')
    write_sound(tmp_path / "a.wav", np.zeros((1, 100), np.float32), RATE,
                {"schema": "nexus/1", "prompt": "sad piano, in c major, 90 bpm", "duration": 1.0, "seed": 1})
    prompts = {("-b", "b.jsonl"): ["sad piano, in a minor, 70 bpm", "in a minor, 70 bpm"],
               ("--like", "a.wav", "-o", "c.wav"): ["sad piano, in a minor, 70 bpm"]}
    monkeypatch.setattr(plan, "_refused", lambda jobs, engine, ways: jobs)      # the codec reads no prompts
    for arguments, wanted in prompts.items():
        with pytest.raises(SystemExit):
            main(["music", "-m", str(codec), "--bpm", "70", "--key", "Am", "--dry-run", "--json", *arguments])
        lines = capsys.readouterr().out.splitlines()
        assert [json.loads(line)["settings"]["prompt"] for line in lines] == wanted


def test_the_settings_of_a_file_again(music, warm, codec, tmp_path):
    assert music("-s", 9, "-o", "a.wav", cwd=tmp_path).returncode == 0
    done = warm("music", "--like", "a.wav", "-m", codec, "-o", "b.wav", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert np.array_equal(read_sound(tmp_path / "a.wav"), read_sound(tmp_path / "b.wav"))


def test_info_of_a_sound(music, warm, tmp_path):
    assert music("-s", 9, "-o", "a.flac", cwd=tmp_path).returncode == 0
    shown = json.loads(warm("info", "a.flac", "--json", cwd=tmp_path).stdout)
    assert shown["seed"] == 9 and shown["sound"] == "0.50 s, 1 x 1600 samples a second, FLAC"
    write_sound(tmp_path / "b.wav", np.zeros((1, 100), np.float32), RATE)
    assert b"none stored" in warm("info", "b.wav", cwd=tmp_path).stdout
    (tmp_path / "c.wav").write_bytes(b"no")
    assert warm("info", "c.wav", cwd=tmp_path).returncode == 3


def test_a_gallery_of_sounds_plays_them(music, warm, tmp_path):
    assert music("-s", 9, "-N", 2, "-o", "g/", cwd=tmp_path).returncode == 0
    done = warm("gallery", "g", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    page = (tmp_path / "g" / "index.html").read_text()
    assert page.count("<audio") == 2 == page.count("data:image/webp")
    assert "seed 10" in page and "media-src 'self'" in page


def test_sample_makes_sounds_of_a_system_of_sounds(warm, codec, tmp_path):
    done = warm("sample", "encodec", "-m", codec, "-s", 1, "-N", 2, "-o", "{seed}.wav", "--grid", "--device", "cpu",
                cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert facts(tmp_path / "2.wav").samples == 400 and read_image(tmp_path / "1-grid.png").shape[0] > 128
    assert warm("sample", "encodec", "-m", codec, "-o", "a.png", cwd=tmp_path).returncode == 2
    assert warm("sample", "encodec", "-m", codec, "--preview", "a.png", cwd=tmp_path).returncode == 2


def test_the_pace_is_told(music, tmp_path):
    done = music("-s", 1, "-N", 3, "-o", "{seed}.wav", "--batch-size", 1, "--progress", "plain", cwd=tmp_path)
    last = done.stderr.decode().splitlines()[-1]
    assert "3/3 sounds" in last and "s made" in last and "a second" in last


# What needs no model

def test_without_a_checkpoint_the_next_step_is_told(monkeypatch, capsys):
    entry = catalog.Entry("a:B", "audio", "a system", "no-such-checkpoint", "music")
    for systems, said in (({}, "no system here makes music"), ({"songs": entry}, "nexus train songs")):
        monkeypatch.setattr(catalog, "CATALOG", systems)
        with pytest.raises(SystemExit) as end:
            main(["music", "-p", "x"])
        shown = capsys.readouterr().err
        assert end.value.code == 4 and said in shown and len(shown.splitlines()) == 2


@pytest.mark.parametrize("flags,prompt", [
    ({"prompt": "sad piano", "in_key": "a minor", "bpm": 70}, "sad piano, in a minor, 70 bpm"),
    ({"prompt": "sad piano"}, "sad piano"), ({"bpm": 120}, "120 bpm"), ({}, None)])
def test_the_helpers_become_words_of_the_prompt(flags, prompt):
    names = (*command.PASSED, "prompt", "prompt_file", "in_key", "bpm", "like", "seed", "seeds", "model")
    flags = dict.fromkeys(names) | flags
    settings = worded(command._settings(flags, None, None)[0], command._words(flags))
    assert settings == {"duration": 10.0} | ({"prompt": prompt} if prompt else {})
    SampleRequest.parse(settings)


@pytest.mark.parametrize("name", ("a.wav", "a.flac", "a.ogg", "a.mp3"))
def test_a_sound_of_any_system_is_written_in_any_format(tmp_path, name):
    """The writing step alone: what an Item is written as depends on its kind, not on who made it."""
    from nexus.api import Item
    tone = (0.2 * np.sin(np.arange(16_000) / 5)).astype(np.float32)[None]
    item = Item(1, tone, {"prompt": "x"}, "audio", 16_000)
    data = KINDS[item.kind].encode(item, tmp_path / name, item.record, Style(loudness=-20.0))
    (tmp_path / name).write_bytes(data)
    assert SOUNDS.record(tmp_path / name)["prompt"] == "x" and PICTURES.ends("a.png") and not PICTURES.ends(name)
    assert loudness(read_sound(tmp_path / name), 16_000) == pytest.approx(-20, abs=0.3)
    assert SOUNDS.look(item).shape == (128, 80, 3)


@pytest.mark.parametrize("arguments,said", [
    (("--bits", "24", "-o", "a.ogg"), "does not hold"), (("--format", "ogg", "-o", "a.wav"), "do not agree"),
    (("--spectrogram", "a.wav"), "picture's ending"),
    (("--spectrogram", "{hash}.png"), "no field"), (("--melody", "-", "--continue", "-"), "only one of"),
    (("-o", "-", "-N", "2"), "one sound")])
def test_a_mistake_has_one_line_and_a_next_step(warm, codec, tmp_path, arguments, said):
    done = warm("music", "-m", codec, *arguments, cwd=tmp_path)
    text = done.stderr.decode()
    assert done.returncode == 2 and said in text and "hint: " in text and len(text.splitlines()) == 2, text
    assert list(tmp_path.iterdir()) == []


# With the system that the command is for: skipped as long as the catalog has none with the command "music"

SYSTEM = next((name for name, entry in catalog.CATALOG.items() if entry.command == "music"), None)
needs_system = pytest.mark.skipif(SYSTEM is None, reason="no system of the catalog has the command music")


@pytest.fixture(scope="module")
def compose(warm, codec, tmp_path_factory):
    """compose(*arguments) -> the finished `nexus music` with a tiny model of that system after two steps."""
    run = tmp_path_factory.mktemp("music") / "run"
    done = warm("train", SYSTEM, "--preset", "tiny", "--data", codec.parent / "data", "--run", run, "--steps", 2,
                "--batch-size", 2, "--set", "train.samples=0", "--device", "cpu")
    assert done.returncode == 0, done.stderr.decode()
    return lambda *arguments, **more: warm("music", "-m", run, "--device", "cpu", *arguments, **more)


@needs_system
def test_a_piece_from_words_longer_than_a_window(compose, tmp_path):
    done = compose("-p", "low tones", "--bpm", 90, "--key", "Gbm", "--duration", "1.3", "-s", 4, "-o", "a.wav",
                   cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert facts(tmp_path / "a.wav").samples == round(1.3 * RATE)
    assert sound_record(tmp_path / "a.wav")["prompt"] == "low tones, in f sharp minor, 90 bpm"


@needs_system
def test_a_melody_is_followed_and_a_sound_gone_on_with(compose, codec, tmp_path):
    given = codec.parent / "data" / "low" / "0.wav"
    for name, more in (("melody", ["--melody", given, "--duration", 1]), ("longer", ["--continue", given]),
                       ("further", ["--continue", given, "--duration", "1.5", "--guidance", 2, "--top-k", 3])):
        done = compose("-p", "high", "-s", 1, "-o", f"{name}.wav", "--loudness", "off", *more, cwd=tmp_path)
        assert done.returncode == 0, done.stderr.decode()
    assert facts(tmp_path / "melody.wav").samples == RATE and facts(tmp_path / "further.wav").samples == 1.5 * RATE
    assert facts(tmp_path / "longer.wav").samples > RATE
    assert sound_record(tmp_path / "further.wav")["continued"] == "0.wav"
    done = compose("-p", "high", "--continue", "-", "--duration", "1.5", "-s", 1, "-o", "again.wav",
                   "--loudness", "off", "--guidance", 2, "--top-k", 3, cwd=tmp_path, stdin=given.read_bytes())
    assert done.returncode == 0, done.stderr.decode()
    assert np.array_equal(read_sound(tmp_path / "again.wav"), read_sound(tmp_path / "further.wav"))


@needs_system
def test_the_draw_is_set_by_its_flags(compose, tmp_path):
    for seed in (1, 2):
        assert compose("-p", "low", "--temperature", 0, "--duration", 1, "-s", seed, "-o", f"{seed}.wav",
                       cwd=tmp_path).returncode == 0
    assert np.array_equal(read_sound(tmp_path / "1.wav"), read_sound(tmp_path / "2.wav"))


@needs_system
def test_a_batch_of_beginnings(compose, codec, tmp_path):
    given = codec.parent / "data" / "low" / "0.wav"
    rows = [{"id": "a", "prompt": "low", "continue": str(given), "duration": 2}, {"id": "b", "melody": str(given)},
            {"id": "c", "melody": "none.wav"}]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = compose("-b", "b.jsonl", "--duration", "0.5", "--on-error", "continue", cwd=tmp_path)
    assert done.returncode == 7 and b"none.wav" in done.stderr
    assert [facts(tmp_path / "outputs" / "b" / f"{name}.wav").samples for name in "ab"] == [2 * RATE, RATE // 2]


@needs_system
def test_what_is_no_sound_is_told_before_the_model_is_loaded(compose, tmp_path):
    (tmp_path / "a.wav").write_bytes(b"no sound")
    for flag in ("--melody", "--continue"):
        done = compose("-p", "x", flag, "a.wav", "-o", "b.wav", cwd=tmp_path)
        assert done.returncode == 3 and len(done.stderr.decode().strip().splitlines()) <= 3
