"""Choosing a token: the law of what is drawn, what is kept, and that an item is drawn with its own generator."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nexus.decode.choose import choose, chooser, drawn, guided, kept


def rngs(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def shares(scores, count=40_000, **settings):
    """How often each token is drawn."""
    ids = choose(scores.expand(1, count, -1), rngs(0), **settings)
    return torch.bincount(ids.flatten(), minlength=scores.shape[-1]) / count


SCORES = torch.tensor([2.0, 0.5, 1.0, -1.0, 0.5])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_tokens_are_drawn_as_often_as_the_softmax_says(temperature):
    assert (shares(SCORES, temperature=temperature) - (SCORES / temperature).softmax(-1)).abs().max() < 0.01


def test_temperature_zero_takes_the_likeliest_and_needs_no_generator():
    assert choose(SCORES[None], [], temperature=0).tolist() == [0]


def test_top_k_draws_among_the_k_likeliest_as_often_as_before():
    found = shares(SCORES, top_k=2)
    wanted = torch.tensor([2.0, float("-inf"), 1.0, float("-inf"), float("-inf")]).softmax(-1)
    assert (found - wanted).abs().max() < 0.01 and (found[[1, 3, 4]] == 0).all()


def test_what_equals_the_last_of_the_k_stays():
    assert kept(SCORES, top_k=3).isfinite().tolist() == [True, True, True, False, True]


def test_top_p_draws_among_the_fewest_that_have_the_share():
    share = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05])
    for top_p, wanted in ((0.4, 1), (0.49, 1), (0.6, 2), (0.75, 3), (0.9, 4), (0.97, 5), (1.0, 5), (0.0, 5)):
        assert int(kept(share.log(), top_p=top_p).isfinite().sum()) == wanted, top_p
    found = shares(share.log(), top_p=0.6)
    assert (found - torch.tensor([5 / 7, 2 / 7, 0, 0, 0])).abs().max() < 0.01


@given(st.lists(st.floats(-8, 8), min_size=2, max_size=9), st.floats(0.01, 0.99), st.integers(0, 10))
def test_what_is_kept_is_the_likeliest_and_enough(scores, top_p, top_k):
    scores = torch.tensor(scores)
    stays = kept(scores, top_k=top_k, top_p=top_p).isfinite()
    assert stays.any()
    if not stays.all():
        assert scores[stays].min() >= scores[~stays].max() - 1e-5
    among = kept(scores, top_k=top_k).softmax(-1)
    assert among[stays].sum() >= top_p - 1e-5
    assert among[stays].sum() - among[stays].min() < top_p + 1e-5          # not one more than needed


def test_the_draw_is_that_of_torchs_multinomial():
    share = torch.rand(3, 4, 50, generator=torch.Generator().manual_seed(1)).softmax(-1)
    each = zip(share, rngs(5, 6, 7), strict=True)
    wanted = torch.stack([torch.multinomial(p, 1, generator=rng)[:, 0] for p, rng in each])
    assert torch.equal(drawn(share, rngs(5, 6, 7)), wanted)


def test_an_item_is_drawn_alike_in_every_batch():
    scores = torch.randn(4, 3, 11)
    together = [chooser(rngs(0, 1, 2, 3), top_k=5)(scores) for _ in range(3)][-1]
    pick = chooser(rngs(2, 0), top_k=5)
    assert torch.equal(pick(scores[[2, 0]]), together[[2, 0]])
    follows = [pick(scores[[2, 0]]) for _ in range(20)]
    assert any(not torch.equal(one, together[[2, 0]]) for one in follows)


def test_guidance_moves_from_the_null_and_double_guidance_over_the_style():
    both, style, null = torch.randn(3, 7)
    assert torch.equal(guided(both, null, 1.0), null + (both - null))
    assert torch.allclose(guided(both, null, 3.0), 3 * both - 2 * null, atol=1e-5)
    assert torch.allclose(guided(both, null, 2.0, style=style, outer=1.0), style + 2 * (both - style), atol=1e-5)
    assert torch.allclose(guided(both, null, 1.0, style=style, outer=3.0), guided(both, null, 3.0), atol=1e-5)
    assert torch.allclose(guided(both, null, 0.0, style=style, outer=3.0), guided(style, null, 3.0), atol=1e-5)
