"""EnCodec against audiocraft's (saved numbers) and transformers' (built tiny and random), and back to their files."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus import checkpoint
from nexus.codecs.encodec import EncodecConfig
from nexus.convert.convert import convert
from nexus.convert.keymap import to_foreign, to_native
from nexus.convert.layouts.encodec import LAYOUTS, audiocraft
from nexus.errors import ModelError
from tests.parity.whole import assert_close, shapes

BY_NAME = {layout.name: layout for layout in LAYOUTS}
FOLDER = Path(os.environ.get("NEXUS_PARITY", Path(__file__).parents[3] / "shared" / "parity"))
CASES = ("encodec-original-a", "encodec-original-c-causal")
needs_cases = pytest.mark.skipif(not all((FOLDER / case).is_dir() for case in CASES),
                                 reason=f"no parity cases at {FOLDER}; set NEXUS_PARITY")
PUBLISHED = {"24khz": (14_846_817, 14_851_810, 4_194_304), "32khz": (56_876_737, 56_884_674, 1_048_576)}
SMALL = {"num_filters": 4, "hidden_size": 8, "upsampling_ratios": [4, 2], "codebook_size": 16}
# Of the published 24, 32 and 48 kHz, with smaller sizes; 48 kHz in segments of 0.1 seconds.
TRANSFORMERS = {
    "replicate": {"sampling_rate": 2400, "target_bandwidths": [1.2, 2.4, 4.8], "pad_mode": "replicate"},
    "24khz": {"sampling_rate": 2400, "target_bandwidths": [1.2, 2.4, 4.8]},
    "32khz": {"sampling_rate": 3200, "target_bandwidths": [6.4], "use_causal_conv": False,
              "use_conv_shortcut": False, "num_lstm_layers": 1},
    "48khz": {"sampling_rate": 4800, "target_bandwidths": [4.8, 9.6], "use_causal_conv": False, "audio_channels": 2,
              "norm_type": "time_group_norm", "normalize": True, "chunk_length_s": 0.1, "overlap": 0.05},
    "deep": {"sampling_rate": 2400, "target_bandwidths": [3.2], "num_residual_layers": 2, "upsampling_ratios": [3, 2],
             "pad_mode": "constant", "compress": 4, "kernel_size": 5, "residual_kernel_size": 5,
             "dilation_growth_rate": 3, "trim_right_ratio": 0.4},
}


def count(net, end=""):
    return sum(p.numel() for name, p in net.named_parameters() if name.endswith(end))


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_counts(name):
    with torch.device("meta"):
        net = EncodecConfig.preset(name).build()
    plain, whole, rows = PUBLISHED[name]
    assert (count(net) - count(net, "gain"), count(net)) == (plain, whole)
    assert sum(b.numel() for key, b in net.named_buffers() if key.endswith("embed")) == rows


# --- the original's files ------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=CASES)
def case(request, tmp_path_factory):
    """(case.json, the native network and its conversion's report, the foreign state dict, saved tensors, a folder)."""
    there, here = FOLDER / request.param, tmp_path_factory.mktemp(request.param)
    report = convert(there / "checkpoint.pt", here / "ours")
    state = torch.load(there / "checkpoint.pt", weights_only=True)["best_state"]
    net = checkpoint.load(str(here / "ours"), device="cpu").net
    return json.loads((there / "case.json").read_text()), net, report, state, \
        load_file(there / "tensors.safetensors"), here


@needs_cases
def test_audiocrafts_settings_are_read_from_the_text_in_its_file(case):
    said, net, report, *_ = case
    c, seanet = net.config, said["seanet"]
    assert report.layout == "encodec/original" and not report.assumed
    assert (c.causal, c.padding, c.rate) == (seanet["causal"], seanet["pad_mode"], said["model"]["sample_rate"])
    assert (c.quantizers, c.bins, c.hop) == (4, 16, 8) and c.lstm == seanet["lstm"]
    assert count(net) == said["params"]


@needs_cases
@torch.no_grad()
def test_audiocrafts_codes_and_sound(case):
    _, net, _, _, saved, _ = case
    wav = saved["wav"]
    assert net.frames(wav.shape[-1]) == saved["codes"].shape[-1]
    assert_close(net.latents(wav), saved["emb"])
    assert torch.equal(net.codes(wav), saved["codes"])
    assert torch.equal(net.codes(wav, 2), saved["codes"][:, :2])
    assert_close(net.quantizer.decode(saved["codes"]), saved["latent"])
    assert_close(net.from_codes(saved["codes"]), saved["decoded"])
    assert_close(net.from_codes(saved["codes"][:, :2]), saved["decoded_2_codebooks"])
    assert_close(net(wav).audio, saved["forward_x"])
    assert_close(net.decode(net.encode(wav), wav.shape[-1]), saved["forward_x"])


@needs_cases
@torch.no_grad()
@pytest.mark.parametrize("way, name", [("rows", "false"), ("frames", "true")])
def test_a_mono_codec_hears_both_channels(case, way, name):
    _, net, _, _, saved, _ = case
    both = EncodecConfig.parse(net.config.to_json() | {"channels": 2, "interleave": way}).build()
    both.load_state_dict(net.state_dict())
    x = torch.cat([saved["wav"], saved["wav"].flip(0)], 1)
    codes = both.codes(x)
    assert torch.equal(codes, saved[f"stereo_codes_per_timestep_{name}"])
    assert codes.shape[1:] == (both.config.codebooks, both.frames(x.shape[-1]))
    assert_close(both.from_codes(codes), saved[f"stereo_decoded_per_timestep_{name}"])


@needs_cases
def test_audiocrafts_file_comes_back_byte_for_byte(case):
    _, _, _, state, _, here = case
    convert(here / "ours", here / "back.safetensors", to="original")
    back = load_file(here / "back.safetensors")
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in back)


@needs_cases
def test_a_bare_state_dict_takes_what_it_does_not_tell_from_the_published_codec(case, tmp_path):
    _, net, _, state, *_ = case
    torch.save(state, tmp_path / "bare.th")
    report = convert(tmp_path / "bare.th", tmp_path / "ours",
                     overrides=[f"net.causal={str(net.config.causal).lower()}", "net.rate=16000"])
    assert report.assumed["net.padding"] == "constant" and "net.rate" not in report.assumed
    assert EncodecConfig.parse(report.config["net"]) == net.config


@pytest.mark.parametrize("name", ["24khz", "32khz", "48khz"])
def test_the_published_files_map_both_ways_on_meta(name):
    preset = EncodecConfig.preset(name)
    with torch.device("meta"):
        native = preset.build().state_dict()
    config = {"net": preset.to_json()}
    for layout in LAYOUTS:
        foreign = to_foreign(layout.table(config), native)
        seen = shapes(foreign | layout.constants(config))
        said = layout.foreign_config and layout.foreign_config(config)
        if name != "48khz" or layout.name != "transformers-2023":       # without weight norms both have the same names
            assert [one.name for one in LAYOUTS if one.matches(seen, said)] == [layout.name]
        assert EncodecConfig.parse(layout.config(seen, said)["net"]) == preset
        assert shapes(to_native(layout.table(config), foreign)) == shapes(native)


# --- transformers --------------------------------------------------------------------------------------------------

def random_model(fields):
    """A model whose layers all speak, and whose codebooks lie among the encoder's outputs."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.EncodecModel(transformers.EncodecConfig(**SMALL | fields)).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn_like(p) * (0.3 if p.ndim > 1 else 0.1) + (1.0 if "original0" in name else 0.0))
        for i, layer in enumerate(model.quantizer.layers):
            book = layer.codebook
            book.embed.copy_(torch.randn_like(book.embed) * 0.7 ** i)
            book.embed_avg.copy_(book.embed * 3)
            book.cluster_size.fill_(3)
    return model


@pytest.fixture(scope="module", params=TRANSFORMERS)
def pair(request, tmp_path_factory):
    """transformers' model, the native network converted from its folder, and where both lie."""
    folder, model = tmp_path_factory.mktemp(request.param), random_model(TRANSFORMERS[request.param])
    model.save_pretrained(folder / "theirs")
    report = convert(folder / "theirs", folder / "ours")
    assert report.layout == "encodec/transformers" and not report.dropped and not report.assumed
    return model, checkpoint.load(str(folder / "ours"), device="cpu").net, folder


@torch.no_grad()
@pytest.mark.parametrize("samples", [479, 1200, 3])
def test_codes_and_sound_are_transformers(pair, samples):
    model, net, _ = pair
    c = net.config
    x = torch.randn(2, c.channels, samples) * 0.5
    for width, number in zip(model.config.target_bandwidths, c.choices or (c.quantizers,), strict=True):
        theirs = model.encode(x, bandwidth=width)
        ours = net.encode(x, number)
        lengths = [part.ids.shape[-1] for part in ours]
        assert len(ours) == len(theirs.audio_codes)
        for part, ids, scale in zip(ours, theirs.audio_codes, theirs.audio_scales, strict=True):
            assert torch.equal(part.ids, ids[..., :part.ids.shape[-1]]) and part.ids.shape[1] == number
            assert (part.scale is None) == (scale is None)
            if scale is not None:
                assert_close(part.scale.flatten(), scale.flatten())
        made = model.decode(theirs.audio_codes, theirs.audio_scales,
                            last_frame_pad_length=lengths[0] - lengths[-1]).audio_values
        assert_close(net.decode(ours), made)
        if not c.normalize:
            assert torch.equal(net.codes(x, number), ours[0].ids)
            assert_close(net.from_codes(ours[0].ids), made)
            assert c.hop * net.frames(samples) == made.shape[-1]


def test_a_folder_comes_back_byte_for_byte(pair):
    model, _, folder = pair
    convert(folder / "ours", folder / "back", to="transformers")
    before, after = (load_file(folder / name / "model.safetensors") for name in ("theirs", "back"))
    assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
    said, again = (json.loads((folder / name / "config.json").read_text()) for name in ("theirs", "back"))
    assert {k: v for k, v in said.items() if k != "transformers_version"} == again


@torch.no_grad()
def test_transformers_reads_what_we_write(pair):
    model, net, folder = pair
    convert(folder / "ours", folder / "read", to="transformers")
    again = type(model).from_pretrained(folder / "read").eval()
    x = torch.randn(1, net.config.channels, 480)
    width = model.config.target_bandwidths[-1]
    assert torch.equal(again(x, bandwidth=width).audio_values, model(x, bandwidth=width).audio_values)


def test_names_of_2023_are_read(pair, tmp_path):
    model, net, folder = pair
    if net.config.norm != "weight":
        pytest.skip("without weight norms the names are today's")
    state = {key.replace("parametrizations.weight.original0", "weight_g").replace(
        "parametrizations.weight.original1", "weight_v"): tensor for key, tensor in model.state_dict().items()}
    (tmp_path / "theirs").mkdir()
    save_file(state, tmp_path / "theirs/model.safetensors")
    (tmp_path / "theirs/config.json").write_text((folder / "theirs/config.json").read_text())
    assert convert(tmp_path / "theirs", tmp_path / "ours").layout == "encodec/transformers-2023"
    ours = checkpoint.load(str(tmp_path / "ours"), device="cpu").net
    assert all(torch.equal(tensor, net.state_dict()[key]) for key, tensor in ours.state_dict().items())


def test_what_transformers_cannot_hold_is_refused():
    plain = EncodecConfig.preset("24khz")
    for changes, said in (({"bins": 1000}, "power of two"), ({"lstm": 0}, "LSTM"), ({"norm": "none"}, "norms"),
                          ({"choices": (2, 4)}, "widest")):
        with pytest.raises(ModelError, match=said):
            BY_NAME["transformers"].foreign_config({"net": plain.model_copy(update=changes).to_json()})


@torch.no_grad()
@pytest.mark.parametrize("name", ["24khz", "32khz", "48khz"])
def test_the_published_shapes_are_transformers(name):
    """Random weights of the published sizes, on a quarter of a second."""
    transformers = pytest.importorskip("transformers")
    said = BY_NAME["transformers"].foreign_config({"net": EncodecConfig.preset(name).to_json()})
    torch.manual_seed(0)
    model = transformers.EncodecModel(transformers.EncodecConfig(**said)).eval()
    for i, layer in enumerate(model.quantizer.layers):
        torch.nn.init.normal_(layer.codebook.embed, std=0.5 * 0.9 ** i)
    layout, state = BY_NAME["transformers"], model.state_dict()
    config = layout.config(shapes(state), said)
    net = EncodecConfig.parse(config["net"]).build().eval()
    constants = layout.constants(config)
    net.load_state_dict(to_native(layout.table(config), {k: t for k, t in state.items() if k not in constants}))
    x = torch.randn(1, net.config.channels, net.config.rate // 4) * 0.1
    width = model.config.target_bandwidths[-1]
    theirs, ours = model(x, bandwidth=width), net.encode(x)
    assert torch.equal(torch.stack([part.ids for part in ours]), theirs.audio_codes)
    assert_close(net.decode(ours, x.shape[-1]), theirs.audio_values)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{"lstm": 0, "blocks": 3, "norm": "none"}, {"norm": "group", "lstm": 3, "blocks": 2},
                                    {"shortcut": "conv", "compress": 4, "filters": 8, "kernel": 3, "channels": 2}])
def test_codecs_of_every_kind_go_out_and_come_back(fields, tmp_path):
    torch.manual_seed(1)
    net = EncodecConfig.parse(EncodecConfig.presets["tiny"] | fields).build().eval()
    state = to_foreign(BY_NAME["original"].table({"net": net.config.to_json()}), net.state_dict())
    said = {"encodec": {"sample_rate": 1600, "causal": False, "renormalize": False},
            "seanet": {"pad_mode": "constant", "dilation_base": 2}, "rvq": {"n_q": 2, "q_dropout": True}}
    torch.save({"best_state": state | BY_NAME["original"].constants({"net": net.config.to_json()}),
                "xp.cfg": json.dumps(said)}, tmp_path / "codec.th")
    report = convert(tmp_path / "codec.th", tmp_path / "ours")
    ours = checkpoint.load(str(tmp_path / "ours"), device="cpu").net
    assert not report.assumed and ours.config.model_copy(update={"dead": 0.5}) == net.config
    x = torch.randn(1, net.config.channels, 100)
    assert torch.equal(ours.from_codes(ours.codes(x)), net.from_codes(net.codes(x)))


def test_settings_that_this_codec_has_not_are_refused():
    for said in ({"seanet": {"activation": "ReLU"}}, {"seanet": {"decoder": {"final_activation": "Tanh"}}},
                 {"encodec": {"quantizer": "no_quant"}}, {"seanet": {"disable_norm_outer_blocks": 2}}):
        with pytest.raises(ModelError):
            audiocraft(said)


def test_a_padding_that_this_codec_has_not_is_told_with_its_file(tmp_path):
    pytest.importorskip("transformers")
    random_model({"pad_mode": "circular"}).save_pretrained(tmp_path / "theirs")
    with pytest.raises(ModelError, match="theirs is of a kind that this network has not.*padding"):
        convert(tmp_path / "theirs", tmp_path / "ours")
