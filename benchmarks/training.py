"""The README's trainings for 200 steps each: `python benchmarks/training.py [--music FOLDER] [SYSTEM]...`.

Prints a table. Nothing else may run meanwhile. Left out are those on a user's own pictures and those of several
processes, and without a folder of clips (`scripts/render_music.py` makes one) those on music; items/s is the command's
own last figure, so it counts neither the start nor the preparation of the data.
"""

import argparse
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 200
README = Path(__file__).resolve().parent.parent / "README.md"
OWN = "my-pictures/"
MUSIC = "music/"
ALSO = re.compile(r"# likewise (.+)")
SPEED = re.compile(r"([0-9.]+) items/s")


def commands(music: Path | None) -> list[list[str]]:
    """The arguments of every `nexus train` of the README that needs neither other data nor other processes.

    A comment "likewise a, b" stands for the same command with a and b for its system.
    """
    found = []
    for line in README.read_text().splitlines():
        if not line.startswith("nexus train") or "--run" not in line or OWN in line or (MUSIC in line and not music):
            continue
        words = shlex.split(line, comments=True)[1:]
        found.append(words)
        for system in also[1].split(", ") if (also := ALSO.search(line)) else ():
            found.append([system if word == words[1] else word.replace(f"runs/{words[1]}", f"runs/{system}")
                          for word in words])
    return found


def measured(arguments: list[str], folder: str) -> str:
    """One row of the table; the run goes into `folder`, where a later command finds it."""
    begun = time.perf_counter()
    made = subprocess.run([sys.executable, "-m", "nexus_cli", *arguments, "--steps", str(STEPS)], cwd=folder,
                          capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - begun
    found = SPEED.findall(made.stderr + made.stdout)
    said = f"{float(found[-1]):.1f}" if found else "-"
    shown = shlex.join(["nexus", *arguments])
    return f"| `{shown}` | {said} | {seconds:.0f} | {made.returncode} |"


def main() -> None:
    """Every training in turn, or those of some systems."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("systems", nargs="*", metavar="SYSTEM")
    parser.add_argument("--music", type=Path, metavar="FOLDER", help="clips for the trainings on music")
    given = parser.parse_args()
    print(f"| command, with --steps {STEPS} | items/s | s in all | exit code |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        if given.music:
            (Path(folder) / MUSIC).symlink_to(given.music.resolve())
        for arguments in commands(given.music):
            if not given.systems or arguments[1] in given.systems:
                print(measured(arguments, folder), flush=True)


if __name__ == "__main__":
    main()
