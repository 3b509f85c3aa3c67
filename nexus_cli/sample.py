"""nexus sample SYSTEM: pictures from a model, or what else it makes."""

import os
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

from nexus.errors import UsageError
from nexus_cli import batch as batches
from nexus_cli import options, parse, plan
from nexus_cli.making import Engine
from nexus_cli.media import FILM, PICTURES, Kind, kind_of
from nexus_cli.options import FILES, HOW, WHAT, option
from nexus_cli.output import Output

GUIDE, START = "Kinds of guidance", "Starting from a picture"
PASSED = ("steps", "guidance", "guidance_rescale", "guidance_interval", "guidance_kind", "guide_model",
          "perturb_layers", "perturb_scale", "perturb_interval", "apg", "zero_init", "dynamic_threshold",
          "sampler", "schedule", "eta",
          "width", "height", "image", "image_noise", "strength", "mask", "outpaint", "initial_noise",
          "truncation", "interpolate", "direction",
          "negative_prompt", "control", "control_image", "control_scale")     # fields of the request as they are
SIZES = ("size", "width", "height")
TAUGHT = "What the model is taught"
PICTURE_LIMIT = 256 * 2**20


def sample(
    system: options.SystemArg,
    prompt: options.Prompt = None,
    prompt_file: options.PromptFile = None,
    negative_prompt: options.NegativePrompt = None,
    num: options.Num = 1,
    seed: options.Seed = None,
    seeds: options.Seeds = None,
    width: Annotated[int | None, option("--width", "-W", parser=parse.whole(1, 65_536), metavar="PX", panel=WHAT,
                                        show_default=False, help="Width in pixels.")] = None,
    height: Annotated[int | None, option("--height", "-H", parser=parse.whole(1, 65_536), metavar="PX", panel=WHAT,
                                         show_default=False, help="Height in pixels.")] = None,
    size: Annotated[object, option("--size", parser=parse.size, metavar="WxH", panel=WHAT, show_default=False,
                                         help="Width and height at once.")] = None,
    model: options.Model = None,
    steps: Annotated[int | None, option("--steps", "--num-inference-steps", parser=parse.whole(1, 100_000),
                                        metavar="N", panel=HOW, show_default=False, help="Sampling steps.")] = None,
    guidance: options.Guidance = None,
    guidance_rescale: Annotated[float | None, option("--guidance-rescale", parser=parse.number(0, 1), metavar="SHARE",
                                                     panel=HOW, show_default=False,
                                                     help="Against over-exposure: 0 to 1.")] = None,
    guidance_interval: Annotated[object, option("--guidance-interval", parser=parse.interval, metavar="A-B",
                                                      panel=HOW, show_default=False,
                                                      help="The share of the run that is guided, as 0.1-0.9.")] = None,
    guidance_kind: Annotated[str | None, option("--guidance-kind", parser=parse.named("GUIDANCE_KINDS"), metavar="KIND",
                                                panel=GUIDE, show_default=False,
                                                help="cfg, cfg-zero, apg, pag, slg, autoguidance, classifier.")] = None,
    guide_model: Annotated[str | None, option("--guide-model", metavar="NAME|PATH", panel=GUIDE, show_default=False,
                                              help="A weaker model (autoguidance), or a classifier.")] = None,
    perturb_layers: Annotated[object, option("--perturb-layers", parser=parse.layers, metavar="I,J,...", panel=GUIDE,
                                             show_default=False,
                                             help="Layers that pag or slg weakens; default: the middle one.")] = None,
    perturb_scale: Annotated[float | None, option("--perturb-scale", parser=parse.number(0, 1000), metavar="SCALE",
                                                  panel=GUIDE, show_default=False,
                                                  help="How strongly pag or slg steers; default 2.8.")] = None,
    perturb_interval: Annotated[object, option("--perturb-interval", parser=parse.interval, metavar="A-B",
                                               panel=GUIDE, show_default=False,
                                               help="The share of the run in which pag or slg steers.")] = None,
    apg: Annotated[object, option("--apg", parser=parse.numbers(3, "0,15,-0.5"), metavar="ETA,NORM,MOMENTUM",
                                  panel=GUIDE, show_default=False, help="Of apg; default 0,15,-0.5.")] = None,
    zero_init: Annotated[int | None, option("--zero-init", parser=parse.whole(0, 100_000), metavar="N", panel=GUIDE,
                                            show_default=False,
                                            help="First steps of a flow that cfg-zero leaves out; default 1.")] = None,
    dynamic_threshold: Annotated[float | None, option("--dynamic-threshold", parser=parse.number(0, 1, above=True),
                                                      metavar="SHARE", panel=GUIDE, show_default=False,
                                                      help="Pixels beyond this quantile are clipped: 0.995.")] = None,
    sampler: Annotated[str | None, option("--sampler", parser=parse.named("SAMPLERS"), metavar="NAME", panel=HOW,
                                          show_default=False, help="ddim, euler, heun, dpmpp-2m, ...")] = None,
    schedule: Annotated[str | None, option("--schedule", parser=parse.named("SCHEDULES"), metavar="NAME", panel=HOW,
                                           show_default=False, help="native, karras, log-snr, ...")] = None,
    eta: Annotated[float | None, option("--eta", parser=parse.number(0, 1), metavar="SHARE", panel=HOW,
                                        show_default=False, help="Fresh noise a step: 0 to 1.")] = None,
    initial_noise: Annotated[str | None, option("--initial-noise", metavar="FILE", panel=HOW, show_default=False,
                                                help="Safetensors with the key noise [N, C, H, W].")] = None,
    truncation: Annotated[float | None, option("--truncation", parser=parse.number(0, 10, above=True), metavar="LIMIT",
                                               panel=HOW, show_default=False,
                                               help="Of GANs: codes within this limit; 0.7 = tamer.")] = None,
    interpolate: Annotated[int | None, option("--interpolate", parser=parse.whole(2, 1024), metavar="K", panel=HOW,
                                              show_default=False,
                                              help="Of GANs: K pictures from each seed's to the next's; a sheet or "
                                                   ".mp4.")] = None,
    lora: Annotated[list[str] | None, option("--lora", metavar="FILE[:WEIGHT]", panel=TAUGHT, show_default=False,
                                             help="Low-rank updates to merge; repeatable.")] = None,
    control: Annotated[str | None, option("--control", metavar="NAME|PATH", panel=TAUGHT, show_default=False,
                                          help="A ControlNet, like --model.")] = None,
    control_image: Annotated[str | None, option("--control-image", metavar="FILE", panel=TAUGHT, show_default=False,
                                                help="What the ControlNet is shown, as it is.")] = None,
    control_scale: Annotated[float | None, option("--control-scale", parser=parse.number(0, 10), metavar="SCALE",
                                                  panel=TAUGHT, show_default=False,
                                                  help="How strongly it steers; default 1.")] = None,
    embedding: Annotated[list[str] | None, option("--embedding", metavar="FILE[:WORD]", panel=TAUGHT,
                                                  show_default=False,
                                                  help="A word that prompts may use; repeatable.")] = None,
    image: Annotated[str | None, option("--image", "-i", metavar="FILE", panel=START, show_default=False,
                                        help="Start from this picture, or from each in a folder; - is stdin.")] = None,
    direction: Annotated[str | None, option("--direction", parser=parse.one_of("ab", "ba"), metavar="ab|ba",
                                            panel=START, show_default=False,
                                            help="Of models that translate: which way; default ab.")] = None,
    strength: Annotated[float | None, option("--strength", parser=parse.number(0, 1), metavar="SHARE", panel=START,
                                             show_default=False, help="How much of it to redo: 0 to 1.")] = None,
    mask: Annotated[str | None, option("--mask", metavar="FILE", panel=START, show_default=False,
                                       help="White is painted anew.")] = None,
    outpaint: Annotated[str | None, option("--outpaint", parser=parse.margins, metavar="L,T,R,B", panel=START,
                                           show_default=False,
                                           help="Paint around it: left, top, right, bottom; px or %.")] = None,
    image_noise: Annotated[float | None, option("--image-noise", parser=parse.number(0, 1), metavar="SHARE",
                                                panel=START, show_default=False,
                                                help="Of models that enlarge: how much to doubt it.")] = None,
    output: options.Output = None,
    exists: options.Exists = None,
    force: options.Force = False,
    grid: Annotated[object, option("--grid", parser=parse.grid, metavar="[COLSxROWS]", panel=FILES,
                                   show_default=False, help="Also one sheet of all pictures.")] = None,
    preview: Annotated[Path | None, option("--preview", metavar="FILE", panel=FILES, show_default=False,
                                           help="Keep the picture in the making in this file.")] = None,
    preview_every: Annotated[int, option("--preview-every", parser=parse.whole(1, 100_000), metavar="K", panel=FILES,
                                         help="Renew it every K steps.")] = 5,
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
    offload: options.Offload = False,
    tile: options.Tile = "auto",
    dry_run: options.DryRun = False,
) -> None:
    """Make pictures. Picture k of a prompt has the seed + k and is the same whatever the batch size."""
    flags = _folder_as_batch(dict(locals()))
    kind = kind_of(system)
    out = plan.output_of(flags)
    _check_combinations(flags, kind)
    with ExitStack() as stack:
        settings, model, seed = _settings(flags, kind, out, stack)
        engine = Engine(system, model, device, dtype, batch_size or 8, offload, tile)
        ways = plan.ways_of(flags, kind, grid=grid, preview=preview, preview_every=preview_every)
        plan.carry_out(plan.asked_for(system, model, settings, seed, flags, kind), engine, ways, flags, out)


def _folder_as_batch(flags: dict) -> dict:
    """--image FOLDER is a batch of its pictures."""
    if flags["image"] is None or not os.path.isdir(flags["image"]):
        return flags
    if flags["batch"] is not None:
        raise UsageError("--image FOLDER and --batch cannot be given together", hint="name pictures in the batch file")
    return flags | {"batch": flags["image"], "image": None}


def _check_combinations(flags: dict, kind: Kind) -> None:
    """Flags that contradict each other."""
    plan.check_flags(flags, kind, streams=("image",),
                     clashes=(("size", "width"), ("size", "height"), *(("outpaint", name) for name in SIZES)),
                     needs=(("image", "strength"), ("image", "mask"), ("image", "outpaint")))
    preview = flags["preview"]
    if preview is not None and kind is not PICTURES:
        raise UsageError(f"--preview shows pictures in the making, and this is a {kind.noun}", hint="leave it out")
    if preview is not None and preview.suffix.lower() not in PICTURES.endings:
        raise UsageError(f"--preview '{preview}' has no picture's ending", hint="one of " + " ".join(PICTURES.endings))


def _settings(flags: dict, kind: Kind, out: Output, stack: ExitStack) -> tuple[dict, str | None, int | None]:
    """The request's fields from --like and the flags, the model and the seed; every input file is there."""
    from nexus.requests import check_guidance
    stored, model, seed = plan.like(flags["like"], kind, out) if flags["like"] else ({}, None, None)
    width, height = flags["size"] or (flags["width"], flags["height"])
    settings = plan.gathered(flags | {"width": width, "height": height}, PASSED, stored)
    if settings.get("image") == "-":
        settings["image"] = plan.stdin_file("the picture", PICTURE_LIMIT, stack)
    plan.check_paths(settings)
    if str(flags["output"]).lower().endswith(FILM) and flags["batch"] is None and "interpolate" not in settings:
        raise UsageError(f"--output '{flags['output']}': one picture makes no film",
                         hint="--interpolate 24, or another ending")
    for key in batches.FILE_LISTS:
        if flags[key]:
            settings[key] = list(flags[key])
            batches.check_files(key, settings[key])
    if flags["batch"] is None:                      # the rows of a batch may complete it
        check_guidance(settings)
    plan.model_there(settings.get("guide_model"))
    plan.model_there(settings.get("control"))
    if flags["seed"] is not None or flags["seeds"] is not None:
        seed = flags["seed"]
    return settings, plan.model_there(flags["model"] or model), seed
