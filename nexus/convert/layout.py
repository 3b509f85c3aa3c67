"""What a public checkpoint layout is: how to know it, its configuration and its key table."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from nexus.convert.keymap import Row
from nexus.errors import ModelError

Shapes = Mapping[str, tuple[int, ...]]
UNREADABLE = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError)


class Layout(NamedTuple):
    """One public layout of one system, in both directions. Each `layouts/<name>.py` has a tuple `LAYOUTS` of these.

    name: what `--to` takes, for example "original" or "diffusers". system: catalog name. part: the submodule of the
    system that the rows' native keys are relative to ("net", "codec").
    matches(shapes, foreign_config) tells whether a checkpoint is of this layout; foreign_config is the folder's
    config.json, or None for a single file. config(shapes, foreign_config) -> the native Config as JSON data.
    table(config) -> rows. foreign_config(config) -> the folder's
    config.json, or None when the layout is a single file. file: the weights' name in the folder.
    copies(config) -> how often copied keys are repeated. drop: foreign keys (patterns) that carry no information.
    constants(config) -> foreign keys computed from the configuration: compared on the way in, written on the way out.
    auto: whether its keys tell it; False: another layout has the same ones, so this one is read only by its name.
    unsaid(shapes, foreign_config) -> dotted settings the checkpoint does not tell; `config` holds the usual value,
    or None where there is no usual one and the user has to say. fixed: dotted settings of the network for which its
    own readers have one value: named on the way out where the model has another.
    """

    name: str
    system: str
    part: str
    matches: Callable[[Shapes, dict | None], bool]
    config: Callable[[Shapes, dict | None], dict]
    table: Callable[[dict], list[Row]]
    foreign_config: Callable[[dict], dict] | None = None
    file: str = "diffusion_pytorch_model.safetensors"
    copies: Callable[[dict], int] = lambda config: 0
    drop: tuple[str, ...] = ()
    constants: Callable[[dict], dict[str, Tensor]] = lambda config: {}
    unsaid: Callable[[Shapes, dict | None], tuple[str, ...]] = lambda shapes, foreign: ()
    fixed: tuple[str, ...] = ()
    auto: bool = True


def native_config(layout: Layout, shapes: Shapes, foreign: dict | None, path: Path) -> dict:
    """A copy of layout.config(shapes, foreign); ModelError naming `path` where those do not describe such a model."""
    try:
        return copy.deepcopy(layout.config(shapes, foreign))            # it may share the layout's own
    except UNREADABLE as error:
        said = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise ModelError(f"{path} does not describe a model of {layout.system}/{layout.name}: {said}",
                         hint="fetch it again, with the config.json that belongs to it") from error
