"""A codec's decoder trained alone, on latents that are a little wrong."""

import pytest
import torch

from nexus import checkpoint
from nexus.errors import InputError, UsageError
from nexus.models.cv.vae.vae import VAEConfig
from nexus.rng import generator
from nexus.train.start import train
from tests.drawn import drawn


def built(**changes):
    torch.manual_seed(0)
    return VAEConfig.preset("tiny-decoder").model_copy(update=changes).build()


def pictures(system, n=3):
    side = system.config.image_size
    return torch.rand(n, 3, side, side, generator=generator(1)) * 2 - 1


def test_the_encoder_learns_nothing_and_the_decoder_does():
    system = built()
    phase, critic = system.phases()
    assert phase.module is system.net.decoder and critic.module is system.critic
    phase.loss({"image": pictures(system)}, generator(0), 5)["loss"].backward()
    learns = {name.split(".")[0] for name, p in system.net.named_parameters() if p.grad is not None and p.grad.any()}
    assert learns == {"decoder"}


def test_noise_is_drawn_up_to_its_most_and_differs_between_pictures():
    system = built(latent_noise=0.5)
    seen = []
    system.net.decode_raw = lambda z: seen.append(z) or z.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :3]
    x = pictures(system, 400)
    _, mean, logvar = system.rebuild(x, generator(3))
    system.config = system.config.model_copy(update={"latent_noise": 0.0})
    system.rebuild(x, generator(3))
    spread = (seen[0] - seen[1]).flatten(1).std(1)
    assert spread.max() < 0.6 and spread.min() < 0.05
    assert spread.mean() == pytest.approx(0.25, abs=0.03)           # uniform in [0, 0.5]
    system.rebuild(x, None)
    assert torch.equal(seen[2], mean)                               # what is judged is judged without noise


def test_it_has_to_begin_with_a_trained_codec(tmp_path):
    data = drawn(tmp_path / "data", ["x"], count=4, side=16)
    flags = {"steps": 1, "batch_size": 2, "samples": 0}
    with pytest.raises(UsageError, match="go on with a trained model") as caught:
        train("vae", data=str(data), run=tmp_path / "run", preset="tiny-decoder", flags=flags, device="cpu")
    assert "--init" in caught.value.hint
    train("vae", data=str(data), run=tmp_path / "codec", preset="tiny-codec", flags=flags, device="cpu")
    train("vae", data=str(data), run=tmp_path / "run", preset="tiny-decoder", flags=flags, device="cpu",
          init=str(tmp_path / "codec"))
    before, after = (checkpoint.load(str(tmp_path / name), device="cpu").net.state_dict() for name in ("codec", "run"))
    changed = {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}
    assert changed == {"decoder"}


def test_only_a_codec_has_a_decoder_of_its_own():
    with pytest.raises(InputError, match="decoder_only"):
        VAEConfig.parse({"net": {"kind": "conv", "size": 16, "widths": (8, 8)}, "decoder_only": True})
