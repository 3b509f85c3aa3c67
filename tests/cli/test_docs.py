"""Every command that the README and the pages print is one that the command line takes."""

import re
import shlex
import signal
from pathlib import Path

import pytest

from nexus_cli.main import main

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PLANNED = ("sample", "music", "train")              # these can be asked what they would do
MISSING = {3, 4}                                    # a picture or a model of the reader's own is not here


def commands(page: Path) -> list[str]:
    """What its blocks of code tell a reader to type after `nexus`."""
    lines = [line.split("  #")[0] for block in re.findall(r"```[a-z]*\n(.*?)```", page.read_text("utf-8"), re.S)
             for line in block.replace("\\\n", " ").splitlines()]
    parts = [part.strip() for line in lines for part in re.split(r" && | \| ", line)]
    return [part.removeprefix("nexus ") for part in parts if re.match(r"nexus [a-z]", part)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_prints_can_be_typed(page, capsys):
    for command in dict.fromkeys(commands(page)):
        words = shlex.split(command)
        if words[0] not in (*PLANNED, "convert", "info"):
            continue
        if any(word in ("[-m", "...", "|") or word.startswith("[") for word in words):      # a synopsis
            continue
        plan = ["--dry-run"] if words[0] in PLANNED and "--dry-run" not in words else []
        with pytest.raises(SystemExit) as end:
            main([*words, *plan])
        said = capsys.readouterr().err
        assert end.value.code in {0, *MISSING}, f"{command}\n{said}"
        assert end.value.code == 0 or "there is no" in said or "No such file" in said, f"{command}\n{said}"
