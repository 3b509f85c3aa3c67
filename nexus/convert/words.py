"""Textual inversion files, taught to a loaded system."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from torch import nn

from nexus.convert.detect import opened, read
from nexus.requests import named_file
from nexus.text.inversion import check, word_of


def teach(system: nn.Module, entries: Sequence[str]) -> tuple:
    """Teach FILE[:WORD]s to a system's text encoders; returns what `dress` undoes it with.

    Raises InputError for a system that learns no words or a file that holds none of its, ModelError for a damaged one.
    """
    conditioner = system.conditioner
    before = getattr(conditioner, "extras", ())
    words = []
    for entry in entries:
        file, word = named_file(entry)
        check(conditioner, file)
        with opened(Path(file)) as (source,):
            words.append(word_of(read(source), word, file))
        words[-1].check(conditioner.widths())
    if words:
        conditioner.dress((*before, *words))
    return before


@contextlib.contextmanager
def taught(system: nn.Module, entries: Sequence[str]) -> Iterator[None]:
    """The system with these words while the block runs; raises as `teach` does."""
    before = teach(system, entries)
    try:
        yield
    finally:
        if entries:
            system.conditioner.dress(before)
