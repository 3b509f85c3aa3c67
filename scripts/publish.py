"""Make an embedded checkpoint and its card of a finished run: `python scripts/publish.py RUN NAME`.

`python scripts/publish.py NAME` writes the card again, with what `nexus eval` measured since. --on TEXT: where and for
how long it was trained, which no file of a run says.

Takes the newest checkpoint's average in bfloat16. A codec's latent shift and scale are set so that the training
pictures' latents have mean 0 and standard deviation 1; those of a decoder trained alone stay what they were.
"""

import argparse
import json
from pathlib import Path

import torch

from nexus import checkpoint, stored
from nexus.data.images import open_images

LIMIT = 12_000_000          # bytes a model
FACTS = ("train", "data", "data_digest", "nexus", "on")
PROBED = 512                # pictures that a codec's scale is measured on


def publish(run: Path, name: str, on: str | None) -> None:
    """Write nexus/zoo/NAME from a run folder, keeping its card."""
    source = checkpoint.find(str(run))
    described = checkpoint.read_description(source)
    system = checkpoint.load(str(source), device="cpu")
    config = described["config"]
    if config["net"].get("kind") == "kl":
        config["net"] |= _kept(run) if config["decoder_only"] else _normalised(system, described["data"])
    state = {n: t.to(torch.bfloat16) if t.is_floating_point() else t
             for n, t in checkpoint.released_state(system).items()}
    facts = {k: described[k] for k in FACTS if k in described}
    facts["trained_steps"] = int(source.name[5:])
    facts["train"] = facts["train"] | {"steps": facts["trained_steps"]}
    facts["init"] = checkpoint.read_description(run).get("init")
    written(name, described | {"config": config}, facts | ({"on": on} if on else {}), state)


def again(name: str, on: str | None) -> None:
    """Write the card of nexus/zoo/NAME again."""
    described = checkpoint.read_description(stored.ZOO / name)
    facts = {k: described[k] for k in (*FACTS, "trained_steps", "init") if k in described} | ({"on": on} if on else {})
    written(name, described, facts, checkpoint.read_tensors(stored.ZOO / name / "model.safetensors"))


def written(name: str, described: dict, facts: dict, state: dict[str, torch.Tensor]) -> None:
    """The zoo's folder, replaced as one; SystemExit for one that is too large."""
    target = stored.ZOO / name
    if facts["train"]["precision"] == "bfloat16":   # the same command must not crawl where there is none
        facts["train"] = facts["train"] | {"precision": "auto"}
    extra = {"README.md": card(name, described, facts, sum(t.numel() for t in state.values())).encode()}
    checkpoint.save_model(target, described["system"], described["config"], state, facts=facts, exists="overwrite",
                          extra=extra)
    size = (target / "model.safetensors").stat().st_size
    print(f"{target}: {size:,} bytes, {facts['trained_steps']} steps")
    if size > LIMIT:
        raise SystemExit(f"{size:,} bytes is over the limit of {LIMIT:,}")


def _kept(run: Path) -> dict:
    """The shift and scale of the codec that a run of the decoder alone began with."""
    net = checkpoint.read_description(checkpoint.find(checkpoint.read_description(run)["init"]))["config"]["net"]
    return {"shift": net["shift"], "scale": net["scale"]}


_MUSIC = ("music that `scripts/render_music.py` composes and renders (the compositions are its own, the sounds those "
          "of FluidR3Mono, MIT); its training split")
_FOUR = ("noto (Apache-2.0), twemoji (CC-BY-4.0, Copyright Twitter, Inc and other contributors), Fluent emoji flat and "
         "3d (MIT, Copyright Microsoft)")
DATA = {
    "emoji:all": "all eight styles of the embedded emoji set: noto, noto classic and FxEmojis (Apache-2.0), twemoji "
                 "(CC-BY-4.0, Copyright Twitter, Inc and other contributors), EmojiOne (CC-BY-4.0, Ranks.com Inc.), "
                 "Fluent emoji flat, 3d and high contrast (MIT, Copyright Microsoft); its training split",
    "music": _MUSIC,
    "emoji": f"the embedded emoji set: {_FOUR}; its training split",
    "emoji-groups": f"the embedded emoji set, its groups as classes: {_FOUR}; its training split",
    "emoji:flat,emoji:outline": "two styles of the embedded emoji set: Fluent emoji flat and high contrast (MIT, "
                                "Copyright Microsoft); their training splits, unpaired",
    "mnist": "the embedded MNIST subset (CC-BY-SA-3.0, Y. LeCun and C. Cortes); its training split",
}


BEFORE = {
    "rectified-flow": "`nexus train rectified-flow --preset reflow --data emoji:all --init flow --set pairs=16384 "
                      "--run runs/reflow`,\n  `nexus train rectified-flow --preset distil --data emoji:all --init "
                      "runs/reflow --set teacher=runs/reflow --set pairs=16384 --run runs/distil`, then (with `--init "
                      "runs/distil` for the embedded model of before)\n  ",
    "music": "`nexus train encodec --config nexus/zoo/music-codec/config.json --data music --run runs/music-codec`, "
             "then\n  ",
}


def card(name: str, described: dict, facts: dict, numbers: int) -> str:
    """The model card, every figure taken from the checkpoint itself or from what `nexus eval` wrote beside the run."""
    system, train = described["system"], facts["train"]
    seen = facts["trained_steps"] * train["batch_size"]
    first = BEFORE.get(name, "")
    named = facts["init"] and ("/" not in facts["init"] or first)
    start = f" It started from the weights of `{facts['init']}`." if named else (
        " It went on from runs that are not kept, so the command below gives the like of it."
        if facts["init"] else "")
    init = f" --init {facts['init']}" if named else ""
    data = described["data"] if described["data"] in DATA else Path(described["data"]).name
    same = f"{first}`nexus train {system} --config nexus/zoo/{name}/config.json --data {data}{init} --run runs/{name}`"
    if described["config"].get("decoder_only"):
        preset = {"encodec": "music"}.get(system, name)
        start = (" These are of the decoder alone; the encoder is of the run before, which is not kept: the commands "
                 "below give the like of it.")
        same = (f"`nexus train {system} --data {data} --preset {preset} --run runs/{name}`, then\n"
                f"  `nexus train {system} --data {data} --preset {preset}-decoder --init runs/{name} "
                f"--run runs/{name}-decoder`")
    if described["config"].get("mistakes"):
        its = described["config"]["mistakes"]["generator"]
        same += (f", then a `{its}` of its latents, and\n  `nexus convert efficientnet-lite1-77cc7160.pth "
                 f"lite1.safetensors --to efficientnet`, then\n  `nexus train {system} --data {data} --preset "
                 f"{preset}-mend --init runs/{name}-decoder --set mistakes.generator=runs/{its} "
                 f"--set features=lite1.safetensors --run runs/{name}-mend`")
    items, card_of = ("clips", "") if data == "music" else ("pictures", " See\n  `nexus/data/shards/README.md`.")
    use = {"musicgen": "nexus music -p TEXT -o piece.wav", "encodec": f"nexus eval {name} --data FOLDER"}.get(
        system, f"nexus sample {system} -m {name} -o out/")
    return f"""# {name}

A checkpoint of `{system}`, trained for Nexus; {numbers:,} weights in bfloat16 (the moving average of the run).

- **Data**: {DATA[data]} (sha256 of the set: `{facts["data_digest"][:16]}`).{card_of}
- **Licence**: the weights are Apache-2.0, like the code; the licences of the data are named above.
- **Training**: {facts["trained_steps"]:,} steps of {train["batch_size"]} {items} ({seen:,} {items}),
  seed {train["seed"]}.{start}{facts.get("on", "") and " " + facts["on"]}
- **The same again**: {same}
- **Use**: `{use}`
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
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source", metavar="RUN|NAME")
    parser.add_argument("name", nargs="?")
    parser.add_argument("--on")
    options = parser.parse_args()
    if options.name:
        publish(Path(options.source), options.name, options.on)
    else:
        again(options.source, options.on)
