"""Pairs (noise, what a flow makes of it) on disk: written shard by shard, each whole or not there.

A folder holds pairs.json, which says how they were made and how many a file has, and pairs-NNNNN.safetensors with
"noise" and "latent" [n, C, H, W] float32 and "index" [n] int64, the picture whose labels a pair has. B = a batch.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from nexus.atomic import clean_temporary, write_bytes, write_text
from nexus.errors import InputError

SHARD = 256             # pairs in a file: what a kill can cost
FORMAT = "nexus-pairs/1"
FACTS = "pairs.json"


def shard_name(number: int) -> str:
    """The file of a shard."""
    return f"pairs-{number:05d}.safetensors"


def write_pairs(folder: Path, count: int, make: Callable[[list[int]], dict[str, Tensor]], facts: dict, *,
                part: tuple[int, int] = (0, 1), watch: Callable[[int, int], Any] = lambda done, total: None) -> None:
    """Make what is missing of `count` pairs; make(numbers) -> the tensors of a shard, a pure function of them.

    facts: everything that shapes the pairs but their number, as JSON data. part (i, n): make every n-th shard from the
    i-th on, so that n processes share the work. Raises InputError when the folder holds pairs of other facts,
    OutputError when it cannot be written.
    """
    described = {"format": FORMAT, "count": count, "shard": SHARD, **facts}
    stored = read_facts(folder) if (folder / FACTS).exists() else None
    different = stored and sorted(k for k in {*stored, *described} - {"count"} if stored.get(k) != described.get(k))
    if different:
        raise InputError(f"{folder} holds pairs made with another {different[0]}",
                         hint="choose another --run, or remove the folder")
    if part[0] == 0 and stored != described:
        write_text(folder / FACTS, json.dumps(described, indent=1, sort_keys=True) + "\n", exists="overwrite")
    if part[0] == 0 and folder.is_dir():
        clean_temporary(folder)
    shards = -(-count // SHARD)
    for number in range(part[0], shards, part[1]):
        path = folder / shard_name(number)
        numbers = list(range(number * SHARD, min((number + 1) * SHARD, count)))
        if _rows_of(path) < len(numbers):
            tensors = {name: t.detach().cpu().contiguous() for name, t in sorted(make(numbers).items())}
            write_bytes(path, save(tensors), exists="overwrite")
        watch(numbers[-1] + 1, count)


def _rows_of(path: Path) -> int:
    """Pairs in a shard, which was the last and short if there are fewer than SHARD; 0 where there is none to read."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_slice("noise").get_shape()[0]
    except (SafetensorError, OSError):
        return 0


def read_facts(folder: Path) -> dict:
    """What pairs.json says; InputError when there is none, or it is damaged."""
    try:
        found = json.loads((folder / FACTS).read_text("utf-8"))
        return {**found, "count": int(found["count"]), "shard": max(1, int(found["shard"]))}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise InputError(f"{folder} holds no pairs", hint=f"a folder of pairs has a {FACTS}: a run's folder pairs/"
                         ) from None


class PairSet:
    """Batches of pairs: "noise" and "latent" [B, C, H, W] float32, with the labels of the pictures `images`.

    Raises InputError when a shard is missing.
    """

    def __init__(self, folder: Path, images: Any):
        self.folder, self.images, self.facts = folder, images, read_facts(folder)
        self._size = self.facts["shard"]
        missing = [n for i in range(-(-len(self) // self._size)) if not (folder / (n := shard_name(i))).exists()]
        if missing:
            raise InputError(f"{folder} lacks {missing[0]} ({len(missing)} shards in all)",
                             hint="run the command that made it again: it goes on")

    def __len__(self) -> int:
        return self.facts["count"]

    def batch(self, indices: list[int], rng: torch.Generator | None = None) -> dict:
        """Some pairs, in this order; nothing is drawn."""
        rows: dict[int, dict[str, Tensor]] = {}
        for shard in sorted({i // self._size for i in indices}):
            rows |= self._rows(shard, [i for i in indices if i // self._size == shard])
        batch = {name: torch.stack([rows[i][name] for i in indices]) for name in ("noise", "latent", "index")}
        pictures = batch.pop("index").tolist()
        return {**batch, **self.images.labels_of(pictures)}

    def _rows(self, shard: int, indices: list[int]) -> dict[int, dict[str, Tensor]]:
        path = self.folder / shard_name(shard)
        try:
            with safe_open(path, "pt") as file:
                parts = {name: file.get_slice(name) for name in ("noise", "latent", "index")}
                places = {i: i % self._size for i in indices}
                return {i: {name: part[j:j + 1][0] for name, part in parts.items()} for i, j in places.items()}
        except (SafetensorError, OSError, RuntimeError, ValueError, IndexError) as error:
            raise InputError(f"{path} is damaged: {error}", hint="remove it and run the same command again") from None


def fingerprint(module: nn.Module) -> str:
    """sha256 of all weights of a network, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
