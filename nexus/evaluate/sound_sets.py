"""How far apart two sets of sounds are by the vectors of an ear, and whether that ear is one to go by.

Letters: N and M sounds, W windows of each, D features.
"""

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from nexus.evaluate.bootstrap import normal_interval
from nexus.evaluate.frechet import frechet
from nexus.evaluate.kernel import FEWEST, kid
from nexus.evaluate.sets import Numbers
from nexus.evaluate.sound_features import Clips, Ear, Watch, described
from nexus.rng import derive

WINDOWS = 2             # a feature, that each set must have: with fewer its covariance is too poorly known
NOISE = 20.0            # dB of a clip above the white noise that is added to it
TONES = (0.1, 0.4)      # seconds that a tone of the other music lasts
FAR = ("with noise", "other music")


def apart(real: Tensor, made: Tensor, label: str = "") -> Numbers:
    """"fad" between all windows (large sets only), "kad" between sounds, each of them the mean of its windows.

    real [N, W, D], made [M, W, D]. Frechet audio distance: Kilgour et al. 2019; kernel: Chung et al. 2025. The
    windows of a sound are not drawn apart from one another, so the kernel distance's error is over sounds.
    """
    found: Numbers = {}
    if min(real.shape[:2].numel(), made.shape[:2].numel()) >= WINDOWS * real.shape[2]:
        found[f"fad{label}"] = frechet(real.flatten(0, 1), made.flatten(0, 1))
    if min(len(real), len(made)) >= FEWEST:
        found[f"kad{label}"] = normal_interval(*kid(real.mean(1), made.mean(1)))
    return found


def validated(ear: Ear, clips: Clips, real: Tensor, seed: int, watch: Watch) -> tuple[Numbers, str]:
    """Distances that have to grow, between real clips [N, W, D] in random order, and whether they do.

    From one half of the clips: of the other half, of that half with white noise, and of another kind of music.
    """
    half = len(real) // 2
    if half < FEWEST:
        return {}, f"not checked: needs {2 * FEWEST} clips, there are {len(real)}"
    facts, others = clips.set.facts, clips._replace(rows=clips.rows[half:])
    count = len(others.rows)
    far = (noisy(others, seed), tones(count, clips.set.length, facts.rate, seed))
    vectors = [real[half:], *(described(sounds, facts.rate, ear.describe, count, watch) for sounds in far)]
    found: Numbers = {}
    for name, y in zip(("two halves", *FAR), vectors, strict=True):
        found |= {f"real {key}": value for key, value in apart(real[:half], y, f", {name}").items()}
    held = {kind: in_order(found, kind) for kind in ("fad", "kad") if f"real {kind}, two halves" in found}
    return found, ", ".join(f"{kind} {'holds' if right else 'FAILS'}" for kind, right in held.items())


def in_order(found: Numbers, kind: str) -> bool:
    """Whether the distances of `validated` grow as they have to."""
    numbers = [found[f"real {kind}, {name}"] for name in ("two halves", *FAR)]
    near, noise, other = (n["value"] if isinstance(n, dict) else n for n in numbers)
    return near < noise < other


def noisy(clips: Clips, seed: int) -> Iterator[np.ndarray]:
    """The clips with white noise NOISE dB below each."""
    for i, x in enumerate(clips.sounds()):
        drawn = np.random.default_rng(derive(seed, "noise", i)).standard_normal(x.shape, np.float32)
        yield x + drawn * np.float32(np.sqrt(np.square(x).mean()) * 10 ** (-NOISE / 20))


def tones(count: int, samples: int, rate: int, seed: int) -> Iterator[np.ndarray]:
    """Another kind of music: square waves at random notes of four octaves, each in a tempo of its own."""
    at = np.arange(samples) / rate
    for i in range(count):
        rng = np.random.default_rng(derive(seed, "tones", i))
        place = (at / rng.uniform(*TONES)).astype(int)
        notes = rng.integers(48, 96, place[-1] + 1)[place]
        yield (0.2 * np.sign(np.sin(2 * np.pi * 440 * 2 ** ((notes - 69) / 12) * at)))[None].astype(np.float32)


def protocol(ear: Ear) -> dict:
    """What the distances hold for."""
    return {"extractor": ear.name, "extractor_sha256" if len(ear.digest) == 64 else "extractor_settings": ear.digest,
            "fad": f"over vectors of a second, from {WINDOWS} x {ear.dims} of them on",
            "kad": "polynomial of degree 3, unbiased, all pairs of the clips' mean vectors",
            "checked": f"clean half < that half with white noise {NOISE:g} dB below < square waves at random notes"}
