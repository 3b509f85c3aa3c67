"""Ours against a peer: the same weights, dtype and threads, interleaved in one process, medians of several rounds."""

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

from nexus.nn.precision import has_bfloat16

ROUNDS = 7
# A processor that only emulates bfloat16 is not measured in it: nobody would use it so.
DTYPES = (torch.float32, torch.bfloat16) if has_bfloat16(torch.device("cpu")) else (torch.float32,)


class Result(NamedTuple):
    """seconds of both (medians), the ratio peer / ours with its range over rounds, and what ours reaches."""

    name: str
    dtype: str
    ours: float
    peer: float
    low: float
    high: float
    gflops: float
    difference: float

    @property
    def ratio(self) -> float:
        """How many times faster ours is."""
        return self.peer / self.ours


def compare(name: str, dtype: torch.dtype, ours: Callable[[], torch.Tensor],
            peer: Callable[[], torch.Tensor]) -> Result:
    """Time two functions that give the same tensor; the difference is relative to the peer's largest value."""
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counted:
            mine = ours()
        theirs = peer()
        difference = float((mine.float() - theirs.float()).abs().max() / theirs.float().abs().max())
        rows = [(_seconds(ours), _seconds(peer)) for _ in range(ROUNDS)]
    a, b = (statistics.median(column) for column in zip(*rows, strict=True))
    each = [p / o for o, p in rows]
    return Result(name, str(dtype).removeprefix("torch."), a, b, min(each), max(each),
                  counted.get_total_flops() / a / 1e9, difference)


def _seconds(function: Callable) -> float:
    begun = time.perf_counter()
    function()
    return time.perf_counter() - begun


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    head = "| case | dtype | ours s | peer s | ratio (range) | GFLOP/s | difference |\n|---|---|---|---|---|---|---|"
    return "\n".join([head, *(
        f"| {r.name} | {r.dtype} | {r.ours:.4g} | {r.peer:.4g} | {r.ratio:.2f} ({r.low:.2f}-{r.high:.2f}) "
        f"| {r.gflops:.0f} | {r.difference:.1e} |" for r in results)])
