"""Whole processes, start to end: `python benchmarks/start.py` prints a table. Nothing else may run meanwhile."""

import statistics
import subprocess
import sys
import tempfile
import time

ROUNDS = 7
CASES = {
    "nexus --help": ["--help"],
    "a wrong flag": ["sample", "dit", "--no-such-flag"],
    "a missing file": ["info", "no-such-file.png"],
    'nexus sample dit --prompt "red apple"': ["sample", "dit", "--prompt", "red apple"],
}


def seconds(arguments: list[str]) -> float:
    """One run of the command in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        subprocess.run([sys.executable, "-m", "nexus_cli", *arguments], cwd=folder, capture_output=True, check=False)
        return time.perf_counter() - begun


def main() -> None:
    """Every command ROUNDS times, in turn."""
    rounds = [{name: seconds(arguments) for name, arguments in CASES.items()} for _ in range(ROUNDS)]
    print("| command | median s | range |\n|---|---|---|")
    for name in CASES:
        each = sorted(row[name] for row in rounds)
        print(f"| `{name}` | {statistics.median(each):.2f} | {each[0]:.2f}-{each[-1]:.2f} |")


if __name__ == "__main__":
    main()
