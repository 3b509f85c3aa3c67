"""Tiny random pipelines of diffusers for the systems beside Stable Diffusion, with real tokenizers."""

import diffusers
import torch

from tests.parity.pipelines import CHAIN, FACTOR, SIDE, encoders, randomise, unet, vae

LINEAR = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
FLOW = diffusers.FlowMatchEulerDiscreteScheduler
SD3 = {"sample_size": SIDE, "num_layers": 3, "attention_head_dim": 16, "num_attention_heads": 3, "in_channels": 4,
       "joint_attention_dim": 136, "caption_projection_dim": 48, "pooled_projection_dim": 112, "out_channels": 4,
       "pos_embed_max_size": 10, "qk_norm": "rms_norm", "dual_attention_layers": (0,)}
FLUX = {"in_channels": 16, "num_layers": 2, "num_single_layers": 2, "attention_head_dim": 16,
        "num_attention_heads": 3, "joint_attention_dim": 96, "pooled_projection_dim": 64, "axes_dims_rope": [4, 6, 6]}
PIXART = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": 24,
          "caption_channels": 96, "sample_size": SIDE}
NAMES = {i: f"thing {i}" for i in range(1000)} | {0: "tench, Tinca tinca", 7: "cock", 9: "cock, rooster"}
STUDENT = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 16,
           "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
           "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "downsample_type": "resnet",
           "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32}


def loud(net: torch.nn.Module, seed: int) -> torch.nn.Module:
    """Random, with gains near 1, so that prompt and time show in a picture."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.ndim == 1:
                p.copy_(torch.randn_like(p) * 0.2 + (1.0 if "norm" in name and name.endswith("weight") else 0.0))
            else:
                p.copy_(torch.randn_like(p) * 1.3 * p[0].numel() ** -0.5)
    return net.eval()


def shifted():
    """A codec of SD3's and FLUX's kind: its latents are shifted, and there are no quant convolutions."""
    kind = {"scaling_factor": 1.5, "shift_factor": 0.06, "use_quant_conv": False, "use_post_quant_conv": False}
    return randomise(diffusers.AutoencoderKL.from_config(vae().config, **kind), 2)


def sd3(*, t5: bool = True, **flow):
    one, two = encoders.clip(32, projected=True), encoders.clip(64, projected=True, pad="!", seed=1)
    one[0].config.hidden_act = "quick_gelu"                 # CLIP-L's
    one = type(one[0])(one[0].config).eval(), one[1]
    far = encoders.t5(136) if t5 else (None, None)
    net = loud(diffusers.SD3Transformer2DModel(**SD3), 1)
    return diffusers.StableDiffusion3Pipeline(
        transformer=net, scheduler=FLOW(**{"shift": 3.0} | flow), vae=shifted(), text_encoder=one[0], tokenizer=one[1],
        text_encoder_2=two[0], tokenizer_2=two[1], text_encoder_3=far[0], tokenizer_3=far[1])


def flux(*, guided: bool = True):
    clip, t5 = encoders.clip(64), encoders.t5(96)
    net = loud(diffusers.FluxTransformer2DModel(**FLUX, guidance_embeds=guided), 1)
    moving = {"use_dynamic_shifting": True, "base_shift": 0.5, "max_shift": 1.15, "shift": 3.0}
    return diffusers.FluxPipeline(scheduler=FLOW(**moving if guided else {"shift": 1.0}), vae=shifted(),
                                  text_encoder=clip[0], tokenizer=clip[1], text_encoder_2=t5[0], tokenizer_2=t5[1],
                                  transformer=net)


def pixart(kind=diffusers.DPMSolverMultistepScheduler, **more):
    t5 = encoders.t5(96)
    net = loud(diffusers.PixArtTransformer2DModel(**PIXART), 1)
    return diffusers.PixArtAlphaPipeline(t5[1], t5[0], vae(), net, kind(**LINEAR, **more))


def lcm():
    clip = encoders.clip(64)
    net = unet(64)
    net = randomise(diffusers.UNet2DConditionModel.from_config(net.config, time_cond_proj_dim=32), 1)
    return diffusers.LatentConsistencyModelPipeline(
        vae=vae(), text_encoder=clip[0], tokenizer=clip[1], unet=net, scheduler=diffusers.LCMScheduler(**CHAIN),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)


def dit(scheduler=diffusers.DDIMScheduler, **more):
    """With the paper's sinusoid and repeated embedders, which diffusers initialises apart: see layouts/dit.py."""
    net = loud(diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4,
                                               out_channels=8, num_layers=2, sample_size=SIDE, norm_eps=1e-6), 1)
    for block in net.transformer_blocks:
        for name, module in block.norm1.emb.named_children():
            module.load_state_dict(net.transformer_blocks[0].norm1.emb.get_submodule(name).state_dict())
    clip = {"clip_sample": False} if scheduler is diffusers.DDIMScheduler else {}
    return diffusers.DiTPipeline(net, vae(), scheduler(**LINEAR, **clip, **more), id2label=NAMES)


def consistency(classes: int | None = None):
    net = randomise(diffusers.UNet2DModel(**STUDENT, num_class_embeds=classes), 0)
    return diffusers.ConsistencyModelPipeline(net, diffusers.CMStochasticIterativeScheduler())


__all__ = ["FACTOR", "SIDE", "consistency", "dit", "flux", "lcm", "pixart", "sd3"]
