"""Short films: uint8 frames [T, H, W, C] to an MP4 file in memory, with the record of how they were made inside."""

import io
import json

import numpy as np

from nexus.errors import UsageError
from nexus.images import SCHEMA

RATE = 12           # frames a second


def encode_mp4(frames: np.ndarray, record: dict | None = None, *, rate: int = RATE) -> bytes:
    """H.264 in MP4; equal calls give equal bytes. Odd sides lose their last pixel, which the format asks for.

    record: JSON data, stored as the comment. UsageError for frames of another kind.
    """
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[3] not in (1, 3) or min(frames.shape) < 1 \
            or min(frames.shape[1:3]) < 2:
        raise UsageError(f"a film is uint8 [T, H, W, 1 or 3], not {frames.dtype} {list(frames.shape)}")
    import av  # a tenth of a second, which pictures do without
    high, wide = (side // 2 * 2 for side in frames.shape[1:3])
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", options={"movflags": "use_metadata_tags"}) as film:
        if record is not None:
            film.metadata["comment"] = json.dumps({"schema": SCHEMA, **record}, sort_keys=True, default=str)
        stream = film.add_stream("libx264", rate=rate, options={"crf": "16", "threads": "1"})
        stream.width, stream.height, stream.pix_fmt = wide, high, "yuv420p"
        for frame in frames[:, :high, :wide].repeat(3 // frames.shape[3], 3):
            film.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        film.mux(stream.encode(None))
    return buffer.getvalue()
