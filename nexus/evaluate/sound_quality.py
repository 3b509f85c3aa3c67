"""What is wrong with a sound by itself: too loud, clipped, silent, or torn where two windows meet.

x float32 [C, T] in [-1, 1] at `rate` samples a second.
"""


import numpy as np
import torch

from nexus.decode.patterns import windows
from nexus.evaluate.bootstrap import mean_interval
from nexus.evaluate.sets import Numbers
from nexus.loudness import loudness

CLIPPED = 0.999         # from here on a sample is at full scale
SILENT = -60.0          # dB below full scale, of a BLOCK
BLOCK = 0.02            # seconds
QUIETEST = -70.0        # LUFS that silence is given, at which the standard's own gate lies
SHARP = 0.99            # share of blocks that a seam is smoother than, if there is no click


def clipping(x: np.ndarray) -> float:
    """The share of samples at full scale."""
    return float((np.abs(x) >= CLIPPED).mean())


def longest_silence(x: np.ndarray, rate: int) -> float:
    """Seconds of the longest run of blocks without sound."""
    blocks = _blocks(x, rate)
    quiet = 10 * np.log10(np.square(blocks).mean((0, 2)) + 1e-12) < SILENT
    edges = np.flatnonzero(np.diff(np.concatenate([[False], quiet, [False]]).astype(int)))
    return float((edges[1::2] - edges[::2]).max(initial=0)) * blocks.shape[2] / rate


def sharpness(x: np.ndarray, rate: int) -> np.ndarray:
    """[blocks]: the greatest step from a sample to the next in each."""
    steps = np.abs(np.diff(x.mean(0, keepdims=True), prepend=x.mean(0)[:1][None]))
    return _blocks(steps, rate)[0].max(1)


def seam_ranks(x: np.ndarray, rate: int, seams: list[int]) -> list[float]:
    """For each sample where windows meet: the share of all other blocks that are less sharp than the one around it.

    As many above 0.5 as below where nothing is heard of the seam; a click is near 1.
    """
    sharp = sharpness(x, rate)
    size = max(2, round(BLOCK * rate))
    places = {seam: {min(len(sharp) - 1, max(0, seam + way * size // 2) // size) for way in (-1, 1)} for seam in seams}
    others = np.delete(sharp, sorted(set().union(*places.values()))) if places else sharp
    return [float((others < max(sharp[i] for i in places[seam])).mean()) for seam in seams] if len(others) else []


def seams(config, seconds: float) -> list[int]:
    """The samples at which a piece of so many seconds goes on in a new window; none where it is made whole."""
    if not hasattr(config, "stride"):
        return []
    spans = windows(config.frames(seconds), config.frames(config.seconds), config.frames(config.stride))
    return [stop * config.codec.net.hop for _, stop in spans][:-1]


def _blocks(x: np.ndarray, rate: int) -> np.ndarray:
    """[C, T] -> [C, blocks, samples]; the last one may end in zeros."""
    size = max(2, round(BLOCK * rate))
    return np.pad(x, ((0, 0), (0, -x.shape[1] % size))).reshape(len(x), -1, size)


def numbers(sounds: list[np.ndarray], rate: int, seams: list[int], seed: int) -> Numbers:
    """The means over sounds, the worst silence, and what is heard of the seams, where there are any."""
    values = {"loudness (LUFS)": [max(QUIETEST, loudness(x, rate)) for x in sounds],
              "clipped samples": [clipping(x) for x in sounds],
              "longest silence (s)": [longest_silence(x, rate) for x in sounds]}
    found: Numbers = {name: mean_interval(torch.tensor(column), seed) for name, column in values.items()}
    found["longest silence of all (s)"] = max(values["longest silence (s)"])
    ranks = torch.tensor([rank for x in sounds for rank in seam_ranks(x, rate, seams)])
    if len(ranks):
        found["seam sharpness, rank"] = mean_interval(ranks, seed)
        found["seams sharper than 99 % of the rest"] = mean_interval((ranks > SHARP).double(), seed)
    return found


def protocol() -> dict:
    """What the numbers hold for."""
    return {"loudness": "ITU-R BS.1770-4 of what the model makes, before a file is levelled",
            "clipping": f"|x| >= {CLIPPED:g}", "silence": f"blocks of {BLOCK:g} s below {SILENT:g} dB"}
