"""What must be quick and clean: help, mistakes and missing files answer without torch; streams keep to their roles."""

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
COMMANDS = ("train", "sample", "music", "convert", "eval", "models", "info", "gallery", "doctor", "help")
HEAVY = ("torch", "PIL", "numpy", "safetensors")


def loaded(arguments: list[str], cwd) -> tuple[int, list[str]]:
    """The exit code of a command, which heavy modules it imported, and "packages" if it looked through them all."""
    code = ("import importlib.metadata, sys\nread, real = [], importlib.metadata.distributions\n"
            "importlib.metadata.distributions = lambda **kw: read.append('packages') or real(**kw)\n"
            "from nexus_cli.main import main\ntry:\n    main(sys.argv[1:])\nexcept SystemExit as end:\n"
            f"    print('@', end.code, *[m for m in {HEAVY} if m in sys.modules], *read, file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code, *arguments], cwd=cwd, capture_output=True, text=True,
                          env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin", "HOME": str(cwd)}, timeout=60)
    last = done.stderr.splitlines()[-1].split()
    assert last[0] == "@", done.stderr
    return int(last[1]), last[2:]


@pytest.mark.parametrize("arguments,code", [
    ([], 0), (["--help"], 0), (["--version"], 0), (["models"], 0), (["models", "list", "--json"], 0),
    (["help", "exit-codes"], 0), (["help", "nothing"], 2), (["frobnicate"], 2), (["sample"], 2), (["train"], 2),
    (["sample", "ddpm", "--stepz", "3"], 2), (["sample", "nothing"], 2), (["sample", "ddpm", "--steps", "0"], 2),
    (["sample", "ddpm", "--device", "gpu"], 2), (["sample", "ddpm", "-o", "a.txt", "-s", "1"], 2),
    (["sample", "ddpm", "-o", "{x}.png", "-s", "1"], 2), (["sample", "ddpm", "--image", "none.png"], 3),
    (["sample", "ddpm", "--prompt-file", "none.txt"], 3), (["sample", "ddpm", "--batch", "none.jsonl"], 3),
    (["sample", "ddpm", "-m", "no/model"], 4),
    (["sample", "ddpm", "-o", "there.png", "-s", "1"], 6), (["sample", "ddpm", "-o", "there.png/a.png", "-s", "1"], 6),
    (["train", "ddpm", "--data", "none", "--run", "r"], 3), (["train", "nothing", "--data", "emoji", "--run", "r"], 2),
    (["train", "ddpm", "--data", "emoji", "--run", "there.png"], 6),
    (["train", "ddpm", "--data", "emoji", "--run", "r", "--config", "none.toml"], 3),
    (["train", "ddpm", "--data", "emoji", "--run", "r", "--lr", "nan"], 2),
    (["train", "ddpm", "--data", "emoji", "--run", "r", "--init", "no/model"], 4),
    (["convert", "none", "b"], 4), (["convert", "there.png", "there.png"], 6), (["info", "none.safetensors"], 3),
    (["eval", "fid", "--samples", "none"], 3), (["gallery", "none"], 3),
    (["music"], 2), (["music", "-p", "x", "--key", "H"], 2), (["music", "-p", "x", "--bpm", "0"], 2),
    (["music", "-p", "x", "--melody", "none.wav"], 3), (["music", "-p", "x", "--continue", "none.wav"], 3),
    (["music", "-p", "x", "--bits", "24", "-o", "a.mp3"], 2), (["music", "-p", "x", "-m", "no/model"], 4),
    (["music", "-p", "x", "--format", "wav", "-o", "a.mp3"], 2), (["music", "-p", "x", "-m", "dit"], 2),
    (["music", "-p", "x", "--duration", "2h"], 2), (["music", "-p", "x", "--loudness", "3"], 2),
    (["info", "none.wav"], 3), (["train", "encodec", "--data", "none", "--run", "r"], 3),
])
def test_no_torch_for_help_and_mistakes(tmp_path, arguments, code):
    (tmp_path / "there.png").write_bytes(b"")
    found, modules = loaded(arguments, tmp_path)
    assert (found, {"torch", "packages"} & set(modules)) == (code, set())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_imports_nothing_heavy(tmp_path, command):
    assert loaded([command, "--help"], tmp_path) == (0, [])


def test_every_command_has_help(nexus):
    shown = nexus("--help").stdout.decode()
    for command in COMMANDS:
        assert f" {command} " in shown
        assert "help exit-codes" in nexus(command, "--help").stdout.decode()
    assert "To resume, run the same command again." in " ".join(nexus("train", "--help").stdout.decode().split())


@pytest.mark.parametrize("arguments,said", [
    (("sample", "ddpm", "--stepz", "3"), "did you mean --steps?"), (("sampel",), "Did you mean 'sample'?"),
    (("sample", "dppm"), "did you mean 'ddpm'?"), (("sample", "ddpm", "--sampler", "dimm"), "ddim"),
    (("sample", "ddpm", "-s", "1", "--seeds", "1"), "cannot be given together"),
    (("sample", "ddpm", "--strength", "0.5"), "needs --image"), (("sample", "ddpm", "-o", "-", "-N", "2"),
                                                                 "one picture"),
    (("sample", "ddpm", "-p", "-", "-b", "-"), "only one of"), (("sample", "ddpm", "-N", "2", "-o", "a.png"), "{n}"),
])
def test_a_mistake_has_one_line_and_a_next_step(nexus, tmp_path, arguments, said):
    done = nexus(*arguments, cwd=tmp_path)
    text = done.stderr.decode()
    assert done.returncode == 2 and done.stdout == b""
    assert text.startswith("error: ") and said in text and "hint: " in text
    assert "Traceback" not in text and "\x1b" not in text and len(text.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


def test_underscores_are_hyphens(nexus, tmp_path):
    done = nexus("sample", "mmdit", "-s", 1, "--batch_size=3", "--dry_run", "-p", "--dry_run", "--json", cwd=tmp_path)
    assert done.returncode == 0 and b'"prompt": "--dry_run"' in done.stdout


@pytest.mark.parametrize("environment,arguments,ansi", [
    ({}, (), False), ({"FORCE_COLOR": "1"}, (), True), ({"NO_COLOR": "1", "FORCE_COLOR": "1"}, (), False),
])
def test_colour_is_asked_for(nexus, environment, arguments, ansi):
    done = nexus("sample", "nothing", *arguments, env={"TERM": "xterm-256color", **environment})
    assert (b"\x1b[" in done.stderr) == ansi


@pytest.mark.parametrize("environment", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C",
                                                                                          "PYTHONUTF8": "0"}])
def test_any_locale_can_show_any_text(nexus, tmp_path, environment):
    done = nexus("sample", "mmdit", "-p", "😀".encode(), "-s", "1", "-o", "{prompt}.png", "--dry-run", cwd=tmp_path,
                 env=environment)
    assert done.returncode == 0, done.stderr
    done = nexus("sample", "mmdit", "-p", b"\xff\xfe", "-s", "1", "--dry-run", "--json", cwd=tmp_path, env=environment)
    assert done.returncode == 0, done.stderr


def test_standard_output_that_cannot_be_written(tmp_path):
    for target, code in (("> /dev/full", 6), (">&-", 0), ("| head -c 0", 0)):
        shell = f"set -o pipefail; {sys.executable} -m nexus_cli models {target}; exit ${{PIPESTATUS[0]}}"
        done = subprocess.run(["bash", "-c", shell], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
        assert done.returncode in ((code, 141) if "head" in target else (code,)), (target, done)
        assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_nothing_is_read_from_a_closed_stdin(nexus, tmp_path):
    shell = f"{sys.executable} -m nexus_cli sample ddpm -s 1 -p - <&-"
    done = subprocess.run(["bash", "-c", shell], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "piped" in done.stderr
