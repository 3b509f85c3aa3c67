"""Short films: uint8 frames [T, H, W, C] to an MP4 file in memory, with the record of how they were made inside."""

import contextlib
import io
import json
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from nexus.atomic import read_given
from nexus.errors import InputError, UsageError
from nexus.images import SCHEMA, parsed_record

RATE = 12           # frames a second
FILE_LIMIT = 512 * 2**20


class Facts(NamedTuple):
    """What a film says of itself: its sides in pixels, frames, and frames a second."""

    width: int
    height: int
    frames: int
    rate: float


def encode_mp4(frames: np.ndarray, record: dict | None = None, *, rate: int = RATE) -> bytes:
    """H.264 in MP4; equal calls give equal bytes. Odd sides lose their last pixel, which the format asks for.

    record: JSON data, stored as `nexus` and, for players that show it, as the comment. UsageError for frames of
    another kind.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] not in (1, 3) or min(frames.shape) < 1 \
            or min(frames.shape[1:3]) < 2:
        raise UsageError(f"a film is uint8 [T, H, W, 1 or 3], not {frames.dtype} {list(frames.shape)}")
    import av  # a tenth of a second, which pictures do without
    high, wide = (side // 2 * 2 for side in frames.shape[1:3])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"movflags": "use_metadata_tags"}) as film:
        if record is not None:
            text = json.dumps({"schema": SCHEMA, **record}, sort_keys=True, default=str)
            film.metadata.update({"nexus": text, "comment": text})
        stream = film.add_stream("libx264", rate=rate, options={"crf": "16", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = wide, high, "yuv420p"
        for frame in frames[:, :high, :wide].repeat(3 // frames.shape[3], 3):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        film.mux(stream.encode(None))
    return buffer.getvalue()


def read_record(path: str | os.PathLike | bytes) -> dict | None:
    """The record inside a film, or None when it has none; InputError when the file is no MP4.

    It comes from outside: a JSON object of at most 4 MB, and nothing in it is to be trusted.
    """
    with _opened(path) as film:
        text = film.metadata.get("nexus") or film.metadata.get("comment") or ""
    return parsed_record(text)


def facts(path: str | os.PathLike | bytes) -> Facts:
    """What a film says of itself; InputError when the file is no MP4 with pictures."""
    with _opened(path) as film:
        stream = film.streams.video[0]
        return Facts(stream.width, stream.height, stream.frames, float(stream.average_rate or 0))


@contextlib.contextmanager
def _opened(path: str | os.PathLike | bytes) -> Iterator[Any]:
    """The container, read by the parser of MP4 alone."""
    name, data = "the film on stdin" if isinstance(path, bytes) else str(path), read_given(path, "film", FILE_LIMIT)
    if len(data) > FILE_LIMIT:
        raise InputError(f"{name}: over {FILE_LIMIT:,} bytes is too large")
    import av  # see above
    try:
        film = av.open(io.BytesIO(data), "r", format="mp4", metadata_errors="replace")
    except (av.FFmpegError, ValueError, OSError):
        raise InputError(f"{name} is not a film that can be read", hint="MP4 is; a file may be cut short") from None
    with film:
        if not film.streams.video:
            raise InputError(f"{name} holds no pictures", hint="an MP4 with a video stream")
        yield film
