"""Two ranks under the real torchrun: DDP and FSDP2 take the same steps, and both resume."""

import os
import subprocess
import sys
from pathlib import Path

import torch

from nexus.checkpoint import read_tensors

LAST = "step-0000004"


def trained(data: Path, run: Path, sharding: str, steps: int, system: str = "dit",
            preset: str = "tiny") -> dict[str, torch.Tensor]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "-m", "--",
               "nexus_cli", "train", system, "--preset", preset, "--data", str(data), "--run", str(run),
               "--steps", str(steps), "--save-every", "2", "--set", f"train.sharding={sharding}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.split() == [str(run)]        # one rank speaks
    return read_tensors(sorted(run.glob("step-*"))[-1] / "model.safetensors")


def test_both_kinds_take_the_same_steps_and_resume(pictures, tmp_path):
    uncut = trained(pictures, tmp_path / "uncut", "ddp", 4)
    for sharding in ("ddp", "fsdp2"):
        run = tmp_path / sharding
        trained(pictures, run, sharding, 2)
        resumed = trained(pictures, run, sharding, 4)
        assert (run / LAST).is_dir()
        assert max((resumed[n] - t).abs().max().item() for n, t in uncut.items()) <= (0 if sharding == "ddp" else 1e-6)


def test_what_is_cut_and_what_is_whole_are_clipped_together(pictures, tmp_path):
    """A network over both ranks and a text encoder on each."""
    ddp, fsdp = (trained(pictures, tmp_path / kind, kind, 2, "conditional", "tiny-text") for kind in ("ddp", "fsdp2"))
    assert any(name.startswith("conditioner.") for name in ddp)
    assert max((fsdp[n] - t).abs().max().item() for n, t in ddp.items()) <= 1e-6


def test_what_each_rank_keeps_for_itself_is_resumed_by_it(pictures, tmp_path):
    """CycleGAN's pools of earlier pictures: a run that was cut ends in the bytes of one that was not."""
    data = f"{pictures},{pictures}"
    trained(data, tmp_path / "uncut", "ddp", 4, "cyclegan")
    for steps in (2, 4):
        trained(data, tmp_path / "cut", "ddp", steps, "cyclegan")
    whole, cut = (tmp_path / name / LAST for name in ("uncut", "cut"))
    kept = read_tensors(whole / "train/rank-1.safetensors")
    assert any(name.startswith("pools.") for name in kept)
    files = sorted(file.relative_to(whole) for file in whole.rglob("*.safetensors"))
    assert len(files) >= 4 and all((whole / file).read_bytes() == (cut / file).read_bytes() for file in files)
