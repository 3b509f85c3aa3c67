"""A folder of parts: what is there is read, what is damaged or missing is made, other facts begin anew."""

import json

import pytest
import torch

from nexus.data.kept import FACTS, Shelf, unkept
from nexus.data.latents import CHUNK, LatentSet
from nexus.rng import generator


def make_counted(calls):
    def make(number):
        calls.append(number)
        rng = generator(number, "part")
        return [torch.randn(2, 3, generator=rng), torch.full((number + 1,), number, dtype=torch.int16)]
    return make


def same(a, b):
    assert len(a) == len(b) and all(x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_what_is_kept_is_what_was_made_and_nothing_is_made_twice(tmp_path):
    plain, calls, seen = unkept(5, make_counted([]), lambda *at: None), [], []
    shelf = Shelf(tmp_path / "parts", {"data": "abc"})
    same(shelf(5, make_counted(calls), lambda *at: seen.append(at)), plain)
    assert calls == [0, 1, 2, 3, 4] and seen == [(i, 5) for i in range(1, 6)]
    same(shelf(5, make_counted(calls), lambda *at: None), plain)
    assert len(calls) == 5


@pytest.mark.parametrize("harm", ["missing", "cut", "scribbled"])
def test_a_part_that_cannot_be_read_is_made_again(tmp_path, harm):
    shelf, calls = Shelf(tmp_path, {}), []
    plain = shelf(3, make_counted([]), lambda *at: None)
    path = tmp_path / "00001.safetensors"
    whole = path.read_bytes()
    path.unlink() if harm == "missing" else path.write_bytes(whole[:-3] if harm == "cut" else b"{" * len(whole))
    same(shelf(3, make_counted(calls), lambda *at: None), plain)
    assert calls == [1] and path.read_bytes() == whole


def test_other_facts_begin_anew(tmp_path):
    Shelf(tmp_path / "parts", {"codec": "a"})(4, make_counted([]), lambda *at: None)
    calls = []
    Shelf(tmp_path / "parts", {"codec": "b"})(2, make_counted(calls), lambda *at: None)
    assert calls == [0, 1] and json.loads((tmp_path / "parts" / FACTS).read_text()) == {"codec": "b"}
    assert not (tmp_path / "parts" / "00003.safetensors").exists()


def test_ranks_share_the_work_and_all_read_all(tmp_path):
    ours, theirs = [], []
    other = Shelf(tmp_path, {}, rank=1, ranks=2)

    def meet():
        if meeting.pop():           # the other rank works while we wait at the end
            other(5, make_counted(theirs), lambda *at: None)
    meeting = [True, False]
    got = Shelf(tmp_path, {}, rank=0, ranks=2, meet=meet)(5, make_counted(ours), lambda *at: None)
    same(got, unkept(5, make_counted([]), lambda *at: None))
    assert ours == [0, 2, 4] and theirs == [1, 3]


class Pictures:
    """CHUNK + 2 pictures of one pixel, brighter by what is drawn."""

    facts = None

    def __len__(self):
        return CHUNK + 2

    def batch(self, indices, rng, *, shift, flip):
        drawn = torch.rand(len(indices), generator=rng) if shift else torch.zeros(len(indices))
        return {"image": (torch.tensor(indices) + 0.9 * drawn)[:, None, None, None]}

    def labels_of(self, indices):
        return {"index": torch.tensor(indices)}


def test_latents_from_a_shelf_are_those_without(tmp_path):
    def latents(keep, encode=torch.neg):
        return LatentSet(Pictures(), encode, shift=1, variants=2, keep=keep)
    batch = latents(unkept).batch([0, CHUNK + 1, 5], generator(1, "x"))
    assert torch.equal(batch["latent"].flatten().ceil(), torch.tensor([0.0, -CHUNK - 1, -5]))
    latents(Shelf(tmp_path, {}))

    def never(x):
        raise AssertionError("encoded again")
    kept = latents(Shelf(tmp_path, {}), never).batch([0, CHUNK + 1, 5], generator(1, "x"))
    assert torch.equal(kept["latent"], batch["latent"]) and torch.equal(kept["index"], batch["index"])
