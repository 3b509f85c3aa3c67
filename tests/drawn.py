"""A folder of random pictures, for tests that train on some."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image


def drawn(folder: Path, labels: Iterable[str], *, count: int, side: int, seed: int = 0) -> Path:
    """The folder, with `count` pictures of noise in a folder of each label; the label "" is the folder itself."""
    draw = np.random.default_rng(seed)
    for label in labels:
        (folder / label).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            Image.fromarray(draw.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(folder / label / f"{i}.png")
    return folder
