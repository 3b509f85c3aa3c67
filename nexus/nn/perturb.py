"""How one call weakens a network: the worse version of itself that some kinds of guidance steer away from."""

from typing import NamedTuple


class Perturb(NamedTuple):
    """Layers by number, in the order in which x meets them; empty sets leave the network as it is.

    identity: self-attention maps that become the identity (Ahn et al. 2024, perturbed-attention guidance).
    skip: layers that are left out (skip-layer guidance of Stable Diffusion 3.5). A network that takes a Perturb says so
    by two attributes: `layers`, how many it has, and `middle`, the one that is weakened unless told otherwise.
    """

    identity: frozenset[int] = frozenset()
    skip: frozenset[int] = frozenset()
