"""What is dear to compute, kept in a folder part by part: each part is there whole, or made again."""

import contextlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from nexus.atomic import clean_temporary, write_bytes, write_text
from nexus.checkpoint import read_tensors, tensor_bytes
from nexus.errors import ModelError

FACTS = "facts.json"
Make = Callable[[int], list[Tensor]]        # the number of a part -> its tensors, a pure function of it
Watch = Callable[[int, int], None]


def unkept(count: int, make: Make, watch: Watch) -> list[Tensor]:
    """The tensors of `count` parts in order, kept nowhere."""
    made = []
    for number in range(count):
        made.extend(make(number))
        watch(number + 1, count)
    return made


class Shelf:
    """A folder of NNNNN.safetensors and a FACTS that says what they were made from.

    facts: everything that shapes the parts, as JSON data; parts of other facts are removed. rank, ranks: processes that
    share the folder, each of which makes every `ranks`-th part; meet: returns when all of them have called it.
    """

    def __init__(self, folder: Path, facts: dict, *, rank: int = 0, ranks: int = 1,
                 meet: Callable[[], None] = lambda: None):
        self.folder, self.facts, self.rank, self.ranks, self.meet = folder, facts, rank, ranks, meet

    def __call__(self, count: int, make: Make, watch: Watch) -> list[Tensor]:
        """The same as `unkept`, but what the folder holds is read. Raises OutputError when it cannot be written."""
        if self.rank == 0:
            self._begin()
        self.meet()
        ours: dict[int, list[Tensor]] = {}
        for number in range(self.rank, count, self.ranks):
            ours[number] = self._read(number) or self._made(number, make)
            watch(number + 1, count)
        self.meet()
        return [tensor for number in range(count)
                for tensor in ours.get(number) or self._read(number) or make(number)]

    def _made(self, number: int, make: Make) -> list[Tensor]:
        part = make(number)
        named = {f"{i:04d}": tensor for i, tensor in enumerate(part)}
        write_bytes(self._path(number), tensor_bytes(named), exists="overwrite")
        return part

    def _begin(self) -> None:
        path, stored = self.folder / FACTS, None
        with contextlib.suppress(OSError, ValueError):
            stored = json.loads(path.read_text("utf-8"))
        if stored != self.facts:
            shutil.rmtree(self.folder, ignore_errors=True)
            write_text(path, json.dumps(self.facts, indent=1, sort_keys=True) + "\n", exists="overwrite")
        clean_temporary(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:05d}.safetensors"

    def _read(self, number: int) -> list[Tensor]:
        """A part's tensors, none where there is nothing to read; copies, as what is read lies in the file itself."""
        try:
            return [tensor.clone() for _, tensor in sorted(read_tensors(self._path(number)).items())]
        except ModelError:
            return []
