"""Whole models as published files: SD 1 and 2 (Rombach et al. 2022), SDXL (Podell et al. 2023), LCM (Luo et al. 2023),
SD3 (Esser et al. 2024); and FLUX, whose codec is a file of its own, ae.safetensors.

The network lies under model.diffusion_model, the codec under first_stage_model, the words under cond_stage_model,
conditioner.embedders or text_encoders. What such a file does not tell: the tokenizers; of a UNet the number of heads,
and what is predicted. Trap: SD3's CLIP-L lacks its projection, which is the identity there.
"""

import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from nexus import catalog
from nexus.codecs.kl_image import KLConfig
from nexus.config import Config
from nexus.convert import stream
from nexus.convert.convert import settle
from nexus.convert.detect import Found, Source, json_of, opened
from nexus.convert.export import FORMAT, Target, as_json
from nexus.convert.layout import Layout
from nexus.convert.layouts import clip_text, kl_image, mmdit, sd, t5_text, unet_openai
from nexus.convert.parts import (
    HOME,
    WEIGHTS,
    Whole,
    encoder_files,
    fitted,
    named,
    tokenizer_files,
)
from nexus.convert.parts import (
    below as under,
)
from nexus.convert.pieces import Piece, below, built, foreign, split, tensors_of
from nexus.convert.stream import Lazy, Payload, Tensors
from nexus.errors import ModelError
from nexus.models.diffusion.unet import UNetConfig
from nexus.text.folders import Place, located, places
from nexus.text.recipes import RECIPES

NET, EMA, EMA_END = "model.diffusion_model.", "model_ema.", "model_ema.diffusion_model"
CODEC, FIRST, CODEC_FILE = named(kl_image.LAYOUTS, "original"), "first_stage_model.", "ae.safetensors"
LATENT = 128                            # side of the latent that FLUX was trained at
# Carry no weights that sampling needs: kept beside the model, so that the way back is complete.
EXTRA = ("betas", "alphas_cumprod*", "sqrt_*", "log_one_minus_*", "posterior_*", "lvlb_weights", "logvar",
         "scale_factor", "model_ema.decay", "model_ema.num_updates", "*.position_ids", "*.logit_scale",
         "denoiser.sigmas", "v_pred", "ztsnr")
HEADS = ("heads", "head_dim")
FOUND = ("tokenizer", "t5_tokenizer", "codec", "encoders")      # files and folders that are not in the file
USED = (*FOUND, *(f"net.{name}" for name in HEADS))             # settings that `read` itself takes
LOSS = ("first_stage_model.loss.*",)
EXTRA_FILE = f"{HOME}/extra.safetensors"
TOKENIZERS = {"tokenizer": "openai/clip-vit-large-patch14", "t5_tokenizer": "google/t5-v1_1-xxl"}
MARKS = (b"model.diffusion_model.", b"first_stage_model.")
FLUX = "double_blocks.0.img_attn.qkv.weight"
L, H, T5 = "openai", "openclip", "t5"
PROJECTION = "text_projection.weight"


class Single(NamedTuple):
    """A kind of file. words: prefix, whose encoder it is, whether OpenCLIP named it. net: the layout of the network."""

    pipeline: str
    preset: str
    words: tuple[tuple[str, str, bool], ...]
    net: Layout
    encoders: bool = True


UNET = named(sd.LAYOUTS, "original")
_SD = (("cond_stage_model.transformer.", L, False),)
FILES = {                               # by recipe; the first whose prefixes are there
    "sdxl": Single("StableDiffusionXLPipeline", "sdxl", (("conditioner.embedders.0.transformer.", L, False),
                                                         ("conditioner.embedders.1.model.", H, True)), UNET),
    "sd2": Single("StableDiffusionPipeline", "sd21", (("cond_stage_model.model.", H, True),), UNET),
    "sd": Single("StableDiffusionPipeline", "sd15", _SD, UNET),
    "lcm": Single("LatentConsistencyModelPipeline", "dreamshaper-v7", _SD, UNET._replace(system="lcm")),
    "sd3": Single("StableDiffusion3Pipeline", "sd3-medium", (
        ("text_encoders.clip_l.transformer.", L, False), ("text_encoders.clip_g.transformer.", H, False),
        ("text_encoders.t5xxl.transformer.", T5, False)), named(mmdit.LAYOUTS, "original-repacked")),
    "flux": Single("FluxPipeline", "flux-dev", (), named(mmdit.LAYOUTS, "original"), encoders=False),
}
WRITTEN = {one.pipeline: one for one in FILES.values()}


def given(overrides: Sequence[str]) -> dict[str, str]:
    """What the user sets, by name."""
    return {name.strip(): value for name, _, value in (text.partition("=") for text in overrides)}


def kind_of(keys, path: Path, said: dict[str, str]) -> str | None:
    """The recipe of a whole model's file by its keys: those of a network, a codec and text encoders; or None.

    SD3 is published without its text encoders too.
    """
    if FLUX in keys:
        return "flux" if _codec_path(path, said) else None
    nets = {"sd3": f"{NET}joint_blocks.0.x_block.attn.qkv.weight"}
    if not any(k.startswith(FIRST) for k in keys):
        return None
    bare = f"{FIRST}encoder.conv_in.weight" in keys         # a whole codec, so that the file is a model by itself
    for name, one in FILES.items():
        first = nets.get(name, f"{NET}input_blocks.0.0.weight")
        if one.words and first in keys and (
                name == "sd3" and bare or any(k.startswith(one.words[0][0]) for k in keys)):
            return "lcm" if name == "sd" and f"{NET}time_embed.cond_proj.weight" in keys else name
    return None


def _codec_path(path: Path, said: dict[str, str]) -> Path | None:
    """FLUX's codec: the given file, or the one of the published name in the same folder."""
    if "codec" in said:
        return Path(said["codec"])
    return next((p for p in (path.parent / CODEC_FILE,) if p.is_file() and p != path), None)


def may_be(path: Path) -> bool:
    """Whether a pickled file names both a network and a codec, by its raw bytes: nothing is unpickled."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next((n for n in archive.namelist() if n.endswith("data.pkl")), None)
            return name is not None and all(mark in archive.read(name) for mark in MARKS)
    except (OSError, zipfile.BadZipFile, RuntimeError):
        return False


def read(source: Source, said: dict[str, str], stack: ExitStack, scratch: Path | None) -> Whole:
    """The model in one file; said: settings that the user gives, `tokenizer` among them. Raises ModelError."""
    if any(k.startswith("state_dict.") for k in source.tensors):
        source = below(source, "state_dict.")
    recipe = kind_of(source.tensors.keys(), source.path, said)
    if recipe is None:
        raise ModelError(f"{source.path} holds no text encoder", hint="a file with cond_stage_model.* is needed")
    if recipe == "flux":
        return _flux(source, said, stack, scratch)
    one = FILES[recipe]
    source, extra = split(source, EXTRA)
    source, loss = split(source, LOSS)
    tensors, notes = _network(source)
    base = catalog.config_class(one.net.system).preset(one.preset)
    net, assumed, side = _settled(one, tensors, said)
    picture = _picture(below(source, FIRST), base.codec.net, side)
    net = fitted(net, picture)
    config = base.to_json() | {"net": net.to_json(), "codec": {"net": picture.to_json()}, "size": side or base.size}
    if one.net.system == "sd":
        config |= {"prediction": "v" if "v_pred" in extra.tensors else base.prediction, "concat": sd.inpainting(net)}
        config["path"] |= {"zero_terminal_snr": "ztsnr" in extra.tensors}
        assumed |= {} if "prediction" in said else {"prediction": config["prediction"]}
    used = (NET, FIRST, EMA, *(prefix for prefix, _, _ in one.words))
    problems = tuple(f"{k} has no place in this layout" for k in sorted(source.tensors) if not k.startswith(used))
    if inside := any(k.startswith(one.words[0][0]) for k in source.tensors):
        files, made = _text_files(source, one, said)
        config["conditioner"] |= {"encoders": [f"./{HOME}"]}
    else:
        (files, words, note), made = _encoders_of(said, recipe, stack, scratch), []
        config["conditioner"] |= words
        notes += note
    if extra.tensors:
        files[EXTRA_FILE] = partial(stream.write_tensors, tensors=tensors_of(extra), metadata=FORMAT)
    pieces = _pieces(one.net, net, tensors, picture, below(source, FIRST))
    facts = {"pipeline": one.pipeline, "words": inside} | ({"made": made} if made else {})
    return Whole(one.net.system, "original", config, pieces, files, facts, tuple(sorted(loss.tensors)), assumed,
                 notes, problems)


def _pieces(layout: Layout, net: Config, tensors: Source, picture: KLConfig, codec: Source) -> list[Piece]:
    return [Piece("net", built(net), layout, {"net": net.to_json()}, tensors),
            Piece("codec", built(picture), CODEC, {"net": picture.to_json()}, codec)]


def _picture(codec: Source, usual: KLConfig, side: int | None) -> KLConfig:
    """The codec by its shapes; a file does not tell how latents are scaled. side: of the latent, None = the usual."""
    found = KLConfig.parse(CODEC.config(codec.shapes, None)["net"] | {"scale": usual.scale, "shift": usual.shift,
                                                                      "size": usual.size})
    return found.model_copy(update={"size": side * found.factor}) if side else found


def _network(source: Source) -> tuple[Source, tuple[str, ...]]:
    """The network's tensors, averaged ones where the file has them: their names have lost all dots."""
    plain = below(source, NET)
    averaged = {k: source.tensors.get(EMA_END + k.replace(".", "")) for k in plain.tensors}
    if not any(averaged.values()):
        return plain, ()
    return (plain._replace(tensors={k: stored or plain.tensors[k] for k, stored in averaged.items()}),
            ("took the averaged weights under 'model_ema'",))


def _settled(one: Single, net: Source, said: dict[str, str]) -> tuple[Config, dict[str, object], int | None]:
    """The network's configuration, which settings of it were assumed, and the latent's side where the file tells."""
    if one.net.name == "original-repacked":
        config, assumed = settle(Found(one.net, net, ()), [f"{k}={v}" for k, v in said.items() if k.startswith("net.")])
        return config.net, assumed, config.net.size
    found, told = unet_openai.config_of(net.shapes), {n: int(said[f"net.{n}"]) for n in HEADS if f"net.{n}" in said}
    if found.get("head_dim", 0) is None and not told:
        raise ModelError(f"{net.path} does not tell net.heads, and its width is not a published one",
                         hint="give it with --set net.heads=N or --set net.head_dim=N")
    found = {k: v for k, v in found.items() if k not in HEADS} | (told or {k: found[k] for k in HEADS if k in found})
    return UNetConfig.parse(found), {} if told else {f"net.{k}": found[k] for k in HEADS if k in found}, None


def _flux(source: Source, said: dict[str, str], stack: ExitStack, scratch: Path | None) -> Whole:
    """FLUX's network with its codec; text encoders come from a pipeline's folder, where one is given."""
    one, path = FILES["flux"], _codec_path(source.path, said)
    codec, = stack.enter_context(opened(path, scratch))
    if not CODEC.matches(codec.shapes, None):
        raise ModelError(f"{path} is not FLUX's codec", hint="--set codec=FILE names the published ae.safetensors")
    config, assumed = settle(Found(one.net, source, ()), [f"{k}={v}" for k, v in said.items() if k.startswith("net.")])
    picture = KLConfig.parse(CODEC.config(codec.shapes, None)["net"])
    picture = picture.model_copy(update={"size": LATENT * picture.factor})
    data = config.to_json() | {"codec": {"net": picture.to_json()}}
    files, words, note = _encoders_of(said, "flux", stack, scratch)
    data["conditioner"] |= words
    return Whole("mmdit", "original", data, _pieces(one.net, config.net, source, picture, codec), files,
                 {"pipeline": one.pipeline}, assumed=assumed, notes=(f"took the codec {path}", *note))


def _encoders_of(said: dict[str, str], recipe: str, stack: ExitStack,
                 scratch: Path | None) -> tuple[dict[str, Payload], dict, tuple[str, ...]]:
    """Text encoders of a pipeline's folder, if one is given: their files, the conditioner's setting, what to note."""
    if "encoders" not in said:
        return {}, {}, ("it has no text encoders: give a pipeline's folder with --set encoders=FOLDER",)
    files: dict[str, Payload] = {}
    needed = RECIPES[recipe]
    for i, place in enumerate(places((said["encoders"],), len(needed.kinds), optional=needed.optional)):
        end = f"_{i + 1}" if i else ""
        if place is not None:
            files |= encoder_files(place.encoder, f"{HOME}/text_encoder{end}", stack, scratch)
            files |= tokenizer_files(place.tokenizer, f"{HOME}/tokenizer{end}")
    return files, {"encoders": [f"./{HOME}"]}, ()


def _text_files(source: Source, one: Single, said: dict[str, str]) -> tuple[dict[str, Payload], list[str]]:
    """Text encoders as transformers folders, a tokenizer for each, which the file lacks; and names of made tensors."""
    files: dict[str, Payload] = {}
    made: list[str] = []
    for i, (prefix, who, renamed) in enumerate(one.words):
        state, end = tensors_of(below(source, prefix)), f"_{i + 1}" if i else ""
        if not state and who == T5:
            continue
        if not state:
            raise ModelError(f"{source.path} holds no {prefix.rstrip('.')}",
                             hint="a file with all of its text encoders is needed")
        if renamed:
            state = stream.foreign(clip_text.rows(), state)
        if who == L and len(one.words) > 2 and PROJECTION not in state:
            state |= _identity(state[clip_text.TOKENS])
            made.append(prefix + PROJECTION)
        shapes = {key: lazy.shape for key, lazy in state.items()}
        config = t5_text.folder_config(shapes) if who == T5 else clip_text.folder_config(shapes, openclip=who == H)
        files |= under(f"{HOME}/text_encoder{end}", {
            "config.json": as_json(config), **stream.weights(WEIGHTS.removesuffix(".safetensors"), state, FORMAT)})
        folder = _tokenizer(said, "t5_tokenizer" if who == T5 else "tokenizer", end)
        files |= tokenizer_files(folder, f"{HOME}/tokenizer{end}", pad="!" if who == H else "")    # OpenCLIP's id 0
    return files, made


def _identity(tokens: Lazy) -> dict[str, Lazy]:
    return stream.ready({PROJECTION: torch.eye(tokens.shape[1], dtype=tokens.meta.dtype)})


def _tokenizer(said: dict[str, str], name: str, end: str) -> Path:
    """The folder of a tokenizer: the given one, in the pipeline's folder that was given, or the published one."""
    pipeline = Path(said.get("tokenizer", ""))
    whole = name not in said and "tokenizer" in said and (pipeline / f"tokenizer{end}").is_dir()
    folder = pipeline if whole else located(said.get(name, TOKENIZERS[name]))
    return next((f for f in (folder / f"tokenizer{end}", folder / "tokenizer") if f.is_dir()), folder)


def write(name: str, config: Config, tensors: Tensors, encoders: list[Place | None], facts: dict, base: Path,
          target: Target, stack: ExitStack) -> dict[Path, Tensors]:
    """The tensors of each file to write. Raises ModelError for what the layout cannot say."""
    one, data = WRITTEN[name], config.to_json()
    if name == "FluxPipeline":
        return {target.path: foreign(tensors, "net", one.net, data),
                target.path.with_name(CODEC_FILE): foreign(tensors, "codec", CODEC, data["codec"])}
    out = foreign(tensors, "net", one.net, data, NET) | foreign(tensors, "codec", CODEC, data["codec"], FIRST)
    for i, place in enumerate(encoders):
        if place is not None:
            source, = stack.enter_context(opened(place.encoder))
            out |= _words(one, config.conditioner.recipe, i, place, tensors_of(source))
    if (base / EXTRA_FILE).is_file():
        source, = stack.enter_context(opened(base / EXTRA_FILE))
        out |= tensors_of(source)
    return {target.path: {key: lazy for key, lazy in out.items() if key not in facts.get("made", ())}}


def _words(one: Single, recipe: str, i: int, place: Place, state: dict[str, Lazy]) -> dict[str, Lazy]:
    """A text encoder in the names of the file."""
    prefix, who, renamed = one.words[i]
    if who != T5:
        state = clip_text.prefixed(state)
        gelu = json_of(place.encoder / "config.json").get("hidden_act") == "gelu"
        if gelu and recipe in ("sd", "sd2") and one.pipeline == "StableDiffusionPipeline":
            prefix, _, renamed = FILES["sd2"].words[0]
        elif not gelu and recipe in ("sd", "sd2"):
            prefix, _, renamed = _SD[0]
        elif gelu != (who == H):
            raise ModelError(f"text encoder {i + 1} of {recipe} should be {'an OpenCLIP' if who == H else 'a CLIP-L'}, "
                             f"with hidden_act '{'gelu' if who == H else 'quick_gelu'}'")
    if renamed:
        state = stream.native(clip_text.rows(), {k: t for k, t in state.items() if not k.endswith(".position_ids")})
    return {prefix + key: lazy for key, lazy in state.items()}
