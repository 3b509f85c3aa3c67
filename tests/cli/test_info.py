"""nexus info, gallery and the log of an internal error: reading what others wrote."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest

from nexus.images import write_image

REPOSITORY = Path(__file__).parents[2]
PICTURE = np.zeros((8, 9, 3), np.uint8)


def header(value, size: int | None = None) -> bytes:
    text = json.dumps(value).encode() if not isinstance(value, bytes) else value
    return struct.pack("<Q", len(text) if size is None else size) + text


def test_the_record_of_a_picture(nexus, tmp_path):
    write_image(tmp_path / "a.png", PICTURE, {"prompt": "a\x1b[31m b", "seed": 3})
    write_image(tmp_path / "b.jpg", PICTURE)
    done = nexus("info", "a.png", cwd=tmp_path)
    assert done.returncode == 0 and b"\x1b" not in done.stdout
    assert b"seed: 3" in done.stdout and b"picture: 9x8" in done.stdout
    both = nexus("info", "a.png", "b.jpg", "--json", cwd=tmp_path)
    assert [json.loads(line)["path"] for line in both.stdout.splitlines()] == ["a.png", "b.jpg"]


def test_one_unreadable_file_is_told_and_the_rest_shown(nexus, tmp_path):
    write_image(tmp_path / "a.png", PICTURE, {"seed": 3})
    (tmp_path / "b.png").write_bytes(b"no")
    done = nexus("info", "b.png", "a.png", "c.png", cwd=tmp_path)
    assert done.returncode == 3 and b"seed: 3" in done.stdout and b"c.png" in done.stderr


@pytest.mark.parametrize("data", [
    b"", b"\xff" * 8, header({}, 0), header({}, 2**63), header({}, 17 * 2**20), header(b"{"), header([]),
    header({"a": 1}),
    header({"a": {}}), header(b"[" * 100_000), header({"__metadata__": {"nexus": "{"}}), header({"__metadata__": []}),
])
def test_damaged_model_files(nexus, tmp_path, data):
    (tmp_path / "a.safetensors").write_bytes(data)
    done = nexus("info", "a.safetensors", cwd=tmp_path)
    assert done.returncode == 4 and b"Traceback" not in done.stderr


def test_a_model_file_and_a_folder(nexus, tmp_path):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    stored = json.dumps({"system": "ddpm", "config": {}})
    (tmp_path / "a.safetensors").write_bytes(header({"w": entry, "__metadata__": {"nexus": stored}}) + b"\0" * 8)
    facts = json.loads(nexus("info", "a.safetensors", "--json", cwd=tmp_path).stdout)
    assert facts["system"] == "ddpm" and facts["tensors"] == 1 and facts["dtypes"] == ["F32"]
    (tmp_path / "run" / "step-0000010").mkdir(parents=True)
    assert nexus("info", "run", cwd=tmp_path).returncode == 4
    (tmp_path / "run" / "config.json").write_text(stored)
    facts = json.loads(nexus("info", "run", "--json", cwd=tmp_path).stdout)
    assert facts["system"] == "ddpm" and facts["checkpoints"] == ["step-0000010"]


def test_a_gallery_escapes_everything_and_repeats_exactly(nexus, tmp_path):
    folder = tmp_path / "<img src=x>"
    hostile = "<script>alert(1)</script>\"'&\ud800\0"
    for name in ("a.png", "b 'c'.png", "{x}.png"):
        write_image(folder / name, PICTURE, {"prompt": hostile, "seed": 1, "model": hostile})
    failed = [{"status": "failed", "id": hostile, "error": {"message": hostile}}, {"status": "failed", "error": 3}]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in failed))
    done = nexus("gallery", folder, "--sheet", tmp_path / "sheet.png")
    assert done.returncode == 0, done.stderr.decode()
    page = (folder / "index.html").read_bytes()
    assert page.count(b"<script") == 1 and b"<img src=x" not in page and page.count(b"<figure") == 5
    assert b"http" not in page.replace(b"http-equiv", b"") and b"Content-Security-Policy" in page
    assert nexus("gallery", folder).returncode == 6
    assert nexus("gallery", folder, "-f").returncode == 0 and (folder / "index.html").read_bytes() == page


def test_a_broken_file_is_named_in_the_gallery_of_the_others(nexus, tmp_path):
    write_image(tmp_path / "a.png", PICTURE, {})
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:60])
    (tmp_path / "broken.wav").write_bytes(b"RIFF")
    done = nexus("gallery", tmp_path, "--json")
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["pictures"], found["failed"]) == (1, 2) and done.stderr.count(b"broken.") == 2
    assert (tmp_path / "index.html").read_text().count('class="failed"') == 2


def test_an_internal_error_has_one_line_and_a_log(nexus, tmp_path):
    (tmp_path / "nexus_fault.py").write_text("import nexus.images\nnexus.images.read_record = lambda path: 1 / 0\n")
    (tmp_path / "sitecustomize.py").write_text("import nexus_fault\n")
    write_image(tmp_path / "a.png", PICTURE)
    path = {"PYTHONPATH": f"{tmp_path}:{REPOSITORY}"}
    done = nexus("info", "a.png", cwd=tmp_path, env=path)
    text = done.stderr.decode()
    assert done.returncode == 1 and "internal error: ZeroDivisionError" in text and "Traceback" not in text
    log = text.split("the details are in ")[1].strip()
    assert "ZeroDivisionError" in open(log, encoding="utf-8").read()
