"""Picture sets: the embedded emoji and digits, a user's folder, a user's tar shards.

Letters: B pictures, H W pixels (H = W = size), C channels (1 grey or 3 RGB), N pictures in a set.
"""

import hashlib
import io
import json
import threading
import warnings
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from nexus.data import shards
from nexus.data.folders import Found, find
from nexus.data.opened import Files, nothing_usable
from nexus.data.spec import EMBEDDED
from nexus.data.split import SPLITS, chosen, held_out
from nexus.errors import InputError, UsageError
from nexus.images import READABLE, opaque

STYLES = ("noto", "twemoji", "flat", "3d")  # of "emoji"; the others have to be asked for
ALL_STYLES = (*STYLES, "outline", "classic", "emojione", "fxemoji")
GROUPS = "-groups"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")

MAX_PIXELS = 50_000_000
MAX_BYTES = 64 * 2**20
MIN_SIDE = 8  # pixels; smaller ones are tracking dots and placeholders
KEEP_BYTES = 256 * 2**20  # a user's pictures stay in memory, resized, up to this much
DEFAULT_SIZE = 64

_ONE_BIG_PICTURE = threading.Lock()  # 50 million pixels need half a gigabyte, so not in eight threads at once


class Facts(NamedTuple):
    """What a set is: a model's config takes its classes and size from here, a run records the digest."""

    classes: tuple[str, ...]  # of the whole set, whatever the split, so labels agree everywhere
    styles: tuple[str, ...]  # ("",) where the set has none
    size: int
    channels: int
    count: int  # pictures in this split
    digest: str  # sha256 over names, captions and bytes of this split


class ImageSet:
    """Pictures with captions; labels [N] index facts.classes, style_ids [N] index facts.styles."""

    medium: ClassVar[str] = "image"

    def __init__(self, facts: Facts, captions: list[str], labels: np.ndarray, style_ids: np.ndarray,
                 load: Callable[[int], np.ndarray], *, names: list[str], pad: int | None = None,
                 skipped: Iterable[tuple[str, str]] = ()):
        self.facts = facts
        self.captions = captions
        self.names = names  # of its files, or its captions where it has none
        self.labels = labels
        self.style_ids = style_ids
        self.skipped = list(skipped)  # (name, reason) of every picture that was left out
        self._load = load
        self.pad = pad  # the background that a shift uncovers; None repeats the edge
        self.cut = 0  # side of the part of a picture that a batch takes; 0 = all of it

    def __len__(self) -> int:
        return len(self.captions)

    def cropped(self, side: int) -> "ImageSet":
        """This set, of whose pictures batches take a random part of side x side pixels, without an rng the middle."""
        self.cut, self.facts = side, self.facts._replace(size=side)
        return self

    def get(self, i: int) -> np.ndarray:
        """Picture i, as opened -> uint8 [H, W, C]; raises InputError if its file has changed or gone since."""
        return self._load(i)

    def batch(self, indices: list[int], rng: torch.Generator | None = None, *,
              shift: int = 0, flip: float = 0.0) -> dict:
        """Pictures as "image" float32 [B, C, H, W] in [-1, 1], with "label", "style", "index" [B], "caption".

        `shift` moves each picture by up to so many pixels both ways, `flip` mirrors it with that
        probability; both are drawn from `rng` alone. Raises ValueError without one, InputError as `get` does.
        """
        if shift < 0 or not 0 <= flip <= 1 or (rng is None and (shift or flip)):
            raise ValueError(f"expected shift >= 0, 0 <= flip <= 1 and an rng, got {shift}, {flip} and {rng}")
        images = [self.get(i) for i in indices]
        if self.cut:
            images = [_part(x, self.cut, rng) for x in images]
        if shift:
            moves = torch.randint(-shift, shift + 1, (len(images), 2), generator=rng).tolist()
            images = [_shifted(x, dy, dx, self.pad) for x, (dy, dx) in zip(images, moves, strict=True)]
        if flip:
            mirrored = (torch.rand(len(images), generator=rng) < flip).tolist()
            images = [x[:, ::-1] if m else x for x, m in zip(images, mirrored, strict=True)]
        stack = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)
        return {"image": (stack.float() / 127.5 - 1).contiguous(), **self.labels_of(indices)}

    def labels_of(self, indices: list[int]) -> dict:
        """What `batch` says of pictures besides their pixels: "label", "style", "index" [B] and "caption"."""
        index = torch.as_tensor(indices, dtype=torch.int64)
        label, style = torch.from_numpy(self.labels)[index], torch.from_numpy(self.style_ids)[index]
        caption = [self.captions[i] for i in indices]
        return {"label": label, "style": style, "caption": caption, "index": index}


def _part(x: np.ndarray, side: int, rng: torch.Generator | None) -> np.ndarray:
    """side x side pixels of x [H, W, C], at a place drawn from rng, or in the middle."""
    room = [n - side for n in x.shape[:2]]
    top, left = (n // 2 if rng is None else int(torch.randint(n + 1, (), generator=rng)) for n in room)
    return x[top:top + side, left:left + side]


def _shifted(x: np.ndarray, dy: int, dx: int, pad: int | None) -> np.ndarray:
    """x [H, W, C] moved down by dy and right by dx pixels."""
    reach = max(abs(dy), abs(dx))
    margins = ((reach, reach), (reach, reach), (0, 0))
    wide = np.pad(x, margins, "edge") if pad is None else np.pad(x, margins, constant_values=pad)
    return wide[reach - dy:reach - dy + x.shape[0], reach - dx:reach - dx + x.shape[1]]


def open_images(spec: str, *, size: int | None = None, channels: int | None = None,
                split: str = "train") -> ImageSet:
    """Opens "emoji", "mnist", a folder, or a .tar (or a glob of them) as pictures of size x size pixels.

    "emoji:noto+flat" are those of some styles alone; "emoji" are those of STYLES, "emoji:all" of ALL_STYLES.
    "emoji-groups" are the same pictures, whose class is the group ("food and drink") and not the concept.

    Without `size` and `channels`: as packed (emoji 64 RGB, mnist 28 grey), else 64 RGB. Raises UsageError for
    a bad option, InputError when there is nothing to read; single bad pictures land in `.skipped` instead.
    """
    if split not in SPLITS:
        raise UsageError(f"split {split!r} is unknown, expected one of {', '.join(SPLITS)}")
    if size is not None and not 1 <= size <= 4096:
        raise UsageError(f"picture size {size} is out of range, expected 1 to 4096 pixels")
    if channels not in (None, 1, 3):
        raise UsageError(f"{channels} channels are not possible, expected 1 (grey) or 3 (colour)")
    name, _, wanted = spec.partition(":")
    if name in EMBEDDED:
        return _open_embedded(name, size, channels, split, tuple(wanted.split("+")) if wanted else ())
    return _open_found(spec, *find(spec), size or DEFAULT_SIZE, channels or 3, split)


def _open_embedded(name: str, size: int | None, channels: int | None, split: str, wanted: tuple[str, ...]) -> ImageSet:
    pictures, items = shards.read(name.removesuffix(GROUPS))
    if wanted == ("all",) and name != "mnist":
        wanted = ALL_STYLES
    if unknown := set(wanted) - {item.get("style") for item in items}:
        raise InputError(f"{name} has no style {min(unknown)!r}",
                         hint="styles: " + (", ".join(sorted({i["style"] for i in items if "style" in i})) or "none"))
    if name != "mnist":
        styles, pad = wanted or STYLES, 255
        part = [held_out(i["caption"], i["style"]) if i["style"] in styles else "" for i in items]
        group = shards.groups() if name.endswith(GROUPS) else {}
        classes = tuple(sorted({group.get(item["caption"], item["caption"])
                                for item, p in zip(items, part, strict=True) if p}))
    else:
        part = ["pair" if item["split"] == "test" else "train" for item in items]
        group, classes, styles, pad = {}, DIGITS, ("",), 0
    places = [i for i, p in enumerate(part) if p and split in (p, "all")]
    if not places:
        raise InputError(f"{name} has no {split!r} split", hint="use train, pair or all")
    digest = hashlib.sha256(json.dumps(group, sort_keys=True).encode() if group else b"")
    for i in places:
        digest.update(json.dumps(items[i], sort_keys=True).encode() + pictures[i].tobytes())
    size, channels = size or pictures.shape[1], channels or pictures.shape[3]
    kept = pictures[places]
    if (size, channels) != (pictures.shape[1], pictures.shape[3]):
        kept = np.stack([_fit(Image.fromarray(x.squeeze()), size, channels) for x in kept])
    captions = [items[i]["caption"] for i in places]
    labels = _positions([group.get(caption, caption) for caption in captions], classes)
    style_ids = _positions([items[i].get("style", "") for i in places], styles)
    facts = Facts(classes, styles, size, channels, len(places), digest.hexdigest())
    return ImageSet(facts, captions, labels, style_ids, kept.__getitem__, names=captions, pad=pad)


def _positions(values: list[str], table: tuple[str, ...]) -> np.ndarray:
    places = {value: i for i, value in enumerate(table)}
    return np.array([places[value] for value in values], np.int64)


def _open_found(spec: str, pictures: list[Found], skipped: list[tuple[str, str]],
                size: int, channels: int, split: str) -> ImageSet:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of big pictures and odd metadata; `skipped` says it all
        files = Files.opened(pictures, skipped, partial(_check, size=size, channels=channels), KEEP_BYTES)
    if not files.found:
        raise nothing_usable("picture", spec, ", ".join(READABLE), skipped)
    classes, styles = (tuple(sorted({getattr(p, name) for p in files.found})) for name in ("group", "style"))
    files = files.part(chosen([p.name for p in files.found], split, spec))
    facts = Facts(classes, styles, size, channels, len(files.found), files.digest())
    return ImageSet(facts, [p.caption for p in files.found], _positions([p.group for p in files.found], classes),
                    _positions([p.style for p in files.found], styles), partial(_load, files),
                    names=[p.name for p in files.found], skipped=skipped)


def _load(files: Files, i: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # said once, at opening
        return files.get(i)


def _check(picture: Found, *, size: int, channels: int) -> tuple[np.ndarray | None, str]:
    """(picture uint8 [H, W, C], sha256 of its bytes), or (None, why it cannot be used)."""
    try:
        if picture.place.length > MAX_BYTES:
            return None, f"{picture.place.length} bytes, more than the {MAX_BYTES} allowed"
        data = picture.place.read()
        return _decode(data, size, channels), hashlib.sha256(data).hexdigest()
    except UnidentifiedImageError:
        return None, f"not a {', '.join(READABLE)} picture"
    except Exception as error:  # a damaged picture makes PIL raise nearly anything; the reason is kept
        return None, " ".join(str(error).split()) or type(error).__name__


def _decode(data: bytes, size: int, channels: int) -> np.ndarray:
    """Picture file -> uint8 [size, size, channels], first frame, upright, on white; raises as PIL does."""
    if not data:
        raise ValueError("empty file")
    with Image.open(io.BytesIO(data), formats=READABLE) as image:
        pixels = image.width * image.height
        if pixels > MAX_PIXELS:
            raise ValueError(f"{image.width}x{image.height} pixels, more than the {MAX_PIXELS} allowed")
        if min(image.size) < MIN_SIDE:
            raise ValueError(f"{image.width}x{image.height} pixels, fewer than {MIN_SIDE} on a side")
        with _ONE_BIG_PICTURE if pixels > MAX_PIXELS // 4 else nullcontext():
            image.draft(None, (2 * size, 2 * size))  # a JPEG is decoded smaller, up to 8 times faster
            return _fit(opaque(ImageOps.exif_transpose(image)), size, channels)


def _fit(image: Image.Image, size: int, channels: int) -> np.ndarray:
    """Centre crop to a square, antialiased resize -> uint8 [size, size, channels]."""
    image = image.convert("L" if channels == 1 else "RGB")
    return np.array(ImageOps.fit(image, (size, size), Image.Resampling.BICUBIC)).reshape(size, size, channels)
