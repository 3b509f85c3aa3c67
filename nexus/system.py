"""The contract between a system and everything that trains, samples, converts or evaluates it."""

from collections.abc import Callable
from typing import Any, Protocol

from torch import nn

from nexus.config import Config
from nexus.media import Media
from nexus.phase import Phase
from nexus.requests import SampleRequest


class System(Protocol):
    """An nn.Module with a `net`, built by its Config.

    config: what built it. external: {submodule name: model reference} for parts whose weights live in a checkpoint of
    their own (the shared codec); they are frozen, and neither saved nor trained. A system may also have training_only:
    names of submodules that sampling never needs (a teacher, a target network), which a loaded model lacks; and
    admit(part, system), which raises ModelError when what an external part was taken from does not fit;
    prepare_data(images, run, seed=, draws=, part=, watch=), which makes what it trains on in place of the pictures, in
    the run folder, enough for so many draws, and returns a function that opens it (or None: there is nothing to make);
    measures(seed), numbers that `nexus eval` adds; and, if it makes one picture of another, translate(x, direction) and
    the `directions` it knows.
    """

    config: Config
    net: nn.Module
    external: dict[str, str]

    def phases(self) -> tuple[Phase, ...]:
        """What is trained, in order."""
        ...

    def check(self, request: SampleRequest) -> None:
        """UsageError or InputError for what `generate` would refuse, as far as that shows without weights.

        It is also asked of a system on the meta device: before weights are read, and by --dry-run.
        """
        ...

    def generate(self, request: SampleRequest, *, seeds: list[int], watch: Callable[..., Any] | None = None) -> Media:
        """One item a seed; item i depends on seeds[i] and the request alone. watch(step, steps, x0) sees progress."""
        ...
