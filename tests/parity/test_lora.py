"""LoRA against PEFT in diffusers' networks: files of each read by the other, and the same outputs."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="the package peft is not installed (extra dev)")

from diffusers import DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel  # noqa: E402
from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers  # noqa: E402
from peft import LoraConfig, get_peft_model, inject_adapter_in_model  # noqa: E402
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from nexus import catalog  # noqa: E402
from nexus.convert import lora as loras  # noqa: E402
from nexus.convert import lora_files  # noqa: E402
from nexus.convert.keymap import to_native  # noqa: E402
from nexus.convert.layouts import every_layout  # noqa: E402
from nexus.errors import ModelError  # noqa: E402
from nexus.nn.lora import LoRAConfig, branches  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import pipelines  # noqa: E402

NEAR = 1e-5


@pytest.fixture(autouse=True)
def quiet():
    torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


def flux():
    return FluxTransformer2DModel(patch_size=1, in_channels=16, num_layers=1, num_single_layers=2,
                                  attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16,
                                  pooled_projection_dim=16, axes_dims_rope=(4, 6, 6), guidance_embeds=False)


def sd3():
    return SD3Transformer2DModel(sample_size=8, patch_size=2, in_channels=4, num_layers=2, attention_head_dim=64,
                                 num_attention_heads=1, joint_attention_dim=16, caption_projection_dim=64,
                                 pooled_projection_dim=16, out_channels=4, pos_embed_max_size=8)


def dit():
    return DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8,
                                 num_layers=2, sample_size=8, num_embeds_ada_norm=5)


def sdxl():
    return pipelines.unet(96, xl_pooled=72)


# A network of diffusers, our layout's system and its facts, and layers of every kind that a LoRA may be of.
CASES = {
    "sd": (lambda: pipelines.unet(64), "lcm", {"to_q", "to_v", "to_out.0", "conv1", "proj_in", "time_emb_proj",
                                               "ff.net.0.proj", "conv_in", "conv_shortcut"}),
    "sdxl": (sdxl, "lcm", {"to_q", "to_k", "to_v", "proj_out", "ff.net.2", "conv2", "add_embedding.linear_1"}),
    "dit": (dit, "dit", {"to_q", "to_k", "to_out.0", "norm1.linear", "proj_out_1", "pos_embed.proj"}),
    "sd3": (sd3, "mmdit", {"to_k", "add_q_proj", "to_add_out", "norm_out.linear", "norm1_context.linear", "proj_out"}),
    "flux": (flux, "mmdit", {"to_q", "to_v", "proj_mlp", "proj_out", "norm_out.linear", "x_embedder"}),
}


class System(torch.nn.Module):
    """Just what LoRA needs of a system."""

    conditioner = None

    def __init__(self, config, net):
        super().__init__()
        self.config, self.net = config, net

    def phases(self):
        from nexus.phase import Phase
        return (Phase("denoise", self.net, None),)


def pair(kind):
    """diffusers' network and our system with its weights."""
    make, name, _ = CASES[kind]
    theirs = pipelines.randomise(make(), 1)
    if kind == "dit":                                   # every block repeats the embedders
        for block in theirs.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(theirs.transformer_blocks[0].norm1.emb.state_dict())
    layout = next(one for one in every_layout() if one.system == name and one.name == "diffusers")
    state = theirs.state_dict()
    said = dict(theirs.config)
    data = layout.config({k: tuple(t.shape) for k, t in state.items()}, said)
    config = catalog.config_class(name).parse(data | {"teacher": None} if name == "lcm" else data)
    net = config.net.build().eval()
    state = {k: t for k, t in state.items() if not any(k == c for c in layout.constants(config.to_json()))}
    net.load_state_dict(to_native(layout.table(config.to_json()), state))
    return theirs, System(config, net)


def outputs(kind, theirs, ours):
    g = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, generator=g)      # noqa: E731
    x, t = draw(2, 4, 8, 8), torch.tensor([300.0, 700.0])
    with torch.no_grad():
        if kind == "sd":
            words = draw(2, 5, 64)
            return theirs(x, t, words).sample, ours(x, t, {"context": words})
        if kind == "sdxl":
            words, pooled, micro = draw(2, 5, 96), draw(2, 72), torch.tensor([[16, 16, 0, 0, 16, 16.0]] * 2)
            more = {"text_embeds": pooled, "time_ids": micro}
            return (theirs(x, t, words, added_cond_kwargs=more).sample,
                    ours(x, t, {"context": words, "pooled": pooled, "micro": micro}))
        if kind == "dit":
            label = torch.tensor([1, 4])
            return theirs(x, timestep=t.long(), class_labels=label).sample, ours(x, t, {"label": label})
        words, pooled = draw(2, 5, 16), draw(2, 16)
        cond = {"context": words, "pooled": pooled}
        if kind == "sd3":
            return theirs(x, words, pooled, t).sample, ours(x, t, cond)
        return _flux_output(theirs, x, t, words, pooled), ours(x, t, cond)


def _flux_output(theirs, x, t, words, pooled):
    packed = x.unflatten(2, (4, 2)).unflatten(4, (4, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    ids = torch.zeros(4, 4, 3)
    ids[..., 1] += torch.arange(4)[:, None]
    ids[..., 2] += torch.arange(4)[None]
    out = theirs(packed, words, pooled, t / 1000, ids.flatten(0, 1), torch.zeros(words.shape[1], 3)).sample
    return out.unflatten(1, (4, 4)).unflatten(3, (4, 2, 2)).permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)


def dressed(theirs, kind, rank=3, alpha=6):
    """Random updates in diffusers' network; their state dict."""
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(CASES[kind][2]))
    if kind == "dit":                                   # which diffusers itself loads no LoRA into
        inject_adapter_in_model(settings, theirs)
        theirs.peft_config = {"default": settings}
    else:
        theirs.add_adapter(settings)
    g = torch.Generator().manual_seed(2)
    for name, p in theirs.named_parameters():
        if "lora_" in name:
            p.data = 0.2 * torch.randn(p.shape, generator=g)
    return get_peft_model_state_dict(theirs)


def gap(pair_of_outputs):
    theirs, ours = pair_of_outputs
    return float((theirs - ours).abs().max() / max(1.0, float(theirs.abs().max())))


@pytest.mark.parametrize("kind", CASES)
def test_files_of_diffusers_are_read(kind, tmp_path):
    theirs, system = pair(kind)
    plain = outputs(kind, theirs, system.net)
    state = dressed(theirs, kind)
    if kind == "dit":
        (tmp_path / "theirs").mkdir()
        theirs.peft_config["default"].save_pretrained(tmp_path / "theirs")
        save_file(state, tmp_path / "theirs/adapter_model.safetensors")
    else:
        theirs.save_lora_adapter(tmp_path / "theirs", adapter_name="default")
    assert len(state) > 8
    before = {n: t.clone() for n, t in system.net.state_dict().items()}
    merged = loras.merge_files(system, [str(tmp_path / "theirs")])
    changed = outputs(kind, theirs, system.net)
    bound = 5 * NEAR if kind == "dit" else NEAR         # whose sinusoid diffusers computes a little otherwise
    assert (changed[0] - plain[0]).abs().max() > 0.01
    assert gap(changed) <= max(bound, 1.5 * gap(plain)), (gap(plain), gap(changed))
    merged.undo()
    assert all(torch.equal(t, before[n]) for n, t in system.net.state_dict().items())


def test_patterns_of_alpha_are_peft_expressions():
    from peft.utils.other import get_pattern_key
    patterns = {"^blocks.0.attn.to_v": 3, r"blocks\.[1-3]\.ff": 5, "to_q": 7, "attn.to_out.0": 11, "^to_k": 13}
    names = [f"{start}blocks.{i}.{end}" for start in ("", "transformer_") for i in range(4)
             for end in ("attn.to_v", "attn.to_q", "attn.to_k", "attn.to_out.0", "ff")]
    said = {"lora_alpha": 2, "alpha_pattern": patterns}
    ours = [lora_files._scale(said, "", name, 4, None) for name in names]
    assert ours == [patterns.get(get_pattern_key(patterns, name), 2) / 4 for name in names] and len(set(ours)) == 5
    with pytest.raises(ModelError, match="no expression"):
        lora_files._scale({"alpha_pattern": {"(": 1}}, "", "to_q", 4, None)


@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("targets", ["attn", "all"])
def test_files_written_here_are_read_by_diffusers(kind, targets, tmp_path):
    theirs, system = pair(kind)
    start = gap(outputs(kind, theirs, system.net))
    name = catalog.name_of(system.config)
    loras.adapt(system, name, LoRAConfig(rank=3, alpha=6, targets=targets))
    g = torch.Generator().manual_seed(2)
    for branch in branches(system.net).values():
        branch.up.data = 0.2 * torch.randn(branch.up.shape, generator=g)
    tensors = {n: t for n, t in system.state_dict().items() if ".lora." in n}
    (tmp_path / "a").mkdir()
    (tmp_path / "a/adapter.safetensors").write_bytes(system.adapter.file(tensors))
    if kind == "dit":
        inject_adapter_in_model(LoraConfig(**lora_files.adapter_settings(system.adapter.updates(tensors))), theirs)
        stored = load_file(tmp_path / "a/adapter.safetensors")
        set_peft_model_state_dict(theirs, {k.removeprefix("transformer."): t for k, t in stored.items()})
    else:
        theirs.load_lora_adapter(tmp_path / "a", weight_name="adapter.safetensors", prefix=system.adapter.prefix,
                                 use_safetensors=True)
    loaded = [n for n, _ in theirs.named_parameters() if "lora_" in n]
    assert len(loaded) == 2 * len(system.adapter.slots)
    assert gap(outputs(kind, theirs, system.net)) <= max(NEAR, 1.5 * start)


def kohya(state, alpha):
    out = {}
    for key, tensor in state.items():
        name = "lora_unet_" + key.split(".lora_")[0].replace(".", "_")
        out[f"{name}.lora_{'down' if '.lora_A.' in key else 'up'}.weight"] = tensor
        out[f"{name}.alpha"] = torch.tensor(float(alpha))
    return out


def old_diffusers(state, scale):
    """The layout of 2023: processors for attentions, .lora. elsewhere, no alpha."""
    out = {}
    for key, tensor in state.items():
        name, side = key.split(".lora_")[0], "down" if ".lora_A." in key else "up"
        for proj in ("to_q", "to_k", "to_v", "to_out.0"):
            if name.endswith("." + proj):
                name = f"{name.removesuffix('.' + proj)}.processor.{proj.removesuffix('.0')}_lora"
                break
        else:
            name += ".lora"
        out[f"unet.{name}.{side}.weight"] = tensor if side == "down" else scale * tensor
    return out


@pytest.mark.parametrize("form", ["kohya", "old", "peft", "comfy", "adapter name", "no prefix"])
def test_every_public_layout_is_the_same_update(form, tmp_path):
    theirs, system = pair("sd")
    state = dressed(theirs, "sd")
    twice = {k: 2 * t if ".lora_B." in k else t for k, t in state.items()}      # alpha 6 / rank 3, said by nobody
    path = tmp_path / "x.safetensors"
    if form == "peft":
        path = tmp_path / "peft"
        fresh = get_peft_model(pipelines.randomise(pipelines.unet(64), 1), theirs.peft_config["default"])
        own = fresh.state_dict()
        fresh.load_state_dict(own | {k: t for k, t in theirs.state_dict().items() if "lora_" in k} | {
            f"base_model.model.{k}": t for k, t in theirs.state_dict().items()}, strict=False)
        fresh.save_pretrained(path)
    else:
        save_file({"kohya": lambda: kohya(state, 6), "old": lambda: old_diffusers(state, 2.0),
                   "comfy": lambda: {f"diffusion_model.{k}": t.contiguous() for k, t in twice.items()},
                   "adapter name": lambda: {"unet." + k.replace(".weight", ".default.weight"): t
                                            for k, t in twice.items()},
                   "no prefix": lambda: twice}[form](), path)
    loras.merge_files(system, [str(path)])
    assert gap(outputs("sd", theirs, system.net)) <= NEAR


def test_openai_names_are_the_same_layers(tmp_path):
    """kohya's SDXL files name the layers as the published single file does."""
    theirs, system = pair("sdxl")
    state = dressed(theirs, "sdxl")
    config = system.config.to_json()
    diffusers, openai = (next(one for one in every_layout() if one.system == "lcm" and one.name == name).table(config)
                         for name in ("diffusers", "openai"))
    slots = {s.foreign: s for s in loras._slots(system.net, openai)}
    by_place = {(s.native, s.rows): s.foreign for s in slots.values()}
    names = {s.foreign: by_place[s.native, s.rows] for s in loras._slots(system.net, diffusers)}
    renamed = {f"{names[k.split('.lora_')[0]]}.lora_{k.split('.lora_')[1]}": t for k, t in state.items()}
    assert any(k.startswith("input_blocks") for k in renamed) and any(k.startswith("label_emb") for k in renamed)
    save_file(kohya(renamed, 6), tmp_path / "x.safetensors")
    loras.merge_files(system, [str(tmp_path / "x.safetensors")])
    assert gap(outputs("sdxl", theirs, system.net)) <= NEAR


def test_kohya_files_written_here_are_what_diffusers_reads(tmp_path):
    _, system = pair("sd")
    loras.adapt(system, "lcm", LoRAConfig(rank=3, alpha=6))
    tensors = {n: t + 0.1 for n, t in system.state_dict().items() if ".lora." in n}
    updates = system.adapter.updates(tensors)
    (tmp_path / "k.safetensors").write_bytes(lora_files.file_of(updates, "kohya"))
    read, alphas = _convert_non_diffusers_lora_to_diffusers(load_file(tmp_path / "k.safetensors"))
    assert len(read) == 2 * len(updates) and set(alphas.values()) == {6.0}
    back = {u.name: u for u in lora_files.read_updates(tmp_path / "k.safetensors")}
    assert back.keys() == {u.name.replace(".", "_") for u in updates}
    for one in updates:
        twin = back[one.name.replace(".", "_")]
        assert torch.equal(twin.down, one.down) and torch.equal(twin.up, one.up) and twin.scale == one.scale == 2.0


@pytest.mark.parametrize("form", lora_files.FORMS)
def test_written_files_come_back(form, tmp_path):
    _, system = pair("flux")
    loras.adapt(system, "mmdit", LoRAConfig(rank=2, alpha=1, targets="all"))
    tensors = {n: torch.randn(t.shape) for n, t in system.state_dict().items() if ".lora." in n}
    updates = system.adapter.updates(tensors)
    folder = tmp_path / "a"
    folder.mkdir()
    (folder / "adapter_model.safetensors").write_bytes(lora_files.file_of(updates, form, prefix="transformer"))
    if form == "peft":
        (folder / "adapter_config.json").write_text(json.dumps(lora_files.adapter_settings(updates)))
    system.adapter = None
    before = {n: t.clone() for n, t in system.net.state_dict().items()}
    from nexus.nn.lora import bake, detach
    with torch.no_grad():
        for name, t in system.named_parameters():
            if ".lora." in name:
                t.copy_(tensors[name])
    twin = pair("flux")[1]
    loras.merge_files(twin, [str(folder)])
    bake(system.net)
    assert all((t - twin.net.state_dict()[n]).abs().max() <= 1e-6 for n, t in system.net.state_dict().items())
    assert before.keys() >= twin.net.state_dict().keys()
    detach(system.net)


def test_several_files_add_up_with_their_weights(tmp_path):
    theirs, system = pair("sd")
    state = dressed(theirs, "sd")
    save_file(kohya(state, 6), tmp_path / "a.safetensors")
    save_file({k: -t if k.endswith("up.weight") else t for k, t in kohya(state, 3).items()}, tmp_path / "b.safetensors")
    before = {n: t.clone() for n, t in system.net.state_dict().items()}
    a, b = (str(tmp_path / f"{n}.safetensors") for n in "ab")
    loras.merge_files(system, [f"{a}:0.75", f"{b}:-0.5"])            # 0.75 * 2 + 0.5 * 1 = 1 x 2
    assert gap(outputs("sd", theirs, system.net)) <= NEAR
    system.net.load_state_dict(before)
    loras.merge_files(system, [f"{a}:0.5", f"{b}:1"])
    assert all((t - before[n]).abs().max() <= 1e-6 for n, t in system.net.state_dict().items())


@pytest.mark.parametrize("change, said", [
    (lambda s: {k.replace("down_blocks_0", "down_blocks_7"): t for k, t in s.items()}, "down_blocks_7.*nearest.*down"),
    (lambda s: {k: t[:, :-1] if "conv1.lora_down" in k else t for k, t in s.items()}, "conv1"),
    (lambda s: {k: t for k, t in s.items() if "conv_in.lora_up" not in k}, "conv_in.*not the up"),
    (lambda s: s | {"lora_unet_conv_in.dora_scale": torch.ones(3)}, "dora_scale is not of a plain LoRA"),
    (lambda s: {k: t[:2] if "conv_in.lora_down" in k else t for k, t in s.items()}, "do not multiply"),
    (lambda s: {"lora_te_text_model_encoder_layers_0_mlp_fc1" + k.removeprefix("lora_unet_conv_in"): t
                for k, t in s.items() if "_conv_in." in k}, "of a text encoder, and it has none"),
    (lambda s: s | {"lora_unet_conv_in.alpha": torch.tensor(float("nan"))}, "alpha of conv_in"),
], ids=["other blocks", "other width", "half", "dora", "ranks", "text", "nan"])
def test_a_lora_for_another_model_is_refused_in_one_line(change, said, tmp_path):
    theirs, system = pair("sd")
    save_file({k: t.contiguous() for k, t in change({**kohya(dressed(theirs, "sd"), 6)}).items()},
              tmp_path / "x.safetensors")
    before = {n: t.clone() for n, t in system.net.state_dict().items()}
    with pytest.raises(ModelError, match=said) as caught:
        loras.merge_files(system, [str(tmp_path / "x.safetensors")])
    assert "\n" not in str(caught.value)
    assert all(torch.equal(t, before[n]) for n, t in system.net.state_dict().items())
