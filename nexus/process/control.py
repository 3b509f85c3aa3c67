"""A picture that steers: a ControlNet's residuals on a network's skips. Zhang et al. 2023, arXiv:2302.05543."""

import contextlib
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.errors import UsageError
from nexus.images import fitted, read_image
from nexus.nn.perturb import Perturb
from nexus.process.diffusion import Diffusion
from nexus.requests import SampleRequest

HINTS = ("edges", "grey")


class Controlled(nn.Module):
    """A network with what a ControlNet adds to it, `scale` times, for one hint [1, 3, H, W] in [0, 1]."""

    def __init__(self, net: nn.Module, control: nn.Module, hint: Tensor, scale: float = 1.0):
        super().__init__()
        self.net, self.control, self.scale, self.config = net, control, scale, net.config
        self.layers, self.middle = net.layers, net.middle
        self.features = control.look(hint)              # of the hint alone, the same at every step

    def prepare(self, times: Tensor, cond: dict | None = None) -> dict:
        """What both networks compute once for a run."""
        return {"net": self.net.prepare(times, cond), "control": self.control.prepare(times, cond)}

    def forward(self, x: Tensor, t: Tensor, cond: dict | None = None, prepared: dict | None = None,
                perturb: Perturb = Perturb()) -> Tensor:
        prepared, cond = prepared or {"net": None, "control": None}, cond or {}
        seen = cond | {"features": self.features.expand(len(x), *self.features.shape[1:])}
        added = [self.scale * one for one in self.control(x, t, seen, prepared["control"])]
        return self.net(x, t, cond | {"control": added}, prepared["net"], perturb)


def read_hint(system: Diffusion, request: SampleRequest) -> Tensor:
    """The request's control picture [1, 3, H, W] in [0, 1], covering the run's size. Raises InputError, UsageError."""
    if request.control_image is None:
        raise UsageError("a ControlNet is shown a picture, and there is none", hint="add --control-image FILE")
    factor = system.config.codec.net.factor if system.config.codec else 1
    _, rows, cols = system.run_shape(request)
    array = fitted(read_image(request.control_image, mode="RGB"), cols * factor, rows * factor)
    parameter = next(system.net.parameters())
    hint = torch.from_numpy(array).permute(2, 0, 1)[None].to(parameter.device, torch.float32) / 255
    return hint.to(parameter.dtype)


@contextlib.contextmanager
def controlled(system: Diffusion, net: nn.Module, control: nn.Module, request: SampleRequest) -> Iterator[None]:
    """Put `net`, controlled as the request asks, in the place of the system's network while the block runs."""
    before = system.net
    scale = 1.0 if request.control_scale is None else request.control_scale
    with torch.no_grad():
        system.net = Controlled(net, control, read_hint(system, request), scale)
    try:
        yield
    finally:
        system.net = before


def check_control(system: nn.Module, inner: nn.Module | None) -> None:
    """UsageError for a model that cannot be controlled, or a network `inner` that is no ControlNet of such a model."""
    net = getattr(system, "net", None)
    if not hasattr(inner, "look"):
        raise UsageError("--control names a model that is no ControlNet", hint="nexus train controlnet makes one")
    ours, theirs = getattr(net, "config", None), inner.config
    names = ("channels", "mult", "blocks", "attention", "context_dim")
    wrong = [n for n in names if getattr(ours, n, None) != getattr(theirs, n)]
    factor = system.config.codec.net.factor if wrong == [] and system.config.codec else 1
    if wrong or 2 ** (len(theirs.hint_widths) - 1) != factor:
        raise UsageError(f"this ControlNet is for another network: its {wrong[0] if wrong else 'hint'} differs",
                         hint="SD 1's ControlNets steer SD 1, SDXL's steer SDXL")


def hint_of(image: Tensor, kind: str) -> Tensor:
    """What a ControlNet is shown of training pictures [B, C, H, W] in [-1, 1] -> [B, 3, H, W] in [0, 1].

    edges: the size of Sobel's gradient, 1 where it is largest. grey: the picture without its colours.
    """
    grey = (image.mean(1, keepdim=True) + 1) / 2
    if kind == "grey":
        return grey.expand(-1, 3, -1, -1)
    slope = image.new_tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
    padded = F.pad(grey, (1, 1, 1, 1), mode="replicate")
    size = F.conv2d(padded, torch.stack([slope, slope.T])[:, None]).square().sum(1, keepdim=True).sqrt()
    return (size / size.amax((2, 3), keepdim=True).clamp(min=1e-6)).expand(-1, 3, -1, -1)
