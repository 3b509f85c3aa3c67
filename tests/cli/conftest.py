"""The real command line in a process of its own, and a model that it trained itself."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.drawn import drawn

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def nexus(tmp_path_factory):
    """nexus(*arguments, cwd=, env=, stdin=, wait=True) -> the finished process (or the running one)."""
    state = tmp_path_factory.mktemp("state")

    def call(*arguments, cwd=None, env=None, stdin=b"", wait=True):
        surroundings = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1",
                        "XDG_STATE_HOME": str(state),
                        "COLUMNS": "100", **(env or {})}
        command = [sys.executable, "-m", "nexus_cli", *(a if isinstance(a, bytes) else str(a) for a in arguments)]
        if not wait:
            return subprocess.Popen(command, cwd=cwd, env=surroundings, stdin=subprocess.DEVNULL,
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        return subprocess.run(command, cwd=cwd, env=surroundings, input=stdin, capture_output=True, timeout=300)
    return call


WARM = """
import json, os, sys
import nexus.api, nexus.images, nexus.models.diffusion.base_diffusion, rich.console, typer.main
from nexus_cli.main import main
commands, answers = os.fdopen(int(sys.argv[1])), os.fdopen(int(sys.argv[2]), "w", buffering=1)
for line in commands:
    job = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            os.dup2(os.open(job[name], os.O_RDONLY if number == 0 else os.O_WRONLY | os.O_TRUNC), number)
        sys.stdin = open(0, closefd=False)
        os.chdir(job["cwd"])
        os.environ.update(job["env"])
        try:
            main([os.fsdecode(bytes.fromhex(word)) for word in job["arguments"]])
        except SystemExit as end:
            os._exit(end.code)                          # main has flushed; taking torch apart costs a second
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=answers)
"""


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """Like `nexus`, but forked from a process that has imported torch already: the same code, 3 seconds sooner."""
    folder = tmp_path_factory.mktemp("warm")
    (read, command), (answer, write) = os.pipe(), os.pipe()
    surroundings = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1", "XDG_STATE_HOME": str(folder)}
    server = subprocess.Popen([sys.executable, "-c", WARM, str(read), str(write)], pass_fds=(read, write),
                              env=surroundings)
    os.close(read)
    os.close(write)
    commands, answers = os.fdopen(command, "w", buffering=1), os.fdopen(answer)

    def call(*arguments, cwd=folder, env=None, stdin=b""):
        files = {name: folder / name for name in ("stdin", "stdout", "stderr")}
        for name, path in files.items():
            path.write_bytes(stdin if name == "stdin" else b"")
        words = [os.fsencode(a if isinstance(a, bytes) else str(a)).hex() for a in arguments]
        commands.write(json.dumps({"arguments": words, "cwd": str(cwd), "env": env or {},
                                   **{name: str(path) for name, path in files.items()}}) + "\n")
        code = int(answers.readline())
        return subprocess.CompletedProcess(arguments, code, files["stdout"].read_bytes(), files["stderr"].read_bytes())
    yield call
    commands.close()
    server.wait(10)


@pytest.fixture(scope="session")
def pictures(tmp_path_factory):
    """A folder of 12 small pictures."""
    return drawn(tmp_path_factory.mktemp("pictures"), [""], count=12, side=16)


@pytest.fixture(scope="session")
def trained(warm, pictures, tmp_path_factory):
    """The run folder of a tiny DDPM after two steps."""
    run = tmp_path_factory.mktemp("runs") / "ddpm"
    done = warm("train", "ddpm", "--preset", "tiny", "--data", pictures, "--run", run, "--steps", 2,
                 "--batch-size", 4, "--set", "train.samples=0", "--device", "cpu")
    assert done.returncode == 0, done.stderr.decode()
    return run
