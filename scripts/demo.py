"""What `make demo` runs: a few pictures from every embedded checkpoint, and one contact sheet of them all."""

import shutil
import sys
import time
from pathlib import Path

from nexus import api, checkpoint
from nexus.images import contact_sheet, write_image
from nexus.requests import SampleRequest

SHOWN = (
    ("dit", "dit", ("red apple", "pizza, twemoji style", "cat face, flat style", "rocket, 3d style")),
    ("conditional", "conditional", ("red heart, flat style", "sun, noto style", "owl, 3d style", "blue book")),
    ("flow", "flow", ("strawberry", "full moon, twemoji style", "soccer ball, 3d style", "tiger face, flat style")),
    ("cgan", "cgan", ("0", "3", "5", "7")),
    ("ddpm", "ddpm", (None,) * 4),
    ("vae", "beta-vae", (None,) * 4),
)


def main(folder: Path) -> None:
    """Write every picture, then `contact-sheet.png`."""
    shutil.rmtree(folder, ignore_errors=True)
    pictures, captions = [], []
    for system, model, prompts in SHOWN:
        begun = time.monotonic()
        loaded = checkpoint.load(model, device="auto", system=system)
        for seed, prompt in enumerate(prompts):
            item = next(api.sample(loaded, SampleRequest(prompt=prompt), seeds=[seed], model=model))
            write_image(folder / f"{model}-{seed}.png", item.image, item.record)
            pictures.append(item.image.repeat(3, 2) if item.image.shape[2] == 1 else item.image)
            captions.append(prompt or f"{model} {seed}")
        print(f"{model}: {len(prompts)} pictures, {time.monotonic() - begun:.1f} s", file=sys.stderr)
    sheet = folder / "contact-sheet.png"
    write_image(sheet, contact_sheet(pictures, 4, captions))
    print(sheet)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
