"""The Python interface: what is decoded for a preview, bars on request, one attempt more after a full memory."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import nexus
from nexus import api, checkpoint
from nexus.errors import DeviceError, UsageError, is_full
from nexus.images import read_image
from nexus.models.cv.vae.vae import VAEConfig
from nexus.models.diffusion.base_diffusion import DDPMConfig
from nexus.process.diffusion import Diffusion
from nexus.requests import SampleRequest
from nexus_cli.main import main
from tests.drawn import drawn

ROOT = Path(__file__).parent.parent
TRAINED = {"preset": "tiny", "flags": {"steps": 2, "batch_size": 4, "samples": 0}, "device": "cpu"}


@pytest.fixture(scope="module")
def ddpm():
    torch.manual_seed(0)
    return DDPMConfig.preset("tiny").build().eval()


@pytest.fixture
def decoded(monkeypatch):
    """The batch sizes of all calls of `decode`, which still does its work."""
    calls, decode = [], Diffusion.decode

    def counted(self, z):
        calls.append(len(z))
        return decode(self, z)
    monkeypatch.setattr(Diffusion, "decode", counted)
    return calls


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return drawn(tmp_path_factory.mktemp("pictures"), [""], count=4, side=16)


# Previews

@pytest.mark.parametrize("steps, every, due", [(10, 5, 2), (10, 4, 3), (3, 1, 3), (3, 100, 1)])
def test_what_is_in_the_making_is_decoded_only_when_a_preview_is_due(ddpm, decoded, steps, every, due):
    seen, request = [], SampleRequest(steps=steps)
    items = list(api.sample(ddpm, request, seeds=[1, 2, 3], batch_size=2, preview=seen.append, preview_every=every))
    assert [len(media.data) for media in seen] == 3 * [1] * due         # on the CPU, one picture at a time
    assert decoded == 3 * ([1] * due + [1])                             # and once more each, to be the pictures
    assert np.array_equal(api.to_uint8(seen[-1].data)[0], items[-1].image)


def test_without_a_preview_nothing_is_decoded_but_the_result(ddpm, decoded):
    list(api.sample(ddpm, SampleRequest(steps=5), seeds=[1]))
    assert decoded == [1]


def test_the_command_passes_its_preview_every_on(ddpm, decoded, tmp_path, monkeypatch):
    checkpoint.save_model(tmp_path / "m", "ddpm", ddpm.config.to_json(), ddpm.state_dict())
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        main(["sample", "ddpm", "-m", str(tmp_path / "m"), "-s", "1", "-o", "a.png", "--steps", "12", "--device", "cpu",
              "--preview", "p.png", "--preview-every", "5"])
    assert end.value.code == 0 and len(decoded) == 3 + 1                # steps 5, 10 and the last, then the picture
    assert np.array_equal(read_image("p.png"), read_image("a.png"))


# Bars

def test_a_bar_is_shown_only_when_it_is_asked_for(pictures, tmp_path, capfd, ddpm):
    nexus.train("vae", data=str(pictures), run=tmp_path / "quiet", **TRAINED)
    list(nexus.sample(ddpm, SampleRequest(steps=3), seeds=[1]))
    nexus.evaluate(str(tmp_path / "quiet"), data=str(pictures), device="cpu")
    assert capfd.readouterr() == ("", "")
    nexus.train("vae", data=str(pictures), run=tmp_path / "shown", progress=True, **TRAINED)
    shown = capfd.readouterr()
    assert "2/2" in shown.err and "step" in shown.err and shown.out == ""
    list(nexus.sample(ddpm, SampleRequest(steps=3), seeds=[1, 2], progress=True))
    assert "6/6" in capfd.readouterr().err
    nexus.evaluate(str(tmp_path / "shown"), data=str(pictures), device="cpu", progress=True)
    shown = capfd.readouterr()
    assert "4/4" in shown.err and "picture" in shown.err and shown.out == ""


def test_a_callback_sees_what_it_saw_before(pictures, tmp_path, ddpm):
    rows, steps = [], []
    nexus.train("vae", data=str(pictures), run=tmp_path / "run", progress=rows.append, **TRAINED)
    assert rows[-1]["step"] == 2 and all(isinstance(row, dict) for row in rows)
    list(nexus.sample(ddpm, SampleRequest(steps=2), seeds=[1], progress=lambda *at: steps.append(at)))
    assert steps == [(1, 2), (2, 2)]


# Memory

class Full(torch.nn.Module):
    """A system that has room for two pictures at once, and says nothing about it."""

    def __init__(self, room):
        super().__init__()
        self.vae, self.room = VAEConfig.preset("tiny").build(), room

    def check(self, request):
        self.vae.check(request)

    def generate(self, request, *, seeds, watch=None):
        if len(seeds) > self.room:
            torch.empty(1 << 60, dtype=torch.uint8)                     # the allocator's own words
        return self.vae.generate(request, seeds=seeds)


def test_a_batch_that_is_too_large_is_halved_and_one_picture_that_is_is_an_error():
    assert [item.seed for item in api.sample(Full(2), SampleRequest(), seeds=[3, 4, 5, 6, 7])] == [3, 4, 5, 6, 7]
    with pytest.raises(DeviceError, match="out of memory"):
        list(api.sample(Full(0), SampleRequest(), seeds=[3, 4]))
    assert is_full(MemoryError()) and is_full(torch.OutOfMemoryError("CUDA out of memory."))
    assert not is_full(RuntimeError("size mismatch"))


@pytest.mark.parametrize("given, said", [
    ({"negative_prompt": "cat"}, "--negative-prompt has no meaning without --prompt"),
    ({"control_scale": 0.5}, "--control-scale has no meaning without --control"),
    ({"guidance": 3.0}, "unconditional"), ({"guidance_rescale": 0.5}, "unconditional"),
    ({"image_noise": 0.1}, "--image-noise has no meaning")])
def test_a_setting_that_would_be_ignored_is_refused(ddpm, given, said):
    with pytest.raises(UsageError, match=said):
        list(api.sample(ddpm, SampleRequest(**given), seeds=[0]))


# Names

@pytest.mark.parametrize("first", ["", "import nexus.train.start as s, nexus.evaluate.run as r; assert s.train",
                                   "from nexus.train.args import TrainArgs; import nexus.evaluate.sets"])
def test_train_and_evaluate_can_be_called_whatever_was_imported_before(first):
    """`nexus.train` is a package and a function; the import of the one must not hide the other."""
    code = ("import nexus\n" + first + "\nfor verb in (nexus.train, nexus.evaluate) * 2:\n"
            "    try: verb('nothing/at/all', data='none', **({'run': 'r'} if 'train' in verb.__name__ else {}))\n"
            "    except nexus.errors.NexusError as error: print(error.code)\n"
            "import nexus.models.cv.vae.vae; print(len(nexus.models()) > 5)")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0 and done.stdout.split() == ["2", "4", "2", "4", "True"], done.stdout + done.stderr
