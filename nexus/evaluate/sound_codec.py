"""How well a codec of sound keeps it: distances to the original, and what it makes of its codebooks.

K codebooks of `bins` entries, C channels, T samples, F frames.
"""

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.evaluate.bootstrap import mean_interval
from nexus.evaluate.sets import Numbers
from nexus.losses.spectral import FLOOR, mel_spectrogram, si_sdr

MOST_DB = 100.0         # of a sound that is rebuilt exactly
WINDOWS, BANDS = (512, 1024, 2048), 40


class Rebuilt(NamedTuple):
    """A clip and what the codec makes of it, float32 [C, T], and its ids [K, F]."""

    x: Tensor
    made: Tensor
    ids: Tensor


def is_codec(system: nn.Module) -> bool:
    """Whether the system turns sound into ids and back."""
    return all(hasattr(getattr(system, "net", None), name) for name in ("encode", "decode", "codes", "from_codes"))


@torch.inference_mode()
def rebuilt(system: nn.Module, x: np.ndarray) -> Rebuilt:
    """One sound [C, T] through all codebooks and back, cut to [-1, 1] as a file would."""
    given = torch.from_numpy(x)
    parts = system.net.encode(given[None].to(next(system.parameters()).device))
    made = system.net.decode(parts, given.shape[1])[0].float().cpu().clamp(-1, 1)
    return Rebuilt(given, made, torch.cat([part.ids[0] for part in parts], -1).cpu())


@torch.inference_mode()
def through(system: nn.Module, sounds: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """Sounds [C, T] as the codec under a model of tokens rebuilds them: as good as the model could ever sound."""
    for x in sounds:
        given = torch.from_numpy(x)[None].to(next(system.parameters()).device)
        yield system.decode(system.encode(given))[0, :, :x.shape[1]].float().cpu().numpy()


def log_mel_distance(made: Tensor, x: Tensor, rate: int) -> float:
    """dB: the mean |difference| of the logarithms of mel magnitudes, over channels, WINDOWS, bands and frames."""
    room = max(0, max(WINDOWS) // 2 + 1 - x.shape[-1])
    terms = []
    for window in WINDOWS:
        ours, theirs = (mel_spectrogram(F.pad(sound, (0, room)), rate, window, BANDS) for sound in (made, x))
        terms.append(20 * (ours.clamp_min(FLOOR).log10() - theirs.clamp_min(FLOOR).log10()).abs().mean())
    return float(torch.stack(terms).mean())


def usage(counts: Tensor) -> tuple[Tensor, Tensor]:
    """How often each entry was chosen [K, bins] -> the share that was chosen at all, and the perplexity: [K] each.

    The perplexity is the number of entries that, chosen equally often, would say as much.
    """
    shares = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
    return (counts > 0).double().mean(1), torch.special.entr(shares).sum(1).exp()


def measured(system: nn.Module, sounds: Iterable[np.ndarray], *, seed: int,
             watch: Callable[[int], Any] = lambda done: None,
             made: Callable[[np.ndarray], Any] = lambda x: None) -> Numbers:
    """SI-SDR, log-mel distance, usage and perplexity of each codebook, and the bitrate; made(x): see each rebuilt."""
    c = system.config.net
    counts = torch.zeros(c.codebooks, c.bins, dtype=torch.int64)
    columns: dict[str, list[float]] = {"si-sdr (dB)": [], "log-mel distance (dB)": [], "bits": [], "seconds": []}
    for x in sounds:
        one = rebuilt(system, x)
        counts += torch.stack([torch.bincount(row, minlength=c.bins) for row in one.ids])
        row = (min(MOST_DB, float(si_sdr(one.made, one.x).mean())), log_mel_distance(one.made, one.x, c.rate),
               one.ids.numel() * math.log2(c.bins), x.shape[1] / c.rate)
        for column, value in zip(columns.values(), row, strict=True):
            column.append(value)
        made(one.made.numpy())
        watch(len(columns["bits"]))
    bits, seconds = (sum(columns.pop(name)) for name in ("bits", "seconds"))
    found: Numbers = {name: mean_interval(torch.tensor(column), seed) for name, column in columns.items()}
    found["bitrate (kbit/s)"] = bits / seconds / 1000
    for k, (share, perplexity) in enumerate(zip(*(column.tolist() for column in usage(counts)), strict=True), 1):
        found[f"codebook {k}, entries used"], found[f"codebook {k}, perplexity"] = share, perplexity
    return found


def protocol(system: nn.Module) -> dict:
    """What the numbers hold for."""
    c = system.config.net
    return {"rate": c.rate, "channels": c.channels, "codebooks": f"{c.codebooks} of {c.bins}",
            "si-sdr": f"zero-mean, mean over channels and clips, {MOST_DB:g} dB at most for each (Le Roux et al. 2019)",
            "log_mel": f"mean |difference| of {BANDS} bands in windows of {', '.join(map(str, WINDOWS))} samples, "
                       f"from {20 * math.log10(FLOOR):g} dB up",
            "code_usage": "over all frames of all clips", "bitrate": "of ids as they are, not entropy coded"}
