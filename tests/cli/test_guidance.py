"""The kinds of guidance on the command line: what works, what is refused, and in which words."""

import pytest

from nexus.images import read_record


@pytest.fixture(scope="module")
def sample(warm, trained):
    """sample(*arguments) -> the finished `nexus sample ddpm` with the tiny model, two steps, on the CPU."""
    def call(*arguments, **more):
        return warm("sample", "ddpm", "-m", trained, "--device", "cpu", "--steps", 2, *arguments, **more)
    return call


def test_the_record_says_how_a_picture_was_guided(sample, trained, tmp_path):
    done = sample("--guidance-kind", "pag", "--perturb-layers", "0,1", "--perturb-scale", 2, "-s", 1, "-o", "a.png",
                  cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    record = read_record(tmp_path / "a.png")
    assert (record["guidance_kind"], record["perturb_layers"], record["perturb_scale"]) == ("pag", [0, 1], 2.0)
    again = sample("--like", tmp_path / "a.png", "-s", 1, "-o", "b.png", "--device", "cpu", cwd=tmp_path)
    assert again.returncode == 0, again.stderr.decode()
    assert read_record(tmp_path / "b.png")["perturb_layers"] == [0, 1]


def test_a_model_guides_itself_by_name(sample, trained, tmp_path):
    done = sample("--guidance-kind", "autoguidance", "--guide-model", trained, "-o", "a.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert read_record(tmp_path / "a.png")["guidance"] == 2.0


@pytest.mark.parametrize("arguments, code, words", [
    (("--guidance-kind", "autoguidance"), 2, "needs --guide-model"),
    (("--guidance-kind", "nonsense"), 2, "cfg-zero"),
    (("--guide-model", "x"), 2, "--guide-model has no meaning"),
    (("--guidance-kind", "apg", "--apg", "1,2"), 2, "0,15,-0.5"),
    (("--guidance-kind", "autoguidance", "--guide-model", "./nowhere"), 4, "nowhere"),
    (("--guidance-kind", "slg", "--perturb-layers", "99"), 2, "layers 0 to"),
    (("--guidance-kind", "cfg-zero"), 2, "unconditional"),
    (("--dynamic-threshold", "0"), 2, "above 0")])
def test_what_cannot_be_is_refused_in_words(sample, tmp_path, arguments, code, words):
    for plan in ([], ["--dry-run"]):
        done = sample(*arguments, "-o", "a.png", *plan, cwd=tmp_path)
        assert words in " ".join(done.stderr.decode().split())
        assert done.returncode == code and not (tmp_path / "a.png").exists()


def test_a_system_that_takes_no_guide_says_so(warm, trained, tmp_path):
    done = warm("sample", "vae", "--guidance-kind", "autoguidance", "--guide-model", trained, "-o", "a.png",
                "--device", "cpu", cwd=tmp_path)
    assert "takes no model to guide it" in " ".join(done.stderr.decode().split())
