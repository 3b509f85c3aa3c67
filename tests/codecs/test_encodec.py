"""EnCodec: sizes, what is heard when, pieces and segments, loudness, two channels through a mono network."""

import pytest
import torch

from nexus.codecs import encodec
from nexus.codecs.encodec import EncodecConfig, EncodecNet, overlapped
from nexus.errors import InputError, ModelError
from nexus.nn.seanet import padded

KINDS = {"tiny": {}, "causal": {"causal": True, "padding": "reflect"}, "shortcut": {"shortcut": "conv", "blocks": 2},
         "odd": {"ratios": (5, 3), "kernel": 5, "padding": "reflect"}, "plain": {"lstm": 0, "norm": "none"},
         "trimmed": {"causal": True, "trim_right": 0.5}}
every_kind = pytest.mark.parametrize("kind", KINDS)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def codec(kind="tiny", **changes) -> EncodecNet:
    """Random, with rows among what the encoder gives."""
    torch.manual_seed(0)
    net = EncodecConfig.parse(EncodecConfig.presets["tiny"] | KINDS[kind] | changes).build().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.mul_(1.3)
        for i, book in enumerate(net.quantizer.books):
            book.embed.copy_(random(*book.embed.shape, seed=i) * 0.5 ** i)
    return net


@every_kind
@torch.no_grad()
@pytest.mark.parametrize("samples", [1, 7, 64, 403])
def test_shapes_are_what_the_configuration_says(kind, samples):
    net = codec(kind)
    c, x = net.config, random(2, 1, samples)
    ids = net.codes(x)
    assert ids.dtype == torch.int64 and ids.shape == (2, c.codebooks, net.frames(samples))
    assert net.frames(samples) == -(-samples // c.hop) and ids.max() < c.bins
    assert net.from_codes(ids).shape == (2, 1, net.frames(samples) * c.hop)
    assert net(x).audio.shape == x.shape and c.frame_rate * c.hop == c.rate


@pytest.mark.parametrize("name, facts", [("24khz", (24_000, 1, 320, 32, 1024)), ("32khz", (32_000, 1, 640, 4, 2048)),
                                         ("48khz", (48_000, 2, 320, 16, 1024)), ("music", (16_000, 1, 320, 4, 1024)),
                                         ("speech", (16_000, 1, 320, 8, 1024))])
def test_facts_of_the_presets(name, facts):
    c = EncodecConfig.preset(name)
    assert (c.rate, c.channels, c.hop, c.codebooks, c.bins) == facts


def test_the_small_presets_are_small():
    for name in ("music", "speech"):
        with torch.device("meta"):
            net = EncodecConfig.preset(name).build()
        assert sum(p.numel() for p in net.parameters()) < 6_000_000


@torch.no_grad()
@pytest.mark.parametrize("padding, times", [("constant", (8, 123, 399)), ("reflect", (123, 200, 399))])
def test_a_causal_codec_does_not_hear_the_future(padding, times):
    """Save that a mirrored beginning is heard before it comes."""
    net = codec("causal", padding=padding)
    x = random(1, 1, 400)
    for t in times:
        other = torch.cat([x[..., :t], random(1, 1, 400 - t, seed=9)], 2)
        whole = t // net.config.hop                             # frames that are over at t
        assert torch.equal(net.codes(x)[..., :whole], net.codes(other)[..., :whole])
        before = whole * net.config.hop
        torch.testing.assert_close(net(x).audio[..., :before], net(other).audio[..., :before], atol=1e-6, rtol=0)
        assert not torch.equal(net.latents(x), net.latents(other))


@torch.no_grad()
def test_the_other_codec_hears_a_little_of_the_future():
    net, x = codec(), random(1, 1, 400)
    other = torch.cat([x[..., :200], random(1, 1, 200, seed=9)], 2)
    before = (net.latents(x) - net.latents(other))[..., :200 // net.config.hop].abs().amax(1)[0]
    assert before[-1] > 0 and before[:-net.config.reach].max() == 0


@every_kind
@torch.no_grad()
@pytest.mark.parametrize("samples", [403, 400])
def test_pieces_give_what_the_whole_gives(kind, samples, monkeypatch):
    net, x = codec(kind), random(2, 1, samples)
    net.tile = "off"
    z, ids = net.latents(x), net.codes(x)
    whole = net.from_codes(ids)
    net.tile = "on"
    for frames in (1, 7, 20):
        monkeypatch.setattr(encodec, "PIECE_SECONDS", frames * net.config.hop / net.config.rate + 1e-6)
        assert net._piece()["size"] == frames
        torch.testing.assert_close(net.latents(x), z, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(net.from_codes(ids), whole, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_less_context_than_the_reach_would_not_do(monkeypatch):
    net, x = codec("shortcut"), random(1, 1, 400)
    z, before = net.latents(x), net.decode_latents(net.latents(x))
    net.tile = "on"
    monkeypatch.setattr(encodec, "PIECE_SECONDS", 0.05)
    monkeypatch.setattr(EncodecConfig, "reach", 0)
    assert (net.latents(x) - z).abs().max() > 1e-3
    assert (net.decode_latents(z) - before).abs().max() > 1e-3


@torch.no_grad()
def test_long_sound_goes_in_pieces_unless_told_otherwise(monkeypatch):
    monkeypatch.setattr(encodec, "WHOLE_SECONDS", 0.1)
    net = codec()
    assert net._tiled(161) and not net._tiled(160)
    net.tile = "off"
    assert not net._tiled(10**9)
    assert not codec(norm="group")._tiled(10**9)                # a norm that looks at everything
    with torch.enable_grad():
        assert not codec()._tiled(10**9)


# --- loudness and segments -----------------------------------------------------------------------------------------

@torch.no_grad()
def test_loudness_goes_through():
    net = codec(normalize=True)
    x = random(2, 1, 160)
    quiet, (part,) = net.encode(0.01 * x), net.encode(x)
    assert torch.equal(quiet[0].ids, part.ids)
    torch.testing.assert_close(quiet[0].scale, 0.01 * part.scale)
    torch.testing.assert_close(part.scale.flatten(), x.square().mean((1, 2)).sqrt())
    torch.testing.assert_close(net.decode(quiet, 160), 0.01 * net.decode([part], 160), atol=1e-6, rtol=1e-4)
    assert net.decode(net.encode(torch.zeros(1, 1, 160))).isfinite().all()


def test_ids_that_do_not_say_all_are_refused():
    for changes in ({"normalize": True}, {"segment": 0.1}):
        net = codec(**changes)
        with pytest.raises(ModelError, match="loudness"):
            net.codes(torch.zeros(1, 1, 160))
        with pytest.raises(ModelError, match="loudness"):
            net.from_codes(torch.zeros(1, 2, 20, dtype=torch.long))


def test_segments_of_one_sound_make_it_again():
    """Whatever fades out fades in elsewhere: pieces of a sound, each as it was, are the sound."""
    x = random(2, 2, 407)
    for size, step in ((100, 90), (100, 50), (64, 63), (50, 50)):
        parts = [x[..., start:start + size] for start in range(0, x.shape[-1], step)]
        torch.testing.assert_close(overlapped(parts, step), x)


def test_a_segment_may_end_after_the_next_one():
    """Whole frames are decoded: a segment that was cut short, and one of the few samples behind it."""
    made = overlapped([torch.ones(1, 1, 100), torch.ones(1, 1, 100), torch.ones(1, 1, 8)], 90)
    torch.testing.assert_close(made, torch.ones(1, 1, 190))


@torch.no_grad()
def test_sound_of_any_length_comes_back_in_segments():
    config = EncodecConfig.preset("tiny")
    hop = config.rate / config.frame_rate
    net = EncodecConfig.parse(config.to_json() | {"normalize": True, "segment": 10 * hop / config.rate, "overlap": 0.1,
                                                  "interleave": "none"}).build()
    for samples in range(int(17 * hop), int(20 * hop), 3):
        x = random(1, config.channels, samples)
        assert net.decode(net.encode(x), samples).shape == x.shape


def test_segments_fade_in_a_straight_line():
    made = overlapped([torch.zeros(1, 1, 100), torch.ones(1, 1, 100)], 80)[0, 0]
    assert (made[:80] == 0).all() and (made[100:] == 1).all()
    torch.testing.assert_close(made[80:100].diff(), torch.full((19,), 1 / 21), atol=1e-5, rtol=0)


@torch.no_grad()
def test_each_segment_is_coded_alone():
    net, x = codec(segment=0.1, overlap=0.1, normalize=True), random(1, 1, 500)
    parts = net.encode(x)
    assert [p.ids.shape[-1] for p in parts] == [20, 20, 20, 9] and net.decode(parts, 500).shape == x.shape
    alone = net.encode(x[..., 144:304])
    assert torch.equal(alone[0].ids, parts[1].ids)
    made = net.decode(parts)                                    # away from the seams it is that segment's sound
    torch.testing.assert_close(made[..., 160:288], net.decode(alone[:1])[..., 16:144], atol=1e-5, rtol=1e-4)


# --- channels ------------------------------------------------------------------------------------------------------

@torch.no_grad()
@pytest.mark.parametrize("way", ["rows", "frames"])
def test_two_channels_through_a_mono_network(way):
    mono, both = codec(), codec(channels=2, interleave=way)
    both.load_state_dict(mono.state_dict())
    x = random(3, 2, 160)
    ids, left, right = both.codes(x), mono.codes(x[:, :1]), mono.codes(x[:, 1:])
    assert ids.shape == (3, both.config.codebooks, both.frames(160))
    ours = (ids[:, 0::2], ids[:, 1::2]) if way == "rows" else (ids[..., 0::2], ids[..., 1::2])
    assert torch.equal(ours[0], left) and torch.equal(ours[1], right)
    sought = torch.cat([mono.from_codes(left), mono.from_codes(right)], 1)
    torch.testing.assert_close(both.from_codes(ids), sought, atol=1e-5, rtol=1e-4)
    assert both.config.frame_rate * both.config.hop == both.config.rate


def test_another_number_of_channels_is_refused():
    with pytest.raises(InputError, match="2 channels"):
        codec().codes(torch.zeros(1, 2, 160))


@torch.no_grad()
def test_a_stereo_network_hears_both():
    net, x = codec(channels=2), random(1, 2, 160)
    assert net.from_codes(net.codes(x)).shape == x.shape
    assert not torch.equal(net.latents(x), net.latents(x.flip(1)))


# --- the layers ----------------------------------------------------------------------------------------------------

def test_the_gain_is_the_length_of_the_weight():
    conv = codec("shortcut").encoder.stages[0].resample
    weight = conv._weight()
    torch.testing.assert_close(weight.norm(dim=(1, 2)), conv.gain.flatten())
    with torch.no_grad():
        conv.conv.weight.mul_(7.0)
    torch.testing.assert_close(conv._weight(), weight)          # only its direction counts
    gradient = torch.autograd.grad((conv._weight() * random(*weight.shape)).sum(), conv.conv.weight)[0]
    torch.testing.assert_close((gradient * conv.conv.weight).sum((1, 2)), torch.zeros(len(weight)), atol=1e-5, rtol=0)


def test_a_new_network_has_the_weights_it_was_drawn_with():
    torch.manual_seed(0)
    for part in EncodecConfig.preset("tiny").build().modules():
        if hasattr(part, "gain"):
            torch.testing.assert_close(part._weight(), part.conv.weight)


@torch.no_grad()
@pytest.mark.parametrize("name", ["music", "24khz"])
def test_a_new_network_lets_sound_through(name):
    """Neither so quiet that nothing of it arrives, nor much louder."""
    torch.manual_seed(0)
    net, x = EncodecConfig.preset(name).build(), 0.15 * random(1, 1, 4800)
    z = net.latents(x)
    assert 0.5 < z.std() / x.std() < 5 and 0.5 < net.decode_latents(z).std() / x.std() < 5


@pytest.mark.parametrize("samples", [1, 3, 9])
def test_padding_of_sound_that_is_too_short_to_be_mirrored(samples):
    x = random(1, 1, samples)
    made = padded(x, 5, 4, "reflect")
    assert made.shape[-1] == samples + 9 and torch.equal(made[..., 5:5 + samples], x)
    assert torch.equal(padded(x, 5, 4, "constant")[..., :5], torch.zeros(1, 1, 5))


@every_kind
@torch.no_grad()
def test_an_item_does_not_see_its_batch(kind):
    net, x = codec(kind), random(3, 1, 100)
    ids = net.codes(x)
    for i in range(3):
        assert torch.equal(net.codes(x[i:i + 1])[0], ids[i])
        torch.testing.assert_close(net.from_codes(ids[i:i + 1])[0], net.from_codes(ids)[i], atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_bfloat16_makes_nearly_the_same_sound():
    net, x = codec(), random(1, 1, 160)
    ids = net.codes(x)
    exact = net.from_codes(ids)
    half = net.to(torch.bfloat16)
    assert half.codes(x).shape == ids.shape and half.from_codes(ids).dtype == torch.float32
    assert (half.from_codes(ids) - exact).abs().max() < 0.1 * exact.abs().max()


@pytest.mark.parametrize("changes", [{"ratios": ()}, {"filters": 1}, {"choices": (3,)}, {"choices": (0,)},
                                     {"channels": 3}, {"interleave": "rows"}, {"overlap": 1.0},
                                     {"channels": 2, "interleave": "frames", "ratios": (3,)},
                                     {"channels": 2, "interleave": "rows", "normalize": True}])
def test_what_does_not_fit_is_refused(changes):
    with pytest.raises(InputError):
        EncodecConfig.parse(EncodecConfig.presets["tiny"] | changes)
