"""Put what was measured of the embedded checkpoints into their pages: `python scripts/results.py [NAME...]`.

`nexus eval NAME -o scripts/measured/NAME.json` measures; this writes the table, and a picture of what the checkpoint
makes, between the marks `<!-- zoo results: NAME -->` and `<!-- end -->` of a page. With `--split concept` and
-o scripts/measured/NAME-concept.json it is measured on concepts that no training picture shows; a line says how well.
"""

import json
import re
import sys
from pathlib import Path

from nexus import api, checkpoint, stored
from nexus.images import contact_sheet, enlarged, write_image
from nexus.requests import SampleRequest
from nexus.text.conditioner import NoCondConfig

ROOT = Path(__file__).resolve().parent.parent
DOCS, MEASURED, PICTURES = ROOT / "docs", ROOT / "scripts" / "measured", ROOT / "docs" / "pictures"
MARKS = re.compile(r"<!-- zoo results: ([\w-]+) -->.*?<!-- end -->", re.DOTALL)
PROMPTS = ("red apple", "grinning face", "dog face, 3d style", "guitar, flat style", "frog, twemoji style",
           "sunflower, flat style", "rocket, 3d style", "bicycle, twemoji style")
CELL = 128          # pixels that a small picture is enlarged to about
BETWEEN = re.compile(r"real kid, (?!two halves|noto from flat)")    # every pair of styles: the card has them all


def rows(name: str) -> list[str]:
    """The table of one checkpoint and the line of its protocol."""
    found = json.loads((MEASURED / f"{name}.json").read_text(encoding="utf-8"))
    lines = ["| number | value | 95 % interval |", "|---|---|---|"]
    for key, value in found["numbers"].items():
        if BETWEEN.match(key):
            continue
        if isinstance(value, dict):
            lines.append(f"| {key} | {value['value']:.4g} | {value['low']:.4g} to {value['high']:.4g} |")
        else:
            lines.append(f"| {key} | {value:.4g} | |")
    facts = found["protocol"]
    shown = [f"{key} {facts[key]}" for key in ("data", "split", "made", "real", "clips", "steps", "guidance", "sampler",
                                               "seed") if facts.get(key) is not None]
    return [*lines, "", f"({', '.join(shown)}; the whole protocol stands in the card, `nexus/zoo/{name}/README.md`.)"]


def new_concepts(name: str) -> list[str]:
    """How well captions of wholly held-out concepts are followed; [] where that is not measured."""
    file = MEASURED / f"{name}-concept.json"
    if not file.exists():
        return []
    found = json.loads(file.read_text(encoding="utf-8"))
    made, other, real = (found["numbers"][key]["value"] for key in
                         ("caption top-5", "caption top-5, captions shuffled", "real caption top-5"))
    return ["", f"On {found['protocol']['made']} pictures of concepts that no training picture shows "
                f"(`--split concept`): caption top-5 {made:.4g}, for shuffled captions {other:.4g} ({made / other:.0f} "
                f"times), real pictures {real:.4g}; KID {found['numbers']['kid']['value']:.4g}."]


def few_steps(name: str) -> list[str]:
    """The table of a model of few steps against its teacher, which scripts/steps.py measured; [] for others."""
    file = MEASURED / "steps.json"
    found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if name not in found:
        return []
    teacher = found[name].pop("teacher")
    lines = ["", f"By the number of steps, {found['count']} held-out pairs (`scripts/steps.py`):", "",
             "| steps | KID | of the teacher's | caption top-5 |", "|---|---|---|---|"]
    for said, row in [*((steps, found[name][steps]) for steps in sorted(found[name], key=int)),
                      ("teacher, 30", teacher)]:
        share = row["kid"]["value"] / teacher["kid"]["value"]
        lines.append(f"| {said} | {row['kid']['value']:.4g} | {share:.2f} | {row['caption top-5']['value']:.4g} |")
    return lines


def picture(name: str) -> Path | None:
    """docs/pictures/NAME.webp, of pictures with the seeds 0 to 7; None for a model that makes no picture of nothing."""
    system = checkpoint.load(name, device="cpu")
    if getattr(system.config, "medium", "image") != "image" or not hasattr(system, "generate") or \
            hasattr(system, "translate"):
        return None
    told = not isinstance(getattr(system.config, "conditioner", NoCondConfig()), NoCondConfig)
    classes = getattr(getattr(system.config, "conditioner", None), "classes", ())
    prompts = ([None] * 8 if not told else [str(i) for i in range(8)] if "seven" in classes else
               [classes[i % len(classes)] for i in range(8)] if 0 < len(classes) < 20 else list(PROMPTS))
    made = [next(api.sample(system, SampleRequest(prompt=p), seeds=[s], model=name)).image
            for s, p in enumerate(prompts)]
    file = PICTURES / f"{name}.webp"
    cells = [enlarged(image, CELL) for image in made]
    write_image(file, contact_sheet(cells, 8, prompts if told else None), exists="overwrite")
    return file


def block(name: str) -> str:
    """What stands between the marks."""
    file = picture(name)
    shown = [f"![What {name} makes](pictures/{file.name})", ""] if file else []
    measured = rows(name) if (MEASURED / f"{name}.json").exists() else ["Not measured yet."]
    return "\n".join([f"<!-- zoo results: {name} -->", "", *shown, *measured, *new_concepts(name), *few_steps(name), "",
                      "<!-- end -->"])


def renewed(found: re.Match, names: list[str]) -> str:
    """The block that MARKS found, anew if its checkpoint is one of the names and there."""
    wanted = (not names or found[1] in names) and (stored.ZOO / found[1]).exists()
    if wanted:
        print(found[1])
    return block(found[1]) if wanted else found[0]


def main(names: list[str]) -> None:
    """Every page that has the marks of one of the names; all without any."""
    PICTURES.mkdir(exist_ok=True)
    for page in sorted(DOCS.glob("*.md")):
        text = page.read_text(encoding="utf-8")
        page.write_text(MARKS.sub(lambda found: renewed(found, names), text), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
