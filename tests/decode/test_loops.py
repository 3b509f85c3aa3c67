"""The autoregressive loop against brute force over a table of scores, with and without a memory."""

import itertools

import pytest
import torch

from nexus.decode.choose import chooser
from nexus.decode.loops import UNKNOWN, autoregressive

VOCABULARY, ROWS = 5, 3


class Table:
    """Scores of the next token that depend on the sum of all tokens so far, in each row on those of its own."""

    def __init__(self, seed=0, rows=()):
        self.scores = torch.randn(64, *rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))

    def of(self, tokens):
        """tokens [B, ..., n] -> scores [B, ..., V] of the next one."""
        total = (tokens * torch.arange(1, tokens.shape[-1] + 1)).sum(-1) % 64
        if not self.scores.shape[1:-1]:
            return self.scores[total]
        rows = torch.arange(self.scores.shape[1])
        return self.scores[total, rows]

    def logits(self):
        """A closure that keeps what it was shown, and checks that it is shown everything once and in order."""
        seen = []

        def logits(new, position):
            assert position == sum(part.shape[-1] for part in seen)
            seen.append(new.clone())
            return self.of(torch.cat(seen, -1))
        return logits


def start(batch, length, first=2, rows=()):
    sequence = torch.full((batch, *rows, length), UNKNOWN)
    sequence[..., 0] = first
    return sequence


def greedy():
    return chooser([], temperature=0)


def test_greedy_tokens_are_the_likeliest_one_after_another():
    table = Table()
    made = autoregressive(table.logits(), start(1, 6), greedy())
    for place in range(1, 6):
        best = max(range(VOCABULARY), key=lambda token: table.of(made[:, :place])[0, token])
        assert made[0, place] == best


def test_whole_rows_are_drawn_as_often_as_the_product_of_their_shares():
    table, count = Table(3), 20_000
    rngs = [torch.Generator().manual_seed(i) for i in range(count)]
    made = autoregressive(table.logits(), start(count, 3), chooser(rngs, temperature=1.5))
    for a, b in itertools.product(range(VOCABULARY), repeat=2):
        first = (table.of(torch.tensor([[2]])) / 1.5).softmax(-1)[0, a]
        second = (table.of(torch.tensor([[2, a]])) / 1.5).softmax(-1)[0, b]
        found = ((made[:, 1] == a) & (made[:, 2] == b)).float().mean()
        assert abs(found - first * second) < 0.015


@pytest.mark.parametrize("rows", [(), (ROWS,)])
def test_what_is_known_stays_and_is_read(rows):
    table = Table(1, rows)
    sequence = start(2, 8, rows=rows)
    sequence[..., 1:3], sequence[..., 5] = 4, 1
    made = autoregressive(table.logits(), sequence, greedy())
    known = sequence != UNKNOWN
    assert torch.equal(made[known], sequence[known]) and (made >= 0).all()
    for place in (3, 4, 6, 7):
        assert torch.equal(made[..., place], table.of(made[..., :place]).argmax(-1))


def test_rows_may_be_known_to_different_places():
    table, sequence = Table(2, (ROWS,)), start(1, 6, rows=(ROWS,))
    sequence[0, 1, 1:4] = torch.tensor([0, 3, 1])
    made = autoregressive(table.logits(), sequence, greedy())
    assert torch.equal(made[0, 1, 1:4], sequence[0, 1, 1:4])
    assert torch.equal(made[0, 0, 1], table.of(made[..., :1]).argmax(-1)[0, 0])


def test_an_item_does_not_depend_on_its_batch():
    table = Table(4)

    def made(seeds):
        rngs = [torch.Generator().manual_seed(seed) for seed in seeds]
        return autoregressive(table.logits(), start(len(seeds), 12), chooser(rngs, top_k=3))
    together = made([3, 1, 4, 7])
    assert torch.equal(made([4]), together[2:3]) and torch.equal(made([7, 3]), together[[3, 0]])
    assert not torch.equal(together[0], together[1])


def test_it_ends_where_every_item_has_stopped():
    def logits(new, position):
        scores = torch.zeros(2, VOCABULARY)
        scores[0, 0 if position >= 2 else 1] = 1.0
        scores[1, 0 if position == 4 else 1] = 1.0
        return scores
    made = autoregressive(logits, start(2, 9), greedy(), stop=0)
    assert made.tolist() == [[2, 1, 1, 0, 0, 0], [2, 1, 1, 1, 1, 0]]


def test_it_is_watched_place_by_place():
    seen = []
    sequence = start(1, 6)
    sequence[0, 1] = 3
    autoregressive(Table().logits(), sequence, greedy(), watch=lambda *at: seen.append((*at[:2], at[2].shape[-1])))
    assert seen == [(0, 4, 3), (1, 4, 4), (2, 4, 5), (3, 4, 6)]


def test_a_full_sequence_is_left_alone_and_an_empty_one_refused():
    full = torch.ones(1, 4, dtype=torch.long)
    assert autoregressive(None, full, None) is full
    with pytest.raises(ValueError, match="first token"):
        autoregressive(None, torch.full((1, 4), UNKNOWN), None)
