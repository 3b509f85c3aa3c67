import copy
import csv
import io
import json
import os
import tarfile

import numpy as np
import pytest
from PIL import Image

from nexus.data.images import open_images
from nexus.errors import InputError


def picture(path, value=0, size=(16, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)
    return path


def tar_of(path, files):
    with tarfile.open(path, "w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def png(value=0, size=(16, 16)):
    file = io.BytesIO()
    Image.new("RGB", size, (value, value, value)).save(file, "PNG")
    return file.getvalue()


def test_txt_beside_the_picture(tmp_path):
    for i, text in enumerate(["a cat\n", "\ufeffa  dog\nrunning", ""]):
        picture(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(text, encoding="utf-8")
    data = open_images(str(tmp_path))
    assert data.captions == ["a cat", "a dog running", ""]
    assert data.facts.classes == ("", "a cat", "a dog running") and data.labels.tolist() == [1, 2, 0]


def test_metadata_jsonl(tmp_path):
    picture(tmp_path / "a.png")
    picture(tmp_path / "in" / "b.jpg")
    picture(tmp_path / "c.png")
    (tmp_path / "a.txt").write_text("overruled")
    rows = [{"file_name": "a.png", "text": "first"},
            {"file_name": "./in/b.jpg", "caption": "second", "style": "ink"},
            {"file_name": "gone.png", "text": "x"}, {"file_name": "../c.png", "text": "outside"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n\n")
    data = open_images(str(tmp_path))
    assert data.captions == ["first", "", "second"]
    assert data.facts.styles == ("", "ink") and data.style_ids.tolist() == [0, 0, 1]
    reason = "named in the metadata but "
    assert sorted(data.skipped) == [("../c.png", reason + "outside the set"), ("gone.png", reason + "not there")]


def test_metadata_csv(tmp_path):
    picture(tmp_path / "sub" / "a.png")
    with open(tmp_path / "sub" / "metadata.csv", "w", newline="", encoding="utf-8-sig") as file:
        csv.writer(file).writerows([["file_name", "caption", "class"], ["a.png", "one, two\nthree", "k"]])
    data = open_images(str(tmp_path))
    assert data.captions == ["one, two three"] and data.facts.classes == ("k",)


@pytest.mark.parametrize("name, text, said", [
    ("metadata.jsonl", '{"file_name": "a.png", "text": "ok"}\n\n{"file_name":', ":3: not JSON.*column 14"),
    ("metadata.jsonl", '["file_name"]\n', ":1: not a JSON object"),
    ("metadata.jsonl", '{"file_name": "a.png"}\n', ":1: file_name, text"),
    ("metadata.jsonl", '{"file_name": "a.png", "text": 3}\n', ":1: file_name, text"),
    ("metadata.jsonl", "[" * 100_000, ":1: "),
    ("metadata.csv", "name,text\na.png,x\n", "no column file_name among name, text"),
    ("metadata.csv", "file_name,text\na.png\n", ":2: file_name, text"),
    ("metadata.csv", "file_name,text\na.png," + "x" * 200_000, "after line 1: field larger"),
])
def test_damaged_metadata_names_file_and_line(tmp_path, name, text, said):
    picture(tmp_path / "a.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"{name}.*{said}"):
        open_images(str(tmp_path))


def test_metadata_in_another_encoding(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_bytes("file_name,text\na.png,caf\xe9".encode("latin-1"))
    with pytest.raises(InputError, match="metadata.csv"):
        open_images(str(tmp_path))


def test_class_folders(tmp_path):
    for i, name in enumerate(["snow_leopard", "cat", "cat", "red-panda"]):
        picture(tmp_path / name / f"{i}.PNG", value=i)
    data = open_images(str(tmp_path), size=8, channels=1)
    assert data.facts.classes == ("cat", "red-panda", "snow_leopard")
    assert data.captions == ["cat", "cat", "red panda", "snow leopard"]
    assert data.labels.tolist() == [0, 0, 1, 2]
    assert [int(data.get(i)[0, 0, 0]) for i in range(4)] == [1, 2, 3, 0]


def test_folder_without_captions_still_opens(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "notes.md").write_text("not a picture")
    data = open_images(str(tmp_path))
    assert data.captions == [""] and data.skipped == [] and data.facts.size == 64 and data.facts.channels == 3


def test_tar_shards(tmp_path):
    tar_of(tmp_path / "s-0.tar", {"a.png": png(1), "a.txt": b"one",
                                  "b/c.png": png(2), "b/c.json": b'{"caption": "two"}'})
    tar_of(tmp_path / "s-1.tar", {"a.png": png(3),
                                  "a.json": b'{"text": "three", "class": "k", "style": "ink"}'})
    data = open_images(str(tmp_path / "s-*.tar"))
    assert data.captions == ["one", "two", "three"]
    assert data.facts.classes == ("b", "k", "one") and data.facts.styles == ("", "ink")
    assert [int(data.get(i)[0, 0, 0]) for i in range(3)] == [1, 2, 3]
    assert len(open_images(str(tmp_path / "s-1.tar"))) == 1


def test_tar_names_are_only_labels(tmp_path):
    tar_of(tmp_path / "x.tar", {"../../evil.png": png(), "/etc/evil.png": png(), "C:\\evil.png": png()})
    before = sorted(tmp_path.rglob("*"))
    assert len(open_images(str(tmp_path / "x.tar"))) == 3
    assert sorted(tmp_path.rglob("*")) == before


def test_tar_links_and_devices_are_skipped(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            member = tarfile.TarInfo(f"{kind.decode()}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            tar.addfile(member)
        good = tarfile.TarInfo("good.png")
        good.size = len(png())
        tar.addfile(good, io.BytesIO(png()))
    data = open_images(str(tmp_path / "x.tar"))
    assert len(data) == 1 and {reason for _, reason in data.skipped} == {"not a regular file"}
    assert len(data.skipped) == 3


def test_cut_tar_keeps_what_came_before(tmp_path):
    whole = tar_of(tmp_path / "x.tar", {"a.png": png(), "b.png": png(), "c.png": bytes(5000)}).read_bytes()
    (tmp_path / "x.tar").write_bytes(whole[:5000])
    data = open_images(str(tmp_path / "x.tar"))
    assert len(data) == 2
    assert any("damaged" in reason for _, reason in data.skipped)


@pytest.mark.parametrize("content", [b"", b"\x1f\x8b\x08" + bytes(2000), b"hello" * 500, png()])
def test_not_a_tar(tmp_path, content):
    (tmp_path / "x.tar").write_bytes(content)
    with pytest.raises(InputError, match="x.tar.*cannot be read"):
        open_images(str(tmp_path / "x.tar"))


def test_split_of_a_large_folder(tmp_path):
    for i in range(200):
        picture(tmp_path / f"{i:03d}.png", value=i)
    sets = {split: open_images(str(tmp_path), size=8, split=split) for split in ("train", "pair", "all")}
    seen = {s: [int(d.get(i)[0, 0, 0]) for i in range(len(d))] for s, d in sets.items()}
    assert seen["all"] == list(range(200)) and sorted(seen["train"] + seen["pair"]) == seen["all"]
    assert 8 <= len(seen["pair"]) <= 32
    assert len({d.facts.digest for d in sets.values()}) == 3
    assert len({d.facts.classes for d in sets.values()}) == 1
    with pytest.raises(InputError, match="concept"):
        open_images(str(tmp_path), split="concept")
    # More pictures leave the others where they were.
    picture(tmp_path / "more.png", value=255)
    again = open_images(str(tmp_path), size=8, split="pair")
    assert {int(again.get(i)[0, 0, 0]) for i in range(len(again))} - {255} == set(seen["pair"])


@pytest.mark.parametrize("stem", ["a", "b", "c", "d", "e"])
def test_pair_is_never_empty_and_never_everything(tmp_path, stem):
    for i in range(20):
        picture(tmp_path / f"{stem}{i}.png")
    sizes = [len(open_images(str(tmp_path), split=split)) for split in ("train", "pair")]
    assert sum(sizes) == 20 and 1 <= sizes[1] <= 10


def test_small_folder_is_not_split(tmp_path):
    for i in range(19):
        picture(tmp_path / f"{i}.png", value=i)
    assert {len(open_images(str(tmp_path), split=s)) for s in ("train", "pair", "concept", "all")} == {19}


def test_digest_says_what_the_set_holds(tmp_path):
    def digest(name, files, **options):
        for file, value in files.items():
            picture(tmp_path / name / file, value)
        return open_images(str(tmp_path / name), **options).facts.digest

    base = digest("a", {"x.png": 1, "y.png": 2})
    assert digest("b", {"y.png": 2, "x.png": 1}) == base  # wherever it lies
    assert digest("b", {}, size=8, channels=1) == base  # however it is looked at
    assert digest("c", {"x.png": 1, "y.png": 3}) != base
    assert digest("d", {"x.png": 1, "z.png": 2}) != base
    (tmp_path / "b" / "x.txt").write_text("a caption")
    assert digest("b", {}) != base


@pytest.mark.parametrize("keep", [0, 2**28])
def test_lazy_and_kept_pictures_are_the_same(tmp_path, monkeypatch, keep):
    monkeypatch.setattr("nexus.data.images.KEEP_BYTES", keep)
    y, x = np.mgrid[:40, :60].astype(np.uint8)
    Image.fromarray(np.stack([y, x, y], -1)).save(tmp_path / "a.png")
    data = open_images(str(tmp_path), size=20)
    got = data.get(0).astype(int)
    # The middle 40x40 of 40x60, halved: columns 10..49 remain.
    assert got.shape == (20, 20, 3)
    assert abs(got[10, :, 1] - (10.5 + 2 * np.arange(20)))[2:-2].max() <= 1
    assert abs(got[:, 10, 0] - (0.5 + 2 * np.arange(20)))[2:-2].max() <= 1


@pytest.mark.parametrize("damage", ["changed", "gone", "broken"])
def test_file_that_changes_after_opening(tmp_path, monkeypatch, damage):
    monkeypatch.setattr("nexus.data.images.KEEP_BYTES", 0)
    file = picture(tmp_path / "a.png")
    data = open_images(str(tmp_path))
    data.get(0)
    if damage == "changed":
        picture(file, 9)
    elif damage == "gone":
        file.unlink()
    else:
        file.write_bytes(b"x")
    with pytest.raises(InputError, match="a.png"):
        data.get(0)


def test_captions_that_are_not_text(tmp_path):
    bad = {"latin": b"caf\xe9", "list": b"[1]", "number": b'{"text": 3}', "deep": b"[" * 100_000,
           "class": b'{"class": 3}', "surrogate": b'{"text": "\\ud800"}', "long": b" " * (2**20 + 1)}
    for name, content in bad.items():
        picture(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.{'txt' if name in ('latin', 'long') else 'json'}").write_bytes(content)
    picture(tmp_path / "good.png")
    data = open_images(str(tmp_path))
    assert len(data) == 1
    assert sorted(name for name, _ in data.skipped) == sorted(f"{name}.png" for name in bad)


def test_links_and_pipes(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out"
    picture(inside / "a.png")
    picture(outside / "b.png")
    (inside / "loop").symlink_to(inside)
    (inside / "link.png").symlink_to(outside / "b.png")
    (inside / "dangling.png").symlink_to(inside / "nothing")
    os.mkfifo(inside / "pipe.png")
    picture(inside / ".hidden" / "c.png")
    (inside / "._a.png").write_bytes(b"resource fork")
    data = open_images(str(inside))
    assert len(data) == 2
    assert sorted(name for name, _ in data.skipped) == ["dangling.png", "loop", "pipe.png"]


def test_file_name_that_is_not_utf8(tmp_path):
    picture(tmp_path / "a.png")
    os.rename(tmp_path / "a.png", os.fsencode(tmp_path) + b"/\xff.png")
    picture(tmp_path / "b.png")
    data = open_images(str(tmp_path))
    assert len(data) == 1 and data.skipped[0][0] == "?.png"


@pytest.mark.parametrize("spec", ["", "nowhere", "no/such/*.tar", "x\0y", "a" * 5000])
def test_missing(tmp_path, monkeypatch, spec):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="does not exist") as error:
        open_images(spec)
    assert error.value.hint and "\n" not in str(error.value)


def test_empty_folder(tmp_path):
    with pytest.raises(InputError, match="no usable picture"):
        open_images(str(tmp_path))


def test_set_can_be_copied(tmp_path):
    """As a loader does for its worker processes."""
    picture(tmp_path / "a.png", 7)
    for data in (open_images(str(tmp_path)), open_images("mnist", split="pair")):
        assert (copy.deepcopy(data).get(0) == data.get(0)).all()
