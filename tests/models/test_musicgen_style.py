"""MusicGen-Style: what an excerpt becomes, what of a clip is learnt, how a style steers, audiocraft's names of it."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from nexus import checkpoint
from nexus.convert.convert import convert
from nexus.convert.keymap import to_foreign, to_native
from nexus.convert.layouts import encodec
from nexus.convert.layouts.musicgen import LAYOUTS, STYLE
from nexus.decode.patterns import delay, holds
from nexus.errors import InputError, ModelError
from nexus.models.audio.musicgen import MusicGenConfig
from nexus.nn.style import StyleConfig
from nexus.process import followed
from nexus.requests import SampleRequest
from nexus.sounds import write_sound

ORIGINAL = LAYOUTS[0]


T = MusicGenConfig.preset("tiny-style").frames(0.25)


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def built(**changes):
    """A system whose every part speaks, its style's codebooks started."""
    config = MusicGenConfig.preset("tiny-style").to_json() | changes
    torch.manual_seed(0)
    system = MusicGenConfig.parse(config).build().eval()
    with torch.no_grad():
        for p in system.net.parameters():
            p.add_(torch.randn_like(p) * 0.2)
        system.net.style.train()
        system.net.style(torch.randint(16, (8, 2, 12), generator=rng()), rng())
    return system.eval()


@pytest.fixture(scope="module")
def system():
    return built()


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    t = np.arange(1200) / 1600
    wave = (0.5 * np.sin(2 * np.pi * 220 * 2 ** np.floor(6 * t) * t))[None].astype(np.float32)
    write_sound(tmp_path_factory.mktemp("sounds") / "style.wav", wave, 1600, bits=32)
    return str(next(tmp_path_factory.getbasetemp().glob("sounds*/style.wav")))


def test_an_excerpt_becomes_a_few_vectors_of_the_codebooks(system):
    ids, style = torch.randint(16, (3, 2, 11), generator=rng(1)), system.net.style
    made = style(ids)
    assert made.shape == (3, 4, 16)                                         # frames 0, 3, 6 and 9
    books = [book.embed for book in style.quantizer.books[:2]]
    sums = (books[0][:, None] + books[1][None]).flatten(0, 1)
    away = (made.flatten(0, 1)[:, None] - sums).norm(dim=-1)
    assert away.min(1).values.max() < 1e-5
    first = style.embed.weight[:16][ids[:, 0]] + style.embed.weight[16:][ids[:, 1]]
    assert torch.equal(first, style.embed(ids + torch.tensor([[0], [16]])).sum(1))
    whole = StyleConfig.parse(StyleConfig.presets["tiny"] | {"every": 1}).build().eval()
    whole.load_state_dict(style.state_dict())
    assert torch.allclose(whole(ids)[:, ::3], made)


def test_every_frame_sees_all_of_the_excerpt(system):
    """An encoder, and no language model: the first frame knows the last."""
    layers, a = system.net.style.layers, torch.randn(1, 6, 16, generator=rng(2))
    b = a.clone()
    b[:, -1] = torch.randn(16, generator=rng(3))
    seen = [layers[0](x, 0)[:, 0] for x in (a, b)]
    assert not torch.allclose(*seen)


def test_the_excerpt_is_not_learnt(system):
    codes = torch.randint(16, (3, 2, T), generator=rng(3))
    heard = followed.style_of_clips(system, codes, rng(4))
    drawn = rng(4)
    seconds = 0.06 + 0.06 * float(torch.rand((), generator=drawn))
    frames = system.config.frames(seconds)
    start = int(torch.randint(T - frames + 1, (), generator=drawn))
    assert heard.learnt.tolist() == [not start <= i < start + frames for i in range(T)]
    batch = {"codes": codes, "caption": ["a"] * 3, "index": torch.arange(3)}
    with torch.no_grad():                                                   # with a gradient the codebooks would learn
        loss = system.loss(batch, rng(5), 0)["loss"]
        cond, learnt = system._training_cond(batch, codes, rng(5))
    n = system.config.net
    sequence = delay(codes, n.pattern, n.bins)[..., :T + 1]
    counted = holds(n.pattern, T, codes.device)[:, 1:T + 1]
    for k, late in enumerate(n.pattern):
        for step in range(T):
            frame = step - late
            counted[k, step] &= 0 <= frame and bool(learnt[frame])
    scores = system.net(sequence[..., :-1], cond).detach()
    each = F.cross_entropy(scores.movedim(-1, 1), sequence[..., 1:].clamp_max(15), reduction="none") * counted
    want = (each.sum((0, 2)) / (3 * counted.sum(1))).mean()
    assert torch.allclose(loss, want, atol=1e-5)


def test_the_style_learns_with_the_model():
    system = built()
    phase, = system.phases()
    phase.module.train()
    before = [book.embed.clone() for book in system.net.style.quantizer.books]
    codes = torch.randint(16, (4, 2, T), generator=rng(6))
    phase.loss({"codes": codes, "caption": ["a"] * 4, "index": torch.arange(4)}, rng(7), 0)["loss"].backward()
    assert system.net.style.embed.weight.grad.abs().sum() > 0
    assert not torch.equal(before[0], system.net.style.quantizer.books[0].embed)


def test_a_style_steers_and_is_drawn_by_the_seed(system, sound):
    def made(seeds=(3,), **asked):
        return system.generate(SampleRequest(duration=0.2, **asked), seeds=list(seeds)).data
    plain, told = made(prompt="a flute"), made(prompt="a flute", melody=sound)
    assert plain.shape == told.shape and not torch.equal(plain, told)
    double = made(prompt="a flute", melody=sound, guidance_style=4.0)
    assert not torch.equal(double, told)
    pair = made((3, 4), melody=sound)
    assert torch.allclose(pair[:1], made((3,), melody=sound), atol=1e-5)
    one, two = (followed.style_of_sound(system, sound, [seed], _read).vectors for seed in (1, 2))
    assert one.shape == two.shape and not torch.equal(one, two)


def _read(path, rate, channels):
    from nexus.models.audio.musicgen import _sound
    return _sound(path, rate, channels)


def test_without_a_style_one_vector_of_zeros_stands_in_front(system):
    cond = followed.no_style(system, 2).cond(quiet=False)
    prefix = system.net.prepare(cond).prefix
    assert prefix.shape == (2, 1, 32) and not prefix.any()
    heard = followed.style_of_clips(system, torch.randint(16, (2, 2, T), generator=rng(8)), rng(9))
    quiet = system.net.prepare(heard.cond(torch.tensor([True, False]))).prefix
    assert not quiet[0].any() and quiet[1].abs().sum(-1).min() > 0


def test_names_of_audiocraft_go_both_ways(system):
    for features in ("tokens", "frames"):
        config = MusicGenConfig.preset("tiny-style").to_json()
        config["net"]["style"] |= {"features": features, "width": 10}
        torch.manual_seed(1)
        net = MusicGenConfig.parse(config).build().net
        state = to_foreign(ORIGINAL.table(config), net.state_dict()) | ORIGINAL.constants(config)
        assert f"{STYLE}transformer.layers.0.self_attn.in_proj_weight" in state
        assert (f"{STYLE}embed.1.weight" in state) == (features == "tokens")
        shapes = {key: tuple(value.shape) for key, value in state.items()}
        told = {"xp.cfg": {"conditioners": {"self_wav": {"style": {
            "eval_q": 2, "ds_factor": 3, "length": 0.1, "varying_lengths": [0.06, 0.12]}}},
            "dataset": {"segment_duration": 0.25}, "transformer_lm": {"num_heads": 2}}}
        found = ORIGINAL.config(shapes, told)["net"]["style"]
        want = {key: value for key, value in config["net"]["style"].items() if key in found}
        assert found | {"heads": 2} == want and len(want) >= 12     # the width of a head of published models is 64
        left = {k: v for k, v in state.items() if not k.endswith("inited")}
        back = to_native(ORIGINAL.table(config), left)
        assert back.keys() == net.state_dict().keys()
        assert all(torch.equal(value, net.state_dict()[key]) for key, value in back.items())


def test_the_published_size_builds_and_transformers_has_no_place_for_it():
    with torch.device("meta"):
        net = MusicGenConfig.preset("style").net.build()
    assert net.style.embed.in_features == 768 and len(net.style.layers) == 8 and len(net.style.quantizer.books) == 6
    with pytest.raises(ModelError, match="follows no style"):
        LAYOUTS[1].table(MusicGenConfig.preset("style").to_json())


def test_what_it_cannot_do_is_said(sound):
    with pytest.raises(InputError, match="style"):
        MusicGenConfig.parse(MusicGenConfig.preset("tiny-style").to_json() | {"seconds": 0.1, "stride": 0.05})
    config = MusicGenConfig.preset("tiny-style").to_json()
    with pytest.raises(InputError, match="chroma"):
        MusicGenConfig.parse(config | {"net": config["net"] | {"chroma": 12}})
    config["net"]["style"]["features"] = "frames"
    frames = MusicGenConfig.parse(config).build().eval()
    with pytest.raises(ModelError, match="MERT"):
        frames.generate(SampleRequest(melody=sound, duration=0.1), seeds=[0])
    with pytest.raises(ModelError, match="not trained here"):
        frames.loss({"codes": torch.zeros(1, 2, T, dtype=torch.long), "caption": ["a"], "index": torch.arange(1)},
                    rng(), 0)


def test_frames_are_heard_by_a_hubert_in_its_folder(tmp_path, sound):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(2)
    said = transformers.HubertConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
                                     conv_dim=(16, 16), conv_kernel=(10, 8), conv_stride=(5, 4),
                                     num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2)
    mert = transformers.HubertModel(said).eval()
    (tmp_path / "mert").mkdir()
    torch.save(mert.state_dict(), tmp_path / "mert/pytorch_model.bin")          # as it is published
    (tmp_path / "mert/config.json").write_text(json.dumps(said.to_dict() | {"model_type": "mert_model"}))
    config = MusicGenConfig.preset("tiny-style").to_json()
    config["net"]["style"] |= {"features": "frames", "width": 24, "heads": 8, "quantizers": 3, "bins_in": 2048}
    _audiocraft_pair(MusicGenConfig.parse(config).build(), tmp_path / "pair")
    convert(tmp_path / "pair", tmp_path / "ours", overrides=[f"hearing={tmp_path / 'mert'}"])
    shutil.rmtree(tmp_path / "mert")
    system = checkpoint.load(str(tmp_path / "ours"), device="cpu")
    assert system.config.net.style == MusicGenConfig.parse(config).net.style
    heard = followed.style_of_sound(system, sound, [5], _read)
    wave, length = _read(sound, followed.MERT_RATE, 1), int(0.1 * followed.MERT_RATE)
    from nexus.rng import generator
    at = int(torch.randint(wave.shape[-1] - length + 1, (), generator=generator(5, "excerpt")))
    with torch.no_grad():
        want = system.net.style(mert(wave[:, at:at + length]).last_hidden_state)
    assert torch.allclose(heard.vectors, want, atol=1e-5) and want.abs().sum() > 0


def _audiocraft_pair(system, folder):
    """The two files of a model as audiocraft lays them out; returns the language model's tensors."""
    folder.mkdir()
    config, codec = system.config.to_json(), system.codec.config.to_json()
    state = to_foreign(ORIGINAL.table(config), system.net.state_dict()) | ORIGINAL.constants(config)
    settings = ("transformer_lm: {num_heads: 2}\ndataset: {segment_duration: 0.25}\n"
                "conditioners: {self_wav: {style: {eval_q: 2, ds_factor: 3, length: 0.1, "
                "varying_lengths: [0.06, 0.12]}}}")
    torch.save({"best_state": state, "xp.cfg": settings}, folder / "state_dict.bin")
    sound = {layout.name: layout for layout in encodec.LAYOUTS}["original"]
    codes = to_foreign(sound.table({"net": codec}), system.codec.state_dict()) | sound.constants({"net": codec})
    torch.save({"best_state": codes, "xp.cfg": f"encodec: {{sample_rate: {codec['rate']}}}\n"
                "seanet: {causal: false, pad_mode: constant}\n"}, folder / "compression_state_dict.bin")
    return state


def test_a_file_of_audiocraft_is_converted_with_its_settings(tmp_path):
    config = MusicGenConfig.preset("tiny-style").to_json()
    config["net"]["style"] |= {"heads": 8, "features": "frames", "width": 10, "quantizers": 3, "bins_in": 2048}
    torch.manual_seed(3)
    system = MusicGenConfig.parse(config).build()
    net, state = system.net, _audiocraft_pair(system, tmp_path / "pair")
    convert(tmp_path / "pair/state_dict.bin", tmp_path / "ours", overrides=["hearing=/mert"])
    ours = checkpoint.load(str(tmp_path / "ours"), device="cpu")
    assert ours.config.hearing == "/mert" and ours.config.net.style == net.config.style
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in ours.net.state_dict().items())
    convert(tmp_path / "ours", tmp_path / "back.safetensors", to="original")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[key], value) for key, value in state.items())
