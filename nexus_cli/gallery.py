"""nexus gallery FOLDER: one page of all pictures and sounds of a folder, with their prompts and settings."""

import base64
import html
import io
import os
from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import typer

from nexus.atomic import check_target, read_records, write_text
from nexus.errors import InputError
from nexus_cli import options
from nexus_cli.media import PICTURES, SOUNDS
from nexus_cli.options import option
from nexus_cli.output import Output, strict_json

SIDE, LIMIT = 160, 2000
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data: 'self'; \
media-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title><style>
:root {{ color-scheme: light dark; font: 14px system-ui, sans-serif }}
main {{ display: grid; gap: 12px; grid-template-columns: repeat(auto-fill, minmax(180px, 1fr)) }}
figure {{ margin: 0; padding: 8px; border: 1px solid #8886; border-radius: 6px; overflow-wrap: anywhere }}
figure.failed {{ border-color: #c33; color: #c33 }} img, audio {{ display: block; margin: auto; \
max-width: 100% }}
figcaption {{ margin-top: 6px }} small {{ opacity: .75 }} input {{ margin-bottom: 12px; padding: 6px; width: 20em }}
</style></head><body><h1>{title}</h1>
<input type="search" placeholder="filter" aria-label="filter">
<main>
{figures}
</main><script>
document.querySelector('input').addEventListener('input', event => {{
  const word = event.target.value.toLowerCase();
  for (const figure of document.querySelectorAll('figure'))
    figure.hidden = !figure.textContent.toLowerCase().includes(word);
}});
</script></body></html>
"""


def gallery(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", show_default=False,
                                           help="A folder of pictures or sounds.")],
    output: Annotated[Path | None, option("--output", "-o", metavar="FILE", show_default=False,
                                          help="The page; default: index.html in the folder.")] = None,
    sheet: Annotated[Path | None, option("--sheet", metavar="FILE", show_default=False,
                                         help="Also one picture with all of them.")] = None,
    force: options.Force = False,
    quiet: options.Quiet = False,
    json_lines: options.Json = False,
) -> None:
    """Make a self-contained page of a folder's pictures and sounds; failed items of a batch are in red."""
    out = Output(json_lines=json_lines, quiet=quiet)
    if not folder.is_dir():
        raise InputError(f"there is no folder '{folder}'", hint="check the path")
    page, policy = output or folder / "index.html", "overwrite" if force else "error"
    for target in (page, sheet):
        if target is not None:
            check_target(target, exists=policy)
    from nexus import images
    files = sorted(path for path in folder.rglob("*") if not path.name.startswith(".") and path != sheet
                   and path.suffix.lower() in (*images.FORMATS, *SOUNDS.endings))
    if len(files) > LIMIT:
        out.warn(f"only the first {LIMIT} of {len(files)} files are shown")
    pictures, failed = [], [r for r in read_records(folder / "manifest.jsonl") if r.get("status") == "failed"]
    for path in files[:LIMIT]:
        try:
            pictures.append((path, _thumb(_seen(path))))
        except InputError as error:         # one broken file should not cost the page of all others
            out.warn(f"left out: {error}")
            failed.append({"id": str(path.relative_to(folder)), "error": {"message": str(error)}})
    if not pictures and not failed:
        raise InputError(f"there is no picture and no sound in '{folder}'")
    figures = [_figure(path, thumb, page.parent) for path, thumb in pictures] + [_failure(r) for r in failed]
    write_text(page, PAGE.format(title=html.escape(folder.resolve().name), figures="\n".join(figures)), exists=policy)
    out.result(str(page), {"status": "ok", "path": str(page), "pictures": len(pictures), "failed": len(failed)})
    if sheet is not None and pictures:
        columns = next(c for c in range(1, LIMIT) if c * c >= len(pictures))
        images.write_image(sheet, images.contact_sheet([thumb for _, thumb in pictures], columns), exists=policy)
        out.result(str(sheet), {"status": "ok", "path": str(sheet)})


def _seen(path: Path):
    """A picture, or a sound's spectrogram."""
    if not SOUNDS.ends(path):
        from nexus.images import read_image
        return read_image(path)
    from nexus.sounds import heard
    from nexus.spectrograms import spectrogram
    array, found = heard(path)
    return spectrogram(array, found.rate, SIDE)


def _thumb(array):
    import numpy as np
    from PIL import Image
    picture = Image.fromarray(array)
    picture.thumbnail((SIDE, SIDE))
    return np.asarray(picture)


def _figure(path: Path, thumb, base: Path) -> str:
    from PIL import Image
    kind = SOUNDS if SOUNDS.ends(path) else PICTURES
    data = io.BytesIO()
    Image.fromarray(thumb).save(data, "WEBP", quality=80)
    record = kind.record(path) or {}
    prompt = html.escape(_clean(record.get("prompt") or path.name), quote=True)
    facts = ", ".join(f"{key} {record[key]}" for key in ("seed", "steps", "duration", "guidance", "sampler", "model")
                      if record.get(key) is not None)
    link = quote(os.fsencode(os.path.relpath(path, base)))
    encoded = base64.b64encode(data.getvalue()).decode()
    player = f'<audio controls preload="none" src="{link}"></audio>' if kind is SOUNDS else ""
    return (f'<figure><a href="{link}"><img alt="{prompt}" loading="lazy" src="data:image/webp;base64,{encoded}"></a>'
            f"{player}<figcaption>{prompt}<br><small>{html.escape(_clean(facts))}</small></figcaption></figure>")


def _failure(record: dict) -> str:
    error = record.get("error")
    message = error.get("message") if isinstance(error, dict) else None
    return (f'<figure class="failed"><figcaption>{html.escape(_clean(record.get("id")))}<br>'
            f"<small>{html.escape(_clean(message or 'failed'))}</small></figcaption></figure>")


def _clean(value) -> str:
    text = value if isinstance(value, str) else strict_json(value)
    return text.encode("utf-8", "replace").decode().replace("\0", "")
