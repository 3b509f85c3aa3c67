"""From a request to the denoiser that `Diffusion.generate` samples with: conditions, guidance, thresholds."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nexus.errors import InputError, UsageError
from nexus.nn.perturb import Perturb
from nexus.process import guidance, guidance_kinds
from nexus.process.predictions import Estimate, clipped, estimator, thresholded, x0_part
from nexus.process.schedules import Grid
from nexus.requests import SampleRequest, check_guidance
from nexus.text.conditioner import Cond, joined

PERTURB_SCALE = 2.8                     # of Stable Diffusion 3.5's skip layers; PAG's figures lie around 3
OWN_SCALES = {"autoguidance": 2.0, "classifier": 1.0}      # a model's own default is meant for its unconditional side


class Task(NamedTuple):
    """One run to be steered. concat [B, C, H, W]: the picture that the network is conditioned on, or None."""

    system: Any
    request: SampleRequest
    points: Grid
    n: int
    device: torch.device
    guide: Any = None
    concat: Tensor | None = None


class Sides(NamedTuple):
    """cond alone; (cond, uncond) together, or None where no uncond is wanted; the condition; notes an item."""

    single: Callable
    pair: Callable | None
    cond: Cond | None
    notes: tuple[dict, ...]


def scale_of(config, request: SampleRequest) -> float:
    """The guidance scale of a run: asked for, the kind's own, or the model's."""
    if request.guidance is not None:
        return request.guidance
    return OWN_SCALES.get(request.guidance_kind, config.guidance)


def check_steering(system, request: SampleRequest) -> None:
    """UsageError or InputError for what `steered` cannot do, as far as that shows without weights and guide."""
    c, kind = system.config, request.guidance_kind or "cfg"
    check_guidance(request.model_dump(exclude_none=True))
    _check_used(system, request)
    if request.dynamic_threshold is not None and c.codec is not None:
        raise UsageError("--dynamic-threshold scales pixels into [-1, 1], and this model denoises latents",
                         hint="leave it out; --guidance-rescale works on latents")
    check_prompts(system, request)
    if kind in ("pag", "slg"):
        _perturb(system.net, request)
    if kind == "classifier" and request.prompt is None:
        raise UsageError("--guidance-kind classifier needs --prompt: the class to steer to", hint="add -p TEXT")
    settings = request.apg or ()
    if kind == "apg" and (request.sampler or c.sampler) == "dopri5" and (not settings or settings[2]):
        raise UsageError("apg's momentum needs steps in order, and dopri5 takes some back",
                         hint="--apg 0,15,0, or another --sampler")
    if system.conditioner is None:
        if kind in ("cfg-zero", "apg"):
            raise UsageError(f"--guidance-kind {kind} steers by a prompt, and this model is unconditional",
                             hint="pag, slg, autoguidance and classifier guide such a model")
    elif _is_led_away(system, request) and always_classed(c.net) and not request.negative_prompt:
        raise UsageError(f"--guidance {scale_of(c, request):g}: this model has no null class to steer "
                         "away from", hint="leave it out, or name another class with --negative-prompt")


def check_prompts(system, request: SampleRequest) -> None:
    """InputError for a prompt that the system cannot follow, and where it needs one that is not given."""
    check_class(system.config.net, request)
    for prompt in (request.prompt, request.negative_prompt):
        if system.conditioner is not None and prompt is not None:
            system.conditioner.check(prompt)


def _is_led_away(system, request: SampleRequest) -> bool:
    """Whether guidance calls for a side without the prompt."""
    kind = request.guidance_kind or "cfg"
    return kind not in OWN_SCALES and request.prompt is not None and scale_of(system.config, request) != 1


def steered(task: Task) -> tuple[Callable, tuple[dict, ...]]:
    """denoise(x, t) -> x0 with guidance and thresholds, and each item's notes.

    Raises UsageError for a guide that does not fit; all else that cannot be done is `check_steering`'s.
    """
    c, request = task.system.config, task.request
    if request.guide_model is not None:
        check_guide(task.system, request, task.points, task.guide)
    sides = _sides(task)
    denoise = _guided(task, sides)
    if request.dynamic_threshold is not None:
        return thresholded(denoise, request.dynamic_threshold), sides.notes
    return (clipped(denoise) if c.clip else denoise), sides.notes


def _check_used(system, request: SampleRequest) -> None:
    """UsageError for a setting that this model would ignore."""
    led = system.conditioner is not None or request.guidance_kind in OWN_SCALES
    if not led and (request.negative_prompt or request.guidance not in (None, 1) or request.guidance_rescale):
        raise UsageError("this model is unconditional: there is nothing to guide it by",
                         hint="leave --guidance, --guidance-rescale and --negative-prompt out")
    if request.image_noise is not None and getattr(system.config.concat, "kind", None) != "upscale":
        raise UsageError("--image-noise has no meaning with a model that does not enlarge pictures",
                         hint="leave it out; --strength says how much of --image is redone")


def always_classed(net) -> bool:
    """Whether a network always makes one of its classes: its table has no row that means none."""
    return bool(getattr(net, "num_classes", 0)) and not net.null_class


def check_class(net, request: SampleRequest) -> None:
    """InputError where such a network is given no class."""
    if always_classed(net) and request.prompt is None:
        raise InputError("this model makes one of its classes, and none was named", hint="add --prompt NAME")


def cached(system, points: Grid, cond: Cond | None) -> dict | None:
    """What a system's network can compute once for all steps of the run."""
    prepare = getattr(system.net, "prepare", None)
    if prepare is None:
        return None
    device = next(system.net.parameters()).device
    return prepare(system.config.path.network_time(points.t[:-1]).to(device, torch.float32), cond)


def _estimator(system, points: Grid, cond: Cond | None, perturb: Perturb | None = None) -> Callable:
    c = system.config
    net = system.net if perturb is None else partial(system.net, perturb=perturb)
    return estimator(net, c.path, c.prediction, cond, cached(system, points, cond), dtype=_dtype(system),
                     learned_variance=c.learned_variance)


def _dtype(system) -> torch.dtype:
    return next(system.net.parameters()).dtype


def _sides(task: Task) -> Sides:
    """What the run's kind of guidance needs of the model's own network."""
    system, request, kind = task.system, task.request, task.request.guidance_kind or "cfg"
    cond, notes, other = None, (), None
    if system.conditioner is not None:
        cond, notes = system.conditioner.prompts([request.prompt] * task.n, task.device)
    elif kind == "classifier":
        notes = _classes(task)[1]
    if _is_led_away(system, request) and cond is not None:
        other = (system.conditioner.prompts([request.negative_prompt] * task.n, task.device)[0]
                 if request.negative_prompt else system.conditioner.null(task.n, task.device))
    cond, other = beside(cond, task.concat), None if other is None else beside(other, task.concat)
    single = None
    if other is None or request.guidance_interval != (0.0, 1.0):    # only then is the condition called for alone
        single = _estimator(system, task.points, cond)
    pair = None if other is None else _pair(_estimator(system, task.points, joined(cond, other)))
    return Sides(single, pair, cond, notes)


def beside(cond: Cond | None, concat: Tensor | None) -> Cond | None:
    """A condition with the picture beside it; a null keeps the picture too, so that guidance is of words alone."""
    if concat is None:
        return cond
    return {"concat": concat} if cond is None else cond | {"concat": concat}


def _pair(double: Callable) -> Callable:
    """Both sides from one call of a denoiser whose condition has 2B rows."""
    def pair(x: Tensor, t: Tensor):
        result = double(torch.cat([x, x]), t if t.ndim == 0 else torch.cat([t, t]))
        x0 = x0_part(result).chunk(2)
        if not isinstance(result, Estimate):
            return x0
        return tuple(Estimate(a, b) for a, b in zip(x0, result.fraction.chunk(2), strict=True))
    return pair


def _guided(task: Task, sides: Sides) -> Callable:
    c, request, kind = task.system.config, task.request, task.request.guidance_kind or "cfg"
    ways = {"rescale": request.guidance_rescale, "said": (c.path, c.prediction), "channels": c.guided_channels,
            "active": _window(task, request.guidance_interval)}
    scale = scale_of(c, request)
    if kind == "autoguidance":
        return guidance.guided(sides.single, _weaker(task), scale, **ways)
    if kind == "classifier":
        return guidance.alone(sides.single, scale, guidance.classifier_rule(_classifier(task), c.path), **ways)
    if kind in ("pag", "slg"):
        weak = _estimator(task.system, task.points, sides.cond, _perturb(task.system.net, request))
        strength = PERTURB_SCALE if request.perturb_scale is None else request.perturb_scale
        rule = guidance_kinds.away_from(weak, strength, _window(task, request.perturb_interval))
        if sides.pair is None:
            return guidance.alone(sides.single, 1.0, rule, **ways)
        return guidance.guided_batch(sides.pair, scale, rule=rule, cond=sides.single, **ways)
    if sides.pair is None:
        return sides.single
    denoise = guidance.guided_batch(sides.pair, scale, rule=_rule(task), cond=sides.single, **ways)
    if kind == "cfg-zero" and c.prediction == "flow":       # no velocity leaves x alone; no noise would not
        steps = 1 if request.zero_init is None else request.zero_init
        first = guidance.during(task.points, 0.0, steps / task.points.steps)
        return guidance_kinds.zero_init(denoise, c.path, c.prediction, first)
    return denoise


def _window(task: Task, share: tuple[float, float] | None) -> Callable | None:
    """active(t) for a share of the run; None = all of it."""
    return None if share in (None, (0.0, 1.0)) else guidance.during(task.points, *share)


def _rule(task: Task) -> Callable:
    c, request = task.system.config, task.request
    if request.guidance_kind == "cfg-zero":
        return guidance_kinds.cfg_zero(c.path, c.prediction)
    if request.guidance_kind == "apg":
        return guidance_kinds.apg(*(request.apg or ()))
    return guidance.linear


def _perturb(net, request: SampleRequest) -> Perturb:
    """The layers that pag or slg weakens; UsageError when the network has none, or not this one."""
    kind, count = request.guidance_kind, getattr(net, "layers", 0)
    if not count:
        raise UsageError(f"--guidance-kind {kind}: this model's network ({type(net).__name__}) cannot skip layers",
                         hint="cfg, cfg-zero, apg and autoguidance need nothing of it")
    layers = frozenset((net.middle,) if request.perturb_layers is None else request.perturb_layers)
    if not layers or min(layers) < 0 or max(layers) >= count:
        raise UsageError(f"--perturb-layers {','.join(map(str, sorted(layers)))}: this network has layers 0 to "
                         f"{count - 1}", hint=f"for example --perturb-layers {net.middle}")
    return Perturb(identity=layers) if kind == "pag" else Perturb(skip=layers)


def check_guide(system, request: SampleRequest, points: Grid, guide) -> None:
    """UsageError for a guide that does not see what the model denoises, on the same path, or is of another kind."""
    c, name = system.config, request.guide_model
    if guide is None:
        raise UsageError(f"the model '{name}' was not loaded", hint="pass it to generate as guide=")
    config = getattr(guide, "config", None)
    if getattr(config, "path", None) is None or config.latent_shape[0] != c.latent_shape[0] or config.codec != c.codec:
        raise UsageError(f"--guide-model {name} does not see what this model makes",
                         hint="both need the same pixels, or latents of the same codec")
    theirs, ours = config.path.at(points.t[:-1]), (points.alpha[:-1], points.sigma[:-1])
    if not all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(theirs, ours, strict=True)):
        raise UsageError(f"--guide-model {name} was trained on another noise process", hint="their paths must agree")
    if request.guidance_kind == "classifier" and not hasattr(guide, "log_prob"):
        raise UsageError(f"--guide-model {name} is no classifier of noisy pictures",
                         hint="nexus train conditional --preset classifier trains one")
    if request.guidance_kind == "autoguidance" and not (hasattr(guide, "conditioner") and hasattr(guide, "loss")):
        raise UsageError(f"--guide-model {name} does not denoise", hint="a classifier guides with "
                         "--guidance-kind classifier")
    if request.prompt is not None and guide.conditioner is not None:
        guide.conditioner.check(request.prompt)


def _weaker(task: Task) -> Callable:
    """The guide as a denoiser under the same prompt. Karras et al. 2024 (autoguidance)."""
    guide = task.guide
    cond = None
    if guide.conditioner is not None:
        cond, _ = guide.conditioner.prompts([task.request.prompt] * task.n, task.device)
    return _estimator(guide, task.points, beside(cond, task.concat))


def _classifier(task: Task) -> Callable:
    """log p(class of the prompt | x, t) of the guide. Dhariwal & Nichol 2021."""
    guide = task.guide
    label, _ = _classes(task)
    return lambda x, t: guide.log_prob(x, t, label)


def _classes(task: Task) -> tuple[Tensor, tuple[dict, ...]]:
    """The ids [B] that the guide gives to the prompt, and what it was matched to."""
    cond, notes = task.guide.conditioner.prompts([task.request.prompt] * task.n, task.device)
    return cond["label"], notes
