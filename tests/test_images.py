"""Pictures in and out: exact pixels, exact records for any prompt, refusal of whatever is not a picture."""

import hashlib
import io
import json
import struct
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from nexus import images
from nexus.data.images import open_images
from nexus.errors import InputError, OutputError, UsageError

PROMPTS = ["", " ", "a cat", "😀🏳️‍🌈", "漢字", "مرحبا", "e\u0301", "\0", "a\0b", "\ud800", "x\udcffy",
           "<script>alert(1)</script>",
           '{"a": "}"}', "%s%n", "$(rm -rf /)", "a\nNegative prompt: b\nSteps: 9", "\x1b[31m", "\u202e", "x" * 10_000,
           "'\"`\\",
           "é" * 5000, "\r\n", "\ufeff", "\uffff"]


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


@pytest.mark.parametrize("ending", images.FORMATS)
@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_record_comes_back_exactly(tmp_path, picture, ending, prompt):
    record = {"prompt": prompt, "negative_prompt": prompt, "seed": 2**63 - 1, "steps": 20, "guidance": 0.1,
              "none": None}
    path = images.write_image(tmp_path / f"a{ending}", picture, record)
    assert images.read_record(path) == {"schema": images.SCHEMA, **record}


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=200), st.sampled_from(["PNG", "JPEG", "WEBP", "GIF"]))
def test_any_text_comes_back_exactly(tmp_path_factory, prompt, form):
    data = images.encode(np.zeros((8, 8, 3), np.uint8), form, {"prompt": prompt})
    assert images.read_record(data)["prompt"] == prompt


@pytest.mark.parametrize("ending,exact", [(".png", True), (".webp", True), (".jpg", False), (".gif", False)])
@pytest.mark.parametrize("channels", (1, 3))
def test_pixels_come_back(tmp_path, picture, ending, exact, channels):
    smooth = np.add.outer(np.arange(20), np.arange(30)).astype(np.uint8)[:, :, None].repeat(channels, 2)
    path = images.write_image(tmp_path / f"a{ending}", smooth)
    read = images.read_image(path, mode="L" if channels == 1 else "RGB")
    assert read.shape == smooth.shape and read.dtype == np.uint8
    assert np.abs(read.astype(int) - smooth).max() <= (0 if exact else 4)


@pytest.mark.parametrize("ending", images.FORMATS)
def test_equal_calls_give_equal_bytes(tmp_path, picture, ending):
    record = {"b": 1, "a": {"d": 2, "c": 3}}
    first = images.write_image(tmp_path / f"a{ending}", picture, record).read_bytes()
    again = images.write_image(tmp_path / f"b{ending}", picture, dict(reversed(record.items()))).read_bytes()
    assert first == again


@pytest.mark.parametrize("ending", images.FORMATS)
def test_metadata_can_be_left_out(tmp_path, picture, ending):
    path = images.write_image(tmp_path / f"a{ending}", picture, {"prompt": "secret"}, metadata=False)
    data = path.read_bytes()
    assert b"secret" not in data and "secret".encode("utf-16-be") not in data and images.read_record(path) is None


def test_other_tools_find_the_parameters(tmp_path, picture):
    record = {"prompt": "a cat", "negative_prompt": "dog", "steps": 20, "seed": 5, "guidance": 7.5, "sampler": "ddim",
              "width": 30, "height": 20, "model": "m"}
    path = images.write_image(tmp_path / "a.png", picture, record)
    assert Image.open(path).info["parameters"] == (
        "a cat\nNegative prompt: dog\nSteps: 20, Sampler: ddim, CFG scale: 7.5, Seed: 5, Size: 30x20, Model: m")


def test_nothing_is_replaced_unasked(tmp_path, picture):
    path = images.write_image(tmp_path / "a.png", picture)
    with pytest.raises(OutputError):
        images.write_image(path, picture)
    images.write_image(path, picture, exists="overwrite")


@pytest.mark.parametrize("name", ("a", "a.txt", "a.PNG.exe", "a.tiff", ".png"))
def test_unknown_endings(tmp_path, picture, name):
    with pytest.raises(UsageError):
        images.write_image(tmp_path / name, picture)


@pytest.mark.parametrize("array", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 2), np.uint8), np.zeros((4, 4, 3)),
                                   np.zeros((0, 4, 3), np.uint8)])
def test_only_pictures_are_written(tmp_path, array):
    with pytest.raises(UsageError):
        images.write_image(tmp_path / "a.png", array)


def saved(image, form="PNG", **more) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **more)
    return out.getvalue()


@pytest.mark.parametrize("mode", ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I", "CMYK", "YCbCr"))
def test_every_mode_becomes_eight_bits(mode):
    form = "TIFF" if mode in ("CMYK", "YCbCr", "I") else "PNG"
    if mode.startswith("I"):
        image = Image.fromarray(np.full((5, 7), 65535, np.uint16 if mode == "I;16" else np.int32))
    else:
        image = Image.new("L", (7, 5), 255).convert(mode)
    read = images.read_image(saved(image, form))
    assert read.shape == (5, 7, 3) and read.dtype == np.uint8
    assert (read >= 250).all()


def test_a_dark_picture_of_16_bits_stays_dark_and_a_training_set_sees_the_same(tmp_path):
    Image.fromarray(np.full((16, 16), 200, np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.full((16, 16), 0x80FF, np.uint16)).save(tmp_path / "b.png")
    data = open_images(str(tmp_path), size=16, channels=3)
    for i, value in enumerate((0, 0x80)):
        read = images.read_image(tmp_path / f"{'ab'[i]}.png")
        assert (read == value).all() and np.array_equal(data.get(i), read)


def test_floating_point_pixels_are_refused():
    with pytest.raises(InputError, match="floating-point"):
        images.read_image(saved(Image.new("F", (7, 5), 255), "TIFF"))


def test_transparency_lies_on_white():
    assert (images.read_image(saved(Image.new("RGBA", (3, 2), (9, 9, 9, 0)))) == 255).all()
    palette = Image.new("P", (3, 2), 0)
    assert (images.read_image(saved(palette, transparency=0)) == 255).all()


def test_exif_turns_the_picture_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    read = images.read_image(saved(Image.new("RGB", (8, 4)), "JPEG", exif=exif.tobytes()))
    assert read.shape == (8, 4, 3)


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (4, 4), color) for color in ("red", "blue")]
    read = images.read_image(saved(frames[0], "GIF", save_all=True, append_images=frames[1:]))
    assert tuple(read[0, 0]) == (255, 0, 0)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def bomb(width: int, height: int) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND",
                                                                                                             b"")


@pytest.mark.parametrize("data", [
    b"", b"\0", b"<html>hello</html>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"GIF89a", b"RIFF\0\0\0\0WEBP",
    b"BM" + b"\0" * 60,
    bomb(60_000, 60_000), bomb(2**31 - 1, 2**31 - 1), bomb(40_000, 10), bomb(0, 0), b"%PDF-1.4",
    b"%!PS-Adobe-3.0 EPSF-3.0",
    b"P6 9999999 9999999 255\n", b"\0" * 10_000,
])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(InputError):
        images.read_image(data)


def test_damage_anywhere_is_refused_or_read(picture):
    rng = np.random.default_rng(1)
    for form in ("PNG", "JPEG", "WEBP", "GIF"):
        whole = images.encode(picture, form, {"prompt": "x"})
        for trial in range(60):
            data = bytearray(whole)
            if trial % 2:
                data = data[:rng.integers(0, len(data))]
            else:
                for place in rng.integers(0, len(data), 5):
                    data[place] ^= 1 << rng.integers(0, 8)
            for read in (images.read_image, images.read_record):
                try:
                    read(bytes(data))
                except InputError:
                    pass


@pytest.mark.parametrize("text", ["", "null", "[1]", '"x"', "{", "[" * 100_000, '{"a": NaN', "9" * 5000])
def test_a_foreign_record_is_none(text):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("nexus", text)
    assert images.read_record(saved(Image.new("RGB", (2, 2)), pnginfo=info)) is None


def test_a_huge_record_is_not_parsed():
    info = PngImagePlugin.PngInfo()
    info.add_itxt("nexus", json.dumps({"a": "x" * (images.RECORD_LIMIT + 1)}))
    assert images.read_record(saved(Image.new("RGB", (2, 2)), pnginfo=info)) is None


def test_a_long_record_is_shortened_where_it_does_not_fit(tmp_path, picture):
    record = {"prompt": "漢" * 40_000, "seed": 3}
    path = images.write_image(tmp_path / "a.webp", picture, record)
    assert images.read_record(path) == {"schema": images.SCHEMA, **record}
    path = images.write_image(tmp_path / "a.jpg", picture, record)
    assert images.read_record(path) == {"schema": images.SCHEMA, "seed": 3, "shortened": True}


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path, tmp_path / "none.png", "a\0b.png", "/dev/zero"):
        with pytest.raises(InputError):
            images.read_image(path)


def test_a_sheet_holds_every_picture(picture):
    sheet = images.contact_sheet([picture] * 5, 3)
    assert sheet.shape == (2 * 22 + 2, 3 * 32 + 2, 3)
    assert (sheet[2:22, 2:32] == picture).all() and (sheet[24:44, 34:64] == picture).all()
    assert (sheet[24:44, 66:96] == 255).all()
    captioned = images.contact_sheet([picture, picture[:, :, :1]], 2, ["1", "😀"])
    assert captioned.shape == (20 + 2 + 14 + 2, 2 * 32 + 2, 3)


def test_half_blocks(picture):
    lines = images.half_blocks(picture, 10).splitlines()
    assert len(lines) == 3 and all(line.count("\u2580") == 10 and line.endswith("\x1b[0m") for line in lines)
    plain = images.half_blocks(np.zeros((4, 4, 1), np.uint8), 8, color=False)
    assert set(plain) <= {" ", "\n"} and "\x1b" not in plain


def test_pinned_bytes():
    """A change of these bytes would make every old manifest's hash wrong: bump the schema when it is meant."""
    data = images.encode(np.arange(48, dtype=np.uint8).reshape(4, 4, 3), "PNG", {"seed": 1})
    pixels = images.read_image(data)
    assert hashlib.sha256(pixels.tobytes()).hexdigest() == hashlib.sha256(bytes(range(48))).hexdigest()
    assert data.index(b"nexus") < data.index(b"IDAT")
