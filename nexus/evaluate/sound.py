"""`nexus eval` of what makes sound: codecs by what they rebuild, models of music by what they make."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from torch import Tensor, nn

from nexus.data.audio import DEFAULT_SECONDS, AudioSet, open_audio
from nexus.errors import InputError, UsageError
from nexus.evaluate import sets, sound_attributes, sound_codec, sound_listen, sound_melody, sound_quality, sound_sets
from nexus.evaluate.bootstrap import DRAWS
from nexus.evaluate.judge import Settings, order
from nexus.evaluate.kernel import FEWEST
from nexus.evaluate.sound_features import RATE, Clips, Ear, cached, described, open_ear, with_length
from nexus.requests import SampleRequest, refuse
from nexus.rng import derive
from nexus.sounds import FORMATS, facts, read_record, read_sound

MOST = 200              # sounds that are made or rebuilt unless a count is given
MOST_REBUILT = 100      # held-out clips that are sent through the codec under a model
MOST_REAL = 400         # held-out clips that are looked at
MOST_TRAIN = 2000       # training clips: a first look takes some 40 ms a clip and core
INTERVAL = f"95 %: jackknife (kad), bootstrap over clips with {DRAWS} draws (the others)"

Generate = Callable[[list[str | None], list[int]], Iterator[np.ndarray]]


class Judge(NamedTuple):
    """Real held-out clips with their vectors [N, W, D]; what was found on them alone; None where nothing is read."""

    ear: Ear
    held: Clips
    vectors: Tensor
    checks: sets.Numbers
    valid: str
    probe: sound_attributes.Probe | None
    real: sets.Numbers


def judged(system: nn.Module, data: str, about: dict, request: SampleRequest, settings: Settings,
           generate: Generate) -> dict:
    """The report on a system that makes sound, of held-out clips of `data`; about: what the protocol starts with.

    Raises UsageError for a setting that the system does not take.
    """
    refuse(request, system.takes, "this model of sound has no such setting")
    rebuilds, config = sound_codec.is_codec(system), system.config
    seconds = request.duration or (DEFAULT_SECONDS if rebuilds else config.seconds)
    # A longer piece is compared by its beginning: real clips are as long as what the model has learnt from.
    held = open_audio(data, rate=config.rate, channels=config.channels, split=settings.split,
                      seconds=seconds if rebuilds else min(seconds, config.seconds))
    about = about | _about(held, data, settings) | {"seconds": seconds}
    if rebuilds:
        return _rebuilt(system, held, about, settings)
    used = getattr(system, "used_settings", lambda request: {})(request)
    return _generated(system, held, data, about | used, request, settings, generate)


def _about(held: AudioSet, data: str, settings: Settings) -> dict:
    return {"data": data, "data_sha256": held.facts.digest, "split": settings.split, "held_out": len(held),
            "seed": settings.seed, "interval": INTERVAL}


def _rebuilt(system: nn.Module, held: AudioSet, about: dict, settings: Settings) -> dict:
    """Numbers on clips and what the codec makes of them, and how far those are from other real clips."""
    count = min(settings.count or MOST, len(held))
    rows, made = order(len(held), count, settings.seed), []
    ear = open_ear(settings.extractor or "mel")
    found = sound_codec.measured(system, (held.get(row)[:, :held.length] for row in rows), seed=settings.seed,
                                 watch=lambda done: settings.watch(done, count), made=made.append)
    about |= {"clips": count, **sound_codec.protocol(system)}
    if count >= 2 * FEWEST:
        clips = Clips(held, rows)
        vectors = cached(f"ear {ear.digest}", clips, ear.describe, settings.watch)
        after = described(with_length(made, held.length), held.facts.rate, ear.describe, count, settings.watch)
        checks, valid = sound_sets.validated(ear, clips, vectors, settings.seed, settings.watch)
        found |= _crossed(vectors, after) | checks
        about |= sound_sets.protocol(ear) | {"check": valid}
    return {"protocol": about, "numbers": found}


def _crossed(real: Tensor, rebuilt: Tensor) -> sets.Numbers:
    """How far rebuilt clips are from real ones that they are no copies of: vectors of the same clips, halves crossed.
    """
    half = len(real) // 2
    return sound_sets.apart(real[:half], rebuilt[half:], ", rebuilt half from the other real half")


def _generated(system: nn.Module, held: AudioSet, data: str, about: dict, request: SampleRequest, settings: Settings,
               generate: Generate) -> dict:
    """One piece for each held-out clip, with its caption if the system takes prompts; then some to their melodies."""
    count = settings.count or min(len(held), MOST)
    _enough(count)
    reads = getattr(system, "conditioner", None) is not None
    # First the judge: what it lacks should be known before an hour of sampling.
    judge = prepare(held, data, open_ear(settings.extractor or "mel"), reads=reads, settings=settings)
    rows = order(len(held), count, settings.seed)
    prompts = Clips(held, rows).captions() if reads else [None] * count
    seeds = [derive(settings.seed, "evaluate", i) for i in range(count)]
    made = []
    for piece in generate(prompts, seeds):
        made.append(piece)
        settings.watch(len(made), count)
    report = _report(judge, made, held.facts.rate, prompts if reads else None, about, settings,
                     sound_quality.seams(system.config, about["seconds"]))
    if hasattr(system, "encode") and hasattr(system, "decode"):
        report["numbers"] |= _through_codec(system, judge, settings)
    if sound_melody.follows(system):
        some = slice(sound_melody.MOST)
        found, how = sound_melody.measured(system, request, Clips(held, rows[some]), prompts[some], seeds[some],
                                           settings.watch)
        report = {"protocol": report["protocol"] | how, "numbers": report["numbers"] | found}
    return report


def _through_codec(system: nn.Module, judge: Judge, settings: Settings) -> sets.Numbers:
    """What is left of real clips in the tokens that the model writes: no piece of it could do better."""
    clips = judge.held._replace(rows=judge.held.rows[:MOST_REBUILT])
    rate, count, watch = clips.set.facts.rate, len(clips.rows), settings.watch
    made = list(sound_codec.through(system, clips.sounds()))
    vectors = described(made, rate, judge.ear.describe, count, watch)
    found = _crossed(judge.vectors[:count], vectors)
    if judge.probe is not None:
        heard = sound_listen.features(described(made, rate, sound_listen.listen, count, watch))
        read = sound_attributes.read_by(judge.probe, heard, clips.captions(), settings.seed)
        found |= {f"rebuilt {name}": number for name, number in read.items()}
    return found


def _enough(count: int) -> None:
    if count < FEWEST:
        raise UsageError(f"{count} sounds are too few to compare", hint=f"{FEWEST} at least, hundreds for a number")


def prepare(held: AudioSet, data: str, ear: Ear, *, reads: bool, settings: Settings) -> Judge:
    """Look at the real clips of `data`, held out and training; reads: captions are wanted too."""
    seed, watch = settings.seed, settings.watch
    clips = Clips(held, order(len(held), min(len(held), MOST_REAL), seed))
    _enough(len(clips.rows))
    vectors = cached(f"ear {ear.digest}", clips, ear.describe, watch)
    checks, valid = sound_sets.validated(ear, clips, vectors, seed, watch)
    if not reads:
        return Judge(ear, clips, vectors, checks, valid, None, {})
    facts = held.facts
    train = open_audio(data, rate=facts.rate, channels=facts.channels, seconds=facts.seconds, split="train")
    learnt = Clips(train, sorted(order(len(train), min(len(train), MOST_TRAIN), seed)))
    probe = sound_attributes.fit(_listened(learnt, watch), learnt.captions())
    real = sound_attributes.read_by(probe, _listened(clips, watch), clips.captions(), seed)
    return Judge(ear, clips, vectors, checks, valid, probe, real)


def _listened(clips: Clips, watch) -> sound_attributes.Features:
    return sound_listen.features(cached(sound_listen.NAME, clips, sound_listen.listen, watch))


def _report(judge: Judge, made: list[np.ndarray], rate: int, prompts: list[str] | None, about: dict,
            settings: Settings, joints: list[int]) -> dict:
    """All numbers on sounds made at `rate`, and those of real clips beside them; joints: where windows meet."""
    short = with_length(made, round(judge.held.set.facts.seconds * rate))
    vectors = described(short, rate, judge.ear.describe, len(made), settings.watch)
    found = sound_sets.apart(judge.vectors, vectors)
    found |= sets.overlap(judge.vectors.mean(1), vectors.mean(1), settings.seed) | judge.checks
    about = about | {"made": len(made), "real": len(judge.held.rows), **sound_sets.protocol(judge.ear),
                     "check": judge.valid, **sound_quality.protocol(), "seams": len(joints)}
    if judge.probe is not None and prompts is not None:
        heard = sound_listen.features(described(short, rate, sound_listen.listen, len(made), settings.watch))
        read = sound_attributes.read_by(judge.probe, heard, prompts, settings.seed)
        found |= sets.beside_real(read, {name: judge.real[name] for name in read if name in judge.real})
        about |= sound_attributes.protocol(judge.probe) if read else {}
    return {"protocol": about, "numbers": found | sound_quality.numbers(made, rate, joints, settings.seed)}


def sounds_in(folder: Path) -> list[Path]:
    """The sound files of a folder, by name."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in FORMATS and p.is_file())


def folder_judged(folder: Path, data: str, duration: float | None, settings: Settings) -> dict:
    """The report on a folder of sounds made before; what they were to be is read from the records inside them."""
    files = sounds_in(folder)[:settings.count]
    if len(files) < FEWEST:
        raise InputError(f"there are {len(files)} sounds in {folder}, {FEWEST} at least are needed",
                         hint="endings: " + " ".join(FORMATS))
    rate = facts(files[0]).rate
    made = [read_sound(path, rate, 1) for path in files]
    prompts = [(read_record(path) or {}).get("prompt") for path in files]
    reads = all(isinstance(prompt, str) and prompt for prompt in prompts)
    seconds = min(duration or DEFAULT_SECONDS, min(x.shape[1] for x in made) / rate)
    held = open_audio(data, rate=RATE, seconds=seconds, split=settings.split)
    judge = prepare(held, data, open_ear(settings.extractor or "mel"), reads=reads, settings=settings)
    about = {"folder": str(folder), **_about(held, data, settings), "seconds": seconds}
    return _report(judge, made, rate, prompts if reads else None, about, settings, [])
