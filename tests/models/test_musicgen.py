"""MusicGen: what is learnt and what is dropped, what steers, and how a piece of any length is written."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nexus.errors import InputError, ModelError, UsageError
from nexus.models.audio.musicgen import MusicGenConfig
from nexus.process.followed import melody_in_window
from nexus.requests import SampleRequest
from nexus.sounds import write_sound

CPU = torch.device("cpu")


def tiny(**changes):
    config = MusicGenConfig.preset("tiny").to_json()
    for name, value in changes.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    return MusicGenConfig.parse(config)


def loud(config, seed=0):
    """A system whose every part speaks."""
    torch.manual_seed(seed)
    system = config.build().eval()
    with torch.no_grad():
        for p in system.net.parameters():
            p.add_(torch.randn_like(p) * 0.2)
    return system


@pytest.fixture(scope="module")
def system():
    return loud(tiny())


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A melody and a beginning."""
    folder = tmp_path_factory.mktemp("sounds")
    t = np.arange(900) / 1600
    for name, hertz in (("melody", 220), ("begun", 330)):
        wave = 0.5 * np.sin(2 * np.pi * hertz * 2 ** np.floor(6 * t) * t)
        write_sound(folder / f"{name}.wav", wave[None].astype(np.float32), 1600, bits=32)
    return {name: str(folder / f"{name}.wav") for name in ("melody", "begun")}


def batch(n=3, seconds=0.25):
    audio = 0.3 * torch.randn(n, 1, int(1600 * seconds), generator=torch.Generator().manual_seed(1))
    return {"audio": audio, "caption": ["slow piano", "fast drums", "a flute"][:n], "index": torch.arange(n)}


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def made(system, seeds=(3,), **asked):
    return system.generate(SampleRequest(**asked), seeds=list(seeds)).data


# --- training ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def test_the_loss_is_the_mean_surprise_at_each_codes_step(system):
    """Against a sum over all codes by hand, from the network's own scores."""
    config = tiny(p_uncond=0.0, p_melody=0.0)
    ours = loud(config)
    given = batch()
    found = ours.loss(given, rng(), 0)
    codes = ours.encode(given["audio"])
    frames, special = codes.shape[-1], config.net.bins
    cond, _ = ours._training_cond(given, codes, rng())
    columns = [[special, special]] + [[None, None] for _ in range(frames)]
    each = [[], []]
    for b in range(3):
        for t in range(frames):
            columns[t + 1] = [int(codes[b, 0, t]), int(codes[b, 1, t - 1]) if t else special]
        ids = torch.tensor(columns).T[None]
        scores = ours.net(ids[..., :-1], {name: value[b:b + 1] for name, value in cond.items()}).log_softmax(-1)
        for k in range(2):
            each[k] += [-float(scores[0, k, t + k, codes[b, k, t]]) for t in range(frames - k)]
    wanted = [np.mean(values) for values in each]
    assert abs(float(found["loss"]) - np.mean(wanted)) < 1e-4
    assert abs(float(found["codebook_1"]) - wanted[1]) < 1e-4


def test_codes_stand_in_for_the_sound_and_are_learnt_alike(system):
    given = batch()
    codes = system.encode(given["audio"])
    assert torch.equal(system.loss(given, rng(), 0)["loss"], system.loss(given | {"codes": codes}, rng(), 0)["loss"])
    alone = system.loss({"codes": codes, "caption": given["caption"]}, rng(), 0)["loss"]
    assert alone.isfinite()


def test_the_codec_learns_nothing(system):
    before = {name: value.clone() for name, value in system.codec.state_dict().items()}
    system.phases()[0].module.train()
    system.loss(batch(), rng(), 0)["loss"].backward()
    system.eval()
    assert all(torch.equal(value, before[name]) for name, value in system.codec.state_dict().items())
    assert all(p.grad is None for p in system.codec.parameters())
    named = dict(system.net.named_parameters())
    assert all(named[name].grad is not None for name in named)


def test_conditions_are_dropped_as_often_as_asked():
    config = tiny(p_uncond=0.3, p_melody=0.5)
    system = loud(config)
    n = 4000
    codes = torch.zeros(n, 2, 4, dtype=torch.long)
    chroma = F.one_hot(torch.full((n, 3), 5), 12).float()
    cond, _ = system._training_cond({"codes": codes, "caption": ["flute"] * n, "chroma": chroma}, codes, rng())
    told, heard = cond["context_mask"].any(1), cond["melody"][:, 0, 5] == 1
    assert abs(told.float().mean() - 0.7) < 0.03 and abs(heard.float().mean() - 0.35) < 0.03
    assert not (heard & ~told).any()                        # without a text there is no melody either
    assert (cond["melody"].sum(-1) == 1).all() and (cond["melody"][~heard][..., 0] == 1).all()


def test_tiny_learns_its_clips():
    torch.manual_seed(0)
    system = tiny(p_uncond=0.0, p_melody=0.0).build()
    trained, given = system.phases()[0].module, batch(2)
    optimizer = torch.optim.AdamW(trained.parameters(), 1e-2)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = system.loss(given, rng(), 0)["loss"]
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.5 * losses[0]


# --- what steers ---------------------------------------------------------------------------------------------------

def test_a_prompt_a_melody_and_guidance_change_the_piece(system, files):
    plain = made(system)
    pieces = [plain, made(system, prompt="flute"), made(system, prompt="drums"), made(system, melody=files["melody"]),
              made(system, prompt="flute", guidance=1.0), made(system, prompt="flute", negative_prompt="drums"),
              made(system, prompt="flute", melody=files["melody"]),
              made(system, prompt="flute", melody=files["melody"], guidance_style=2.0)]
    assert all(not torch.equal(a, b) for i, a in enumerate(pieces) for b in pieces[:i])


def test_guidance_of_one_is_the_condition_alone(system):
    """One side is computed, and gives what two would."""
    one, _ = system._piece(SampleRequest(prompt="flute", guidance=1.0, temperature=0), [0], 20)
    assert len(one.sides) == 1
    near, _ = system._piece(SampleRequest(prompt="flute", guidance=1.0000001, temperature=0), [0], 20)
    assert len(near.sides) == 2
    empty = torch.empty(1, 2, 0, dtype=torch.long)
    assert torch.equal(system.write(one, empty), system.write(near, empty))


def test_nothing_to_steer_by_is_one_side(system):
    assert len(system._piece(SampleRequest(), [0], 20)[0].sides) == 1


def test_the_null_of_words_is_padding_and_of_a_melody_silence(system, files):
    piece, _ = system._piece(SampleRequest(prompt="flute", melody=files["melody"]), [0, 1], 20)
    cond = system._window_cond(piece, 0, False, 2)
    assert cond["context_mask"].any(1).tolist() == [True, True, False, False]
    assert (cond["melody"][2:, :, 0] == 1).all() and (cond["melody"][:2, :, 0] == 0).any()
    double, _ = system._piece(SampleRequest(prompt="flute", melody=files["melody"], guidance_style=2.0), [0], 20)
    cond = system._window_cond(double, 0, False, 1)
    assert cond["context_mask"].any(1).tolist() == [True, False, False]
    assert torch.equal(cond["melody"][0], cond["melody"][1]) and (cond["melody"][2, :, 0] == 1).all()


@pytest.mark.parametrize("asked", [{"prompt": "flute"}, {"prompt": "flute", "duration": 0.6}, {}])
def test_a_piece_depends_on_its_seed_alone(system, asked):
    together = made(system, (5, 1, 9), **asked)
    for i, seed in enumerate((5, 1, 9)):
        assert (made(system, (seed,), **asked) - together[i:i + 1]).abs().max() < 1e-5
    assert not torch.equal(together[0], together[1])


@torch.no_grad()
@pytest.mark.parametrize("text", ["cross", "prepend"])
def test_a_run_with_a_cache_is_the_network_called_anew_at_every_step(text):
    """Greedy tokens of a run are the likeliest of one forward pass over all of them."""
    system = loud(tiny(net={"text": text}))
    piece, _ = system._piece(SampleRequest(prompt="flute", guidance=1.0, temperature=0), [0], 15)
    codes = system.write(piece, torch.empty(1, 2, 0, dtype=torch.long))
    from nexus.decode.patterns import delay, undelay
    sequence = delay(codes, system.config.net.pattern, 16)
    scores = system.net(sequence, system._window_cond(piece, 0, False, 1))
    likeliest = F.pad(scores.argmax(-1), (1, 0))[..., :sequence.shape[-1]]
    assert torch.equal(undelay(likeliest, system.config.net.pattern), codes)


# --- length --------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("seconds", [0.004, 0.1, 0.25, 0.2506, 0.7, 1.13])
def test_a_piece_is_as_long_as_asked(system, seconds):
    steps = []
    data = system.generate(SampleRequest(duration=seconds, prompt="flute"), seeds=[0],
                           watch=lambda step, of, *_: steps.append((step, of))).data
    frames = system.config.frames(seconds)
    assert data.shape[-1] == min(max(1, round(1600 * seconds)), 8 * frames)
    assert [step for step, _ in steps] == list(range(steps[0][1])) and len({of for _, of in steps}) == 1
    assert data.isfinite().all() and data.abs().max() <= 1


def test_later_windows_read_what_came_before(system):
    """A window's tokens are those of a run of its own that begins with its context."""
    request = SampleRequest(prompt="flute", temperature=0, duration=0.45)
    piece, _ = system._piece(request, [0], system.config.frames(0.45))
    whole = system.write(piece, torch.empty(1, 2, 0, dtype=torch.long))
    size, stride = system.config.frames(0.25), system.config.frames(0.15)
    assert (size, stride, whole.shape[-1]) == (50, 30, 90)
    first = system.write(piece._replace(frames=size), torch.empty(1, 2, 0, dtype=torch.long))
    assert torch.equal(whole[..., :size], first)
    second = system.write(piece._replace(frames=size), first[..., stride:])
    assert torch.equal(whole[..., size:stride + size], second[..., size - stride:])


def test_what_is_watched_can_be_heard(system):
    heard = []
    system.generate(SampleRequest(duration=0.4), seeds=[0, 1],
                    watch=lambda step, of, codes, decode: heard.append(decode(codes).shape[-1]))
    assert heard == sorted(heard) and heard[-1] == 80 * 8


def test_a_melody_is_repeated_over_a_long_piece(system, files):
    melody = torch.randn(1, 300).cumsum(1) * 0.05
    whole = system.config.melody.frames(400)
    short = melody_in_window(system, melody, 0, False, 1).vectors
    from nexus.codecs.chroma import chroma
    heard = chroma(melody, 1600, system.config.melody)
    assert short.shape[1] == whole and torch.equal(short[:, :heard.shape[1]], heard)
    assert torch.equal(short[:, heard.shape[1]:], heard[:, :whole - heard.shape[1]])
    later = melody_in_window(system, melody, 350, True, 1).vectors
    assert torch.equal(later, chroma(torch.cat([melody, melody, melody], 1)[:, 350:750], 1600, system.config.melody))
    assert torch.equal(later, melody_in_window(system, melody, 50, True, 1).vectors)


def test_a_sound_is_gone_on_with(system, files):
    known = system._known(SampleRequest(continued=files["begun"]), 2)
    assert known.shape == (2, 2, 113)
    data = made(system, (0, 1), continued=files["begun"])
    assert data.shape[-1] == round(1600 * (0.25 + 113 / 200))
    begun = system.codec.from_codes(known[:1])[..., :700].clamp(-1, 1)
    assert (data[:1, :, :700] - begun).abs().max() < 0.1    # the codec's LSTM looks at all that follows
    with pytest.raises(InputError, match="0.5625 s long"):
        made(system, continued=files["begun"], duration=0.5)


def test_a_sound_of_two_channels_has_twice_the_codebooks(files):
    net = {"codebooks": 4, "delays": (0, 0, 1, 1)}
    config = MusicGenConfig.parse(MusicGenConfig.preset("tiny").to_json() | {
        "net": MusicGenConfig.preset("tiny").net.to_json() | net,
        "codec": {"net": MusicGenConfig.preset("tiny").codec.net.to_json() | {"channels": 2, "interleave": "rows"}}})
    system = loud(config)
    assert made(system, (0, 1), prompt="flute", continued=files["begun"]).shape[1] == 2
    assert system.loss(batch() | {"audio": torch.randn(3, 2, 400) * 0.1}, rng(), 0)["loss"].isfinite()


@pytest.mark.parametrize("kind", [torch.bfloat16])
def test_half_precision(kind):
    system = loud(tiny()).to(kind)
    assert made(system, (0, 1), prompt="flute", duration=0.4).isfinite().all()


# --- what is refused -----------------------------------------------------------------------------------------------

def test_what_it_cannot_do_is_said(system, files):
    for asked, error in (({"width": 64}, UsageError), ({"steps": 4}, UsageError),
                         ({"prompt": "flute", "guidance_style": 2.0}, UsageError),
                         ({"melody": "/no/such.wav"}, InputError), ({"continued": files["begun"] + "x"}, InputError)):
        with pytest.raises(error):
            made(system, **asked)
    mute = loud(tiny(net={"chroma": 0, "text": "none"}))
    for asked in ({"melody": files["melody"]}, {"prompt": "flute"}):
        with pytest.raises((UsageError, InputError)):
            made(mute, **asked)
    assert made(mute).isfinite().all()


def test_a_model_without_its_codec_says_so():
    system = tiny(codec={"weights": ""}).build().eval()
    assert system.codec is None and system.external == {}
    with pytest.raises(ModelError, match="without its codec"):
        made(system)
    named = tiny(codec={"weights": "some-codec"}).build()
    assert named.external == {"codec": "some-codec"}


def test_a_codec_of_other_tokens_is_refused():
    from nexus.models.audio.encodec import EncodecSystemConfig
    system = tiny(codec={"weights": "some-codec"}).build()
    fits = EncodecSystemConfig.preset("tiny")
    system.admit("codec", fits.build())
    with pytest.raises(ModelError, match="other tokens"):
        system.admit("codec", fits.model_copy(update={"net": fits.net.model_copy(update={"rate": 800})}).build())


@pytest.mark.parametrize("changes, said", [
    ({"net": {"bins": 17}}, "codebooks"), ({"stride": 0.3}, "stride"), ({"net": {"chroma": 11}}, "chroma"),
    ({"net": {"delays": (0,)}}, "delays"), ({"net": {"heads": 3}}, "heads")])
def test_settings_that_do_not_go_together_are_refused(changes, said):
    with pytest.raises(InputError, match=said):
        tiny(**changes)


def test_the_zoo_preset_is_small():
    with torch.device("meta"):
        system = MusicGenConfig.preset("music").build()
    count = sum(p.numel() for part in (system.net, system.conditioner) for p in part.parameters())
    assert count <= 10_000_000 and system.config.codec.weights == "music-codec"


def test_words_come_from_the_data(system):
    class Facts:
        words, classes, styles = ("drums", "flute"), (), ()
    fitted = system.config.adapt(Facts)
    assert fitted.conditioner.encoder.words == ("drums", "flute")
    assert fitted.build().net.text.in_features == fitted.conditioner.encoder.dim
