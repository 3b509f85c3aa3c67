"""What the training tests share: the toy systems under catalog names of their own, and a folder of pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from PIL import Image

from nexus import catalog

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def toys_in_catalog(monkeypatch):
    """`train("toy", ...)` and `train("toy-gan", ...)` work inside a test, and only there."""
    for name, entry in toys.ENTRIES.items():
        monkeypatch.setitem(catalog.CATALOG, name, entry)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Twelve 8 x 8 pictures in two classes: few enough that none is held out."""
    folder, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(5)
    for label in ("circle", "square"):
        (folder / label).mkdir()
        for i in range(6):
            Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / label / f"{i}.png")
    return folder
