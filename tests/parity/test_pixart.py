"""PixArt-alpha against the paper's code (saved numbers), diffusers (tiny, random) and its whole pipeline."""

import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus import checkpoint
from nexus.convert.convert import convert
from nexus.convert.keymap import to_foreign, to_native
from nexus.convert.layouts.pixart import LAYOUTS
from nexus.models.diffusion.pixart_alpha import PixArtConfig, PixArtNetConfig
from nexus.requests import SampleRequest
from tests.parity.whole import Given, assert_close, assert_round_trip, loaded, louder, ours_of, shapes, tiny_codec

ORIGINAL, DIFFUSERS = LAYOUTS
CASE = Path(os.environ.get("NEXUS_PARITY", Path(__file__).parents[3] / "shared" / "parity")) / "pixart-original-a"
needs_case = pytest.mark.skipif(not CASE.is_dir(), reason=f"no parity case at {CASE}; set NEXUS_PARITY")
TINY = {"num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2, "cross_attention_dim": 24,
        "caption_channels": 16}


@pytest.fixture(scope="module")
def case():
    state = torch.load(CASE / "checkpoint.pt", weights_only=True)["state_dict"]
    net, config = loaded(LAYOUTS, ORIGINAL, state, PixArtNetConfig, heads=4)
    saved = load_file(CASE / "tensors.safetensors")
    saved["cond"] = {"context": saved["y"][:, 0], "context_mask": saved["mask"].bool()}
    return net, config, state, saved


@needs_case
def test_original_output_and_round_trip(case):
    net, config, state, saved = case
    assert sum(p.numel() for p in net.parameters()) == 236_408
    with torch.no_grad():
        out = net(saved["x"], saved["t"], saved["cond"])
        assert_close(out, saved["output"])
        assert_close(out.chunk(2, 1)[0], saved["output_dpmsolver"])
        assert_close(net(saved["x"], saved["t"], {"context": saved["y"][:, 0]}), saved["output_no_mask"])
    assert torch.equal(net.null, saved["y_null"])
    assert_round_trip(ORIGINAL, net, config, state)


@needs_case
def test_original_guidance_by_the_stored_null(case):
    """The paper's `forward_with_cfg`: the null under the prompt's mask; three channels are guided, the rest is not."""
    net, _, _, saved = case
    x, t = saved["x"][:1], torch.tensor([500.0])
    with torch.no_grad():
        with_caption = net(x, t, {name: value[:1] for name, value in saved["cond"].items()})
        without = net(x, t, {"context_mask": saved["cond"]["context_mask"][:1]})
    eps = without[:, :3] + 4.5 * (with_caption[:, :3] - without[:, :3])
    assert_close(torch.cat([torch.cat([eps, rest[:, 3:]], 1) for rest in (with_caption, without)]), saved["output_cfg"])


@needs_case
def test_what_an_original_file_does_not_tell(case):
    _, _, state, _ = case
    assert ORIGINAL.config(shapes(state), None)["net"]["heads"] is None
    assert ORIGINAL.unsaid(shapes(state), None) == ("net.heads", "net.pos_scale")
    del state["pos_embed"]                                          # as the paper's scripts do
    assert "net.size" in ORIGINAL.unsaid(shapes(state), None)


@needs_case
def test_an_original_file_becomes_a_folder_that_diffusers_loads(case, tmp_path):
    diffusers = pytest.importorskip("diffusers")
    net, _, state, saved = case
    convert(CASE / "checkpoint.pt", tmp_path / "native", overrides=["net.heads=4"])
    convert(tmp_path / "native", tmp_path / "foreign", to="diffusers")
    convert(tmp_path / "native", tmp_path / "again.pt", to="original")
    again = torch.load(tmp_path / "again.pt", weights_only=True)
    full = torch.load(CASE / "checkpoint.pt", weights_only=True)["state_dict"]
    assert again.keys() == full.keys() and all(torch.equal(again[key], full[key]) for key in full)
    theirs = diffusers.PixArtTransformer2DModel.from_pretrained(tmp_path / "foreign").eval()
    with torch.no_grad():
        out = theirs(saved["x"], encoder_hidden_states=saved["y"][:, 0], timestep=saved["t"],
                     encoder_attention_mask=saved["mask"]).sample
    assert_close(out, saved["output"])
    convert(tmp_path / "foreign", tmp_path / "back")
    back = checkpoint.read_tensors(tmp_path / "back" / "model.safetensors")
    assert all(torch.equal(back[f"net.{name}"], tensor) for name, tensor in net.state_dict().items())


@pytest.mark.parametrize(("kind", "rows", "cols"), [
    ({"sample_size": 8}, 8, 8), ({"sample_size": 8}, 6, 12), ({"sample_size": 8, "interpolation_scale": 0.5}, 8, 8),
    ({"sample_size": 8, "interpolation_scale": 2.0}, 8, 4), ({"sample_size": 8, "out_channels": 4}, 8, 8),
    ({"sample_size": 128, "patch_size": 8}, 128, 128), ({"sample_size": 128, "patch_size": 8}, 96, 160),
], ids=["256", "other sides", "scale 0.5", "scale 2", "no variance", "1024-MS", "1024-MS, other sides"])
def test_diffusers_output_and_round_trip(kind, rows, cols):
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    reference = diffusers.PixArtTransformer2DModel(**TINY | kind).eval()
    state = reference.state_dict()
    net, config = loaded(LAYOUTS, DIFFUSERS, state, PixArtNetConfig, dict(reference.config))
    x, t, context = torch.randn(2, 4, rows, cols), torch.tensor([37, 999]), torch.randn(2, 5, 16)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]])
    cond, added = {"context": context, "context_mask": mask.bool()}, None
    if net.config.sized:
        cond |= {"size": torch.tensor([[512.0, 768.0], [1024.0, 640.0]]), "aspect": torch.tensor([[0.667], [1.6]])}
        added = {"resolution": cond["size"], "aspect_ratio": cond["aspect"]}
    assert net.config.sized == (kind["sample_size"] == 128)
    with torch.no_grad():
        assert_close(net(x, t.float(), cond), reference(x, encoder_hidden_states=context, timestep=t,
                                                        encoder_attention_mask=mask, added_cond_kwargs=added).sample)
    assert_round_trip(DIFFUSERS, net, config, state)
    again = diffusers.PixArtTransformer2DModel.from_config(DIFFUSERS.foreign_config(config))
    assert shapes(again.state_dict()) == shapes(state)
    for name in ("interpolation_scale", "use_additional_conditions"):
        assert again.config[name] == (reference.config[name] if reference.config[name] is not None else
                                      {"interpolation_scale": net.config.pos_scale}.get(name, net.config.sized))


@pytest.mark.parametrize("preset", ["xl-256", "xl-512", "xl-1024-ms"])
def test_the_published_sizes_map_both_ways_on_meta(preset):
    with torch.device("meta"):
        net = PixArtNetConfig.preset(preset).build()
    config = {"net": net.config.to_json()}
    for layout in LAYOUTS:
        foreign = to_foreign(layout.table(config), net.state_dict())
        said = layout.foreign_config and layout.foreign_config(config)
        found = layout.config(shapes(foreign | layout.constants(config)), said)
        assert PixArtConfig.parse(found).net == net.config
        assert shapes(to_native(layout.table(config), foreign)) == shapes(net.state_dict())


def encoded(t5, words):
    """A caption of so many words through a T5, as the pipeline encodes it: 7 places, the end is id 1, padding id 0."""
    ids = torch.cat([torch.randint(2, 50, (1, words)), torch.tensor([[1]]), torch.zeros(1, 6 - words).long()], 1)
    mask = torch.arange(7)[None] <= words
    with torch.no_grad():
        return {"context": t5(ids, attention_mask=mask.long())[0], "context_mask": mask}


def tiny_pipeline(diffusers, kind, spacing):
    transformers = pytest.importorskip("transformers")
    t5 = transformers.T5EncoderModel(transformers.T5Config(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=2,
                                                           num_heads=2)).eval()
    transformer = louder(diffusers.PixArtTransformer2DModel(**TINY | kind))
    scheduler = diffusers.DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear",
                                                      timestep_spacing=spacing)
    pipe = diffusers.PixArtAlphaPipeline(None, t5, tiny_codec(diffusers), transformer, scheduler)
    pipe.set_progress_bar_config(disable=True)
    return pipe


PLAIN = ({"sample_size": 8}, 8, 8)
MS = ({"sample_size": 128, "patch_size": 16}, 64, 96)


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize(("kind", "rows", "cols", "guidance", "null"), [
    (*PLAIN, 4.5, "empty"), (*PLAIN, 1.0, "empty"), (*PLAIN, 4.5, "stored"), (*MS, 4.5, "empty")],
    ids=["512", "without guidance", "stored null", "1024-MS"])
def test_the_whole_pipeline(kind, rows, cols, guidance, null, spacing, tmp_path):
    """20 steps of DPM-Solver++ at diffusers' times."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(3)
    pipe = tiny_pipeline(diffusers, kind, spacing)
    caption, empty = encoded(pipe.text_encoder, 4), encoded(pipe.text_encoder, 0)
    stored, noise, factor = torch.randn(7, 16), torch.randn(2, 4, rows, cols), pipe.vae_scale_factor
    other = {"context": stored[None], "context_mask": torch.ones(1, 7).bool()} if null == "stored" else empty
    size = {"height": rows * factor, "width": cols * factor}
    theirs = pipe(prompt=None, negative_prompt=None, prompt_embeds=caption["context"].repeat(2, 1, 1),
                  prompt_attention_mask=caption["context_mask"].long().repeat(2, 1),
                  negative_prompt_embeds=other["context"].repeat(2, 1, 1),
                  negative_prompt_attention_mask=other["context_mask"].long().repeat(2, 1), latents=noise.clone(),
                  num_inference_steps=20, guidance_scale=guidance, use_resolution_binning=False, output_type="pt",
                  **size).images
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    system = ours_of(pipe, PixArtConfig, DIFFUSERS,
                     pipe.transformer.state_dict() | {"caption_projection.y_embedding": stored}, net={"pixels": factor},
                     path={"kind": "discrete", "spacing": spacing, "open_end": True})
    if null == "stored":                                            # what conditioner.null = "zeros" gives
        empty = {name: torch.zeros_like(value) for name, value in empty.items()}
    system.conditioner = Given(caption, empty)
    request = SampleRequest(prompt="given", initial_noise=str(tmp_path / "noise.safetensors"), guidance=guidance,
                            **size)
    ours = (system.generate(request, seeds=[0, 1]).data + 1) / 2
    assert ours.shape == theirs.shape and (ours - theirs).abs().max() <= 1e-4
    assert theirs.std() > 0.05
