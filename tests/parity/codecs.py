"""What the parity tests of both picture codecs share: diffusers' model, its folder, and ours converted from it."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from nexus import checkpoint
from nexus.convert.convert import convert

WEIGHTS = "diffusion_pytorch_model.safetensors"


def near(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool((ours - theirs).abs().max() <= 1e-4 * max(1.0, theirs.abs().max().item()))


def diffusers_codec(name: str, fields: dict):
    """A random model of diffusers' class of this name."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    return getattr(diffusers, name)(**blocks(len(fields["block_out_channels"])) | fields).eval()


def blocks(levels: int, attention: tuple[int, ...] = ()) -> dict:
    """The kinds of blocks of diffusers' codecs, of which some levels attend."""
    attends = [i in attention for i in range(levels)]
    return {"down_block_types": ["AttnDownEncoderBlock2D" if a else "DownEncoderBlock2D" for a in attends],
            "up_block_types": ["AttnUpDecoderBlock2D" if a else "UpDecoderBlock2D" for a in reversed(attends)]}


def with_ours(model, folder: Path):
    """(diffusers' model, its folder, the native system converted from it)."""
    model.save_pretrained(folder / "theirs")
    convert(folder / "theirs", folder / "ours")
    return model, folder, checkpoint.load(str(folder / "ours"))


def assert_same_weights_back(folder: Path) -> None:
    """Written as diffusers' again, the weights are bit for bit what they were."""
    convert(folder / "ours", folder / "back", to="diffusers")
    before, after = (load_file(folder / name / WEIGHTS) for name in ("theirs", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
