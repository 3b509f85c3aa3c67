"""Films: what is written is what is read back, with its record, in equal bytes."""

import io
import json

import av
import numpy as np
import pytest

from nexus.errors import InputError, UsageError
from nexus.videos import RATE, Facts, encode_mp4, facts, read_record


def frames(n=6, high=33, wide=48, channels=3):
    ramp = np.linspace(0, 255, wide).astype(np.uint8)
    return np.stack([np.broadcast_to(np.roll(ramp, 8 * i)[None, :, None], (high, wide, channels)) for i in range(n)])


@pytest.mark.parametrize("channels", [1, 3])
def test_frames_come_back(channels):
    made = frames(channels=channels)
    data = encode_mp4(made, {"seed": 7, "prompt": "a \"red\" apple \u2603"})
    assert data == encode_mp4(made, {"seed": 7, "prompt": "a \"red\" apple \u2603"})
    with av.open(io.BytesIO(data)) as film:
        record = json.loads(film.metadata["comment"])
        assert record["seed"] == 7 and record["schema"] == "nexus/1" and record["prompt"].endswith("\u2603")
        assert film.streams.video[0].average_rate == RATE
        back = np.stack([f.to_ndarray(format="rgb24") for f in film.decode(video=0)])
    assert back.shape == (6, 32, 48, 3)
    assert np.abs(back.astype(int) - made[:, :32].repeat(3 // channels, 3).astype(int)).mean() < 6


@pytest.mark.parametrize("bad", [np.zeros((8, 8, 3), np.uint8), np.zeros((2, 8, 8, 4), np.uint8),
                                 np.zeros((2, 8, 8, 3), np.float32), np.zeros((2, 1, 8, 3), np.uint8)])
def test_other_arrays_are_refused(bad):
    with pytest.raises(UsageError):
        encode_mp4(bad)


def test_the_record_and_the_facts_are_read(tmp_path):
    (tmp_path / "a.mp4").write_bytes(encode_mp4(frames(), {"seed": 7}))
    assert read_record(tmp_path / "a.mp4") == {"schema": "nexus/1", "seed": 7}
    assert facts(tmp_path / "a.mp4") == Facts(48, 32, 6, RATE) and read_record(encode_mp4(frames())) is None


@pytest.mark.parametrize("data", [b"", b"no", encode_mp4(frames())[:400]])
def test_what_is_no_film_is_refused(data):
    for read in (read_record, facts):
        with pytest.raises(InputError, match="not a film"):
            read(data)
