"""Renders captioned music of its own making: a melody over a progression, played by a General MIDI soundfont.

    pip install --no-deps tinysoundfont==0.3.7                              # MIT; its pyaudio is for playing live
    apt-get download fluidr3mono-gm-soundfont && dpkg -x fluidr3mono-*.deb sf                                   # MIT
    python scripts/render_music.py OUT --soundfont sf/usr/share/fluidr3mono-gm-soundfont/FluidR3Mono_GM.sf3

OUT gets NNNNNN.flac, NNNNNN.json (the caption and every attribute, the melody's notes among them) and a card. Clip i
is a function of (--seed, i): the same command again makes what is missing, a larger --count more of the same.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nexus.atomic import write_bytes, write_text
from nexus.keys import TONICS
from nexus.loudness import levelled, loudness
from nexus.sounds import encode_sound, resampled

RENDER_RATE = 32_000                    # samples a second; half of it would fold overtones back
LEVEL = -18.0                           # LUFS
BEHIND = 6.0                            # by how much the accompaniment is quieter than the melody
FADE = 0.25                             # seconds at the end of a clip
SEMITONES = {"major": (0, 2, 4, 5, 7, 9, 11), "minor": (0, 2, 3, 5, 7, 8, 10)}
TEMPOS = tuple(range(60, 165, 5))       # beats a minute
SPEEDS = ((84, "slow"), (116, "medium tempo"), (999, "fast"))       # up to so many beats
MOODS = {"major": ("happy", "bright", "cheerful"), "minor": ("sad", "dark", "melancholic")}
DRUMS = 9                               # the channel of percussion
DRUM_NOTES = {"K": 36, "S": 38, "H": 42}


class Player(NamedTuple):
    """A General MIDI program, the lowest note of its melodies, and how loudly it plays."""

    program: int
    low: int
    velocity: int = 100


PLAYERS = {
    "piano": Player(0, 60), "music box": Player(10, 72), "vibraphone": Player(11, 60), "marimba": Player(12, 55),
    "church organ": Player(19, 55, 90), "accordion": Player(21, 58, 90), "nylon guitar": Player(24, 52, 110),
    "electric guitar": Player(27, 52), "violin": Player(40, 62, 95), "cello": Player(42, 43, 105),
    "harp": Player(46, 55, 110), "choir": Player(52, 57), "trumpet": Player(56, 58, 90),
    "saxophone": Player(65, 53, 95),
    "clarinet": Player(71, 56), "flute": Player(73, 67),
}
# Degrees from 0; each leaves no doubt where home is: 0, 5, 2, 6 would be heard in its relative major.
# The fifth degree of minor is played with the leading note.
PROGRESSIONS = {
    "major": ((0, 4, 5, 3), (0, 3, 4, 0), (0, 5, 3, 4), (0, 5, 1, 4), (0, 3, 0, 4), (0, 2, 3, 4)),
    "minor": ((0, 5, 0, 4), (0, 3, 4, 0), (0, 6, 5, 4), (0, 5, 3, 4), (0, 3, 0, 4), (0, 2, 5, 4)),
}


class Style(NamedTuple):
    """beats a bar (of a quarter, in 6/8 of a dotted one), tempos it may have, and who accompanies.

    pattern: of one bar, (beat, what, beats long): "b" the bass, "c" the chord, digits its notes, "K" "S" "H" drums.
    """

    metre: str
    tempos: tuple[int, int]
    backing: int
    bass: int
    pattern: tuple[tuple[float, str, float], ...]
    rhythms: tuple[tuple[float, ...], ...]


_PLAIN4 = ((1, 1, 1, 1), (2, 1, 1), (1.5, 0.5, 1, 1), (1, 0.5, 0.5, 2), (0.5, 0.5, 1, 0.5, 0.5, 1))
_CALM4 = ((2, 2), (3, 1), (2, 1, 1), (1, 1, 2))
_THREE = ((1, 1, 1), (2, 1), (1.5, 0.5, 1), (1, 0.5, 0.5, 1))
_SIX = ((2 / 3, 1 / 3, 2 / 3, 1 / 3), (1 / 3,) * 6, (1, 2 / 3, 1 / 3), (2 / 3, 1 / 3, 1))
_EIGHTHS = tuple((i / 2, "H", 0.1) for i in range(8))
STYLES = {
    "ballad": Style("4/4", (60, 90), 0, 32, tuple((i / 2, str((0, 1, 2, 1)[i % 4]), 0.6) for i in range(8)) +
                    ((0, "b", 4),), _CALM4),
    "march": Style("4/4", (100, 130), 61, 58, ((0, "b", 0.5), (1, "c", 0.4), (2, "b", 0.5), (3, "c", 0.4),
                                               (0, "K", 0.1), (1, "S", 0.1), (2, "K", 0.1), (3, "S", 0.1),
                                               (3.5, "S", 0.1)), _PLAIN4),
    "rock": Style("4/4", (110, 160), 29, 33, (*((i / 2, "b", 0.4) for i in range(8)), (0, "c", 2), (2, "c", 2),
                                              *_EIGHTHS, (0, "K", 0.1), (1, "S", 0.1), (2, "K", 0.1), (2.5, "K", 0.1),
                                              (3, "S", 0.1)), _PLAIN4),
    "dance": Style("4/4", (115, 140), 81, 38, (*((i, "K", 0.1) for i in range(4)), (0, "c", 0.7), (1.5, "c", 0.7),
                                               *((i + 0.5, "H", 0.1) for i in range(4)), (3, "c", 0.7),
                                               *((i + 0.5, "b", 0.4) for i in range(4))), _PLAIN4),
    "reggae": Style("4/4", (70, 95), 27, 33, (*((i + 0.5, "c", 0.2) for i in range(4)), (0, "b", 0.9), (1.5, "b", 0.4),
                                              (2, "b", 0.9), (2, "K", 0.1), (2, "S", 0.1), *_EIGHTHS), _PLAIN4),
    "hymn": Style("4/4", (60, 85), 19, 19, ((0, "c", 2), (0, "b", 2), (2, "c", 2), (2, "b", 2)), _CALM4),
    "ambient": Style("4/4", (60, 80), 89, 89, ((0, "c", 4), (0, "b", 4)), ((4,), (2, 2), (3, 1))),
    "waltz": Style("3/4", (100, 160), 0, 32, ((0, "b", 0.9), (1, "c", 0.5), (2, "c", 0.5)), _THREE),
    "lullaby": Style("3/4", (60, 85), 46, 32, tuple((i / 2, str((0, 1, 2, 1, 2, 1)[i]), 0.6) for i in range(6)) +
                     ((0, "b", 3),), _THREE),
    "jig": Style("6/8", (100, 130), 24, 32, ((0, "b", 0.6), (2 / 3, "c", 0.3), (1, "b", 0.6), (5 / 3, "c", 0.3)), _SIX),
}
BEATS = {"4/4": 4, "3/4": 3, "6/8": 2}


class Note(NamedTuple):
    """Seconds from the start, seconds long, and what is played how loudly by whom."""

    start: float
    length: float
    channel: int
    pitch: int
    velocity: int


def drawn(seed: int, index: int) -> dict:
    """The attributes of a clip."""
    rng = np.random.default_rng([seed, index])
    style, instrument, mode = (str(rng.choice(list(names))) for names in (STYLES, PLAYERS, SEMITONES))
    low, high = STYLES[style].tempos
    tempo = int(rng.choice([tempo for tempo in TEMPOS if low <= tempo <= high]))
    tonic = int(rng.integers(12))
    found = {"style": style, "instrument": instrument, "program": PLAYERS[instrument].program,
             "key": f"{TONICS[tonic]} {mode}", "tonic": tonic, "mode": mode, "tempo": tempo,
             "metre": STYLES[style].metre, "speed": next(word for top, word in SPEEDS if tempo < top),
             "mood": str(rng.choice(MOODS[mode])), "seed": seed, "index": index}
    return {"caption": caption(found, rng), **found}


def caption(found: dict, rng: np.random.Generator) -> str:
    """One of several ways to say it; each names the instrument, the key and its mode, the tempo and the style."""
    return str(rng.choice((
        "{speed} {mood} {instrument} in {key}, {style}, {tempo} bpm, {metre}",
        "{speed} {mood} {style} for {instrument} in {key}, {tempo} bpm",
        "{instrument}, {style}, {key}, {tempo} bpm, {metre}",
        "a {mood} {style} played on {instrument} in {key}, {metre}, {tempo} bpm",
        "{mood} {instrument} {style} in {key}, {speed}, {tempo} bpm",
        "{speed} {instrument} {style} in {key}, {tempo} bpm"))).format(**found)


def composed(found: dict, seconds: float) -> tuple[list[Note], list[int]]:
    """The notes of a clip, and the degrees of its bars' chords; from four bars on, as many as the time holds."""
    rng = np.random.default_rng([found["seed"], found["index"], 1])
    style, player = STYLES[found["style"]], PLAYERS[found["instrument"]]
    beat, beats = 60 / found["tempo"], BEATS[found["metre"]]
    bars = max(4, int(np.ceil(seconds / (beat * beats))))
    progression = PROGRESSIONS[found["mode"]][rng.integers(len(PROGRESSIONS[found["mode"]]))]
    degrees = [progression[bar % 4] for bar in range(bars)]
    notes, pitch = [], _near(found, degrees[0], 0, player.low + 7)
    motif = [style.rhythms[rng.integers(len(style.rhythms))] for _ in range(2)]
    for bar, degree in enumerate(degrees):
        start = bar * beats * beat
        notes += [n for event in style.pattern for n in _accompanied(found, degree, *event, start, beat)]
        at = 0.0
        for length in motif[bar % 2]:
            on_beat = abs(at - round(at)) < 1e-6
            pitch = _next(found, degree, pitch, on_beat, player.low, rng)
            notes.append(Note(start + at * beat, length * beat * 0.95, 0, pitch, player.velocity - 8 * (not on_beat)))
            at += length
    return sorted(notes), degrees


def _pitches(found: dict, degree: int) -> list[int]:
    """The pitch classes of a degree's triad, in semitones above C; minor's dominant has the leading note."""
    scale = SEMITONES[found["mode"]]
    triad = [scale[(degree + step) % 7] for step in (0, 2, 4)]
    if found["mode"] == "minor" and degree == 4:
        triad[1] += 1
    return [(found["tonic"] + step) % 12 for step in triad]


def _near(found: dict, degree: int, which: int, around: int) -> int:
    """The MIDI note of a chord's member that is nearest to another one."""
    wanted = _pitches(found, degree)[which]
    return min(range(around - 6, around + 6), key=lambda pitch: ((pitch - wanted) % 12 != 0, abs(pitch - around)))


def _next(found: dict, degree: int, last: int, strong: bool, low: int, rng: np.random.Generator) -> int:
    """The melody's next note: on a beat one of the chord, else a step of the scale from the last one."""
    home = min(max(last + int(rng.integers(-4, 5)), low + 1), low + 15)
    chord = _pitches(found, degree)
    if strong:
        return min((_near(found, degree, which, home) for which in range(3)), key=lambda pitch: abs(pitch - home))
    scale = {(found["tonic"] + step) % 12 for step in SEMITONES[found["mode"]]} - \
        {(pitch - 1) % 12 for pitch in chord if found["mode"] == "minor" and degree == 4} | set(chord)
    way = 1 if last < low + 3 else -1 if last > low + 14 else int(rng.choice((-1, 1)))
    return next(pitch for step in range(1, 13) if (pitch := last + way * step) % 12 in scale)


def _accompanied(found: dict, degree: int, at: float, what: str, length: float, start: float,
                 beat: float) -> list[Note]:
    """The notes of one event of a style's pattern."""
    begin, long = start + at * beat, length * beat
    if what in DRUM_NOTES:
        return [Note(begin, long, DRUMS, DRUM_NOTES[what], 60 if what == "H" else 90)]
    if what == "b":
        return [Note(begin, long, 2, _near(found, degree, 0, 40), 85)]
    members = range(3) if what == "c" else [int(what)]
    return [Note(begin, long, 1, _near(found, degree, member, 57), 62) for member in members]


class Band:
    """A synthesizer with a soundfont; it plays one clip after the other, each as if it were the first."""

    def __init__(self, soundfont: Path):
        import tinysoundfont
        self.synth = tinysoundfont.Synth(samplerate=RENDER_RATE, gain=-8)
        self.font = self.synth.sfload(str(soundfont))

    def play(self, found: dict, notes: list[Note], seconds: float, rate: int) -> np.ndarray:
        """float32 [1, T] at LEVEL."""
        style = STYLES[found["style"]]
        for channel, program in enumerate((found["program"], style.backing, style.bass)):
            self.synth.program_select(channel, self.font, 0, program)
        self.synth.program_select(DRUMS, self.font, 128, 0)
        melody = self._played([note for note in notes if note.channel == 0], seconds)
        others = self._played([note for note in notes if note.channel != 0], seconds)
        gain = 10 ** ((loudness(melody, RENDER_RATE) - BEHIND - loudness(others, RENDER_RATE)) / 20)
        x = melody + np.float32(gain) * others
        x[:, -round(FADE * RENDER_RATE):] *= np.linspace(1, 0, round(FADE * RENDER_RATE), dtype=np.float32)
        return levelled(resampled(x, RENDER_RATE, rate), rate, LEVEL)

    def _played(self, notes: list[Note], seconds: float) -> np.ndarray:
        """float32 [1, T] at RENDER_RATE."""
        turns = sorted([(round(n.start * RENDER_RATE), 1, n) for n in notes] +
                       [(round((n.start + n.length) * RENDER_RATE), 0, n) for n in notes])
        end, done, parts = round(seconds * RENDER_RATE), 0, []
        for place, begins, note in turns:
            if place >= end:
                break
            parts.append(self._heard(place - done))
            done = place
            if begins:
                self.synth.noteon(note.channel, note.pitch, note.velocity)
            else:
                self.synth.noteoff(note.channel, note.pitch)
        parts.append(self._heard(end - done))
        self.synth.sounds_off()
        self._heard(2 * RENDER_RATE)                    # what rings on is not heard in what comes next
        return np.concatenate(parts, 1)

    def _heard(self, samples: int) -> np.ndarray:
        if samples <= 0:
            return np.zeros((1, 0), np.float32)
        return np.frombuffer(bytes(self.synth.generate(samples)), np.float32).reshape(-1, 2).mean(1)[None]


CARD = """# Rendered music: {count:,} clips of {seconds:g} s, {rate:,} samples a second, mono

Made by `scripts/render_music.py` of Nexus with `--seed {seed} --count {count} --seconds {seconds:g} --rate {rate}`; the
same command makes the same files. Every piece is drawn and composed by the script: a melody over a progression of four
chords, accompanied as its style asks. No score, recording or model of anyone else went in.

NNNNNN.flac is the sound, NNNNNN.json says of it: `caption`, `instrument` (with its General MIDI `program`), `key`,
`tonic` (semitones above C), `mode`, `tempo` (beats a minute; of a dotted quarter in 6/8), `metre`, `style`, `speed`,
`mood`, `degrees` (the chord of each bar, 0 = the tonic's) and `melody` ([start, length, MIDI note], in seconds).

Instruments: {instruments}. Styles: {styles}. Keys: 12 tonics, major and minor. Tempos: {tempos}.

What it is not: played by people, sung, or recorded in a room; nobody should take a model of it for one of all music.

## Licences

The compositions and captions are the script's output and under its licence, Apache-2.0. The sounds are those of
{font}: FluidR3Mono (MIT), mono version (c) 2014-2017 Michael Cowgill, Temple Blocks (c) 2002 Ethan Winer, Drumline
Percussion (c) 2016 Michael Schorsch, original Fluid (R3) GM (c) 2000-2002, 2008 Frank Wen; rendered by tinysoundfont
(MIT, (c) Nathan Whitehead; TinySoundFont (c) Bernhard Schelling). With another --soundfont, its licence holds instead.
"""


def clip(band: Band, index: int, options: argparse.Namespace) -> tuple[bytes, dict]:
    """The file and the attributes of one clip."""
    found = drawn(options.seed, index)
    notes, degrees = composed(found, options.seconds)
    x = band.play(found, notes, options.seconds, options.rate)
    melody = [[round(n.start, 4), round(n.length, 4), n.pitch] for n in notes if n.channel == 0]
    found |= {"degrees": [int(d) for d in degrees], "seconds": options.seconds, "rate": options.rate,
              "melody": [row for row in melody if row[0] < options.seconds]}
    return encode_sound(x, options.rate, options.format.upper(), {"caption": found["caption"]}), found


def render(options: argparse.Namespace) -> None:
    """Make every clip that is not there yet; its .json is written last, so that it says that the clip is whole."""
    options.out.mkdir(parents=True, exist_ok=True)
    names = {"count": options.count, "seconds": options.seconds, "rate": options.rate, "seed": options.seed}
    write_text(options.out / "README.md", CARD.format(
        **names, font=options.soundfont.name, instruments=", ".join(PLAYERS), styles=", ".join(STYLES),
        tempos=f"{TEMPOS[0]} to {TEMPOS[-1]} in steps of {TEMPOS[1] - TEMPOS[0]}"), exists="overwrite")
    missing = [i for i in range(options.count) if not (options.out / f"{i:06d}.json").exists()]
    band, begun = Band(options.soundfont) if missing else None, time.monotonic()
    for done, index in enumerate(missing, 1):
        data, found = clip(band, index, options)
        stem = options.out / f"{index:06d}"
        write_bytes(stem.with_suffix(f".{options.format}"), data, exists="overwrite")
        write_text(stem.with_suffix(".json"), json.dumps(found, sort_keys=True) + "\n", exists="overwrite")
        if done % 100 == 0 or done == len(missing):
            each = (time.monotonic() - begun) / done
            left = each * (len(missing) - done)
            print(f"{done}/{len(missing)} clips, {each:.3f} s each, {left:.0f} s to go", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--soundfont", type=Path, required=True)
    parser.add_argument("--count", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--rate", type=int, default=16_000, choices=(16_000, 24_000, 32_000))
    parser.add_argument("--format", default="flac", choices=("flac", "ogg", "wav"))
    options = parser.parse_args()
    if not options.soundfont.is_file():
        sys.exit(f"there is no soundfont '{options.soundfont}'")
    render(options)


if __name__ == "__main__":
    main()
