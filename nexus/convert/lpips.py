"""The weights of LPIPS as one safetensors file, of what its authors published.

That is torchvision's VGG16 (`vgg16-397923af.pth`: "features.N.weight" for 13 convolutions, and a classifier, which is
left out) with the heads beside it (`--set heads=vgg.pth`, of lpips/weights/v0.1: "lin0.model.1.weight" to "lin4..."),
or the state of the whole module ("net.slice1.N.weight", "lin0...."), as lpips and taming-transformers save it.
"""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from nexus.convert.convert import Report, scratch
from nexus.convert.detect import opened
from nexus.convert.export import Target, check_file, write_file
from nexus.convert.stream import Lazy, misshapen, numbers, stored
from nexus.errors import UsageError
from nexus.losses.lpips import LPIPS, STAGES

NAME = "lpips"
CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)     # their places in torchvision's `features`
_PLACE = re.compile(r"(?:features|net\.slice[1-5])\.(\d+)\.(weight|bias)")
_HEAD = re.compile(r"lin([0-4])\.model\.1\.weight")


def convert(src: Path, target: Target, *, check: bool, overrides: Sequence[str]) -> Report:
    """Write the file, or with `check` only look. Raises ModelError, UsageError and OutputError as `nexus convert`."""
    if not check:
        check_file(target, "the weights of LPIPS")
    given = dict(each.partition("=")[::2] for each in overrides)
    if surplus := given.keys() - {"heads"}:
        raise UsageError(f"--set {min(surplus)}: LPIPS has no such setting", hint="heads=FILE is the only one")
    with ExitStack() as stack:
        files = [stack.enter_context(opened(path, scratch(target.path, check)))[0]
                 for path in (src, *map(Path, given.values()))]
        public = stored({key: (t.file, t.key) for file in files for key, t in file.tensors.items()})
        found = {name: lazy for key, lazy in public.items() if (name := _native(key))}
        report = Report(src, None if check else target.path, NAME, NAME, {}, len(found), numbers(found.values()),
                        tuple(sorted(key for key in public if not _native(key))), problems=_problems(found))
        if not report.refused(check) and not check:
            write_file(target, found)
    return report


def _native(key: str) -> str | None:
    if head := _HEAD.fullmatch(key):
        return f"heads.{head[1]}.weight"
    place = _PLACE.fullmatch(key)
    if place is None or int(place[1]) not in CONVOLUTIONS:
        return None
    index, stage = CONVOLUTIONS.index(int(place[1])), 0
    while index >= STAGES[stage]:
        index, stage = index - STAGES[stage], stage + 1
    return f"stages.{stage}.{index}.{place[2]}"


def _problems(found: dict[str, Lazy]) -> tuple[str, ...]:
    """What is missing or has another shape, a line each."""
    widths = [found[name].shape[0] if (name := f"stages.{i}.0.weight") in found else 1 for i in range(len(STAGES))]
    with torch.device("meta"):
        wanted = LPIPS(tuple(widths)).state_dict()
    missing = sorted(wanted.keys() - found.keys())
    if missing and all(name.startswith("heads.") for name in missing):
        return ("the heads of LPIPS are missing: give them with --set heads=FILE (lpips/weights/v0.1/vgg.pth)",)
    if missing:
        return tuple(f"{name} is missing: this is no VGG16" for name in missing)
    return misshapen(found, wanted)
