"""What generated pictures are judged by: real held-out ones, and a probe that has read real training ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from nexus.data.images import ImageSet, open_images
from nexus.data.order import permutation
from nexus.evaluate import captions, sets
from nexus.evaluate.bootstrap import DRAWS
from nexus.evaluate.features import Extractor, cached_features

MOST_REAL = 2000        # held-out pictures that are looked at: a first look takes some 15 ms a picture and core
MOST_TRAIN = 6000       # training pictures
KID = "polynomial of degree 3, unbiased, all pairs"
Watch = Callable[[int, int], Any]


class Settings(NamedTuple):
    """What all of an evaluation shares; extractor: None = the usual one of what is judged; lpips: its weights' file."""

    split: str
    count: int | None
    seed: int
    extractor: str | None
    device: str
    sheet: str | Path | None
    watch: Watch
    lpips: str | None = None


class Seen(NamedTuple):
    """Real pictures that were looked at: features [N, D] of the places `rows` [N] of a set."""

    set: ImageSet
    rows: list[int]
    features: Tensor

    def labels(self) -> Tensor:
        """[N] int64."""
        return torch.from_numpy(self.set.labels)[self.rows]

    def styles(self) -> Tensor:
        """[N] int64."""
        return torch.from_numpy(self.set.style_ids)[self.rows]


class Judge(NamedTuple):
    """probe: None where captions cannot be read, or need not be."""

    extractor: Extractor
    held: Seen
    train: Seen
    probe: captions.Probe | None


class Made(NamedTuple):
    """Pictures to judge; rows: the place in the held-out set of what each was asked to show, None when not asked."""

    pictures: list[np.ndarray]
    rows: list[int] | None


def order(n: int, count: int, seed: int) -> list[int]:
    """`count` places of range(n) in a fixed random order, and once more in it when there are more than n."""
    places = permutation(n, seed, 0)
    return [int(places[i % n]) for i in range(count)]


def prepare(held: ImageSet, data: str, extractor: Extractor, *, reads: bool, seed: int, watch: Watch) -> Judge:
    """Look at the real pictures of `data`, held out and training; reads: captions and styles are wanted too."""
    size, channels = held.facts.size, held.facts.channels
    seen = _look(held, MOST_REAL, extractor, seed, watch)
    train = _look(open_images(data, split="train", size=size, channels=channels), MOST_TRAIN, extractor, seed, watch)
    if not reads or len(held.facts.classes) < 2:
        return Judge(extractor, seen, train, None)
    texts = captions.embed_texts(list(held.facts.classes))
    return Judge(extractor, seen, train, captions.fit(train.features, train.labels(), train.styles(), texts))


def _look(pictures: ImageSet, most: int, extractor: Extractor, seed: int, watch: Watch) -> Seen:
    rows = sorted(order(len(pictures), min(len(pictures), most), seed))
    return Seen(pictures, rows, cached_features(extractor, [pictures.get(i) for i in rows], watch))


def numbers(judge: Judge, made: Made, x: Tensor, seed: int) -> sets.Numbers:
    """All numbers on generated pictures with features x [N, D], and those of real pictures beside them."""
    held = judge.held
    found = sets.compare(held.features, x, seed)
    found |= sets.near_copies(judge.train.features, held.features, x, seed)
    if judge.probe is not None and made.rows is not None:
        place = {row: at for at, row in enumerate(held.rows)}
        asked = [place[row] for row in made.rows if row in place]
        labels, styles = torch.from_numpy(held.set.labels), torch.from_numpy(held.set.style_ids)
        found |= sets.beside_real(
            sets.read_by(judge.probe, x, labels[made.rows], styles[made.rows], seed),
            sets.read_by(judge.probe, held.features[asked], held.labels()[asked], held.styles()[asked], seed))
    return found | sets.yardstick(held.features, held.styles(), held.set.facts.styles, seed)


def protocol(judge: Judge, made: Made) -> dict:
    """What the numbers hold for."""
    facts = {"made": len(made.pictures), "real": len(judge.held.rows), "training": len(judge.train.rows),
             **looked_at_with(judge.extractor), "kid": KID,
             "interval": f"95 %: jackknife (kid), bootstrap over pictures with {DRAWS} draws (the others)"}
    if judge.held.set.facts.digest == judge.train.set.facts.digest:
        facts["trained_on"] = "all that it is compared with: so small a set is not split"
    if judge.probe is None or made.rows is None:
        return facts
    return facts | {"captions": "ridge from the features to MiniLM text, fitted on the training pictures; "
                                f"the nearest of {len(judge.probe.texts)} by cosine"}


def looked_at_with(e: Extractor) -> dict:
    """What is to be known of the features."""
    return {"extractor": e.name, "extractor_sha256": e.digest, "extractor_device": e.device.type,
            "resize": f"to {e.size} px, bilinear, antialiased" if e.size else "by the extractor"}
