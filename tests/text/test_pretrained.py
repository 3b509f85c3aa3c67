"""Pretrained encoders: windows, weights, cuts, folders, memory, disk. Equality with diffusers: tests/parity."""

import sys
from pathlib import Path

import pytest
import torch

from nexus.errors import ModelError
from nexus.text import pretrained, recipes
from nexus.text.conditioner import aligned, dropped, joined
from nexus.text.pretrained import PretrainedCondConfig

sys.path.insert(0, str(Path(__file__).parent))
import encoders  # noqa: E402

CPU = torch.device("cpu")
LONG = "red ball " * 30 + ", " + "green house " * 30


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "home"))


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("encoders")
    small, large, far = encoders.clip(), encoders.clip(48, projected=True, pad="!", seed=1), encoders.t5()
    return {"sd": encoders.save(root / "sd", small), "sdxl": encoders.save(root / "sdxl", small, large),
            "sd3": encoders.save(root / "sd3", encoders.clip(40, projected=True, seed=2), large, far),
            "flux": encoders.save(root / "flux", small, far), "pixart": encoders.save(root / "pixart", far)}


def conditioner(pipelines, recipe="sd", **fields):
    return PretrainedCondConfig(recipe=recipe, encoders=(str(pipelines[recipe]),), **fields).build()


def encoded(pipelines, prompt, recipe="sd", **fields):
    cond, notes = conditioner(pipelines, recipe, **fields).prompts([prompt], CPU)
    return cond, notes[0]


@pytest.mark.parametrize("recipe, shapes", [
    ("sd", {"context": (1, 77, 32)}), ("sdxl", {"context": (1, 77, 80), "pooled": (1, 56)}),
    ("sd3", {"context": (1, 77 + 256, 96), "pooled": (1, 104)}),
    ("flux", {"context": (1, 512, 96), "pooled": (1, 32)}),
    ("pixart", {"context": (1, 120, 96), "context_mask": (1, 120)})])
def test_what_each_recipe_gives(pipelines, recipe, shapes):
    made = conditioner(pipelines, recipe)
    cond, notes = made.prompts(["a red ball"], CPU)
    assert {name: tuple(value.shape) for name, value in cond.items()} == shapes
    assert notes == ({"caption": "a red ball"},)
    assert not list(made.parameters()) and not made.state_dict()


def test_a_prompt_is_the_same_alone_and_among_others(pipelines):
    made = conditioner(pipelines, "sdxl", cache=False)
    alone = made.prompts(["a cat"], CPU)[0]
    among = made.prompts(["red house", "a cat", None, "a cat"], CPU)[0]
    assert all(torch.equal(among[name][[1, 3]], alone[name].expand(2, *alone[name].shape[1:])) for name in alone)


def test_a_long_prompt_takes_more_windows(pipelines):
    made, (clip, tokenizer) = conditioner(pipelines), encoders.clip()
    cond, _ = made.prompts([LONG], CPU)
    ids = tokenizer(LONG, add_special_tokens=False).input_ids
    comma = ids.index(tokenizer.convert_tokens_to_ids(",</w>"))
    first, second = ids[:comma + 1], ids[comma + 1:]
    assert len(first) == 61                             # the comma lies within the last 20 of the first window
    begin, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    rows = [[begin, *w, end, *[end] * (75 - len(w))] for w in (first, second[:75], second[75:150], second[150:225],
                                                               second[225:]) if w]
    with torch.no_grad():
        wanted = clip(torch.tensor(rows)).last_hidden_state.flatten(0, 1)
    torch.testing.assert_close(cond["context"][0], wanted)


def test_break_begins_a_window(pipelines):
    whole, _ = encoded(pipelines, "a cat BREAK red house", "sdxl")
    first, second = (encoded(pipelines, p, "sdxl")[0] for p in ("a cat", "red house"))
    torch.testing.assert_close(whole["context"], torch.cat([first["context"], second["context"]], 1))
    torch.testing.assert_close(whole["pooled"], first["pooled"])


def test_weights_act_on_their_words_alone(pipelines):
    plain, _ = encoded(pipelines, "a red cat")
    heavy, note = encoded(pipelines, "a (red:1.3) cat")
    same, _ = encoded(pipelines, "a (red:1.0) cat")
    assert torch.equal(same["context"], plain["context"]) and note["caption"] == "a (red:1.3) cat"
    ratio = heavy["context"][0] / plain["context"][0]
    assert ratio.std(1).max() < 1e-4                    # one factor a word
    per_word = ratio.mean(1)
    assert per_word[2] / per_word[1] == pytest.approx(1.3, rel=1e-4)
    assert per_word[3] == pytest.approx(float(per_word[1]), rel=1e-4)


def test_weights_keep_the_mean(pipelines):
    hidden = torch.randn(2, 77, 8, generator=torch.Generator().manual_seed(0)) + 3
    rows = [recipes.chunks.Row([0] * 77, [1.0] * 70 + [1.5] * 7, 77), recipes.chunks.Row([0] * 77, [1.0] * 77, 77)]
    out = recipes._weighted(hidden, rows)
    torch.testing.assert_close(out.mean((1, 2)), hidden.mean((1, 2)))
    assert torch.equal(out[1], hidden[1])


def test_brackets_are_text_when_weighting_is_off(pipelines):
    literal, _ = encoded(pipelines, "a (red) cat", weighting=False)
    escaped, _ = encoded(pipelines, r"a \(red\) cat")
    assert torch.equal(literal["context"], escaped["context"])


@pytest.mark.parametrize("recipe, length", [("sd3", 20), ("flux", 20), ("pixart", 20)])
def test_what_does_not_fit_is_named(pipelines, recipe, length):
    _, note = encoded(pipelines, "a red ball " * 6 + "of the green house", recipe, length=length)
    assert note["cut"].endswith("the green house")
    assert "cut" not in encoded(pipelines, "a red ball", recipe, length=length)[1]


def test_the_null_is_the_empty_text_or_zeros(pipelines):
    empty, _ = encoded(pipelines, "", "sdxl")
    null = conditioner(pipelines, "sdxl").null(3, CPU)
    assert all(torch.equal(null[n], empty[n].expand(3, *empty[n].shape[1:])) for n in empty)
    for recipe in ("sdxl", "pixart"):                       # no word at all: what is masked is zero too
        none = conditioner(pipelines, recipe, null="zeros").null(2, CPU)
        assert not any(value.any() for value in none.values())


def test_clip_skip_takes_an_earlier_layer(pipelines):
    clip, tokenizer = encoders.clip()
    ids = tokenizer("a cat", padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        states = clip(ids, output_hidden_states=True).hidden_states
        wanted = clip.final_layer_norm(states[-2])
    torch.testing.assert_close(encoded(pipelines, "a cat", clip_skip=1)[0]["context"], wanted)
    sd2 = PretrainedCondConfig(recipe="sd2", encoders=(str(pipelines["sd"]),)).build()
    torch.testing.assert_close(sd2.prompts(["a cat"], CPU)[0]["context"], wanted)


def test_conditions_of_different_lengths_make_one_batch(pipelines):
    made = conditioner(pipelines)
    mixed = made.prompts([LONG, "a cat"], CPU)[0]
    assert mixed["context_mask"].sum(1).tolist() == [mixed["context"].shape[1], 77]
    null = made.null(2, CPU)
    both = joined(mixed, null)
    assert both["context"].shape[0] == 4 and both["context_mask"][2:].sum(1).tolist() == [77, 77]
    taken = dropped(mixed, null, torch.tensor([True, False]))
    assert taken["context_mask"].sum(1).tolist() == [77, 77] and torch.equal(taken["context"][1], mixed["context"][1])
    assert aligned(null, null) == (null, null)


def test_training_takes_captions(pipelines):
    made = conditioner(pipelines)
    batch = {"caption": ["a cat", "red ball"], "latent": torch.zeros(2, 4, 8, 8)}
    cond = made.training_cond(batch, torch.Generator())
    torch.testing.assert_close(cond["context"], made.prompts(["a cat", "red ball"], CPU)[0]["context"])


def test_an_encoded_prompt_needs_no_encoder(pipelines, monkeypatch):
    first, _ = encoded(pipelines, "a red ball", "flux", length=20)
    cut = encoded(pipelines, "ball " * 40, "flux", length=20)[1]
    monkeypatch.setattr(pretrained, "load", None)       # would be called for a prompt that is not there
    again, _ = encoded(pipelines, "a red ball", "flux", length=20)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert encoded(pipelines, "ball " * 40, "flux", length=20)[1] == cut
    with pytest.raises(TypeError):
        encoded(pipelines, "a red ball", "flux", length=21)


def test_the_cache_follows_the_content_of_the_encoders(pipelines, tmp_path):
    before, _ = encoded(pipelines, "a cat")
    other = encoders.save(tmp_path / "other", encoders.clip(seed=9))
    after = PretrainedCondConfig(encoders=(str(other),)).build().prompts(["a cat"], CPU)[0]
    assert not torch.equal(before["context"], after["context"])
    same = encoders.save(tmp_path / "same", encoders.clip())
    made = PretrainedCondConfig(encoders=(str(same),)).build()
    assert made._where()[1] == conditioner(pipelines)._where()[1]


def test_a_damaged_cache_file_is_made_anew(pipelines):
    before, _ = encoded(pipelines, "a cat")
    files = list(pretrained.cache_folder("text").rglob("*.safetensors"))
    assert len(files) == 1
    files[0].write_bytes(files[0].read_bytes()[:100])
    after, _ = encoded(pipelines, "a cat")
    assert torch.equal(before["context"], after["context"])


def test_encoders_leave_memory_when_asked(pipelines):
    made = conditioner(pipelines, keep=False, cache=False)
    made.prompts(["a cat"], CPU)
    assert made._loaded is None
    kept = conditioner(pipelines, cache=False)
    kept.prompts(["a cat"], CPU)
    assert kept._loaded is not None


def test_folders(pipelines, tmp_path):
    root = pipelines["sdxl"]
    for name in ("text_encoder", "text_encoder_2"):     # one folder an encoder, its tokenizer inside
        (tmp_path / name).mkdir()
        for source in (root / name, root / name.replace("text_encoder", "tokenizer")):
            for file in source.iterdir():
                (tmp_path / name / file.name).write_bytes(file.read_bytes())
    made = PretrainedCondConfig(recipe="sdxl", encoders=("./text_encoder", "./text_encoder_2")).build()
    made.base = tmp_path
    wanted, _ = encoded(pipelines, "a cat", "sdxl")
    assert torch.equal(made.prompts(["a cat"], CPU)[0]["context"], wanted["context"])


@pytest.mark.parametrize("recipe, given, message", [
    ("sd", (), "1 text encoders are needed"), ("sdxl", ("sd",), "gives 1"),
    ("sd", ("./nowhere",), "there is no folder"), ("sd", ("no such folder",), "there is no folder"),
    ("sd", ("./../x",), "leads out")])
def test_missing_folders_are_named(pipelines, recipe, given, message):
    names = tuple(str(pipelines.get(name, name)) for name in given)
    with pytest.raises(ModelError, match=message):
        PretrainedCondConfig(recipe=recipe, encoders=names).build().prompts(["x"], CPU)


def test_sd3_does_without_t5(pipelines):
    made = PretrainedCondConfig(recipe="sd3", encoders=(str(pipelines["sdxl"]),)).build()
    cond = made.prompts(["a cat"], CPU)[0]
    assert cond["context"].shape == (1, 77 + 256, recipes.T5_WIDTH) and not cond["context"][:, 77:].any()


def test_damaged_weights_and_a_missing_package_are_explained(pipelines, tmp_path, monkeypatch):
    broken = encoders.save(tmp_path / "broken", encoders.clip())
    (broken / "text_encoder" / "model.safetensors").write_bytes(b"no")
    made = PretrainedCondConfig(encoders=(str(broken),)).build()
    with pytest.raises(ModelError, match="cannot load the text encoder"):
        made.prompts(["x"], CPU)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModelError, match="not installed") as caught:
        conditioner(pipelines).prompts(["never seen"], CPU)
    assert "pip install" in caught.value.hint
