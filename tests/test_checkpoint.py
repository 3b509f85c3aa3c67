"""Models on disk: what is written comes back, what is damaged or hostile is refused, nothing is executed."""

import json
import os
import random
import struct
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from nexus import api, checkpoint, stored
from nexus.errors import DeviceError, ModelError, OutputError
from nexus.images import write_image
from nexus.models.cv.vae.vae import VAEConfig
from nexus.train.start import train

SLOW = os.environ.get("NEXUS_SLOW") == "1"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return VAEConfig.preset("tiny").build()


@pytest.fixture
def saved(model, tmp_path):
    checkpoint.save_model(tmp_path / "model", "vae", model.config.to_json(), model.state_dict())
    return tmp_path / "model"


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) and a[n].dtype == b[n].dtype for n in a)


def header_and_data(path):
    raw = path.read_bytes()
    size = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8:8 + size]), raw[8 + size:]


def with_header(path, header, data):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


# --- there and back ------------------------------------------------------------------------------------------------

def test_a_saved_model_is_loaded_bit_for_bit_and_in_eval_mode(model, saved):
    loaded = checkpoint.load(str(saved), device="cpu")
    assert equal(loaded.state_dict(), model.state_dict()) and loaded.config == model.config and not loaded.training
    assert checkpoint.verify(saved) == []


def test_equal_models_give_equal_bytes(model, saved, tmp_path):
    checkpoint.save_model(tmp_path / "again", "vae", model.config.to_json(), dict(reversed(model.state_dict().items())))
    for name in ("model.safetensors", "config.json", "manifest.json"):
        assert (saved / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_a_stray_file_still_says_what_it_is(model, saved, tmp_path):
    (saved / "model.safetensors").rename(tmp_path / "stray.safetensors")
    loaded = checkpoint.load(str(tmp_path / "stray.safetensors"), device="cpu")
    assert equal(loaded.state_dict(), model.state_dict())


def test_averaged_weights_are_preferred(model, tmp_path):
    average = {n: t + 1 for n, t in model.state_dict().items()}
    checkpoint.save_model(tmp_path / "m", "vae", model.config.to_json(), model.state_dict(),
                          extra={"ema.safetensors": checkpoint.tensor_bytes(average)})
    assert equal(checkpoint.load(str(tmp_path / "m"), device="cpu").state_dict(), average)


def test_a_run_folder_means_its_newest_checkpoint(model, tmp_path):
    for step in (9, 10, 100):
        state = {n: torch.full_like(t, step) for n, t in model.state_dict().items()}
        checkpoint.save_model(tmp_path / f"step-{step:07d}", "vae", model.config.to_json(), state)
    (tmp_path / "step-0000200.bad").mkdir()
    loaded = checkpoint.load(str(tmp_path), device="cpu")
    assert all((t == 100).all() for t in loaded.state_dict().values())


def test_types_are_kept_or_changed_as_asked(model, saved):
    for dtype, wanted in (("auto", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
        loaded = checkpoint.load(str(saved), device="cpu", dtype=dtype)
        assert {p.dtype for p in loaded.parameters()} == {wanted}


def test_half_precision_files_run_in_float32_on_the_cpu(model, tmp_path):
    state = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in model.state_dict().items()}
    checkpoint.save_model(tmp_path / "half", "vae", model.config.to_json(), state)
    loaded = checkpoint.load(str(tmp_path / "half"), device="cpu")
    assert {p.dtype for p in loaded.parameters()} == {torch.float32}
    assert all(torch.equal(t.float(), loaded.state_dict()[n].float()) for n, t in state.items())


def test_an_existing_folder_is_not_replaced_unasked(model, saved):
    before = (saved / "model.safetensors").read_bytes()
    other = {n: t * 0 for n, t in model.state_dict().items()}
    with pytest.raises(OutputError):
        checkpoint.save_model(saved, "vae", model.config.to_json(), other)
    assert (saved / "model.safetensors").read_bytes() == before
    checkpoint.save_model(saved, "vae", model.config.to_json(), other, exists="overwrite")
    assert (saved / "model.safetensors").read_bytes() != before and checkpoint.verify(saved) == []
    assert [p.name for p in saved.parent.iterdir()] == ["model"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_never_saved(model, tmp_path, value):
    state = {n: t.clone() for n, t in model.state_dict().items()}
    name = sorted(state)[2]
    state[name].view(-1)[0] = value
    with pytest.raises(ModelError, match=name.replace(".", r"\.")):
        checkpoint.save_model(tmp_path / "m", "vae", model.config.to_json(), state)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_files_get_the_mode_that_the_umask_asks_for(model, tmp_path, umask):
    old = os.umask(umask)
    try:
        checkpoint.save_model(tmp_path / "m", "vae", model.config.to_json(), model.state_dict())
    finally:
        os.umask(old)
    for path in (tmp_path / "m").iterdir():
        assert path.stat().st_mode & 0o777 == 0o666 & ~umask


def test_frozen_parts_are_neither_saved_nor_wanted(model):
    whole = nn.Module()
    whole.net, whole.codec, whole.external = nn.Linear(2, 2), model.net, {"codec": "picture-codec"}
    whole.codec2 = nn.Linear(1, 1)
    assert set(checkpoint.own_state(whole)) == {"net.weight", "net.bias", "codec2.weight", "codec2.bias"}


# --- what is read --------------------------------------------------------------------------------------------------

opened: list[str] | None = None


@pytest.fixture(scope="module")
def opens():
    """opens(call) -> the names of all files that Python opened meanwhile, in order.

    A safetensors file is opened by Rust, but never before its header was checked here: it counts once for that.
    """
    def note(event, arguments):
        if opened is not None and event == "open" and isinstance(arguments[0], str):
            opened.append(arguments[0])
    sys.addaudithook(note)

    def during(call):
        global opened
        opened = []
        try:
            call()
            return opened
        finally:
            opened = None
    return during


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The newest checkpoint folder of a real run of two steps with averaged weights."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "pictures").mkdir()
    for i in range(4):
        write_image(folder / f"pictures/{i}.png", np.full((16, 16, 3), 60 * i, np.uint8))
    train("vae", data=str(folder / "pictures"), run=folder / "run", preset="tiny", device="cpu",
          flags={"steps": 2, "batch_size": 4, "samples": 0, "ema": 0.5})
    return folder / "run/step-0000002"


def counts(names, folder):
    return Counter(os.path.relpath(name, folder) for name in names if name.startswith(str(folder)))


def test_loading_a_run_opens_the_averaged_weights_alone(run, opens):
    found = counts(opens(lambda: checkpoint.load(str(run), device="cpu")), run)
    assert found.keys() == {"config.json", "manifest.json", "ema.safetensors"}
    assert found["ema.safetensors"] == 2                # its digest, its header


def test_what_the_averages_lack_comes_from_the_other_file(model, tmp_path):
    average = {n: t + 1 for n, t in sorted(model.state_dict().items())[2:]}
    checkpoint.save_model(tmp_path / "m", "vae", model.config.to_json(), model.state_dict(),
                          extra={"ema.safetensors": checkpoint.tensor_bytes(average)})
    loaded = checkpoint.load(str(tmp_path / "m"), device="cpu").state_dict()
    assert equal(loaded, {**model.state_dict(), **average}) and len(average) == len(loaded) - 2


def test_verifying_hashes_every_file_once(run, opens):
    found = counts(opens(lambda: api.verify([str(run)])), run)
    listed = json.loads((run / "manifest.json").read_text())["files"]
    assert found.keys() == {*listed, "manifest.json"} and len(listed) > 3
    headers = {"model.safetensors", "ema.safetensors"}  # compared with the described system, without the data
    assert all(found[name] == 1 + (name in headers) for name in listed if name != "config.json")


def test_verifying_names_a_tensor_that_does_not_fit_and_goes_on(model, saved, tmp_path):
    state = dict(model.state_dict())
    lost = min(state)
    del state[lost]
    checkpoint.save_model(tmp_path / "bad", "vae", model.config.to_json(), state)
    checkpoint.save_model(tmp_path / "nothing", "vae", {"beta": -1}, state)
    bad, nothing, good = api.verify([str(tmp_path / "bad"), str(tmp_path / "nothing"), str(saved)])
    assert len(bad["problems"]) == 1 and f"lacks {lost}" in bad["problems"][0]
    assert "describes no system" in nothing["problems"][0] and good["problems"] == []


# --- what is wrong -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, message", [
    (lambda s: s.pop(sorted(s)[0]), "lacks"), (lambda s: s.update(extra=torch.ones(2)), "surplus"),
    (lambda s: s.update({sorted(s)[0]: torch.ones(7, 7)}), "expected")])
def test_tensors_that_do_not_fit_are_named(model, tmp_path, change, message):
    state = dict(model.state_dict())
    change(state)
    checkpoint.save_model(tmp_path / "m", "vae", model.config.to_json(), state)
    with pytest.raises(ModelError, match=message):
        checkpoint.load(str(tmp_path / "m"), device="cpu")


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
@pytest.mark.parametrize("at", [0, 7, 8, 40, -40, -1])
def test_a_flipped_bit_is_found_before_anything_is_loaded(saved, name, at):
    data = bytearray((saved / name).read_bytes())
    data[at] ^= 16
    (saved / name).write_bytes(data)
    assert any(line.startswith(name) for line in checkpoint.verify(saved))
    with pytest.raises(ModelError):
        checkpoint.load(str(saved), device="cpu")


def test_verify_names_every_file_that_is_wrong(saved):
    (saved / "config.json").unlink()
    with open(saved / "model.safetensors", "ab") as file:
        file.write(b"more")
    assert [line.partition(":")[0] for line in checkpoint.verify(saved)] == ["config.json", "model.safetensors"]
    (saved / "manifest.json").unlink()
    assert "manifest.json" in checkpoint.verify(saved)[0]


@pytest.mark.parametrize("manifest", [b"", b"{", b"[]", b"null", b'{"files": []}', b'{"files": {"a": 1}}', b"\xff",
                                      b'{"files": {"a": {"size": "x", "sha256": 1}}}', b"[" * 100_000])
def test_a_damaged_manifest_is_a_finding(saved, manifest):
    (saved / "manifest.json").write_bytes(manifest)
    assert "manifest.json" in checkpoint.verify(saved)[0]


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret"])
def test_a_manifest_cannot_point_outside_its_folder(saved, name):
    (saved.parent / "secret").write_text("secret")
    (saved / "manifest.json").write_text(json.dumps({"files": {name: {"size": 6, "sha256": "0"}}}))
    assert "outside" in checkpoint.verify(saved)[0]


def test_deleting_the_training_state_makes_a_release(model, tmp_path):
    checkpoint.save_model(tmp_path / "m", "vae", model.config.to_json(), model.state_dict(),
                          extra={"train/state.json": b"{}"})
    (tmp_path / "m/train/state.json").unlink()
    checkpoint.load(str(tmp_path / "m"), device="cpu")


@pytest.mark.parametrize("description", [
    {"system": "nope", "config": {}}, {"system": "vae", "config": {"nope": 1}}, {"system": "vae", "config": []},
    {"system": 3, "config": {}}, {"config": {}}, {}, [], None, "vae",
    {"system": "vae", "config": {"net": {"kind": "x"}}},
    {"system": "os:system", "config": {}},
    {"system": "vae", "config": {"net": {"kind": "conv", "size": 2**40}}},
    {"system": "vae", "config": {"beta": "x" * 100_000}}])
def test_a_description_of_nothing_is_refused(model, tmp_path, description):
    (tmp_path / "m").mkdir()
    (tmp_path / "m/config.json").write_text(json.dumps(description))
    (tmp_path / "m/model.safetensors").write_bytes(checkpoint.tensor_bytes(model.state_dict()))
    with pytest.raises(ModelError) as caught:
        checkpoint.load(str(tmp_path / "m"), device="cpu")
    assert caught.value.code == 4 and len(str(caught.value)) < 500


def test_a_file_without_description_is_refused(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ModelError, match="does not say"):
        checkpoint.load(str(tmp_path / "a.safetensors"))


@pytest.mark.parametrize("name", ["nowhere", "", ".", "/", "a\0b", "x" * 5000, "\udcff", "~", "*", "../.."])
def test_no_name_is_found_by_accident(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError):
        checkpoint.find(name)


def test_a_folder_of_another_kind_does_not_hide_an_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "music").mkdir()            # the name that the README gives the rendered clips
    (tmp_path / "music" / "000000.flac").touch()
    assert checkpoint.find("music") == stored.ZOO / "music"


def test_another_system_is_refused(saved):
    with pytest.raises(ModelError, match="'vae'"):
        checkpoint.load(str(saved), system="dit")


@pytest.mark.parametrize("name", ["cuda:77", "tpu", "", "cpu:x", "cuda:-1"])
def test_a_missing_device_is_named(name):
    with pytest.raises(DeviceError) as caught:
        checkpoint.pick_device(name)
    assert caught.value.code == 5


# --- hostile files -------------------------------------------------------------------------------------------------

def tensors_or_model_error(path):
    """Read a file; only a ModelError may come out, and no tensor that is not there."""
    try:
        checkpoint.read_description(path)
    except ModelError:
        pass
    try:
        tensors = checkpoint.read_tensors(path)
    except ModelError as error:
        assert error.code == 4
        return None
    assert sum(t.numel() * t.element_size() for t in tensors.values()) <= path.stat().st_size
    return tensors


@pytest.mark.parametrize("length", [0, 1, 2**24 + 1, 2**27, 2**31, 2**63 - 1, 2**63, 2**64 - 1])
def test_a_header_that_lies_about_its_length(saved, length):
    file = saved / "model.safetensors"
    file.write_bytes(struct.pack("<Q", length) + file.read_bytes()[8:])
    with pytest.raises(ModelError):
        checkpoint.read_tensors(file)


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


HEADERS = [
    {"a": entry(offsets=(0, 16))}, {"a": entry(offsets=(8, 0))}, {"a": entry(offsets=(-8, 0))},
    {"a": entry(shape=(3,))},
    {"a": entry(), "b": entry()}, {"a": entry(offsets=(0, 4), shape=(1,)), "b": entry(offsets=(8, 12), shape=(1,))},
    {"a": entry(dtype="F33")}, {"a": entry(dtype=None)}, {"a": entry(shape=(2**63, 2))},
    {"a": entry(shape=(2**32, 2**32))},
    {"a": entry(shape=(-2,))}, {"a": entry(shape=(2**64,))}, {"a": entry(shape=(1.5,))}, {"a": entry(shape=("2",))},
    {"a": {"dtype": "F32"}}, {"a": 3}, {"a": None}, [], 3, "x", None, {"__metadata__": {"a": 1}}, {"__metadata__": []},
    {"a": entry(offsets=(0,))}, {"a": entry(offsets=(0, 2**64 - 1))}, b"", b"{", b"{}{}", b"\xff" * 9,
    b"{\"a\":" * 1000,
    b"[" * 100_000, b'{"a":' * 100_000, b"\0" * 64, b" " * 64, b'{"a":NaN}', b'{"a":1e999}', b'{"a":"\\ud800"}']


@pytest.mark.parametrize("header", HEADERS, ids=range(len(HEADERS)))
def test_headers_that_no_writer_writes(tmp_path, header):
    with_header(tmp_path / "a.safetensors", header, bytes(8))
    assert tensors_or_model_error(tmp_path / "a.safetensors") is None


def test_many_tensors_are_refused_before_they_are_read(tmp_path):
    header = {f"{i}": entry(shape=(0,), offsets=(0, 0)) for i in range(checkpoint.TENSOR_LIMIT + 1)}
    with_header(tmp_path / "a.safetensors", header, b"")
    with pytest.raises(ModelError):
        checkpoint.read_tensors(tmp_path / "a.safetensors")


def test_odd_names_are_only_names(tmp_path):
    names = ["", "../../etc/passwd", "a\0b", "\u202e", "x" * 10_000, "__import__('os')", "%n%s", "{0}"]
    header = {n: entry(shape=(1,), offsets=(4 * i, 4 * i + 4)) for i, n in enumerate(names)}
    with_header(tmp_path / "a.safetensors", header, bytes(4 * len(names)))
    assert set(tensors_or_model_error(tmp_path / "a.safetensors") or names) == set(names)


def mutated(data, draw):
    """One random change: flips, a cut, a repeated or zeroed stretch, another length, a spliced number."""
    data, kind = bytearray(data), draw.randrange(6)
    head = 8 + struct.unpack("<Q", data[:8])[0]
    at = draw.randrange(head if draw.random() < 0.8 else len(data))
    if kind == 0:
        for _ in range(draw.randint(1, 8)):
            data[draw.randrange(head)] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[at:]
    elif kind == 2:
        data[at:at] = data[at:at + draw.randint(1, 64)]
    elif kind == 3:
        data[at:at + 16] = bytes(16)
    elif kind == 4:
        data[:8] = struct.pack("<Q", draw.choice([draw.getrandbits(64), draw.randrange(2 * head), len(data) - 8]))
    else:
        splices = [b"18446744073709551615", b"-1", b'"', b"}", b"1e400", b"\\u0000"]
        data[at:at + draw.randint(0, 3)] = draw.choice(splices)
    return bytes(data)


def test_mutated_files_are_refused_or_read(saved, tmp_path):
    original, draw = (saved / "model.safetensors").read_bytes(), random.Random(0)
    refused, path = 0, tmp_path / "m.safetensors"
    trials = 500_000 if SLOW else 10_000
    for _ in range(trials):
        path.write_bytes(mutated(original, draw))
        refused += tensors_or_model_error(path) is None
    assert refused > trials // 2


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "ckpt", "pth", "bin", "pkl"])
def test_a_pickle_is_never_opened(tmp_path, suffix):
    canary = tmp_path / "canary"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(canary),)
    path = tmp_path / f"evil.{suffix}"
    torch.save({"state": Evil()}, path)
    for file in (path, tmp_path / "folder/model.safetensors"):
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(path.read_bytes())
        with pytest.raises(ModelError):
            checkpoint.load(str(file if file == path else file.parent), device="cpu")
    assert not canary.exists()


def test_no_random_numbers_are_drawn_for_weights_that_are_read():
    with checkpoint.Unfilled():
        before = torch.get_rng_state()
        layer = torch.nn.Conv2d(2, 2, 3)
        torch.nn.init.trunc_normal_(layer.weight), layer.bias.data.normal_()
        assert torch.equal(torch.get_rng_state(), before) and layer.weight.shape == (2, 2, 3, 3)
        torch.nn.init.ones_(layer.weight)
        assert torch.randn(2).shape == (2,) and (layer.weight == 1).all()


def test_an_outline_is_drawn_without_the_compiler():
    code = "import sys; from nexus import api; api.outline('dit'); api.outline('gan'); " \
           "print('torch._dynamo' in sys.modules or 'sympy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["False"]


def test_a_byte_sized_float_is_asked_whether_it_is_finite():
    assert checkpoint.is_finite(torch.ones(3).to(torch.float8_e4m3fn)) and checkpoint.is_finite(torch.ones(3).int())
    assert not checkpoint.is_finite(torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn))
