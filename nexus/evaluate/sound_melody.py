"""Whether a piece follows the melody that it was given: chroma and notes against its own, frame for frame."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.codecs.chroma import ChromaConfig, chroma
from nexus.evaluate import sound_notes
from nexus.evaluate.bootstrap import mean_interval
from nexus.evaluate.sets import Numbers
from nexus.evaluate.sound_features import Clips
from nexus.requests import SampleRequest
from nexus.sounds import write_sound

MOST = 50               # melodies that pieces are made to
FEWEST = 2              # so that there is another melody


def follows(system: nn.Module) -> bool:
    """Whether the system can be given a melody."""
    net = system.config.net
    return "melody" in system.takes and getattr(net, "chroma", 0) > 0 and net.style is None


def cosine(made: Tensor, given: Tensor) -> float:
    """made, given [F, N] -> the mean over frames of the cosine between their chroma; the shorter one's frames."""
    count = min(len(made), len(given))
    return float(F.cosine_similarity(made[:count], given[:count], dim=1).mean())


def measured(system: nn.Module, request: SampleRequest, clips: Clips, prompts: list[str | None], seeds: list[int],
             watch: Callable[[int, int], Any]) -> tuple[Numbers, dict]:
    """The cosine of pieces to the melodies of real clips that they were given, and to those of the next ones.

    prompts, seeds: of each piece, as many as clips. Copet et al. 2023, section 5.2: on chroma of the loudest note.
    With Basic Pitch at hand, likewise the F-score of their notes. -> (numbers, protocol), empty for fewer than 2 clips.
    """
    if len(clips.rows) < FEWEST:
        return {}, {}
    config, rate, read = system.config.melody, system.config.rate, sound_notes.reader()
    melodies, made = [], []
    for i, x in enumerate(clips.sounds()):
        melodies.append(x)
        made.append(_piece(system, request.model_copy(update={"prompt": prompts[i]}), x, seeds[i]))
        watch(i + 1, len(clips.rows))
    found = _compared("chroma cosine", cosine, *([_chroma(x, rate, config) for x in side] for side in (made, melodies)))
    notes = f"not read, Basic Pitch is missing: {sound_notes.HINT}"
    if read:
        found |= _compared("note agreement", sound_notes.agreement,
                           *([read(x, rate) for x in side] for side in (made, melodies)))
        notes = f"Basic Pitch 0.4.0, above {sound_notes.SOUNDING}"
    facts = {"melodies": len(made), "notes": notes,
             "chroma": f"{config.bins} bins, windows of {1 << config.exponent} samples, "
                       + ("the loudest alone" if config.loudest else "all of them")}
    return found, facts


def _compared(name: str, score: Callable[[Any, Any], float], made: list, melodies: list) -> Numbers:
    """The mean score of what was made against its own melody, against the next one, and the difference."""
    own = [score(x, y) for x, y in zip(made, melodies, strict=True)]
    other = [score(x, y) for x, y in zip(made, melodies[1:] + melodies[:1], strict=True)]
    scores = {f"{name} to the melody": own, f"{name} to another melody": other,
              f"{name}, difference": [x - y for x, y in zip(own, other, strict=True)]}
    return {key: mean_interval(torch.tensor(values, dtype=torch.float64)) for key, values in scores.items()}


def _chroma(x: np.ndarray, rate: int, config: ChromaConfig) -> Tensor:
    """[C, T] -> [F, N]."""
    return chroma(torch.from_numpy(x).mean(0, keepdim=True), rate, config)[0]


def _piece(system: nn.Module, request: SampleRequest, melody: np.ndarray, seed: int) -> np.ndarray:
    """What is made to a melody [C, T], which goes the way that a user's file goes."""
    with tempfile.TemporaryDirectory() as folder:
        path = write_sound(Path(folder) / "melody.wav", melody, system.config.rate, bits=32)
        asked = request.model_copy(update={"melody": str(path), "duration": melody.shape[1] / system.config.rate})
        return system.generate(asked, seeds=[seed]).data[0].float().cpu().numpy()
