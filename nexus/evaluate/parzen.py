"""How likely real pictures are under a Parzen window of generated ones: for models that only make pictures.

Breuleux, Bengio & Vincent 2011; used for GANs by Goodfellow et al. 2014, section 5, arXiv:1406.2661. The estimate is
poor in many dimensions (Theis et al. 2016): it serves to compare with published figures.
"""

import math

import torch
from torch import Tensor

WINDOWS = 10_000                                            # generated pictures
VALID = 1000                                                # real training pictures, by which the width is chosen
WIDTHS = torch.logspace(-1, 0, 10, dtype=torch.float64)     # of pixels in [0, 1]
ROWS = 256                                                  # pictures that are compared with all windows at once


def nats(real: Tensor, made: Tensor, valid: Tensor) -> tuple[Tensor, float]:
    """log P(picture) [N] in nats, float64, and the width of the windows, the best of WIDTHS for `valid`.

    real [N, ...], made [M, ...] and valid [K, ...] hold pixels in [0, 1], of equal shapes.
    """
    near = [_log_density(valid, made, float(width)).mean() for width in WIDTHS]
    width = float(WIDTHS[int(torch.stack(near).argmax())])
    return _log_density(real, made, width), width


def _log_density(x: Tensor, made: Tensor, width: float) -> Tensor:
    """log of the mean over `made` of N(x; made, width^2 I): [N]."""
    centres = made.flatten(1).double()
    constant = math.log(len(made)) + centres.shape[1] * math.log(width * math.sqrt(2 * math.pi))
    return torch.cat([torch.logsumexp(torch.cdist(part, centres).square() / (-2 * width**2), 1) - constant
                      for part in x.flatten(1).double().split(ROWS)])
