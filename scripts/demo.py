"""What `make demo` runs: a few things from every embedded checkpoint, and one contact sheet of them all."""

import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from nexus import api, checkpoint
from nexus.images import contact_sheet, enlarged, write_image
from nexus.requests import SampleRequest
from nexus.sounds import write_sound
from nexus.spectrograms import spectrogram

SHOWN = (
    ("dit", "dit", ("red apple", "pizza, twemoji style", "cat face, flat style", "rocket, 3d style")),
    ("mmdit", "mmdit", ("red heart, flat style", "sun, noto style", "owl, 3d style", "blue book")),
    ("pixart", "pixart", ("grinning face", "sunflower, flat style", "frog, twemoji style", "house")),
    ("flow", "flow", ("strawberry", "full moon, twemoji style", "soccer ball, 3d style", "tiger face, flat style")),
    ("rectified-flow", "rectified-flow", ("green apple", "bicycle, twemoji style", "bell", "bear, flat style")),
    ("sd", "sd", ("red heart", "orange circle", "smiling face, 3d style", "star")),
    ("conditional", "conditional", ("red heart, flat style", "yellow circle", "smiling face, 3d style", "star")),
    ("lcm", "lcm", ("red heart, flat style", "yellow circle", "smiling face, 3d style", "star")),
    ("consistency", "consistency", ("red heart, flat style", "yellow circle", "smiling face, 3d style", "star")),
    ("gan", "gan", (None,) * 4),
    ("wgan", "wgan", (None,) * 4),
    ("cgan", "cgan", ("0", "3", "5", "7")),
    ("ddpm", "ddpm", (None,) * 4),
    ("vae", "beta-vae", (None,) * 4),
)
CELL = 128          # pixels: a caption has to fit under a picture
MUSIC = ("slow sad piano in a minor", "fast happy flute in c major")


def main(folder: Path) -> None:
    """Write every picture and sound, then `contact-sheet.png`."""
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
    for made, said in (*_translated(folder / "dit-2.png"), *_music(folder)):
        pictures.append(made)
        captions.append(said)
    sheet = folder / "contact-sheet.png"
    write_image(sheet, contact_sheet([enlarged(picture, CELL) for picture in pictures], 8, captions))
    print(sheet)


def _translated(source: Path) -> Iterator[tuple[np.ndarray, str]]:
    """A picture that dit made in the flat style, as the outlines that CycleGAN makes of it, and back."""
    loaded = checkpoint.load("cyclegan", device="auto", system="cyclegan")
    for way in loaded.directions:
        item = next(api.sample(loaded, SampleRequest(image=str(source), direction=way), seeds=[0], model="cyclegan"))
        source = write_image(source.with_name(f"cyclegan-{way}.png"), item.image, item.record)
        yield item.image, f"cyclegan {way}"


def _music(folder: Path) -> Iterator[tuple[np.ndarray, str]]:
    """Pieces of music as .wav; what is yielded are their spectrograms."""
    loaded = checkpoint.load("music", device="auto", system="musicgen")
    for seed, prompt in enumerate(MUSIC):
        item = next(api.sample(loaded, SampleRequest(prompt=prompt, duration=5.0), seeds=[seed], model="music"))
        write_sound(folder / f"music-{seed}.wav", item.data, item.rate, item.record)
        yield spectrogram(item.data, item.rate, 64)[::2], prompt


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "demo"))
