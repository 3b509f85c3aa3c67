import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from nexus.data import images, order, shards, split
from nexus.data.split import fraction, held_out

CONCEPTS = [f"concept {i}" for i in range(4000)]
STYLES = ("noto", "twemoji", "flat", "3d")


def test_shares():
    parts = Counter(held_out(c, s) for c in CONCEPTS for s in STYLES)
    total = len(CONCEPTS) * len(STYLES)
    # Four standard deviations; concepts count once each, pairs once each.
    assert abs(parts["concept"] / total - 0.05) < 4 * (0.05 * 0.95 / len(CONCEPTS)) ** 0.5
    rest = total - parts["concept"]
    assert abs(parts["pair"] / rest - 0.10) < 4 * (0.10 * 0.90 / rest) ** 0.5


def test_concept_is_held_out_in_every_style():
    for concept in CONCEPTS:
        parts = [held_out(concept, style) for style in STYLES]
        assert parts.count("concept") in (0, 4)


def test_pairs_are_independent_of_style():
    held = {s: {c for c in CONCEPTS if held_out(c, s) == "pair"} for s in STYLES}
    # About 38 of 3,800 concepts are held out in two given styles at once.
    assert 15 < len(held["noto"] & held["3d"]) < 65


@pytest.mark.parametrize("concept, style, part", [
    ("red apple", "noto", "train"), ("red apple", "flat", "pair"), ("red apple", "3d", "train"),
    ("rocket", "twemoji", "train"), ("panda", "noto", "concept"), ("panda", "3d", "concept"),
])
def test_pinned(concept, style, part):
    assert held_out(concept, style) == part


def test_emoji_counts_are_pinned():
    items = [item for item in shards.read("emoji")[1] if item["style"] in images.STYLES]
    parts = Counter(held_out(item["caption"], item["style"]) for item in items)
    assert parts == {"train": 5617, "pair": 625, "concept": 296}


def test_fraction_is_uniform_and_keys_do_not_run_together():
    values = np.array([fraction("x", str(i)) for i in range(5000)])
    assert values.min() >= 0 and values.max() < 1
    ranks = np.sort(values)
    assert np.abs(ranks - np.arange(5000) / 5000).max() < 1.95 / 5000**0.5  # Kolmogorov-Smirnov, p = 0.001
    assert fraction("ab", "c") != fraction("a", "bc") != fraction("abc")


def test_readers_cannot_run_code_from_data():
    for module in (images, order, shards, split):
        text = Path(module.__file__).read_text().replace("json.load(", "")
        assert not re.search(r"\b(pickle|eval\(|exec\(|load\(|extractall|print\()", text)
