"""Folders of random pictures and of chords, for tests that train on some."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image

from nexus.sounds import write_sound


def drawn(folder: Path, labels: Iterable[str], *, count: int, side: int, seed: int = 0) -> Path:
    """The folder, with `count` pictures of noise in a folder of each label; the label "" is the folder itself."""
    draw = np.random.default_rng(seed)
    for label in labels:
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / label / f"{i}.png")
    return folder


def sung(folder: Path, labels: Iterable[str], *, count: int, seconds: float, rate: int, seed: int = 0) -> Path:
    """The folder, with `count` sounds of three tones each in a folder of each label."""
    draw = np.random.default_rng(seed)
    at = np.arange(round(seconds * rate)) / rate
    for label in labels:
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            tones = np.sin(2 * np.pi * draw.uniform(0.02, 0.3, (3, 1)) * rate * at + draw.uniform(0, 6, (3, 1)))
            write_sound(folder / label / f"{i}.wav", 0.3 * tones.mean(0, keepdims=True), rate)
    return folder
