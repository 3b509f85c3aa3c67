"""diffusers' pipeline folders, by the class that model_index.json names: what each is made of, read and written.

Trap: a pipeline may lack a part that others of its class have, such as SD3's T5; model_index.json then says null.
"""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

from nexus.codecs.kl_image import KLConfig
from nexus.config import Config
from nexus.convert.convert import settle
from nexus.convert.detect import Found, Source, json_of, opened
from nexus.convert.export import Target, as_json, weights
from nexus.convert.layout import Layout, native_config
from nexus.convert.layouts import consistency, dit, kl_image, lcm, mmdit, pixart, schedulers, sd, unet, unet_diffusers
from nexus.convert.parts import (
    HOME,
    Whole,
    below,
    encoder_files,
    fitted,
    named,
    tokenizer_files,
)
from nexus.convert.pieces import Piece, built, foreign
from nexus.convert.stream import Payload, Tensors
from nexus.errors import ModelError
from nexus.text.folders import MANIFEST, Place
from nexus.text.recipes import RECIPES

WEIGHTS = "diffusion_pytorch_model"
VERSION = {"_diffusers_version": "0.42.1"}


class Kind(NamedTuple):
    """A pipeline class. folder, layout: of its network. recipe: of its text encoders, "" = it has none.

    settings(model_index.json, network) -> what the class adds to the system's configuration; note: what its user is to
    know. side: of the latent, where the network's config.json tells none. codec: the folder of its codec, "" = it has
    none. beside: parts that are left alone. older: a layout of the network that files of 2022 have.
    """

    system: str
    folder: str
    layout: Layout
    scheduler: schedulers.Family
    recipe: str = ""
    settings: Callable[[dict, Config], dict] = lambda index, net: {}
    side: int | None = None
    codec: str = "vae"
    beside: tuple[str, ...] = ()
    older: Layout | None = None
    note: str = ""

    @property
    def layouts(self) -> tuple[Layout, ...]:
        """Those that the network's files may have."""
        return (self.layout, self.older) if self.older else (self.layout,)


def _unet_config(shapes, said: dict | None) -> dict:
    return {"net": unet_diffusers.config_of(shapes, said)}


def _diffused(index: dict, net: Config) -> dict:
    """Stable Diffusion's: what no prompt is, and the masks that an inpainting network sees."""
    xl = index["_class_name"].startswith("StableDiffusionXL")
    return {"guidance": 5.0 if xl else 7.5, "concat": sd.inpainting(net),
            "conditioner": {"null": "zeros" if index.get("force_zeros_for_empty_prompt") else "empty"}}


def _straight(index: dict, net: Config) -> dict:
    """InstaFlow's: one step without guidance, as it was distilled."""
    return {"sampler": "euler", "steps": 1, "guidance": 1.0}


def _labelled(index: dict, net: Config) -> dict:
    """DiT's: all channels are guided, and the classes are called by the first of their names that is still free."""
    names: dict[str, None] = {}
    said = index.get("id2label") or {}
    for i in range(net.num_classes):
        known = [name.strip() for name in str(said.get(str(i), i)).split(",")]
        names[next((name for name in known if name not in names), f"{known[0]} {i}")] = None
    return {"guided_channels": None, "learned_variance": net.learn_sigma,
            "conditioner": {"kind": "label", "classes": list(names)}}


UNET = named(sd.LAYOUTS, "diffusers")._replace(config=_unet_config)
MMDIT = named(mmdit.LAYOUTS, "diffusers")
PICTURES = ("feature_extractor", "image_encoder")
PIXELS = Kind("ddpm", "unet", named(unet.LAYOUTS, "diffusers"), schedulers.DISCRETE, codec="",
              settings=lambda index, net: {"steps": 1000 if index["_class_name"] == "DDPMPipeline" else 50},
              older=named(unet.LAYOUTS, "diffusers-2022"))
SD = Kind("sd", "unet", UNET, schedulers.DISCRETE, "sd", _diffused, beside=("safety_checker", *PICTURES))
XL = SD._replace(recipe="sdxl", beside=PICTURES)
INSTAFLOW = SD._replace(
    system="rectified-flow", layout=UNET._replace(system="rectified-flow"), scheduler=schedulers.INSTAFLOW,
    settings=_straight, note="a 2-rectified flow, not yet distilled, wants --set steps=25 --set guidance=1.5")
KINDS = {f"{base}{way}Pipeline": kind for base, kind in (("StableDiffusion", SD), ("StableDiffusionXL", XL))
         for way in ("", "Img2Img", "Inpaint")} | {
    "StableDiffusion3Pipeline": Kind("mmdit", "transformer", MMDIT, schedulers.SD3, "sd3", beside=PICTURES),
    "FluxPipeline": Kind("mmdit", "transformer", MMDIT, schedulers.FLUX, "flux", side=128, beside=PICTURES),
    "PixArtAlphaPipeline": Kind("pixart", "transformer", named(pixart.LAYOUTS, "diffusers"), schedulers.DISCRETE,
                                "pixart"),
    "LatentConsistencyModelPipeline": Kind("lcm", "unet", named(lcm.LAYOUTS, "diffusers"),
                                           schedulers.LATENT_CONSISTENCY, "sd", beside=("safety_checker", *PICTURES)),
    "DiTPipeline": Kind("dit", "transformer", named(dit.LAYOUTS, "diffusers"), schedulers.DISCRETE,
                        settings=_labelled),
    "ConsistencyModelPipeline": Kind("consistency", "unet", named(consistency.LAYOUTS, "diffusers"),
                                     schedulers.CONSISTENCY, codec=""),
    "RectifiedFlowPipeline": INSTAFLOW, "InstaFlowPipeline": INSTAFLOW,
    "DDPMPipeline": PIXELS, "DDIMPipeline": PIXELS, "LDMPipeline": PIXELS._replace(codec="vqvae"),
}
# Classes that use such a model otherwise, or with another one beside it, which is left alone; they are written as this.
BASES = {f"{base}{way}Pipeline": f"{base}Pipeline"
         for base in ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "LatentConsistencyModel")
         for way in ("Img2Img", "Inpaint", "ControlNet", "ControlNetImg2Img", "ControlNetInpaint", "PAG", "PAGImg2Img",
                     "PAGInpaint") if f"{base}{way}Pipeline" not in KINDS}


def kind_of(src: Path) -> Kind | None:
    """What pipeline the folder is; None for one that is not known."""
    return KINDS.get(_class_of(json_of(src / MANIFEST))) if (src / MANIFEST).is_file() else None


def _class_of(index: dict) -> str:
    """The class that model_index.json names, or the one that it is a variety of."""
    name = str(index.get("_class_name"))
    return BASES.get(name, name)


def read(src: Path, stack: ExitStack, scratch: Path | None, overrides: list[str]) -> Whole:
    """The pipeline, its tensors still on disk. Raises ModelError for a part that is missing or of another kind.

    stack: keeps the copies of pickled weights alive.
    """
    index = json_of(src / MANIFEST)
    name, scheduler = _class_of(index), _scheduler(src)
    kind = KINDS[name]
    said = json_of(scheduler)
    source, = stack.enter_context(opened(src / kind.folder if (src / kind.folder).is_dir() else src, scratch))
    layout = next((one for one in kind.layouts if one.matches(source.shapes, source.config)), None)
    if layout is None:
        raise ModelError(f"{src} holds no {index['_class_name']}: its {kind.folder} is of another kind")
    config, assumed = settle(Found(layout, source, ()), [text for text in overrides if text.startswith("net.")])
    pieces, facts = [], {"pipeline": name, "net": layout.name}
    data, net = config.to_json(), config.net
    if kind.codec:
        vae, = stack.enter_context(opened(src / kind.codec, scratch))
        codec = _codec(src, vae)
        picture = _picture(codec, vae, (source.config or {}).get("sample_size") or kind.side)
        net, facts["codec"] = fitted(net, picture), codec.name
        data["codec"] = {"net": picture.to_json()}
        pieces.append(Piece("codec", built(picture), codec, data["codec"], vae))
    data["net"] = net.to_json()
    pieces.insert(0, Piece("net", built(net), layout, {"net": data["net"]}, source))
    settings, notes = kind.scheduler.read(said)
    data = data | settings | _words(kind, data, kind.settings(index, net))
    files = _text_files(src, kind, stack, scratch)
    files |= {f"{HOME}/{schedulers.FILE}": scheduler, f"{HOME}/{MANIFEST}": src / MANIFEST}
    return Whole(kind.system, "diffusers", data, pieces, files, facts, assumed=assumed,
                 notes=(*_left_alone(kind, index), *notes, *filter(None, [kind.note])))


def _scheduler(src: Path) -> Path:
    """Its file; the first pipelines had all of their files in one folder."""
    nested = src / schedulers.FILE
    return nested if nested.exists() or not (src / nested.name).exists() else src / nested.name


def _words(kind: Kind, data: dict, settings: dict) -> dict:
    """A class's settings, with the text encoders in the model's own folder."""
    if not kind.recipe:
        return settings
    usual = data["conditioner"] if data["conditioner"]["kind"] == "pretrained" else {}
    own = {"kind": "pretrained", "recipe": kind.recipe, "encoders": [f"./{HOME}"]}
    return settings | {"conditioner": usual | own | settings.get("conditioner", {})}


def _codec(src: Path, vae: Source) -> Layout:
    found = next((one for one in kl_image.LAYOUTS if one.matches(vae.shapes, vae.config)), None)
    if found is None:
        raise ModelError(f"{src} holds no {json_of(src / MANIFEST)['_class_name']}: its vae is of another kind")
    return found


def _picture(layout: Layout, vae: Source, side: int | None) -> KLConfig:
    """The codec for pictures of the size that the network was trained on."""
    found = native_config(layout, vae.shapes, vae.config, vae.path)["net"]
    config = kl_image.NETS[found["kind"]].parse(found)
    return config.model_copy(update={"size": side * config.factor}) if isinstance(side, int) else config


def _ends(recipe: str) -> list[str]:
    """"", "_2", ...: what follows text_encoder and tokenizer."""
    return ["" if i == 0 else f"_{i + 1}" for i in range(len(RECIPES[recipe].kinds))] if recipe else []


def _text_files(src: Path, kind: Kind, stack: ExitStack, scratch: Path | None) -> dict[str, Payload]:
    files: dict[str, Payload] = {}
    ends = _ends(kind.recipe)
    for i, end in enumerate(ends):
        if not (src / f"text_encoder{end}").is_dir() and i >= len(ends) - RECIPES[kind.recipe].optional:
            continue
        for name in (f"text_encoder{end}", f"tokenizer{end}"):
            if not (src / name).is_dir():
                raise ModelError(f"{src} lacks {name}", hint="a pipeline with all of its text encoders is needed")
        files |= encoder_files(src / f"text_encoder{end}", f"{HOME}/text_encoder{end}", stack, scratch)
        files |= tokenizer_files(src / f"tokenizer{end}", f"{HOME}/tokenizer{end}")
    return files


def _own(kind: Kind) -> set[str]:
    """The names in model_index.json of the parts that are converted."""
    return {kind.folder, "scheduler", *([kind.codec] if kind.codec else ()),
            *(f"{name}{end}" for end in _ends(kind.recipe) for name in ("text_encoder", "tokenizer"))}


def _left_alone(kind: Kind, index: dict) -> tuple[str, ...]:
    left = sorted(name for name, value in index.items() if isinstance(value, list) and value[0]
                  and name not in _own(kind))
    return (f"left alone: {', '.join(left)}",) if left else ()


def write(name: str, config: Config, tensors: Tensors, places: list[Place | None], facts: dict, home: Path,
          target: Target, stack: ExitStack) -> dict[str, Payload]:
    """The files of the pipeline of this class; home: the model's folder of text encoders.

    Raises ModelError for what diffusers cannot say.
    """
    kind, data = KINDS[name], config.to_json()
    layout = next((one for one in kind.layouts if one.name == facts.get("net")), kind.layout)
    said, codec_class = layout.foreign_config(data | {"size": config.latent_shape[1]}), {}
    part = partial(_part, tensors, target)
    files = part("net", kind.folder, layout, data, said)
    if kind.codec:
        codec = named(kl_image.LAYOUTS, facts.get("codec", "diffusers"))
        described = codec.foreign_config(data["codec"])
        files |= part("codec", kind.codec, codec, data["codec"], described)
        codec_class = {kind.codec: ["diffusers", described["_class_name"]]}
    for end, place in zip(_ends(kind.recipe), places, strict=True):
        if place:
            files |= encoder_files(place.encoder, f"text_encoder{end}", stack)
            files |= tokenizer_files(place.tokenizer, f"tokenizer{end}")
    kept = home / schedulers.FILE
    scheduler = json_of(kept) if kept.is_file() else kind.scheduler.write(config)
    files[schedulers.FILE] = kept if kept.is_file() else as_json(scheduler)
    index = json_of(home / MANIFEST) if (home / MANIFEST).is_file() else {}
    classes = {kind.folder: ["diffusers", said["_class_name"]], "scheduler": ["diffusers", scheduler["_class_name"]],
               **codec_class, **_text_classes(kind, places)}
    files[MANIFEST] = as_json(_manifest(name, config, index, classes))
    return files


def _part(tensors: Tensors, target: Target, part: str, folder: str, layout: Layout, data: dict,
          said: dict) -> dict[str, Payload]:
    made = weights(WEIGHTS, foreign(tensors, part, layout, data), target)
    return below(folder, {"config.json": as_json(said), **made})


def _text_classes(kind: Kind, places: list[Place | None]) -> dict[str, list]:
    """Entries of model_index.json: the classes that the encoders' own folders name."""
    out = {}
    for end, place, usual in zip(_ends(kind.recipe), places, RECIPES[kind.recipe].kinds if kind.recipe else (),
                                 strict=True):
        words = "T5Tokenizer" if usual.startswith("T5") else "CLIPTokenizer"
        model = place and json_of(place.encoder / "config.json").get("architectures", [usual])[0]
        out |= {f"text_encoder{end}": ["transformers", model] if place else [None, None],
                f"tokenizer{end}": ["transformers", words] if place else [None, None]}
    return out


def _manifest(name: str, config: Config, index: dict, classes: dict[str, list]) -> dict:
    """model_index.json: as it was, less the parts that were left alone; for a model of another origin a new one."""
    kind = KINDS[name]
    if not index:
        index = dict.fromkeys(kind.beside, [None, None])
        if "safety_checker" in index:
            index["requires_safety_checker"] = False
        if kind.recipe == "sdxl":
            index["force_zeros_for_empty_prompt"] = config.conditioner.null == "zeros"
        if getattr(config.conditioner, "classes", ()):
            index["id2label"] = {str(i): label for i, label in enumerate(config.conditioner.classes)}
    if getattr(config, "concat", None) and "Inpaint" not in name:
        name = name.replace("Pipeline", "InpaintPipeline")
    kept = {key: [None, None] if isinstance(value, list) and key not in classes else value
            for key, value in index.items()}
    if kept.get("safety_checker") == [None, None] and "requires_safety_checker" in kept:
        kept["requires_safety_checker"] = False
    return VERSION | kept | classes | {"_class_name": name}
