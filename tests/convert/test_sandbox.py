"""Pickled checkpoints: plain ones come through whole, hostile and damaged ones are refused and run nothing."""

import argparse
import io
import os
import pickle
import tarfile
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from nexus.convert import sandbox
from nexus.errors import ModelError

WEIGHTS = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.bfloat16)}


class Canary:
    """Unpickled without care, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Model(torch.nn.Linear):
    """A whole module in a pickle needs code to come back."""


def copied(path, tmp_path) -> dict[str, torch.Tensor]:
    """What the child does, without the child."""
    sandbox.copy_tensors(str(path), str(tmp_path / "out.safetensors"))
    return load_file(tmp_path / "out.safetensors")


def saved(value, path, *, zipped: bool = True):
    torch.save(value, path, _use_new_zipfile_serialization=zipped)
    return path


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_tensors_come_through_bit_by_bit(tmp_path, zipped):
    source = saved({"ema": WEIGHTS, "step": 7, "args": argparse.Namespace(lr=1)}, tmp_path / "x.pt", zipped=zipped)
    out = copied(source, tmp_path)
    assert out.keys() == {f"ema.{key}" for key in WEIGHTS}
    assert all(torch.equal(out[f"ema.{key}"], tensor) and out[f"ema.{key}"].dtype == tensor.dtype
               for key, tensor in WEIGHTS.items())


@pytest.mark.parametrize(("zipped", "read"), [(True, sandbox.unpickle), (False, sandbox.copy_tensors)],
                         ids=["zip, by the child", "legacy"])
def test_a_hostile_pickle_is_refused_and_runs_nothing(tmp_path, zipped, read):
    canary = tmp_path / "canary"
    source = saved({**WEIGHTS, "x": Canary(canary)}, tmp_path / "x.pt", zipped=zipped)
    with pytest.raises(ModelError, match=r"refused as unsafe: opening it would run \w+\.system") as caught:
        read(source, tmp_path / "out.safetensors")
    assert caught.value.code == 4 and caught.value.hint
    assert not canary.exists() and not (tmp_path / "out.safetensors").exists()


def test_a_whole_module_is_refused(tmp_path):
    with pytest.raises(ModelError, match="would run .*Model"):
        copied(saved(Model(2, 2), tmp_path / "x.pt"), tmp_path)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("protocol", [0, 1, 2, 4])
def test_a_bare_pickle_of_any_protocol_is_refused(tmp_path, protocol):
    canary = tmp_path / "canary"
    (tmp_path / "x.pt").write_bytes(pickle.dumps(Canary(canary), protocol))
    with pytest.raises(ModelError, match="refused as unsafe|damaged"):
        copied(tmp_path / "x.pt", tmp_path)
    assert not canary.exists()


@pytest.mark.parametrize("keep", [0, 1, 60, 400, -30])
def test_a_truncated_file_is_damaged(tmp_path, keep):
    data = saved(WEIGHTS, tmp_path / "x.pt").read_bytes()
    (tmp_path / "x.pt").write_bytes(data[:keep])
    with pytest.raises(ModelError):
        copied(tmp_path / "x.pt", tmp_path)


def test_a_zip_bomb_is_refused_by_its_directory(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", bytes(50_000_000))
    with pytest.raises(ModelError, match="unpack to 50,000,000"):
        copied(tmp_path / "x.pt", tmp_path)


def test_a_tensor_that_needs_far_more_memory_than_its_file_ends_the_child(tmp_path):
    source = saved({"a": torch.zeros(1).expand(1 << 33)}, tmp_path / "x.pt")
    with pytest.raises(ModelError, match="more memory or time"):
        sandbox.unpickle(source, tmp_path / "out.safetensors")


@pytest.mark.parametrize("kind", ["tar", "zip", "text"])
def test_other_containers_are_refused(tmp_path, kind):
    path = tmp_path / "x.pt"
    if kind == "tar":
        with tarfile.open(path, "w") as archive:
            for name in ("storages", "tensors", "pickle"):
                archive.addfile(tarfile.TarInfo(name), io.BytesIO())
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("inner.zip", b"PK")
    else:
        path.write_text("not a checkpoint")
    with pytest.raises(ModelError):
        copied(path, tmp_path)


def test_tied_sliced_and_transposed_tensors_get_bytes_of_their_own(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    state = {"base": base, "tied": base, "row": base[1], "turned": base.T, "alone": torch.ones(1).expand(4)}
    out = copied(saved(state, tmp_path / "x.pt"), tmp_path)
    assert out.keys() == state.keys() and all(torch.equal(out[key], state[key]) for key in state)


def test_optimiser_states_stay_behind(tmp_path):
    state = {"model": WEIGHTS, "opt": {"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 1.0}]}}
    assert copied(saved(state, tmp_path / "x.pt"), tmp_path).keys() == {f"model.{key}" for key in WEIGHTS}


def test_odd_contents_are_refused_by_name(tmp_path):
    with pytest.raises(ModelError, match="no named tensors"):
        copied(saved({"step": 3}, tmp_path / "x.pt"), tmp_path)
    with pytest.raises(ModelError, match="complex"):
        copied(saved({"a": torch.ones(2, dtype=torch.complex64)}, tmp_path / "x.pt"), tmp_path)
    deep: dict = {"w": torch.ones(1)}
    for _ in range(20):
        deep = {"d": deep}
    with pytest.raises(ModelError, match="nested deeper"):
        copied(saved(deep, tmp_path / "x.pt"), tmp_path)
    ring: dict = {"w": torch.ones(1)}
    ring |= {f"again{i}": ring for i in range(100)}
    assert copied(saved(ring, tmp_path / "x.pt"), tmp_path).keys() == {"w"}
