"""LPIPS: how unlike two pictures look to a network that names pictures. Zhang et al. 2018, arXiv:1801.03924.

Version 0.1 on VGG16. The weights are a file that `nexus convert --to lpips` makes of the two public ones.
"""

from functools import lru_cache
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nexus.errors import ModelError

STAGES = (2, 2, 3, 3, 3)                # convolutions before each pooling, VGG16: Simonyan & Zisserman 2014
MEAN, SPREAD = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)      # of ImageNet's colours, for pixels in [-1, 1]
TINY = 1e-10                            # keeps the directions of dark places finite
SIDE = 224                              # the released trainings enlarge smaller pictures to this
MADE_BY = "nexus convert vgg16-397923af.pth FILE.safetensors --to lpips --set heads=vgg.pth"
NEEDED = f"the lpips distance needs lpips=FILE, which `{MADE_BY}` makes"


class LPIPS(nn.Module):
    """Frozen: pictures x, y [B, 3 or 1, H, W] in [-1, 1] -> distances [B] >= 0, 0 for equal pictures.

    widths: channels of the five stages. pooling: "max" as published, "avg" as consistency models were trained with
    (their code asks piq for it).
    """

    def __init__(self, widths: tuple[int, ...] = (64, 128, 256, 512, 512), pooling: Literal["max", "avg"] = "max"):
        super().__init__()
        self.pool = F.max_pool2d if pooling == "max" else F.avg_pool2d
        before = (3, *widths[:-1])
        self.stages = nn.ModuleList(
            nn.ModuleList(nn.Conv2d(a if i == 0 else b, b, 3, 1, 1) for i in range(count))
            for a, b, count in zip(before, widths, STAGES, strict=True))
        self.heads = nn.ModuleList(nn.Conv2d(width, 1, 1, bias=False) for width in widths)
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(SPREAD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The distances; gradients reach both pictures."""
        far = x.new_zeros(len(x), dtype=torch.float32)
        for head, a, b in zip(self.heads, self.seen(x), self.seen(y), strict=True):
            far = far + head((a - b).square()).mean((1, 2, 3))
        return far

    def seen(self, x: Tensor) -> list[Tensor]:
        """The activations of each stage, of length 1 along the channels."""
        h, maps = (x.float().expand(-1, 3, -1, -1) - self.mean) / self.spread, []
        for i, stage in enumerate(self.stages):
            h = self.pool(h, 2) if i else h
            for conv in stage:
                h = F.relu(conv(h))
            maps.append(h / (h.square().sum(1, keepdim=True).sqrt() + TINY))
        return maps


def enlarged(x: Tensor, side: int = SIDE) -> Tensor:
    """x [B, C, H, W] at `side` pixels, bilinear, where it is smaller."""
    return x if min(x.shape[2:]) >= side else F.interpolate(x, (side, side), mode="bilinear", align_corners=False)


@lru_cache(maxsize=4)
def opened(file: str, device: torch.device, pooling: Literal["max", "avg"] = "max") -> LPIPS:
    """The network with the weights in `file`; ModelError when it is not there, or is not such a file."""
    if not Path(file).is_file():
        raise ModelError(f"there is no file of LPIPS weights {file}", hint=MADE_BY)
    try:
        with torch.inference_mode(False):           # a training may share what an evaluation opened
            state = load_file(file)
            net = LPIPS(tuple(len(state[f"stages.{i}.0.weight"]) for i in range(len(STAGES))), pooling)
            net.load_state_dict(state)
            return net.to(device).eval()
    except (SafetensorError, OSError, KeyError, RuntimeError) as error:
        raise ModelError(f"{file} does not hold the weights of LPIPS: {str(error).splitlines()[-1].strip():.200}",
                         hint=MADE_BY) from None
