"""Make an embedded checkpoint and its card of a finished run: `python scripts/publish.py RUN NAME`.

Takes the newest checkpoint's average in bfloat16. A codec's latent shift and scale are set so that the training
pictures' latents have mean 0 and standard deviation 1; those of a decoder trained alone stay what they were.
"""

import json
import sys
from pathlib import Path

import torch

from nexus import checkpoint, stored
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
        config["net"] |= _kept(run) if config["decoder_only"] else _normalised(system, described["data"])
    state = {n: t.to(torch.bfloat16) if t.is_floating_point() else t
             for n, t in checkpoint.released_state(system).items()}
    facts = {k: described[k] for k in ("train", "data", "data_digest", "nexus")}
    facts["trained_steps"] = int(source.name[5:])
    facts["init"] = checkpoint.read_description(run).get("init")
    target = stored.ZOO / name
    extra = {"README.md": card(name, described, facts, sum(t.numel() for t in state.values())).encode()}
    checkpoint.save_model(target, described["system"], config, state, facts=facts, exists="overwrite", extra=extra)
    size = (target / "model.safetensors").stat().st_size
    print(f"{target}: {size:,} bytes, {facts['trained_steps']} steps")
    if size > LIMIT:
        raise SystemExit(f"{size:,} bytes is over the limit of {LIMIT:,}")


def _kept(run: Path) -> dict:
    """The shift and scale of the codec that a run of the decoder alone began with."""
    net = checkpoint.read_description(checkpoint.find(checkpoint.read_description(run)["init"]))["config"]["net"]
    return {"shift": net["shift"], "scale": net["scale"]}


DATA = {
    "emoji": "the embedded emoji set: noto (Apache-2.0), twemoji (CC-BY-4.0, Copyright Twitter, Inc and other "
             "contributors), Fluent emoji flat and 3d (MIT, Copyright Microsoft); its training split",
    "emoji:flat,emoji:outline": "two styles of the embedded emoji set: Fluent emoji flat and high contrast (MIT, "
                                "Copyright Microsoft); their training splits, unpaired",
    "mnist": "the embedded MNIST subset (CC-BY-SA-3.0, Y. LeCun and C. Cortes); its training split",
}


def card(name: str, described: dict, facts: dict, numbers: int) -> str:
    """The model card, every figure taken from the checkpoint itself or from what `nexus eval` wrote beside the run."""
    system, train = described["system"], facts["train"]
    seen = facts["trained_steps"] * train["batch_size"]
    named = facts["init"] and "/" not in facts["init"]
    start = f" It started from the weights of `{facts['init']}`." if named else (
        " It went on from shorter runs of this network, which are not kept, so the command below gives the like of it."
        if facts["init"] else "")
    init = f" --init {facts['init']}" if named else ""
    data = described["data"]
    again = f"`nexus train {system} --config nexus/zoo/{name}/config.json --data {data}{init} --run runs/{name}`"
    if described["config"].get("decoder_only"):
        start = (" These are of the decoder alone, on latents with noise; the encoder is of the run before, which is "
                 "not kept: the commands below give the like of it.")
        again = (f"`nexus train {system} --data {data} --preset {name} --run runs/{name}`, then\n"
                 f"  `nexus train {system} --data {data} --preset {name}-decoder --init runs/{name} "
                 f"--run runs/{name}-decoder`")
    return f"""# {name}

A checkpoint of `{system}`, trained for Nexus; {numbers:,} weights in bfloat16 (the moving average of the run).

- **Data**: {DATA[described["data"]]} (sha256 of the set: `{facts["data_digest"][:16]}`). See
  `nexus/data/shards/README.md`.
- **Licence**: the weights are Apache-2.0, like the code; the licences of the data are named above.
- **Training**: {facts["trained_steps"]:,} steps of {train["batch_size"]} pictures ({seen:,} pictures),
  seed {train["seed"]}.{start}
- **The same again**: {again}
- **Use**: `nexus sample {system} -m {name} -o out/`
- **Quality**: `nexus eval {name}` prints it with its protocol{_measured(name)}
"""


def _measured(name: str) -> str:
    """What `nexus eval NAME -o scripts/measured/NAME.json` wrote for this checkpoint."""
    file = Path(__file__).parent / "measured" / f"{name}.json"
    if not file.exists():
        return "; it has not been measured for this checkpoint."
    found = json.loads(file.read_text())
    rows = [f"| {key} | {value['value'] if isinstance(value, dict) else value:.4g} |"
            for key, value in found["numbers"].items()]
    facts = ", ".join(f"{key} {value}" for key, value in found["protocol"].items())
    return "\n".join([":", "", "| number | value |", "|---|---|", *rows, "", f"Protocol: {facts}."])


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
