"""nexus doctor: what this machine can do."""

import os
import platform
import shutil
import sys

from nexus_cli import options
from nexus_cli.output import Output


def doctor(json_lines: options.Json = False) -> None:
    """Report versions, devices, disk space and embedded models."""
    out = Output(json_lines=json_lines)
    with out.guard():
        facts = {**_machine(), **_torch()}
    out.result("\n".join(f"{key}: {value}" for key, value in facts.items()), facts)


def _machine() -> dict:
    from nexus import __version__
    from nexus.catalog import listing
    return {"nexus": __version__, "python": sys.version.split()[0], "system": platform.platform(),
            "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
            "free_disk_here": f"{shutil.disk_usage('.').free / 2**30:.1f} GiB",
            "embedded_models": ", ".join(row["default"] for row in listing() if row["default"]) or "none"}


def _torch() -> dict:
    try:
        import torch

        from nexus.checkpoint import pick_device
        from nexus.nn.precision import has_bfloat16
    except Exception as error:                          # a broken installation is what a doctor is asked about
        return {"torch": f"cannot be imported ({type(error).__name__}: {error})", "devices": "none"}
    devices = ["cpu", *(f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())),
               *(["mps"] if torch.backends.mps.is_available() else [])]
    here = has_bfloat16(pick_device("auto"))
    return {"torch": torch.__version__, "devices": ", ".join(devices), "bfloat16": "fast" if here else "emulated, slow"}
