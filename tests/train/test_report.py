"""The run's page and pictures: self-contained, escaped, bounded, equal for equal runs; sampling disturbs nothing."""

import base64
import html.parser
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
import toys

from nexus.errors import InputError
from nexus.images import read_image, read_record, write_image
from nexus.train import plots
from nexus.train.args import TrainArgs
from nexus.train.pictures import prompts_of, sheet, write_samples
from nexus.train.report import read_facts, resume_command, write_report
from nexus.train.start import train
from nexus.train.state import new_state


class Reader(html.parser.HTMLParser):
    """All tags with their attributes, all text; complains about tags that are not closed in order."""

    VOID = {"meta", "img", "input", "br", "link"}

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.open = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        self.text.append(data)

    def of(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


def read(run):
    write_report(run)
    reader = Reader((run / "report.html").read_text("utf-8"))
    assert not reader.open
    return reader


@pytest.fixture(scope="module")
def made(pictures, tmp_path_factory):
    """A finished run of the toy, with five sheets."""
    from nexus import catalog
    catalog.CATALOG.update(toys.ENTRIES)
    run = tmp_path_factory.mktemp("runs") / "a & <b>"
    train("toy", data=str(pictures), run=run, device="cpu", flags={"sample_every": 3})
    for name in toys.ENTRIES:
        del catalog.CATALOG[name]
    return run


@pytest.fixture
def run(made, tmp_path):
    return shutil.copytree(made, tmp_path / made.name)


def test_training_leaves_a_page_with_curves_samples_and_checkpoints(run):
    page = read(run)
    text = "".join(page.text)
    assert "finished" in text and "step-0000012" in text and "pictures seen" in text
    assert [c["aria-label"].split()[0] for c in page.of("svg")][0] == "loss"
    assert len(page.of("img")) == 4 and sum("hidden" in a for a in page.of("a") if "data-label" in a) == 3
    manifest = json.loads((run / "step-0000012/manifest.json").read_text())
    assert manifest["files"]["model.safetensors"]["sha256"] in text


def test_the_page_asks_nothing_of_the_network(run):
    page = read(run)
    policy = [m["content"] for m in page.of("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy[0].startswith("default-src 'none'")
    links = [a.get("src") or a.get("href") for name, a in page.tags if "src" in a or "href" in a]
    assert links and all(re.match(r"(data:image/webp;base64,|samples/|step-\d{7}/$)", link) for link in links)
    text = re.sub(r"data:image/webp;base64,[\w+/=]*", "", (run / "report.html").read_text())
    assert not re.search(r"https?:|//[a-z]|url\(|@import|fetch\(|XMLHttp", text)
    assert not page.of("link")


def test_equal_runs_give_equal_pages(run):
    write_report(run)
    before = (run / "report.html").read_bytes()
    write_report(run)
    assert (run / "report.html").read_bytes() == before


def test_everything_from_outside_is_escaped(run):
    evil = '"><script>alert(1)</script><img src=x onerror=alert(2)>&'
    described = json.loads((run / "config.json").read_text())
    described |= {"data": evil, "system": evil, "environment": {evil: evil}, "config": {evil: {"a": evil}}}
    (run / "config.json").write_text(json.dumps(described))
    with open(run / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": 13, evil: 1.5}) + "\n")
    write_image(sheet(run, 15), np.zeros((8, 8, 3), np.uint8), {"prompts": [evil]})
    (run / 'samples/step-"><script>.webp').write_bytes((run / "samples/step-0000015.webp").read_bytes())
    (run / 'step-"><script>.bad').mkdir()
    page = read(run)
    assert len(page.of("script")) == 1 and all("onerror" not in attrs for _, attrs in page.tags)
    assert any(evil in (attrs.get("alt") or "") for attrs in page.of("img"))


def test_the_command_that_goes_on_is_quoted_and_says_what_changed(run, pictures):
    import shlex
    words = shlex.split(resume_command(read_facts(run)))
    assert words == ["nexus", "train", "toy", "--data", str(pictures), "--run", str(run)]
    train("toy", data=str(pictures), run=run, device="cpu", flags={"steps": 14})
    assert resume_command(read_facts(run)).endswith("--set train.steps=14")


def test_an_empty_folder_has_a_page(tmp_path):
    text = "".join(read(tmp_path).text)
    assert "no checkpoint yet" in text and "config.json is missing" in text and "no step has been logged" in text


@pytest.mark.parametrize("file", ["config.json", "metrics.jsonl", "step-0000012/manifest.json",
                                  "step-0000012/config.json", "step-0000012/model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"[]", b"null", b'{"files": 3, "step": "x"}'])
def test_a_damaged_file_does_not_stop_the_page(file, content, run):
    (run / file).write_bytes(content)
    read(run)


def test_a_damaged_sheet_is_named_and_the_rest_is_shown(run):
    (run / "samples/step-0000009.webp").write_bytes(b"no picture")
    page = read(run)
    assert len(page.of("img")) == 3 and "step-0000009.webp" in "".join(page.text)


def test_warnings_name_what_went_wrong(run):
    (run / "step-0000003.bad").mkdir()
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 13, "left_out": true}\n')
    text = "".join(read(run).text)
    assert "step-0000003.bad was damaged" in text and "step 13 was not finite" in text


def test_a_long_run_stays_below_five_megabytes(run):
    noise = np.random.default_rng(0)
    for step in range(40):
        write_image(sheet(run, step), noise.integers(0, 256, (260, 260, 3), dtype=np.uint8), exists="overwrite")
    with open(run / "metrics.jsonl", "w") as file:
        for step in range(20_000):
            file.write(json.dumps({"step": step, **{f"m{i}.loss": noise.random() for i in range(15)}}) + "\n")
    described = json.loads((run / "config.json").read_text())
    described["config"] = {"classes": [f"name {i}" for i in range(5000)], "text": "x" * 100_000}
    (run / "config.json").write_text(json.dumps(described))
    page = read(run)
    assert (run / "report.html").stat().st_size < 5_000_000
    shown = page.of("img")
    assert len(shown) == 24 and "step 39" in shown[-1]["alt"] and "step 0" in shown[0]["alt"]
    for image in shown:
        read_image(base64.b64decode(image["src"].partition(",")[2]))


# --- curves --------------------------------------------------------------------------------------------------------

def polyline(svg, kind):
    text = re.search(rf'class="{kind}" points="([^"]*)"', svg)[1]
    return [tuple(float(v) for v in pair.split(",")) for pair in text.split()]


def test_a_curve_maps_values_linearly_or_by_their_logarithm():
    line = polyline(plots.curve("a", [(0, 1.0), (5, 1.5), (10, 2.0)]), "raw")
    assert line[1][0] == pytest.approx((line[0][0] + line[2][0]) / 2, abs=0.1)
    assert line[1][1] == pytest.approx((line[0][1] + line[2][1]) / 2, abs=0.1)
    logged = polyline(plots.curve("a", [(0, 0.01), (5, 0.1), (10, 1.0)]), "raw")
    assert logged[1][1] == pytest.approx((logged[0][1] + logged[2][1]) / 2, abs=0.1)


@pytest.mark.parametrize("values", [[1.0], [0.0, 0.0], [-3.0, 4.0], [1e-30, 1e30], [1e300, -1e300], [5e-324, 1.0],
                                    [float("nan"), 1.0, float("inf")], [float("nan")], [], [7.0] * 9])
def test_no_values_break_a_curve(values):
    svg = plots.curve("x", [(i, v) for i, v in enumerate(values)])
    assert not re.search(r"\b(nan|inf)\b", svg.replace("no finite", ""))
    Reader(svg)


def test_smoothing_keeps_lines_and_constants():
    assert [y for _, y in plots.smoothed([(i, 3.0) for i in range(500)])] == pytest.approx([3.0] * 500)
    line = plots.smoothed([(i, float(i)) for i in range(801)])
    assert line[400][1] == pytest.approx(400, abs=0.5)          # no lag in the middle
    noise = np.random.default_rng(0).normal(size=4000)
    assert np.std([y for _, y in plots.smoothed(list(enumerate(noise)))]) < 0.15


def test_thinning_keeps_the_ends_and_every_spike():
    points = [(i, math.sin(i)) for i in range(10_000)]
    points[4321] = (4321, 99.0)
    points[7777] = (7777, -99.0)
    thin = plots.thinned(points)
    assert len(thin) <= 2 * plots.COLUMNS + 2 and {points[0], points[-1], points[4321], points[7777]} <= set(thin)
    assert [p[0] for p in thin] == sorted(p[0] for p in thin)


@pytest.mark.parametrize("low, high, log", [(0.0, 1.0, False), (-5.0, 3e4, False), (1e-7, 2e-7, False),
                                            (1e-5, 1.0, True), (0.3, 9.0, True), (1e-30, 1e30, True)])
def test_ticks_are_round_and_lie_on_the_axis(low, high, log):
    found = plots.ticks(plots.Axis(low, high, 0, 1, log))
    assert 2 <= len(found) <= 8 and all(low - 1e-12 <= v <= high + 1e-9 * abs(high) for v in found)
    for value in found:
        assert not value or float(f"{value:.2g}") == pytest.approx(value, rel=1e-6)


# --- sample sheets -------------------------------------------------------------------------------------------------

def state_of(**args):
    torch.manual_seed(0)
    return new_state("toy", toys.ToyConfig().build(), TrainArgs(samples=5, **args))


def test_sampling_leaves_weights_modes_and_random_streams_alone(tmp_path):
    state = state_of()
    state.ema.average["net.0.weight"].mul_(3)
    state.system.train()
    state.system.net[3].eval()
    before = {n: t.clone() for n, t in state.system.state_dict().items()}
    average = {n: t.clone() for n, t in state.ema.average.items()}
    modes, stream = [m.training for m in state.system.modules()], torch.get_rng_state()
    write_samples(state, tmp_path, torch.device("cpu"))
    assert all(torch.equal(before[n], t) for n, t in state.system.state_dict().items())
    assert all(torch.equal(average[n], t) for n, t in state.ema.average.items())
    assert [m.training for m in state.system.modules()] == modes and torch.equal(torch.get_rng_state(), stream)


def test_a_failing_sample_leaves_everything_alone_too(tmp_path, monkeypatch):
    state = state_of()
    state.ema.average["net.0.weight"].mul_(3)
    before = {n: t.clone() for n, t in state.system.state_dict().items()}

    def fails(request, *, seeds):
        raise InputError("no")
    monkeypatch.setattr(state.system, "generate", fails)
    with pytest.raises(InputError):
        write_samples(state, tmp_path, torch.device("cpu"))
    assert all(torch.equal(before[n], t) for n, t in state.system.state_dict().items()) and state.system.training


def test_sheets_show_the_averaged_weights_and_are_the_same_each_time(tmp_path):
    state = state_of()
    write_samples(state, tmp_path / "a", torch.device("cpu"))
    write_samples(state, tmp_path / "b", torch.device("cpu"))
    first = sheet(tmp_path / "a", 0).read_bytes()
    assert first == sheet(tmp_path / "b", 0).read_bytes()
    state.ema.average["net.4.bias"] += 1
    write_samples(state, tmp_path / "c", torch.device("cpu"))
    assert first != sheet(tmp_path / "c", 0).read_bytes()
    assert read_record(sheet(tmp_path / "a", 0))["seeds"] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("args", [{"samples": 0}, {"samples": 1}, {"samples": 3, "ema": 0.0}])
def test_any_number_of_samples(tmp_path, args):
    torch.manual_seed(0)
    state = new_state("toy", toys.ToyConfig().build(), TrainArgs(**args))
    write_samples(state, tmp_path, torch.device("cpu"))
    assert sheet(tmp_path, 0).exists() == bool(args["samples"])


def test_prompts_are_spread_over_the_classes():
    from nexus.text.conditioner import LabelCondConfig, TextCondConfig
    system = torch.nn.Module()
    assert prompts_of(system, 3) == [None] * 3
    system.conditioner = None
    assert prompts_of(system, 2) == [None] * 2
    system.conditioner = LabelCondConfig(classes=tuple("abcdefgh")).build()
    assert prompts_of(system, 4) == ["a", "c", "e", "g"]
    assert prompts_of(system, 16) == [c for c in "abcdefgh" for _ in range(2)]
    system.conditioner = TextCondConfig(encoder={"dim": 8, "depth": 1}).adapt(("red apple", "pear"), ()).build()
    assert set(prompts_of(system, 3)) <= {"red", "apple", "pear", "style", "red apple"}
