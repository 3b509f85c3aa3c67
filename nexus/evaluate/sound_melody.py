"""Whether a piece follows the melody that it was given: chroma against chroma, frame for frame."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.codecs.chroma import ChromaConfig, chroma
from nexus.evaluate.bootstrap import mean_interval
from nexus.evaluate.sets import Numbers
from nexus.evaluate.sound_features import Clips
from nexus.requests import SampleRequest
from nexus.sounds import write_sound

MOST = 50               # melodies that pieces are made to
FEWEST = 2              # so that there is another melody


def follows(system: nn.Module) -> bool:
    """Whether the system can be given a melody."""
    return "melody" in system.takes and getattr(system.config.net, "chroma", 0) > 0


def cosine(made: Tensor, given: Tensor) -> float:
    """made, given [F, N] -> the mean over frames of the cosine between their chroma; the shorter one's frames."""
    count = min(len(made), len(given))
    return float(F.cosine_similarity(made[:count], given[:count], dim=1).mean())


def measured(system: nn.Module, request: SampleRequest, clips: Clips, prompts: list[str | None], seeds: list[int],
             watch: Callable[[int, int], Any]) -> tuple[Numbers, dict]:
    """The cosine of pieces to the melodies of real clips that they were given, and to those of the next ones.

    prompts, seeds: of each piece, as many as clips. Copet et al. 2023, section 5.2: on chroma of the loudest note.
    -> (numbers, protocol), empty for fewer than 2 clips.
    """
    if len(clips.rows) < FEWEST:
        return {}, {}
    config, rate = system.config.melody, system.config.rate
    melodies, made = [], []
    for i, x in enumerate(clips.sounds()):
        melodies.append(_chroma(x, rate, config))
        piece = _piece(system, request.model_copy(update={"prompt": prompts[i]}), x, seeds[i])
        made.append(_chroma(piece, rate, config))
        watch(i + 1, len(clips.rows))
    own = torch.tensor([cosine(x, y) for x, y in zip(made, melodies, strict=True)], dtype=torch.float64)
    other = torch.tensor([cosine(x, y) for x, y in zip(made, melodies[1:] + melodies[:1], strict=True)],
                         dtype=torch.float64)
    pairs = {"chroma cosine to the melody": own, "chroma cosine to another melody": other,
             "chroma cosine, difference": own - other}
    facts = {"melodies": len(own), "chroma": f"{config.bins} bins, windows of {1 << config.exponent} samples, "
                                             + ("the loudest alone" if config.loudest else "all of them")}
    return {name: mean_interval(values) for name, values in pairs.items()}, facts


def _chroma(x: np.ndarray, rate: int, config: ChromaConfig) -> Tensor:
    """[C, T] -> [F, N]."""
    return chroma(torch.from_numpy(x).mean(0, keepdim=True), rate, config)[0]


def _piece(system: nn.Module, request: SampleRequest, melody: np.ndarray, seed: int) -> np.ndarray:
    """What is made to a melody [C, T], which goes the way that a user's file goes."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_sound(Path(folder) / "melody.wav", melody, system.config.rate, bits=32)
        asked = request.model_copy(update={"melody": str(path), "duration": melody.shape[1] / system.config.rate})
        return system.generate(asked, seeds=[seed]).data[0].float().cpu().numpy()
