"""Codebooks and balances on two ranks: what they learn is what one rank with all of the data learns."""

import multiprocessing
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from nexus.losses.balancer import Balancer
from nexus.nn.quantize import ResidualQuantizer

BINS, DIM = 8, 6


def data(seed=0):
    return torch.randn(4, DIM, 30, generator=torch.Generator().manual_seed(seed))


def learnt(z, rng, *, begun, dead):
    made = ResidualQuantizer(DIM, BINS, 2, dead=dead)
    for i, book in enumerate(made.books if begun else ()):
        book.embed.copy_(data(i + 1)[0, :, :BINS].T)
        book.cluster_size.fill_(2)
        book.embed_avg.copy_(2 * book.embed)
    for step in range(3):
        made(z, None, torch.Generator().manual_seed(100 * rng + step))
    return made.state_dict()


def balanced(z):
    mine, x = Balancer({"a": 1.0}), z.clone().requires_grad_()
    mine({"a": (x * x).sum() / 2}, x)
    return mine.state_dict()


def work(rank, file, out):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    z = data()[2 * rank:2 * rank + 2]
    spoilt = z.clone() if rank else torch.full_like(z, float("nan"))
    torch.save({"learnt": learnt(z, rank, begun=True, dead=0.0), "revived": learnt(z, rank, begun=True, dead=9.0),
                "begun": learnt(z, rank, begun=False, dead=1.0), "balance": balanced(z),
                "spoilt": learnt(spoilt, rank, begun=True, dead=9.0)}, f"{out}.{rank}")
    dist.destroy_process_group()


def test_two_ranks_learn_what_one_does(tmp_path):
    sys.path.insert(0, str(Path(__file__).parents[2]))
    context = multiprocessing.get_context("spawn")
    children = [context.Process(target=work, args=(rank, tmp_path / "meet", tmp_path / "out")) for rank in range(2)]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
        assert child.exitcode == 0
    first, second = (torch.load(tmp_path / f"out.{rank}", weights_only=True) for rank in range(2))
    for kind, state in first.items():
        assert all(torch.equal(tensor, second[kind][name]) for name, tensor in state.items()), kind
    for kind, alone in (("learnt", learnt(data(), 0, begun=True, dead=0.0)), ("balance", balanced(data()))):
        for name, tensor in alone.items():
            torch.testing.assert_close(first[kind][name], tensor, atol=1e-5, rtol=1e-5)
    assert (first["begun"]["books.1.cluster_size"] > 0).any()
    assert first["spoilt"]["books.0.cluster_size"].unique().tolist() == [2.0]       # nobody learns from it
