"""Sets of sounds: captions, splits, crops from the rng alone, whatever lies in the folder; and their codes."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch

from nexus.config import Config
from nexus.data import audio
from nexus.data.audio import crop, open_audio
from nexus.data.domains import open_for
from nexus.data.images import open_images
from nexus.data.latents import CodeSet
from nexus.errors import InputError, UsageError
from nexus.rng import generator
from nexus.sounds import encode_sound, write_sound

RATE = 8000


def ramp(seconds, first=0.0, rate=RATE):
    """A sound whose samples say where they are: from `first` up, 1/32,768 each."""
    return ((np.arange(round(seconds * rate)) / 2**15 + first) % 1)[None].astype(np.float32)


@pytest.fixture
def folder(tmp_path):
    for i in range(6):
        write_sound(tmp_path / f"{i}.{'flac' if i % 2 else 'wav'}", ramp(1 + i / 2, i / 8), RATE)
        (tmp_path / f"{i}.json").write_text(json.dumps({"caption": f"slow piano {i}", "style": "waltz", "tempo": 60}))
    return tmp_path


def test_captions_facts_and_whole_sounds(folder):
    data = open_audio(str(folder), rate=RATE, seconds=0.5)
    assert data.captions == [f"slow piano {i}" for i in range(6)] and len(data) == 6
    assert data.facts[:3] == (RATE, 1, 6) and data.facts.classes == () == data.facts.styles
    assert data.facts.words == ("0", "1", "2", "3", "4", "5", "piano", "slow")
    for i in range(6):
        assert np.array_equal(data.get(i), ramp(1 + i / 2, i / 8))


def test_captions_come_from_text_files_metadata_and_folders_as_those_of_pictures(tmp_path):
    for name in ("a.wav", "b.wav", "sad_songs/c.wav"):
        write_sound(tmp_path / name, ramp(0.5), RATE)
    (tmp_path / "a.txt").write_text("a cello\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.wav", "text": "a harp"}\n')
    assert open_audio(str(tmp_path)).captions == ["a cello", "a harp", "sad songs"]


def test_a_batch_is_crops_of_one_length(folder):
    data = open_audio(str(folder), rate=RATE, channels=2, seconds=0.75)
    batch = data.batch([3, 0, 3], generator(0, "x"))
    assert batch["audio"].shape == (3, 2, 6000) and batch["audio"].dtype == torch.float32
    assert batch["caption"] == ["slow piano 3", "slow piano 0", "slow piano 3"] and batch["index"].tolist() == [3, 0, 3]
    assert not torch.equal(batch["audio"][0], batch["audio"][2])
    for i, x in zip((3, 0, 3), batch["audio"][:, 0].numpy(), strict=True):
        whole = data.get(i)[0]
        start = int(np.flatnonzero(whole == x[0])[0])
        assert np.array_equal(whole[start:start + 6000], x)


def test_crops_are_a_function_of_the_rng_and_reach_both_ends(folder):
    data = open_audio(str(folder), rate=RATE, seconds=0.9)
    first, again = (data.batch([0] * 800, generator(3, "x"))["audio"] for _ in range(2))
    assert torch.equal(first, again)
    starts = (first[:, 0, 0] * 2**15).round().long()
    assert 0 <= starts.min() < 10 and starts.max() > 790 and starts.max() <= 800
    assert abs(float(starts.float().mean()) - 400) < 30
    assert torch.equal(data.batch([0])["audio"][0, 0], torch.from_numpy(data.get(0)[0, :7200]))


def test_a_short_sound_ends_in_silence(folder):
    x = open_audio(str(folder), rate=RATE, seconds=2).batch([0], generator(0, "x"))["audio"]
    assert torch.equal(x[0, 0, :8000], torch.from_numpy(ramp(1)[0])) and not x[0, 0, 8000:].any()


@pytest.mark.parametrize("length", range(1, 12))
def test_crop_stays_inside(length):
    x = np.arange(1, 11)
    for place in (0.0, 0.3, 0.999999999):
        cut = crop(x, length, place)
        assert len(cut) == length and (cut[:10] > 0).all() and (np.diff(cut[:10]) == 1).all()
    assert crop(x, 4, 0.999999999)[-1] == 10


def test_other_rates_and_channels(folder):
    data = open_audio(str(folder), rate=16_000, channels=2)
    assert data.get(2).shape == (2, 32_000)
    assert data.facts.digest != open_audio(str(folder), rate=RATE, split="pair").facts.digest or len(data) == 6


def test_splits_are_by_name_and_disjoint(tmp_path):
    for i in range(60):
        write_sound(tmp_path / f"{i}.wav", ramp(0.2), RATE)
    sets = {split: open_audio(str(tmp_path), split=split) for split in ("train", "pair", "all")}
    train, pair, everything = (set(sets[split].names) for split in ("train", "pair", "all"))
    assert train | pair == everything and not train & pair and 1 <= len(pair) < 20
    assert sets["train"].facts.words == sets["pair"].facts.words
    with pytest.raises(InputError, match="concept"):
        open_audio(str(tmp_path), split="concept")


def test_the_digest_is_of_names_captions_and_bytes(folder):
    def digest():
        return open_audio(str(folder)).facts.digest
    before = digest()
    assert before == digest()
    (folder / "0.json").write_text('{"caption": "another"}')
    changed = digest()
    write_sound(folder / "0.wav", ramp(1, 0.5), RATE, exists="overwrite")
    assert len({before, changed, digest()}) == 3


def test_a_tar(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, data in (("a.flac", encode_sound(ramp(0.5), RATE, "FLAC")), ("a.txt", b"a flute"),
                           ("b.ogg", encode_sound(ramp(0.5), RATE, "OGG"))):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    data = open_audio(str(tmp_path / "x.tar"), rate=RATE)
    assert data.names == ["x.tar:a.flac", "x.tar:b.ogg"] and data.captions[0] == "a flute"


def test_bad_files_are_told_and_left_out(folder):
    (folder / "bad.wav").write_bytes(b"RIFF nonsense")
    (folder / "empty.flac").write_bytes(b"")
    (folder / "later.m4a").write_bytes(b"\0\0\0\x20ftypM4A ")
    write_sound(folder / "click.wav", ramp(0.01), RATE)
    data = open_audio(str(folder), rate=RATE)
    reasons = dict(data.skipped)
    assert len(data) == 6 and reasons.keys() == {"bad.wav", "empty.flac", "later.m4a", "click.wav"}
    assert "shorter" in reasons["click.wav"] and all("\n" not in reason for reason in reasons.values())


def test_nothing_to_hear(tmp_path):
    with pytest.raises(InputError, match="no usable sound"):
        open_audio(str(tmp_path))
    with pytest.raises(InputError, match="does not exist.*folder of sound"):
        open_audio(str(tmp_path / "none"))
    with pytest.raises(UsageError, match="pictures"):
        open_audio("emoji")
    for wrong in ({"channels": 3}, {"seconds": -1}, {"rate": 10**6}, {"split": "x"}):
        with pytest.raises(UsageError):
            open_audio(str(tmp_path), **wrong)


def test_pictures_and_sounds_in_one_folder_do_not_meet(folder):
    from PIL import Image
    Image.new("RGB", (16, 16)).save(folder / "0.png")
    assert open_images(str(folder)).names == ["0.png"] and len(open_audio(str(folder))) == 6


def test_what_is_too_much_to_keep_is_read_again_and_must_not_have_changed(folder, monkeypatch):
    monkeypatch.setattr(audio, "KEEP_BYTES", 1)
    data = open_audio(str(folder), rate=RATE)
    assert np.array_equal(data.get(3), ramp(2.5, 3 / 8))
    write_sound(folder / "3.flac", ramp(2.5, 0.5), RATE, exists="overwrite")
    with pytest.raises(InputError, match="not what it was"):
        data.get(3)


def test_sounds_are_not_shifted(folder):
    with pytest.raises(UsageError, match="shift"):
        open_audio(str(folder)).batch([0], generator(0, "x"), shift=2)


class Hears(Config):
    """A system that learns from sound, as far as its data goes."""

    rate: int = RATE
    channels: int = 1
    seconds: float = 0.5


def test_a_config_says_what_it_learns_from(folder):
    from PIL import Image
    Image.new("RGB", (16, 16)).save(folder / "0.png")
    Hears.medium = "audio"
    try:
        data = open_for(Hears(), str(folder), split="all")
        assert data.medium == "audio" and data.facts[:2] == (RATE, 1) and data.length == 4000
    finally:
        del Hears.medium
    assert open_for(Hears(), str(folder)).medium == "image"


# Codes

HOP = 100


def encode(x):
    """ids [1, 2, F]: where in the sound a frame begins, and twice that."""
    first = (x[:, :1, ::HOP] * 2**15).round().long() // HOP
    return torch.cat([first, 2 * first], 1)


def test_codes_are_cut_where_the_sound_is(folder):
    seen = []
    data = CodeSet(open_audio(str(folder), rate=RATE, seconds=0.5), encode, watch=lambda *at: seen.append(at))
    assert seen[-1] == (6, 6) and len(data) == 6
    batch = data.batch([4, 0, 1], generator(1, "x"))
    assert batch["codes"].shape == (3, 2, 40) and batch["codes"].dtype == torch.int64
    assert batch["audio"].shape == (3, 1, 4000) and batch["caption"][1] == "slow piano 0"
    assert (batch["codes"][:, 0].diff(dim=-1).remainder(2**15 // HOP) == 1).all()
    assert torch.equal(batch["codes"][:, 1], 2 * batch["codes"][:, 0])
    place = (batch["audio"][:, 0, 0] * 2**15).round() / HOP
    assert (place - batch["codes"][:, 0, 0]).abs().max() <= 2


def test_codes_of_a_short_sound_go_on_in_silence(folder):
    codes = CodeSet(open_audio(str(folder), rate=RATE, seconds=2), encode).batch([0], generator(1, "x"))["codes"]
    assert codes.shape == (1, 2, 160) and codes[0, 0, 79] == 79 and not codes[0, :, 80:].any()
