"""Which arithmetic a device is fast at, and what must not be done in half precision at all."""

from contextlib import AbstractContextManager, nullcontext
from functools import cache

import torch
from torch import Tensor


def full_precision(x: Tensor) -> AbstractContextManager:
    """Within the block, operations on x's device keep float32 as it is."""
    kind = x.device.type
    return torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()


@cache
def has_bfloat16(device: torch.device) -> bool:
    """Whether the device computes in bfloat16 by itself; one that does not is up to 70 times slower in it."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    able = getattr(torch.cpu, "get_capabilities", dict)()       # oneDNN counts processors that have AVX-512 alone, too
    return torch.ops.mkldnn._is_mkldnn_bf16_supported() and able.get("avx512_bf16", True)
