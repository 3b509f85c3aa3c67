"""What is held out of training: a fixed function of names, the same on every machine."""

import hashlib
from typing import Literal

from nexus.errors import InputError

SPLITS = ("train", "pair", "concept", "all")
WHOLE_BELOW = 20  # a user's set of fewer files is not split
CONCEPT_SHARE = 0.05  # of the concepts: never seen, in any style
PAIR_SHARE = 0.10  # of the remaining (concept, style) pairs: seen in other styles only


def fraction(*parts: str) -> float:
    """A fixed number in [0, 1) for these strings, uniform over strings (blake2b, no seed)."""
    # Each part is length-prefixed, so ("ab", "c") and ("a", "bc") are different keys.
    key = b"".join(len(p := part.encode()).to_bytes(8, "big") + p for part in parts)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest()[:6], "big") / 2**48


def held_out(concept: str, style: str) -> Literal["train", "pair", "concept"]:
    """The part of the data that this concept in this style belongs to."""
    if fraction("concept", concept) < CONCEPT_SHARE:
        return "concept"
    return "pair" if fraction("pair", concept, style) < PAIR_SHARE else "train"


def chosen(names: list[str], split: str, spec: str) -> list[int]:
    """Places of a user's files in this split: a hashed tenth is "pair", the rest "train"."""
    everything = list(range(len(names)))
    if split == "all" or len(names) < WHOLE_BELOW:
        return everything
    if split == "concept":
        raise InputError(f"{spec!r} has no 'concept' split", hint="use train, pair or all")
    ranks = [fraction("file", name) for name in names]
    bound = max(PAIR_SHARE, min(ranks) + 2**-48)  # at least one file, however the hash falls
    return [i for i in everything if (ranks[i] < bound) == (split == "pair")]
