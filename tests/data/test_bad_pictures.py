"""Pictures as users have them: every bad one is skipped with a reason, every odd one is read right."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from nexus.data.images import open_images
from nexus.errors import InputError

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (48, 48, 3), np.uint8)


def encoded(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def chunk(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_header(width, height, depth=8, colour=2):
    """A PNG that says it is this large and holds no pixels to speak of."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")


def flipped_bit(data, at):
    return data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1:]


GOOD_PNG = encoded(Image.fromarray(NOISE), "PNG")
GOOD_JPEG = encoded(Image.fromarray(NOISE), "JPEG")
GOOD_WEBP = encoded(Image.fromarray(NOISE), "WEBP")

BAD = {
    "empty.png": b"",
    "one byte.png": b"\x89",
    "html.png": b"<!DOCTYPE html><html><body>404 Not Found</body></html>",
    "text.jpg": b"just some text",
    "zeros.png": bytes(4096),
    "cut.png": GOOD_PNG[:len(GOOD_PNG) // 2],
    "header only.png": GOOD_PNG[:33],
    "cut.jpg": GOOD_JPEG[:len(GOOD_JPEG) // 2],
    "cut.webp": GOOD_WEBP[:len(GOOD_WEBP) // 2],
    "bad checksum.png": flipped_bit(GOOD_PNG, len(GOOD_PNG) // 2),
    "bad header checksum.png": flipped_bit(GOOD_PNG, 20),
    "bomb.png": png_header(60_000, 60_000),
    "large bomb.png": png_header(10_000, 9_000),  # PIL alone would only warn of it
    "small bomb.png": png_header(10_000, 5_001),
    "endless.png": png_header(2**31 - 1, 2**31 - 1),
    "dot.gif": encoded(Image.new("P", (1, 1)), "GIF"),
    "sliver.png": encoded(Image.new("L", (500, 2)), "PNG"),
    "svg.svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>',
    "phone.heic": b"\x00\x00\x00\x18ftypheic\x00\x00\x00\x00mif1heic" + bytes(100),
    "layers.psd": b"8BPS\x00\x01" + bytes(100),
    "postscript.png": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n",
    "icon.png": encoded(Image.new("RGB", (32, 32)), "ICO"),
    "float.tiff": encoded(Image.new("F", (32, 32)), "TIFF"),
    "text bomb.png": GOOD_PNG[:33] + chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**27))) + GOOD_PNG[33:],
}


@pytest.mark.parametrize("name", BAD)
def test_bad_picture_is_skipped_with_a_reason(tmp_path, name):
    (tmp_path / name).write_bytes(BAD[name])
    (tmp_path / "zz good.png").write_bytes(GOOD_PNG)
    data = open_images(str(tmp_path))
    assert len(data) == 1 and data.get(0).shape == (64, 64, 3)
    (skipped, reason), = data.skipped
    assert skipped == name and reason and "\n" not in reason and "BytesIO" not in reason


def test_nothing_but_bad_pictures(tmp_path):
    for name, content in BAD.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match="no usable picture.*first of 24") as error:
        open_images(str(tmp_path))
    assert error.value.code == 3 and error.value.hint and "\n" not in str(error.value)


def test_too_many_bytes(tmp_path):
    with open(tmp_path / "big.png", "wb") as file:
        file.truncate(64 * 2**20 + 1)
    (tmp_path / "good.png").write_bytes(GOOD_PNG)
    data = open_images(str(tmp_path))
    assert "bytes" in data.skipped[0][1] and len(data) == 1


@pytest.mark.parametrize("good", [GOOD_PNG, GOOD_JPEG, GOOD_WEBP], ids=["png", "jpeg", "webp"])
def test_random_damage_never_escapes(tmp_path, good):
    (tmp_path / "a good.png").write_bytes(GOOD_PNG)
    for i in range(60):
        data = bytearray(good)
        for at in RNG.integers(0, len(data), RNG.integers(1, 8)):
            data[at] = RNG.integers(256)
        (tmp_path / f"{i}.png").write_bytes(data[:RNG.integers(1, len(data) + 1)] if i % 3 == 0 else data)
    data = open_images(str(tmp_path), split="all")
    assert len(data) + len(data.skipped) == 61
    assert np.isfinite(data.batch(range(len(data)))["image"].numpy()).all()


def read(tmp_path, name, content, **options):
    (tmp_path / name).write_bytes(content)
    data = open_images(str(tmp_path), **options)
    assert not data.skipped
    return data.get(0)


HALVES = np.zeros((32, 32, 3), np.uint8)
HALVES[:, 16:] = 255


def corner(x):
    """Mean colour of the left and of the right half, away from the middle."""
    side = x.shape[1] // 3
    return x[:, :side].mean((0, 1)).round().tolist(), x[:, -side:].mean((0, 1)).round().tolist()


@pytest.mark.parametrize("name, image, options", [
    ("grey.png", Image.fromarray(HALVES).convert("L"), {}),
    ("one bit.png", Image.fromarray(HALVES).convert("1"), {}),
    ("palette.png", Image.fromarray(HALVES).quantize(2), {}),
    ("palette.gif", Image.fromarray(HALVES).quantize(2), {}),
    ("cmyk.jpg", Image.fromarray(HALVES).convert("CMYK"), {}),
    ("cmyk.tif", Image.fromarray(HALVES).convert("CMYK"), {}),
    ("ycc.jpg", Image.fromarray(HALVES).convert("YCbCr"), {}),
    ("progressive.jpg", Image.fromarray(HALVES), {"progressive": True}),
    ("16 bit.png", Image.fromarray(HALVES[..., 0].astype(np.uint16) * 257), {}),
    ("16 bit.tiff", Image.fromarray(HALVES[..., 0].astype(np.uint16) * 257), {}),
    ("grey alpha.png", Image.fromarray(HALVES).convert("LA"), {}),
    ("lossless.webp", Image.fromarray(HALVES), {"lossless": True}),
    ("plain.bmp", Image.fromarray(HALVES), {}),
    ("profile.png", Image.fromarray(HALVES), {"icc_profile": b"not a profile"}),
])
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_reads_as_the_same_picture(tmp_path, name, image, options, channels):
    kind = {"jpg": "JPEG", "tif": "TIFF"}.get(name[-3:], name.rpartition(".")[2].upper())
    x = read(tmp_path, name, encoded(image, kind, **options), size=32, channels=channels)
    assert x.shape == (32, 32, channels) and x.dtype == np.uint8
    left, right = corner(x)
    assert max(left) <= 3 and min(right) >= 252


def test_alpha_lies_on_white(tmp_path):
    rgba = np.zeros((32, 32, 4), np.uint8)
    rgba[:, 16:] = (255, 0, 0, 128)
    left, right = corner(read(tmp_path, "x.png", encoded(Image.fromarray(rgba), "PNG"), size=32))
    assert left == [255, 255, 255] and right == [255, 127, 127]


def test_palette_transparency_lies_on_white(tmp_path):
    image = Image.fromarray(HALVES).quantize(2)
    black = image.getpixel((0, 0))
    left, right = corner(read(tmp_path, "x.png", encoded(image, "PNG", transparency=black), size=32))
    assert left == right == [255, 255, 255]


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animation_gives_its_first_frame(tmp_path, kind):
    frames = [Image.new("RGB", (32, 32), colour) for colour in ("red", "blue", "lime")]
    options = {"save_all": True, "append_images": frames[1:]} | ({"lossless": True} if kind == "WEBP" else {})
    x = read(tmp_path, f"x.{kind.lower()}", encoded(frames[0], kind, **options), size=16)
    assert x.mean((0, 1)).round().tolist() == [255, 0, 0]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_camera_rotation(tmp_path, orientation):
    """Stored turned, tagged with how to turn it back."""
    stored = {
        1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
        5: lambda a: a.swapaxes(0, 1), 6: lambda a: np.rot90(a), 7: lambda a: a[::-1, ::-1].swapaxes(0, 1),
        8: lambda a: np.rot90(a, -1),
    }[orientation]
    upright = np.zeros((32, 32, 3), np.uint8)
    upright[:16, :16] = (255, 0, 0)
    upright[:16, 16:] = (0, 255, 0)
    exif = Image.Exif()
    exif[0x112] = orientation
    image = Image.fromarray(np.ascontiguousarray(stored(upright)))
    x = read(tmp_path, "x.png", encoded(image, "PNG", exif=exif), size=32)
    assert np.abs(x.astype(int) - upright).max() == 0


def test_content_decides_and_not_the_extension(tmp_path):
    x = read(tmp_path, "really a jpeg.png", GOOD_JPEG, size=48)
    assert np.abs(x.astype(int) - np.asarray(Image.open(io.BytesIO(GOOD_JPEG)))).max() == 0


def test_large_jpeg_is_downscaled_well(tmp_path):
    """The fast path through the decoder's own scaling must not alias: fine noise becomes its mean."""
    fine = np.random.default_rng(1).integers(0, 256, (1024, 1024), np.uint8)
    x = read(tmp_path, "x.jpg", encoded(Image.fromarray(fine), "JPEG", quality=95), size=16)
    assert np.abs(x.astype(float) - 127.5).max() < 12


def test_wide_picture_is_cut_in_the_middle(tmp_path):
    wide = np.zeros((16, 48, 3), np.uint8)
    wide[:, 16:32] = 200
    assert (read(tmp_path, "x.png", encoded(Image.fromarray(wide), "PNG"), size=16) == 200).all()
