"""Moving averages of the weights: the usual one, and EDM2's, whose length is chosen after training.

A power-function profile weighs the weights at step s by s^gamma; sigma_rel, its standard deviation as a share of the
steps so far, names it. From snapshots of two profiles any other is made. Karras et al. 2023, arXiv:2312.02696.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from nexus.checkpoint import read_description, read_tensors, save_model
from nexus.errors import ModelError, UsageError
from nexus.train.distributed import apart

WIDEST = 0.288          # sigma_rel of the even average (gamma = 0) is 12^-1/2


class EMA:
    """Float32 averages of a module's trained weights and buffers, by name; gamma: a power-function profile's."""

    def __init__(self, tensors: dict[str, Tensor], decay: float, *, warmup: bool = True, gamma: float | None = None):
        self.decay, self.warmup, self.gamma = decay, warmup, gamma
        self.average = {name: t.detach().clone() for name, t in tensors.items()}

    def decay_after(self, step: int) -> float:
        """The share of the old average that is kept. Warm-up: Tarvainen & Valpola 2017; profiles: Karras et al."""
        if self.gamma is not None:
            return (1 - 1 / step) ** (self.gamma + 1)
        return min(self.decay, (1 + step) / (10 + step)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, tensors: dict[str, Tensor], step: int) -> None:
        """Move towards `tensors` after the given number of finished steps."""
        decay = self.decay_after(step)
        floating = [n for n, t in tensors.items() if t.is_floating_point()]
        averages, now = (apart([named[n].detach() for n in floating]) for named in (self.average, tensors))
        for average, tensor in zip(averages, now, strict=True):
            torch._foreach_lerp_(average, tensor, 1 - decay)
        for name in tensors.keys() - set(floating):
            self.average[name].copy_(tensors[name])


@torch.no_grad()
def swap(module: nn.Module, average: dict[str, Tensor]) -> None:
    """Exchange a module's tensors with the averages in place; the same call again restores both."""
    state = module.state_dict()
    for name, value in average.items():
        kept = state[name].clone()
        state[name].copy_(value)
        value.copy_(kept)


def profiles(tensors: dict[str, Tensor], widths: tuple[float, ...]) -> dict[str, EMA]:
    """A power-function average for each sigma_rel, by its name in files."""
    return {f"{width:g}": EMA(tensors, 0.0, gamma=gamma_of(width)) for width in widths}


def gamma_of(sigma_rel: float) -> float:
    """The exponent of a profile: sigma_rel^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)). UsageError beyond."""
    if not 0 < sigma_rel <= WIDEST:
        raise UsageError(f"an EMA profile of {sigma_rel:g}", hint=f"above 0, at most {WIDEST}; EDM2 keeps 0.05 and 0.1")
    inverse = sigma_rel ** -2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


class Snapshot(NamedTuple):
    """One profile as it was after `step` steps. file: its tensors, or None for one that is sought."""

    step: int
    gamma: float
    file: Path | None = None


def overlap(a: Snapshot, b: Snapshot) -> float:
    """The inner product of two profiles, densities over the steps: the integral of their product."""
    short, power = min(a.step, b.step), a.gamma + b.gamma + 1
    log_scale = power * np.log(short) - (a.gamma + 1) * np.log(a.step) - (b.gamma + 1) * np.log(b.step)
    return (a.gamma + 1) * (b.gamma + 1) / power * float(np.exp(log_scale))


def coefficients(stored: list[Snapshot], sought: Snapshot) -> np.ndarray:
    """Weights [K] of the stored profiles whose sum is nearest to the sought one, in least squares (Karras et al.)."""
    gram = np.array([[overlap(a, b) for b in stored] for a in stored])
    return np.linalg.lstsq(gram, np.array([overlap(a, sought) for a in stored]), rcond=1e-12)[0]


def snapshot_file(run: Path, name: str, step: int) -> Path:
    """Where a profile's average after `step` steps is kept, for good."""
    return run / "profiles" / name / f"step-{step:07d}.safetensors"


def snapshots(run: Path) -> list[Snapshot]:
    """All snapshots of a run, oldest first; ModelError when it kept none."""
    files = sorted(run.glob("profiles/*/step-*.safetensors"), key=lambda f: (f.stem, f.parent.name))
    if not files:
        raise ModelError(f"{run} kept no EMA profiles", hint="train with --set train.ema_profiles=[0.05,0.1]")
    return [Snapshot(int(f.stem[5:]), gamma_of(float(f.parent.name)), f) for f in files]


def reconstruct(run: Path, sigma_rel: float, *, step: int | None = None) -> dict[str, Tensor]:
    """The weights of any profile after `step` steps (default: all) from a run's snapshots, read one at a time.

    Raises UsageError for a sigma_rel or step out of range, ModelError when there are no snapshots or one is damaged.
    """
    stored = snapshots(run)
    end = stored[-1].step if step is None else step
    stored = [s for s in stored if s.step <= end]
    if not stored or end > stored[-1].step:
        raise UsageError(f"step {end}: {run} has snapshots up to another step", hint="leave the step out for the last")
    total: dict[str, Tensor] = {}
    for snapshot, weight in zip(stored, coefficients(stored, Snapshot(end, gamma_of(sigma_rel))), strict=True):
        for name, value in read_tensors(snapshot.file).items():
            total[name] = total.get(name, 0) + weight * value.double() if value.is_floating_point() else value
    return {name: value.float() if value.is_floating_point() else value for name, value in total.items()}


def write_reconstruction(run: Path, out: Path, sigma_rel: float, *, step: int | None = None,
                         exists: str = "error") -> None:
    """`reconstruct` as a model folder that loads like any other; raises what it raises, and OutputError."""
    described = read_description(run)
    averaged = reconstruct(run, sigma_rel, step=step)
    save_model(out, described["system"], described["config"], averaged, exists=exists,
               facts={"ema_profile": sigma_rel} | ({} if step is None else {"trained_steps": step}))
