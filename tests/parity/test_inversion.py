"""Words and updates of text encoders in whole pipelines: the tensors and pictures that diffusers makes of them."""

import logging
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="the package peft is not installed (extra dev)")

from peft import LoraConfig  # noqa: E402
from peft.utils import get_peft_model_state_dict  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from nexus import api, checkpoint  # noqa: E402
from nexus.convert.convert import convert  # noqa: E402
from nexus.convert.lora import merge_files  # noqa: E402
from nexus.convert.words import teach  # noqa: E402
from nexus.errors import InputError, ModelError  # noqa: E402
from nexus.requests import SampleRequest  # noqa: E402

sys.path.insert(0, str(Path(__file__).parent))
import pipelines  # noqa: E402

CPU = torch.device("cpu")
PROMPT = "a photo of the <cat>, red ball"


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)
    logging.getLogger("diffusers").setLevel(logging.ERROR)


@pytest.fixture(scope="module", params=["sd", "sdxl"])
def both(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    pipe = getattr(pipelines, request.param)()
    pipe.set_progress_bar_config(disable=True)
    pipe.save_pretrained(folder / "theirs")
    convert(folder / "theirs", folder / "ours")
    return pipe, folder / "ours"


def encoded(system, prompt):
    return system.conditioner.prompts([prompt], CPU)[0]


def reference(pipe, prompt):
    if hasattr(pipe, "text_encoder_2"):
        words, _, pooled, _ = pipe.encode_prompt(prompt, device=CPU, do_classifier_free_guidance=False)
        return {"context": words, "pooled": pooled}
    return {"context": pipe.encode_prompt(prompt, CPU, 1, False)[0]}


def vectors(pipe, n):
    g = torch.Generator().manual_seed(4)
    encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else [])]
    return [torch.randn(n, e.config.hidden_size, generator=g) for e in encoders]


def loaded_theirs(pipe, rows):
    pairs = [(pipe.tokenizer, pipe.text_encoder), (getattr(pipe, "tokenizer_2", None),
                                                   getattr(pipe, "text_encoder_2", None))]
    for tensor, (tokenizer, encoder) in zip(rows, pairs, strict=False):
        pipe.load_textual_inversion(tensor, token="<cat>", tokenizer=tokenizer, text_encoder=encoder)


def test_a_word_is_the_one_of_diffusers(both, tmp_path):
    pipe, model = both
    system = checkpoint.load(str(model), device="cpu")
    rows = vectors(pipe, 3)
    keys = ["clip_l", "clip_g"] if len(rows) > 1 else ["emb_params"]
    save_file(dict(zip(keys, rows, strict=True)), tmp_path / "x.safetensors")
    plain = encoded(system, PROMPT)
    before = teach(system, [f"{tmp_path / 'x.safetensors'}:<cat>"])
    taught = encoded(system, PROMPT)
    loaded_theirs(pipe, rows)
    wanted = reference(pipe, PROMPT)
    pipe.unload_textual_inversion("<cat>", tokenizer=pipe.tokenizer, text_encoder=pipe.text_encoder)
    if len(rows) > 1:
        pipe.unload_textual_inversion("<cat>", tokenizer=pipe.tokenizer_2, text_encoder=pipe.text_encoder_2)
    for name, value in wanted.items():
        assert (taught[name] - value).abs().max() <= 1e-5, name
    assert (taught["context"] - plain["context"]).abs().max() > 0.1
    system.conditioner.dress(before)
    assert all(torch.equal(encoded(system, PROMPT)[n], t) for n, t in plain.items())
    assert all(torch.equal(t, encoded(system, "blue house")[n]) for n, t in encoded(system, "blue house").items())


def test_every_layout_of_a_word_is_the_same(both, tmp_path):
    pipe, model = both
    rows = vectors(pipe, 2)
    if len(rows) > 1:
        pytest.skip("only CLIP-L's files have more than one layout")
    system = checkpoint.load(str(model), device="cpu")
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": rows[0]}, "name": "cat", "step": 5},
               tmp_path / "zebra.pt")
    torch.save({"<zebra>": rows[0]}, tmp_path / "learned_embeds.bin")
    save_file({"emb_params": rows[0]}, tmp_path / "zebra.safetensors")
    made = []
    for file, word in (("zebra.pt", "zebra"), ("learned_embeds.bin", "<zebra>"), ("zebra.safetensors", "Zebra"),
                       ("zebra.pt:cat", "cat")):
        before = teach(system, [str(tmp_path / file)])
        made.append(encoded(system, f"a red {word} of (the {word}:1.2)")["context"])
        system.conditioner.dress(before)
    assert all(torch.equal(one, made[0]) for one in made)
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "w.safetensors")
    for told in (system, api.outline(str(model))):      # a plan knows it too
        with pytest.raises(InputError, match="32 numbers for text encoder 1, whose words have 64"):
            teach(told, [str(tmp_path / "w.safetensors")])
    save_file({"a": torch.ones(1, 64), "b": torch.ones(1, 64)}, tmp_path / "two.safetensors")
    with pytest.raises(InputError, match="no textual inversion"):
        teach(system, [str(tmp_path / "two.safetensors")])
    with pytest.raises(InputError, match="cannot be a word"):
        teach(system, [f"{tmp_path / 'zebra.pt'}:a(b"])


def trained_loras(pipe):
    """Random updates in the UNet and every text encoder; save_lora_weights' arguments."""
    encoders = [pipe.text_encoder, *([pipe.text_encoder_2] if hasattr(pipe, "text_encoder_2") else [])]
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "to_v", "conv1", "ff.net.0.proj"]))
    for encoder in encoders:
        encoder.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=["q_proj", "v_proj", "out_proj", "fc1"]))
    g = torch.Generator().manual_seed(0)
    for module in [pipe.unet, *encoders]:
        for name, p in module.named_parameters():
            if "lora_" in name:
                p.data = 0.15 * torch.randn(p.shape, generator=g)
    said = {k: sorted(v) if isinstance(v, set) else v for k, v in pipe.unet.peft_config["default"].to_dict().items()}
    parts = [get_peft_model_state_dict(e) for e in encoders]
    names = ("text_encoder_lora_layers", "text_encoder_2_lora_layers")
    return {"unet_lora_layers": get_peft_model_state_dict(pipe.unet), "unet_lora_adapter_metadata": said,
            **dict(zip(names, parts, strict=False))}


def test_pictures_with_a_lora_of_network_and_encoders(both, tmp_path):
    pipe, model = both
    system = checkpoint.load(str(model), device="cpu")
    drawn = torch.randn(2, 4, pipelines.SIDE, pipelines.SIDE, generator=torch.Generator().manual_seed(3))
    save_file({"noise": drawn}, tmp_path / "noise.safetensors")

    def ours(**more):
        request = SampleRequest(prompt="a red ball", negative_prompt="house", steps=3, guidance=5.0,
                                initial_noise=str(tmp_path / "noise.safetensors"), **more)
        return torch.stack([torch.as_tensor(i.image) for i in api.sample(system, request, seeds=[0, 1])]).float() / 255

    plain = ours()
    type(pipe).save_lora_weights(tmp_path / "lora", **trained_loras(pipe))
    wanted = pipe(["a red ball"] * 2, negative_prompt=["house"] * 2, num_inference_steps=3, guidance_scale=5.0,
                  latents=drawn, output_type="pt", height=16, width=16).images.permute(0, 2, 3, 1)
    made = ours(lora=(str(tmp_path / "lora"),))
    assert (made - plain).abs().max() > 0.05 and (made - wanted).abs().max() <= 1 / 255
    assert torch.equal(ours(), plain)
    with pytest.raises(ModelError, match="changes the text encoders"):
        merge_files(system, [str(tmp_path / "lora")], text=False)
