"""Decode loops: pure functions over a callable of scores. None knows a codec, a prompt or how a cache is laid out.

B items, S places in a row of tokens, V tokens to choose from.
"""

from collections.abc import Callable

import torch
from torch import Tensor

UNKNOWN = -1            # in a sequence: a place that is to be filled


def autoregressive(logits: Callable[[Tensor, int], Tensor], sequence: Tensor, pick: Callable[[Tensor], Tensor], *,
                   stop: int | None = None, watch: Callable[[int, int, Tensor], None] | None = None) -> Tensor:
    """Fill the UNKNOWN places of sequence [B, ..., S] from left to right; the others stay what they are.

    logits(new [B, ..., n], position) -> scores [B, ..., V] of the place behind `new`, which are the tokens from
    `position` on that it has not been shown yet: the caller's closure owns the cache. pick: scores -> ids [B, ...].
    stop: once every item has a place all of whose tokens are this one, the loop ends there, and so does what it
    returns. watch(step, steps, sequence so far) follows each place. Raises ValueError where the first place is UNKNOWN.
    """
    hidden = sequence == UNKNOWN
    open_places = hidden.flatten(0, -2).any(0)                      # [S]
    if not open_places.any():
        return sequence
    first, length = int(open_places.int().argmax()), sequence.shape[-1]
    if first == 0:
        raise ValueError("a decode loop needs a first token to go on from")
    out, position = sequence.clone(), 0
    ended = torch.zeros(len(sequence), dtype=torch.bool, device=sequence.device)
    for place in range(first, length):
        found = pick(logits(out[..., position:place], position))
        out[..., place] = torch.where(hidden[..., place], found, sequence[..., place])
        position = place
        if watch is not None:
            watch(place - first, length - first, out[..., :place + 1])
        if stop is not None:
            ended |= (out[..., place] == stop).flatten(1).all(1) if out.ndim > 2 else out[..., place] == stop
            if ended.all():
                return out[..., :place + 1]
    return out
