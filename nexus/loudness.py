"""How loud a sound is to a listener, in LUFS, and sound brought to a loudness. ITU-R BS.1770-4.

x float [C, T] in [-1, 1], C = 1 or 2 channels, T samples.
"""

import math

import numpy as np

TARGET = -14.0                          # LUFS, at which MusicGen's own samples and most players' streams are
PEAK = 10 ** (-1 / 20)                  # nothing is made louder than this: 1 dB below full scale
# The two filters of the standard, as it prints them for 48,000 samples a second: b0, b1, b2 over 1, a1, a2.
_RATE = 48_000
_SHELF = (1.53512485958697, -2.69169618940638, 1.19839281085285), (1.0, -1.69065929318241, 0.73248077421585)
_HIGH_PASS = (1.0, -2.0, 1.0), (1.0, -1.99004745483398, 0.99007225036621)
_PIECE, _LEAD = 60, 1                   # seconds filtered at once, and before them, in which the filters settle


def loudness(x: np.ndarray, rate: int) -> float:
    """LUFS of all of it, both gates applied; -inf for silence. Shorter than a block of 400 ms, it is one block."""
    part = max(1, round(rate / 10))                                     # blocks start every 100 ms and overlap by 75 %
    energy = np.square(_weighted(np.asarray(x, np.float64), rate)).sum(0)
    whole = energy[:len(energy) // part * part].reshape(-1, part).sum(1)
    blocks = np.convolve(whole, np.ones(4), "valid") / (4 * part) if len(whole) >= 4 else energy.mean(keepdims=True)
    for gate in (lambda loud: -70.0, lambda loud: _level(loud.mean()) - 10):
        blocks = blocks[[_level(block) > gate(blocks) for block in blocks]]
        if not len(blocks):
            return -math.inf
    return _level(blocks.mean())


def levelled(x: np.ndarray, rate: int, target: float = TARGET) -> np.ndarray:
    """x as loud as the target, or as loud as it gets with no sample above PEAK; silence as it is."""
    found = loudness(x, rate)
    if found == -math.inf:
        return x
    gain = min(10 ** ((target - found) / 20), PEAK / max(float(np.abs(x).max()), 1e-9))
    return (x * gain).astype(x.dtype)


def _level(energy: float) -> float:
    """Eq. 2: the mean square of weighted channels, summed over them, as LUFS."""
    return -0.691 + 10 * math.log10(energy) if energy > 0 else -math.inf


def _weighted(x: np.ndarray, rate: int) -> np.ndarray:
    """x [C, T] through both filters.

    Of other rates the standard asks for the same response; so it is taken at the frequencies that they have.
    """
    parts, lead = [], _LEAD * rate
    for start in range(0, x.shape[1], _PIECE * rate):
        before = min(lead, start)
        piece = x[:, start - before:start + _PIECE * rate]
        size = piece.shape[1] + lead                                    # room for what rings on
        frequencies = np.fft.rfftfreq(size, 1 / rate).clip(0, _RATE / 2)
        made = np.fft.irfft(np.fft.rfft(piece, size) * _response(frequencies), size)
        parts.append(made[:, before:piece.shape[1]])
    return np.concatenate(parts, 1)


def _response(frequencies: np.ndarray) -> np.ndarray:
    z = np.exp(-2j * math.pi * frequencies / _RATE)
    powers = np.stack([np.ones_like(z), z, z * z])
    return math.prod((np.dot(b, powers) / np.dot(a, powers) for b, a in (_SHELF, _HIGH_PASS)), start=1.0)
