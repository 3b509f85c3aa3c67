"""What a run will need, from configurations and headers alone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nexus import catalog, checkpoint, memory
from nexus.errors import ModelError
from nexus.memory import Asked
from nexus.stored import header

ROOT = Path(__file__).parent.parent
SD15 = {"channels": 320, "mult": [1, 2, 4, 4], "blocks": 2, "attention": [0, 1, 2], "context_dim": 768}
MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny models by catalog name, in a folder each."""
    root = tmp_path_factory.mktemp("models")
    for name in ("sd", "dit", "mmdit", "ddpm"):
        config = catalog.config_class(name).preset("tiny")
        checkpoint.save_model(root / name, name, config.to_json(), checkpoint.released_state(config.build()))
    return root


@pytest.mark.parametrize("name", ["sd", "dit", "mmdit", "ddpm"])
def test_the_parts_are_those_of_the_loaded_system(folder, name):
    system, model = checkpoint.load(str(folder / name), device="cpu"), memory.described(str(folder / name))
    for part in model.parts:
        sizes = [t.numel() for t in system.get_submodule(part.name).state_dict().values()]
        assert (part.numbers, part.largest) == (sum(sizes), max(sizes))
    assert model.weights("net", "bfloat16") == 2 * sum(p.numel() for p in system.net.parameters())
    assert header(folder / name / "model.safetensors")[1].keys() == system.state_dict().keys()


def test_an_external_codec_counts():
    model = memory.described("dit")
    assert {part.name for part in model.parts} == {"net", "codec"} and model.codec["patch"] == 2


def test_neither_torch_nor_weights_are_loaded():
    code = ("import sys; from nexus import memory as m; d = m.described('dit'); m.advice(d, m.Asked(), 0); "
            "print('torch' in sys.modules or 'numpy' in sys.modules)")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "False\n"


# Peaks over what was there before, in MiB, measured on the CPU of this project's machine with torch 2.13.
def test_the_formulas_are_near_what_was_measured():
    kl = {"channels": [128, 256, 512, 512]}
    assert memory.codec_bytes(kl, 1, 1024, 1024, 4, "off") / MIB == pytest.approx(3867, rel=0.1)
    assert memory.codec_bytes(kl, 1, 1024, 1024, 4, "on") / MIB == pytest.approx(1142, rel=0.1)
    largest = 2560 * 1280 * 9
    assert (memory.net_bytes(SD15, 2, 64, 64, 2) + 4 * largest) / MIB == pytest.approx(239, rel=0.25)


@pytest.mark.parametrize("batch, dtype, measured", [(1, "float32", 303), (16, "float32", 336), (64, "float32", 448),
                                                    (1, "bfloat16", 304), (16, "bfloat16", 314)])
def test_the_embedded_dit(batch, dtype, measured):
    peak = memory.peak(memory.described("dit"), Asked(batch=batch, dtype=dtype))
    assert peak / MIB == pytest.approx(measured, rel=0.1)


def test_more_of_anything_needs_more(folder):
    model = memory.described(str(folder / "sd"))
    sizes = [memory.peak(model, Asked(width=w, height=w, batch=b, tile="off"))
             for w, b in ((256, 1), (512, 1), (512, 4))]
    assert sizes == sorted(sizes) and len(set(sizes)) == 3
    large = Asked(width=2048, height=2048, tile="off")

    def picture(asked):
        return sum(next(s for s in memory.stages(model, asked) if s.name == "picture")[1:])
    for change in ({"tile": "on"}, {"dtype": "bfloat16"}, {"offload": True}):
        assert picture(large._replace(**change)) < picture(large)


def test_advice_is_given_until_it_fits_and_not_without_need(folder):
    model, asked = memory.described("dit"), Asked(width=4096, height=4096, batch=4, tile="off")
    whole = memory.peak(model, asked)
    assert memory.advice(model, asked, whole) == []
    found = memory.advice(model, asked, 0)
    peaks = [whole, *(after for _, after in found)]
    assert peaks == sorted(peaks, reverse=True) and found[0][0] == "--tile on"
    assert len(memory.advice(model, asked, found[0][1])) == 1


def test_a_damaged_header_is_told(tmp_path):
    (tmp_path / "a.safetensors").write_bytes((8).to_bytes(8, "little") + b"[1, 2]  " + bytes(8))
    with pytest.raises(ModelError, match="damaged"):
        header(tmp_path / "a.safetensors")


def test_what_is_available_is_a_size_or_unknown():
    assert memory.available("cpu") > 100 * MIB
    assert memory.device_of("cuda:1") == "cuda" and memory.device_of("cpu") == "cpu"


def test_the_command_says_what_would_happen(capsys, monkeypatch, tmp_path):
    from nexus_cli.main import main
    monkeypatch.chdir(tmp_path)
    call = ["sample", "dit", "-p", "cat", "-s", "1", "--device", "cpu", "--dry-run"]

    def code(*arguments):
        with pytest.raises(SystemExit) as end:
            main([*arguments])
        return end.value.code
    assert code(*call, "--json") == 0
    line = json.loads(capsys.readouterr().out)
    assert line["status"] == "planned" and line["memory"]["peak"] < line["memory"]["available"]
    monkeypatch.setattr(memory, "available", lambda device: 300 * MIB)
    assert code(*call, "-W", "4096", "-H", "4096", "--tile", "off") == 5
    said = " ".join(capsys.readouterr().err.split())
    assert "--tile on" in said and "are needed, 300 MiB are available" in said
    assert not list(tmp_path.iterdir())


def test_torch_agrees_on_the_size_of_numbers(folder):
    for held in header(folder / "sd" / "model.safetensors")[1].values():
        assert memory.SIZES[held.dtype] == torch.float32.itemsize
