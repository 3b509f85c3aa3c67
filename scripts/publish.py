"""Make an embedded checkpoint of a finished run: `python scripts/publish.py RUN NAME`.

Takes the newest checkpoint's average in bfloat16. A codec's latent shift and scale are set so that the training
pictures' latents have mean 0 and standard deviation 1.
"""

import sys
from pathlib import Path

import torch

from nexus import checkpoint
from nexus.data.images import open_images

LIMIT = 12_000_000          # bytes a model
PROBED = 512                # pictures that a codec's scale is measured on


def publish(run: Path, name: str) -> None:
    """Write nexus/zoo/NAME from a run folder, keeping its card."""
    source = checkpoint.find(str(run))
    described = checkpoint.read_description(source)
    system = checkpoint.load(str(source), device="cpu")
    config = described["config"]
    if config["net"].get("kind") == "kl":
        config["net"] |= _normalised(system, described["data"])
    state = {n: t.to(torch.bfloat16) if t.is_floating_point() else t for n, t in checkpoint.own_state(system).items()}
    facts = {k: described[k] for k in ("train", "data", "data_digest", "nexus")} | {"trained_steps": int(source.name[5:])}
    target = checkpoint.ZOO / name
    card = target / "README.md"
    extra = {"README.md": card.read_bytes()} if card.exists() else {}
    checkpoint.save_model(target, described["system"], config, state, facts=facts, exists="overwrite", extra=extra)
    size = (target / "model.safetensors").stat().st_size
    print(f"{target}: {size:,} bytes, {facts['trained_steps']} steps")
    if size > LIMIT:
        raise SystemExit(f"{size:,} bytes is over the limit of {LIMIT:,}")


@torch.no_grad()
def _normalised(system: torch.nn.Module, data: str) -> dict:
    """The shift and scale that give latents of mean 0 and standard deviation 1."""
    images = open_images(data, size=system.config.image_size, channels=system.config.image_channels)
    every = max(1, len(images) // PROBED)
    batch = images.batch(list(range(0, len(images), every)))["image"]
    latents = torch.cat([system.net.encode(part)[0] for part in batch.split(64)])
    print(f"latents: mean {latents.mean():.3f}, std {latents.std():.3f} over {len(batch)} pictures")
    return {"shift": round(float(latents.mean()), 4), "scale": round(float(1 / latents.std()), 4)}


if __name__ == "__main__":
    publish(Path(sys.argv[1]), sys.argv[2])
