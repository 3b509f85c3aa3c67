"""How a run is trained: everything that shapes its weights, besides the system and the data."""

from typing import Annotated, Literal

from pydantic import Field

from nexus.config import Config

Share = Annotated[float, Field(ge=0, lt=1)]


class TrainArgs(Config):
    """Training arguments; a system's `recipes` give them per preset, `--set train.NAME=VALUE` changes one.

    batch_size counts the pictures of one optimiser step over all ranks; `accumulate` cuts it into that many parts.
    schedule "constant-linear" decays in the second half of the steps alone.
    ema is the decay of the moving average (0 = none); with ema_warmup it starts as (1 + step) / (10 + step).
    ema_profiles: sigma_rel of EDM2's averages, kept with every checkpoint so that another can be made later (ema.py).
    """

    steps: int = Field(1000, ge=1)
    batch_size: int = Field(32, ge=1)
    accumulate: int = Field(1, ge=1)
    seed: int = Field(0, ge=0, lt=2**63)
    precision: Literal["float32", "bfloat16", "auto"] = "float32"   # auto: bfloat16 where the machine is fast at it
    optimizer: Literal["adamw", "muon", "adam", "rmsprop"] = "adamw"
    lr: float = Field(1e-4, gt=0)
    muon_lr: float = Field(0.02, gt=0)
    betas: tuple[Share, Share] = (0.9, 0.999)
    weight_decay: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0)
    schedule: Literal["constant", "cosine", "linear", "constant-linear"] = "constant"
    final_lr: float = Field(0.0, ge=0)          # share of lr that is left at the last step of a decaying schedule
    clip: float = Field(1.0, ge=0)              # largest gradient norm; 0 = no clipping
    ema: float = Field(0.999, ge=0, lt=1)
    ema_warmup: bool = True
    ema_profiles: tuple[Annotated[float, Field(gt=0, le=0.288)], ...] = ()
    load: int = Field(0, ge=0, le=4096)         # side that pictures are read at, a random part being taken; 0 = none
    shift: int = Field(0, ge=0)                 # random translation of pictures, pixels
    flip: float = Field(0.0, ge=0, le=1)        # chance of a horizontal mirror
    cache_latents: bool = False                 # encode the whole set once, before the first step
    variants: int = Field(1, ge=1)              # shifted and mirrored copies of each picture that are kept encoded
    log_every: int = Field(10, ge=1)
    save_every: int = Field(500, ge=1)
    sample_every: int = Field(0, ge=0)          # 0 = only with the last checkpoint
    samples: int = Field(16, ge=0)
    keep: int = Field(2, ge=1)                  # newest checkpoints that stay on disk
    on_nan: Literal["stop", "skip", "rollback"] = "stop"
    sharding: Literal["ddp", "fsdp2"] = "ddp"


def overridden(config: Config, args: TrainArgs, overrides: list[str],
               flags: dict | None = None) -> tuple[Config, TrainArgs]:
    """A system's Config and arguments changed by KEY=VALUE of the system and train.KEY=VALUE, then by flags."""
    mine = [text.removeprefix("train.") for text in overrides if text.startswith("train.")]
    config = config.override([text for text in overrides if not text.startswith("train.")])
    return config, TrainArgs.parse(args.override(mine).to_json() | (flags or {}))
