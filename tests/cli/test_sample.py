"""nexus sample with a model that the same command line has trained: seeds, files, batches, interruptions."""

import hashlib
import json
import os
import signal
import time

import pytest
import torch
from safetensors.torch import save_file

from nexus.atomic import read_records
from nexus.images import read_image, read_record


@pytest.fixture(scope="module")
def sample(warm, trained):
    """sample(*arguments) -> the finished `nexus sample ddpm` with the tiny model, two steps, on the CPU."""
    def call(*arguments, **more):
        return warm("sample", "ddpm", "-m", trained, "--device", "cpu", "--steps", 2, *arguments, **more)
    return call


def hashes(folder) -> dict[str, str]:
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted(folder.rglob("*.png"))}


def test_paths_on_stdout_and_records_in_the_files(sample, trained, tmp_path):
    done = sample("-N", 3, "-s", 5, "-o", "o/{n}-{seed}.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines() == ["o/1-5.png", "o/2-6.png", "o/3-7.png"]
    record = read_record(tmp_path / "o" / "2-6.png")
    assert record["schema"] == "nexus/1" and record["seed"] == 6 and record["steps"] == 2
    lines = read_records(tmp_path / "o" / "manifest.jsonl")
    for line in lines:
        data = (tmp_path / "o" / line["path"]).read_bytes()
        assert line["status"] == "ok" and line["bytes"] == len(data)
        assert line["sha256"] == hashlib.sha256(data).hexdigest()
    assert [line["seed"] for line in lines] == [5, 6, 7]


def test_a_picture_depends_on_its_seed_alone(sample, tmp_path):
    for name, more in (("one", ["-N", 3, "--batch-size", 1]), ("many", ["-N", 5, "--batch-size", 5]),
                       ("list", ["--seeds", "5,6,7", "--batch-size", 2])):
        seed = [] if name == "list" else ["-s", 5]
        assert sample(*seed, *more, "-o", f"{name}/{{seed}}.png", cwd=tmp_path).returncode == 0
    for seed in (5, 6, 7):
        assert len({(tmp_path / name / f"{seed}.png").read_bytes() for name in ("one", "many", "list")}) == 1


def test_each_picture_takes_its_row_of_noise_whatever_else_is_made(sample, tmp_path):
    noise = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    for name, rows in (("all", noise), ("last", noise[2]), ("bad", noise * float("nan"))):
        save_file({"noise": rows.contiguous()}, tmp_path / f"{name}.safetensors")
    given = ("-s", 1, "--no-metadata", "-o", "o/{n}.png", "--initial-noise")
    assert sample(*given, "all.safetensors", "-N", 3, cwd=tmp_path).returncode == 0
    wanted = [(tmp_path / "o" / f"{n}.png").read_bytes() for n in (1, 2, 3)]
    (tmp_path / "o" / "3.png").unlink()
    assert sample(*given, "all.safetensors", "-N", 3, "--exists", "skip", cwd=tmp_path).returncode == 0
    assert (tmp_path / "o" / "3.png").read_bytes() == wanted[2] != wanted[0]
    assert sample("-s", 3, "--no-metadata", "-fo", "o/1.png", "--initial-noise", "last.safetensors",
                  cwd=tmp_path).returncode == 0
    assert (tmp_path / "o" / "1.png").read_bytes() == wanted[2]
    for plan in ((), ("--dry-run",)):
        for name, count, said in (("all", 4, "has 3 rows of noise, item 4 has none"), ("bad", 1, "not all finite")):
            done = sample(*given, f"{name}.safetensors", "-N", count, "-f", *plan, cwd=tmp_path)
            assert done.returncode == 3 and said in done.stderr.decode()


def test_a_record_names_files_without_their_folders(sample, pictures, tmp_path):
    picture = next(p for p in pictures.iterdir() if p.suffix == ".png")
    assert sample("-s", 1, "-i", picture.resolve(), "--strength", 0.5, "-o", "a.png", cwd=tmp_path).returncode == 0
    assert read_record(tmp_path / "a.png")["image"] == picture.name
    again = sample("--like", "a.png", "-o", "b.png", cwd=tmp_path)          # a strength is one of the lost picture
    assert again.returncode == 0 and "--image" in again.stderr.decode()
    assert "strength" not in read_record(tmp_path / "b.png")
    (tmp_path / "rows.jsonl").write_text('{"strength": 0.5}\n')
    done = sample("-b", "rows.jsonl", "-o", "o/", cwd=tmp_path)
    assert done.returncode == 7 and "--strength has no meaning without --image" in done.stderr.decode()


def test_the_same_command_gives_the_same_bytes(sample, tmp_path):
    for _ in range(2):
        assert sample("-s", 1, "-fo", "a.png", cwd=tmp_path).returncode == 0
        data = (tmp_path / "a.png").read_bytes()
        (tmp_path / "seen").mkdir(exist_ok=True)
        (tmp_path / "seen" / f"{hashlib.sha256(data).hexdigest()}").touch()
    assert len(list((tmp_path / "seen").iterdir())) == 1
    piped = sample("-s", 1, "-o", "-", cwd=tmp_path)
    assert piped.returncode == 0 and piped.stdout == data
    lines = sample("-s", 1, "-o", "b.png", "--json", cwd=tmp_path).stdout.splitlines()
    assert len(lines) == 1 and json.loads(lines[0])["sha256"] == hashlib.sha256(data).hexdigest()
    again = sample("--like", "a.png", "-o", "c.png", cwd=tmp_path)
    assert again.returncode == 0 and (tmp_path / "c.png").read_bytes() == data


def test_existing_files(sample, tmp_path):
    assert sample("-s", 1, "-o", "a.png", cwd=tmp_path).returncode == 0
    assert sample("-s", 1, "-o", "a.png", cwd=tmp_path).returncode == 6
    assert sample("-s", 1, "-o", "a.png", "--exists", "skip", cwd=tmp_path).returncode == 0
    assert sample("-s", 1, "-o", "a.png", "--exists", "rename", cwd=tmp_path).stdout == b"a-1.png\n"
    assert sample("-s", 2, "-o", "a.png", "--exists", "overwrite", cwd=tmp_path).returncode == 0
    assert read_record(tmp_path / "a.png")["seed"] == 2 and not list(tmp_path.glob(".*"))


def test_grid_preview_and_no_metadata(sample, tmp_path):
    done = sample("-s", 1, "-N", 3, "-o", "o/{n}.png", "--grid", "--preview", "p.png", "--preview-every", 1,
                  "--no-metadata",
                  "-p", "secret words", cwd=tmp_path)
    if done.returncode != 0:                            # an unconditional model may refuse the prompt
        assert done.returncode == 3
        done = sample("-s", 1, "-N", 3, "-o", "o/{n}.png", "--grid", "--preview", "p.png", "--preview-every", 1,
                      "--no-metadata", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.decode().splitlines()[-1] == "o/1-grid.png"
    assert read_record(tmp_path / "o" / "1.png") is None
    side = read_image(tmp_path / "o" / "1.png").shape[1]
    assert read_image(tmp_path / "o" / "1-grid.png").shape[1] == 2 * (side + 2) + 2
    assert (tmp_path / "p.png").exists()


BATCH = [{"seed": 1, "id": "a"}, {"seed": 2, "num": 2, "output": "sub/b.png"}, {"seed": 3, "steps": 1}, {"seed": 3}]


@pytest.fixture
def rows(tmp_path):
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in BATCH) + "\n")
    return tmp_path


def test_a_batch_is_made_once_and_repaired(sample, rows):
    first = sample("-b", "b.jsonl", "-o", "out/", cwd=rows)
    assert first.returncode == 0, first.stderr.decode()
    whole = hashes(rows / "out")
    assert len(whole) == 5 and {"sub/b-0.png", "sub/b-1.png"} <= whole.keys()
    (rows / "out" / "sub" / "b-0.png").unlink()
    again = sample("-b", "b.jsonl", "-o", "out/", "-v", cwd=rows)
    assert again.returncode == 0 and again.stdout == first.stdout and hashes(rows / "out") == whole
    records = read_records(rows / "out" / "manifest.jsonl")
    assert [r["attempt"] for r in records if r["path"] == "sub/b-0.png"] == [1, 2] and len(records) == 6


def test_shards_make_what_the_whole_makes(sample, rows):
    assert sample("-b", "b.jsonl", "-o", "whole/", cwd=rows).returncode == 0
    workers = [sample("-b", "b.jsonl", "-o", "parts/", "--shard", f"{i}/2", cwd=rows) for i in range(2)]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert hashes(rows / "parts") == hashes(rows / "whole")
    assert len(read_records(rows / "parts" / "manifest.jsonl")) == 5


def test_a_kill_at_any_call_and_the_same_command_again(sample, rows):
    assert sample("-b", "b.jsonl", "-o", "whole/", cwd=rows).returncode == 0
    whole = hashes(rows / "whole")
    for number in (1, 9, 20, 33, 44):
        target = f"killed-{number}/"
        killed = sample("-b", "b.jsonl", "-o", target, cwd=rows, env={"NEXUS_FAULT": f"any:{number}:kill"})
        assert killed.returncode == -signal.SIGKILL
        assert hashes(rows / target).items() <= whole.items()
        again = sample("-b", "b.jsonl", "-o", target, cwd=rows)
        assert again.returncode == 0, again.stderr.decode()
        assert hashes(rows / target) == whole and not list((rows / target).rglob(".*.tmp"))
        done = [r["path"] for r in read_records(rows / target / "manifest.jsonl") if r["status"] == "ok"]
        assert sorted(done) == sorted(whole)


@pytest.mark.parametrize("error", ("ENOSPC", "EACCES", "EROFS", "EMFILE", "EIO"))
def test_a_broken_disk_is_never_success(sample, tmp_path, error):
    for point in ("open", "write", "fsync", "link"):
        done = sample("-s", 1, "-o", f"{point}.png", cwd=tmp_path, env={"NEXUS_FAULT": f"{point}:1:{error}"})
        assert done.returncode == 6 and f"{point}.png" in done.stderr.decode() and done.stdout == b""
        assert not list(tmp_path.glob("*.png")) and not list(tmp_path.glob(".*"))


def test_one_bad_item_does_not_stop_the_batch(sample, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"\x89PNG broken")
    rows = [{"seed": 1}, {"seed": 2, "image": "broken.png"}, {"seed": 3}]
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    done = sample("-b", "b.jsonl", "-o", "out/", cwd=tmp_path)
    assert done.returncode == 7, done.stderr.decode()
    assert len(done.stdout.splitlines()) == 2 and "1 of 3 items failed" in done.stderr.decode()
    assert "failed: b.jsonl:2: " in done.stderr.decode()
    failed = [r for r in read_records(tmp_path / "out" / "manifest.jsonl") if r["status"] == "failed"]
    assert len(failed) == 1 and failed[0]["error"]["code"] == 3
    stopped = sample("-b", "b.jsonl", "-o", "other/", "--on-error", "stop", cwd=tmp_path)
    assert stopped.returncode == 3 and len(stopped.stdout.splitlines()) == 1


def test_two_processes_on_one_batch_share_it(nexus, trained, tmp_path):
    """Planned at once, before either has written: what one has made, the other does not make again, nor stops at."""
    (tmp_path / "b.jsonl").write_text("".join(f'{{"seed": {i}}}\n' for i in range(60)))
    both = [nexus("sample", "ddpm", "-m", trained, "--steps", 2, "--batch-size", 1, "-b", "b.jsonl", "-o", "o/",
                  "--device", "cpu", cwd=tmp_path, wait=False) for _ in "ab"]
    for running in both:
        _, errors = running.communicate(timeout=120)
        assert running.returncode == 0, errors.decode()
    assert len(list((tmp_path / "o").glob("*.png"))) == 60


def test_max_time_stops_between_pictures(sample, tmp_path):
    done = sample("-N", 50, "-s", 1, "-o", "o/{n}.png", "--max-time", "0.001", "--batch-size", 1, cwd=tmp_path)
    assert done.returncode == 75 and len(done.stdout.splitlines()) == 1


@pytest.mark.parametrize("number,code", [(signal.SIGINT, 130), (signal.SIGTERM, 75), (signal.SIGUSR1, 75)])
def test_a_signal_leaves_whole_files(nexus, trained, tmp_path, number, code):
    running = nexus("sample", "ddpm", "-m", trained, "--steps", 2, "-N", 100_000, "-s", 1, "-o", "o/{n}.png",
                    "--device",
                    "cpu", cwd=tmp_path, wait=False)
    while not (tmp_path / "o" / "manifest.jsonl").exists() and running.poll() is None:
        time.sleep(0.02)
    running.send_signal(number)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == code, errors.decode()
    assert "Traceback" not in errors.decode()
    for path in (tmp_path / "o").glob("*.png"):
        read_image(path)
    assert not list((tmp_path / "o").glob(".*.tmp"))


def test_a_reader_that_leaves_ends_it_quietly(nexus, trained, tmp_path):
    running = nexus("sample", "ddpm", "-m", trained, "--steps", 2, "-N", 100_000, "-s", 1, "-o", "o/{n}.png",
                    "--device",
                    "cpu", cwd=tmp_path, wait=False)
    assert running.stdout.readline() == b"o/1.png\n"
    running.stdout.close()
    errors = running.stderr.read().decode()
    assert running.wait(60) == 141 and "Traceback" not in errors and "error" not in errors


@pytest.mark.parametrize("prompt", [b"", b" ", "😀".encode(), "مرحبا".encode(), b"\xff\xfe", b"{}%s$(id)", b"<b>&\"'",
                                    b"a\nb",
                                    b"../../x", b"x" * 10_000])
def test_any_prompt_gives_a_picture_or_code_3(sample, tmp_path, prompt):
    done = sample("-s", 1, "-p", prompt, "-o", "{n}-{prompt}.png", cwd=tmp_path)
    assert done.returncode in (0, 3), done.stderr.decode()
    assert len(list(tmp_path.rglob("*"))) <= 2          # the picture and the manifest, here and nowhere else
    assert not os.path.exists(tmp_path.parent / "x.png")


def test_a_plan_is_what_the_run_does(sample, rows):
    planned = [json.loads(line) for line in sample("-b", "b.jsonl", "-o", "o/", "--dry-run", "--json",
                                                   cwd=rows).stdout.splitlines()]
    assert not (rows / "o").exists()
    made = [json.loads(line) for line in sample("-b", "b.jsonl", "-o", "o/", "--json", cwd=rows).stdout.splitlines()]
    assert [(p["id"], p["path"], p["seed"]) for p in planned] == [(m["id"], m["path"], m["seed"]) for m in made]


def test_models_of_another_kind_are_refused(warm, trained, tmp_path):
    assert warm("sample", "vae", "-m", trained, "-s", 1, cwd=tmp_path).returncode == 4
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    assert warm("sample", "ddpm", "-m", "./a.safetensors", "-s", 1, cwd=tmp_path).returncode == 4
    assert warm("sample", "ddpm", "-m", "no-such-name", "-s", 1, cwd=tmp_path).returncode == 4
    assert warm("sample", "ddpm", "-m", trained, "-s", 1, "--device", "cuda:99", cwd=tmp_path).returncode == 5


def test_the_class_that_a_prompt_is_taken_for_is_said(warm, tmp_path):
    def said(*arguments):
        done = warm("sample", "cgan", "--device", "cpu", "-s", 1, *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr.decode()
        return [line for line in done.stderr.decode().splitlines() if "class" in line]
    assert said("-p", "7", "-N", 2, "-o", "exact/") == ["class 'seven'"]
    assert said("-p", "sevn", "-o", "near/") == ["class 'seven', the nearest to 'sevn'"]
    assert said("-N", 2, "-o", "drawn/") == said("-q", "-p", "sevn", "-o", "quiet/") == []
    (tmp_path / "many.txt").write_text("7\nsevn\nthree\n")
    assert said("-b", "many.txt", "-o", "many/") == ["class 'seven', the nearest to 'sevn'"]
