"""Residual vector quantisation: a vector as a few ids, each for what the ones before it left over.

Zeghidour et al. 2021 (SoundStream); codebooks as moving averages: van den Oord et al. 2017. B items, D numbers a
vector, F frames, N vectors, K codebooks of `bins` rows.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nexus.nn.precision import full_precision
from nexus.nn.ranks import of_the_first, summed

ROWS = 1 << 14              # vectors that are compared with a codebook at once
KMEANS_STEPS = 10
SMOOTHING = 1e-5            # of the counts, so that a row that is never chosen does not divide by 0
GRACE = 2.0                 # a row drawn anew counts as so many times the limit below which it would be again


class Quantized(NamedTuple):
    """z [B, D, F] in codes, with the gradient of z; ids [B, K, F]; what it cost the encoder not to be there already."""

    z: Tensor
    ids: Tensor
    commitment: Tensor


def nearest(x: Tensor, rows: Tensor) -> Tensor:
    """x [N, D] -> the number of the nearest of the rows [bins, D], the first of equals; float32."""
    x, rows = x.float(), rows.float()
    with full_precision(x):
        size = rows.square().sum(1)
        return torch.cat([(part.square().sum(1, keepdim=True) - 2 * part @ rows.T + size).argmin(1)
                          for part in x.split(ROWS)])


def gathered(x: Tensor, ids: Tensor, bins: int) -> tuple[Tensor, Tensor]:
    """How many of x [N, D] chose each row [bins], and their sums [bins, D], over all ranks."""
    with full_precision(x):
        chosen = F.one_hot(ids, bins).to(x.dtype)       # a product, because adding at indices has no order on a GPU
        return summed(chosen.sum(0)), summed(chosen.T @ x)


def kmeans(x: Tensor, bins: int, rng: torch.Generator, steps: int = KMEANS_STEPS) -> tuple[Tensor, Tensor]:
    """Lloyd's centres [bins, D] of x [N, D] and how many of x each has; they start at vectors drawn from x."""
    drawn = torch.randperm(len(x), generator=rng)[:bins] if len(x) >= bins else \
        torch.randint(len(x), (bins,), generator=rng)
    centres = of_the_first(x[drawn.to(x.device)])
    for _ in range(steps):
        counts, sums = gathered(x, nearest(x, centres), bins)
        centres = torch.where(counts[:, None] > 0, sums / counts[:, None].clamp_min(1), centres)
    return centres, gathered(x, nearest(x, centres), bins)[0]


class Codebook(nn.Module):
    """Rows `embed` [bins, D] that follow the vectors which choose them, and the averages they follow them by.

    A codebook of which no row was ever chosen has not been started.
    """

    def __init__(self, dim: int, bins: int):
        super().__init__()
        self.register_buffer("embed", nn.init.kaiming_uniform_(torch.empty(bins, dim)))
        self.register_buffer("cluster_size", torch.zeros(bins))
        self.register_buffer("embed_avg", torch.zeros(bins, dim))

    @torch.no_grad()
    def start(self, x: Tensor, rng: torch.Generator) -> None:
        """Take the centres of x [N, D]."""
        centres, counts = kmeans(x, len(self.embed), rng)
        self.embed.copy_(centres)
        self.cluster_size.copy_(counts)
        self.embed_avg.copy_(centres * counts[:, None])

    @torch.no_grad()
    def learn(self, x: Tensor, ids: Tensor, decay: float) -> None:
        """Move every row towards the mean of the vectors x [N, D] that chose it."""
        counts, sums = gathered(x, ids, len(self.embed))
        self.cluster_size.lerp_(counts, 1 - decay)
        self.embed_avg.lerp_(sums, 1 - decay)
        total = self.cluster_size.sum()
        size = (self.cluster_size + SMOOTHING) / (total + len(self.embed) * SMOOTHING) * total
        self.embed.copy_(self.embed_avg / size[:, None])

    @torch.no_grad()
    def revive(self, x: Tensor, rng: torch.Generator, dead: float) -> None:
        """Rows chosen less than `dead` times a batch, in the moving average, become vectors drawn from x [N, D]."""
        drawn = torch.randint(len(x), (len(self.embed),), generator=rng)
        fresh, lost = of_the_first(x[drawn.to(x.device)]), self.cluster_size < dead
        self.embed.copy_(torch.where(lost[:, None], fresh, self.embed))
        self.embed_avg.copy_(torch.where(lost[:, None], GRACE * dead * fresh, self.embed_avg))
        self.cluster_size.masked_fill_(lost, GRACE * dead)


class ResidualQuantizer(nn.Module):
    """K codebooks, each of what the ones before it left over.

    decay: of the moving averages. dead: rows chosen less often than this in a batch are drawn anew.
    """

    def __init__(self, dim: int, bins: int, count: int, *, decay: float = 0.99, dead: float = 2.0):
        super().__init__()
        self.decay, self.dead = decay, dead
        self.books = nn.ModuleList(Codebook(dim, bins) for _ in range(count))

    def encode(self, z: Tensor, count: int | None = None) -> Tensor:
        """z [B, D, F] -> ids [B, K, F] of the first `count` codebooks, None = of all."""
        return self._walk(z, count, None).ids

    def decode(self, ids: Tensor) -> Tensor:
        """ids [B, K, F] < bins of the first K codebooks -> z [B, D, F]."""
        rows = zip(self.books, ids.unbind(1), strict=False)
        return sum(F.embedding(row, book.embed) for book, row in rows).transpose(1, 2)

    def forward(self, z: Tensor, count: int | None = None, rng: torch.Generator | None = None) -> Quantized:
        """z [B, D, F] in its codes, straight through; with an rng the codebooks learn from it.

        count: codebooks to use, None = all. A batch that is not finite teaches them nothing. commitment: the mean
        squared distance of each codebook's input from the row it chose, summed over the codebooks (Defossez et al.
        2022, eq. 3).
        """
        z = z.float()
        learns = rng is not None and not summed((~z.isfinite()).any().float())
        found = self._walk(z, count, rng if learns else None)
        return found._replace(z=z + (found.z - z).detach())

    def _walk(self, z: Tensor, count: int | None, rng: torch.Generator | None) -> Quantized:
        flat = z.float().transpose(1, 2)
        left, ids, commitment = flat, [], flat.new_zeros(())
        for book in self.books[:count]:
            x = left.detach().flatten(0, 1)
            if rng is not None and not book.cluster_size.any():
                book.start(x, rng)
            chosen = nearest(x, book.embed)
            row = F.embedding(chosen, book.embed).view_as(left).float()
            if rng is not None:
                book.learn(x, chosen, self.decay)
                book.revive(x, rng, self.dead)
            commitment = commitment + (left - row).square().mean()
            left = left - row
            ids.append(chosen.view(left.shape[:2]))
        return Quantized((flat - left).transpose(1, 2), torch.stack(ids, 1), commitment)
