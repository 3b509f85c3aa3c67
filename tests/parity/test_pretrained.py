"""Text conditions against what diffusers' pipelines encode with the same encoders and tokenizers."""

import logging
import sys
from pathlib import Path

import pytest
import torch
from diffusers import (
    FluxPipeline,
    PixArtAlphaPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
)

from nexus.text.pretrained import PretrainedCondConfig

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))
import encoders  # noqa: E402

CPU = torch.device("cpu")
PROMPTS = ["a red ball", "Photo of THE cat, in a green house; 3 x (blue) é", "", "ball " * 200]
NEGATIVE = "blue cat"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path))
    torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.fixture(scope="module")
def parts():
    return {"l": encoders.clip(), "lp": encoders.clip(40, projected=True, seed=2),
            "g": encoders.clip(48, projected=True, pad="!", seed=1), "t5": encoders.t5()}


def ours(tmp_path, recipe, parts, prompts, **fields):
    """The conditions of each prompt on its own."""
    folder = encoders.save(tmp_path / "encoders", *parts)
    made = PretrainedCondConfig(recipe=recipe, encoders=(str(folder),), weighting=False, **fields).build()
    return [made.prompts([p], CPU)[0] for p in prompts]


def theirs(kind, names, parts, **more):
    """A pipeline of text parts alone."""
    text = {}
    for name, (model, tokenizer) in zip(names, parts, strict=True):
        text |= {f"text_encoder{name}": model, f"tokenizer{name}": tokenizer}
    return kind(vae=None, scheduler=None, **text, **more)


def near(a, b):
    assert a.shape == b.shape and (a - b).abs().max() <= 1e-5


def fits(prompts):
    return prompts[:3]                  # diffusers cuts what we encode in more windows


@torch.no_grad()
def test_sd(tmp_path, parts):
    pipe = theirs(StableDiffusionPipeline, [""], [parts["l"]], unet=None, safety_checker=None, feature_extractor=None,
                  requires_safety_checker=False)
    mine = ours(tmp_path, "sd", [parts["l"]], [*fits(PROMPTS), NEGATIVE, PROMPTS[3]])
    for prompt, cond in zip(fits(PROMPTS), mine, strict=False):
        words, other = pipe.encode_prompt(prompt, "cpu", 1, True, negative_prompt=NEGATIVE)
        near(cond["context"], words)
        near(mine[3]["context"], other)
    near(mine[4]["context"][:, :77], pipe.encode_prompt(PROMPTS[3], "cpu", 1, False)[0])      # its first window


@torch.no_grad()
def test_sd2_is_a_last_layer_of_an_encoder_saved_without_its_own(tmp_path, parts):
    """SD 2's folders hold all but the last layer; here the whole encoder's penultimate layer is that."""
    whole, tokenizer = encoders.clip(layers=3, pad="!")
    short, _ = encoders.clip(layers=2, pad="!")
    short.load_state_dict({k: v for k, v in whole.state_dict().items() if "layers.2." not in k})
    pipe = theirs(StableDiffusionPipeline, [""], [(short, tokenizer)], unet=None, safety_checker=None,
                  feature_extractor=None, requires_safety_checker=False)
    mine = ours(tmp_path, "sd2", [(whole, tokenizer)], fits(PROMPTS))
    for prompt, cond in zip(fits(PROMPTS), mine, strict=True):
        near(cond["context"], pipe.encode_prompt(prompt, "cpu", 1, False)[0])


@torch.no_grad()
@pytest.mark.parametrize("zeros", [True, False])
def test_sdxl(tmp_path, parts, zeros):
    both = [parts["l"], parts["g"]]
    pipe = theirs(StableDiffusionXLPipeline, ["", "_2"], both, unet=None, force_zeros_for_empty_prompt=zeros,
                  add_watermarker=False)
    null = "zeros" if zeros else "empty"
    mine = ours(tmp_path, "sdxl", both, [*fits(PROMPTS), NEGATIVE, None], null=null)
    for prompt, cond in zip(fits(PROMPTS), mine, strict=False):
        words, _, pooled, _ = pipe.encode_prompt(prompt, device="cpu")
        near(cond["context"], words)
        near(cond["pooled"], pooled)
    for negative, cond in ((NEGATIVE, mine[3]), (None, mine[4])):
        _, words, _, pooled = pipe.encode_prompt("a", device="cpu", negative_prompt=negative)
        near(cond["context"], words)
        near(cond["pooled"], pooled)


@torch.no_grad()
@pytest.mark.parametrize("length", [77, 256])
def test_sd3(tmp_path, parts, length):
    three = [parts["lp"], parts["g"], parts["t5"]]
    pipe = theirs(StableDiffusion3Pipeline, ["", "_2", "_3"], three, transformer=None)
    mine = ours(tmp_path, "sd3", three, PROMPTS, length=length)
    for prompt, cond in zip(PROMPTS, mine, strict=True):
        words, other, pooled, other_pooled = pipe.encode_prompt(prompt, None, None, device="cpu",
                                                                max_sequence_length=length)
        near(cond["context"], words)
        near(cond["pooled"], pooled)
        near(mine[2]["context"], other)
        near(mine[2]["pooled"], other_pooled)


@torch.no_grad()
@pytest.mark.parametrize("length", [256, 512])
def test_flux(tmp_path, parts, length):
    both = [parts["l"], parts["t5"]]
    pipe = theirs(FluxPipeline, ["", "_2"], both, transformer=None)
    mine = ours(tmp_path, "flux", both, PROMPTS, length=length)
    for prompt, cond in zip(PROMPTS, mine, strict=True):
        words, pooled, _ = pipe.encode_prompt(prompt, None, device="cpu", max_sequence_length=length)
        near(cond["context"], words)
        near(cond["pooled"], pooled)


@torch.no_grad()
def test_pixart(tmp_path, parts):
    pipe = theirs(PixArtAlphaPipeline, [""], [parts["t5"]], transformer=None)
    mine = ours(tmp_path, "pixart", [parts["t5"]], PROMPTS)
    for prompt, cond in zip(PROMPTS, mine, strict=True):
        words, mask, other, other_mask = pipe.encode_prompt(prompt, device="cpu")
        near(cond["context"], words)
        near(mine[2]["context"], other)
        assert torch.equal(cond["context_mask"], mask.bool())
        assert torch.equal(mine[2]["context_mask"], other_mask.bool())
