"""InstaFlow, a Stable Diffusion folder with a rectified flow for a network, against its published loop in diffusers.

No registry carries its pipeline, so the loop is written here as the paper and its code (gnobitab/InstaFlow) have it:
N steps of Euler from noise, the network told 1000 (1 - i / N), its velocity added as it is.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nexus import checkpoint
from nexus.convert.convert import convert
from nexus.requests import SampleRequest

pytest.importorskip("diffusers")
sys.path.insert(0, str(Path(__file__).parent))
import pipelines  # noqa: E402

PROMPT, NEGATIVE = "a red ball, photo of the cat", "blue house"


@pytest.fixture
def pipe(tmp_path, monkeypatch):
    """The pipeline as it is saved: Stable Diffusion's parts under the class that the published folders name."""
    monkeypatch.setenv("NEXUS_HOME", str(tmp_path / "home"))
    torch.set_num_threads(1)
    made = pipelines.sd()
    made.save_pretrained(tmp_path / "theirs")
    index = tmp_path / "theirs" / "model_index.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"_class_name": "RectifiedFlowPipeline"}))
    return made


@torch.no_grad()
def published(pipe, noise, steps, guidance):
    yes, no = pipe.encode_prompt([PROMPT] * len(noise), torch.device("cpu"), 1, True, [NEGATIVE] * len(noise))
    x = noise
    for i in range(steps):
        t = torch.full((len(x),), 1000 * (1 - i / steps))
        v = pipe.unet(x, t, encoder_hidden_states=yes).sample
        if guidance > 1:
            without = pipe.unet(x, t, encoder_hidden_states=no).sample
            v = without + guidance * (v - without)
        x = x + v / steps
    return pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample / 2 + 0.5


@pytest.mark.parametrize("steps, guidance", [(1, 1.0), (4, 1.5)], ids=["distilled", "2-rectified"])
def test_pictures(pipe, tmp_path, steps, guidance):
    report = convert(tmp_path / "theirs", tmp_path / "ours")
    assert report.system == "rectified-flow" and any("steps=25" in note for note in report.notes)
    system = checkpoint.load(str(tmp_path / "ours"), device="cpu")
    assert (system.config.steps, system.config.guidance) == (1, 1.0)
    noise = torch.randn(2, 4, pipelines.SIDE, pipelines.SIDE, generator=torch.Generator().manual_seed(3))
    save_file({"noise": noise}, tmp_path / "noise.safetensors")
    request = SampleRequest(prompt=PROMPT, steps=steps, initial_noise=str(tmp_path / "noise.safetensors"),
                            **({"guidance": guidance, "negative_prompt": NEGATIVE} if guidance > 1 else {}))
    made = system.generate(request, seeds=[0, 1]).data / 2 + 0.5
    wanted = published(pipe, noise, steps, guidance).clamp(0, 1)
    assert wanted.std() > 0.05
    assert (made - wanted).abs().max() <= 1e-4


def test_the_folder_comes_back(pipe, tmp_path):
    convert(tmp_path / "theirs", tmp_path / "ours")
    convert(tmp_path / "ours", tmp_path / "back", to="diffusers")
    for part in ("unet", "vae", "text_encoder"):
        before, after = ({key: value for file in (tmp_path / way / part).glob("*.safetensors")
                          for key, value in load_file(file).items()} for way in ("theirs", "back"))
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    index = json.loads((tmp_path / "back" / "model_index.json").read_text())
    assert index["_class_name"] == "RectifiedFlowPipeline"
