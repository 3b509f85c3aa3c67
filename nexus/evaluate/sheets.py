"""A sheet to look at: what was made, the real picture it stands for, and the training picture it is most like."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from nexus.evaluate import captions
from nexus.evaluate.judge import Judge, Made
from nexus.evaluate.manifold import distances
from nexus.images import contact_sheet, write_image

EACH = 12       # of the worst and of the best
ACROSS = 4      # groups in a row of the sheet


def write_sheet(path: str | Path, judge: Judge, made: Made, x: Tensor) -> Path:
    """Groups of made, real (where one was asked for) and nearest training picture, the worst caption first.

    x: features of the made pictures [N, D]. Without captions, those most like a training picture come first.
    """
    held, train = judge.held.set, judge.train
    worst, nearest = distances(x, train.features).min(1)
    if judge.probe is not None and made.rows is not None:
        worst = -captions.ranks(judge.probe, x, torch.from_numpy(held.labels)[made.rows])
    ranked = worst.argsort(stable=True).tolist()
    pictures, texts = [], []
    for i in ranked if len(ranked) <= 2 * EACH else ranked[:EACH] + ranked[-EACH:]:
        real = [] if made.rows is None else [made.rows[i]]
        group = [made.pictures[i], *map(held.get, real), train.set.get(train.rows[int(nearest[i])])]
        pictures += [_fitted(picture, held.facts.size) for picture in group]
        texts += [*(held.captions[row] for row in real), "real" if real else "made", "nearest"]
    return write_image(path, contact_sheet(pictures, ACROSS * (2 + (made.rows is not None)), texts), exists="overwrite")


def _fitted(picture: np.ndarray, size: int) -> np.ndarray:
    """uint8 [H, W, 1 or 3] -> [size, size, 3]."""
    image = Image.fromarray(picture.repeat(3, 2) if picture.shape[2] == 1 else picture)
    return np.asarray(image if image.size == (size, size) else image.resize((size, size)))
