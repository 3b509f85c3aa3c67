"""Where pretrained text encoders are: a folder, a pipeline's folders, or a name on the Hugging Face hub."""

import contextlib
import hashlib
import json
import re
from pathlib import Path
from typing import NamedTuple

from nexus.atomic import cache_folder, write_text
from nexus.errors import ModelError, OutputError

EXTRA = "pip install 'nexus-media[text]'"
MANIFEST, ENCODERS, TOKENIZERS = "model_index.json", "text_encoder", "tokenizer"
SMALL = ("*.json", "*.txt", "*.model")
OTHER_PRECISIONS = ("*.fp16.*", "*.non_ema.*", "*.bin", "*.msgpack", "*.h5", "*.ot", "*.onnx")
READ = (".json", ".txt", ".model", ".safetensors")


class Place(NamedTuple):
    """The folders of one encoder and of its tokenizer, often the same."""

    encoder: Path
    tokenizer: Path


def located(name: str, base: Path | None = None) -> Path:
    """The folder of a name: "./x" lies in the model's own folder `base`; then a path, then a hub name.

    Raises ModelError when it is neither, or the hub cannot be reached.
    """
    if name.startswith("./") and ".." in Path(name).parts:
        raise ModelError(f"'{name}' leads out of the model's folder", hint="where does this model come from?")
    folder = _folder(name, base)
    if folder.is_dir():
        return folder
    if name.startswith("./") or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise ModelError(f"there is no folder '{folder}' with text encoders",
                         hint="a folder, or a name on the Hugging Face hub: OWNER/NAME")
    return _from_hub(name)


def is_here(name: str, base: Path | None = None) -> bool:
    """Whether `located` finds it without the hub."""
    return _folder(name, base).is_dir()


def _folder(name: str, base: Path | None) -> Path:
    return (base or Path()) / name if name.startswith("./") else Path(name)


def _from_hub(name: str) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise ModelError(f"'{name}' is no folder here, and huggingface_hub is not installed", hint=EXTRA) from None
    try:
        folder = Path(snapshot_download(name, allow_patterns=[MANIFEST, "config.json"]))
        below = (f"{ENCODERS}*/*", f"{TOKENIZERS}*/*")
        wanted = [MANIFEST, *below] if (folder / MANIFEST).exists() else [*SMALL, "*.safetensors"]
        return Path(snapshot_download(name, allow_patterns=wanted, ignore_patterns=list(OTHER_PRECISIONS)))
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelError(f"cannot fetch '{name}' from the hub: {str(error).splitlines()[0]:.200}",
                         hint="give a local folder instead") from None


def places(names: tuple[str, ...], count: int, base: Path | None = None, *, optional: int = 0) -> list[Place | None]:
    """The folders of `count` encoders, from one pipeline or from a name each; the last `optional` may be None."""
    folders = [located(name, base) for name in names]
    if len(folders) == 1 and (folders[0] / ENCODERS).is_dir():
        folders = [folders[0] / _numbered(ENCODERS, i) for i in range(count)]
        tokenizers = [folders[0].parent / _numbered(TOKENIZERS, i) for i in range(count)]
    else:
        tokenizers = [f / TOKENIZERS if (f / TOKENIZERS).is_dir() else f for f in folders]
    found: list[Place | None] = [Place(*pair) if (pair[0] / "config.json").is_file() else None
                                 for pair in zip(folders, tokenizers, strict=True)]
    found += [None] * (count - len(found))
    missing = [i for i, place in enumerate(found) if place is None and i < count - optional]
    if missing or len(found) > count:
        known = ", ".join(names) or "none"
        raise ModelError(f"{count} text encoders are needed, '{known}' gives "
                         f"{sum(p is not None for p in found)} that can be used",
                         hint="one pipeline folder, or one folder or hub name an encoder, in the recipe's order")
    return found


def _numbered(name: str, i: int) -> str:
    return f"{name}_{i + 1}" if i else name


def digest(place: Place) -> str:
    """A sha256 over every file of an encoder and its tokenizer that is read."""
    files = {f for folder in place for f in folder.iterdir() if f.suffix in READ and f.is_file()}
    total = hashlib.sha256()
    for file in sorted(files, key=lambda f: (f.parent != place.encoder, f.name)):
        total.update(f"{file.name}\0{_file_digest(file)}\n".encode())
    return total.hexdigest()


def _file_digest(file: Path) -> str:
    """The file's sha256, remembered for as long as its size and time stay the same: gigabytes are hashed once."""
    try:
        facts = file.stat()
        name = hashlib.sha256(json.dumps([str(file.resolve()), facts.st_size, facts.st_mtime_ns]).encode()).hexdigest()
        known = cache_folder("text") / "digests" / name
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if re.fullmatch(r"[0-9a-f]{64}", found := known.read_text("ascii")):
                return found
        with open(file, "rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise ModelError(f"cannot read {file}: {error.strerror}") from None
    with contextlib.suppress(OutputError):
        write_text(known, found, exists="overwrite")
    return found
