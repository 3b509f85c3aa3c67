"""nexus music: pieces of music from a text, a melody or a beginning."""

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

from nexus.errors import ModelError, UsageError
from nexus_cli import options, parse, plan
from nexus_cli.jobs import worded
from nexus_cli.making import Engine
from nexus_cli.media import PICTURES, SOUNDS, Style
from nexus_cli.options import FILES, HOW, WHAT, option

PASSED = ("negative_prompt", "duration", "temperature", "top_k", "top_p", "guidance", "guidance_style", "melody",
          "continued")                                      # fields of the request as they are
FORMATS = tuple(ending[1:] for ending in SOUNDS.endings)
SOUND_LIMIT = 512 * 2**20
SECONDS, LOUDNESS = 10.0, -14.0


def key(text: str) -> str:
    """A key as captions write it, "f sharp minor", from "F#m", "f-sharp minor" or "Gb"."""
    from nexus.keys import key_name
    try:
        return key_name(str(text))
    except UsageError as error:
        raise typer.BadParameter(f"{error}, {error.hint}") from None


def loudness(text: str) -> float | None:
    """LUFS from -70 to 0, or "off"."""
    return None if str(text) == "off" else parse.number(-70, 0)(text)


def music(
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    negative_prompt: options.NegativePrompt = None,
    bpm: Annotated[int | None, option("--bpm", parser=parse.whole(20, 400), metavar="N", panel=WHAT,
                                      show_default=False, help="Add a tempo to the prompt.")] = None,
    in_key: Annotated[str | None, option("--key", parser=key, metavar="KEY", panel=WHAT, show_default=False,
                                         help="Add a key to the prompt: 'A minor', F#m, Bb.")] = None,
    duration: Annotated[float | None, option("--duration", parser=parse.duration, metavar="TIME", panel=WHAT,
                                             show_default=False,
                                             help="How long, with what it goes on with: 10, 90s, 2m.")] = None,
    melody: Annotated[str | None, option("--melody", metavar="FILE", panel=WHAT, show_default=False,
                                         help="Follow its melody, or with a style model its style.")] = None,
    continued: Annotated[str | None, option("--continue", metavar="FILE", panel=WHAT, show_default=False,
                                            help="Go on with this sound; - is stdin.")] = None,
    num: options.Num = 1,
    seed: options.Seed = None,
    seeds: options.Seeds = None,
    model: options.Model = None,
    temperature: Annotated[float | None, option("--temperature", parser=parse.number(0, 100), metavar="T", panel=HOW,
                                                show_default=False, help="Of the draw; 0 = the likeliest.")] = None,
    top_k: Annotated[int | None, option("--top-k", parser=parse.whole(0, 65_536), metavar="K", panel=HOW,
                                        show_default=False, help="Draw among the K likeliest; 0 = all.")] = None,
    top_p: Annotated[float | None, option("--top-p", parser=parse.number(0, 1), metavar="SHARE", panel=HOW,
                                          show_default=False, help="Draw among the likeliest of this share.")] = None,
    guidance: options.Guidance = None,
    guidance_style: Annotated[float | None, option("--guidance-style", parser=parse.number(0, 1000), metavar="SCALE",
                                                   panel=HOW, show_default=False,
                                                   help="The outer scale of double guidance.")] = None,
    output: options.Output = None,
    form: Annotated[str | None, option("--format", parser=parse.one_of(*FORMATS), metavar="NAME", panel=FILES,
                                       show_default=False, help="wav, flac, ogg or mp3.")] = None,
    bits: Annotated[int, option("--bits", parser=lambda text: int(parse.one_of("16", "24", "32")(str(text))),
                                metavar="N", panel=FILES, help="16, 24 (wav, flac) or 32 (wav, floating).")] = 16,
    level: Annotated[object, option("--loudness", parser=loudness, metavar="LUFS", panel=FILES,
                                    help="How loud the files are; off = as they were made.")] = str(LOUDNESS),
    spectrogram: Annotated[str | None, option("--spectrogram", metavar="FILE", panel=FILES, show_default=False,
                                              help="Also a picture of it; of several with {n}, {seed}, {id}.")] = None,
    exists: options.Exists = None,
    force: options.Force = False,
    like: options.Like = None,
    no_metadata: options.NoMetadata = False,
    batch: options.Batch = None,
    on_error: options.OnError = None,
    shard: options.Shard = None,
    limit: options.Limit = None,
    verify: options.Verify = False,
    max_time: options.MaxTime = None,
    batch_size: options.BatchSize = None,
    show: options.Show = False,
    json_lines: options.Json = False,
    quiet: options.Quiet = False,
    verbose: options.Verbose = 0,
    progress: options.Progress = "auto",
    color: options.Color = "auto",
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    dry_run: options.DryRun = False,
) -> None:
    """Make music. Piece k of a prompt has the seed + k and is the same whatever the batch size."""
    flags = dict(locals())
    out = plan.output_of(flags)
    plan.check_flags(flags, SOUNDS, streams=("melody", "continued"))
    style = Style(_format(flags), bits, level)
    with ExitStack() as stack:
        settings, model, seed = _settings(flags, out, stack)
        system = _system(model)
        words = _words(flags)
        if batch is None:                               # a row's own prompt gets them after it is read
            settings, words = worded(settings, words), ()
        asked = plan.asked_for(system, model, settings, seed, flags, SOUNDS, ext=style.form.lower(), words=words)
        ways = plan.ways_of(flags, SOUNDS, style=style, beside=_template(spectrogram))
        plan.carry_out(asked, Engine(system, model, device, dtype, batch_size or 4), ways, flags, out)


def _format(flags: dict) -> str:
    """The format that --format or the ending of -o asks for; UsageError where they, or --bits, do not agree."""
    ending = Path(flags["output"] or "").suffix.lower()[1:]
    ending = ending if ending in FORMATS else ""
    if flags["form"] and ending and ending != flags["form"]:
        raise UsageError(f"--format {flags['form']} and --output '{flags['output']}' do not agree",
                         hint="leave --format out")
    form = flags["form"] or ending or FORMATS[0]
    if flags["bits"] != 16 and form != "wav" and (form, flags["bits"]) != ("flac", 24):
        raise UsageError(f"{form} does not hold {flags['bits']} bits a sample", hint="wav holds 16, 24 and 32, flac 24")
    return form.upper()


def _settings(flags: dict, out, stack: ExitStack) -> tuple[dict, str | None, int | None]:
    """The request's fields from --like and the flags, the model and the seed; every input file is there."""
    stored, model, seed = plan.like(flags["like"], SOUNDS, out) if flags["like"] else ({}, None, None)
    if stored.get("prompt"):
        stored["prompt"] = _unsaid(stored["prompt"], flags)
    settings = plan.gathered(flags, PASSED, stored)
    if "continued" not in settings:                     # without a length, a sound is gone on with by the model's own
        settings = {"duration": SECONDS} | settings
    if settings.get("duration", 0) > 3600:
        raise UsageError(f"--duration {settings['duration']:g}: a piece lasts at most an hour", hint="--duration 1h")
    for name in ("melody", "continued"):
        if settings.get(name) == "-":
            settings[name] = plan.stdin_file("the sound", SOUND_LIMIT, stack)
    plan.check_paths(settings)
    if flags["seed"] is not None or flags["seeds"] is not None:
        seed = flags["seed"]
    return settings, plan.model_there(flags["model"] or model), seed


def _words(flags: dict) -> tuple[str, ...]:
    """What --key and --bpm add to a prompt."""
    said = flags["in_key"] and f"in {flags['in_key']}", flags["bpm"] and f"{flags['bpm']} bpm"
    return tuple(part for part in said if part)


def _unsaid(prompt: str, flags: dict) -> str:
    """A prompt made before without the tempo or key that flags set anew."""
    from nexus.keys import MODES, TONICS
    said = [pattern for name, pattern in (("bpm", r"[0-9]+ bpm"),
                                          ("in_key", f"in ({'|'.join(TONICS)}) ({'|'.join(MODES)})")) if flags[name]]
    return ", ".join(part for part in prompt.split(", ") if not any(re.fullmatch(one, part) for one in said))


def _system(model: str | None) -> str:
    """The system of a model, or the one that makes music unless told otherwise, which has a checkpoint then."""
    from nexus import stored
    from nexus.catalog import CATALOG
    if model is not None:
        system = stored.read_description(stored.find(model))["system"]
        if system not in CATALOG or CATALOG[system].kind != SOUNDS.name:
            raise UsageError(f"{model} is a model of '{system}', which makes no sound", hint="nexus models lists all")
        return system
    systems = [name for name, entry in CATALOG.items() if entry.command == "music"]
    if not systems:
        raise ModelError("no system here makes music from text", hint="-m MODEL; nexus models lists the systems")
    stored.default_model(systems[0])
    return systems[0]


def _template(text: str | None):
    """--spectrogram as a template; UsageError for a field that it does not have, or for another ending."""
    if text is None:
        return None
    from nexus.naming import fields_of, parse_template
    template = parse_template(text)
    if wrong := sorted(fields_of(template) - {"n", "seed", "id", "prompt"}):
        raise UsageError(f"--spectrogram '{text}': there is no field {{{wrong[0]}}}",
                         hint="fields: {n} {seed} {id} {prompt}")
    if Path(text).suffix.lower() not in PICTURES.endings:
        raise UsageError(f"--spectrogram '{text}' has no picture's ending", hint="one of " + " ".join(PICTURES.endings))
    return template
