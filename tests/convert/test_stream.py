"""Tensors made as they are written: the library's own bytes, shards and their index, and how much memory it takes."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from nexus import api, checkpoint
from nexus.convert import stream
from nexus.convert.convert import convert
from nexus.convert.keymap import to_foreign
from nexus.convert.layouts import dit
from nexus.errors import ModelError
from nexus.models.diffusion.dit import DiTNetConfig

ORIGINAL = dit.LAYOUTS[0]
HEADS = ["net.heads=2"]


def file_of(path: Path, dtype=torch.float32, **net) -> int:
    """A DiT in the paper's layout; returns its size in bytes."""
    net = DiTNetConfig.parse({"size": 8, "hidden": 16, "depth": 2, "heads": 2, "num_classes": 3} | net)
    config = {"net": net.to_json()}
    with torch.device("meta"):
        shapes = to_foreign(ORIGINAL.table(config), net.build().state_dict())
    torch.manual_seed(0)
    row = torch.randn(1 << 16)
    state = {key: row.repeat(1 + t.numel() // len(row))[:t.numel()].view(t.shape).to(dtype)
             for key, t in shapes.items()}
    save_file(state | {k: t.to(dtype) for k, t in ORIGINAL.constants(config).items()}, path)
    return path.stat().st_size


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"nexus": '{"a": "\\u00e9"}'}])
def test_the_bytes_are_the_librarys(metadata):
    state = {f"{name}.{kind}": (torch.rand(3, 2 + i) * 5).to(kind)
             for i, kind in enumerate(stream.KINDS) for name in ("b", "a", "é")}
    state |= {"scalar": torch.tensor(3.0), "empty": torch.zeros(0, 4), "turned": torch.rand(4, 3).T}
    file = io.BytesIO()
    stream.write_tensors(file, stream.ready(state), metadata)
    assert file.getvalue() == save({k: t.contiguous() for k, t in state.items()}, metadata or None)


def test_a_value_that_is_not_finite_is_refused():
    with pytest.raises(ModelError, match="bad has a value"):
        stream.write_tensors(io.BytesIO(), stream.ready({"bad": torch.tensor([1.0, float("nan")])}), {}, finite=True)


def test_shards_and_back(tmp_path):
    """What is split is the same model: it loads, verifies, tells its size, and goes out whole or in shards."""
    file_of(tmp_path / "x.safetensors", torch.bfloat16)
    convert(tmp_path / "x.safetensors", tmp_path / "one", overrides=HEADS)
    convert(tmp_path / "x.safetensors", tmp_path / "many", overrides=HEADS, shard=6000)
    assert not (tmp_path / "many/model.safetensors").exists()
    files = checkpoint.weight_files(tmp_path / "many")
    assert len(files) > 3 and all(sum(t.nbytes for t in load_file(f).values()) <= 6000 or len(load_file(f)) == 1
                                  for f in files)
    index = json.loads((tmp_path / "many/model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(t.nbytes for f in files for t in load_file(f).values())
    assert api.verify([str(tmp_path / "many")])[0]["problems"] == []
    info, single = (api.model_info(str(tmp_path / name)) for name in ("many", "one"))
    assert (info["tensors"], info["numbers"]) == (single["tensors"], single["numbers"])
    a, b = (checkpoint.load(str(tmp_path / name), device="cpu").state_dict() for name in ("one", "many"))
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    convert(tmp_path / "many", tmp_path / "back.safetensors", to="original")
    assert (tmp_path / "back.safetensors").read_bytes() == save(load_file(tmp_path / "x.safetensors"), {"format": "pt"})
    convert(tmp_path / "many", tmp_path / "folder", to="diffusers", shard=6000)
    assert len(list((tmp_path / "folder").glob("*-of-*.safetensors"))) > 3
    convert(tmp_path / "folder", tmp_path / "again", overrides=["net.freq_shift=0"])
    assert (tmp_path / "again/model.safetensors").read_bytes() == (tmp_path / "one/model.safetensors").read_bytes()


def test_a_damaged_shard_or_index_is_named(tmp_path):
    file_of(tmp_path / "x.safetensors")
    convert(tmp_path / "x.safetensors", tmp_path / "m", overrides=HEADS, shard=6000)
    shard, index = checkpoint.weight_files(tmp_path / "m")[1], tmp_path / "m/model.safetensors.index.json"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    with pytest.raises(ModelError, match=f"{shard.name}: its sha256 differs"):
        checkpoint.load(str(tmp_path / "m"), device="cpu")
    shard.unlink()
    with pytest.raises(ModelError, match=shard.name):
        convert(tmp_path / "m", tmp_path / "x", to="diffusers")
    index.write_text(json.dumps({"weight_map": {"a": "../x.safetensors"}}))
    with pytest.raises(ModelError, match="does not list files of this folder"):
        checkpoint.load(str(tmp_path / "m"), device="cpu")


MEASURED = """
import resource, sys
from pathlib import Path
from nexus.convert.convert import convert
folder, shard = Path(sys.argv[1]), int(sys.argv[2])
def both(name, heads):                      # in, and out again
    convert(folder / f"{name}.safetensors", folder / f"{name}-native", overrides=[heads], shard=shard)
    convert(folder / f"{name}-native", folder / f"{name}-out", to="diffusers", shard=shard)
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
both("small", "net.heads=2")                # whatever is imported on the way is not the model's
before = peak()
both("large", "net.heads=16")
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss counts kilobytes on Linux")
def test_a_large_model_takes_the_memory_of_a_part_of_it(tmp_path):
    """Memory, not time: 400 MB in shards of 64 MB."""
    file_of(tmp_path / "small.safetensors", torch.bfloat16)
    size = file_of(tmp_path / "large.safetensors", torch.bfloat16, hidden=1024, depth=11, heads=16)
    assert size > 400e6
    done = subprocess.run([sys.executable, "-c", MEASURED, str(tmp_path), "64000000"], capture_output=True, text=True,
                          check=True, cwd=Path(__file__).parents[2])
    assert len(checkpoint.weight_files(tmp_path / "large-native")) == 8
    assert int(done.stdout) < 0.5 * size, f"{int(done.stdout):,} bytes more for a model of {size:,}"
