"""The readable files of a user's set: read once when it is opened, and kept while there is room."""

import hashlib
import json
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Self

import numpy as np

from nexus.data.folders import Found
from nexus.errors import InputError

Check = Callable[[Found], tuple[np.ndarray | None, str]]


class Files(NamedTuple):
    """Files in the order of their names, what each holds (None where it was too much to keep), and their sha256."""

    found: list[Found]
    kept: list[np.ndarray | None]
    digests: list[str]
    check: Check

    @classmethod
    def opened(cls, found: list[Found], skipped: list[tuple[str, str]], check: Check, keep: int) -> Self:
        """Those that can be read; the others are added to `skipped`.

        check: a file -> (what it holds, the sha256 of its bytes), or (None, why it cannot be used). keep: bytes.
        """
        found.sort()  # the set must not depend on the order in which a disk or tar lists it
        files, room = cls([], [], [], check), keep
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for file, (held, outcome) in zip(found, pool.map(check, found), strict=True):
                if held is None:
                    skipped.append((file.name, outcome))
                    continue
                for column, value in zip(files[:3], (file, held if room > 0 else None, outcome), strict=True):
                    column.append(value)
                room -= held.nbytes
        return files

    def part(self, places: list[int]) -> Self:
        """Some of them."""
        return type(self)(*([column[i] for i in places] for column in self[:3]), self.check)

    def digest(self) -> str:
        """sha256 over names, captions and bytes."""
        digest = hashlib.sha256()
        for file, outcome in zip(self.found, self.digests, strict=True):
            digest.update(json.dumps([*file[:4], outcome]).encode())
        return digest.hexdigest()

    def get(self, i: int) -> np.ndarray:
        """What file i holds; InputError if it has changed or gone since it was opened."""
        if self.kept[i] is not None:
            return self.kept[i]
        held, outcome = self.check(self.found[i])
        if held is None or outcome != self.digests[i]:
            reason = outcome if held is None else "its bytes changed"
            raise InputError(f"{self.found[i].name!r} is not what it was when the set was opened: {reason}",
                             hint="keep the data set unchanged while a run reads it")
        return held


def nothing_usable(what: str, spec: str, formats: str, skipped: list[tuple[str, str]]) -> InputError:
    """The error of a set without a readable file."""
    first = f"; the first of {len(skipped)} skipped: {skipped[0][0]}: {skipped[0][1]}" if skipped else ""
    return InputError(f"no usable {what} in {spec!r}, expected {formats} files{first}",
                      hint=f"point to a folder of {what}s, or a plain .tar of pairs with captions in .txt files")
