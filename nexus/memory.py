"""What a sampling run needs in memory, from a model's configuration and its files' headers; without torch.

An estimate, made to be within about a quarter of the truth.
"""

import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

from nexus.stored import SIZES, Held, find, header, read_description, weight_files

AUTO_PIXELS = 768 * 768                 # larger pictures go through the codec in stripes, unless told otherwise
STRIPE_BYTES = 64 << 20                 # of the widest feature map, in float32
MIN_ROWS = 8                            # a thinner stripe would be more halo than picture
BASE = 265 << 20                        # Python, torch and the modules of a system
NUMBER = {"auto": 4, "float32": 4, "bfloat16": 2, "float16": 2}
KEYS_PLAIN = 1024                       # up to so many keys, attention in bfloat16 on the CPU writes its scores down
STAGES = {"conditioner": "words", "encoders": "words", "net": "steps", "codec": "picture"}
STATE = 6                               # pictures or latents in float32 that a sampler holds


def tiled(mode: str, height: int, width: int) -> bool:
    """Whether a picture of so many pixels goes through the codec in stripes. mode: "on", "off" or "auto"."""
    return mode == "on" or mode == "auto" and height * width > AUTO_PIXELS


class Part(NamedTuple):
    """Weights of one part: how they are stored, in how many bytes, their number, and the largest tensor's."""

    name: str
    dtype: str
    numbers: int
    largest: int
    stored: int = 0


class Asked(NamedTuple):
    """What of a command decides its memory. guided: both sides of guidance are computed."""

    width: int | None = None
    height: int | None = None
    batch: int = 1
    guided: bool = True
    image: bool = False
    dtype: str = "auto"
    device: str = "cpu"
    offload: bool = False
    tile: str = "auto"


class Stage(NamedTuple):
    """A stretch of a run: the weights in memory then, and all else, in bytes."""

    name: str
    weights: int
    activations: int


class Model(NamedTuple):
    """A model as its files describe it: its configuration, its codec's, and its parts."""

    config: dict
    codec: dict | None
    parts: tuple[Part, ...]

    def weights(self, name: str, dtype: str) -> int:
        """Bytes of a part in memory; a part that is not there has none."""
        return sum(p.numbers * NUMBER[dtype] for p in self.parts if p.name == name)


def described(name: str) -> Model:
    """A model by path or zoo name. Raises ModelError."""
    path = find(name)
    config = read_description(path)["config"]
    held = _tensors(path)
    codec = (config.get("codec") or {}).get("net")
    external = (config.get("codec") or {}).get("weights")
    parts = [_part(n, {k: t for k, t in held.items() if k.startswith(f"{n}.")}) for n in ("net", "conditioner")]
    if external:
        other = find(external)
        codec = read_description(other)["config"]["net"]
        held = {f"codec.{k[4:]}": t for k, t in _tensors(other).items() if k.startswith("net.")}
    parts.append(_part("codec", {k: t for k, t in held.items() if k.startswith("codec.")}))
    conditioner = config.get("conditioner") or {}
    if conditioner.get("kind") == "pretrained":
        parts.append(_encoders(conditioner.get("encoders", ()), path if path.is_dir() else path.parent))
    return Model(config, codec, tuple(p for p in parts if p.numbers or p.dtype == "?"))


def _tensors(path: Path) -> dict[str, Held]:
    """Of all files that sampling reads, averaged weights first."""
    files = [path] if path.is_file() else [*weight_files(path), *weight_files(path, "ema")]
    return {name: held for file in files for name, held in header(file)[1].items()}


def _part(name: str, tensors: dict[str, Held]) -> Part:
    sizes = [math.prod(t.shape) for t in tensors.values()]
    kinds = sorted({t.dtype for t in tensors.values() if t.dtype in SIZES})
    return Part(name, "+".join(kinds), sum(sizes), max(sizes, default=0),
                sum(math.prod(t.shape) * SIZES.get(t.dtype, 4) for t in tensors.values()))


def _encoders(names: tuple[str, ...], base: Path) -> Part:
    """Text encoders in folders here; dtype "?" where one is still to be fetched."""
    found: dict[str, Held] = {}
    for name in names:
        folder = base / name if name.startswith("./") else Path(name)
        if not folder.is_dir():
            return Part("encoders", "?", 0, 0)
        inner = sorted(folder.glob("text_encoder*")) or [folder]
        for file in (file for place in inner for file in sorted(place.glob("*.safetensors"))):
            found |= {f"{file}:{key}": held for key, held in header(file)[1].items()}
    return _part("encoders", found)


# --- activations ----------------------------------------------------------------------------------------------------

def net_bytes(net: dict, rows: int, height: int, width: int, size: int, words: int = 77) -> int:
    """Activations of a network for `rows` latents of height x width, numbers of `size` bytes. 0: an unknown network.

    A transformer of width D and MLP ratio r: rows * T * D * (4 + 2 r), T = patches and words: the tokens, their
    modulated copy, the MLP before and after its nonlinearity, and the block's sum; attention needs less. A UNet: all
    skips, sum of C * N over its blocks, and the largest block, either a residual one at full size on the way up,
    N * (3 * (C + C') + C), or a transformer, 18 * C * N (its MLP is 8 C wide and gated).
    """
    if {"hidden", "heads"} <= net.keys():
        patch = net.get("patch", 2)
        tokens = height * width // patch**2 + (words if "context_dim" in net else 0)
        scores = net["heads"] * tokens**2 * 2 if size == 2 and tokens <= KEYS_PLAIN else 0
        return rows * size * (round(tokens * net["hidden"] * (4 + 2 * net.get("mlp_ratio", 4))) + scores)
    if "mult" not in net:
        return 0
    widths = [round(m * net["channels"]) for m in net["mult"]]
    places = [height * width // 4**level for level in range(len(widths))]
    skips = sum(c * n * (net.get("blocks", 2) + 1) for c, n in zip(widths, places, strict=True))
    peak = max((3 * (2 * c) + c) * n for c, n in zip(widths, places, strict=True))
    wide = [18 * widths[level] * places[level] for level in net.get("attention", ()) if net.get("context_dim")]
    return rows * size * (skips + max([peak, *wide]))


def codec_bytes(codec: dict, batch: int, height: int, width: int, size: int, tile: str) -> int:
    """Activations of the KL codec for pictures of height x width pixels, either way. 0: no KL codec.

    Whole, with P the picture's places after folding and C, C' the widths of the two finest resolutions: 1.1 * P * (3 C'
    + C), the first block at full size with its input, the normalised input and its SiLU. In stripes one picture at a
    time: P * (C + C' / 4) for what is kept, and six stripes.
    """
    if "channels" not in codec or isinstance(codec["channels"], int):
        return 0
    places = height * width // codec.get("patch", 1)**2
    fine, next_to = codec["channels"][0], codec["channels"][min(1, len(codec["channels"]) - 1)]
    whole = round(1.1 * places * (3 * next_to + fine) * size)
    if not tiled(tile, height, width):
        return batch * whole
    return min(whole, places * (fine + next_to // 4) * size + 6 * STRIPE_BYTES)


def stages(model: Model, asked: Asked) -> list[Stage]:
    """The stretches of a run with what is in memory during each.

    All weights are there all the time, or with `offload` those that a stretch uses. On the CPU loading needs float32
    weights and, read into them, the files; and a layer's largest tensor is counted once more in float32 beside the
    activations, for convolutions and products rearrange it.
    """
    found = _needs(model, asked)
    dtypes = {"encoders": "float32" if asked.device == "cpu" else "bfloat16"}
    held = {p.name: model.weights(p.name, dtypes.get(p.name, asked.dtype)) for p in model.parts}
    total = sum(held.values())
    made = [Stage(STAGES[part], held[part] if asked.offload else total, need) for part, need in found.items()
            if part in held]
    if asked.device != "cpu" or asked.offload:
        return made
    own = [p for p in model.parts if p.name != "encoders"]
    return [Stage("loading", sum(4 * p.numbers for p in own), sum(p.stored for p in own)), *made]


def _needs(model: Model, asked: Asked) -> dict[str, int]:
    """Bytes of activations while each part works."""
    c, size = model.config, NUMBER[asked.dtype]
    factor = model.codec.get("patch", 1) * 2 ** (len(model.codec["channels"]) - 1) if model.codec else 1
    side = model.codec["size"] if model.codec else c.get("size", c.get("net", {}).get("size", 64))
    height, width = asked.height or side, asked.width or side
    channels = (model.codec or {}).get("latent_channels", c.get("net", {}).get("in_channels", 3))
    state = STATE * asked.batch * channels * (height // factor) * (width // factor) * 4
    spare = {p.name: 4 * p.largest if asked.device == "cpu" else 0 for p in model.parts}
    net = net_bytes(c.get("net", {}), asked.batch * (2 if asked.guided else 1), height // factor, width // factor, size)
    needs = {"conditioner": 0, "encoders": 0, "net": net + state + spare.get("net", 0)}
    if model.codec:
        needs["codec"] = codec_bytes(model.codec, asked.batch, height, width, size, asked.tile) + state
    return needs


def peak(model: Model, asked: Asked) -> int:
    """Bytes of the stretch that needs most, on the CPU with Python and torch themselves."""
    return max((s.weights + s.activations for s in stages(model, asked)), default=0) + BASE * (asked.device == "cpu")


def advice(model: Model, asked: Asked, room: int) -> list[tuple[str, int]]:
    """Changes that lower the peak, each beside the ones before, up to the first that fits: the flag, and the peak."""
    c = model.codec or {}
    height, width = asked.height or c.get("size", 0), asked.width or c.get("size", 0)
    half = {"width": width // 2, "height": height // 2}
    changes = [("--offload", {"offload": True}), ("--tile on", {"tile": "on"}),
               ("--dtype bfloat16", {"dtype": "bfloat16"}), ("--batch-size 1", {"batch": 1}),
               (f"-W {half['width']} -H {half['height']}", half)]
    found, before = [], peak(model, asked)
    for flag, change in changes:
        changed = asked._replace(**change)
        after = peak(model, changed)
        if before > room and after < 0.98 * before and all(change.values()):
            found.append((flag, after))
            asked, before = changed, after
    return found


# --- what there is --------------------------------------------------------------------------------------------------

def device_of(name: str) -> str:
    """"cuda", "mps" or "cpu": what "auto" will probably be, without asking torch."""
    return name.partition(":")[0] if name != "auto" else "cuda" if shutil.which("nvidia-smi") else "cpu"


def available(device: str) -> int | None:
    """Bytes of free memory on a device, or None where that cannot be told."""
    if device == "cuda":
        return _cuda()
    try:
        with open("/proc/meminfo") as file:
            free = next(int(line.split()[1]) << 10 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration, ValueError):
        try:
            free = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        except (ValueError, OSError):
            return None
    return min(free, _group())


def _cuda() -> int | None:
    command = ["nvidia-smi", "--query-gpu=memory.free", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=5).stdout
        return int(said.split()[0]) << 20
    except (OSError, subprocess.SubprocessError, ValueError, IndexError):
        return None


def _group() -> int:
    """What a container still leaves."""
    try:
        limit, used = (Path(f"/sys/fs/cgroup/memory.{n}").read_text().strip() for n in ("max", "current"))
        return int(limit) - int(used)
    except (OSError, ValueError):
        return 1 << 62
