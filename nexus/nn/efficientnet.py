"""EfficientNet-lite as a frozen pyramid of features, its norms folded into the convolutions. Tan & Le 2019.

The lite variants (TensorFlow, March 2020) have no squeeze-and-excitation and ReLU6 for swish. The weights are a file
that `nexus convert --to efficientnet` makes of the public ones.
"""

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from nexus.errors import ModelError

# (kernel, stride, expansion, channels, repeats of lite0) of each group of blocks; the stem makes 32 channels.
GROUPS = ((3, 1, 1, 16, 1), (3, 2, 6, 24, 2), (5, 2, 6, 40, 2), (3, 2, 6, 80, 3), (5, 1, 6, 112, 3), (5, 2, 6, 192, 4),
          (3, 1, 6, 320, 1))
REPEATS = {"lite0": (1, 2, 2, 3, 3, 4, 1), "lite1": (1, 3, 3, 4, 4, 5, 1)}
STEM = 32
SEEN = (1, 2, 4, 6)                     # the groups whose results are a level of the pyramid: strides 4, 8, 16, 32
LEVELS = tuple(GROUPS[i][3] for i in SEEN)
MEAN, SPREAD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)     # of ImageNet, RGB in [0, 1]
MADE_BY = ("nexus convert efficientnet-lite1-77cc7160.pth FILE.safetensors --to efficientnet, then --set "
           "critic.weights=FILE.safetensors (a GAN) or features=FILE.safetensors (a codec)")


def same(x: Tensor, kernel: int, stride: int) -> Tensor:
    """x padded as TensorFlow's SAME does: the odd pixel at the right and the bottom."""
    pads = [max((-(-side // stride) - 1) * stride + kernel - side, 0) for side in (x.shape[3], x.shape[2])]
    return F.pad(x, [half for pad in pads for half in (pad // 2, pad - pad // 2)])


class Block(nn.Module):
    """Wider, a convolution of each channel by itself, narrower; added to x where the shape stays."""

    def __init__(self, before: int, after: int, kernel: int, stride: int, expansion: int):
        super().__init__()
        self.kernel, self.stride, self.keeps = kernel, stride, stride == 1 and before == after
        wide = before * expansion
        self.expand = nn.Conv2d(before, wide, 1) if expansion > 1 else None
        self.depthwise = nn.Conv2d(wide, wide, kernel, stride, groups=wide)
        self.project = nn.Conv2d(wide, after, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = x if self.expand is None else F.relu6(self.expand(x))
        h = F.relu6(self.depthwise(same(h, self.kernel, self.stride)))
        return x + self.project(h) if self.keeps else self.project(h)


class EfficientNet(nn.Module):
    """Frozen: pictures x [B, 3 or 1, H, W] in [-1, 1] -> maps of strides 4, 8, 16 and 32 with LEVELS channels.

    repeats: blocks of each group.
    """

    def __init__(self, repeats: tuple[int, ...] = REPEATS["lite1"]):
        super().__init__()
        self.stem = nn.Conv2d(3, STEM, 3, 2)
        self.groups, before = nn.ModuleList(), STEM
        for (kernel, stride, expansion, after, _), count in zip(GROUPS, repeats, strict=True):
            group = nn.ModuleList(Block(before if i == 0 else after, after, kernel, stride if i == 0 else 1, expansion)
                                  for i in range(count))
            self.groups.append(group)
            before = after
        self.register_buffer("mean", torch.tensor(MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("spread", torch.tensor(SPREAD).view(3, 1, 1), persistent=False)
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> list[Tensor]:
        """The pyramid, from the largest map to the smallest; gradients reach the pictures."""
        x = (x.float().expand(-1, 3, -1, -1) / 2 + 0.5 - self.mean) / self.spread
        h, maps = F.relu6(self.stem(same(x, 3, 2))), []
        for i, group in enumerate(self.groups):
            for block in group:
                h = block(h)
            if i in SEEN:
                maps.append(h)
        return maps


@lru_cache(maxsize=2)
def opened(file: str, device: torch.device) -> EfficientNet:
    """The network with the weights in `file`; ModelError when it is not there, or is not such a file."""
    if not Path(file).is_file():
        raise ModelError(f"there is no file of EfficientNet weights '{file}'" if file else
                         "no file of EfficientNet weights is named", hint=MADE_BY)
    try:
        with torch.inference_mode(False):           # a training may share what an evaluation opened
            state = load_file(file)
            net = EfficientNet(repeats_of(state))
            net.load_state_dict(state)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ModelError(f"{file} does not hold the weights of EfficientNet-lite: "
                         f"{str(error).splitlines()[-1].strip():.200}", hint=MADE_BY) from None
    return net.to(device, memory_format=torch.channels_last).eval()


def repeats_of(names) -> tuple[int, ...]:
    """Blocks of each group in a state with these keys."""
    return tuple(sum(f"groups.{i}.{j}.project.weight" in names for j in range(16)) for i in range(len(GROUPS)))
