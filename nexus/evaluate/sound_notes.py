"""Notes as Basic Pitch reads them, and how far two sounds agree in them. Bittner et al. 2022, arXiv:2203.09893.

Its network stands in the package `basic-pitch` (Apache-2.0) and is run with onnxruntime. The package itself asks for
TensorFlow, which nothing here needs, so it is no extra of ours: `pip install --no-deps basic-pitch==0.4.0`.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import numpy as np

from nexus.sounds import resampled

HINT = "pip install --no-deps basic-pitch==0.4.0 onnxruntime"
RATE, HOP = 22_050, 256
WINDOW = 2 * RATE - HOP         # samples that the network takes
EDGE = 15                       # frames at either end of a window that lack a neighbourhood
FRAMES = 172                    # of a window
SOUNDING = 0.3                  # of the posterior, above which a key sounds: Basic Pitch's own threshold of frames
OUTPUT = "StatefulPartitionedCall:1"        # the notes; :0 are contours, :2 onsets

Read = Callable[[np.ndarray, int], np.ndarray]


def reader() -> Read | None:
    """(sound float32 [C, T], its rate) -> posteriors [F, 88] of the keys from A0 on, or None where it is missing."""
    found = importlib.util.find_spec("basic_pitch")         # not imported: it would look for TensorFlow
    if found is None or importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    file = Path(found.submodule_search_locations[0]) / "saved_models" / "icassp_2022" / "nmp.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name

    def read(sound: np.ndarray, rate: int) -> np.ndarray:
        windows, count = _windows(resampled(sound.mean(0, keepdims=True), rate, RATE)[0])
        notes = session.run([OUTPUT], {name: windows})[0][:, EDGE:-EDGE]
        return notes.reshape(-1, notes.shape[-1])[:count]

    return read


def _windows(x: np.ndarray) -> tuple[np.ndarray, int]:
    """Overlapping windows [N, WINDOW, 1] whose inner frames follow one another, and how many frames x has."""
    inner = FRAMES - 2 * EDGE
    count = max(1, -(-len(x) // HOP))
    windows = -(-count // inner)
    needed = (windows - 1) * inner * HOP + WINDOW
    padded = np.zeros(needed, np.float32)
    x = x[:needed - EDGE * HOP]
    padded[EDGE * HOP:EDGE * HOP + len(x)] = x
    return np.stack([padded[i * inner * HOP:][:WINDOW] for i in range(windows)])[..., None], count


def agreement(made: np.ndarray, given: np.ndarray) -> float:
    """Posteriors [F, 88] of two sounds -> the F-score of the keys that sound, frame for frame; the shorter's frames.

    0 where neither sounds anywhere: silence agrees with nothing.
    """
    count = min(len(made), len(given))
    a, b = made[:count] > SOUNDING, given[:count] > SOUNDING
    return float(2 * (a & b).sum() / max(1, a.sum() + b.sum()))
