import hashlib
import importlib.util
import io
import json
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nexus.data import shards
from nexus.data.images import ALL_STYLES, DIGITS, STYLES, open_images
from nexus.data.split import held_out
from nexus.errors import InputError, UsageError


@pytest.fixture(scope="module")
def emoji():
    return open_images("emoji", split="all")


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def gradient(path, side=64):
    """A picture no two pixels of which are equal, so that every move shows."""
    y, x = np.mgrid[:side, :side].astype(np.uint8)
    Image.fromarray(np.stack([y, x, y], -1)).save(path)


def test_counts_per_style(emoji):
    styles = Counter(emoji.facts.styles[i] for i in emoji.style_ids)
    assert styles == {"noto": 1685, "twemoji": 1677, "flat": 1590, "3d": 1586}
    assert emoji.facts.styles == STYLES
    assert len(emoji) == emoji.facts.count == 6538
    assert len(emoji.facts.classes) == 1688 and list(emoji.facts.classes) == sorted(set(emoji.captions))


def test_groups_are_classes_of_the_same_pictures(emoji):
    groups = open_images("emoji-groups", split="all")
    assert len(groups.facts.classes) == 9 and "food and drink" in groups.facts.classes
    assert groups.captions == emoji.captions and (groups.get(7) == emoji.get(7)).all()
    assert groups.facts.digest != emoji.facts.digest
    of = {caption: groups.facts.classes[label] for caption, label in zip(groups.captions, groups.labels, strict=True)}
    assert (of["pizza"], of["cat face"], of["rocket"]) == ("food and drink", "animals and nature", "travel and places")


def test_outlines_go_with_flat_ones_and_are_not_among_the_emoji(emoji):
    outline = open_images("emoji:outline", split="all")
    assert len(outline) == 1590 and set(outline.captions) == set(open_images("emoji:flat", split="all").captions)
    assert "outline" not in emoji.facts.styles


def test_most_concepts_exist_in_every_style(emoji):
    assert Counter(Counter(emoji.labels.tolist()).values())[4] == 1586
    assert len(set(zip(emoji.captions, emoji.style_ids.tolist(), strict=True))) == 6538


def test_shards_match_the_data_card():
    card = (shards.FOLDER / "README.md").read_text()
    tars = sorted(shards.FOLDER.glob("*.tar"))
    assert len(tars) == 10
    for tar in tars:
        assert f"{hashlib.sha256(tar.read_bytes()).hexdigest()}  {tar.name}\n" in card
        assert tar.stat().st_size <= 12 * 2**20
    assert sum(tar.stat().st_size for tar in tars) <= 25 * 2**20


def test_pixels_survive_packing(emoji):
    """The digest of the decoded pixels, so a codec that changes one value is noticed."""
    assert emoji.facts.digest == \
        "b7c136066b3685a5c2c5881b160c58ec7dfa8b185404cf9090527bf39f0102c1"
    assert open_images("mnist", split="all").facts.digest == \
        "5d3fa1ca61ccc384b457984646afcc5f6a79fba57e81aa958a3aaebbbbc82c2f"


def test_splits_partition_the_emoji(emoji):
    parts = {split: open_images("emoji", split=split) for split in ("train", "pair", "concept")}
    seen = Counter()
    for split, part in parts.items():
        pairs = [(c, STYLES[s]) for c, s in zip(part.captions, part.style_ids, strict=True)]
        assert {held_out(*pair) for pair in pairs} == {split}
        assert part.facts.classes == emoji.facts.classes
        assert [part.facts.classes[i] for i in part.labels] == part.captions
        seen.update(pairs)
    assert seen == Counter((c, STYLES[s]) for c, s in zip(emoji.captions, emoji.style_ids, strict=True))
    assert not set(parts["train"].captions) & set(parts["concept"].captions)


def test_all_styles_hold_the_same_out(emoji):
    """Each style's own split, none of whose pictures another split has; the classes are those of "emoji"."""
    sizes = {split: len(open_images("emoji:all", split=split)) for split in ("train", "pair", "concept")}
    assert sizes == {"train": 9397, "pair": 1059, "concept": 495}
    pair = open_images("emoji:all", split="pair")
    assert pair.facts.styles == ALL_STYLES and pair.facts.classes == emoji.facts.classes
    four = [(c, s) for c, s in zip(pair.captions, pair.style_ids, strict=True) if s < len(STYLES)]
    plain = open_images("emoji", split="pair")
    assert sorted(four) == sorted(zip(plain.captions, plain.style_ids, strict=True))


def test_mnist():
    train, test = open_images("mnist"), open_images("mnist", split="pair")
    assert (len(train), len(test)) == (10_000, 2_000)
    assert train.facts.classes == DIGITS and train.facts.styles == ("",)
    assert train.get(0).shape == (28, 28, 1)
    assert [DIGITS[i] for i in train.labels] == train.captions
    assert min(np.bincount(train.labels)) > 850
    # A nearest-mean classifier reads 82 % of MNIST: labels and pixels belong together.
    x, z = (np.stack([s.get(i) for i in range(len(s))]).reshape(len(s), -1) / 255 for s in (train, test))
    means = np.stack([x[train.labels == k].mean(0) for k in range(10)])
    guess = ((z[:, None] - means) ** 2).sum(-1).argmin(1)
    assert (guess == test.labels).mean() > 0.78
    with pytest.raises(InputError, match="concept"):
        open_images("mnist", split="concept")


def test_batch_shapes_and_range(emoji):
    x = emoji.batch([5, 0, 5])
    assert x["image"].shape == (3, 3, 64, 64) and x["image"].dtype == torch.float32
    assert x["index"].tolist() == [5, 0, 5] and x["caption"] == [emoji.captions[i] for i in (5, 0, 5)]
    assert x["label"].tolist() == emoji.labels[[5, 0, 5]].tolist()
    assert {x[k].dtype for k in ("label", "style", "index")} == {torch.int64}
    back = ((x["image"] + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()
    assert (back[1] == emoji.get(0)).all()
    assert emoji.batch(range(64))["image"].max() == 1


def test_batch_is_a_function_of_the_rng(emoji):
    take = list(range(16))
    a, b, c = (emoji.batch(take, rng(s), shift=4, flip=0.5)["image"] for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)
    torch.manual_seed(0)
    before = torch.get_rng_state()
    emoji.batch(take, rng(), shift=4, flip=0.5)
    assert torch.equal(before, torch.get_rng_state())
    assert torch.equal(emoji.batch(take, rng())["image"], emoji.batch(take)["image"])


def test_shift_covers_its_range_and_no_more(tmp_path):
    gradient(tmp_path / "x.png")
    data = open_images(str(tmp_path))
    images = data.batch([0] * 600, rng(), shift=2)["image"]
    middle = ((images[:, :2, 32, 32] + 1) * 127.5).round().int().tolist()
    moves = Counter((32 - y, 32 - x) for y, x in middle)
    assert sorted(moves) == [(dy, dx) for dy in range(-2, 3) for dx in range(-2, 3)]
    assert min(moves.values()) > 5  # 24 each on average
    # A folder's pictures repeat their edge: no colour appears that was not there.
    assert images.min() >= -1 and (images[:, 0] * 127.5 + 127.5).max() <= 63.01


def moved(plain, dy, dx, background):
    """plain [C, H, W] moved down by dy and right by dx."""
    out = torch.full_like(plain, background)
    h, w = plain.shape[1:]
    target = out[:, max(dy, 0):h + min(dy, 0), max(dx, 0):w + min(dx, 0)]
    target.copy_(plain[:, max(-dy, 0):h + min(-dy, 0), max(-dx, 0):w + min(-dx, 0)])
    return out


@pytest.mark.parametrize("name, background", [("emoji", 1.0), ("mnist", -1.0)])
def test_shift_uncovers_the_background(name, background):
    data = open_images(name, split="pair")
    fullest = max(range(200), key=lambda i: abs(data.get(i) / 127.5 - 1 - background).mean())
    plain = data.batch([fullest])["image"][0]
    all_moves = [moved(plain, dy, dx, background) for dy in range(-3, 4) for dx in range(-3, 4)]
    for x in data.batch([fullest] * 50, rng(), shift=3)["image"]:
        assert any(torch.equal(x, y) for y in all_moves)


def test_flip_mirrors_with_its_probability(tmp_path):
    gradient(tmp_path / "x.png")
    data = open_images(str(tmp_path))
    plain = data.batch([0])["image"][0]
    images = data.batch([0] * 400, rng(), flip=0.25)["image"]
    mirrored = sum(torch.equal(x, plain.flip(-1)) for x in images)
    assert mirrored + sum(torch.equal(x, plain) for x in images) == 400
    assert abs(mirrored - 100) < 4 * (400 * 0.25 * 0.75) ** 0.5
    assert torch.equal(data.batch([0], rng(), flip=1.0)["image"][0], plain.flip(-1))


def test_size_and_channels():
    small = open_images("emoji", split="concept", size=32, channels=1)
    whole = open_images("emoji", split="concept")
    assert small.get(0).shape == (32, 32, 1) and small.facts.digest == whole.facts.digest
    # Halving keeps the mean brightness (a resize that drops pixels would not).
    grey = np.array([np.asarray(Image.fromarray(whole.get(i)).convert("L")).mean() for i in range(50)])
    assert np.abs(grey - [small.get(i).mean() for i in range(50)]).max() < 2
    colour = open_images("mnist", split="pair", channels=3, size=28)
    assert (colour.get(3) == open_images("mnist", split="pair").get(3)).all()


@pytest.mark.parametrize("wrong", [{"split": "test"}, {"size": 0}, {"size": 5000}, {"channels": 4}])
def test_bad_options(wrong):
    with pytest.raises(UsageError, match=str(next(iter(wrong.values())))):
        open_images("emoji", **wrong)


@pytest.mark.parametrize("wrong", [{"shift": -1}, {"flip": 1.5}, {"shift": 1, "rng": None},
                                   {"flip": 0.5, "rng": None}])
def test_bad_augmentation(emoji, wrong):
    with pytest.raises(ValueError):
        emoji.batch([0], **{"rng": rng()} | wrong)


def test_packer_round_trip(tmp_path):
    pytest.importorskip("resvg_py")
    file = Path(__file__).parents[2] / "scripts" / "pack_data.py"
    spec = importlib.util.spec_from_file_location("pack_data", file)
    pack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pack)
    cells = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), np.uint8)
    items = [{"caption": str(i), "style": "x"} for i in range(7)]
    for name in ("a.tar", "b.tar"):
        pack.write(tmp_path / name, cells, items, columns=3, per_sheet=4)
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert tar.getnames() == ["000000.json", "000000.webp", "000001.json", "000001.webp"]
        assert len(json.load(tar.extractfile("000001.json"))["items"]) == 3
        grid = np.asarray(Image.open(io.BytesIO(tar.extractfile("000000.webp").read())))
    assert (grid[5:10, :4] == cells[3]).all()
    red = pack.raster('<svg xmlns="http://www.w3.org/2000/svg" width="2" height="1">'
                      '<rect width="2" height="1" fill="red"/></svg>')
    assert (red[32, 32] == [255, 0, 0]).all() and (red[5, 32] == 255).all()  # centred on white
