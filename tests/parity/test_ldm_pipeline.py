"""Unconditional pipelines on pixels and on a VQ codec's latents: folders both ways, pictures equal to diffusers'."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus import checkpoint
from nexus.convert.convert import convert
from nexus.requests import SampleRequest
from tests.parity.whole import louder

diffusers = pytest.importorskip("diffusers")
STEPS = 8


def unet(channels: int):
    torch.manual_seed(0)
    return louder(diffusers.UNet2DModel(
        sample_size=8, in_channels=channels, out_channels=channels, block_out_channels=(16, 32), layers_per_block=1,
        norm_num_groups=8, down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=8,
        up_block_types=("AttnUpBlock2D", "UpBlock2D")), 1.3)


def vq():
    torch.manual_seed(1)
    codec = diffusers.VQModel(
        block_out_channels=(8, 16), norm_num_groups=4, num_vq_embeddings=24, scaling_factor=0.7, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2).eval()
    torch.nn.init.normal_(codec.quantize.embedding.weight)
    return codec


def ddim(**more):
    return diffusers.DDIMScheduler(beta_schedule="scaled_linear", beta_start=0.0015, beta_end=0.0195, **more)


PIPELINES = {
    "ldm": lambda: diffusers.LDMPipeline(vq(), unet(3), ddim(clip_sample=False)),
    "ddim": lambda: diffusers.DDIMPipeline(unet(3), ddim()),
    "ddpm": lambda: diffusers.DDPMPipeline(unet(1), diffusers.DDPMScheduler(variance_type="fixed_large")),
}


@pytest.fixture(scope="module", params=PIPELINES)
def case(request, tmp_path_factory):
    """(the pipeline, its folder, ours)."""
    pipe, folder = PIPELINES[request.param](), tmp_path_factory.mktemp(request.param)
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "theirs")
    convert(folder / "theirs", folder / "ours")
    return pipe, folder, checkpoint.load(str(folder / "ours"), device="cpu")


def test_pictures_are_the_pipelines(case, tmp_path):
    pipe, _, ours = case
    if isinstance(pipe, diffusers.DDPMPipeline):
        pytest.skip("draws noise in every step; its chain is that of the samplers' parity, its settings are below")
    drawn, more = torch.Generator().manual_seed(5), {}
    if isinstance(pipe, diffusers.DDIMPipeline):        # as OpenAI's code and ours: the noise fits the clipped picture
        more["use_clipped_model_output"] = True
    theirs = pipe(batch_size=2, num_inference_steps=STEPS, output_type="np", generator=drawn, **more).images
    noise = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    request = SampleRequest(steps=STEPS, initial_noise=str(tmp_path / "noise.safetensors"))
    made = ours.generate(request, seeds=[0, 1]).data
    theirs = torch.from_numpy(theirs).permute(0, 3, 1, 2)
    assert made.shape == theirs.shape and ((made + 1) / 2 - theirs).abs().max() <= 1e-3
    assert theirs.std() > 0.05


def test_a_folder_goes_back_as_it_was(case):
    pipe, folder, _ = case
    convert(folder / "ours", folder / "back", to="diffusers", exists="overwrite")
    files = sorted(f.relative_to(folder / "theirs") for f in (folder / "theirs").rglob("*.safetensors"))
    assert files == sorted(f.relative_to(folder / "back") for f in (folder / "back").rglob("*.safetensors"))
    for file in files:
        before, after = (load_file(folder / name / file) for name in ("theirs", "back"))
        assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)
    again = type(pipe).from_pretrained(folder / "back")
    assert {n: type(part) for n, part in again.components.items()} == {n: type(p) for n, p in pipe.components.items()}
    said = pipe.scheduler.config
    assert {key: again.scheduler.config[key] for key in said if key[0] != "_"} == \
        {key: value for key, value in said.items() if key[0] != "_"}


def test_settings_are_the_schedulers(case):
    pipe, _, ours = case
    c = ours.config
    assert (c.sampler, c.steps) == (("ddpm", 1000) if "DDPM" in type(pipe).__name__ else ("ddim", 50))
    assert c.clip == pipe.scheduler.config.clip_sample and c.latent_shape[1:] == (8, 8)
    assert c.variance == ("large" if c.sampler == "ddpm" else "small")
    assert (c.codec is not None) == hasattr(pipe, "vqvae") and c.conditioner.kind == "none"


def test_a_flat_folder_and_names_of_2022_are_read(tmp_path):
    """google/ddpm-* have all files in one folder and attention in the old names."""
    pipe = PIPELINES["ddim"]()
    pipe.save_pretrained(tmp_path / "theirs")
    flat = tmp_path / "flat"
    flat.mkdir()
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    state = {}
    for key, value in pipe.unet.state_dict().items():
        for new, old in names.items():
            key = key.replace(f".{new}.", f".{old}.") if "attentions" in key else key
        state[key] = value
    save_file(state, flat / "diffusion_pytorch_model.safetensors")
    for file, into in (("unet/config.json", "config.json"), ("model_index.json", "model_index.json"),
                       ("scheduler/scheduler_config.json", "scheduler_config.json")):
        (flat / into).write_text((tmp_path / "theirs" / file).read_text())
    convert(flat, tmp_path / "ours")
    ours = checkpoint.load(str(tmp_path / "ours"), device="cpu")
    convert(tmp_path / "theirs", tmp_path / "plain")
    plain = checkpoint.load(str(tmp_path / "plain"), device="cpu")
    assert ours.config == plain.config
    assert all(torch.equal(t, plain.state_dict()[n]) for n, t in ours.state_dict().items())
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers")
    back = load_file(tmp_path / "back/unet/diffusion_pytorch_model.safetensors")
    assert back.keys() == state.keys()
    assert json.loads((tmp_path / "back/model_index.json").read_text())["_class_name"] == "DDIMPipeline"
