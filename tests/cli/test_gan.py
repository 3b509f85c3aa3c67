"""GANs at the command line: walks as sheets and films, truncation, directions, folders in and out."""

import io
import json

import av
import numpy as np
import pytest

from nexus.images import read_image, read_record, write_image


@pytest.fixture(scope="module")
def runs(warm, tmp_path_factory):
    """A gan and a cyclegan after two steps, and a folder of pictures of odd sizes."""
    folder, draw = tmp_path_factory.mktemp("gan"), np.random.default_rng(0)
    for kind in ("a", "b"):
        (folder / kind).mkdir()
        for i in range(4):
            picture = draw.integers(0, 256, (17 + i, 30, 3), dtype=np.uint8)
            write_image(folder / kind / f"{i}.png", picture)
    more = ("--preset", "tiny", "--steps", 2, "--batch-size", 2, "-q")
    for system, data in (("gan", "a"), ("cyclegan", "a,b")):
        done = warm("train", system, "-d", data, "-r", system, *more, cwd=folder)
        assert done.returncode == 0, done.stderr
    return folder


def test_a_walk_is_a_sheet_or_a_film(warm, runs):
    for name in ("walk.png", "walk.mp4"):
        done = warm("sample", "gan", "-m", "gan", "-s", 3, "--interpolate", 5, "--truncation", 0.8, "-o", name,
                    cwd=runs)
        assert done.returncode == 0, done.stderr
    assert read_image(runs / "walk.png").shape == (20, 92, 3)
    assert read_record(runs / "walk.png")["interpolate"] == 5
    with av.open(io.BytesIO((runs / "walk.mp4").read_bytes())) as film:
        assert json.loads(film.metadata["comment"])["truncation"] == 0.8
        assert len(list(film.decode(video=0))) == 5
    shown = json.loads(warm("info", "walk.mp4", "--json", cwd=runs).stdout)
    assert shown["film"] == "16x16, 5 frames, 12 a second, MP4" and shown["truncation"] == 0.8
    again = warm("sample", "gan", "--like", "walk.mp4", "-m", "gan", "-o", "again.mp4", cwd=runs)
    assert again.returncode == 0 and (runs / "again.mp4").read_bytes() == (runs / "walk.mp4").read_bytes()
    first = warm("sample", "gan", "-m", "gan", "-s", 3, "--truncation", 0.8, "-o", "one.png", cwd=runs)
    assert first.returncode == 0
    assert np.array_equal(read_image(runs / "walk.png")[2:18, 2:18], read_image(runs / "one.png"))


@pytest.mark.parametrize("arguments, code, said", [
    (("gan", "-m", "gan", "-o", "x.mp4"), 2, "--interpolate"),
    (("gan", "-m", "gan", "--interpolate", 1), 2, "whole number"),
    (("gan", "-m", "gan", "--truncation", 0), 2, "above 0"),
    (("gan", "-m", "gan", "--guidance", 3), 2, "--guidance"),
    (("gan", "-m", "gan", "-p", "cat"), 3, "unconditional"),
    (("cyclegan", "-m", "gan", "--image", "a/0.png"), 4, "of 'gan'"),
    (("gan", "-m", "gan", "--direction", "ab", "-o", "x.png"), 2, "--direction"),
    (("cyclegan", "-m", "cyclegan", "-o", "x.png"), 2, "--image"),
    (("cyclegan", "-m", "cyclegan", "--direction", "up"), 2, "ab, ba"),
    (("cyclegan", "-m", "cyclegan", "--image", "a", "--batch", "b.jsonl"), 2, "--batch"),
    (("cyclegan", "-m", "cyclegan", "--image", "cyclegan"), 3, "no picture")])
def test_what_has_no_meaning_is_refused(warm, runs, arguments, code, said):
    for more in ((), ("--dry-run",)):
        done = warm("sample", *arguments, *more, cwd=runs)
        assert done.returncode == code and said in done.stderr.decode(), (more, done.stderr)
    assert not (runs / "x.png").exists() and not (runs / "x.mp4").exists()


def test_a_folder_goes_in_and_a_folder_comes_out(warm, runs):
    for _ in range(2):
        done = warm("sample", "cyclegan", "-m", "cyclegan", "--image", "a", "--direction", "ba", "-o", "out/", "--json",
                    cwd=runs)
        assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in (runs / "out").glob("*.png"))
    assert names == ["0.png", "1.png", "2.png", "3.png"]
    assert [read_image(runs / "out" / n).shape for n in names] == [(17 + i, 30, 3) for i in range(4)]
    assert [json.loads(line)["status"] for line in done.stdout.splitlines()].count("ok") == 0       # done before
    back = warm("sample", "cyclegan", "-m", "cyclegan", "--image", "a/2.png", "--direction", "ab", "-o", "two.png",
                cwd=runs)
    assert back.returncode == 0 and not np.array_equal(read_image(runs / "two.png"), read_image(runs / "out/2.png"))


@pytest.mark.parametrize("data, said", [("a,b,c", "two"), ("a", "two kinds"), ("a,none", "none")])
def test_two_kinds_are_asked_for(warm, runs, data, said):
    done = warm("train", "cyclegan", "-d", data, "-r", "new", "--preset", "tiny", cwd=runs)
    assert done.returncode in (2, 3) and said in done.stderr.decode(), done.stderr
