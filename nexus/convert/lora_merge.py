"""`nexus convert MODEL OUT --lora FILE`: a model with low-rank updates in its weights; and LoRA runs, written."""

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from nexus import checkpoint
from nexus.atomic import check_target, staged_dir, write_bytes
from nexus.convert.convert import Report, convert, native_path, scratch
from nexus.convert.lora import Adapter, merge_files
from nexus.convert.lora_files import FORMS, adapter_settings, file_of
from nexus.errors import ModelError, UsageError

WEIGHTS = ("config.json", "manifest.json", "model.safetensors", "ema.safetensors", "adapter.safetensors")


def run_of(src: Path) -> Path | None:
    """The newest checkpoint of a LoRA run, or None for anything else."""
    try:
        found = checkpoint.find(str(src))
        return found if checkpoint.read_description(found).get("lora") else None
    except ModelError:
        return None


def merged(src: Path, dst: Path, references: Sequence[str], *, to: str | None = None,
           overrides: Sequence[str] = (), exists: str = "error", **reading) -> Report:
    """Convert a model with FILE[:WEIGHT]s merged into it; a LoRA run with its own branches merged too.

    reading: `convert`'s arguments for a foreign src. Raises what `convert` and `merge_files` raise.
    """
    if reading.pop("check", False):
        raise UsageError("--check reads a checkpoint's keys and merges nothing",
                         hint="leave --lora out" if references else "leave it out, or name a LoRA's layout with --to")
    if to in (None, "nexus"):
        check_target(dst, exists=exists, folder=True)
    with tempfile.TemporaryDirectory(dir=scratch(dst, False), prefix=".nexus-merge-") as temporary:
        native, place = native_path(src), Path(temporary)
        if native is None:
            convert(src, place / "base", overrides=overrides, **reading)
            native = place / "base"
        whole = dst if to in (None, "nexus") else place / "merged"
        report = _write(src, native, whole, references, exists if whole == dst else "error")
        return report if whole == dst else convert(whole, dst, to=to, exists=exists)._replace(source=src)


def _write(src: Path, path: Path, dst: Path, references: Sequence[str], exists: str) -> Report:
    described = checkpoint.read_description(path)
    system = checkpoint.load(str(path), device="cpu", dtype="float32")
    merge_files(system, references, text=False)
    base = checkpoint.find(described["lora"]["base"]["model"]) if described.get("lora") else path
    stored = checkpoint.read_weights(base, system)
    state = {n: t.to(stored[n].dtype if n in stored else t.dtype) for n, t in checkpoint.released_state(system).items()}
    facts = {k: v for k, v in described.items() if k in ("layouts", "trained_steps", "data")}
    checkpoint.save_model(dst, described["system"], system.config.to_json(), state, exists=exists,
                          facts=facts | {"merged": [*described.get("merged", ()), *references]}, extra=_beside(base))
    count = sum(t.numel() for t in state.values())
    return Report(src, dst, described["system"], "", system.config.to_json(), len(state), count)


def _beside(path: Path) -> dict[str, bytes]:
    """The text encoders that lie in a model's folder."""
    return {str(f.relative_to(path)): f.read_bytes() for f in sorted(path.rglob("*"))
            if path.is_dir() and f.is_file() and f.name[0] != "." and f.relative_to(path).parts[0] != "train"
            and str(f.relative_to(path)) not in WEIGHTS}


def write_run(run: Path, dst: Path, form: str, *, exists: str = "error", check: bool = False) -> Report:
    """A LoRA run's branches in a public layout: diffusers' and kohya's one file, PEFT's folder; check: only the report.

    Raises UsageError for a form or a name that does not fit.
    """
    if form not in FORMS:
        raise UsageError(f"there is no LoRA layout '{form}'", hint="--to " + " or ".join(FORMS) + ", or nexus to merge")
    folder = form == "peft"
    if not check:
        if folder == (dst.suffix == ".safetensors"):
            raise UsageError(f"'{dst}': the layout {form} is {'a folder' if folder else 'one .safetensors file'}",
                             hint="choose another name")
        check_target(dst, exists=exists, folder=folder)
    described, system = checkpoint.read_description(run), checkpoint.skeleton(run)
    adapter: Adapter = system.adapter
    state = checkpoint.read_weights(run, system)
    if form == "kohya" and adapter.prefix != "unet":        # who reads it looks for SD3's and FLUX's original names
        raise UsageError("kohya's layout names the layers of a UNet, and this network is a transformer",
                         hint="--to diffusers or peft")
    updates = adapter.updates(state)
    data = file_of(updates, form, prefix=adapter.prefix)
    report = Report(run, None, described["system"], f"lora/{form}", described["config"], len(state),
                    sum(t.numel() for t in state.values()))
    if check:
        return report
    if not folder:
        write_bytes(dst, data, exists=exists)
    else:
        with staged_dir(dst, exists=exists) as temporary:
            write_bytes(temporary / "adapter_model.safetensors", data)
            said = json.dumps(adapter_settings(updates), indent=2, sort_keys=True) + "\n"
            write_bytes(temporary / "adapter_config.json", said.encode())
    return report._replace(written=dst)
