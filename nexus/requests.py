"""What is asked of a system: plain, checked values that a shell, a batch row or Python can give."""

from typing import Literal

from pydantic import Field

from nexus.config import Config

SAMPLERS = ("ddpm", "ddim", "euler", "euler-a", "heun", "midpoint", "rk4", "dopri5", "dpmpp-2m", "dpmpp-2m-sde",
            "dpmpp-3m-sde", "unipc")
SCHEDULES = ("native", "linear", "karras", "exponential", "log-snr", "shifted")


class SampleRequest(Config):
    """One call of `generate`: the same settings for every item of it; None means the model's own default."""

    prompt: str | None = None
    negative_prompt: str | None = None
    steps: int | None = Field(None, ge=1, le=100_000)
    guidance: float | None = Field(None, ge=0, le=1000, allow_inf_nan=False)
    guidance_rescale: float = Field(0.0, ge=0, le=1)
    guidance_interval: tuple[float, float] = (0.0, 1.0)     # share of the sampling run, 0 = start (noise)
    sampler: Literal[SAMPLERS] | None = None
    schedule: Literal[SCHEDULES] | None = None
    eta: float | None = Field(None, ge=0, le=1)
    width: int | None = Field(None, ge=1, le=65_536)
    height: int | None = Field(None, ge=1, le=65_536)
    image: str | None = None                                # a file: img2img or inpainting starts from it
    strength: float | None = Field(None, ge=0, le=1)        # share of the run that is redone; 1 = from pure noise
    mask: str | None = None                                 # a file: white is painted anew
    initial_noise: str | None = None                        # safetensors, key `noise` [N, *latent shape]
