"""A run as one self-contained page: curves, samples, checkpoints, settings, and the command that goes on with it."""

import base64
import io
import json
import shlex
from html import escape
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from nexus.atomic import read_records, write_text
from nexus.checkpoint import open_file, read_description
from nexus.errors import InputError, ModelError
from nexus.images import read_image, read_record
from nexus.train.page import POLICY, SCRIPT, STYLE
from nexus.train.plots import curve, short, smoothed
from nexus.train.run import checkpoints, step_folder

SHEETS = 24                                     # sample sheets on the page, evenly spread over the run
PICTURE_BYTES = 2_800_000                       # of all sheets, before base64
CURVES = 12
SMALLER = ((80, 2048), (70, 1024), (60, 640), (45, 384), (30, 160))     # WebP quality, longest side


class Facts(NamedTuple):
    """What a run folder says about itself."""

    run: Path
    described: dict         # config.json, {} when it is missing or damaged
    train: dict             # the newest checkpoint's training arguments
    rows: list[dict]        # metrics.jsonl
    steps: list[int]        # checkpoints
    sheets: dict[Path, dict]        # sample sheets with the record inside each
    damaged: list[str]      # names of sheets that cannot be read

    @property
    def step(self) -> int:
        """The last step that is known to be finished."""
        return max([0, *self.steps, *(r["step"] for r in self.rows[-1:])])


def write_report(run: Path) -> None:
    """Rewrite RUN/report.html from what is in the folder; equal contents give an equal page. Raises OutputError."""
    write_text(run / "report.html", page(read_facts(run)), exists="overwrite")


def read_facts(run: Path) -> Facts:
    """Everything that the page shows, save pictures and digests."""
    described, steps = _described(run), checkpoints(run)
    train = _described(step_folder(run, steps[-1])).get("train") if steps else None
    rows = [r for r in read_records(run / "metrics.jsonl") if isinstance(r.get("step"), int)]
    sheets, damaged = {}, []
    for path in sorted((run / "samples").glob("step-*.webp")):
        try:
            sheets[path] = read_record(path) or {}
        except InputError:
            damaged.append(path.name)
    return Facts(run, described, train or described.get("train", {}), rows, steps, sheets, damaged)


def _described(folder: Path) -> dict:
    try:
        return read_description(folder)
    except ModelError:
        return {}


def page(facts: Facts) -> str:
    """The whole HTML text."""
    name = escape(f"{facts.run.name} \u00b7 {facts.described.get('system', 'run')}")
    body = [_head(facts), _warnings(facts), _tiles(facts), _samples(facts), _curves(facts), _resume(facts),
            _checkpoints(facts), _settings(facts)]
    return (f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{name}</title>\n'
            f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
            f'<meta name="viewport" content="width=device-width,initial-scale=1">\n<style>{STYLE}</style></head>\n'
            "<body><main>\n" + "\n".join(part for part in body if part)
            + f"\n</main><script>{SCRIPT}</script></body></html>\n")


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _head(facts: Facts) -> str:
    total = facts.train.get("steps") or facts.step or 1
    done = facts.step >= total
    state = "finished" if done else f"step {facts.step:,} of {total:,}"
    system = escape(str(facts.described.get("system", "")))
    return (f'<header><h1>{escape(facts.run.name)}</h1><span class="quiet">{system}</span>'
            f'<span class="pill{" done" if done else ""}">{state}</span></header>'
            f'<div class="bar"><i style="width:{min(100.0, 100 * facts.step / total):.1f}%"></i></div>')


def _warnings(facts: Facts) -> str:
    lines = [f"{p.name} was damaged and is set aside" for p in sorted(facts.run.glob("step-*.bad"))]
    lines += [f"step {r['step']:,} was not finite and is left out" for r in facts.rows if r.get("left_out")]
    lines += [f"{name} is no picture" for name in facts.damaged]
    if not facts.described:
        lines.append("config.json is missing or damaged")
    if not facts.steps:
        lines.append("there is no checkpoint yet; a stop now would lose everything")
    return f'<ul class="warnings">{"".join(f"<li>{escape(line)}</li>" for line in lines)}</ul>' if lines else ""


def _tiles(facts: Facts) -> str:
    tiles = [(f"{facts.step:,}", "steps finished")]
    if batch := facts.train.get("batch_size"):
        tiles.append((short(facts.step * batch), "pictures seen"))
    for key in _keys(facts.rows):
        if key == "loss" or key.endswith(".loss") or key == "psnr":
            tiles.append((f"{smoothed(_points(facts.rows, key))[-1][1]:.4g}", f"{key}, smoothed"))
    if numbers := _numbers(facts):
        tiles.append((short(numbers), "numbers in the model"))
    shown = "".join(f'<div class="tile"><b>{escape(a)}</b><span>{escape(b)}</span></div>' for a, b in tiles[:8])
    return f'<div class="tiles" style="margin-top:16px">{shown}</div>'


def _numbers(facts: Facts) -> int:
    """How many numbers the newest model holds, from its header alone."""
    total = 0
    try:
        if facts.steps:
            with open_file(step_folder(facts.run, facts.steps[-1]) / "model.safetensors") as file:
                for name in file.keys():
                    size = 1
                    for side in file.get_slice(name).get_shape():
                        size *= side
                    total += size
    except ModelError:
        return 0
    return total


def _keys(rows: list[dict]) -> list[str]:
    """Names of the logged numbers: losses, then the others as they were logged, then gradient norms and rates."""
    found = dict.fromkeys(k for r in rows for k, v in r.items() if isinstance(v, float) and v == v)
    return sorted(found, key=lambda k: (not k.endswith("loss"), k.endswith(("grad_norm", "lr"))))


def _points(rows: list[dict], key: str) -> list[tuple[float, float]]:
    return [(r["step"], r[key]) for r in rows if isinstance(r.get(key), float) and abs(r[key]) < float("inf")]


def _curves(facts: Facts) -> str:
    lines = {k: _points(facts.rows, k) for k in _keys(facts.rows)}
    keys = [k for k, points in lines.items() if len({y for _, y in points}) > (k == "lr")][:CURVES]
    if not keys:
        return _section("Curves", '<p class="quiet">no step has been logged yet</p>')
    cards = [f'<div class="card{" wide" if i == 0 else ""}"><h3>{escape(k)}</h3>'
             f"{curve(k, lines[k], 1080, 320) if i == 0 else curve(k, lines[k])}</div>" for i, k in enumerate(keys)]
    return _section("Curves", f'<div class="curves">{"".join(cards)}</div>')


def _samples(facts: Facts) -> str:
    if not facts.sheets:
        return ""
    sheets, count = list(facts.sheets), min(SHEETS, len(facts.sheets))
    chosen = [sheets[i * (len(sheets) - 1) // max(1, count - 1)] for i in range(count)]
    frames = [_frame(p, facts.sheets[p], PICTURE_BYTES // count, p == chosen[-1]) for p in chosen]
    last = count - 1
    scrub = (f'<div class="scrub"><button type="button">Play</button><input type="range" min="0" max="{last}" '
             f'value="{last}" aria-label="training step"><output>{_label(chosen[-1])}</output></div>' if last else "")
    about = '<p class="quiet">The same seeds and prompts every time, with the averaged weights.</p>'
    return _section("Samples", f'<div class="card" {"data-scrub" if last else ""}><div class="stage">{"".join(frames)}'
                               f"</div>{scrub}{_player(chosen[-1])}</div>{about}")


def _player(sheet: Path) -> str:
    """The sounds that the newest sheet shows, if it shows sounds."""
    sound = sheet.with_suffix(".flac")
    return f'<audio controls preload="none" src="samples/{escape(sound.name)}"></audio>' if sound.exists() else ""


def _label(sheet: Path) -> str:
    digits = sheet.stem.removeprefix("step-")
    return f"step {int(digits):,}" if digits.isdecimal() else escape(sheet.stem)


def _frame(sheet: Path, record: dict, share: int, shown: bool) -> str:
    prompts = ", ".join(str(p) for p in record.get("prompts") or [] if p)
    text = escape(f"samples at {_label(sheet)}" + (f": {prompts}" if prompts else ""))[:2000]
    data = base64.b64encode(_embedded(sheet, share)).decode()
    return (f'<a href="samples/{escape(sheet.name)}" data-label="{_label(sheet)}"{"" if shown else " hidden"}>'
            f'<img alt="{text}" src="data:image/webp;base64,{data}"></a>')


def _embedded(sheet: Path, share: int) -> bytes:
    """The sheet's own bytes when they are few, else the best smaller copy that fits its share of the page."""
    data = original = sheet.read_bytes()
    for quality, side in SMALLER:
        if len(data) <= share:
            break
        try:
            small = Image.fromarray(read_image(original))
        except InputError:
            return b""                      # its head is sound and its pixels are not
        small.thumbnail((side, side), Image.Resampling.LANCZOS)
        out = io.BytesIO()
        small.save(out, "WEBP", quality=quality, method=4)
        data = out.getvalue()
    return data


def resume_command(facts: Facts) -> str:
    """The command that goes on with the run; it names only what the folder does not know by itself."""
    steps, first = facts.train.get("steps"), facts.described.get("train", {}).get("steps")
    longer = f" --set train.steps={steps}" if steps != first else ""
    return (f"nexus train {shlex.quote(str(facts.described.get('system', '')))} "
            f"--data {shlex.quote(str(facts.described.get('data', '')))} --run {shlex.quote(str(facts.run))}{longer}")


def _resume(facts: Facts) -> str:
    if not facts.described:
        return ""
    return _section("Go on", f'<div class="card command"><code>{escape(resume_command(facts))}</code>'
                             '<button type="button" data-copy>Copy</button></div>')


def _checkpoints(facts: Facts) -> str:
    rows = []
    for step in reversed(facts.steps):
        folder = step_folder(facts.run, step)
        try:
            files = json.loads((folder / "manifest.json").read_text("utf-8"))["files"]
            size, digest = sum(f["size"] for f in files.values()), files["model.safetensors"]["sha256"]
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            size, digest = 0, "its manifest is damaged"
        rows.append(f'<tr><td><a href="{folder.name}/">{folder.name}</a></td>'
                    f'<td class="number">{size / 1e6:,.1f} MB</td><td class="digest">{escape(str(digest))}</td></tr>')
    if not rows:
        return ""
    head = '<tr><th>checkpoint</th><th class="number">size</th><th>sha256 of model.safetensors</th></tr>'
    return _section("Checkpoints", f'<div class="card"><table>{head}{"".join(rows)}</table></div>')


def _settings(facts: Facts) -> str:
    about = {k: facts.described[k] for k in ("system", "data", "data_digest", "nexus") if k in facts.described}
    tables = [("Run", about | _environment(facts.described)), ("Training", facts.train),
              ("System", flat(facts.described.get("config", {})))]
    cards = []
    for title, values in tables:
        rows = "".join(f"<tr><td>{escape(k)}</td><td>{escape(_value(v))}</td></tr>" for k, v in values.items())
        cards.append(f'<div class="card"><h3>{title}</h3><table>{rows}</table></div>' if rows else "")
    return _section("Settings", f'<div class="settings">{"".join(cards)}</div>') if any(cards) else ""


def _environment(described: dict) -> dict:
    found = described.get("environment")
    return {f"environment.{k}": v for k, v in found.items()} if isinstance(found, dict) else {}


def flat(config: dict, prefix: str = "") -> dict:
    """Nested settings as {"net.depth": 6}."""
    out = {}
    for key, value in config.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {prefix + key: value}
    return out


def _value(value: object) -> str:
    """A setting in a line: long lists and texts are cut."""
    if isinstance(value, list) and len(value) > 12:
        return ", ".join(str(v) for v in value[:12])[:400] + f" \u2026 and {len(value) - 12:,} more"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 500 else text[:500] + " \u2026"
