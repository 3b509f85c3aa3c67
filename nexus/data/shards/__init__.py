"""The embedded pictures and their reader; scripts/pack_data.py writes them, README.md is their data card."""

import io
import json
import tarfile
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from nexus.errors import InputError

FOLDER = Path(__file__).parent


@lru_cache(maxsize=2)
def read(name: str) -> tuple[np.ndarray, tuple[dict, ...]]:
    """All of "emoji" or "mnist" -> uint8 [N, H, W, C], read-only, and N notes (caption and style or split).

    A shard's .webp is a grid of equal cells, row by row; its .json says how many. Raises InputError if none
    is there.
    """
    pictures, items = [], []
    for path in sorted(FOLDER.glob(f"{name}-*.tar")):
        with tarfile.open(path, "r:") as tar:
            for member in sorted(n for n in tar.getnames() if n.endswith(".json")):
                note = json.load(tar.extractfile(member))
                webp = tar.extractfile(member.removesuffix("json") + "webp").read()
                grid = np.asarray(Image.open(io.BytesIO(webp), formats=["WEBP"]).convert("RGB"))
                (h, w), columns = note["cell"], note["columns"]
                cells = grid.reshape(-1, h, columns, w, 3).swapaxes(1, 2).reshape(-1, h, w, 3)
                pictures.append(cells[:len(note["items"]), ..., :note["channels"]])
                items += note["items"]
    if not items:
        raise InputError(f"the embedded set {name!r} is missing from {FOLDER}", hint="reinstall nexus")
    stack = np.concatenate(pictures)
    stack.setflags(write=False)
    return stack, tuple(items)


def groups() -> dict[str, str]:
    """Concept of the emoji -> its group ("food and drink")."""
    return json.loads((FOLDER / "emoji-groups.json").read_text(encoding="utf-8"))
