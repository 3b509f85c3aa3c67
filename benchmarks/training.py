"""The README's trainings for 200 steps each: `python benchmarks/training.py [SYSTEM]...` prints a table.

Nothing else may run meanwhile. Left out are those on a user's own pictures or sounds and those of several processes;
items/s is the command's own last figure, so it counts neither the start nor the preparation of the data.
"""

import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS = 200
README = Path(__file__).resolve().parent.parent / "README.md"
OWN = re.compile("my-|music/")
SPEED = re.compile(r"items_per_second ([0-9.]+)")


def commands() -> list[list[str]]:
    """The arguments of every `nexus train` of the README that needs neither other data nor other processes."""
    lines = (shlex.split(line, comments=True) for line in README.read_text().splitlines()
             if line.startswith("nexus train") and "--run" in line and not OWN.search(line))
    return [words[1:] for words in lines]


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


def main(wanted: list[str]) -> None:
    """Every training in turn, or those of some systems."""
    print(f"| command, with --steps {STEPS} | pictures/s | s in all | exit code |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        for arguments in commands():
            if not wanted or arguments[1] in wanted:
                print(measured(arguments, folder), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
