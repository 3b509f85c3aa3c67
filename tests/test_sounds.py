"""Sounds in and out: exact samples, exact records for any prompt, refusal of whatever is not a sound."""

import io
import struct
import time

import numpy as np
import pytest
import soundfile
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus import sounds
from nexus.errors import InputError, OutputError, UsageError

RATE = 16_000
PROMPTS = ["", "a cat", "漢字 😀", "\0", "\ud800", "x\udcffy", "x" * 10_000, "é" * 5000, "\r\n", '{"a": "}"}',
           "\x1b[31m"]
HELD = [(form, bits) for form, several in sounds.BITS.items() for bits in several]


def tone(hertz, seconds=0.5, rate=RATE, loud=0.5):
    return (loud * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)[None]


@pytest.mark.parametrize("ending", sounds.FORMATS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_record_comes_back_exactly(tmp_path, ending, prompt):
    record = {"prompt": prompt, "seed": 2**63 - 1, "guidance": 0.1, "none": None}
    path = sounds.write_sound(tmp_path / f"a{ending}", tone(440), RATE, record)
    assert sounds.read_record(path) == {"schema": sounds.SCHEMA, **record}


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.sampled_from(HELD))
def test_any_text_comes_back_exactly(prompt, held):
    data = sounds.encode_sound(np.zeros((1, 800), np.float32), RATE, held[0], {"prompt": prompt}, bits=held[1])
    assert sounds.read_record(data)["prompt"] == prompt


@pytest.mark.parametrize("form,bits", HELD)
@pytest.mark.parametrize("channels", (1, 2))
def test_samples_come_back(form, bits, channels):
    x = np.concatenate([tone(440), tone(660)])[:channels]
    read = sounds.decode(sounds.encode_sound(x, RATE, form, bits=bits))
    assert read.shape == x.shape and read.dtype == np.float32
    if form in ("WAV", "FLAC"):
        assert np.abs(read - x).max() <= (0 if bits == 32 else 0.5 / 2 ** (bits - 1))
    else:
        assert np.sqrt(np.square(read - x).mean()) < 0.02


@pytest.mark.parametrize("form,bits", HELD)
def test_equal_calls_give_equal_bytes_whenever_they_are_made(form, bits):
    make = lambda record: sounds.encode_sound(tone(440), RATE, form, record, bits=bits)
    first = make({"b": 1, "a": {"d": 2, "c": 3}})
    if form == "OGG" or bits == 32:                     # libsndfile puts the clock's seconds into these
        time.sleep(1.1)
    assert first == make({"a": {"c": 3, "d": 2}, "b": 1})


@pytest.mark.parametrize("form,bits", HELD)
def test_what_is_too_loud_is_cut_and_never_wraps(form, bits):
    x = np.array([[0.0, 1.0, 1.5, 40.0, -1.0, -1.5, -40.0] * 200], np.float32)
    read = sounds.decode(sounds.encode_sound(x, RATE, form, bits=bits))
    if form in ("WAV", "FLAC"):
        assert np.abs(read - np.clip(x, -1, 1)).max() <= 1 / 2 ** (min(bits, 24) - 1)
    assert read.max() <= 1 and read.min() >= -1


def test_the_plain_reader_agrees_on_our_wav_files():
    x = np.concatenate([tone(440), tone(660)])
    for bits, kind in ((16, "PCM_16"), (24, "PCM_24"), (32, "FLOAT")):
        data = sounds.encode_sound(x, 22_050, "WAV", {"prompt": "x" * 999}, bits=bits)
        with soundfile.SoundFile(io.BytesIO(data)) as file:
            assert (file.samplerate, file.channels, file.frames, file.subtype) == (22_050, 2, x.shape[1], kind)
        assert int.from_bytes(data[4:8], "little") == len(data) - 8


def test_an_ogg_page_has_the_sum_that_its_decoder_asks_for():
    data = sounds.encode_sound(tone(440, 3.0), RATE, "OGG", {"prompt": "a" * 70_000})
    assert sounds.decode(data).shape[1] == 3 * RATE and sounds.facts(data).form == "OGG"
    assert sounds._ogg_sum(b"") == 0 and sounds._ogg_sum(b"\x01") == 0x04C11DB7     # the polynomial itself


@pytest.mark.parametrize("ending", sounds.FORMATS)
def test_metadata_can_be_left_out(tmp_path, ending):
    path = sounds.write_sound(tmp_path / f"a{ending}", tone(440), RATE, {"prompt": "secret"}, metadata=False)
    assert b"secret" not in path.read_bytes() and sounds.read_record(path) is None


def test_nothing_is_replaced_unasked(tmp_path):
    path = sounds.write_sound(tmp_path / "a.wav", tone(440), RATE)
    with pytest.raises(OutputError):
        sounds.write_sound(path, tone(440), RATE)
    sounds.write_sound(path, tone(440), RATE, exists="overwrite")


@pytest.mark.parametrize("array", [np.zeros(4, np.float32), np.zeros((3, 4), np.float32), np.zeros((1, 0), np.float32),
                                   np.zeros((1, 4), np.int16), np.full((1, 4), np.nan), np.full((1, 4), np.inf)])
def test_only_sounds_are_written(array):
    with pytest.raises(UsageError):
        sounds.encode_sound(array, RATE, "WAV")


def test_what_a_format_cannot_hold_is_said():
    for form, bits in (("MP3", 24), ("OGG", 32), ("FLAC", 32)):
        with pytest.raises(UsageError, match="bits"):
            sounds.encode_sound(tone(440), RATE, form, bits=bits)
    with pytest.raises(UsageError, match="MP3 cannot hold this sound of 1600"):
        sounds.encode_sound(tone(440), 1600, "MP3")
    for name in ("a", "a.txt", "a.m4a", ".wav"):
        with pytest.raises(UsageError, match="ending"):
            sounds.format_of(name)


# Reading

@pytest.mark.parametrize("had", (8_000, 22_050, 44_100, 48_000))
@pytest.mark.parametrize("hertz", (200, 1000, 2500))
def test_a_tone_stays_what_it_is_at_another_rate(had, hertz):
    data = sounds.encode_sound(tone(hertz, 1.0, had), had, "WAV", bits=32)
    read = sounds.decode(data, RATE, 1)
    middle = slice(RATE // 4, -RATE // 4)
    assert read.shape == (1, RATE)
    assert np.abs(read - tone(hertz, 1.0, RATE))[:, middle].max() < 1e-3


@pytest.mark.parametrize("had,wanted", [(44_100, 16_000), (16_000, 44_100), (11_025, 32_000)])
@pytest.mark.parametrize("length", (1, 7, 1000, 44_101))
def test_the_length_is_as_promised(had, wanted, length):
    made = sounds.resampled(np.ones((2, length), np.float32), had, wanted)
    assert made.shape == (2, max(1, round(length * wanted / had)))


def test_above_half_the_rate_nothing_folds_back():
    read = sounds.resampled(tone(12_000, 1.0, 48_000), 48_000, RATE)
    assert np.abs(read[:, 4000:-4000]).max() < 1e-4


def test_channels():
    left, right = tone(440), tone(660)
    data = sounds.encode_sound(np.concatenate([left, right]), RATE, "WAV", bits=32)
    assert np.allclose(sounds.decode(data, channels=1), (left + right) / 2, atol=1e-7)
    one = sounds.encode_sound(left, RATE, "WAV", bits=32)
    assert np.array_equal(sounds.decode(one, channels=2), np.concatenate([left, left]))
    buffer = io.BytesIO()
    soundfile.write(buffer, np.concatenate([left, right] * 3).T, RATE, format="WAV", subtype="FLOAT")
    assert np.array_equal(sounds.decode(buffer.getvalue(), channels=2), np.concatenate([left, right]))


def whole_wav():
    return sounds.encode_sound(tone(440), RATE, "WAV", {"prompt": "x"})


def with_header(rate, channels, samples):
    """A WAV file whose header promises what it likes."""
    layout = struct.pack("<HHIIHH", 1, channels, rate, rate * channels * 2, channels * 2, 16)
    size = min(samples * channels * 2, 2**32 - 100)
    return b"RIFF" + struct.pack("<I", size + 36) + b"WAVEfmt " + struct.pack("<I", 16) + layout + b"data" \
        + struct.pack("<I", size) + b"\0" * 1000


@pytest.mark.parametrize("data", [
    b"", b"RIFF", b"RIFF\xff\xff\xff\xffWAVE", b"no sound", b"\x89PNG\r\n\x1a\n" * 9, b"OggS" + b"\xff" * 99,
    b"fLaC" + b"\0" * 99, b"ID3" + b"\xff" * 99, b"\xff\xfb" + b"\0" * 99, with_header(RATE, 1, 0)[:44],
    with_header(0, 1, 9), with_header(RATE, 0, 9), b"MThd" + b"\0" * 99, b"caff" + b"\0" * 99])
def test_bad_files_have_one_line(tmp_path, data):
    path = tmp_path / "a.wav"
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        sounds.read_sound(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_missing_files_folders_and_numbers_that_are_none(tmp_path):
    for path in (tmp_path / "none.wav", tmp_path, "a\0b"):
        with pytest.raises(InputError):
            sounds.read_sound(path)
    buffer = io.BytesIO()
    soundfile.write(buffer, np.array([0, np.nan, np.inf]), RATE, format="WAV", subtype="FLOAT")
    with pytest.raises(InputError, match="no numbers"):
        sounds.decode(buffer.getvalue())


@pytest.mark.parametrize("form", ["WAV", "FLAC", "MP3", "AIFF"])
@pytest.mark.parametrize("share", [0.5, 0.8])
def test_a_sound_that_is_cut_short_is_refused(form, share):
    sound = tone(440, 3.0)
    if form == "AIFF":
        buffer = io.BytesIO()
        soundfile.write(buffer, sound.T, RATE, format="AIFF")
        data = buffer.getvalue()
    else:
        data = sounds.encode_sound(sound, RATE, form)
    assert sounds.decode(data).shape == sound.shape
    with pytest.raises(InputError, match="cut short|damaged"):
        sounds.decode(data[:int(len(data) * share)])


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFFFF0])
def test_a_size_that_its_writer_did_not_know_is_no_damage(size):
    data = bytearray(whole_wav())
    at = data.index(b"data") + 4
    data = data[:at + 4 + struct.unpack_from("<I", data, at)[0]]
    data[at:at + 4] = struct.pack("<I", size)
    assert sounds.decode(bytes(data)).shape == sounds.decode(whole_wav()).shape


def test_limits(monkeypatch):
    monkeypatch.setattr(sounds, "SECONDS_LIMIT", 0.4)
    with pytest.raises(InputError, match="too long"):
        sounds.decode(whole_wav())
    monkeypatch.setattr(sounds, "FILE_LIMIT", 10)
    with pytest.raises(InputError, match="too large"):
        sounds.decode(whole_wav())


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_a_damaged_file_is_read_or_refused(data):
    held = data.draw(st.sampled_from(HELD))
    made = bytearray(sounds.encode_sound(tone(440, 0.05), RATE, held[0], {"prompt": "x"}, bits=held[1]))
    for _ in range(data.draw(st.integers(1, 4))):
        made[data.draw(st.integers(0, len(made) - 1))] = data.draw(st.integers(0, 255))
    cut = bytes(made[:data.draw(st.integers(1, len(made)))])
    for read in (sounds.decode, sounds.facts, sounds.read_record):
        try:
            read(cut)
        except InputError as error:
            assert "\n" not in str(error)


def test_a_record_is_not_trusted():
    chunk = lambda text: b"LIST" + struct.pack("<I", len(text) + 12) + b"INFOICMT" + struct.pack("<I", len(text)) + text
    plain = sounds.encode_sound(tone(440), RATE, "WAV")
    for text in (b"[" * 100_000, b"[1]\0", b"{", b"\xff\xfe\0\0", b'{"a": ' * 5000):
        assert sounds.read_record(plain + chunk(text)) is None
    assert sounds.read_record(plain + b"LIST\xff\xff\xff\xffINFO") is None
