"""From scores of the next token to a token: the likeliest, or one drawn, each item with a generator of its own.

B items, V tokens to choose from.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def choose(logits: Tensor, rngs: Sequence[torch.Generator], *, temperature: float = 1.0, top_k: int = 0,
           top_p: float = 0.0) -> Tensor:
    """logits [B, ..., V] -> ids [B, ...]; temperature 0 takes the likeliest. rngs: a CPU generator an item.

    Item i depends on row i and rngs[i] alone, and on every device draws the same numbers.
    """
    if temperature == 0:
        return logits.argmax(-1)
    return drawn(kept(logits, temperature=temperature, top_k=top_k, top_p=top_p).softmax(-1), rngs)


def chooser(rngs: Sequence[torch.Generator], **settings: float) -> Callable[[Tensor], Tensor]:
    """`choose` with these generators and settings, for a decode loop."""
    return lambda logits: choose(logits, rngs, **settings)


def kept(logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 0.0) -> Tensor:
    """Scores [..., V] over the temperature, in float32, with -inf for the tokens that are not drawn among.

    top_k: the so many likeliest stay, and what equals the last of them (Fan et al. 2018); top_p: of those the fewest
    likeliest that have this share of the probability together (Holtzman et al. 2020). 0 = all.
    """
    logits = logits.float() / temperature
    if 0 < top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[..., -1:], -math.inf)
    if 0 < top_p < 1:
        share, order = logits.softmax(-1).sort(-1, descending=True)
        late = share.cumsum(-1) - share >= top_p            # the likelier ones have the share already
        logits = logits.masked_fill(torch.zeros_like(late).scatter(-1, order, late), -math.inf)
    return logits


def drawn(share: Tensor, rngs: Sequence[torch.Generator]) -> Tensor:
    """Probabilities [B, ..., V] -> ids [B, ...], item i drawn with rngs[i].

    A race of exponential clocks, of which the first to ring is token v with probability share[v]: the same numbers,
    and the same token, as torch.multinomial(share[i], 1).
    """
    waits = torch.stack([torch.empty(share.shape[1:]).exponential_(generator=rng) for rng in rngs])
    return (share / waits.to(share)).argmax(-1)


def guided(cond: Tensor, null: Tensor, scale: float, *, style: Tensor | None = None, outer: float = 1.0) -> Tensor:
    """Scores moved away from those without a condition. Ho & Salimans 2022.

    style: scores of the sound condition alone; then `scale` pushes from it to all conditions, and `outer` from none to
    that: double guidance, Rouard et al. 2024.
    """
    if style is None:
        return null + scale * (cond - null)
    return null + outer * (style + scale * (cond - style) - null)
