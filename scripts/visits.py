"""Search the levels that a consistency model visits: `python scripts/visits.py consistency --steps 2 --count 300`.

Song et al. 2023, section 4: the levels of a run of several steps are found one after another, each by ternary search
for the least distance from real pictures, which takes that distance to fall and then to rise. Prints every distance
(kernel distance on held-out pairs), then the levels, as the model's config.json holds them.
"""

import argparse
from collections.abc import Callable
from functools import cache

from torch import nn

from nexus import api, checkpoint
from nexus.evaluate.run import from_system
from nexus.requests import SampleRequest

BATCH = 8


def least(distance: Callable[[int], float], low: int, high: int) -> int:
    """The integer in low..high with the least distance, where that falls and then rises; by thirds."""
    while high - low > 2:
        third = (high - low) // 3
        left, right = low + third, high - third
        if distance(left) <= distance(right):
            high = right - 1
        else:
            low = left + 1
    return min(range(low, high + 1), key=distance)


def measured(system: nn.Module, model: str, data: str, visits: tuple[int, ...], count: int) -> float:
    """The kernel distance of `count` pictures of runs that visit these levels."""
    path = system.config.path.model_copy(update={"visits": visits})
    system.config = system.config.model_copy(update={"path": path})
    made = from_system(system, SampleRequest(steps=len(visits)), BATCH)
    value = api.evaluate(model, data=data, count=count, steps=len(visits), generate=made)["numbers"]["kid"]["value"]
    print(",".join(map(str, visits)), f"{value:.4f}", flush=True)
    return value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", metavar="MODEL")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--data", default="emoji")
    options = parser.parse_args()
    system = checkpoint.load(options.model, device="auto")
    points = system.config.path.points
    if not 2 <= options.steps <= points:
        parser.error(f"--steps {options.steps}: expected 2 to {points}, the levels of {options.model}")
    visits: tuple[int, ...] = (0,)
    while len(visits) < options.steps:
        @cache
        def distance(level: int, before: tuple[int, ...] = visits) -> float:
            return measured(system, options.model, options.data, (*before, level), options.count)
        visits = (*visits, least(distance, visits[-1] + 1, points - options.steps + len(visits)))
    print(f'"visits": {list(visits)}')


if __name__ == "__main__":
    main()
