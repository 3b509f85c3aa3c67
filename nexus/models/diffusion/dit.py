"""DiT: a transformer over latent patches, steered by adaLN-Zero. Peebles & Xie 2022, arXiv:2212.09748.

B = batch, C = latent channels, L = patches, D = hidden width, S = times of a sampling run.
"""

from functools import lru_cache
from typing import ClassVar, Self

import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from nexus.codecs.kl_image import KLConfig
from nexus.config import Config
from nexus.nn.attention import attend, merge_heads, split_heads
from nexus.nn.embed import TimestepMLP, sincos_2d, with_ids
from nexus.nn.modulation import gated, modulate, start_as_identity
from nexus.nn.patches import grid_of, unpatched
from nexus.nn.perturb import Perturb
from nexus.process.codec import SHARED_CODEC, SHARED_LATENTS
from nexus.process.diffusion import DiffusionConfig
from nexus.process.paths import AnyPath, DiscretePath
from nexus.text.conditioner import LabelCondConfig

TIME_FREQS = 256                 # width of the sinusoid before the time MLP
PREPARED_BYTES = 1 << 30         # above this, a run's modulations cost more memory than they save in time


class DiTNetConfig(Config):
    """The network alone. The defaults are DiT-XL/2 at 256 pixels (latents of side 32)."""

    size: int = Field(32, gt=0, description="side of the latent it is trained at")
    patch: int = Field(2, gt=0, description="side of a patch, in latent pixels")
    in_channels: int = Field(4, gt=0)
    hidden: int = Field(1152, gt=0, description="token width")
    depth: int = Field(28, gt=0)
    heads: int = Field(16, gt=0)
    mlp_ratio: float = Field(4.0, gt=0)
    num_classes: int = Field(1000, ge=0, description="0 = no labels")
    null_class: bool = Field(True, description="one more row, for guidance: label num_classes means none")
    num_styles: int = Field(0, ge=0, description="a second label with a null row of its own; 0 = none")
    learn_sigma: bool = Field(True, description="a second half of channels that sets the variance")
    freq_shift: float = Field(0.0, ge=0, description="of the time sinusoid: 0 as the paper's code, 1 as diffusers")
    mlp_eps: float = Field(1e-6, gt=0, description="epsilon of the norm before an MLP; diffusers' folders say 1e-5")

    @model_validator(mode="after")
    def _divisible(self) -> Self:
        if self.hidden % self.heads:
            raise ValueError(f"hidden {self.hidden} is not a multiple of heads {self.heads}")
        if self.hidden % 4:
            raise ValueError(f"hidden {self.hidden} is not a multiple of 4, which the position table needs")
        if self.size % self.patch:
            raise ValueError(f"size {self.size} is not a multiple of patch {self.patch}")
        return self

    @property
    def multiple(self) -> int:
        """The sides of x are multiples of this."""
        return self.patch

    @property
    def out_channels(self) -> int:
        """Channels of the output: twice the input's with a learned variance."""
        return self.in_channels * (2 if self.learn_sigma else 1)

    def build(self) -> "DiT":
        """The network with its initial weights."""
        return DiT(self)

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"size": 8, "hidden": 32, "depth": 2, "heads": 2, "num_classes": 3},
        "emoji": {"size": 16, "in_channels": SHARED_LATENTS, "hidden": 168, "depth": 8, "heads": 3, "num_classes": 0,
                  "learn_sigma": False},
        "emoji-small": {"size": 16, "in_channels": SHARED_LATENTS, "hidden": 128, "depth": 8, "heads": 4,
                        "num_classes": 0, "learn_sigma": False},
    } | {
        f"{name}/{patch}": {"patch": patch, "hidden": hidden, "depth": depth, "heads": heads}
        for name, hidden, depth, heads in
        (("S", 384, 12, 6), ("B", 768, 12, 12), ("L", 1024, 24, 16), ("XL", 1152, 28, 16))
        for patch in (2, 4, 8)
    }


class DiTBlock(nn.Module):
    """Attention and an MLP, each normalised, shifted, scaled and gated by `mod`: x [B, L, D] -> [B, L, D]."""

    def __init__(self, dim: int, heads: int, mlp: int, eps: float):
        super().__init__()
        self.heads, self.eps = heads, eps
        self.adaln = nn.Linear(dim, 6 * dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.fc1 = nn.Linear(dim, mlp)
        self.fc2 = nn.Linear(mlp, dim)

    def forward(self, x: Tensor, mod: Tensor, identity: bool = False) -> Tensor:
        """mod [B, 6D] = adaln(silu(c)): shift, scale, gate of the attention, then of the MLP."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = mod.chunk(6, -1)
        q, k, v = (split_heads(p, self.heads) for p in self.qkv(modulate(x, shift_a, scale_a)).chunk(3, -1))
        x = gated(x, gate_a, self.proj(merge_heads(attend(q, k, v, identity=identity))))
        h = F.gelu(self.fc1(modulate(x, shift_m, scale_m, self.eps)), approximate="tanh")
        return gated(x, gate_m, self.fc2(h))


class DiT(nn.Module):
    """x [B, C, H, W], t [B] (an index for the paper's models) -> [B, C or 2C, H, W].

    cond: "label" [B] in 0..num_classes (num_classes = none), "style" [B] likewise; a missing one is none.
    With `learn_sigma` the second half of the channels sets the variance.
    """

    def __init__(self, config: DiTNetConfig):
        super().__init__()
        self.config = config
        self.layers, self.middle = config.depth, config.depth // 2
        dim = config.hidden
        self.patch = nn.Conv2d(config.in_channels, dim, config.patch, config.patch)
        self.time = TimestepMLP(TIME_FREQS, dim, shift=config.freq_shift)
        self.label = nn.Embedding(config.num_classes + config.null_class, dim) if config.num_classes else None
        self.style = nn.Embedding(config.num_styles + 1, dim) if config.num_styles else None
        self.blocks = nn.ModuleList(
            DiTBlock(dim, config.heads, int(dim * config.mlp_ratio), config.mlp_eps) for _ in range(config.depth))
        self.final_adaln = nn.Linear(dim, 2 * dim)
        self.final = nn.Linear(dim, config.patch**2 * config.out_channels)
        start_as_identity(self)

    def adalns(self) -> list[nn.Linear]:
        """The layers that make modulations, in the order of their use."""
        return [*(block.adaln for block in self.blocks), self.final_adaln]

    def forward(self, x: Tensor, t: Tensor, cond: dict[str, Tensor] | None = None,
                prepared: dict | None = None, perturb: Perturb = Perturb()) -> Tensor:
        """`prepared` is what `prepare` returned for the same `cond`. Raises InputError on sides that do not fit."""
        rows, cols = grid_of(x, self.config.patch)
        mods = _look_up(prepared, t, len(x)) or self._modulations(self.embed(t, cond))
        x = self.patch(x.to(self.patch.weight.dtype)).flatten(2).transpose(1, 2)              # [B, L, D]
        x = x + _positions(self.config, rows, cols, x.device, x.dtype)
        for i, (block, mod) in enumerate(zip(self.blocks, mods, strict=False)):
            if i not in perturb.skip:
                x = block(x, mod, i in perturb.identity)
        x = self.final(modulate(x, *mods[-1].chunk(2, -1)))                                   # [B, L, p * p * C']
        return unpatched(x, rows, cols, self.config.patch)

    def embed(self, t: Tensor, cond: dict[str, Tensor] | None = None) -> Tensor:
        """The condition c [B, D]: time plus label plus style."""
        return with_ids(self.time(t), cond or {}, self.label, self.style, null_label=self.config.null_class)

    def _modulations(self, c: Tensor) -> list[Tensor]:
        """c [..., D] -> one [..., 6D] a block, then the last layer's [..., 2D]."""
        c = F.silu(c)
        return [layer(c) for layer in self.adalns()]

    def prepare(self, times: Tensor, cond: dict[str, Tensor] | None = None) -> dict:
        """Every modulation of a run with times [S], computed in one product a block; {} when it would not fit.

        A third of DiT's weights are modulations, and a batch has few distinct labels: `item` [B] says which
        distinct condition each item has.
        """
        cond = cond or {}
        names = [n for n, table in (("label", self.label), ("style", self.style)) if table is not None and n in cond]
        if names:
            pairs, item = torch.stack([cond[n] for n in names], -1).unique(dim=0, return_inverse=True)
        else:
            pairs, item = times.new_zeros(1, 0).long(), None
        width = self.config.hidden * (6 * self.config.depth + 2)
        if len(times) * len(pairs) * width * self.final.weight.element_size() > PREPARED_BYTES:
            return {}
        each = {n: pairs[:, i].repeat(len(times)) for i, n in enumerate(names)}
        c = self.embed(times.repeat_interleave(len(pairs)), each).unflatten(0, (len(times), len(pairs)))
        steps = {t: s for s, t in enumerate(times.float().tolist())}
        return {"steps": steps, "item": item, "mods": self._modulations(c)}


def _look_up(prepared: dict | None, t: Tensor, batch: int) -> list[Tensor] | None:
    step = prepared["steps"].get(float(t[0])) if prepared else None
    if step is None:
        return None
    item = prepared["item"]
    if item is None:
        return [mod[step].expand(batch, -1) for mod in prepared["mods"]]
    return [mod[step][item] for mod in prepared["mods"]] if len(item) == batch else None


@lru_cache(maxsize=16)
def _positions(config: DiTNetConfig, rows: int, cols: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return position_table(config, rows, cols).to(device, dtype)


def position_table(config: DiTNetConfig, rows: int = 0, cols: int = 0) -> Tensor:
    """The fixed sine-cosine table [rows * cols, D] in float32 on the CPU; by default of the trained grid.

    Another grid is stretched onto the trained one, so that no position is ever new to the network. It is no
    buffer: a network built on the meta device has it all the same, and native checkpoints do not carry it.
    """
    side = config.size // config.patch
    rows, cols = rows or side, cols or side
    with torch.inference_mode(False), torch.device("cpu"):
        return sincos_2d(config.hidden, rows, cols, scale=max(rows, cols) / side)


class DiTConfig(DiffusionConfig):
    """DiT as published: the linear chain of 1000 steps, eps with a learned variance, labels, a KL codec."""

    net: DiTNetConfig = DiTNetConfig()
    path: AnyPath = DiscretePath(spacing="linspace")
    conditioner: LabelCondConfig = LabelCondConfig()
    learned_variance: bool = True
    steps: int = Field(250, ge=1)
    guidance: float = Field(4.0, ge=0)
    guided_channels: int | None = 3
    sampler: str = "ddpm"

    presets: ClassVar[dict[str, dict]] = {
        "tiny": {"net": DiTNetConfig.presets["tiny"], "steps": 4, "guidance": 2.0,
                 "codec": {"net": KLConfig.presets["tiny"]}},
        "emoji": {"net": DiTNetConfig.presets["emoji"],
                  "codec": SHARED_CODEC, "learned_variance": False, "guidance": 3.0, "guided_channels": None,
                  "steps": 20, "sampler": "dpmpp-2m", "prediction": "v",
                  "conditioner": LabelCondConfig.presets["emoji"]},
    } | {name: {"net": fields} for name, fields in DiTNetConfig.presets.items() if "/" in name}
    default_preset: ClassVar[str] = "emoji"
    recipes: ClassVar[dict[str, dict]] = {
        "tiny": {"steps": 20, "batch_size": 4},
        "emoji": {"steps": 20_000, "batch_size": 64, "optimizer": "muon", "muon_lr": 0.01, "lr": 2e-3, "warmup": 200,
                  "schedule": "linear", "final_lr": 0.05, "precision": "auto", "ema": 0.998, "save_every": 500,
                  "cache_latents": True, "shift": 0, "betas": (0.9, 0.99)},
    }
