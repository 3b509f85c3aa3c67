"""Whole Stable Diffusion pipelines against diffusers': conversion both ways, the same pictures from the same noise."""

import logging
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    LMSDiscreteScheduler,
    PNDMScheduler,
    SASolverScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
)
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModelWithProjection

from nexus import checkpoint
from nexus.convert.convert import convert
from nexus.convert.layouts import clip_text, schedulers
from nexus.errors import ModelError, UsageError
from nexus.images import write_image
from nexus.media import to_uint8
from nexus.requests import SampleRequest

sys.path.insert(0, str(Path(__file__).parent))
import pipelines  # noqa: E402
from pipelines import encoders  # noqa: E402

SHAPE = (4, pipelines.SIDE, pipelines.SIDE)
PROMPT, NEGATIVE = "a red ball, photo of the cat", "blue house"
HEADS = ["net.heads=2"]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def ours(tmp_path, pipe):
    """The pipeline, converted and loaded."""
    pipe.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "ours")
    return checkpoint.load(str(tmp_path / "ours"), device="cpu")


def noise(tmp_path, n=2):
    drawn = torch.randn(n, *SHAPE, generator=torch.Generator().manual_seed(3))
    save_file({"noise": drawn}, tmp_path / "noise.safetensors")
    return drawn, str(tmp_path / "noise.safetensors")


def same_pictures(tmp_path, pipe, *, steps=5, guidance=7.5, negative=NEGATIVE, rescale=0.0, **request):
    system = ours(tmp_path, pipe)
    drawn, file = noise(tmp_path)
    pipe.set_progress_bar_config(disable=True)
    wanted = pipe([PROMPT] * 2, negative_prompt=negative and [negative] * 2, num_inference_steps=steps,
                  guidance_scale=guidance, guidance_rescale=rescale, latents=drawn, output_type="pt", height=16,
                  width=16).images
    made = system.generate(SampleRequest(prompt=PROMPT, negative_prompt=negative, steps=steps, guidance=guidance,
                                         guidance_rescale=rescale, initial_noise=file, **request), seeds=[0, 1]).data
    assert wanted.std() > 0.05                          # pictures, not a plain colour
    assert ((made + 1) / 2 - wanted).abs().max() <= 1 / 255
    return float(((made + 1) / 2 - wanted).abs().max())


@pytest.mark.parametrize("kind", ["eps", "v", "data", "no-negative", "no-guidance", "zero-snr"])
def test_sd_pictures(tmp_path, kind):
    more = {"v": {"prediction_type": "v_prediction"}, "data": {"set_alpha_to_one": True},
            "zero-snr": {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True,
                         "timestep_spacing": "trailing", "steps_offset": 0}}.get(kind, {})
    same_pictures(tmp_path, pipelines.sd(**more), negative=None if kind == "no-negative" else NEGATIVE,
                  guidance=1.0 if kind == "no-guidance" else 7.5)


@pytest.mark.parametrize("kind, more", [
    (EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
    (DPMSolverMultistepScheduler, {"timestep_spacing": "trailing", "final_sigmas_type": "zero"}),
    (DPMSolverMultistepScheduler, {}),
    (DPMSolverMultistepScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
    (UniPCMultistepScheduler, {}),
    (PNDMScheduler, {"skip_prk_steps": True, "set_alpha_to_one": False, "steps_offset": 1}),    # SD 1.5's own
    (LMSDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1}),
    (EulerDiscreteScheduler, {"prediction_type": "v_prediction"}),
    (EulerDiscreteScheduler, {"timestep_spacing": "trailing"}),
    (EulerDiscreteScheduler, {"timestep_spacing": "leading", "steps_offset": 1, "use_karras_sigmas": True}),
    (EulerDiscreteScheduler, {"use_karras_sigmas": True}),
    (HeunDiscreteScheduler, {}), (LMSDiscreteScheduler, {}),
], ids=["euler", "dpmpp-2m-trailing", "dpmpp-2m", "dpmpp-2m-leading", "unipc", "pndm", "lms", "euler-linspace",
        "euler-trailing", "euler-karras-leading", "euler-karras", "heun-linspace", "lms-linspace"])
def test_other_schedulers(tmp_path, kind, more):
    """diffusers' multistep solvers leave the cleanest of N + 1 times out, for "linspace" (their own) and "leading"."""
    pipe = pipelines.sd()
    pipe.scheduler = kind(**pipelines.CHAIN, **more)
    assert same_pictures(tmp_path, pipe) <= 1e-4


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_guidance_is_rescaled_in_the_space_of_the_output(prediction, tmp_path):
    assert same_pictures(tmp_path, pipelines.sd(prediction_type=prediction), rescale=0.7) <= 1e-4


@pytest.mark.parametrize("kind, more, said", [
    (DDIMScheduler, {"clip_sample": False, "thresholding": True}, "thresholding True"),
    (EulerDiscreteScheduler, {"use_exponential_sigmas": True}, "use_exponential_sigmas True"),
    (EulerDiscreteScheduler, {"interpolation_type": "log_linear"}, "interpolation_type log_linear"),
    (DDIMScheduler, {"clip_sample": False, "timestep_spacing": "linspace"}, "linspace")])
def test_what_a_scheduler_does_otherwise_is_noted(kind, more, said, tmp_path):
    pipe = pipelines.sd()
    pipe.scheduler = kind(**pipelines.CHAIN, **more)
    pipe.save_pretrained(tmp_path / "theirs")
    assert any(said in note for note in convert(tmp_path / "theirs", tmp_path / "ours").notes)


def test_a_folder_sampled_by_sa_solver_is_read_and_written(tmp_path):
    """The sampler itself is compared in test_samplers.py: whole pipelines draw their noise in another order."""
    pipe = pipelines.sd()
    pipe.scheduler = SASolverScheduler(**pipelines.CHAIN, timestep_spacing="leading", steps_offset=1)
    config = ours(tmp_path, pipe).config
    assert config.sampler == "sa-solver" and config.path.ends_at_first and config.path.open_end
    pipe.scheduler.set_timesteps(7)
    assert config.path.times(7).tolist() == pipe.scheduler.timesteps.tolist()
    written = SASolverScheduler.from_config(schedulers.DISCRETE.write(config)).config
    assert {name: written[name] for name in pipelines.CHAIN | {"steps_offset": 1, "timestep_spacing": 0}} \
        == {**pipelines.CHAIN, "steps_offset": 1, "timestep_spacing": "leading"}


def test_a_model_sampled_by_pndm_says_how_to_diffusers(tmp_path):
    """A folder written for it, without one of theirs to keep, gives diffusers' PNDM no Runge-Kutta steps to add."""
    pipe = pipelines.sd()
    pipe.scheduler = PNDMScheduler(**pipelines.CHAIN, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1)
    written = schedulers.DISCRETE.write(ours(tmp_path, pipe).config)
    theirs = PNDMScheduler.from_config(written).config
    names = ("skip_prk_steps", "set_alpha_to_one", "steps_offset", "timestep_spacing", "prediction_type",
             *pipelines.CHAIN)
    assert {name: theirs[name] for name in names} == {name: pipe.scheduler.config[name] for name in names}


@pytest.mark.parametrize("negative", [NEGATIVE, None])
def test_sdxl_pictures(tmp_path, negative):
    same_pictures(tmp_path, pipelines.sdxl(), negative=negative)


def test_image_to_image(tmp_path):
    pipe = pipelines.sd()
    system = ours(tmp_path, pipe)
    drawn, file = noise(tmp_path, 1)
    picture = torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1
    write_image(tmp_path / "in.png", to_uint8(picture))
    stored = torch.from_numpy(to_uint8(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
    theirs = StableDiffusionImg2ImgPipeline(**pipe.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    with torch.no_grad():
        latents = pipe.vae.encode(stored).latent_dist.mode() * pipe.vae.config.scaling_factor
    torch.manual_seed(0)
    theirs.scheduler.add_noise, add = (lambda x, _, t: add(x, drawn, t)), theirs.scheduler.add_noise
    wanted = theirs([PROMPT], image=latents, strength=0.5, num_inference_steps=6, guidance_scale=5.0,
                    output_type="pt").images
    made = system.generate(SampleRequest(prompt=PROMPT, image=str(tmp_path / "in.png"), strength=0.5, steps=6,
                                         guidance=5.0, initial_noise=file), seeds=[0]).data
    assert ((made + 1) / 2 - wanted).abs().max() <= 1 / 255


def test_inpainting_with_nine_channels(tmp_path):
    """What the mask covers; around it this package keeps the user's own pixels."""
    pipe = pipelines.sd(channels=9)
    with torch.no_grad():                               # a posterior without spread: the reference draws from it
        pipe.vae.quant_conv.weight[4:] = 0
        pipe.vae.quant_conv.bias[4:] = -30
    system = ours(tmp_path, pipe)
    assert system.config.concat.kind == "inpaint"
    drawn, file = noise(tmp_path, 1)
    picture = to_uint8(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1)
    mask = torch.zeros(1, 16, 16)
    mask[:, 4:12, 2:10] = 1
    write_image(tmp_path / "in.png", picture)
    write_image(tmp_path / "mask.png", to_uint8(mask * 2 - 1))
    theirs = StableDiffusionInpaintPipeline(**pipe.components, requires_safety_checker=False)
    theirs.set_progress_bar_config(disable=True)
    wanted = theirs([PROMPT], image=torch.from_numpy(picture).permute(2, 0, 1)[None].float() / 127.5 - 1,
                    mask_image=mask[None], latents=drawn, num_inference_steps=5, guidance_scale=5.0, height=16,
                    output_type="pt").images
    made = system.generate(SampleRequest(prompt=PROMPT, image=str(tmp_path / "in.png"), mask=str(tmp_path / "mask.png"),
                                         steps=5, guidance=5.0, initial_noise=file), seeds=[0]).data
    assert ((made + 1) / 2 - wanted)[mask[None].expand(1, 3, -1, -1).bool()].abs().max() <= 1 / 255
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers")
    assert type(StableDiffusionInpaintPipeline.from_pretrained(tmp_path / "back")) is StableDiffusionInpaintPipeline


def tensors(folder: Path) -> dict[str, dict]:
    return {str(p.relative_to(folder)): load_file(p) for p in sorted(folder.rglob("*.safetensors"))}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


@pytest.mark.parametrize("make, kind", [(pipelines.sd, StableDiffusionPipeline),
                                        (pipelines.sdxl, StableDiffusionXLPipeline)], ids=["sd", "sdxl"])
def test_a_folder_goes_through_and_back(tmp_path, make, kind):
    make().save_pretrained(tmp_path / "theirs")
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    assert (report.system, report.layout, report.problems) == ("sd", "sd/diffusers", ())
    assert checkpoint.verify(tmp_path / "ours") == []
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers")
    first, back = tensors(tmp_path / "theirs"), tensors(tmp_path / "back")
    assert first.keys() == back.keys() and all(equal(first[name], back[name]) for name in first)
    again = kind.from_pretrained(tmp_path / "back")
    assert again.unet.config.cross_attention_dim == make().unet.config.cross_attention_dim
    convert(tmp_path / "back", tmp_path / "twice")
    assert (tmp_path / "twice/model.safetensors").read_bytes() == (tmp_path / "ours/model.safetensors").read_bytes()


def test_a_2022_folder_keeps_its_names(tmp_path):
    """The published SD 1 folders call a codec's attention query, key, value, proj_attn, and hold pickles."""
    pipelines.sd().save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/vae/diffusion_pytorch_model.safetensors"
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    old = {}
    for key, tensor in load_file(file).items():
        for new, name in names.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{name}.")
        old[key] = tensor
    save_file(old, file)
    text = tmp_path / "theirs/text_encoder"
    words = load_file(text / "model.safetensors")
    torch.save(words, text / "pytorch_model.bin")
    (text / "model.safetensors").unlink()
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers")
    assert equal(load_file(tmp_path / "back/vae/diffusion_pytorch_model.safetensors"), old)
    assert equal(load_file(tmp_path / "back/text_encoder/model.safetensors"), words)


def single(tmp_path, make, name="file.safetensors", *, ema=False, buffers=True):
    """A single file as the original codes save it, from a pipeline's tensors; and the pipeline."""
    pipe = make()
    pipe.save_pretrained(tmp_path / "theirs")
    convert(tmp_path / "theirs", tmp_path / "via")
    convert(tmp_path / "via", tmp_path / "plain.safetensors", to="original")
    state = load_file(tmp_path / "plain.safetensors")
    if buffers:
        state |= {"betas": torch.linspace(0, 1, 1000), "alphas_cumprod": torch.linspace(1, 0, 1000)}
        tables = [k for k in state if k.endswith("text_model.embeddings.token_embedding.weight")]
        state |= {k.replace("token_embedding.weight", "position_ids"): torch.arange(77)[None] for k in tables}
        scales = [k for k in state if k.endswith("model.token_embedding.weight")]
        state |= {k.replace("token_embedding.weight", "logit_scale"): torch.tensor(4.6) for k in scales}
    if ema:
        net = {k: t for k, t in state.items() if k.startswith("model.diffusion_model.")}
        state |= {"model_ema." + k.removeprefix("model.").replace(".", ""): t for k, t in net.items()}
        state |= {k: t + 1 for k, t in net.items()}
        state |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(7)}
    path = tmp_path / name
    if path.suffix == ".ckpt":
        torch.save({"state_dict": state, "global_step": 3}, path)
    else:
        save_file(state, path)
    return path, state, tmp_path / "theirs/tokenizer", pipe


@pytest.mark.parametrize("make, recipe, prediction, heads", [
    (pipelines.sd, "sd", "eps", 2), (pipelines.sd2, "sd2", "v", 2), (pipelines.sdxl, "sdxl", "eps", 4)],
    ids=["sd", "sd2", "sdxl"])
def test_a_single_file_goes_through_and_back(tmp_path, make, recipe, prediction, heads):
    path, state, tokenizer, pipe = single(tmp_path, make)
    report = convert(path, tmp_path / "ours", overrides=[f"tokenizer={tokenizer}", f"net.heads={heads}"])
    assert report.layout == "sd/original" and not report.problems and report.assumed["prediction"] == prediction
    assert report.config["conditioner"]["recipe"] == recipe
    assert checkpoint.verify(tmp_path / "ours") == []
    convert(tmp_path / "ours", tmp_path / "back.safetensors", to="original")
    assert equal(load_file(tmp_path / "back.safetensors"), state)
    via, direct = (load_file(tmp_path / name / "model.safetensors") for name in ("via", "ours"))
    assert equal(via, direct)


def test_a_pickled_file_with_averages(tmp_path):
    path, state, tokenizer, _ = single(tmp_path, pipelines.sd, "file.ckpt", ema=True)
    report = convert(path, tmp_path / "ours", overrides=[f"tokenizer={tokenizer}", *HEADS])
    assert "averaged" in report.notes[0]
    via, direct = (load_file(tmp_path / name / "model.safetensors") for name in ("via", "ours"))
    assert equal(via, direct)


def test_the_text_encoders_of_a_single_file_speak_as_before(tmp_path):
    path, _, tokenizer, pipe = single(tmp_path, pipelines.sd)
    convert(path, tmp_path / "ours", overrides=[f"tokenizer={tokenizer}", *HEADS])
    folder = tmp_path / "ours/pipeline/text_encoder"
    config = checkpoint.json.loads((folder / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["hidden_act"]) == (64, 3, "quick_gelu")
    (folder / "config.json").write_text(checkpoint.json.dumps(config | {"num_attention_heads": 2}))
    loaded = type(pipe.text_encoder).from_pretrained(folder)        # heads of 64 are what published ones have
    ids = pipe.tokenizer("a red ball", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(loaded(ids)[0], pipe.text_encoder(ids)[0])


def test_openclip_names_are_diffusers_own():
    model, _ = encoders.clip(64, projected=True, pad="!")
    state = clip_text.to_openclip(clip_text.prefixed(model.state_dict()))
    assert state["text_projection"].shape == (64, 72)
    assert state["transformer.resblocks.2.attn.in_proj_weight"].shape == (192, 64)
    # The reference splits q, k, v by the projection's rows, which is the width in these.
    theirs = convert_open_clip_checkpoint(model, {f"x.{k}": t for k, t in state.items()}, "x.")
    ours = clip_text.from_openclip(state)
    assert equal({k: t for k, t in theirs.items() if "position_ids" not in k}, ours)
    again = CLIPTextModelWithProjection(model.config)
    again.load_state_dict(ours)


def test_refusals(tmp_path):
    path, state, tokenizer, _ = single(tmp_path, pipelines.sd, buffers=False)
    with pytest.raises(ModelError, match=r"no folder"):
        convert(path, tmp_path / "x", overrides=["tokenizer=./nowhere", *HEADS])
    save_file(state | {"cond_stage_model.strange": torch.ones(2)}, path)
    problems = convert(path, tmp_path / "x", check=True, overrides=[f"tokenizer={tokenizer}", *HEADS]).problems
    assert problems == ("cond_stage_model.strange has no place in this layout",)
    with pytest.raises(UsageError, match="whole pipeline"):
        convert(tmp_path / "theirs", tmp_path / "x", to="original")
    with pytest.raises(UsageError, match="a folder"):
        convert(tmp_path / "via", tmp_path / "x.safetensors", to="diffusers")
    shutil.rmtree(tmp_path / "theirs/tokenizer")
    with pytest.raises(ModelError, match="lacks tokenizer"):
        convert(tmp_path / "theirs", tmp_path / "x")
    shutil.rmtree(tmp_path / "via/pipeline")
    with pytest.raises(ModelError, match="no folder"):
        convert(tmp_path / "via", tmp_path / "x", to="diffusers")


def test_a_converted_pipeline_can_be_trained(tmp_path):
    """Captions of different lengths, the null among them, reach the network; the encoders stay out of the phases."""
    system = ours(tmp_path, pipelines.sdxl())
    batch = {"latent": torch.randn(3, *SHAPE), "caption": ["a red ball", "ball " * 90, "cat"]}
    loss = system.loss(batch, torch.Generator().manual_seed(0), 0)["loss"]
    loss.backward()
    assert loss.isfinite() and all(p.grad is not None for p in system.net.parameters())
    assert system.phases()[0].module is system.net
