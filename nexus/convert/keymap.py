"""Checkpoint key maps: one table of rows per public layout, read in either direction."""

import difflib
import re
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nexus.errors import ModelError


class Row(NamedTuple):
    """native <-> foreign; `*` stands for an index. Several foreign keys are concatenated on dim 0, in `ratio`.

    op: "" | "linear_to_conv" (foreign linear [O, I], native 1x1 convolution [O, I, 1, 1])
           | "conv_to_linear" (the reverse) | "conv1d_to_linear" (foreign kernel-1 convolution [O, I, 1])
           | "transpose" (foreign matrix [I, O]) | "matrix_to_conv" (the same, native 1x1 convolution [O, I, 1, 1])
           | "swap" (the two halves of dim 0 change places).
    heads: the foreign dim 0 is ordered (head, q/k/v, channel), the native one (q/k/v, head, channel);
           0 = the same.
    copies: foreign keys that repeat the same tensor (dropped on the way in after an equality check,
            written again on the way out); `*` in them is taken from 0 to the highest index in the checkpoint.
    """

    native: str
    foreign: str | tuple[str, ...]
    ratio: tuple[int, ...] = ()
    op: str = ""
    copies: tuple[str, ...] = ()
    heads: int = 0


@cache
def _regex(pattern: str) -> re.Pattern:
    return re.compile(re.escape(pattern).replace(r"\*", r"(\d+)"))


def _match(pattern: str, key: str) -> tuple[str, ...] | None:
    found = _regex(pattern).fullmatch(key)
    return found.groups() if found else None


def _fill(pattern: str, index: tuple[str, ...]) -> str:
    for i in index:
        pattern = pattern.replace("*", i, 1)
    return pattern


def foreign_keys(row: Row) -> tuple[str, ...]:
    """The foreign keys of a row, one or several."""
    return (row.foreign,) if isinstance(row.foreign, str) else row.foreign


def _swap(x: Tensor) -> Tensor:
    return torch.cat(x.chunk(2)[::-1])


_IN = {"": lambda x: x, "linear_to_conv": lambda x: x[..., None, None],
       "conv_to_linear": lambda x: x.flatten(1), "conv1d_to_linear": lambda x: x.flatten(1), "swap": _swap,
       "transpose": lambda x: x.T, "matrix_to_conv": lambda x: x.T[..., None, None]}
_OUT = {"": lambda x: x, "linear_to_conv": lambda x: x.flatten(1),
        "conv_to_linear": lambda x: x[..., None, None], "conv1d_to_linear": lambda x: x[..., None],
        "swap": _swap, "transpose": lambda x: x.T, "matrix_to_conv": lambda x: x.flatten(1).T}


def _regroup(x: Tensor, outer: int, inner: int) -> Tensor:
    """dim 0 ordered (outer, inner, rest) -> (inner, outer, rest); outer 0 = as it is."""
    return x.unflatten(0, (outer, inner, -1)).transpose(0, 1).flatten(0, 2) if outer else x


def to_native(table: list[Row], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Foreign state dict -> native. Every key is used exactly once; a left-over or missing one is a ModelError."""
    out = {}
    for key, row, names in parts_of(table, state):
        parts = len(foreign_keys(row))
        tensors = [_regroup(_IN[row.op](state[name]), row.heads, 3) for name in names[:parts]]
        out[key] = tensors[0] if parts == 1 else torch.cat(tensors)
        for copy in names[parts:]:
            if state[copy].device.type != "meta" and not torch.equal(state[copy], tensors[0]):
                raise ModelError(f"{copy} should repeat {names[0]}, but it differs")
    return out


def parts_of(table: list[Row], keys: Iterable[str]) -> list[tuple[str, Row, list[str]]]:
    """Each native key with its row and the foreign keys that it is made of, repeats last; raises as `to_native`."""
    left, out = dict.fromkeys(keys), []
    for row in table:
        parts = foreign_keys(row)
        for key in [k for k in left if _match(parts[0], k) is not None]:
            index = _match(parts[0], key)
            names = [_fill(p, index) for p in parts]
            if missing := [n for n in names if n not in left]:
                raise ModelError(f"the checkpoint has {key} but not {missing[0]}")
            if row.copies:
                names += _copies(row, index, left.keys() - set(names))
            for name in names:
                del left[name]
            out.append((_fill(row.native, index), row, names))
    if left:
        raise _surplus(table, left)
    return out


def _copies(row: Row, index: tuple[str, ...], left: Iterable[str]) -> list[str]:
    return [k for pattern in row.copies for k in sorted(left) if _match(_fill(pattern, index), k) is not None]


def _surplus(table: list[Row], left: Mapping[str, Any]) -> ModelError:
    key = min(left)
    near = difflib.get_close_matches(re.sub(r"\d+", "*", key), [foreign_keys(r)[0] for r in table], 1)
    return ModelError(f"{len(left)} keys of the checkpoint have no place in this layout, the first is {key}",
                      hint=f"the nearest known key is {near[0]}" if near else "is it a checkpoint of another system?")


def to_foreign(table: list[Row], state: Mapping[str, Tensor], *, copies: int = 0) -> dict[str, Tensor]:
    """Native state dict -> foreign: the same table, backwards. `copies` is how often each copied key is repeated."""
    out: dict[str, Tensor] = {}
    for key, tensor in state.items():
        row, index = next(((r, m) for r in table if (m := _match(r.native, key)) is not None), (None, ()))
        if row is None:
            raise ModelError(f"no row of the layout writes the native key {key}")
        parts = foreign_keys(row)
        tensor = _regroup(tensor, 3, row.heads) if row.heads else tensor
        ratio = row.ratio or (1,) * len(parts)
        unit = len(tensor) // sum(ratio) if len(parts) > 1 else 0
        split = tensor.split([unit * r for r in ratio]) if len(parts) > 1 else (tensor,)
        # Each file must own its bytes: a slice that shares storage cannot be saved.
        out |= {_fill(p, index): _OUT[row.op](t).contiguous() for p, t in zip(parts, split, strict=True)}
        for pattern in row.copies:
            out |= {_fill(pattern, (*index, str(i))): out[_fill(parts[0], index)].clone() for i in range(copies)}
    return out
