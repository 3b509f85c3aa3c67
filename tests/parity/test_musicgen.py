"""MusicGen against audiocraft's (saved numbers) and transformers' (built tiny and random), and back to their files."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nexus import checkpoint
from nexus.codecs.chroma import ChromaConfig, bank, chroma
from nexus.convert.convert import convert
from nexus.convert.keymap import to_foreign, to_native
from nexus.convert.layouts.musicgen import LAYOUTS
from nexus.decode.choose import chooser, guided
from nexus.decode.loops import UNKNOWN, autoregressive
from nexus.decode.patterns import delay, holds, undelay
from nexus.models.audio.musicgen import MusicGenConfig
from nexus.process import followed
from nexus.requests import SampleRequest
from nexus.sounds import write_sound
from tests.parity.whole import assert_close, shapes

sys.path.insert(0, str(Path(__file__).parents[1] / "text"))

FOLDER = Path(os.environ.get("NEXUS_PARITY", Path(__file__).parents[3] / "shared" / "parity"))
CASES = ("musicgen-lm-a", "musicgen-lm-b-melody-stereo")
needs_cases = pytest.mark.skipif(not all((FOLDER / case).is_dir() for case in (*CASES, "musicgen-chroma")),
                                 reason=f"no parity cases at {FOLDER}; set NEXUS_PARITY")
PUBLISHED = {"small": 420_371_456, "medium": 1_838_737_920, "large": 3_256_956_928, "melody-small": 319_672_320,
             "melody-medium": 1_385_625_600, "melody-large": 2_451_480_576}
BY_NAME = {layout.name: layout for layout in LAYOUTS}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    with torch.device("meta"):
        net = MusicGenConfig.preset(name).build().net
    assert sum(p.numel() for p in net.parameters()) == PUBLISHED[name]


# --- the original's files ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(case.json, the native network, the report, the foreign state dict, saved tensors, a folder)."""
    there, here = FOLDER / request.param, tmp_path_factory.mktemp(request.param)
    report = convert(there / "checkpoint.pt", here / "ours")
    state = torch.load(there / "checkpoint.pt", weights_only=True)["best_state"]
    net = checkpoint.load(str(here / "ours"), device="cpu").net
    return json.loads((there / "case.json").read_text()), net, report, state, \
        load_file(there / "tensors.safetensors"), here


def conditions(saved):
    cond = {"context": saved["hidden_description"], "context_mask": saved["mask_description"] > 0}
    if "hidden_self_wav" in saved:
        cond |= {"melody": saved["hidden_self_wav"], "melody_mask": saved["mask_self_wav"] > 0}
    null = {name: torch.zeros_like(value) if "mask" in name else value for name, value in cond.items()}
    return cond, null


@needs_cases
def test_audiocrafts_settings_are_read_from_the_text_in_its_file(case):
    said, net, report, *_ = case
    c, lm = net.config, said["lm"]
    assert report.layout == "musicgen/original" and set(report.assumed) == {"codec.weights"}
    assert (c.codebooks, c.bins, c.dim, c.depth, c.heads) == tuple(
        lm[name] for name in ("n_q", "card", "dim", "num_layers", "num_heads"))
    assert c.pattern == tuple(said["delays"]) and c.text == ("cross" if lm["cross_attention"] else "prepend")
    assert sum(p.numel() for p in net.parameters()) == said["params"]


@needs_cases
def test_audiocrafts_pattern(case):
    _, net, _, _, saved, _ = case
    pattern, codes, bins = net.config.pattern, saved["codes"], net.config.bins
    assert torch.equal(delay(codes, pattern, bins), saved["pattern_sequence"])
    assert torch.equal(holds(pattern, codes.shape[-1]), saved["pattern_mask"])
    assert torch.equal(undelay(saved["pattern_sequence"], pattern), saved["reverted_codes"])
    assert torch.equal(undelay(holds(pattern, codes.shape[-1])[None], pattern)[0], torch.ones_like(codes[0]).bool())


@needs_cases
@torch.no_grad()
def test_audiocrafts_scores(case):
    _, net, _, _, saved, _ = case
    cond, null = conditions(saved)
    sequence = saved["pattern_sequence"]
    assert_close(net(sequence, cond), saved["seq_logits"])
    assert_close(net(sequence, null), saved["seq_logits_null"])
    words = net.text(cond["context"]) * saved["mask_description"][..., None]
    assert_close(words, saved["cond_description"])


@needs_cases
@torch.no_grad()
def test_audiocrafts_predictions_are_those_that_are_learnt(case):
    """The steps of training: only those for which every codebook has a code, each read at the step before it."""
    _, net, _, _, saved, _ = case
    codes, pattern = saved["codes"], net.config.pattern
    frames = codes.shape[-1]
    scores = net(delay(codes, pattern, net.config.bins)[..., :frames], conditions(saved)[0])
    counted = holds(pattern, frames)[:, 1:frames + 1]
    for k, late in enumerate(pattern):
        assert torch.equal(saved["pred_mask"][0, k], torch.arange(frames) < counted[k].sum())
        theirs = saved["pred_logits"][:, k, :frames - late]
        assert_close(scores[:, k, late:], theirs)


@needs_cases
@torch.no_grad()
@pytest.mark.parametrize("known", [0, 3])
def test_audiocrafts_greedy_tokens_with_guidance(case, known):
    _, net, _, _, saved, _ = case
    cond, null = conditions(saved)
    prepared = net.prepare({name: torch.cat([cond[name], null[name]]) for name in cond})
    codes = torch.full((2, net.config.codebooks, 8), UNKNOWN)
    codes[..., :known] = saved["codes"][..., :known]
    sequence = delay(codes, net.config.pattern, net.config.bins)
    cache = net.cache(4, sequence.shape[-1], prepared)

    def logits(new, position):
        scores = net(new.repeat(2, 1, 1), prepared=prepared, cache=cache, last=True)[:, :, 0]
        return guided(*scores.chunk(2), 3.0)
    made = undelay(autoregressive(logits, sequence, chooser([], temperature=0)), net.config.pattern)
    assert torch.equal(made, saved["generated_greedy_prompt" if known else "generated_greedy_cfg3"])


@needs_cases
def test_audiocrafts_file_comes_back_byte_for_byte(case):
    _, _, _, state, _, here = case
    convert(here / "ours", here / "back.safetensors", to="original")
    back = load_file(here / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in back)


@needs_cases
def test_audiocrafts_chroma():
    saved = load_file(FOLDER / "musicgen-chroma" / "tensors.safetensors")
    for name, config in (("melody", ChromaConfig()), ("soft", ChromaConfig(exponent=12, loudest=False))):
        assert_close(bank(32_000, 1 << config.exponent, 12)[:, :600], saved[f"fbanks_{name}"])
        for end, wav in (("", saved["wav"]), ("_short", saved["wav"][..., :3000])):
            found = chroma(wav[:, 0], 32_000, config)
            assert found.shape[1] == config.frames(wav.shape[-1])
            assert_close(found, saved[f"chroma_{name}{end}"])


@pytest.mark.parametrize("name", [n for n in MusicGenConfig.presets if n not in ("tiny", "tiny-style", "music")])
def test_the_published_files_map_both_ways_on_meta(name):
    preset = MusicGenConfig.preset(name)
    with torch.device("meta"):
        native = preset.net.build().state_dict()
    config = preset.to_json()
    for layout in LAYOUTS[:1] if preset.net.style else LAYOUTS:
        foreign = to_foreign(layout.table(config), native)
        said = layout.foreign_config and layout.foreign_config(config)
        assert [one.name for one in LAYOUTS if one.matches(shapes(foreign), said)] == [layout.name]
        read = MusicGenConfig.parse(layout.config(shapes(foreign), said)).net
        assert read == preset.net.model_copy(update={"delays": read.delays, "padding": read.padding})
        assert read.pattern == preset.net.pattern
        assert shapes(to_native(layout.table(config), foreign)) == shapes(native)


# --- transformers --------------------------------------------------------------------------------------------------

RATE, BINS = 3200, 16
SOUND = {"num_filters": 4, "hidden_size": 8, "upsampling_ratios": [4, 2], "codebook_size": BINS, "num_lstm_layers": 1,
         "sampling_rate": RATE, "target_bandwidths": [6.4], "use_causal_conv": False, "use_conv_shortcut": False}
DECODER = {"vocab_size": BINS, "hidden_size": 32, "num_hidden_layers": 2, "ffn_dim": 64, "num_attention_heads": 4,
           "pad_token_id": BINS, "bos_token_id": BINS, "max_position_embeddings": 64}
KINDS = {"text": (False, 1), "text-stereo": (False, 2), "melody": (True, 1), "melody-stereo": (True, 2),
         "text-alike": (False, 1)}      # its text has the network's width
LENGTH, STEPS = 10, 20              # frames of chroma, steps of a run
PROMPT = "a red ball of the cat"


def random_model(melody, channels, words=24):
    transformers = pytest.importorskip("transformers")
    import encoders
    words, tokenizer = encoders.t5(words)
    codebooks = 4 * channels
    kind = "MusicgenMelody" if melody else "Musicgen"
    decoder = getattr(transformers, f"{kind}DecoderConfig")(**DECODER, num_codebooks=codebooks,
                                                            audio_channels=channels)
    config = getattr(transformers, f"{kind}Config")(
        text_encoder=words.config.to_dict(), audio_encoder=transformers.EncodecConfig(**SOUND).to_dict(),
        decoder=decoder.to_dict(), **({"chroma_length": LENGTH} if melody else {}))
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForConditionalGeneration")(config).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            scale = 0.3 if p.ndim > 1 else 0.1
            p.copy_(torch.randn_like(p) * scale + (1.0 if name.endswith("norm.weight") else 0.0))
        for layer in model.audio_encoder.quantizer.layers:
            layer.codebook.embed.copy_(torch.randn_like(layer.codebook.embed))
            layer.codebook.inited.fill_(1)
    model.generation_config.update(decoder_start_token_id=BINS, pad_token_id=BINS, bos_token_id=BINS,
                                   guidance_scale=3.0, max_length=STEPS)
    return model, tokenizer


@pytest.fixture(scope="module", params=KINDS)
def pair(request, tmp_path_factory):
    """(its name, transformers' model, its tokenizer, our system, the conversion's report, a folder)."""
    here = tmp_path_factory.mktemp(request.param)
    model, tokenizer = random_model(*KINDS[request.param], words=32 if "alike" in request.param else 24)
    model.save_pretrained(here / "theirs")
    tokenizer.save_pretrained(here / "theirs")
    report = convert(here / "theirs", here / "ours")
    return request.param, model, tokenizer, checkpoint.load(str(here / "ours"), device="cpu"), report, here


def told(tokenizer, n=1):
    ids = tokenizer([PROMPT] * n, return_tensors="pt")
    return {"input_ids": ids.input_ids, "attention_mask": ids.attention_mask}


def melody_of(name):
    """One-hot chroma [1, F, 12], shorter than the window, or None."""
    if "melody" not in name:
        return None
    return torch.nn.functional.one_hot(torch.tensor([[0, 3, 5, 5, 7, 2]]), 12).float()


def hears(monkeypatch, chroma):
    """Every window hears this chroma."""
    def heard(system, sound, start, many, n):
        vectors = chroma.repeat(1, 2, 1)[:, :LENGTH].expand(n, -1, -1)
        return followed.Heard(vectors, followed.silence(vectors))
    monkeypatch.setattr(followed, "melody_in_window", heard)


def test_a_transformers_folder_is_taken_whole(pair):
    name, model, _, system, report, here = pair
    assert report.layout == "musicgen/transformers" and not report.dropped and not report.assumed
    melody, channels = KINDS[name]
    c = system.config
    assert (c.net.chroma, c.codec.net.channels, c.net.text) == (12 * melody, channels, "prepend" if melody else "cross")
    assert c.net.pattern == tuple(k // channels for k in range(4 * channels)) and c.rate == RATE
    assert (here / "ours/pipeline/text_encoder/model.safetensors").exists()
    if melody:
        assert c.melody.frames(int(c.seconds * c.rate)) == LENGTH


@torch.no_grad()
def test_transformers_scores(pair):
    name, model, tokenizer, system, *_ = pair
    net = system.net
    codes = torch.randint(BINS, (2, net.config.codebooks, 7), generator=torch.Generator().manual_seed(1))
    sequence = delay(codes, net.config.pattern, BINS)
    asked, heard = told(tokenizer, 2), melody_of(name)
    cond = {key: value for key, value in system.conditioner.prompts([PROMPT] * 2, torch.device("cpu"))[0].items()}
    more = {}
    if heard is not None:
        more = {"input_features": heard.expand(2, -1, -1)}
        cond["melody"] = heard.repeat(1, 2, 1)[:, :LENGTH].expand(2, -1, -1)
    theirs = model(**asked, **more, decoder_input_ids=sequence.flatten(0, 1)).logits.unflatten(0, sequence.shape[:2])
    theirs = theirs[:, :, -sequence.shape[-1]:]
    assert_close(net(sequence, cond), theirs)


@torch.no_grad()
def test_transformers_scores_of_texts_of_several_lengths(pair):
    name, model, tokenizer, system, *_ = pair
    if "melody" in name:
        pytest.skip("text in front of the music is never hidden")
    ids = tokenizer([PROMPT, "a cat"], return_tensors="pt", padding=True)
    sequence = delay(torch.randint(BINS, (2, system.config.net.codebooks, 5)), system.config.net.pattern, BINS)
    theirs = model(input_ids=ids.input_ids, attention_mask=ids.attention_mask,
                   decoder_input_ids=sequence.flatten(0, 1)).logits.unflatten(0, sequence.shape[:2])
    hidden = model.text_encoder(ids.input_ids, ids.attention_mask).last_hidden_state
    ours = system.net(sequence, {"context": hidden, "context_mask": ids.attention_mask.bool()})
    assert_close(ours, theirs)


def tokens(monkeypatch, model, **how):
    """The codes that transformers' generate makes, taken where they enter its codec; and the sound."""
    seen = []
    decode = type(model.audio_encoder).decode

    def spied(self, codes, *args, **more):
        seen.append(codes)
        return decode(self, codes, *args, **more)
    with monkeypatch.context() as patch:
        patch.setattr(type(model.audio_encoder), "decode", spied)
        sound = model.generate(**how)
    codes = torch.stack(seen, 3).flatten(2, 3) if len(seen) > 1 else seen[0]
    return codes[0], sound


@torch.no_grad()
@pytest.mark.parametrize("how", [{"do_sample": False}, {"do_sample": False, "guidance_scale": 1.0},
                                 {"top_k": 7, "temperature": 8.0}, {"top_k": 0, "top_p": 0.8, "temperature": 6.0},
                                 {"top_k": 5, "guidance_scale": 1.0, "temperature": 4.0}],
                         ids=["greedy", "greedy-plain", "top-k", "top-p", "plain-top-k"])
def test_transformers_generate_makes_the_same_tokens_and_sound(pair, how, monkeypatch):
    name, model, tokenizer, system, *_ = pair
    more = {} if (heard := melody_of(name)) is None else {"input_features": heard}
    torch.manual_seed(7)
    theirs, sound = tokens(monkeypatch, model, **{"do_sample": True, **how}, **told(tokenizer), **more)
    frames = theirs.shape[-1]
    assert frames in (STEPS - max(system.config.net.pattern) + i for i in (-1, 0))
    monkeypatch.setattr("nexus.models.audio.musicgen.generator", lambda *key: torch.Generator().manual_seed(7))
    melody = None
    if heard is not None:
        hears(monkeypatch, heard)
        melody = "any.wav"
        monkeypatch.setattr("nexus.models.audio.musicgen._sound", lambda *args: torch.zeros(1, 100))
    hop = system.config.codec.net.hop
    request = SampleRequest(prompt=PROMPT, duration=frames * hop / RATE, melody=melody, top_k=how.get("top_k", 0),
                            top_p=how.get("top_p"), guidance=how.get("guidance_scale", 3.0),
                            temperature=how.get("temperature", 1.0 if how.get("do_sample", True) else 0.0))
    piece, _ = system._piece(request, [7], frames)
    made = system.write(piece, torch.empty(1, system.config.net.codebooks, 0, dtype=torch.long))
    assert torch.equal(made, theirs)
    if how.get("do_sample", True):          # hot enough that the noise decides
        assert (made[..., 1:] != made[..., :-1]).float().mean() > 0.4
    ours = system.generate(request, seeds=[7]).data
    assert_close(ours, sound.clamp(-1, 1))


def test_a_melody_model_without_a_melody_hears_silence(pair, monkeypatch):
    name, model, tokenizer, system, *_ = pair
    if "melody" not in name:
        pytest.skip("takes no melody")
    theirs, _ = tokens(monkeypatch, model, do_sample=False, **told(tokenizer))
    request = SampleRequest(prompt=PROMPT, temperature=0)
    piece, _ = system._piece(request, [0], theirs.shape[-1])
    with torch.no_grad():
        made = system.write(piece, torch.empty(1, system.config.net.codebooks, 0, dtype=torch.long))
    assert torch.equal(made, theirs)


def test_a_melody_file_is_heard_as_transformers_hears_it(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("torchaudio")
    t = np.arange(8000) / RATE
    wave = (0.4 * np.sin(2 * np.pi * 440 * 2 ** np.floor(4 * t) * t)).astype(np.float32)
    heard = transformers.MusicgenMelodyFeatureExtractor(sampling_rate=RATE, n_fft=1024, hop_length=256)
    theirs = heard(wave, sampling_rate=RATE, return_tensors="pt").input_features
    assert torch.equal(chroma(torch.from_numpy(wave)[None], RATE, ChromaConfig(exponent=10)), theirs)


@torch.no_grad()
def test_transformers_goes_on_with_a_sound_with_the_same_tokens(pair, tmp_path, monkeypatch):
    name, model, tokenizer, system, *_ = pair
    if "melody" in name:
        pytest.skip("transformers' melody model does not go on with a sound")
    channels = KINDS[name][1]
    wave = np.random.default_rng(0).uniform(-0.5, 0.5, (channels, 48)).astype(np.float32)
    write_sound(tmp_path / "begun.wav", wave, RATE, bits=32)
    theirs, _ = tokens(monkeypatch, model, do_sample=False, input_values=torch.from_numpy(wave)[None],
                       **told(tokenizer))
    known = system._known(SampleRequest(continued=str(tmp_path / "begun.wav")), 1)
    piece, _ = system._piece(SampleRequest(prompt=PROMPT, temperature=0), [0], theirs.shape[-1])
    made = system.write(piece, known)
    assert known.shape[-1] == 6 and torch.equal(made[..., :6], known)
    assert torch.equal(made, theirs)


def test_a_transformers_folder_comes_back_byte_for_byte(pair):
    import transformers
    _, model, _, _, _, here = pair
    convert(here / "ours", here / "back", to="transformers", exists="overwrite")
    before, after = (load_file(here / folder / "model.safetensors") for folder in ("theirs", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    again = type(model).from_pretrained(here / "back").eval()
    assert all(torch.equal(value, again.state_dict()[key]) for key, value in model.state_dict().items())
    assert transformers.AutoTokenizer.from_pretrained(here / "back")(PROMPT).input_ids


@pytest.mark.parametrize("stereo", [False, True])
def test_audiocrafts_pair_of_files_is_taken_whole(stereo, tmp_path):
    """A pair made from our own tiny model, as audiocraft lays it out."""
    from nexus.convert.layouts import encodec
    tiny = MusicGenConfig.preset("tiny").to_json()
    codec = tiny["codec"]["net"] | ({"channels": 2, "interleave": "rows"} if stereo else {})
    net = tiny["net"] | {"codebooks": 4 if stereo else 2, "delays": [0, 0, 1, 1] if stereo else []}
    config = MusicGenConfig.parse(tiny | {"net": net, "codec": {"net": codec}})
    torch.manual_seed(0)
    system = config.build()
    lm = to_foreign(BY_NAME["original"].table({"net": net}), system.net.state_dict())
    sound = {layout.name: layout for layout in encodec.LAYOUTS}["original"]
    codes = to_foreign(sound.table({"net": codec}), system.codec.state_dict()) | sound.constants({"net": codec})
    text = "transformer_lm: {num_heads: 2}\ncodebooks_pattern: {modeling: delay, delay: {delays: " \
           f"{list(config.net.pattern)}}}}}\nconditioners: {{description: {{model: t5, t5: {{name: t5-small}}}}}}\n"
    torch.save({"best_state": lm, "xp.cfg": text}, tmp_path / "state_dict.bin")
    torch.save({"best_state": codes, "xp.cfg": f"encodec: {{sample_rate: {codec['rate']}}}\n"
                "seanet: {causal: false, pad_mode: constant}\n"}, tmp_path / "compression_state_dict.bin")
    report = convert(tmp_path, tmp_path / "ours")
    loaded = checkpoint.load(str(tmp_path / "ours"), device="cpu")
    assert report.config["conditioner"]["encoders"] == ["google-t5/t5-small"]
    assert loaded.config.codec.net.channels == 1 + stereo and loaded.config.net.pattern == config.net.pattern
    for part in ("net", "codec"):
        ours, theirs = getattr(system, part).state_dict(), getattr(loaded, part).state_dict()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    media = loaded.generate(SampleRequest(duration=0.05, melody=None), seeds=[1])
    assert media.data.shape == (1, 1 + stereo, 80)
