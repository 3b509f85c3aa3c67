"""Some steps of one side of a game."""

import torch

from nexus.phase import Phase
from nexus.rng import generator


def played(phase: Phase, batch: dict, *, steps: int, lr: float) -> list[float]:
    """The losses of steps of Adam on one batch, with draws of their own."""
    learning = [p for p in phase.module.parameters() if p.requires_grad]
    optimizer, losses = torch.optim.Adam(learning, lr, betas=(0.0, 0.99)), []
    for step in range(steps):
        loss = phase.loss(batch, generator(0, "game", step), step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses
