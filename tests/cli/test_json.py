"""What is printed as JSON is JSON: no NaN, no Infinity, whatever a model, a file or a training step says."""

import ast
import json
import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from nexus_cli.output import strict_json

COMMANDS = Path(__file__).parents[2] / "nexus_cli"
HASHED = {"digest", "together"}        # keys of what is the same, never shown


def strictly(text):
    """json.loads as another language's parser would: NaN and Infinity are no values."""
    def refuse(word):
        raise ValueError(f"{word} is not JSON")
    return json.loads(text, parse_constant=refuse)


def test_what_is_not_finite_is_null_wherever_it_stands():
    value = {"a": math.nan, "b": [1.5, math.inf, {"c": (-math.inf, "NaN")}], "d": Path("x"), "e": 2**70, "f": None}
    assert strictly(strict_json(value)) == {"a": None, "b": [1.5, None, {"c": [None, "NaN"]}], "d": "x", "e": 2**70,
                                            "f": None}
    assert strictly(strict_json("\ud800é\0")) == "\ud800é\0"


@pytest.mark.parametrize("file", sorted(COMMANDS.glob("*.py")), ids=lambda p: p.name)
def test_only_the_strict_writer_makes_json(file):
    tree = ast.parse(file.read_text("utf-8"))
    inside = {id(node) for function in ast.walk(tree) if isinstance(function, ast.FunctionDef)
              and function.name in HASHED for node in ast.walk(function)}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)
             and ast.unparse(node.func) in ("json.dumps", "json.dump") and id(node) not in inside]
    assert all("allow_nan=False" in ast.unparse(call) for call in calls), [call.lineno for call in calls]


def test_a_record_with_nan_from_another_tool(warm, tmp_path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("nexus", '{"schema": "nexus/1", "seed": 3, "guidance": NaN, "eta": [-Infinity]}')
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    done = warm("info", "a.png", "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    facts = strictly(done.stdout)
    assert facts["guidance"] is None and facts["eta"] == [None] and facts["seed"] == 3
    assert warm("gallery", tmp_path, "--json").returncode == 0


def test_every_line_of_training_and_evaluating(warm, pictures, tmp_path):
    """A run whose loss is soon not finite, and is told to go on; then all numbers of its model."""
    done = warm("train", "vae", "--preset", "tiny", "--data", pictures, "--run", tmp_path / "run", "--steps", 3,
                "--batch-size", 4, "--lr", 100, "--on-nan", "skip", "--set", "train.samples=0", "--device", "cpu",
                "--json", "--progress", "json")
    lines = [strictly(line) for line in done.stdout.splitlines()]
    assert lines and {"status": "ok"}.items() <= lines[-1].items(), done.stderr.decode()
    done = warm("eval", tmp_path / "run", "--data", pictures, "--split", "all", "--json", "-o", tmp_path / "e.json",
                "--device", "cpu")
    assert done.returncode == 0, done.stderr.decode()
    assert strictly(done.stdout)["numbers"].keys() == strictly((tmp_path / "e.json").read_text())["numbers"].keys()
    assert np.isfinite(strictly(done.stdout)["numbers"]["psnr (dB)"]["value"])
