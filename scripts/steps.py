"""Measure the models of few steps at several numbers of steps, beside their teachers at 30.

    python scripts/steps.py [MODEL...] [--count 300] [--teacher lcm=runs/conditional]

Writes scripts/measured/steps.json, anew or with the numbers of the models that are named in place of their old ones.
scripts/results.py puts it into their pages: {model: {steps: {"kid", "caption top-5"}, "teacher": ...}}, on the held-out
pairs of the four styles, all numbers of the same prompts and seeds.
"""

import argparse
import json
from pathlib import Path

from nexus import api

OUT = Path(__file__).resolve().parent / "measured" / "steps.json"
TEACHERS = {"rectified-flow": "flow", "lcm": "conditional", "consistency": "dit"}
STEPS = (1, 2, 4, 8, 16, 32)
TEACHER_STEPS = 30
SHOWN = ("kid", "caption top-5")


def measured(model: str, steps: int, count: int) -> dict:
    """The two numbers of a model, with their intervals."""
    numbers = api.evaluate(model, data="emoji", steps=steps, count=count)["numbers"]
    print(model, steps, *(f"{key} {numbers[key]['value']:.4g}" for key in SHOWN), flush=True)
    return {key: numbers[key] for key in SHOWN}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help="all without any")
    parser.add_argument("--count", type=int, default=300)
    parser.add_argument("--teacher", action="append", default=[], metavar="MODEL=PATH")
    options = parser.parse_args()
    if unknown := set(options.models) - TEACHERS.keys():
        parser.error(f"{min(unknown)!r} is unknown, expected some of {', '.join(TEACHERS)}")
    teachers = TEACHERS | dict(text.split("=", 1) for text in options.teacher)
    found = json.loads(OUT.read_text("utf-8")) if options.models else {"count": options.count}
    if found["count"] != options.count:
        parser.error(f"--count {options.count}: {OUT.name} holds numbers of {found['count']}, which name all models")
    for model, teacher in teachers.items():
        if options.models and model not in options.models:
            continue
        found[model] = {"teacher": measured(teacher, TEACHER_STEPS, options.count)}
        for steps in STEPS:
            found[model][str(steps)] = measured(model, steps, options.count)
        OUT.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
