"""The delay pattern and its windows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nexus.decode.loops import UNKNOWN
from nexus.decode.patterns import delay, holds, undelay, windows

patterns = st.lists(st.integers(0, 5), min_size=1, max_size=8).map(lambda late: (0, *late))


@pytest.mark.parametrize("codebooks", [1, 4, 8])
@pytest.mark.parametrize("frames", [1, 2, 7])
def test_delay_and_back(codebooks, frames):
    codes = torch.randint(9, (2, codebooks, frames))
    late = tuple(range(codebooks))
    sequence = delay(codes, late, 9)
    assert sequence.shape == (2, codebooks, frames + codebooks)
    assert torch.equal(undelay(sequence, late), codes)


@given(patterns, st.integers(1, 9))
def test_any_pattern_comes_back_and_holds_each_code_once(late, frames):
    codes = torch.arange(len(late) * frames).reshape(1, len(late), frames)
    sequence, held = delay(codes, late, -7), holds(late, frames)
    assert torch.equal(undelay(sequence, late), codes)
    assert held.shape == sequence.shape[1:] and torch.equal(sequence[0] != -7, held)
    assert torch.equal(sequence[0][held].reshape(len(late), frames), codes[0])


def test_by_hand():
    codes = torch.tensor([[[1, 2, 3], [4, 5, 6]]])
    assert delay(codes, (0, 1), 9)[0].tolist() == [[9, 1, 2, 3, 9], [9, 9, 4, 5, 6]]
    assert delay(codes, (0, 0), 9)[0].tolist() == [[9, 1, 2, 3], [9, 4, 5, 6]]


def test_scores_go_the_same_way_back_as_tokens():
    codes, late = torch.randint(5, (2, 3, 4)), (0, 2, 3)
    scores = torch.nn.functional.one_hot(delay(codes, late, 5), 6)
    assert torch.equal(undelay(scores, late).argmax(-1), codes)


def test_the_first_unknown_step_is_that_of_the_first_codebook():
    codes = torch.full((1, 3, 6), UNKNOWN)
    codes[..., :2] = 1
    unknown = (delay(codes, (0, 1, 2), 9) == UNKNOWN)[0].any(0)
    assert int(unknown.int().argmax()) == 3


@given(st.integers(1, 400), st.integers(2, 60), st.data())
def test_windows_fill_a_piece_without_gaps_and_with_their_context(total, size, data):
    stride = data.draw(st.integers(1, size - 1))
    known = data.draw(st.integers(0, total))
    have, last = known, None
    for start, stop in windows(total, size, stride, known):
        assert 0 <= start < stop <= total and stop - start <= size
        assert start <= have < stop                         # it goes on from what is there
        assert last is None or (have - start == size - stride and start == last + stride)
        assert stop == total or stop - start == size
        have, last = stop, start
    assert have == total


def test_published_windows():
    """30 seconds at 50 frames a second, 18 apart: a minute and a half."""
    assert list(windows(4500, 1500, 900)) == [(0, 1500), (900, 2400), (1800, 3300), (2700, 4200), (3600, 4500)]
    assert list(windows(1500, 1500, 900)) == [(0, 1500)] and list(windows(10, 1500, 900, 10)) == []
    assert list(windows(1700, 1500, 900, 1600)) == [(1000, 1700)]
