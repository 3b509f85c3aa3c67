"""What is asked of a system: plain, checked values that a shell, a batch row or Python can give."""

import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator

from nexus.config import Config
from nexus.errors import UsageError
from nexus.naming import flag_of

SAMPLERS = ("ddpm", "ddim", "euler", "euler-a", "heun", "midpoint", "rk4", "dopri5", "dpmpp-2m", "dpmpp-2m-sde",
            "dpmpp-3m-sde", "unipc", "lms", "pndm", "sa-solver")
GUIDANCE_KINDS = ("cfg", "cfg-zero", "apg", "pag", "slg", "autoguidance", "classifier")
NEEDS_KIND = {"guide_model": ("autoguidance", "classifier"), "apg": ("apg",), "perturb_layers": ("pag", "slg"),
              "perturb_scale": ("pag", "slg"), "perturb_interval": ("pag", "slg"), "zero_init": ("cfg-zero",)}
COMPANIONS = {"negative_prompt": "prompt", "control_image": "control", "control_scale": "control",
              "strength": "image", "mask": "image", "outpaint": "image", "noise_row": "initial_noise"}
ONE_STEP = "this model makes a picture in one step, there is nothing to set"
OWN = ("truncation", "interpolate", "direction", "duration", "temperature", "top_k", "top_p", "guidance_style",
       "melody", "continued")       # only for systems that name them in `takes`
_MARGIN = re.compile(r"[0-9]{1,5}|[0-9]{1,3}(\.[0-9]{1,3})?%", re.ASCII)
SCHEDULES = ("native", "linear", "karras", "exponential", "log-snr", "shifted")


class SampleRequest(Config):
    """One call of `generate`: the same settings for every item of it; None means the model's own default."""

    prompt: str | None = None
    negative_prompt: str | None = None
    steps: int | None = Field(None, ge=1, le=100_000)
    guidance: float | None = Field(None, ge=0, le=1000, allow_inf_nan=False)
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    guidance_interval: tuple[float, float] = (0.0, 1.0)     # share of the sampling run, 0 = start (noise)
    guidance_kind: Literal[GUIDANCE_KINDS] | None = None    # None = cfg
    guide_model: str | None = None                          # the weaker model of autoguidance, or a classifier
    perturb_layers: tuple[int, ...] | None = None           # of pag and slg, by number; None = the middle one
    perturb_scale: float | None = Field(None, ge=0, le=1000)
    perturb_interval: tuple[float, float] | None = None     # share of the run in which layers are weakened
    apg: tuple[float, float, float] | None = None           # eta, norm (0 = no limit), momentum; see guidance_kinds
    zero_init: int | None = Field(None, ge=0)               # steps of a flow without velocity, of cfg-zero
    dynamic_threshold: float | None = Field(None, gt=0, le=1)       # the quantile of |x0| that becomes 1
    sampler: Literal[SAMPLERS] | None = None
    schedule: Literal[SCHEDULES] | None = None
    eta: float | None = Field(None, ge=0, le=1)
    width: int | None = Field(None, ge=1, le=65_536)
    height: int | None = Field(None, ge=1, le=65_536)
    image: str | None = None                                # a file: img2img or inpainting starts from it
    strength: float | None = Field(None, ge=0, le=1)        # share of the run that is redone; 1 = from pure noise
    mask: str | None = None                                 # a file: white is painted anew
    outpaint: str | None = None                             # see `margins`: what is painted around the picture
    image_noise: float | None = Field(None, ge=0, le=1)     # added to a small picture that is to be enlarged
    truncation: float | None = Field(None, gt=0, le=10)     # limit of a one-step generator's codes
    interpolate: int | None = Field(None, ge=2, le=1024)    # frames of a walk from the seed's picture to the next one's
    direction: Literal["ab", "ba"] | None = None            # of a model that translates between two kinds of pictures
    initial_noise: str | None = None                        # safetensors, key `noise` [N, *latent shape]
    noise_row: int | None = Field(None, ge=0)               # which of its rows the first item takes; None = the first
    control: str | None = None                              # a ControlNet: a model's name or path
    control_image: str | None = None                        # a file: what the ControlNet is shown, as it is
    control_scale: float | None = Field(None, ge=0, le=10)
    lora: tuple[str, ...] | None = None                     # FILE or FILE:WEIGHT each
    embedding: tuple[str, ...] | None = None                # textual inversion: FILE or FILE:WORD each
    duration: float | None = Field(None, gt=0, le=3600)     # seconds of sound
    temperature: float | None = Field(None, ge=0, le=100)   # of drawn tokens; 0 = the likeliest
    top_k: int | None = Field(None, ge=0, le=65_536)        # draw among so many tokens; 0 = all
    top_p: float | None = Field(None, ge=0, le=1)           # draw among the likeliest of this share; 0 = off
    guidance_style: float | None = Field(None, ge=0, le=1000)       # the outer scale of double guidance
    melody: str | None = None                               # a sound file whose chroma is followed
    continued: str | None = None                            # a sound file that is gone on with

    @field_validator("outpaint", mode="before")
    @classmethod
    def _four_sides(cls, value: object) -> object:
        """Also a list, or one number; wrong text is told as the value's own fault."""
        text = ",".join(map(str, value)) if isinstance(value, list | tuple) else value
        text = str(text) if isinstance(text, int) else text
        try:
            return ",".join(margins(text)) if isinstance(text, str) else text
        except UsageError as error:
            raise ValueError(f"{error}; {error.hint}") from None

    @field_validator("lora", "embedding", mode="before")
    @classmethod
    def _one_or_more(cls, value: object) -> object:
        """A row of a table names one file as plain text."""
        return (value,) if isinstance(value, str) else value


def margins(text: str) -> tuple[str, str, str, str]:
    """LEFT,TOP,RIGHT,BOTTOM, each pixels or with % of the picture's side; a single one is all four.

    Raises UsageError for anything else, and when nothing is added.
    """
    parts = tuple(part.strip() for part in text.split(","))
    parts = parts * 4 if len(parts) == 1 else parts
    if len(parts) != 4 or not all(_MARGIN.fullmatch(part) for part in parts):
        raise UsageError(f"'{text:.80}' is not LEFT,TOP,RIGHT,BOTTOM", hint="pixels or percent, such as 64,0,25%,0")
    if not any(float(part.removesuffix("%")) for part in parts):
        raise UsageError(f"'{text:.80}' adds nothing on any side", hint="pixels or percent, such as 64,0,25%,0")
    return parts


def weighted_file(text: str) -> tuple[str, float]:
    """FILE or FILE:WEIGHT; UsageError for an absurd weight. A file whose own name ends so is taken as it is."""
    name, mark, weight = text.rpartition(":")
    try:
        value = float(weight)
    except ValueError:
        return text, 1.0
    if not mark or Path(text).exists():
        return text, 1.0
    if not math.isfinite(value) or abs(value) > 1000:
        raise UsageError(f"{text}: the weight {weight} is absurd", hint="usual weights lie between 0 and 1.5")
    return name, value


def named_file(text: str) -> tuple[str, str]:
    """FILE or FILE:WORD -> the file, and the word that it is called by in prompts, "" where none is given."""
    name, mark, word = text.rpartition(":")
    return (name, word) if mark and not Path(text).exists() else (text, "")


def refuse(request: SampleRequest, takes: Collection[str], why: str) -> None:
    """UsageError naming the flag of a setting that is given but not among those a model takes; why: of the model."""
    for name, field in SampleRequest.model_fields.items():
        if name not in takes and getattr(request, name) != field.get_default(call_default_factory=True):
            raise UsageError(f"{flag_of(name)}: {why}", hint=f"leave {flag_of(name)} out")


def check_companions(request: SampleRequest, own: Collection[str] = ()) -> None:
    """UsageError naming the flag of a setting that says nothing without another one; own: those the model brings."""
    for name, other in COMPANIONS.items():
        if getattr(request, name) is not None and getattr(request, other) is None and other not in own:
            raise UsageError(f"{flag_of(name)} has no meaning without {flag_of(other)}",
                             hint=f"add {flag_of(other)}, or leave it out")


def check_guidance(given: Mapping) -> None:
    """UsageError naming the flag of a setting that the kind of guidance has no use for, or needs and lacks."""
    kind = given.get("guidance_kind") or "cfg"
    for name, kinds in NEEDS_KIND.items():
        if given.get(name) is not None and kind not in kinds:
            raise UsageError(f"{flag_of(name)} has no meaning with --guidance-kind {kind}",
                             hint="it goes with --guidance-kind " + " or ".join(kinds))
    if kind in NEEDS_KIND["guide_model"] and given.get("guide_model") is None:
        what = "a weaker version of the model" if kind == "autoguidance" else "a classifier of noisy pictures"
        raise UsageError(f"--guidance-kind {kind} needs --guide-model: {what}",
                         hint="--guide-model NAME|PATH, like --model")
