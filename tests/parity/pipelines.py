"""Tiny random Stable Diffusion pipelines of diffusers."""

import sys
from pathlib import Path

from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))
import encoders  # noqa: E402

from tests.parity.whole import randomise  # noqa: E402

CHAIN = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIDE, FACTOR = 8, 2                     # of the latents; pixels to a latent


def unet(width: int, *, channels: int = 4, xl_pooled: int = 0) -> UNet2DConditionModel:
    more = {"attention_head_dim": 2} if not xl_pooled else {
        "attention_head_dim": (2, 4), "use_linear_projection": True, "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 6 * 256 + xl_pooled,
        "transformer_layers_per_block": (1, 2)}
    kinds = ("CrossAttn{}Block2D", "{}Block2D") if not xl_pooled else ("{}Block2D", "CrossAttn{}Block2D")
    return randomise(UNet2DConditionModel(
        sample_size=SIDE, in_channels=channels, out_channels=4, layers_per_block=1, block_out_channels=(32, 64),
        cross_attention_dim=width, down_block_types=[k.format("Down") for k in kinds],
        up_block_types=[k.format("Up") for k in reversed(kinds)], **more), 1)


def vae() -> AutoencoderKL:
    return randomise(AutoencoderKL(
        block_out_channels=(32, 64), sample_size=SIDE * FACTOR, latent_channels=4,
        down_block_types=["DownEncoderBlock2D"] * 2, up_block_types=["UpDecoderBlock2D"] * 2), 2)


def scheduler(**more) -> DDIMScheduler:
    return DDIMScheduler(**CHAIN, clip_sample=False, **{"set_alpha_to_one": False, "steps_offset": 1} | more)


def sd(*, channels: int = 4, openclip: bool = False, **more) -> StableDiffusionPipeline:
    model, tokenizer = encoders.clip(64, projected=True, pad="!") if openclip else encoders.clip(64)
    return StableDiffusionPipeline(vae=vae(), text_encoder=model, tokenizer=tokenizer, unet=unet(64, channels=channels),
                                   scheduler=scheduler(**more), safety_checker=None, feature_extractor=None,
                                   requires_safety_checker=False)


def sd2() -> StableDiffusionPipeline:
    """With a text encoder of OpenCLIP's kind."""
    return sd(openclip=True)


def sdxl(**more) -> StableDiffusionXLPipeline:
    one, two = encoders.clip(32), encoders.clip(64, projected=True, pad="!", seed=1)
    return StableDiffusionXLPipeline(vae=vae(), text_encoder=one[0], tokenizer=one[1], text_encoder_2=two[0],
                                     tokenizer_2=two[1], unet=unet(96, xl_pooled=72), scheduler=scheduler(**more),
                                     add_watermarker=False)
