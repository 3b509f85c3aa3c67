"""diffusers' scheduler_config.json: the noise process, its times and the sampler that a pipeline was published with."""

from collections.abc import Callable
from typing import Any, NamedTuple

from nexus.config import Config
from nexus.errors import ModelError

FILE = "scheduler/scheduler_config.json"
BETAS = {"linear": "linear", "scaled_linear": "scaled_linear", "squaredcos_cap_v2": "cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x0"}
SAMPLERS = {"DDIMScheduler": "ddim", "PNDMScheduler": "pndm", "DDPMScheduler": "ddpm",
            "EulerDiscreteScheduler": "euler", "EulerAncestralDiscreteScheduler": "euler-a",
            "HeunDiscreteScheduler": "heun", "DPMSolverMultistepScheduler": "dpmpp-2m",
            "UniPCMultistepScheduler": "unipc", "LMSDiscreteScheduler": "lms", "SASolverScheduler": "sa-solver"}
LEADING = ("DDIMScheduler", "PNDMScheduler", "DDPMScheduler")       # what they do unless config.json says otherwise
# Of N + 1 times these leave the cleanest out.
IN_SIGMA = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler",
            "LMSDiscreteScheduler")
MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "SASolverScheduler")
# What a multistep solver has in one value only here (absent counts as it).
USUAL = {"solver_order": 2, "lambda_min_clipped": None, "predict_x0": True, "use_lu_lambdas": False,
         "use_flow_sigmas": False, "euler_at_final": False, "disable_corrector": []}
# What any scheduler has in one value only here.
SHARED = {"thresholding": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
          "interpolation_type": "linear", "timestep_type": "discrete", "final_sigmas_type": "zero"}
SOLVERS = {"DPMSolverMultistepScheduler": {"solver_type": "midpoint"},
           "UniPCMultistepScheduler": {"solver_type": "bh2"},
           "SASolverScheduler": {"predictor_order": 2, "corrector_order": 2, "algorithm_type": "data_prediction",
                                 "tau_func": None, "lower_order_final": True}}
# FLUX's and SD3's scheduler: what it has in one value only here.
FLOW = {"num_train_timesteps": 1000, "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False,
        "shift_terminal": None, "use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False,
        "time_shift_type": "exponential", "stochastic_sampling": False}
LCM = {"clip_sample": False, "thresholding": False, "rescale_betas_zero_snr": False, "set_alpha_to_one": True}
STUDENT = {"s_noise": 1.0}


class Family(NamedTuple):
    """read(scheduler_config.json) -> settings of the system, and notes; write(Config) -> scheduler_config.json."""

    read: Callable[[dict], tuple[dict, tuple[str, ...]]]
    write: Callable[[Config], dict]


def _chain(said: dict) -> dict:
    """The chain of betas; ModelError for one that is not known."""
    beta, prediction = said.get("beta_schedule", "linear"), said.get("prediction_type", "epsilon")
    if beta not in BETAS or prediction not in PREDICTIONS or said.get("trained_betas") is not None:
        raise ModelError(f"scheduler_config.json: a chain of betas '{beta}' that predicts {prediction} is not known")
    return {"steps": said.get("num_train_timesteps", 1000), "beta_schedule": BETAS[beta],
            "beta_start": said.get("beta_start", 1e-4), "beta_end": said.get("beta_end", 0.02)}


def _read_discrete(said: dict) -> tuple[dict, tuple[str, ...]]:
    kind = said.get("_class_name")
    short = kind in ("PNDMScheduler", "DDIMScheduler", "SASolverScheduler")
    path = {"kind": "discrete"} | _chain(said) | {
        "offset": said.get("steps_offset", 0), "open_end": kind in MULTISTEP,
        "spacing": said.get("timestep_spacing", "leading" if kind in LEADING else "linspace"),
        "in_sigma": kind in IN_SIGMA,
        "zero_terminal_snr": said.get("rescale_betas_zero_snr", False),
        "ends_at_first": short and not said.get("set_alpha_to_one", kind == "DDIMScheduler"),
    }
    noisy = said.get("algorithm_type") == "sde-dpmsolver++"
    settings = {"path": path, "prediction": PREDICTIONS[said.get("prediction_type", "epsilon")],
                "sampler": "dpmpp-2m-sde" if noisy else SAMPLERS.get(kind, "ddim"),
                "schedule": "karras" if said.get("use_karras_sigmas") else "native",
                "clip": said.get("clip_sample", True) if kind in ("DDIMScheduler", "DDPMScheduler") else False}
    if kind == "DDPMScheduler":
        settings["variance"] = "large" if said.get("variance_type") == "fixed_large" else "small"
    notes = [f"{kind} is sampled with ddim"] if kind not in SAMPLERS else []
    if kind == "PNDMScheduler" and not said.get("skip_prk_steps", False):
        notes.append("PNDMScheduler's Runge-Kutta steps at the beginning are left out")
    if kind == "DDIMScheduler" and settings["clip"]:
        notes.append("DDIMPipeline gives the same with use_clipped_model_output=True")
    if kind == "DDIMScheduler" and path["spacing"] == "linspace":
        notes.append("DDIMScheduler's linspace steps by whole shares of the chain, here from time to time")
    usual = SHARED | (USUAL | SOLVERS[kind] if kind in MULTISTEP else {})
    notes += [f"the scheduler's {name} {said[name]} is not carried" for name in usual
              if said.get(name, usual[name]) not in (usual[name], "-inf", float("-inf"))]
    return settings, tuple(notes)


def _written(kind: str, config: Config) -> dict:
    path = config.path
    return {"_class_name": kind, "_diffusers_version": "0.42.1", "num_train_timesteps": path.steps,
            "beta_schedule": next(k for k, v in BETAS.items() if v == path.beta_schedule),
            "beta_start": path.beta_start, "beta_end": path.beta_end,
            "prediction_type": next(k for k, v in PREDICTIONS.items() if v == config.prediction)}


def _write_discrete(config: Config) -> dict:
    path = config.path
    kind = next((name for name, sampler in SAMPLERS.items() if sampler == config.sampler), "DDIMScheduler")
    said = _written(kind, config) | {"steps_offset": path.offset, "timestep_spacing": path.spacing}
    if kind == "DDIMScheduler":
        said |= {"clip_sample": config.clip, "set_alpha_to_one": not path.ends_at_first,
                 "rescale_betas_zero_snr": path.zero_terminal_snr}
    if kind == "DDPMScheduler":
        said |= {"clip_sample": config.clip, "variance_type": f"fixed_{config.variance}"}
    if kind == "PNDMScheduler":
        said |= {"skip_prk_steps": True, "set_alpha_to_one": not path.ends_at_first}
    return said


def _check(said: dict, kind: str, fixed: dict[str, Any]) -> None:
    if said.get("_class_name", kind) != kind:
        raise ModelError(f"scheduler_config.json: this system is sampled by a {kind}, not a {said['_class_name']}")
    for name, only in fixed.items():
        if said.get(name, only) != only:
            raise ModelError(f"scheduler_config.json: {name} is {said[name]!r}, here it is {only!r}")


def _read_flow(said: dict, *, path: str) -> tuple[dict, tuple[str, ...]]:
    _check(said, "FlowMatchEulerDiscreteScheduler", FLOW)
    moving = said.get("use_dynamic_shifting", False)
    shifts = (said.get("base_shift", 0.5), said.get("max_shift", 1.15))
    return {"path": {"kind": path, "time_sampling": "logit-normal", "shift": 1.0 if moving else said.get("shift", 1.0),
                     "dynamic_shift": shifts if moving else None}}, ()


def _write_flow(config: Config) -> dict:
    low, high = config.path.dynamic_shift or (0.5, 1.15)
    return {"_class_name": "FlowMatchEulerDiscreteScheduler", "_diffusers_version": "0.42.1",
            "num_train_timesteps": 1000, "shift": config.path.shift, "base_shift": low, "max_shift": high,
            "use_dynamic_shifting": config.path.dynamic_shift is not None}


def _read_lcm(said: dict) -> tuple[dict, tuple[str, ...]]:
    _check(said, "LCMScheduler", LCM)
    path = _chain({"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"} | said)
    return {"path": path | {"points": said.get("original_inference_steps", 50)},
            "scaling": said.get("timestep_scaling", 10.0),
            "prediction": PREDICTIONS[said.get("prediction_type", "epsilon")]}, ()


def _write_lcm(config: Config) -> dict:
    return _written("LCMScheduler", config) | {"original_inference_steps": config.path.points,
                                               "timestep_scaling": config.scaling}


def _read_consistency(said: dict) -> tuple[dict, tuple[str, ...]]:
    _check(said, "CMStochasticIterativeScheduler", STUDENT)
    same = ("sigma_min", "sigma_max", "sigma_data", "rho")
    names = {"num_train_timesteps": "points"} | dict(zip(same, same, strict=True))
    return {"path": {ours: said[name] for name, ours in names.items() if name in said},
            "clip": said.get("clip_denoised", True)}, ()


def _write_consistency(config: Config) -> dict:
    path = config.path
    return {"_class_name": "CMStochasticIterativeScheduler", "_diffusers_version": "0.42.1",
            "num_train_timesteps": path.points, "sigma_min": path.sigma_min, "sigma_max": path.sigma_max,
            "sigma_data": path.sigma_data, "rho": path.rho, "s_noise": 1.0, "clip_denoised": config.clip}


def _read_instaflow(said: dict) -> tuple[dict, tuple[str, ...]]:
    """Its pipeline keeps Stable Diffusion's scheduler, and asks it nothing."""
    return {"path": {"kind": "instaflow"}}, ()


def _write_instaflow(config: Config) -> dict:
    return {"_class_name": "PNDMScheduler", "_diffusers_version": "0.42.1", "skip_prk_steps": True}


def _flow(path: str) -> Family:
    return Family(lambda said: _read_flow(said, path=path), _write_flow)


DISCRETE, SD3, FLUX = Family(_read_discrete, _write_discrete), _flow("sd3"), _flow("rectified")
INSTAFLOW = Family(_read_instaflow, _write_instaflow)
LATENT_CONSISTENCY, CONSISTENCY = Family(_read_lcm, _write_lcm), Family(_read_consistency, _write_consistency)
