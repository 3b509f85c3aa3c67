"""Which digit a picture shows, by a small network that comes with the package: how well a model follows its labels.

scripts/train_digits.py trains it on the embedded training digits and says how it reads the test ones.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.checkpoint import read_tensors
from nexus.data.images import DIGITS
from nexus.errors import ModelError
from nexus.evaluate.features import prepared
from nexus.evaluate.weights import sha256_of
from nexus.nn.gan_blocks import BatchNorm

WEIGHTS = Path(__file__).parent / "digits.safetensors"
SIDE = 28               # pixels
TOGETHER = 250


class DigitNet(nn.Module):
    """x [B, 1, 28, 28] in [0, 1], ink bright -> logits [B, 10]: three pairs of convolutions, the last map averaged."""

    def __init__(self, width: int = 16):
        super().__init__()
        ends = (1, width, width, 2 * width, 2 * width, 4 * width, 4 * width)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, 1, 1, bias=False) for a, b in zip(ends, ends[1:], strict=False))
        self.norms = nn.ModuleList(BatchNorm(b) for b in ends[1:])
        self.out = nn.Linear(4 * width, len(DIGITS))

    def forward(self, x: Tensor) -> Tensor:
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            x = F.relu(norm(conv(x)))
            if i in (1, 3):
                x = F.max_pool2d(x, 2)
        return self.out(F.dropout(x.mean((2, 3)), 0.3, self.training))


def open_reader(path: Path = WEIGHTS) -> DigitNet:
    """The trained network in eval mode; ModelError when its file is missing or damaged."""
    net = DigitNet()
    try:
        net.load_state_dict(read_tensors(path))
    except RuntimeError as error:
        raise ModelError(f"{path} does not hold the digit reader: {str(error).splitlines()[-1].strip():.200}",
                         hint="python scripts/train_digits.py") from None
    return net.eval()


@torch.inference_mode()
def read(net: DigitNet, pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures uint8 [H, W, C] of bright digits -> the class of each, [N] int64."""
    grey = torch.stack([prepared(picture, SIDE).mean(0, keepdim=True) for picture in pictures])
    return torch.cat([net(part).argmax(1) for part in grey.split(TOGETHER)])


def digit_hits(classes: tuple[str, ...], pictures: Sequence[np.ndarray], labels: Sequence[int]) -> Tensor | None:
    """Whether each picture shows the digit asked for: [N] of 0.0 and 1.0; None where the classes are no digits."""
    if classes != DIGITS:
        return None
    return (read(open_reader(), pictures) == torch.as_tensor(labels)).double()


def protocol() -> dict[str, str]:
    """What is to be known of the reader."""
    return {"digit_reader": WEIGHTS.name, "digit_reader_sha256": sha256_of(WEIGHTS)}
