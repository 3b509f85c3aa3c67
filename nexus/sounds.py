"""Sound files: float32 [C, T] in [-1, 1] in and out, with the record of how they were made inside.

C = 1 or 2 channels, T samples.
"""

import io
import json
import os
import struct
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import soundfile

from nexus.atomic import read_given, write_bytes
from nexus.errors import InputError, UsageError
from nexus.images import RECORD_LIMIT, SCHEMA, parsed_record

FORMATS = {".wav": "WAV", ".flac": "FLAC", ".ogg": "OGG", ".mp3": "MP3"}
BITS = {"WAV": (16, 24, 32), "FLAC": (16, 24), "OGG": (16,), "MP3": (16,)}      # 32 are floating point
FILE_LIMIT = 512 * 2**20
SECONDS_LIMIT = 3600
VALUES_LIMIT = 2**28                    # samples of all channels, 1 GiB in memory
# libsndfile knows dozens of formats; the parsers of the rare ones are attack surface.
_STARTS = (b"RIFF", b"RF64", b"fLaC", b"OggS", b"ID3", b"FORM", b"\xff\xfb", b"\xff\xfa", b"\xff\xf3", b"\xff\xf2")
_KINDS = ("WAV", "WAVEX", "RF64", "FLAC", "OGG", "MP3", "AIFF")
_BROKEN = (soundfile.SoundFileError, OSError, ValueError, RuntimeError, TypeError, OverflowError, MemoryError)
_SLACK = {"MP3": 2304}                  # samples that its frames, counted beforehand, may be off by
_CHUNKS = 1000                          # of a file, among which its samples are looked for
_UNKNOWN = 0x7FFF0000                   # a size from here on means that the writer did not know it
_CHUNK = 2**16                          # libsndfile's Vorbis encoder keeps what it is given at once on the stack
_REVERSED = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


class Facts(NamedTuple):
    """What a sound file says of itself: samples a second, channels, samples of each, and its format."""

    rate: int
    channels: int
    samples: int
    form: str


def read_sound(path: str | os.PathLike | bytes, rate: int | None = None, channels: int | None = None) -> np.ndarray:
    """A sound as float32 [C, T] in [-1, 1]; InputError for what is not one, or is too large.

    rate, channels: what it is brought to, None = as in the file. Of two channels one is their mean, of one channel
    two are the same twice; of more than two the first two, or the mean of all. Allowed: WAV, FLAC, OGG, MP3, AIFF.
    """
    return heard(path, rate, channels)[0]


def heard(path: str | os.PathLike | bytes, rate: int | None = None,
          channels: int | None = None) -> tuple[np.ndarray, Facts]:
    """`read_sound`, and what the file says of itself, from one reading."""
    return _decoded(read_given(path, "sound", FILE_LIMIT), rate, channels, _named(path))


def decode(data: bytes, rate: int | None = None, channels: int | None = None, *, name: str = "the sound") -> np.ndarray:
    """`read_sound` of a file in memory; name: what it is called in errors."""
    return _decoded(data, rate, channels, name)[0]


def _decoded(data: bytes, rate: int | None, channels: int | None, name: str) -> tuple[np.ndarray, Facts]:
    with _opened(data, name) as file:
        found = _checked(file, name)
        try:
            sound = file.read(found.samples, dtype="float32", always_2d=True).T
        except _BROKEN as error:
            raise InputError(f"{name}: the sound is damaged ({_short(error)})", hint="save it anew") from None
    if sound.shape[1] < found.samples - _SLACK.get(found.form, 0):
        raise InputError(f"{name} is cut short: {sound.shape[1]:,} of {found.samples:,} samples are there",
                         hint="copy or download it again")
    if not sound.shape[1]:
        raise InputError(f"{name} holds no sound")
    if not np.isfinite(sound).all():
        raise InputError(f"{name}: some of its samples are no numbers", hint="save it anew")
    sound = np.clip(resampled(_with_channels(sound, channels or found.channels), found.rate, rate or found.rate), -1, 1)
    return np.ascontiguousarray(sound, np.float32), found


def facts(path: str | os.PathLike | bytes) -> Facts:
    """What a sound file says of itself; InputError when it cannot be read."""
    name = _named(path)
    with _opened(read_given(path, "sound", FILE_LIMIT), name) as file:
        return _checked(file, name)


def _named(path) -> str:
    return "the sound on stdin" if isinstance(path, bytes) else str(path)


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120] or type(error).__name__


def _opened(data: bytes, name: str) -> soundfile.SoundFile:
    if len(data) > FILE_LIMIT:
        raise InputError(f"{name}: {len(data):,} bytes is too large (limit {FILE_LIMIT:,})")
    try:
        if data.startswith(_STARTS):
            file = soundfile.SoundFile(io.BytesIO(data))
            if file.format in _KINDS:
                _check_whole(data, name)
                return file
    except _BROKEN:
        pass
    raise InputError(f"{name} is not a sound that can be read", hint="WAV, FLAC, OGG, MP3 and AIFF are")


def _check_whole(data: bytes, name: str) -> None:
    """InputError for a WAV or AIFF whose samples end before they should: libsndfile takes what there is.

    A size that no such file can have is that of a writer who did not know it yet, such as a pipe.
    """
    form = data[:4]
    mark, order = {b"RIFF": (b"data", "little"), b"FORM": (b"SSND", "big")}.get(form, (b"", "big"))
    place = 12
    for _ in range(_CHUNKS if mark else 0):
        if place + 8 > len(data):
            return
        size, there = int.from_bytes(data[place + 4:place + 8], order), len(data) - place - 8
        if data[place:place + 4] == mark:
            if there < size < _UNKNOWN:
                raise InputError(f"{name} is cut short: {there:,} of {size:,} bytes of sound are there",
                                 hint="copy or download it again")
            return
        place += 8 + size + size % 2


def _checked(file: soundfile.SoundFile, name: str) -> Facts:
    """The facts of an opened file, which are within the limits."""
    found = Facts(file.samplerate, file.channels, file.frames, file.format)
    if found.rate < 1 or found.channels < 1 or found.samples < 0:
        raise InputError(f"{name} is not a sound that can be read", hint="save it anew")
    seconds = found.samples / found.rate
    if seconds > SECONDS_LIMIT or found.samples * found.channels > VALUES_LIMIT:
        raise InputError(f"{name}: {seconds:,.0f} s in {found.channels} channels is too long (limit {SECONDS_LIMIT} s "
                         f"and {VALUES_LIMIT:,} samples)", hint="cut it first")
    return found


def _with_channels(sound: np.ndarray, channels: int) -> np.ndarray:
    """[C, T] -> [channels, T]."""
    if sound.shape[0] == channels:
        return sound
    return sound.mean(0, keepdims=True) if channels == 1 else sound[:2].repeat(3 - min(len(sound), 2), 0)


def resampled(sound: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """float32 [C, T] at `rate` samples a second -> [C, round(T * wanted / rate)] at `wanted`."""
    if rate == wanted:
        return sound
    import av  # a tenth of a second, which sounds of the right rate do without
    layout = "mono" if sound.shape[0] == 1 else "stereo"
    resampler = av.AudioResampler(format="fltp", layout=layout, rate=wanted)
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(sound, np.float32), format="fltp", layout=layout)
    frame.sample_rate = rate
    parts = [part.to_ndarray() for piece in (frame, None) for part in resampler.resample(piece)]
    length = max(1, round(sound.shape[1] * wanted / rate))
    joined = np.concatenate([*parts, np.zeros((sound.shape[0], length), np.float32)], 1)
    return joined[:, :length]


def format_of(path: str | os.PathLike) -> str:
    """The format that a file name's ending asks for, or UsageError."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise UsageError(f"'{path}': cannot write a sound with the ending '{ending}'",
                         hint="endings: " + " ".join(FORMATS))
    return FORMATS[ending]


def write_sound(path: str | os.PathLike, array: np.ndarray, rate: int, record: dict | None = None, *, bits: int = 16,
                metadata: bool = True, exists: str = "error") -> Path:
    """Write float [C, T] in the format of the name's ending, whole or not at all.

    record: JSON data on how it was made, stored inside unless metadata=False. Equal calls give equal bytes.
    Raises OutputError, or UsageError for an unknown ending.
    """
    data = encode_sound(array, rate, format_of(path), record if metadata else None, bits=bits)
    return write_bytes(path, data, exists=exists)


def encode_sound(array: np.ndarray, rate: int, form: str, record: dict | None = None, *, bits: int = 16) -> bytes:
    """The bytes of a sound file: form is "WAV", "FLAC", "OGG" or "MP3"; float [C, T], cut at -1 and 1.

    bits: 16, 24, or 32 (floating point, WAV only). Raises UsageError for what is no sound or does not fit the format.
    """
    if array.ndim != 2 or array.shape[0] not in (1, 2) or not array.size \
            or not np.issubdtype(array.dtype, np.floating) or not np.isfinite(array).all():
        raise UsageError(f"a sound is finite float [1 or 2, T], not {array.dtype} {list(array.shape)}")
    if bits not in BITS[form]:
        raise UsageError(f"{form} does not hold {bits} bits a sample", hint="wav holds 16, 24 and 32, flac 16 and 24")
    text = "" if record is None else json.dumps({"schema": SCHEMA, **record}, sort_keys=True, default=str)
    samples = np.clip(array.T, -1, 1).astype(np.float64)                # [T, C]
    if form == "WAV":
        return _wav(_numbers(samples, bits), rate, bits, text)
    if form == "FLAC":
        samples, kind = _numbers(samples, bits) << (32 - bits), f"PCM_{bits}"
    else:
        samples, kind = samples.astype(np.float32), {"OGG": "VORBIS", "MP3": "MPEG_LAYER_III"}[form]
    buffer = io.BytesIO()
    try:
        with soundfile.SoundFile(buffer, "w", rate, samples.shape[1], format=form, subtype=kind) as file:
            if text:
                file.comment = text
            for start in range(0, len(samples), _CHUNK):
                file.write(samples[start:start + _CHUNK])
    except _BROKEN as error:
        raise UsageError(f"{form} cannot hold this sound of {rate} samples a second: {_short(error)}",
                         hint="write a .wav file") from None
    return _with_fixed_serial(buffer.getvalue()) if form == "OGG" else buffer.getvalue()


def _numbers(samples: np.ndarray, bits: int) -> np.ndarray:
    """[-1, 1] as int32 to the nearest, the one value beyond the largest being cut; 32 bits stay floating point."""
    if bits == 32:
        return samples.astype("<f4")
    top = 2 ** (bits - 1)
    return np.rint(samples * top).clip(-top, top - 1).astype("<i4")


def _wav(samples: np.ndarray, rate: int, bits: int, text: str) -> bytes:
    """Not through libsndfile, which cuts comments at 2 kB and writes the time into files of floating point."""
    channels, width = samples.shape[1], bits // 8
    body = samples.reshape(-1, 1).view(np.uint8)[:, :width].tobytes()
    code, extra = (3, struct.pack("<H", 0)) if bits == 32 else (1, b"")
    layout = struct.pack("<HHIIHH", code, channels, rate, rate * channels * width, channels * width, bits) + extra
    chunks = _chunk(b"fmt ", layout) + (_chunk(b"fact", struct.pack("<I", len(samples))) if extra else b"")
    chunks += _chunk(b"data", body)
    if text:
        chunks += _chunk(b"LIST", b"INFO" + _chunk(b"ICMT", text.encode("ascii") + b"\0"))
    if len(chunks) + 4 >= 2**32:
        raise UsageError("a WAV file of over 4 GB cannot be written", hint="write a .flac file")
    return _chunk(b"RIFF", b"WAVE" + chunks)


def _chunk(name: bytes, data: bytes) -> bytes:
    return name + struct.pack("<I", len(data)) + data + b"\0" * (len(data) % 2)


def _with_fixed_serial(data: bytes) -> bytes:
    """An Ogg file whose stream number, which libsndfile draws from the clock, is 1; each page has its sum anew."""
    made, place = bytearray(data), 0
    while made[place:place + 4] == b"OggS":
        segments = made[place + 26]
        end = place + 27 + segments + sum(made[place + 27:place + 27 + segments])
        made[place + 14:place + 18], made[place + 22:place + 26] = struct.pack("<I", 1), bytes(4)
        made[place + 22:place + 26] = struct.pack("<I", _ogg_sum(bytes(made[place:end])))
        place = end
    return bytes(made)


def _ogg_sum(page: bytes) -> int:
    """Ogg's CRC: zlib's polynomial with the bits the other way round, from 0 and not inverted (RFC 3533)."""
    mirrored = zlib.crc32(page.translate(_REVERSED), 0xFFFFFFFF) ^ 0xFFFFFFFF
    return int(f"{mirrored:032b}"[::-1], 2)


def read_record(path: str | os.PathLike | bytes) -> dict | None:
    """The record inside a sound file, or None when it has none; InputError when the file is no sound.

    It comes from outside: a JSON object of at most 4 MB, and nothing in it is to be trusted.
    """
    data = read_given(path, "sound", FILE_LIMIT)
    with _opened(data, _named(path)) as file:
        text = _wav_comment(data) if data.startswith(b"RIFF") else file.comment
    return parsed_record(text)


def _wav_comment(data: bytes) -> str:
    """The ICMT entry of a RIFF file's INFO list."""
    for name, body in _chunks(data, 12):
        if name == b"LIST" and body[:4] == b"INFO":
            for entry, text in _chunks(body, 4):
                if entry == b"ICMT":
                    return text.rstrip(b"\0").decode("utf-8", "replace")
    return ""


def _chunks(data: bytes, place: int):
    view = memoryview(data)
    while place + 8 <= len(data):
        length = int.from_bytes(view[place + 4:place + 8], "little")
        body = view[place + 8:place + 8 + length]
        yield bytes(view[place:place + 4]), b"" if length > RECORD_LIMIT else bytes(body)
        place += 8 + length + length % 2
