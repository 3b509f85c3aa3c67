"""DiT: pictures from the same weights and the same starting noise as diffusers' whole DiTPipeline."""

import pytest
import torch
from safetensors.torch import save_file

from nexus.convert.layouts import dit
from nexus.models.diffusion.dit import DiTConfig
from nexus.requests import SampleRequest
from tests.parity.whole import Given, louder, ours_of, tiny_codec

diffusers = pytest.importorskip("diffusers")
CHAIN = {"num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear"}
SCHEDULERS = {
    "leading": lambda: diffusers.DDIMScheduler(**CHAIN, clip_sample=False, timestep_spacing="leading"),
    "trailing": lambda: diffusers.DDIMScheduler(**CHAIN, clip_sample=False, timestep_spacing="trailing"),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(**CHAIN, timestep_spacing="trailing"),
}


def tiny_pipeline(scheduler):
    net = louder(diffusers.DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4,
                                                 out_channels=8, num_layers=2, sample_size=8))
    for block in net.transformer_blocks:
        for name, module in block.norm1.emb.named_children():
            module.load_state_dict(net.transformer_blocks[0].norm1.emb.get_submodule(name).state_dict())
    pipe = diffusers.DiTPipeline(net, tiny_codec(diffusers), SCHEDULERS[scheduler]())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_the_whole_pipeline(scheduler, guidance, tmp_path):
    """The pipeline guides all channels and draws its own noise, which is given to us as a file."""
    torch.manual_seed(0)
    pipe = tiny_pipeline(scheduler)
    theirs = torch.from_numpy(pipe([7, 7], guidance_scale=guidance, num_inference_steps=10, output_type="np",
                                   generator=torch.Generator().manual_seed(5)).images).permute(0, 3, 1, 2)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(5))
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    spacing = "trailing" if scheduler == "dpm" else scheduler
    system = ours_of(pipe, DiTConfig, dit.LAYOUTS[1], pipe.transformer.state_dict(), guided_channels=None, steps=10,
                     path={"kind": "discrete", "spacing": spacing},
                     sampler="dpmpp-2m" if scheduler == "dpm" else "ddim")
    system.conditioner = Given({"label": torch.tensor([7])}, {"label": torch.tensor([1000])})
    request = SampleRequest(prompt="given", guidance=guidance, initial_noise=str(tmp_path / "noise.safetensors"))
    ours = (system.generate(request, seeds=[0, 1]).data + 1) / 2
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-4
    assert theirs.std() > 0.05
