"""Picture files: uint8 [H, W, C] in and out, with the record of how they were made inside."""

import contextlib
import io
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageOps, PngImagePlugin

from nexus.atomic import read_given, write_bytes
from nexus.errors import InputError, UsageError

SCHEMA = "nexus/1"
# PIL reads dozens of formats; the parsers of the rare ones are attack surface.
READABLE = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP", ".gif": "GIF"}
FILE_LIMIT = 256 * 2**20
PIXEL_LIMIT = 64 * 2**20
SIDE_LIMIT = 32_768
RECORD_LIMIT = 4 * 2**20
JPEG_RECORD = 60_000                                    # bytes; a JPEG segment holds 64 kB
_EXIF_IFD, _USER_COMMENT, _UNICODE = 0x8769, 0x9286, b"UNICODE\0"


def read_image(path: str | os.PathLike | bytes, *, mode: str = "RGB") -> np.ndarray:
    """A picture as uint8 [H, W, C], upright, transparency over white; InputError for what is not one or too large.

    mode: "RGB" (C = 3) or "L" (C = 1). Allowed: PNG, JPEG, WebP, GIF, BMP, TIFF; of animations the first frame.
    """
    with _opened(path) as (image, name):
        if image.width * image.height > PIXEL_LIMIT or max(image.size) > SIDE_LIMIT:
            raise InputError(f"{name}: {image.width}x{image.height} pixels is too large (limit {PIXEL_LIMIT:,})",
                             hint="make it smaller first")
        try:
            image.load()
            upright = ImageOps.exif_transpose(image)
            return _axes(np.asarray(opaque(upright).convert(mode)))
        except _BROKEN as error:
            raise InputError(f"{name}: the picture is damaged ({_short(error)})", hint="save it anew") from None


# Whatever Pillow's parsers raise on damaged bytes: they index, divide and unpack what a file says, checked or not.
_BROKEN = (OSError, ValueError, SyntaxError, IndexError, KeyError, TypeError, OverflowError, EOFError, MemoryError,
           ZeroDivisionError, NotImplementedError, AttributeError, RuntimeError, ArithmeticError,
           Image.DecompressionBombError)


def _short(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120] or type(error).__name__


@contextlib.contextmanager
def _opened(source) -> Iterator[tuple[Image.Image, str]]:
    """A picture file of an allowed kind and size, its pixels not yet decoded, and what to call it."""
    name = "the picture on stdin" if isinstance(source, bytes) else str(source)
    data = read_given(source, "picture", FILE_LIMIT)
    if len(data) > FILE_LIMIT:
        raise InputError(f"{name}: {len(data):,} bytes is too large (limit {FILE_LIMIT:,})")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")                 # PIL warns of odd metadata; what matters is raised
        # Not imageio, which tries every format that PIL has, and decodes before its caller has seen the size.
        try:
            image = Image.open(io.BytesIO(data), formats=READABLE)
        except Image.DecompressionBombError:
            raise InputError(f"{name}: the picture has too many pixels (limit {PIXEL_LIMIT:,})",
                             hint="make it smaller first") from None
        except _BROKEN:
            raise InputError(f"{name} is not a picture that can be read",
                             hint="PNG, JPEG, WebP, GIF, BMP and TIFF are") from None
        with image:
            yield image, name


def opaque(image: Image.Image) -> Image.Image:
    """Any of PIL's modes -> L or RGB: 16-bit grey keeps its high byte, alpha is laid over white.

    ValueError for floating-point pixels, of which nobody knows what is white.
    """
    if image.mode.startswith("I"):                      # convert() would clip at 255
        return Image.fromarray((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError("floating-point pixels are not supported, expected 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        canvas = Image.new("RGB", image.size, "white")
        canvas.paste(image, mask=image.getchannel("A"))
        return canvas
    return image if image.mode in ("L", "RGB") else image.convert("RGB")


def _axes(array: np.ndarray) -> np.ndarray:
    return array[:, :, None] if array.ndim == 2 else array


def fitted(array: np.ndarray, width: int, height: int, *, mask: bool = False) -> np.ndarray:
    """uint8 [H, W, C] -> [height, width, C]: resized until it covers the size, then cut to its middle.

    The one way in which a picture given by a user meets the shape of a model; nothing is stretched. mask: values are
    averaged over the area of a pixel, for the picture's own resampling (bicubic) would overshoot at an edge.
    """
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    how = Image.Resampling.BOX if mask else Image.Resampling.BICUBIC
    return np.array(_axes(np.asarray(ImageOps.fit(image, (width, height), how))))


def format_of(path: str | os.PathLike) -> str:
    """The format that a file name's ending asks for, or UsageError."""
    ending = Path(path).suffix.lower()
    if ending not in FORMATS:
        raise UsageError(f"'{path}': cannot write a picture with the ending '{ending}'",
                         hint="endings: " + " ".join(FORMATS))
    return FORMATS[ending]


def write_image(path: str | os.PathLike, array: np.ndarray, record: dict | None = None, *, metadata: bool = True,
                exists: str = "error") -> Path:
    """Write uint8 [H, W, C] (C = 1 or 3) in the format of the name's ending, whole or not at all.

    record: JSON data on how it was made, stored inside unless metadata=False. Equal calls give equal bytes.
    Raises OutputError, or UsageError for an unknown ending.
    """
    return write_bytes(path, encode(array, format_of(path), record if metadata else None), exists=exists)


def encode(array: np.ndarray, form: str, record: dict | None = None) -> bytes:
    """The bytes of a picture file: form is "PNG", "JPEG", "WEBP" or "GIF"; uint8 [H, W, C]."""
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape:
        raise UsageError(f"a picture is uint8 [H, W, 1 or 3], not {array.dtype} {list(array.shape)}")
    image = Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array)
    stored = {} if record is None else _inside(form, record)
    file = io.BytesIO()
    image.save(file, form, **_settings(form), **stored)
    return file.getvalue()


def _settings(form: str) -> dict:
    return {"PNG": {"compress_level": 6}, "JPEG": {"quality": 95, "subsampling": 0},
            "WEBP": {"lossless": True, "quality": 75}, "GIF": {}}[form]


def _inside(form: str, record: dict) -> dict:
    """Where each format keeps the record, in JSON whose escapes carry surrogates and NUL through."""
    text = json.dumps({"schema": SCHEMA, **record}, ensure_ascii=True, sort_keys=True, default=str)
    if form == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("nexus", text)
        info.add_itxt("parameters", _parameters(record))
        return {"pnginfo": info}
    if form == "GIF":
        return {"comment": text.encode("ascii")}
    text = json.dumps({"schema": SCHEMA, **record}, ensure_ascii=False, sort_keys=True, default=str)
    if form == "JPEG" and len(text.encode("utf-16-be", "surrogatepass")) > JPEG_RECORD:
        text = json.dumps({"schema": SCHEMA, "seed": record.get("seed"), "shortened": True}, sort_keys=True)
    exif = Image.Exif()
    exif[_EXIF_IFD] = {_USER_COMMENT: _UNICODE + text.encode("utf-16-be", "surrogatepass")}
    return {"exif": exif.tobytes()}


def _parameters(record: dict) -> str:
    """The text that A1111, Forge and Civitai read: prompt, negative prompt, then `Steps: ..., Seed: ...`."""
    size = f"{record['width']}x{record['height']}" if record.get("width") and record.get("height") else None
    facts = {"Steps": record.get("steps"), "Sampler": record.get("sampler"), "CFG scale": record.get("guidance"),
             "Seed": record.get("seed"), "Size": size, "Model": record.get("model")}
    lines = [str(record.get("prompt") or "")]
    if record.get("negative_prompt"):
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    lines.append(", ".join(f"{key}: {value}" for key, value in facts.items() if value is not None))
    return "\n".join(lines).replace("\0", "").encode("utf-8", "replace").decode("utf-8")


def read_record(path: str | os.PathLike) -> dict | None:
    """The record inside a picture, or None when it has none; InputError when the file is no picture.

    It comes from outside: a JSON object of at most 4 MB, and nothing in it is to be trusted.
    """
    with _opened(path) as (image, _):
        try:
            text = _stored(image)
        except _BROKEN:
            return None
    return parsed_record(text)


def parsed_record(text: str) -> dict | None:
    """The record that a file's text is, or None for any other text."""
    try:
        value = json.loads(text) if text and len(text) <= RECORD_LIMIT else None
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _stored(image: Image.Image) -> str:
    if image.format == "PNG":
        if "nexus" not in image.info:
            image.load()                                # text chunks may stand behind the pixels
        return str(image.info.get("nexus", ""))
    if image.format == "GIF":
        return bytes(image.info.get("comment", b"")).decode("ascii", "replace")
    comment = image.getexif().get_ifd(_EXIF_IFD).get(_USER_COMMENT, b"")
    raw = comment.encode("latin-1", "replace") if isinstance(comment, str) else bytes(comment)
    return raw[len(_UNICODE):].decode("utf-16-be", "surrogatepass") if raw.startswith(_UNICODE) else ""


def enlarged(image: np.ndarray, side: int) -> np.ndarray:
    """uint8 [H, W, C] at the largest whole multiple of its size that is at most `side` high, without smoothing."""
    times = max(1, side // image.shape[0])
    return image.repeat(times, 0).repeat(times, 1)


def contact_sheet(images: Sequence[np.ndarray], cols: int, captions: Sequence[str] | None = None) -> np.ndarray:
    """All pictures on one sheet, row by row: uint8 [H', W', 3]; smaller ones are centred on white."""
    high, wide = max(i.shape[0] for i in images), max(i.shape[1] for i in images)
    gap, text = 2, 14 if captions else 0
    rows = -(-len(images) // cols)
    sheet = Image.new("RGB", (cols * (wide + gap) + gap, rows * (high + gap + text) + gap), "white")
    draw = ImageDraw.Draw(sheet)
    for index, array in enumerate(images):
        left, top = gap + index % cols * (wide + gap), gap + index // cols * (high + gap + text)
        picture = Image.fromarray(array.repeat(3, 2) if array.shape[2] == 1 else array)
        sheet.paste(picture, (left + (wide - picture.width) // 2, top + (high - picture.height) // 2))
        if captions:
            fitting = captions[index].encode("ascii", "replace").decode()[:max(wide // 6, 1)]
            draw.text((left, top + high + 1), fitting, fill="black")
    return np.asarray(sheet)


def half_blocks(array: np.ndarray, columns: int, *, color: bool = True) -> str:
    """A picture for a terminal: each character shows two pixels, one above the other, in 24-bit colour or ASCII greys.

    columns: the width to fit into; a picture is never enlarged beyond twice its size.
    """
    wide = max(1, min(columns, array.shape[1] * 2))
    high = max(2, round(array.shape[0] * wide / array.shape[1] / 2) * 2)
    pixels = Image.fromarray(array.repeat(3, 2) if array.shape[2] == 1 else array).resize((wide, high))
    values = np.asarray(pixels).astype(int)
    if not color:
        greys = (values[::2].mean(2) + values[1::2].mean(2)) / 2
        return "\n".join("".join(" .:-=+*#%@"[int(v * 9.99 / 255)] for v in row) for row in greys)
    lines = []
    for upper, lower in zip(values[::2], values[1::2], strict=True):
        cells = (f"\x1b[38;2;{a};{b};{c};48;2;{d};{e};{f}m\u2580"
                 for (a, b, c), (d, e, f) in zip(upper, lower, strict=True))
        lines.append("".join(cells) + "\x1b[0m")
    return "\n".join(lines)
