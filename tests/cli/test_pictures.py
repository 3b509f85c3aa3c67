"""Pictures that a user gives: what cannot be used is told in one line, before a model is loaded for it."""

import struct
import zlib

import numpy as np
import pytest

from nexus.images import read_image, read_record, write_image


def png(width, height):
    """A picture of 100 bytes that claims this size."""
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.fixture
def here(tmp_path):
    """A folder of pictures of every wrong kind, and one good one, wider than high."""
    write_image(tmp_path / "good.png", np.random.default_rng(0).integers(0, 256, (16, 48, 3), dtype=np.uint8))
    write_image(tmp_path / "small.png", np.zeros((8, 8, 1), np.uint8))
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("hello")
    (tmp_path / "huge.png").write_bytes(png(60_000, 60_000))
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    (tmp_path / "pickle.png").write_bytes(b"\x80\x04\x95")
    (tmp_path / "folder.png").mkdir()
    return tmp_path


@pytest.mark.parametrize("name, said", [("empty.png", "PNG, JPEG"), ("text.png", "PNG, JPEG"), ("huge.png", "smaller"),
                                        ("torn.png", "save it anew"), ("pickle.png", "PNG, JPEG"),
                                        ("folder.png", "hint: "), ("none.png", "check the path")])
@pytest.mark.parametrize("flag", ["--image", "--mask"])
def test_one_line_names_the_file_and_the_next_step(warm, trained, here, flag, name, said):
    """The model does not exist: the picture is read first."""
    given = ["--image", name] if flag == "--image" else ["--image", "good.png", "--mask", name]
    done = warm("sample", "ddpm", "-m", trained, *given, "-s", 1, "-o", "a.png", "--device", "cpu", cwd=here)
    lines = done.stderr.decode().splitlines()
    assert done.returncode == 3 and done.stdout == b"" and len(lines) == 2
    assert name in lines[0] and said in lines[1] and not (here / "a.png").exists()
    if (here / name).is_file():
        (here / "not-a-model").mkdir(exist_ok=True)
        assert warm("sample", "ddpm", "-m", "./not-a-model", *given, "-s", 1, cwd=here).returncode == 3


def test_a_mask_of_another_size_names_both(warm, trained, here):
    done = warm("sample", "ddpm", "-m", trained, "-i", "good.png", "--mask", "small.png", "-s", 1, cwd=here)
    text = done.stderr.decode()
    assert done.returncode == 3 and "small.png is 8x8" in text and "48x16" in text and "of the picture's size" in text


def test_a_picture_of_any_shape_is_started_from(warm, trained, here):
    done = warm("sample", "ddpm", "-m", trained, "-i", "good.png", "--strength", 0, "-s", 1, "-o", "a.png", "--device",
                "cpu", cwd=here)
    assert done.returncode == 0, done.stderr.decode()
    assert np.array_equal(read_image(here / "a.png"), read_image(here / "good.png")[:, 16:32])
    assert read_record(here / "a.png")["image"] == "good.png"
