"""Picture networks against diffusers: `python benchmarks/pictures.py [CASE]...` prints a table.

Nothing else may run on the machine meanwhile. Weights are random and go through `nexus convert`; both sides have the
same ones, dtype and threads.
"""

import contextlib
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from compare import DTYPES, Result, compare, table
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel

import nexus
from nexus.convert.convert import convert
from nexus.process import samplers
from nexus.process.schedules import grid

STEPS, SCALE, LABEL = 20, 4.0, 207
DIT = {"num_attention_heads": 8, "attention_head_dim": 64, "num_layers": 9, "sample_size": 32, "in_channels": 4,
       "out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 1000, "norm_eps": 1e-6}
CIFAR = {"sample_size": 32, "block_out_channels": (128, 256, 256, 256), "layers_per_block": 2,
         "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "attention_head_dim": None,
         "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1, "norm_eps": 1e-6}
SD = {"sample_size": 64, "cross_attention_dim": 768}
KL = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2, "latent_channels": 4, "sample_size": 512,
      "down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}


@contextlib.contextmanager
def both(peer: torch.nn.Module, dtype: torch.dtype) -> Iterator[tuple]:
    """(our system, the peer's network) with the peer's weights, in `dtype`."""
    with tempfile.TemporaryDirectory() as folder:
        peer.save_pretrained(f"{folder}/peer")
        convert(Path(folder) / "peer", Path(folder) / "ours")
        ours = nexus.load(f"{folder}/ours", device="cpu")
    yield ours.to(dtype).eval(), peer.to(dtype).eval()


def noise(*shape: int) -> torch.Tensor:
    """A fixed normal draw."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def dit(dtype: torch.dtype) -> Result:
    """A whole guided run of a 40 M DiT: DDIM, 20 steps, 256 tokens, one picture."""
    torch.manual_seed(0)
    net = DiTTransformer2DModel(**DIT)
    for block in net.transformer_blocks:
        # Published folders repeat one embedder in all blocks; the peer's time sinusoid is not the paper's (shift 1).
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    with both(net, dtype) as (system, peer):
        x, request = noise(1, 4, 32, 32), nexus.requests.SampleRequest(
            prompt=str(LABEL), steps=STEPS, guidance=SCALE, sampler="ddim")
        points = grid(system.config.path, system.config.path.times(STEPS, shape=(4, 32, 32)))

        def ours() -> torch.Tensor:
            denoise, _ = system._denoiser(request, points, 1, torch.device("cpu"))
            return samplers.sample("ddim", denoise, x, points)

        def theirs() -> torch.Tensor:
            scheduler = DDIMScheduler(clip_sample=False, timestep_spacing="linspace")
            scheduler.set_timesteps(STEPS)
            z, labels = x, torch.tensor([LABEL, 1000])
            for t in scheduler.timesteps:
                out = peer(torch.cat([z, z]).to(dtype), timestep=t.expand(2), class_labels=labels).sample.float()
                eps, rest = out[:, :3], out[:, 3:4]
                cond, uncond = eps.chunk(2)
                z = scheduler.step(torch.cat([uncond + SCALE * (cond - uncond), rest[:1]], 1), t, z).prev_sample
            return z
        return compare("DiT 40M, CFG, 20 steps, 256 tokens", dtype, ours, theirs)


def cifar(dtype: torch.dtype, batch: int = 1) -> Result:
    """One step of DDPM's CIFAR-10 UNet."""
    torch.manual_seed(0)
    with both(UNet2DModel(**CIFAR), dtype) as (system, peer):
        x, t = noise(batch, 3, 32, 32).to(dtype), torch.full((batch,), 500)
        return compare(f"DDPM CIFAR-10 UNet, batch {batch}, one step", dtype, lambda: system.net(x, t.float()),
                       lambda: peer(x, t).sample)


def decode(dtype: torch.dtype) -> Result:
    """Stable Diffusion's codec: a 512-pixel picture from its latents."""
    torch.manual_seed(0)
    with both(AutoencoderKL(**KL), dtype) as (system, peer):
        z = noise(1, 4, 64, 64).to(dtype)
        return compare("SD codec, decode 512 px", dtype, lambda: system.net.decode_raw(z),
                       lambda: peer.decode(z).sample)


def sd(dtype: torch.dtype) -> Result:
    """One guided step of Stable Diffusion 1.5's UNet at 64x64 latents."""
    torch.manual_seed(0)
    with both(UNet2DConditionModel(**SD), dtype) as (system, peer):
        x, words, t = noise(2, 4, 64, 64).to(dtype), noise(2, 77, 768).to(dtype), torch.full((2,), 500)
        ready = system.net.prepare(t[:1].float(), {"context": words})
        return compare("SD 1.5 UNet, guided step, 64x64", dtype,
                       lambda: system.net(x, t.float(), {"context": words}, ready),
                       lambda: peer(x, t, words).sample)


CASES: dict[str, Callable[[torch.dtype], Result]] = {
    "dit": dit, "cifar": cifar, "cifar-4": lambda dtype: cifar(dtype, 4), "decode": decode, "sd": sd,
}


def main(names: list[str]) -> None:
    """Run the named cases, or all."""
    torch.set_num_threads(max(1, torch.get_num_threads()))
    results = [CASES[name](dtype) for name in names or CASES for dtype in DTYPES]
    print(table(results))


if __name__ == "__main__":
    main(sys.argv[1:])
