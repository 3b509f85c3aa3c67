"""Sets of some styles, and pictures of two kinds: their spelling, their pairing, their draws."""

import numpy as np
import pytest
import torch
from PIL import Image

from nexus.data.domains import TwoSets, open_data
from nexus.data.images import STYLES, open_images
from nexus.data.spec import split_spec
from nexus.errors import InputError, UsageError
from nexus.rng import generator


@pytest.mark.parametrize("text, parts", [
    ("emoji", ("emoji",)), ("a/b", ("a/b",)), ("a,b", ("a", "b")), ("a | b", ("a", "b")),
    ("emoji:flat|noto", ("emoji:flat", "emoji:noto")), ("emoji:flat,emoji:3d", ("emoji:flat", "emoji:3d")),
    ("emoji:flat,./photos", ("emoji:flat", "./photos")), ("emoji:noto+3d", ("emoji:noto+3d",))])
def test_spelling(text, parts):
    assert split_spec(text) == parts


@pytest.mark.parametrize("text", ["a,b,c", ",a", "a|", "|"])
def test_bad_spelling(text):
    with pytest.raises(UsageError):
        split_spec(text)


def test_a_path_that_exists_is_one_set(tmp_path, monkeypatch):
    (tmp_path / "a,b").mkdir()
    monkeypatch.chdir(tmp_path)
    assert split_spec("a,b") == ("a,b",)


def test_some_styles_alone():
    whole, flat, two = (open_images(spec) for spec in ("emoji", "emoji:flat", "emoji:noto+3d"))
    assert flat.facts.styles == ("flat",) and two.facts.styles == ("noto", "3d") and whole.facts.styles == STYLES
    assert len({s.facts.digest for s in (whole, flat, two)}) == 3
    mine = [i for i in range(len(whole)) if whole.facts.styles[whole.style_ids[i]] == "flat"]
    assert len(mine) == len(flat) and [whole.captions[i] for i in mine] == flat.captions
    assert all(np.array_equal(whole.get(mine[i]), flat.get(i)) for i in (0, len(flat) - 1))
    for spec, word in (("emoji:red", "red"), ("mnist:noto", "noto")):
        with pytest.raises(InputError, match=word):
            open_images(spec)


@pytest.fixture
def kinds(tmp_path):
    """Two folders with two names in common; each picture has a colour of its own."""
    for kind, names in (("a", "1234"), ("b", "3479")):
        (tmp_path / kind).mkdir()
        for name in names:
            grey = 20 * int(name) + (5 if kind == "b" else 0)
            Image.fromarray(np.full((16, 16, 3), grey, np.uint8)).save(tmp_path / kind / f"{name}.png")
    return f"{tmp_path / 'a'},{tmp_path / 'b'}"


def shades(x):
    return ((x[:, 0, 8, 8] + 1) * 127.5).round().int().tolist()


def test_unaligned_sets_meet_at_random_and_by_the_generator_alone(kinds):
    both = open_data(kinds, domains="unaligned", size=16)
    assert isinstance(both, TwoSets) and len(both) == 4 and both.facts.count == 4
    found = [both.batch([0, 1, 2, 3], generator(s, "x"), flip=0.5, shift=2) for s in (0, 0, 1, 2, 3)]
    assert torch.equal(found[0]["other"], found[1]["other"]) and torch.equal(found[0]["image"], found[1]["image"])
    seen = {tuple(shades(f["other"])) for f in found}
    assert len(seen) > 1 and {s for each in seen for s in each} <= {65, 85, 145, 185}
    assert shades(both.batch([0, 3])["image"]) == [20, 80] and shades(both.batch([0, 3])["other"]) == [65, 185]


def test_aligned_sets_meet_by_name_and_move_alike(kinds, tmp_path):
    both = open_data(kinds, domains="aligned", size=16)
    assert len(both) == 2
    found = both.batch([0, 1], generator(0))
    assert shades(found["image"]) == [60, 80] and shades(found["other"]) == [65, 85]
    assert found["index"].tolist() == [0, 1]
    draw = np.random.default_rng(0)
    for kind in ("c", "d"):
        (tmp_path / kind).mkdir()
    for i in range(4):
        Image.fromarray(draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / f"c/{i}.png")
        Image.open(tmp_path / f"c/{i}.png").save(tmp_path / f"d/{i}.png")
    same = open_data(f"{tmp_path}/c,{tmp_path}/d", domains="aligned", size=16)
    moved = same.batch([0, 1, 2, 3], generator(7), shift=3, flip=0.5)
    assert torch.equal(moved["image"], moved["other"])
    assert not torch.equal(moved["image"], same.batch([0, 1, 2, 3])["image"])


def test_emoji_styles_pair_by_caption():
    both = open_data("emoji:noto|flat", domains="aligned")
    a, b = both.aligned[5]
    assert both.a.captions[a] == both.b.captions[b] and len(both) > 1000


def test_the_number_of_sets_must_be_the_systems(kinds, tmp_path):
    with pytest.raises(UsageError, match="one"):
        open_data(kinds)
    with pytest.raises(UsageError, match="two"):
        open_data("emoji", domains="aligned")
    (tmp_path / "e").mkdir()
    Image.new("RGB", (16, 16)).save(tmp_path / "e/zzz.png")
    with pytest.raises(InputError, match="counterpart"):
        open_data(f"{tmp_path}/a,{tmp_path}/e", domains="aligned")


@pytest.fixture
def ramps(tmp_path):
    """Two folders of one name each: a pixel's colour is its place, b is a inverted."""
    places = np.stack([np.repeat(np.arange(20)[:, None] * 5, 20, 1), np.repeat(np.arange(20)[None] * 5, 20, 0),
                       np.zeros((20, 20))], 2).astype(np.uint8)
    for kind, x in (("a", places), ("b", 255 - places)):
        (tmp_path / kind).mkdir()
        Image.fromarray(x).save(tmp_path / kind / "1.png")
    return f"{tmp_path / 'a'},{tmp_path / 'b'}"


@pytest.mark.parametrize("domains", ["aligned", "unaligned"])
def test_pictures_read_larger_are_cut_at_random_and_pairs_alike(ramps, domains):
    sets = open_data(ramps, domains=domains, size=16, channels=3, load=20)
    assert sets.facts.size == 16
    batch = sets.batch([0] * 200, generator(0))
    a, b = (((batch[name] + 1) * 127.5).round() for name in ("image", "other"))
    assert a.shape == (200, 3, 16, 16) and torch.equal(a[:, 0, 1:] - a[:, 0, :-1], torch.full((200, 15, 16), 5.0))
    corners = (a[:, :2, 0, 0] / 5).int()
    assert {int(n) for n in corners.flatten()} == {0, 1, 2, 3, 4} and len(corners.unique(dim=0)) == 25
    assert torch.equal(a + b, torch.full_like(a, 255.0)) == (domains == "aligned")
    middle = sets.batch([0])["image"]
    assert torch.equal(((middle + 1) * 127.5).round()[0, :2, 0, 0], torch.tensor([10.0, 10.0]))


def test_pictures_cannot_be_cut_larger_than_they_are_read(ramps):
    with pytest.raises(UsageError, match="train.load=15"):
        open_data(ramps, domains="aligned", size=16, channels=3, load=15)
