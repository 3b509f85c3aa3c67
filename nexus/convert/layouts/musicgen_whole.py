"""A whole MusicGen: transformers' folder of text encoder, language model and codec, and audiocraft's pair of files."""

from contextlib import ExitStack
from pathlib import Path

from nexus import catalog
from nexus.codecs.encodec import EncodecConfig
from nexus.config import Config
from nexus.convert import stream
from nexus.convert.detect import Found, Source, detect, json_of, opened
from nexus.convert.export import FORMAT, Target, as_json, weights
from nexus.convert.layout import Layout, native_config
from nexus.convert.layouts import encodec, musicgen
from nexus.convert.parts import HOME, Whole, below, encoder_files, named
from nexus.convert.pieces import Piece, built, foreign, split, tensors_of
from nexus.convert.pieces import below as inside
from nexus.convert.stream import Payload, Tensors
from nexus.errors import ModelError
from nexus.text.folders import places

SYSTEM = "musicgen"
KINDS = ("musicgen", "musicgen_melody")             # model_type of transformers' folders
LM, CODEC = "state_dict.bin", "compression_state_dict.bin"
TOKENIZER = ("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "spiece.model")
SETTINGS = ("generation_config.json", "preprocessor_config.json")
TEXT_FILES = f"{HOME}/text_encoder"
NEW = named(musicgen.LAYOUTS, "transformers")
USED = ("hearing",)                                 # settings that are used up here: a folder of MERT is taken in


def known(src: Path) -> bool:
    """Whether this is a folder of either kind."""
    if (src / LM).is_file() and (src / CODEC).is_file():
        return True
    return (src / "config.json").is_file() and json_of(src / "config.json").get("model_type") in KINDS


def read(src: Path, stack: ExitStack, scratch: Path | None, overrides: list[str]) -> Whole:
    """The folder, its tensors still on disk; raises ModelError for a part that is missing or of another kind."""
    given = {name.strip(): value.strip() for name, _, value in (text.partition("=") for text in overrides)}
    if (src / LM).is_file():
        return _audiocraft(src, stack, scratch, given.get("hearing"))
    if "hearing" in given:
        raise ModelError(f"{src} follows no style: it hears none", hint="leave hearing out")
    source, = stack.enter_context(opened(src, scratch))
    said, data = source.config, None
    if not NEW.matches(source.shapes, said):
        raise ModelError(f"{src} is called a {said.get('model_type')}, but holds no language model of that kind")
    lm, beside = split(source, [f"{part}.*" for part in musicgen.PARTS])
    sound = inside(beside, "audio_encoder.")._replace(config=said.get("audio_encoder"))
    layout = next((one for one in encodec.LAYOUTS if one.matches(sound.shapes, sound.config)), None)
    if layout is None:
        raise ModelError(f"{src} holds no codec, or one that is no EnCodec")
    data = NEW.config(lm.shapes, said)
    data["codec"] = {"net": _both(layout, sound, said["decoder"].get("audio_channels", 1))}
    data |= _windows(src, data, said)
    words, files, notes = _words(src, inside(beside, "text_encoder."), said)
    data |= words
    files |= {f"{HOME}/{name}": src / name for name in SETTINGS if (src / name).is_file()}
    return _whole("transformers", data, [(NEW, lm), (layout, sound)], files, {"codec": layout.name}, notes)


def _whole(name: str, data: dict, parts: list[tuple[Layout, Source]], files: dict[str, Payload], facts: dict,
           notes: tuple[str, ...]) -> Whole:
    config = catalog.config_class(SYSTEM).parse(data)
    data = config.to_json()
    (lm, words), (codec, sound) = parts
    pieces = [Piece("net", built(config.net), lm, data, words),
              Piece("codec", built(config.codec.net), codec, data["codec"], sound)]
    return Whole(SYSTEM, name, data, pieces, files, facts, notes=notes)


def _both(layout: Layout, sound: Source, channels: int) -> dict:
    """The codec's network; a mono one under a stereo model hears the channels in turn."""
    net = EncodecConfig.parse(native_config(layout, sound.shapes, sound.config, sound.path)["net"])
    if channels == 2 and net.channels == 1:
        net = net.model_copy(update={"channels": 2, "interleave": "rows"})
    return net.to_json()


def _windows(src: Path, data: dict, said: dict) -> dict:
    """The window that a melody's length tells, the chroma's own window, and how it is sampled."""
    heard, drawn = (json_of(src / name) if (src / name).is_file() else {} for name in reversed(SETTINGS))
    out = {"guidance": drawn["guidance_scale"]} if isinstance(drawn.get("guidance_scale"), int | float) else {}
    if not data["net"]["chroma"]:
        return out
    size = heard.get("n_fft", 16_384)
    melody = data["melody"] | {"exponent": size.bit_length() - 1}
    length, rate = said.get("chroma_length", 235), data["codec"]["net"]["rate"]
    if 1 + 30 * rate // (size // 4) == length:
        return out | {"melody": melody}
    seconds = (length - 0.5) * (size // 4) / rate           # so many frames of chroma are its window
    return out | {"melody": melody, "seconds": seconds, "stride": 0.6 * seconds}


def _words(src: Path, source: Source, said: dict) -> tuple[dict, dict[str, Payload], tuple[str, ...]]:
    """The conditioner, the text encoder's files in the model's own folder, and notes."""
    tokenizer = sorted({p for pattern in TOKENIZER for p in src.glob(pattern)})
    usual = {"kind": "pretrained", "recipe": "t5", "weighting": False}
    if not tokenizer or not source.tensors:
        usual["encoders"] = ["google-t5/t5-base"]
        return {"conditioner": usual}, {}, ("left alone: text_encoder, as there is no tokenizer beside it; "
                                            "google-t5/t5-base reads the prompts",)
    files: dict[str, Payload] = {f"{HOME}/tokenizer/{p.name}": p for p in tokenizer}
    files |= {f"{TEXT_FILES}/config.json": as_json(said["text_encoder"])}
    files |= below(TEXT_FILES, stream.weights("model", tensors_of(source), FORMAT))
    return {"conditioner": usual | {"encoders": [f"./{HOME}"]}}, files, ()


def _audiocraft(src: Path, stack: ExitStack, scratch: Path | None, hearing: str | None) -> Whole:
    found = [detect(stack.enter_context(opened(src / file, scratch)), f"{system}/original")
             for file, system in ((LM, SYSTEM), (CODEC, "encodec"))]
    data, codec = (native_config(one.layout, one.source.shapes, one.source.config, one.source.path) for one in found)
    said = (found[0].source.config or {}).get("xp.cfg") or {}
    net = EncodecConfig.parse(codec["net"])
    if data["net"]["codebooks"] == 2 * net.quantizers:
        net = net.model_copy(update={"channels": 2, "interleave": "rows"})
    data["codec"] = {"net": net.to_json()}
    name = ((said.get("conditioners") or {}).get("description") or {}).get("t5") or {}
    name = str(name.get("name", "t5-base"))
    data["conditioner"] = {"kind": "pretrained", "recipe": "t5", "weighting": False,
                           "encoders": [name if "/" in name else f"google-t5/{name}"]}
    files: dict[str, Payload] = {}
    if hearing is not None:
        if not data["net"].get("style") or not Path(hearing).is_dir():
            raise ModelError(f"hearing={hearing}: a folder of MERT, for a model that follows a style",
                             hint="leave it out, or check the path")
        files, data["hearing"] = encoder_files(Path(hearing), f"{HOME}/hearing", stack, scratch), f"./{HOME}/hearing"
    return _whole("original", data, [_parts(one) for one in found], files, {"codec": "transformers"}, ())


def _parts(found: Found) -> tuple[Layout, Source]:
    return found.layout, found.source


def writable(system: str, config: dict, to: str | None) -> bool:
    """Whether a model of this description is to be written as transformers' whole folder."""
    return system == SYSTEM and to in ("transformers", f"{SYSTEM}/transformers") \
        and config["codec"]["weights"] is None and config["conditioner"]["kind"] == "pretrained"


def write(config: Config, tensors: Tensors, facts: dict, base: Path, target: Target,
          stack: ExitStack) -> dict[str, Payload]:
    """The files of transformers' folder; base: the model's own folder. Raises ModelError for what it cannot say."""
    data = config.to_json()
    said = NEW.foreign_config(data)
    place, = places(config.conditioner.encoders, 1, base)
    words, = stack.enter_context(opened(place.encoder))
    codec = named(encodec.LAYOUTS, facts.get("codec", "transformers"))
    made = foreign(tensors, "net", NEW, data)
    made |= foreign(tensors, "codec", codec, data["codec"], "audio_encoder.")
    made |= {f"text_encoder.{key}": lazy for key, lazy in tensors_of(words).items()}
    said |= {"text_encoder": words.config, "audio_encoder": codec.foreign_config(data["codec"])}
    files: dict[str, Payload] = {"config.json": as_json(said), **weights("model", made, target)}
    files |= {p.name: p for pattern in TOKENIZER for p in place.tokenizer.glob(pattern)}
    kept = {name: base / HOME / name for name in SETTINGS if (base / HOME / name).is_file()}
    drawn = {"do_sample": True, "guidance_scale": config.guidance, "top_k": config.top_k,
             "max_length": config.frames(config.seconds), "bos_token_id": config.net.bins,
             "pad_token_id": config.net.bins, "decoder_start_token_id": config.net.bins}
    return files | ({SETTINGS[0]: as_json(drawn)} | kept)
