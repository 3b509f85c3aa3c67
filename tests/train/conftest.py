"""What the training tests share: the toy systems under catalog names of their own, and a folder of pictures."""

from pathlib import Path

import pytest
import torch
import toys

from nexus import catalog
from tests.drawn import drawn

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def toys_in_catalog(monkeypatch):
    """`train("toy", ...)` and `train("toy-gan", ...)` work inside a test, and only there."""
    for name, entry in toys.ENTRIES.items():
        monkeypatch.setitem(catalog.CATALOG, name, entry)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory) -> Path:
    """Twelve 8 x 8 pictures in two classes: few enough that none is held out."""
    return drawn(tmp_path_factory.mktemp("pictures"), ("circle", "square"), count=6, side=8, seed=5)
