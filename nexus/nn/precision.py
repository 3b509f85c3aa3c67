"""Arithmetic that must not be done in half precision, whatever mixed precision the training runs in."""

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def full_precision(x: Tensor) -> AbstractContextManager:
    """Within the block, operations on x's device keep float32 as it is."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
