"""Whole pipelines of SD3, FLUX, PixArt, LCM, DiT and consistency models: there and back, and the same pictures."""

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus import checkpoint
from nexus.convert.convert import convert
from nexus.errors import ModelError
from nexus.requests import SampleRequest

diffusers = pytest.importorskip("diffusers")
from tests.parity import published  # noqa: E402

PIXEL = 1 / 255
PROMPT, NEGATIVE = "a red ball, photo of the cat", "blue house"
SHAPE = (4, published.SIDE, published.SIDE)
PIXELS = published.SIDE * published.FACTOR


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def converted(tmp_path, pipe):
    """The pipeline's folder, converted and loaded."""
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(tmp_path / "theirs")
    if hasattr(pipe, "labels"):                                         # the published folder names them, by hand
        index = tmp_path / "theirs/model_index.json"
        index.write_text(json.dumps(json.loads(index.read_text()) | {"id2label": published.NAMES}))
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    assert report.problems == () and report.layout.endswith("/diffusers") and checkpoint.verify(tmp_path / "ours") == []
    return checkpoint.load(str(tmp_path / "ours"), device="cpu")


def noise(tmp_path, n=2, shape=SHAPE):
    drawn = torch.randn(n, *shape, generator=torch.Generator().manual_seed(3))
    save_file({"noise": drawn}, tmp_path / "noise.safetensors")
    return drawn, str(tmp_path / "noise.safetensors")


def difference(made, wanted) -> float:
    """The most by which pictures in [-1, 1] differ from ones in [0, 1]."""
    assert made.shape == wanted.shape and wanted.std() > 0.05           # pictures, not a plain colour
    return float(((made + 1) / 2 - wanted).abs().max())


def tensors(folder: Path) -> dict[str, dict]:
    return {str(p.relative_to(folder)): load_file(p) for p in sorted(folder.rglob("*.safetensors"))}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)


def goes_back(tmp_path, kind):
    """Out again: the same files with the same tensors, which diffusers loads, and in once more."""
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers")
    first, back = tensors(tmp_path / "theirs"), tensors(tmp_path / "back")
    assert first.keys() == back.keys() and all(equal(first[name], back[name]) for name in first)
    again = kind.from_pretrained(tmp_path / "back")
    convert(tmp_path / "back", tmp_path / "twice")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "twice" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    return again


def generated(system, file, **request):
    return system.generate(SampleRequest(initial_noise=file, **request), seeds=[0, 1]).data


# --- SD3 and FLUX ---------------------------------------------------------------------------------------------------

SD3_WAYS = {"sd3": {}, "without guidance": {}, "dynamic": {"shift": 1.0, "use_dynamic_shifting": True}}


@pytest.mark.parametrize("way", SD3_WAYS)
def test_sd3(tmp_path, way, record_property):
    pipe = published.sd3(**SD3_WAYS[way])
    system = converted(tmp_path, pipe)
    drawn, file = noise(tmp_path)
    scale = 1.0 if way == "without guidance" else 5.0
    wanted = pipe([PROMPT] * 2, negative_prompt=[NEGATIVE] * 2, num_inference_steps=5, guidance_scale=scale,
                  latents=drawn, output_type="pt", height=PIXELS, width=PIXELS).images
    made = generated(system, file, prompt=PROMPT, negative_prompt=NEGATIVE, steps=5, guidance=scale)
    record_property("difference", difference(made, wanted))
    assert difference(made, wanted) <= PIXEL / 10
    again = goes_back(tmp_path, diffusers.StableDiffusion3Pipeline)
    assert again.scheduler.config.shift == pipe.scheduler.config.shift


def test_skip_layer_guidance_as_of_sd35(tmp_path, record_property):
    pipe = published.sd3()
    system = converted(tmp_path, pipe)
    drawn, file = noise(tmp_path)

    def theirs(**more):
        return pipe([PROMPT] * 2, num_inference_steps=10, guidance_scale=4.0, latents=drawn, output_type="pt",
                    height=PIXELS, width=PIXELS, **more).images
    wanted = theirs(skip_guidance_layers=[1], skip_layer_guidance_scale=2.8, skip_layer_guidance_start=0.01,
                    skip_layer_guidance_stop=0.3)
    made = generated(system, file, prompt=PROMPT, steps=10, guidance=4.0, guidance_kind="slg", perturb_layers=[1],
                     perturb_scale=2.8, perturb_interval=(0.01, 0.3))
    record_property("difference", difference(made, wanted))
    assert difference(made, wanted) <= PIXEL / 10 < (theirs() - wanted).abs().max()


@pytest.mark.parametrize("guided", [True, False], ids=["dev", "schnell"])
def test_flux(tmp_path, guided, record_property):
    pipe = published.flux(guided=guided)
    system = converted(tmp_path, pipe)
    drawn, file = noise(tmp_path)
    packed = pipe._pack_latents(drawn, 2, *SHAPE)
    wanted = pipe([PROMPT] * 2, num_inference_steps=5, guidance_scale=3.5, latents=packed, output_type="pt",
                  height=PIXELS, width=PIXELS, max_sequence_length=512 if guided else 256).images
    scale = {"guidance": 3.5} if guided else {}
    made = generated(system, file, prompt=PROMPT, steps=5, width=PIXELS, height=PIXELS, **scale)
    record_property("difference", difference(made, wanted))
    assert difference(made, wanted) <= PIXEL / 10
    assert system.config.codec.net.size == 128 * published.FACTOR
    goes_back(tmp_path, diffusers.FluxPipeline)


# --- chains ---------------------------------------------------------------------------------------------------------

SOLVERS = {f"{name}-{spacing}": (kind, {"timestep_spacing": spacing})
           for name, kind in (("dpm", diffusers.DPMSolverMultistepScheduler),
                              ("unipc", diffusers.UniPCMultistepScheduler))
           for spacing in ("linspace", "leading", "trailing")}


@pytest.mark.parametrize("solver", SOLVERS)
def test_pixart(tmp_path, solver, record_property):
    kind, more = SOLVERS[solver]
    pipe = published.pixart(kind, **more)
    system = converted(tmp_path, pipe)
    drawn, file = noise(tmp_path)
    wanted = pipe([PROMPT] * 2, num_inference_steps=20, guidance_scale=4.5, latents=drawn, output_type="pt",
                  height=PIXELS, width=PIXELS, use_resolution_binning=False, clean_caption=False).images
    made = generated(system, file, prompt=PROMPT, steps=20, guidance=4.5)
    record_property("difference", difference(made, wanted))
    assert difference(made, wanted) <= PIXEL / 10
    if solver == "dpm-linspace":
        goes_back(tmp_path, diffusers.PixArtAlphaPipeline)


def test_lcm(tmp_path, record_property):
    pipe = published.lcm()
    system = converted(tmp_path, pipe)
    drawn, file = noise(tmp_path)
    wanted = pipe([PROMPT] * 2, num_inference_steps=1, guidance_scale=8.0, latents=drawn, output_type="pt",
                  height=PIXELS, width=PIXELS).images
    made = generated(system, file, prompt=PROMPT, steps=1, guidance=8.0)
    record_property("difference", difference(made, wanted))
    assert difference(made, wanted) <= PIXEL / 10
    goes_back(tmp_path, diffusers.LatentConsistencyModelPipeline)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("scheduler", ["DDIMScheduler", "DPMSolverMultistepScheduler"])
def test_dit(tmp_path, scheduler, guidance, record_property):
    """The pipeline draws its own noise, which is given to us as a file."""
    pipe = published.dit(getattr(diffusers, scheduler))
    system = converted(tmp_path, pipe)
    classes = system.config.conditioner.classes
    assert (classes[0], classes[7], classes[9], len(classes)) == ("tench", "cock", "rooster", 1000)
    theirs = torch.from_numpy(pipe([9, 9], guidance_scale=guidance, num_inference_steps=10, output_type="np",
                                   generator=torch.Generator().manual_seed(5)).images).permute(0, 3, 1, 2)
    drawn = torch.randn(2, *SHAPE, generator=torch.Generator().manual_seed(5))
    save_file({"noise": drawn}, tmp_path / "noise.safetensors")
    made = generated(system, str(tmp_path / "noise.safetensors"), prompt="rooster", steps=10, guidance=guidance)
    record_property("difference", difference(made, theirs))
    assert difference(made, theirs) <= PIXEL / 10
    again = goes_back(tmp_path, diffusers.DiTPipeline)
    assert again.labels == pipe.labels


@pytest.mark.parametrize("classes", [None, 10], ids=["plain", "labels"])
def test_consistency(tmp_path, classes, record_property):
    pipe = published.consistency(classes)
    system = converted(tmp_path, pipe)
    drawn, file = noise(tmp_path, shape=(3, 16, 16))
    labels = {} if classes is None else {"class_labels": [7, 7]}
    wanted = pipe(batch_size=2, latents=drawn, output_type="pt", num_inference_steps=1, **labels).images
    made = generated(system, file, steps=1, prompt=None if classes is None else "7")
    record_property("difference", difference(made, wanted))
    assert difference(made, wanted) <= PIXEL / 10
    goes_back(tmp_path, diffusers.ConsistencyModelPipeline)


def test_folders_of_another_kind_are_refused(tmp_path):
    pipe = published.sd3(shift=3.0)
    pipe.save_pretrained(tmp_path / "theirs")
    file = tmp_path / "theirs/scheduler/scheduler_config.json"
    said = json.loads(file.read_text())
    file.write_text(json.dumps(said | {"shift_terminal": 0.1}))
    with pytest.raises(ModelError, match=r"shift_terminal is 0\.1"):
        convert(tmp_path / "theirs", tmp_path / "x")
    file.write_text(json.dumps(said))
    shutil.rmtree(tmp_path / "theirs/tokenizer_2")
    with pytest.raises(ModelError, match="lacks tokenizer_2"):
        convert(tmp_path / "theirs", tmp_path / "x")


# --- single files ---------------------------------------------------------------------------------------------------

def same_state(a, b):
    one, two = (load_file(tmp / "model.safetensors") for tmp in (a, b))
    return equal(one, two)


@pytest.mark.parametrize("t5", [True, False], ids=["t5", "no t5"])
def test_an_sd3_file(tmp_path, t5, record_property):
    """As published: CLIP-L without its projection, which is the identity; scales that carry nothing."""
    pipe = published.sd3(t5=t5)
    with torch.no_grad():
        pipe.text_encoder.text_projection = torch.nn.Linear(32, 32, bias=False)
        pipe.text_encoder.text_projection.weight.copy_(torch.eye(32))
        pipe.text_encoder.config.projection_dim = 32
    pipe.transformer = published.loud(diffusers.SD3Transformer2DModel(
        **published.SD3 | {"pooled_projection_dim": 104, **({} if t5 else {"joint_attention_dim": 4096})}), 1)
    converted(tmp_path, pipe)
    assert (tmp_path / "ours/pipeline/text_encoder_3").is_dir() == t5
    convert(tmp_path / "ours", tmp_path / "plain.safetensors", to="original")
    state = load_file(tmp_path / "plain.safetensors")
    assert torch.equal(state.pop("text_encoders.clip_l.transformer.text_projection.weight"), torch.eye(32))
    state |= {f"text_encoders.{name}.logit_scale": torch.tensor(4.6) for name in ("clip_l", "clip_g")}
    save_file(state, tmp_path / "sd3.safetensors")
    told = [f"tokenizer={tmp_path / 'theirs'}", "net.heads=3", "net.size=8"]
    report = convert(tmp_path / "sd3.safetensors", tmp_path / "direct", overrides=told)
    assert (report.layout, report.problems) == ("mmdit/original", ())
    assert same_state(tmp_path / "direct", tmp_path / "ours")
    for end in ("", "_2"):                                  # heads of 64 are what published CLIPs have
        said = tmp_path / f"direct/pipeline/text_encoder{end}/config.json"
        said.write_text(json.dumps(json.loads(said.read_text()) | {"num_attention_heads": 2}))
    system = checkpoint.load(str(tmp_path / "direct"), device="cpu")
    drawn, file = noise(tmp_path)
    usual = {"scaling_factor": 1.5305, "shift_factor": 0.0609}          # what an SD3 has, and its file does not tell
    pipe.vae.register_to_config(**usual)
    wanted = pipe([PROMPT] * 2, num_inference_steps=4, guidance_scale=5.0, latents=drawn, output_type="pt",
                  height=PIXELS, width=PIXELS).images
    made = generated(system, file, prompt=PROMPT, steps=4, guidance=5.0)
    record_property("difference", difference(made, wanted))
    assert difference(made, wanted) <= PIXEL / 10
    convert(tmp_path / "direct", tmp_path / "back.safetensors", to="original")
    assert equal(load_file(tmp_path / "back.safetensors"), state)
    convert(tmp_path / "direct", tmp_path / "folder", to="diffusers")
    left_out = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}          # diffusers has to be told
    again = diffusers.StableDiffusion3Pipeline.from_pretrained(tmp_path / "folder", **left_out)
    assert equal(again.transformer.state_dict(), pipe.transformer.state_dict())
    assert (again.text_encoder_3 is not None) == t5


def test_a_flux_file_and_the_codec_beside_it(tmp_path, record_property):
    pipe = published.flux()
    converted(tmp_path, pipe)
    (tmp_path / "there").mkdir()
    convert(tmp_path / "ours", tmp_path / "there/flux.safetensors", to="original")
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["ae.safetensors", "flux.safetensors"]
    told = ["net.axes=[4,6,6]", f"encoders={tmp_path / 'theirs'}"]
    report = convert(tmp_path / "there/flux.safetensors", tmp_path / "direct", overrides=told)
    assert report.layout == "mmdit/original" and "took the codec" in report.notes[0]
    assert same_state(tmp_path / "direct", tmp_path / "ours")
    system = checkpoint.load(str(tmp_path / "direct"), device="cpu")
    drawn, file = noise(tmp_path)
    pipe.vae.register_to_config(scaling_factor=0.3611, shift_factor=0.1159)         # FLUX's, which no file tells
    wanted = pipe([PROMPT] * 2, num_inference_steps=4, guidance_scale=3.5, latents=pipe._pack_latents(drawn, 2, *SHAPE),
                  output_type="pt", height=PIXELS, width=PIXELS, max_sequence_length=512).images
    made = generated(system, file, prompt=PROMPT, steps=4, width=PIXELS, height=PIXELS, guidance=3.5)
    record_property("difference", difference(made, wanted))
    assert difference(made, wanted) <= PIXEL / 10
    (tmp_path / "back").mkdir()
    convert(tmp_path / "direct", tmp_path / "back/flux.safetensors", to="original")
    for name in ("ae", "flux"):
        first, back = (tmp_path / folder / f"{name}.safetensors" for folder in ("there", "back"))
        assert first.read_bytes() == back.read_bytes()
    (tmp_path / "there/ae.safetensors").rename(tmp_path / "elsewhere.safetensors")
    alone = convert(tmp_path / "there/flux.safetensors", tmp_path / "alone", overrides=told[:1])
    assert alone.config["codec"] is None                    # the network alone, as before
    given = [told[0], f"codec={tmp_path / 'elsewhere.safetensors'}"]
    report = convert(tmp_path / "there/flux.safetensors", tmp_path / "given", overrides=given)
    assert same_state(tmp_path / "given", tmp_path / "ours") and "no text encoders" in report.notes[1]


def test_an_lcm_file(tmp_path):
    pipe = published.lcm()
    converted(tmp_path, pipe)
    convert(tmp_path / "ours", tmp_path / "lcm.safetensors", to="original")
    state = load_file(tmp_path / "lcm.safetensors")
    assert "model.diffusion_model.time_embed.cond_proj.weight" in state
    told = [f"tokenizer={tmp_path / 'theirs/tokenizer'}", "net.heads=2"]
    report = convert(tmp_path / "lcm.safetensors", tmp_path / "direct", overrides=told)
    assert (report.system, report.layout, report.problems) == ("lcm", "lcm/original", ())
    assert same_state(tmp_path / "direct", tmp_path / "ours")
    assert report.config["path"] == json.loads((tmp_path / "ours/config.json").read_text())["config"]["path"]
    convert(tmp_path / "direct", tmp_path / "back.safetensors", to="original")
    assert equal(load_file(tmp_path / "back.safetensors"), state)
    convert(tmp_path / "direct", tmp_path / "folder", to="diffusers")
    again = diffusers.LatentConsistencyModelPipeline.from_pretrained(tmp_path / "folder")
    assert type(again.scheduler) is diffusers.LCMScheduler and equal(again.unet.state_dict(), pipe.unet.state_dict())
