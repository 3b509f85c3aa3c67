"""A child that trains and kills itself with SIGKILL at a chosen turn of a chosen phase."""

import os
import signal
from pathlib import Path

import torch


def train_until(system: str, data: str, run: str, preset: str, flags: dict, phase: str, turn: int) -> None:
    """Die before the `turn`-th loss of the phase is computed, after everything before it was."""
    torch.set_num_threads(1)
    from nexus import catalog
    from nexus.train import state as states
    from nexus.train.start import train
    seen = [0]
    made = states.new_state

    def wrapped(name, built, args):
        found = made(name, built, args)

        def dying(loss):
            def counted(batch, rng, step):
                seen[0] += 1
                if seen[0] == turn:
                    os.kill(os.getpid(), signal.SIGKILL)
                return loss(batch, rng, step)
            return counted
        found.phases = tuple(p._replace(loss=dying(p.loss)) if p.name == phase else p for p in found.phases)
        return found
    catalog.entry(system)
    import nexus.train.start as start
    start.new_state = wrapped
    train(system, data=data, run=Path(run), preset=preset, flags=flags, device="cpu")
