"""Train the embedded checkpoints side by side in a given time, and publish them: for a machine with a graphics card.

    python scripts/render_music.py music --soundfont FluidR3Mono_GM.sf3 --count 3000     # for the two of sound
    python scripts/train_zoo.py --minutes 11 [NAME...]

Each chain below is `nexus train` run after run, all chains at once; a run that another one starts from comes first and
takes its share of the time. Nobody knows beforehand how many steps that will be, so `train.steps`, which the learning
rate follows, is set anew at every step from the rate so far; the configuration that is published says how many it
was. The runs share one folder of encoded latents.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
ENDLESS = 10_000_000        # steps, until the rate is known
GRACE = 30                  # seconds for a run to save itself
ALL = ("--data", "emoji:all", "--set", "train.shift=2", "--set", "train.variants=8")
PAIRS = ("--data", "emoji:all", "--set", "pairs=16384")


class Stage(NamedTuple):
    """A run of `nexus train`: its system, its name, its share of the chain's time, and what it is told."""

    system: str
    name: str
    share: float
    batch: int
    told: tuple[str, ...]
    published: bool = True


CHAINS = (
    (Stage("dit", "dit", 1, 256, ALL),),
    (Stage("conditional", "conditional", 0.6, 128, ALL),
     Stage("lcm", "lcm", 0.4, 64, (*ALL, "--set", "teacher=conditional"))),
    (Stage("sd", "sd", 1, 128, ALL),),
    (Stage("mmdit", "mmdit", 1, 256, ALL),),
    (Stage("pixart", "pixart", 1, 256, ALL),),
    (Stage("flow", "flow", 0.47, 256, ALL),
     Stage("rectified-flow", "reflow", 0.28, 256, (*PAIRS, "--preset", "reflow", "--init", "flow"), False),
     Stage("rectified-flow", "rectified-flow", 0.25, 256,
           (*PAIRS, "--preset", "distil", "--set", "teacher=runs/reflow", "--init", "runs/reflow"))),
    (Stage("consistency", "consistency", 1, 128, (*ALL, "--preset", "emoji-distil")),),
    (Stage("gan", "gan", 1, 64, ("--data", "emoji")),),
    (Stage("wgan", "wgan", 1, 64, ("--data", "emoji")),),
    (Stage("cgan", "cgan", 1, 64, ("--data", "mnist", "--set", "train.schedule=linear")),),
    (Stage("cgan", "cgan-emoji", 1, 64, ("--data", "emoji-groups", "--preset", "emoji")),),
    (Stage("cyclegan", "cyclegan", 1, 8, ("--data", "emoji:flat,emoji:outline")),),
    (Stage("ddpm", "ddpm", 1, 128, ("--data", "mnist")),),
    (Stage("encodec", "music-codec", 0.5, 16, ("--data", "music")),
     Stage("musicgen", "music", 0.5, 32, ("--data", "music"))),
)


def finished(stage: Stage, seconds: float) -> bool:
    """Run a stage for so long, and publish it; whether that went well."""
    run, log = Path("runs") / stage.name, Path("runs") / f"{stage.name}.log"
    log.parent.mkdir(exist_ok=True)
    command = [sys.executable, __file__, "--one", str(time.time() + seconds), "train", stage.system, "--run", str(run),
               "--steps", str(ENDLESS), "--batch-size", str(stage.batch), "--save-every", str(ENDLESS),
               "--progress", "plain", "--set", "train.samples=0", *stage.told]
    with log.open("a") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT,
                                   env=os.environ | {"OMP_NUM_THREADS": "1"})
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.terminate()
            code = process.wait(GRACE)
    print(f"{stage.name}: {seconds:.0f} s, exit code {code}", flush=True)
    if code not in (0, 75):
        print("\n".join(log.read_text().splitlines()[-3:]), flush=True)
        return False
    if not stage.published:
        return True
    where = f"In {seconds / 60:.0f} min on a machine that several trainings shared (`scripts/train_zoo.py`)."
    publish = [sys.executable, ROOT / "scripts" / "publish.py", run, stage.name, "--on", where]
    return subprocess.run(publish).returncode == 0


def in_turn(chain: tuple[Stage, ...], seconds: float) -> None:
    """The stages of a chain; the last one has what is left."""
    end = time.monotonic() + seconds
    for i, stage in enumerate(chain):
        left = end - time.monotonic()
        if not finished(stage, left if i + 1 == len(chain) else min(left, stage.share * seconds)):
            return


def one(end: float, arguments: list[str]) -> None:
    """`nexus train` with shared latents, whose steps are those that fit before `end`."""
    sys.path.insert(0, str(ROOT))
    from filelock import FileLock

    import nexus.train.engine as engine
    import nexus.train.start as start
    from nexus.data.kept import Shelf
    from nexus_cli.main import main

    class Shared(Shelf):
        """A Shelf that whoever comes first fills, for all runs of the same facts."""

        def __call__(self, count, make, watch):
            name = hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()[:16]
            self.folder = Path("runs") / f"encoded-{name}"
            with FileLock(f"{self.folder}.lock"):
                return super().__call__(count, make, watch)

    seen: list[tuple[float, int]] = []
    log, scale = engine._log, engine.lr_scale

    def paced(state, *rest):
        seen.append((time.time(), state.step))
        while seen[0][0] < seen[-1][0] - 25:
            seen.pop(0)
        (first, begun), (now, step) = seen[0], seen[-1]
        if now - first > 10:
            left = int(max(0.0, end - now) * (step - begun) / (now - first))
            state.args = state.args.model_copy(update={"steps": step + max(1, left)})
        log(state, *rest)

    start.Shelf, engine._log = Shared, paced
    engine.lr_scale = lambda step, args: max(0.0 if args.schedule == "constant" else args.final_lr, scale(step, args))
    main(arguments)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="those whose chains are run; all without any")
    parser.add_argument("--minutes", type=float, default=11.0)
    options = parser.parse_args()
    known = {stage.name for chain in CHAINS for stage in chain}
    if unknown := set(options.names) - known:
        parser.error(f"{min(unknown)!r} is unknown, expected some of {', '.join(sorted(known))}")
    chosen = [chain for chain in CHAINS if not options.names or {s.name for s in chain} & set(options.names)]
    threads = [threading.Thread(target=in_turn, args=(chain, 60 * options.minutes)) for chain in chosen]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        one(float(sys.argv[2]), sys.argv[3:])
    else:
        main()
