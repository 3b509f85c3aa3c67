"""The causal transformer: a cache changes nothing, nothing looks ahead, few rows are multiplied like many."""

import pytest
import torch
import torch.nn.functional as F

from nexus.nn.cache import KVCache
from nexus.nn.decoder import Decoder
from nexus.nn.rows import product


@pytest.fixture
def decoder():
    torch.manual_seed(0)
    return Decoder(16, 3, 2, 40, cross=True).eval()


@torch.no_grad()
@pytest.mark.parametrize("parts", [(1,) * 9, (4, 1, 1, 3), (9,), (2, 7)])
@pytest.mark.parametrize("crossed", [False, True])
def test_a_cache_changes_nothing(decoder, parts, crossed):
    x = torch.randn(3, 9, 16)
    sources = decoder.sources(torch.randn(3, 5, 16)) if crossed else None
    cache = decoder.cache(3, 9)
    pieces = [decoder(part, sources, cache) for part in x.split(parts, 1)]
    assert cache.used == 9
    assert (torch.cat(pieces, 1) - decoder(x, sources)).abs().max() < 1e-5


@torch.no_grad()
def test_nothing_looks_ahead(decoder):
    x = torch.randn(1, 6, 16)
    changed = x.clone()
    changed[:, 4] += 1
    before, after = decoder(x), decoder(changed)
    assert torch.equal(before[:, :4], after[:, :4]) and not torch.allclose(before[:, 4:], after[:, 4:])


@torch.no_grad()
def test_what_the_mask_hides_of_a_source_does_not_count(decoder):
    x, context = torch.randn(2, 4, 16), torch.randn(2, 5, 16)
    mask = torch.tensor([[True, True, False, False, True]] * 2)
    hidden = decoder(x, decoder.sources(context, mask))
    assert torch.allclose(hidden, decoder(x, decoder.sources(context[:, [0, 1, 4]])), atol=1e-6)


@torch.no_grad()
def test_a_source_of_zeros_adds_nothing_even_if_all_of_it_is_hidden(decoder):
    x, nothing = torch.randn(2, 4, 16), torch.zeros(2, 5, 16)
    plain = decoder(x)
    assert torch.allclose(plain, decoder(x, decoder.sources(nothing)), atol=1e-6)
    assert torch.allclose(plain, decoder(x, decoder.sources(nothing, torch.zeros(2, 5, dtype=torch.bool))), atol=1e-6)


def test_a_cache_that_is_full_says_so():
    cache = KVCache(1, 1, 1, 2, 4)
    cache.extend(0, torch.ones(1, 1, 2, 4), torch.ones(1, 1, 2, 4))
    cache.advance(2)
    with pytest.raises(ValueError, match="2 places cannot hold 3"):
        cache.extend(0, torch.ones(1, 1, 1, 4), torch.ones(1, 1, 1, 4))


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_rows_are_multiplied_like_many(rows, dtype):
    x, weight = torch.randn(rows, 1, 33).to(dtype), torch.randn(20, 33).to(dtype)
    near = 1e-5 if dtype == torch.float32 else 0.2
    assert (product(x, weight) - F.linear(x, weight)).abs().max() < near
    assert product(x, weight).shape == (rows, 1, 20)


def test_gradients_flow_through_few_rows():
    x, weight = torch.randn(2, 8, requires_grad=True), torch.randn(5, 8, requires_grad=True)
    product(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is not None
