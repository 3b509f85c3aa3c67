"""The real command line in a process of its own, and a model that it trained itself."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def nexus(tmp_path_factory):
    """nexus(*arguments, cwd=, env=, stdin=, wait=True) -> the finished process (or the running one)."""
    state = tmp_path_factory.mktemp("state")

    def call(*arguments, cwd=None, env=None, stdin=b"", wait=True):
        surroundings = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(state),
                        "COLUMNS": "100", **(env or {})}
        command = [sys.executable, "-m", "nexus_cli", *(a if isinstance(a, bytes) else str(a) for a in arguments)]
        if not wait:
            return subprocess.Popen(command, cwd=cwd, env=surroundings, stdin=subprocess.DEVNULL,
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return subprocess.run(command, cwd=cwd, env=surroundings, input=stdin, capture_output=True, timeout=300)
    return call


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 12 small pictures."""
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(12):
        array = np.random.default_rng(i).integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(array).save(folder / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def trained(nexus, pictures, tmp_path_factory):
    """The run folder of a tiny DDPM after two steps."""
    run = tmp_path_factory.mktemp("runs") / "ddpm"
    done = nexus("train", "ddpm", "--preset", "tiny", "--data", pictures, "--run", run, "--steps", 2,
                 "--batch-size", 4, "--set", "train.samples=0", "--device", "cpu")
    assert done.returncode == 0, done.stderr.decode()
    return run
