"""What a caption says that can be heard: which instrument plays, how fast, and in which key.

Each is read from sounds by a linear probe, fitted on real training clips alone and read on real held-out clips and on
made ones alike. Letters: N sounds, P features, R places that the same weights look from, J classes of each place.
"""

import re
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nexus.errors import UsageError
from nexus.evaluate.bootstrap import mean_interval
from nexus.evaluate.sets import Numbers
from nexus.keys import MODES, TONICS, key_name

INSTRUMENTS = ("piano", "harpsichord", "celesta", "glockenspiel", "music box", "vibraphone", "marimba", "xylophone",
               "church organ", "organ", "accordion", "harmonica", "nylon guitar", "electric guitar", "acoustic guitar",
               "guitar", "bass guitar", "double bass", "violin", "viola", "cello", "strings", "harp", "choir",
               "trumpet", "trombone", "tuba", "french horn", "saxophone", "oboe", "bassoon", "clarinet", "piccolo",
               "flute", "recorder", "banjo", "sitar", "synthesizer", "drums")
_NAMES = re.compile(r"\b(" + "|".join(sorted(INSTRUMENTS, key=len, reverse=True)) + r")\b")
_TEMPO = re.compile(r"\b([0-9]{2,3}) ?bpm\b")
_KEY = re.compile(r"\b([a-g](?:[ -]?(?:sharp|flat|#|b|♯|♭))?)[ -](major|minor)\b")
TEMPOS = torch.exp(torch.linspace(*torch.tensor([40.0, 240.0]).log().tolist(), 90, dtype=torch.float64))    # 2 % apart
TEMPO_WIDTH = 0.03      # how far a tempo's neighbours count as right while the probe learns, in logarithms
NEAR = 0.08             # share by which a tempo may be off
FEWEST = 20             # training clips that a probe is fitted on
STRENGTH = 1e-3         # of the penalty; 1e-4 to 1e-2 read the rendered clips alike
ROUNDS = 150


class Told(NamedTuple):
    """What a caption says; None = nothing, or more than one thing."""

    instrument: str | None = None
    tempo: float | None = None      # beats a minute
    key: int | None = None          # tonic in semitones above C, 12 more for minor


def told(caption: str) -> Told:
    """"slow piano in f sharp minor, 75 bpm" -> its instrument, tempo and key."""
    text = caption.casefold()
    names, keys = set(_NAMES.findall(text)), set(_KEY.findall(text))
    tempos = {float(found) for found in _TEMPO.findall(text)}
    return Told(*(next(iter(found)) if len(found) == 1 else None for found in (names, tempos, {*map(_place, keys)})))


def _place(found: tuple[str, str]) -> int | None:
    try:
        name, _, mode = key_name(" ".join(found)).rpartition(" ")
    except UsageError:      # "e sharp major": nobody writes in it
        return None
    return TONICS.index(name) + 12 * MODES.index(mode)


class Linear(NamedTuple):
    """x [N, R, P] -> scores [N, J * R], the same weights at each place."""

    mean: Tensor        # [P]
    spread: Tensor      # [P]
    weight: Tensor      # [P, J]
    bias: Tensor        # [J]

    def __call__(self, x: Tensor) -> Tensor:
        return (((x - self.mean) / self.spread) @ self.weight + self.bias).transpose(1, 2).flatten(1)


def logistic(x: Tensor, target: Tensor, strength: float = STRENGTH) -> Linear:
    """Multinomial logistic regression with a penalty: x [N, R, P], target [N, J * R] shares that add up to 1.

    Features are standardised, so `strength` means the same at any scale. L-BFGS from zeros: no draws.
    """
    x, target = x.double(), target.double()
    mean, spread = x.mean((0, 1)), x.std((0, 1), correction=0).clamp_min(1e-4)
    count = target.shape[1] // x.shape[1]
    with torch.inference_mode(False), torch.enable_grad():
        z = ((x - mean) / spread).clone()
        weight, bias = (torch.zeros(shape, dtype=torch.float64, requires_grad=True)
                        for shape in ((x.shape[2], count), (count,)))
        descent = torch.optim.LBFGS([weight, bias], max_iter=ROUNDS, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            descent.zero_grad()
            scores = (z @ weight + bias).transpose(1, 2).flatten(1)
            value = F.cross_entropy(scores, target) + strength * weight.square().sum()
            value.backward()
            return value
        descent.step(loss)
    return Linear(mean, spread, weight.detach(), bias.detach())


class Features(NamedTuple):
    """What the probes look at: timbre [N, 1, P], beat [N, 1, P], and pitch [N, 12, P] as each tonic would hear it."""

    timbre: Tensor
    beat: Tensor
    pitch: Tensor


class Probe(NamedTuple):
    """A part is None where the training captions say too little."""

    names: tuple[str, ...]
    instrument: Linear | None
    tempo: Linear | None
    key: Linear | None


def fit(x: Features, captions: list[str]) -> Probe:
    """The probe of training sounds with these captions."""
    said = [told(caption) for caption in captions]
    names = tuple(sorted({each.instrument for each in said if each.instrument}))
    return Probe(names, *(_fitted(features, values, shares) for features, values, shares in (
        (x.timbre, _numbered(said, names), lambda v: F.one_hot(v.long(), len(names))),
        (x.beat, [each.tempo for each in said], _around),
        (x.pitch, [each.key for each in said], lambda v: F.one_hot(v.long(), 24)))))


def _fitted(x: Tensor, values: list, shares: Callable[[Tensor], Tensor]) -> Linear | None:
    """What tells those of x that have a value, in shares of the classes; None for too few of them, or only one."""
    rows = _known(values)
    if len(rows) < FEWEST or len({values[i] for i in rows}) < 2:
        return None
    return logistic(x[rows], shares(torch.tensor([values[i] for i in rows], dtype=torch.float64)))


def _known(values: list) -> list[int]:
    return [i for i, value in enumerate(values) if value is not None]


def _numbered(said: list[Told], names: tuple[str, ...]) -> list[int | None]:
    """Each one's instrument as a place in `names`."""
    return [names.index(each.instrument) if each.instrument in names else None for each in said]


def _around(tempos: Tensor) -> Tensor:
    """Tempos as shares of the tempos near each."""
    return torch.softmax(-0.5 * ((tempos.log()[:, None] - TEMPOS.log()) / TEMPO_WIDTH).square(), 1)


def read_by(probe: Probe, x: Features, captions: list[str], seed: int) -> Numbers:
    """Is it heard what the caption says: the instrument, the tempo within 8 %, major or minor, and the very key.

    What a caption does not say, and instruments that no training caption names, are not counted.
    """
    said = [told(caption) for caption in captions]
    hits: dict[str, Tensor] = {}
    for part, features, values, right in (
            (probe.instrument, x.timbre, _numbered(said, probe.names), _instrument_right),
            (probe.tempo, x.beat, [each.tempo for each in said], _tempo_right),
            (probe.key, x.pitch, [each.key for each in said], _key_right)):
        rows = _known(values)
        if part is not None and rows:
            hits |= right(part(features[rows]), torch.tensor([values[i] for i in rows], dtype=torch.float64))
    return {name: mean_interval(each.double(), seed) for name, each in hits.items()}


def _instrument_right(scores: Tensor, asked: Tensor) -> dict[str, Tensor]:
    return {"instrument": scores.argmax(1) == asked}


def _tempo_right(scores: Tensor, asked: Tensor) -> dict[str, Tensor]:
    return {f"tempo within {100 * NEAR:g} %": (TEMPOS[scores.argmax(1)] / asked - 1).abs() <= NEAR}


def _key_right(scores: Tensor, asked: Tensor) -> dict[str, Tensor]:
    """The mode by the probabilities of all twelve keys in it."""
    modes = scores.softmax(1).unflatten(1, (2, 12)).sum(2).argmax(1)
    return {"mode": modes == asked // 12, "key": scores.argmax(1) == asked}


def protocol(probe: Probe) -> dict:
    """What is to be known of the probes."""
    return {"attributes": "logistic regressions on the training clips: instrument by mel bands, tempo by the "
                          "autocorrelation of onsets, key by pitch classes", "instruments": len(probe.names)}
