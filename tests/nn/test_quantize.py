"""Residual vector quantisation: exact codebooks leave nothing, averages in closed form, k-means, rows drawn anew."""

import pytest
import torch

from nexus.nn.quantize import GRACE, Codebook, ResidualQuantizer, kmeans, nearest


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def quantizer(dim=6, bins=8, count=3, **how):
    """Codebooks whose rows get shorter."""
    made = ResidualQuantizer(dim, bins, count, **how)
    for i, book in enumerate(made.books):
        book.embed.copy_(random(bins, dim, seed=i) * 10.0 ** -i)
        book.cluster_size.fill_(3)
        book.embed_avg.copy_(book.embed * 3)
    return made


def test_the_nearest_row_is_the_one_at_the_least_distance():
    x, rows = random(40, 5), random(7, 5, seed=1)
    assert torch.equal(nearest(x, rows), torch.cdist(x.double(), rows.double()).argmin(1))


def test_exact_codebooks_leave_nothing():
    made, ids = quantizer(), torch.randint(8, (2, 3, 10), generator=rng())
    z = made.decode(ids)
    assert torch.equal(made.encode(z), ids)
    torch.testing.assert_close(made.decode(made.encode(z)), z)


def test_each_codebook_takes_what_the_ones_before_it_left():
    made, z = quantizer(), random(2, 6, 10, seed=5)
    ids = made.encode(z)
    for k in range(3):
        left = z - (made.decode(ids[:, :k]) if k else 0)
        alone = nearest(left.transpose(1, 2).flatten(0, 1), made.books[k].embed).view(2, 10)
        assert torch.equal(ids[:, k], alone)
    assert torch.equal(made.encode(z, 2), ids[:, :2])


def test_the_commitment_is_the_mean_square_of_what_each_codebook_left():
    made, z = quantizer(), random(2, 6, 10, seed=5)
    ids = made.encode(z)
    sought = sum((z - made.decode(ids[:, :k])).square().mean() for k in (1, 2, 3))
    torch.testing.assert_close(made(z).commitment, sought)


def test_the_gradient_passes_straight_through():
    made, z = quantizer(), random(2, 6, 10, seed=5).requires_grad_()
    weight = random(2, 6, 10, seed=6)
    found = made(z)
    torch.testing.assert_close(found.z, made.decode(found.ids))
    assert torch.equal(torch.autograd.grad((weight * found.z).sum(), z)[0], weight)
    pull = torch.autograd.grad(made(z, 1).commitment, z)[0]
    torch.testing.assert_close(pull, 2 * (z - made.decode(found.ids[:, :1])).detach() / z.numel())


def test_averages_follow_the_closed_form():
    """After n steps with the same counts c and sums s: c (1 - d^n) + d^n c0, and the rows are their quotient."""
    book, decay, steps = quantizer(count=1).books[0], 0.9, 25
    x = random(64, 6, seed=3)
    ids = nearest(x, book.embed)
    counts = torch.bincount(ids, minlength=8).float()
    sums = torch.zeros(8, 6).index_add_(0, ids, x)
    before = book.cluster_size.clone(), book.embed_avg.clone()
    for _ in range(steps):
        book.learn(x, ids, decay)
    left = decay ** steps
    torch.testing.assert_close(book.cluster_size, (1 - left) * counts + left * before[0])
    torch.testing.assert_close(book.embed_avg, (1 - left) * sums + left * before[1])
    torch.testing.assert_close(book.embed, book.embed_avg / book.cluster_size[:, None], atol=1e-4, rtol=1e-4)


def test_rows_converge_to_the_means_of_what_chose_them():
    book, x = quantizer(count=1).books[0], random(64, 6, seed=3)
    ids = nearest(x, book.embed)
    for _ in range(200):
        book.learn(x, ids, 0.9)
    for row in ids.unique().tolist():
        torch.testing.assert_close(book.embed[row], x[ids == row].mean(0), atol=1e-3, rtol=1e-3)


def test_kmeans_finds_separate_clusters_and_counts_them():
    centres = 20 * torch.eye(4, 6)
    x = torch.cat([centres[i] + 0.1 * random(10 + i, 6, seed=i) for i in range(4)])
    best = min((kmeans(x, 4, rng(seed)) for seed in range(12)),
               key=lambda found: (x - found[0][nearest(x, found[0])]).square().sum())
    order = nearest(centres, best[0])
    assert order.unique().numel() == 4 and (best[0][order] - centres).abs().max() < 0.3
    assert best[1][order].tolist() == [10, 11, 12, 13]


def test_kmeans_never_makes_the_distance_larger():
    x, last = random(100, 5), float("inf")
    for steps in range(6):
        found, counts = kmeans(x, 9, rng(), steps)
        distance = (x - found[nearest(x, found)]).square().sum().item()
        assert distance <= last + 1e-4 and counts.sum() == 100
        last = distance


def test_a_codebook_starts_once_at_its_first_batch():
    made = ResidualQuantizer(6, 8, 2, dead=0.0)
    z = random(4, 6, 30)
    untouched = [book.embed.clone() for book in made.books]
    made(z, 1, rng())
    assert made.books[0].cluster_size.sum() > 0 and torch.equal(made.books[1].embed, untouched[1])
    assert made(z).commitment < ResidualQuantizer(6, 8, 2)(z).commitment
    first = made.books[0].embed.clone()
    made(z, 2, rng(1))
    assert (made.books[0].embed - first).abs().max() < 0.2 and made.books[1].cluster_size.any()


def test_fewer_vectors_than_rows_can_start_a_codebook():
    made = ResidualQuantizer(6, 32, 1)
    z = random(1, 6, 5)
    made(z, None, rng())
    assert made.books[0].embed.isfinite().all() and made(z).commitment < 1e-6


def test_rows_that_are_not_chosen_are_drawn_anew():
    made = quantizer(count=1, dead=1.0)
    book, z = made.books[0], random(4, 6, 30, seed=2)
    book.embed[5] = 1e3                                         # far from everything
    book.embed_avg[5] = 3e3
    for step in range(200):
        made(z, None, rng(step))
    assert book.embed.abs().max() < 10 and made.encode(z).unique().numel() == 8


def test_a_row_drawn_anew_is_one_of_the_vectors_and_has_time_to_be_chosen():
    book, x = Codebook(6, 8), random(20, 6)
    book.cluster_size.copy_(torch.tensor([0.5, 9, 9, 9, 9, 9, 9, 9.0]))
    kept = book.embed[1:].clone()
    book.revive(x, rng(), 1.0)
    assert (x == book.embed[0]).all(1).any() and torch.equal(book.embed[1:], kept)
    assert book.cluster_size[0] == GRACE
    torch.testing.assert_close(book.embed_avg[0] / book.cluster_size[0], book.embed[0])


@pytest.mark.parametrize("spoil", [float("nan"), float("inf")])
def test_a_batch_that_is_not_finite_teaches_nothing(spoil):
    made, z = quantizer(), random(2, 6, 10)
    before = {key: tensor.clone() for key, tensor in made.state_dict().items()}
    z[1, 2, 3] = spoil
    made(z, None, rng())
    assert all(torch.equal(tensor, before[key]) for key, tensor in made.state_dict().items())


def test_without_an_rng_nothing_is_learnt_and_with_it_all_is_decided_by_it():
    first, second = (quantizer(dead=5.0) for _ in range(2))
    z = random(2, 6, 10)
    before = first.books[0].embed.clone()
    first(z)
    assert torch.equal(first.books[0].embed, before)
    first(z, None, rng(4))
    second(z, None, rng(4))
    assert all(torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(),
                                                 strict=True))


def test_mixed_precision_does_not_reach_the_codebooks():
    exact, mixed, z = quantizer(), quantizer(), random(2, 6, 10)
    exact(z, None, rng())
    with torch.autocast("cpu", torch.bfloat16):
        found = mixed(z, None, rng())
    assert found.z.dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(exact.state_dict().values(), mixed.state_dict().values(),
                                                 strict=True))
