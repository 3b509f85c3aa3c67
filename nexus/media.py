"""What a system makes, before it is a file."""

from typing import Any, NamedTuple


class Media(NamedTuple):
    """kind "image": data [N, C, H, W] float in [-1, 1], C = 1 or 3; of walks [N, K, C, H, W].

    kind "audio": data [N, C, T] float in [-1, 1], C = 1 or 2, T samples at `rate` a second.
    notes: one dict an item, of what was decided on the way (the class a prompt was matched to); goes to the metadata.
    """

    kind: str
    data: Any
    notes: tuple[dict, ...] = ()
    rate: int = 0


def to_uint8(data: Any) -> Any:
    """Pictures [..., C, H, W] in [-1, 1], a Tensor on any device -> uint8 ndarray [..., H, W, C], to the nearest."""
    return levels(data).byte().movedim(-3, -1).numpy()


def levels(data: Any) -> Any:
    """A Tensor in [-1, 1] as a file would hold it: whole numbers of [0, 255], float32 on the CPU."""
    return ((data.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round()
