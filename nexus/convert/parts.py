"""What conversions of whole pipelines share: what one is made of, and folders of text encoders beside its networks."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from nexus.codecs.kl_image import KLConfig
from nexus.config import Config
from nexus.convert import stream
from nexus.convert.detect import index_of, json_of, opened
from nexus.convert.export import FORMAT, as_json
from nexus.convert.layout import Layout
from nexus.convert.pieces import Piece, tensors_of
from nexus.convert.stream import Payload
from nexus.errors import ModelError

HOME = "pipeline"                       # the folder in a model that holds its text encoders
TOKENIZER_FILES = (".json", ".txt", ".model")
WEIGHTS = "model.safetensors"


class Whole(NamedTuple):
    """A pipeline about to be converted: the system and its configuration, its networks, and files to go beside them.

    files: by name in the model's folder. facts: what the way back needs to know.
    """

    system: str
    layout: str
    config: dict
    pieces: list[Piece]
    files: dict[str, Payload]
    facts: dict
    dropped: tuple[str, ...] = ()
    assumed: dict[str, Any] = {}                        # noqa: RUF012 - never changed
    notes: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def fitted(net: Config, picture: KLConfig) -> Config:
    """A network that is told a picture's size, told how many pixels a latent position of this codec has."""
    return net.model_copy(update={"pixels": picture.factor}) if "pixels" in type(net).model_fields else net


def named(layouts: tuple[Layout, ...], name: str) -> Layout:
    """The layout of that name."""
    return next(one for one in layouts if one.name == name)


def encoder_files(folder: Path, name: str, stack: ExitStack, scratch: Path | None = None) -> dict[str, Payload]:
    """A transformers folder's files, to lie in `name`: its safetensors as they are, pickled weights made such.

    stack: keeps the copies of pickled weights alive.
    """
    source, = stack.enter_context(opened(folder, scratch))
    files: dict[str, Payload] = {f"{name}/{p.name}": p for p in sorted(folder.glob("*.json"))
                                 if ".index." not in p.name}
    weights = sorted({stored.file for stored in source.tensors.values()})
    if any(file.parent != folder for file in weights):
        return files | below(name, stream.weights(WEIGHTS.removesuffix(".safetensors"), tensors_of(source), FORMAT))
    if len(weights) == 1:
        return files | {f"{name}/{WEIGHTS}": weights[0]}
    index = index_of(folder)            # under the one name that is looked for without a variant
    return files | {f"{name}/{file.name}": file for file in weights} | {f"{name}/{WEIGHTS}.index.json": index}


def below(name: str, files: dict[str, Payload]) -> dict[str, Payload]:
    """Files, to lie in the folder `name`."""
    return {f"{name}/{file}": data for file, data in files.items()}


def tokenizer_files(folder: Path, name: str, *, pad: str = "") -> dict[str, Payload]:
    """A tokenizer's files, to lie in `name`; pad: another padding token than the folder's."""
    files: dict[str, Payload] = {f"{name}/{p.name}": p for p in sorted(folder.iterdir())
                                 if p.suffix in TOKENIZER_FILES and p.is_file() and p.name != "config.json"}
    if not files:
        raise ModelError(f"{folder} holds no tokenizer", hint="tokenizer.json, or vocab.json and merges.txt")
    for kind in ("tokenizer_config.json", "special_tokens_map.json") if pad else ():
        if (folder / kind).is_file():
            files[f"{name}/{kind}"] = as_json(json_of(folder / kind) | {"pad_token": pad})
    return files
