"""--lora, --embedding and --control on the command line; what they compute is tested elsewhere."""

import json
import shutil

import pytest
from PIL import Image

from nexus import checkpoint


@pytest.fixture(scope="module")
def adapted(warm, trained, pictures, tmp_path_factory):
    """The run folder of a LoRA of the tiny DDPM."""
    run = tmp_path_factory.mktemp("lora") / "run"
    done = warm("train", "ddpm", "--lora", "rank=2,alpha=4", "--init", trained, "--data", pictures, "--run", run,
                "--steps", 2, "--batch-size", 4, "--lr", 0.1, "--set", "train.samples=0", "--device", "cpu")
    assert done.returncode == 0, done.stderr.decode()
    return run


def test_it_is_trained_merged_written_and_sampled(warm, trained, adapted, tmp_path):
    def picture(*arguments, model=trained):
        done = warm("sample", "ddpm", "-m", model, "--steps", 2, "-s", 1, "--device", "cpu", "-o", "-", *arguments)
        assert done.returncode == 0, done.stderr.decode()
        return done.stdout
    file = tmp_path / "k.safetensors"
    assert warm("convert", adapted, file, "--to", "kohya").returncode == 0
    assert warm("convert", trained, tmp_path / "merged", "--lora", f"{file}:1.0").returncode == 0
    assert warm("convert", adapted, tmp_path / "own").returncode == 0
    assert picture("--no-metadata") != picture("--no-metadata", "--lora", file)
    wanted = picture("--no-metadata", model=adapted)
    assert picture("--no-metadata", "--lora", file) == wanted == picture("--no-metadata", model=tmp_path / "merged")
    assert picture("--no-metadata", model=tmp_path / "own") == wanted
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"seed": 1, "lora": ["k.safetensors:0.5", "k.safetensors:0.5"]}) + "\n" +
                    json.dumps({"seed": 1, "lora": ["gone.safetensors"]}) + "\n")
    done = warm("sample", "ddpm", "-m", trained, "--steps", 2, "-b", rows, "-o", f"{tmp_path}/out/", "--on-error",
                "continue", "--device", "cpu")
    assert done.returncode == 7 and b"gone.safetensors" in done.stderr
    assert len(list((tmp_path / "out").glob("*.png"))) == 1


def test_a_plan_shows_the_lora(warm, trained, pictures, tmp_path):
    done = warm("train", "ddpm", "--lora", "rank=2", "--init", trained, "--data", pictures, "--run", tmp_path / "x",
                "--dry-run")
    plan = json.loads(done.stdout)
    assert plan["lora"]["rank"] == 2 and plan["lora"]["base"]["digest"] and not (tmp_path / "x").exists()


def test_a_check_of_a_lora_writes_nothing(warm, adapted, tmp_path):
    (tmp_path / "kept.safetensors").write_text("precious")
    for form, name in (("kohya", "kept.safetensors"), ("peft", "folder"), ("diffusers", None)):
        to = [name] if name else []
        done = warm("convert", adapted, *to, "--to", form, "--check", "-f", "--json", cwd=tmp_path)
        assert done.returncode == 0 and json.loads(done.stdout)["layout"] == f"lora/{form}"
    assert [p.name for p in tmp_path.iterdir()] == ["kept.safetensors"]
    assert (tmp_path / "kept.safetensors").read_text() == "precious"
    for more, said in ((("--check",), "merges nothing"), (("x.safetensors", "--to", "kohya", "--set", "a=1"), "--set")):
        done = warm("convert", adapted, *more, cwd=tmp_path)
        assert done.returncode == 2 and said in done.stderr.decode()
    assert warm("convert", adapted, "k.safetensors", "--to", "kohya", cwd=tmp_path).returncode == 0
    done = warm("convert", "k.safetensors", "out", cwd=tmp_path)
    assert done.returncode == 4 and "k.safetensors is a LoRA" in done.stderr.decode()


@pytest.mark.parametrize("lora, said", [
    ("rank=2", "trains more than one network"), ("rank=2,rank=3", "rank is said twice"),
    ("rank=two", "--lora 'rank=two': rank: "), ("rank=2,width=3", "there is no setting 'width'"),
])
def test_a_plan_refuses_what_the_run_would(warm, tmp_path, lora, said):
    run = tmp_path / "run"
    for more in ((), ("--dry-run",)):
        done = warm("train", "gan", "--lora", lora, "--data", "emoji", "--run", run, "--device", "cpu", *more)
        assert done.returncode == 2 and said in done.stderr.decode() and not run.exists()


@pytest.mark.parametrize("arguments, code, said", [
    (("--lora", "gone.safetensors:0.5"), 4, "there is no file 'gone.safetensors'"),
    (("--lora", ""), 2, "--lora '' names no file"), (("--lora", ":2"), 2, "--lora ':2' names no file"),
    (("--embedding", ":cat"), 2, "--embedding ':cat' names no file"),
    (("--embedding", "gone.pt:cat"), 4, "there is no file 'gone.pt'"),
    (("--control", "gone/model"), 4, "there is no model 'gone/model'"),
    (("--control-image", "gone.png"), 3, "there is no file 'gone.png'"),
    (("--control-scale", "-1"), 2, "not a number from 0 to 10"),
])
def test_what_is_not_there_is_said_at_once(warm, trained, arguments, code, said):
    done = warm("sample", "ddpm", "-m", trained, *arguments, "--device", "cpu", "-o", "/tmp/never.png")
    assert done.returncode == code and said in " ".join(done.stderr.decode().replace("│", " ").split())


@pytest.mark.parametrize("arguments, code, said", [
    (["--lora", "a.png"], 4, "a.png"), (["--embedding", "a.png"], 3, "learns no words"),
    (["--initial-noise", "a.png"], 3, "cannot read the noise file"),
    (["--guidance-kind", "autoguidance", "--guide-model", "a.png"], 4, "a.png"),
    (["--guidance-kind", "autoguidance", "--guide-model", "dit"], 2, "does not see what this model makes"),
    (["--control", "dit", "--control-image", "a.png"], 2, "no ControlNet")])
def test_the_plan_opens_what_the_run_would(warm, trained, tmp_path, arguments, code, said):
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    for plan in ([], ["--dry-run"]):
        done = warm("sample", "ddpm", "-m", trained, "--steps", 2, *arguments, *plan, "--device", "cpu", "-o", "x.png",
                    cwd=tmp_path)
        assert done.returncode == code and said in " ".join(done.stderr.decode().split()), done.stderr.decode()


def test_the_plan_verifies_the_models_files(warm, trained, tmp_path):
    copy = shutil.copytree(checkpoint.find(str(trained)), tmp_path / "copy")
    data = bytearray((copy / "ema.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "ema.safetensors").write_bytes(data)
    for plan in ([], ["--dry-run"]):
        done = warm("sample", "ddpm", "-m", copy, "--steps", 2, *plan, "--device", "cpu", "-o", "x.png", cwd=tmp_path)
        assert done.returncode == 4 and "sha256 differs" in done.stderr.decode(), done.stderr.decode()
