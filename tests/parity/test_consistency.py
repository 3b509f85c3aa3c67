"""Consistency models and LCM against OpenAI's code (saved numbers) and diffusers' pipelines and schedulers."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus import checkpoint
from nexus.convert.convert import convert
from nexus.convert.detect import detect, opened
from nexus.convert.keymap import to_native
from nexus.convert.layouts import kl_image
from nexus.models.cv.vae.vae import VAEConfig
from nexus.models.diffusion.consistency_model import ConsistencyConfig
from nexus.models.diffusion.lcm import LCMConfig, SkippingPath
from nexus.process import consistency as cm
from nexus.process import edm
from nexus.process.consistency import multistep
from nexus.process.predictions import clipped, denoiser
from nexus.process.samplers import heun, sample
from nexus.process.schedules import Grid, grid
from nexus.requests import SampleRequest
from tests.exact import mixture

diffusers = pytest.importorskip("diffusers")
CASES = Path(os.environ.get("NEXUS_PARITY", Path(__file__).parents[3] / "shared" / "parity"))
CASE = CASES / "consistency-unet-a"
needs_case = pytest.mark.skipif(not CASE.is_dir(), reason=f"no parity case at {CASE}; set NEXUS_PARITY")
PIXEL = 1 / 255


def close(ours, theirs, tolerance=1e-4):
    assert (ours - theirs).abs().max() <= tolerance * max(1.0, theirs.abs().max().item())


def queue(noises):
    """Noise in the given order, whatever asks for it."""
    left = iter(noises)
    return lambda x: next(left).to(x)


def randomise(net, seed=0):
    torch.manual_seed(seed)
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.3 if p.ndim == 1 else p[0].numel() ** -0.5)
    return net.eval()


# --- OpenAI's consistency_models ------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def case():
    tensors = load_file(CASE / "tensors.safetensors")
    with opened(CASE / "checkpoint.pt") as sources:
        layout = detect(sources).layout
        shapes = sources[0].shapes
    assert (layout.name, layout.system) == ("openai", "consistency")
    config = layout.config(shapes, None)
    assert set(layout.unsaid(shapes, None)) == {"size", "net.heads", "net.head_dim"}
    config = ConsistencyConfig.parse(config | {"size": 16, "net": config["net"] | {"head_dim": 16},
                                               "weighting": "uniform", "distance": "l2"})
    net = config.net.build().eval()
    net.load_state_dict(to_native(layout.table(config.to_json()), torch.load(CASE / "checkpoint.pt",
                                                                            weights_only=True)))
    return config, net, tensors, {"label": tensors["y"].long()}


def sigmas_at(indices, steps):
    """A grid whose last point is a noise level too, as the released sampler has it."""
    t = edm.karras_sigmas(steps)[list(indices)]
    return Grid(t, torch.ones_like(t), t)


@needs_case
def test_network_and_parameter_count(case):
    config, net, saved, cond = case
    assert sum(p.numel() for p in net.parameters()) == json.loads((CASE / "case.json").read_text())["params"]
    with torch.no_grad():
        close(net(saved["x"], saved["timesteps"], cond), saved["output"])


@needs_case
def test_denoised(case):
    config, net, saved, cond = case
    with torch.no_grad():
        close(config.jump(net, saved["x_t"], saved["sigma"], cond), saved["denoised_distillation_true"])
        close(denoiser(net, config.path, "edm", cond)(saved["x_t"], saved["sigma"]),
              saved["denoised_distillation_false"])


@needs_case
@pytest.mark.parametrize("name, indices, steps", [("onestep", (0,), 40), ("multistep", (0, 22, 39), 40),
                                                  ("multistep_4ev", (0, 60, 106, 150), 201)])
def test_samplers(case, name, indices, steps):
    config, net, saved, cond = case
    noises = saved["sampler_noises"]
    points = sigmas_at(indices, steps) if len(indices) > 1 else grid(config.path, config.path.times(1))
    jump = clipped(lambda x, t: config.jump(net, x, t, cond))
    with torch.no_grad():
        made = multistep(jump, 80 * noises[0], points, noise=queue(noises[1:]), floor=0.002)
    close(made.clamp(-1, 1), saved[f"sample_{name}"])


@needs_case
def test_the_teachers_samplers(case):
    config, net, saved, cond = case
    points = grid(config.path, edm.karras_sigmas(6))
    close(points.sigma, saved["sigmas_karras_6"].double(), 1e-6)
    denoise = clipped(denoiser(net, config.path, "edm", cond))
    start = 80 * saved["sampler_noises"][0]
    with torch.no_grad():
        close(heun(denoise, start, points).clamp(-1, 1), saved["sample_heun"])
        close(sample("euler", denoise, start, points).clamp(-1, 1), saved["sample_euler"])


@needs_case
@pytest.mark.parametrize("distance", ["l1", "l2"])
@pytest.mark.parametrize("way", ["ct", "cd"])
def test_losses(case, way, distance):
    """Target = 0.95 x every parameter, teacher = 1.05 x."""
    config, net, saved, cond = case

    def scaled(by):
        other = config.net.build().eval()
        other.load_state_dict({n: p * by for n, p in net.state_dict().items()})
        return other
    sigmas, i = edm.karras_sigmas(40), saved["loss_indices"].long()
    with torch.no_grad():
        teacher = config.denoiser(scaled(1.05), cond) if way == "cd" else None
        pair = config.pair(teacher, saved["loss_x_start"], saved["loss_noise"], sigmas[i], sigmas[i + 1], cond)
        loss = pair.weight * cm.DISTANCES[distance](config.jump(net, pair.x, pair.t, cond),
                                                    config.jump(scaled(0.95), pair.near, pair.s, cond))
    close(loss, saved[f"loss_{way}_{distance}"])


@needs_case
def test_schedules_of_the_released_code():
    told = json.loads((CASE / "case.json").read_text())["ema_and_scales"]
    for step, decay, scales in told["rows_step_ema_scales"]:
        ours = cm.progressive_scales(step, told["args"]["total_steps"], 2, told["args"]["end_scales"])
        assert ours == scales and cm.adaptive_decay(ours, 2, 0.95) == pytest.approx(decay, abs=1e-12)


@needs_case
def test_the_file_goes_there_and_back(tmp_path):
    convert(CASE / "checkpoint.pt", tmp_path / "model", overrides=["net.head_dim=16", "size=16"])
    convert(tmp_path / "model", tmp_path / "back.pt", to="openai")
    there, back = (torch.load(f, weights_only=True) for f in (CASE / "checkpoint.pt", tmp_path / "back.pt"))
    assert there.keys() == back.keys() and all(torch.equal(there[k], back[k]) for k in there)


# --- diffusers' ConsistencyModelPipeline ----------------------------------------------------------------------------

CM_UNET = {"sample_size": 16, "block_out_channels": (32, 64), "layers_per_block": 1, "attention_head_dim": 16,
           "down_block_types": ("ResnetDownsampleBlock2D", "AttnDownBlock2D"),
           "up_block_types": ("AttnUpBlock2D", "ResnetUpsampleBlock2D"), "downsample_type": "resnet",
           "upsample_type": "resnet", "resnet_time_scale_shift": "scale_shift", "attn_norm_num_groups": 32}


@pytest.fixture(scope="module", params=[None, 10], ids=["plain", "labels"])
def pipeline(request, tmp_path_factory):
    """A tiny random pipeline, saved, and its conversion loaded."""
    unet = randomise(diffusers.UNet2DModel(**CM_UNET, num_class_embeds=request.param))
    pipe = diffusers.ConsistencyModelPipeline(unet, diffusers.CMStochasticIterativeScheduler())
    pipe.set_progress_bar_config(disable=True)
    folder = tmp_path_factory.mktemp("cm")
    pipe.save_pretrained(folder / "theirs")
    report = convert(folder / "theirs", folder / "ours")
    assert (report.system, report.layout) == ("consistency", "consistency/diffusers")
    return pipe, checkpoint.load(str(folder / "ours"), device="cpu"), folder


@pytest.mark.parametrize("steps, visits", [(1, ()), (2, ()), (4, ()), (2, (0, 22)), (3, (0, 17, 30))])
def test_consistency_pipeline(pipeline, steps, visits, tmp_path):
    pipe, ours, _ = pipeline
    rng = torch.Generator().manual_seed(3)
    start = torch.randn(2, 3, 16, 16, generator=rng)
    labels = None if pipe.unet.config.num_class_embeds is None else [7, 7]
    custom = sorted(visits, reverse=True) or None           # diffusers turns the list around
    theirs = pipe(batch_size=2, class_labels=labels, latents=start, generator=torch.Generator().manual_seed(5),
                  output_type="pt", num_inference_steps=steps, timesteps=custom).images * 2 - 1
    rng = torch.Generator().manual_seed(5)
    path = ours.config.path.model_copy(update={"visits": visits})
    config = ours.config.model_copy(update={"path": path})
    cond = {} if labels is None else {"label": torch.tensor(labels)}
    jump = clipped(lambda x, t: config.jump(ours.net, x, t, cond))
    with torch.no_grad():
        made = multistep(jump, 80 * start, grid(path, path.times(steps)), floor=path.sigma_min,
                         noise=lambda x: torch.randn(x.shape, generator=rng))
    assert (made.clamp(-1, 1) - theirs).abs().max() <= 1e-4
    if steps == 1:                              # and through the request
        save_file({"noise": start}, tmp_path / "noise.safetensors")
        asked = SampleRequest(steps=1, initial_noise=str(tmp_path / "noise.safetensors"),
                              prompt=None if labels is None else "7")
        assert (ours.generate(asked, seeds=[0, 1]).data - theirs).abs().max() <= 1e-4


def test_the_pipeline_goes_there_and_back(pipeline, tmp_path):
    pipe, _, folder = pipeline
    convert(folder / "ours", tmp_path / "unet", to="consistency/diffusers")     # the network alone
    back = diffusers.UNet2DModel.from_pretrained(tmp_path / "unet").state_dict()
    there = pipe.unet.state_dict()
    assert there.keys() == back.keys() and all(torch.equal(there[k], back[k]) for k in there)


# --- LCM ------------------------------------------------------------------------------------------------------------

POINTS = torch.tensor([[1.0, 0.2, -0.5, 0.4], [-0.8, 0.9, 0.1, 0.0], [0.3, -1.0, 0.6, -0.9]])


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 8, 50])
@pytest.mark.parametrize("strength", [1.0, 0.5, 0.3])
def test_lcm_times(steps, strength):
    scheduler = diffusers.LCMScheduler()
    if steps > int(50 * strength):
        return
    scheduler.set_timesteps(steps, original_inference_steps=50, strength=strength)
    assert SkippingPath().times(steps, strength=strength).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_lcm_scheduler(steps, prediction):
    """The same exact denoiser, told to the scheduler as the network's answer."""
    config = LCMConfig(prediction={"epsilon": "eps", "v_prediction": "v", "sample": "x0"}[prediction])
    path, model = config.path, mixture(config.path, POINTS, 0.3)
    scheduler = diffusers.LCMScheduler(prediction_type=prediction)
    scheduler.alphas_cumprod = path.alpha_bar().double()        # its own table is float32
    scheduler.set_timesteps(steps)

    def answer(x, t, cond=None, prepared=None):
        t = t.double()[0] if t.ndim else t.double()
        (alpha, sigma), x0 = path.at(t), model(x.double(), t)
        return {"epsilon": (x - alpha * x0) / sigma, "v_prediction": (alpha * x - x0) / sigma, "sample": x0}[prediction]
    x = start = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rng = torch.Generator().manual_seed(7)
    for t in scheduler.timesteps:
        x, denoised = scheduler.step(answer(x, t), t, x, generator=rng, return_dict=False)
    rng = torch.Generator().manual_seed(7)
    ours = multistep(lambda x, t: config.jump(answer, x, t), start, grid(path, path.times(steps)),
                     noise=lambda x: torch.randn(x.shape, generator=rng, dtype=x.dtype))
    close(ours, x, 1e-7)                        # the scheduler has c_skip and c_out in float32
    close(ours, denoised, 1e-7)


@pytest.mark.parametrize("steps, guidance", [(1, 8.0), (2, 8.0), (4, 1.5), (8, 5.0)])
def test_lcm_pipeline(steps, guidance, tmp_path):
    unet = randomise(diffusers.UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        cross_attention_dim=24, attention_head_dim=4, time_cond_proj_dim=32,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D")))
    vae = randomise(diffusers.AutoencoderKL(
        block_out_channels=(16, 32), down_block_types=("DownEncoderBlock2D",) * 2, norm_num_groups=8, sample_size=16,
        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, layers_per_block=1), 1)
    pipe = diffusers.LatentConsistencyModelPipeline(
        vae=vae, text_encoder=None, tokenizer=None, unet=unet, scheduler=diffusers.LCMScheduler(), safety_checker=None,
        feature_extractor=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    rng = torch.Generator().manual_seed(3)
    start, words = torch.randn(2, 4, 8, 8, generator=rng), torch.randn(2, 7, 24, generator=rng)
    theirs = pipe(prompt_embeds=words, latents=start, num_inference_steps=steps, guidance_scale=guidance,
                  generator=torch.Generator().manual_seed(5), output_type="pt").images * 2 - 1

    unet.save_pretrained(tmp_path / "theirs")
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    assert (report.system, report.layout) == ("lcm", "lcm/diffusers")
    ours = checkpoint.load(str(tmp_path / "ours"), device="cpu")
    c = ours.config
    cond = {"context": words, "guidance": torch.full((2,), guidance - 1)}
    points = grid(c.path, c.path.times(steps))
    prepared = ours._cached(points, cond)
    rng = torch.Generator().manual_seed(5)
    with torch.no_grad():
        z = multistep(lambda x, t: c.jump(ours.net, x, t, cond, prepared), start, points,
                      noise=lambda x: torch.randn(x.shape, generator=rng))
        shapes = {k: tuple(v.shape) for k, v in vae.state_dict().items()}
        foreign = json.loads(vae.to_json_string())
        layout = next(one for one in kl_image.LAYOUTS if one.matches(shapes, foreign))
        settings = layout.config(shapes, foreign)
        codec = VAEConfig.parse(settings).net.build().eval()
        codec.load_state_dict(to_native(layout.table(settings), vae.state_dict()))
        made = codec.decode(z).clamp(-1, 1)
    assert (made - theirs).abs().max() <= PIXEL / 10
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers")
    back = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "back").state_dict()
    assert all(torch.equal(value, back[key]) for key, value in unet.state_dict().items())
