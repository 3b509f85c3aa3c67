"""What a system makes, before it is a file."""

from typing import Any, NamedTuple


class Media(NamedTuple):
    """kind "image": data [N, C, H, W] float in [-1, 1], C = 1 or 3.

    notes: one dict an item, of what was decided on the way (the class a prompt was matched to); goes to the metadata.
    """

    kind: str
    data: Any
    notes: tuple[dict, ...] = ()
