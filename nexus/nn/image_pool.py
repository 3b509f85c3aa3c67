"""A store of earlier made pictures, so that a critic does not forget them. Shrivastava et al. 2017; CycleGAN."""

import torch
from torch import Tensor, nn


class ImagePool(nn.Module):
    """Up to `size` pictures as buffers, which makes them part of what a run saves and resumes; size 0 keeps none."""

    def __init__(self, size: int, shape: tuple[int, int, int]):
        super().__init__()
        self.register_buffer("pictures", torch.zeros(size, *shape))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def query(self, fresh: Tensor, rng: torch.Generator) -> Tensor:
        """fresh [B, C, H, W] -> as many pictures: each one itself, or with chance 1/2 a stored one in its exchange.

        While the pool is not full every fresh one is stored and returned. A batch that is not finite leaves no trace.
        """
        if not len(self.pictures) or not fresh.isfinite().all():
            return fresh
        out = fresh.detach().clone()
        swaps = (torch.rand(len(fresh), generator=rng) < 0.5).tolist()
        places = torch.randint(len(self.pictures), (len(fresh),), generator=rng).tolist()
        for i, (swap, place) in enumerate(zip(swaps, places, strict=True)):
            count = int(self.count)
            if count < len(self.pictures):
                self.pictures[count] = fresh[i]
                self.count += 1
            elif swap:
                out[i] = self.pictures[place]
                self.pictures[place] = fresh[i]
        return out
