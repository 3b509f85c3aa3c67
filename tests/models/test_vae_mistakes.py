"""A codec's decoder that learns to mend what a generator of latents gets wrong, seen through frozen features."""

import pytest
import torch
from safetensors.torch import save_file

from nexus import checkpoint
from nexus.codecs.kl_image import KLConfig
from nexus.errors import InputError, ModelError
from nexus.losses.perceptual import perceptual_distance
from nexus.models.cv.vae.mistakes import Mistakes, MistakesConfig
from nexus.models.cv.vae.vae import VAEConfig
from nexus.nn.efficientnet import EfficientNet
from nexus.rng import generator
from nexus.train.start import train
from tests.drawn import drawn

FLAGS = {"steps": 1, "batch_size": 4, "samples": 0}


def pictures(n=3, side=16):
    return torch.rand(n, 3, side, side, generator=generator(1)) * 2 - 1


def labelled(x):
    return {"image": x, "label": torch.arange(len(x)) % 2, "style": torch.zeros(len(x), dtype=torch.long)}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A data set, two codecs, a generator of the first one's latents, and a file of random features."""
    home = tmp_path_factory.mktemp("mistakes")
    data = str(drawn(home / "data", ["x", "y"], count=4, side=16))
    for seed in (0, 1):
        train("vae", data=data, run=home / f"codec{seed}", preset="tiny-codec", flags=FLAGS | {"seed": seed},
              device="cpu", overrides=["net.scale=0.5", "net.shift=0.1"])
    codec = {"net": KLConfig.presets["tiny"], "weights": str(home / "codec0")}
    train("dit", data=data, run=home / "dit", preset="tiny", flags=FLAGS, device="cpu", config={"config": {
        "codec": codec}})
    torch.manual_seed(0)
    save_file(EfficientNet((1,) * 7).state_dict(), home / "features.safetensors")
    return home, data


def mended(made, run, *, init="codec0", **config):
    home, data = made
    config = {"mistakes": {"generator": str(home / "dit"), "share": 0.5}} | config
    return train("vae", data=data, run=run, preset="tiny-decoder", flags=FLAGS, device="cpu", init=str(home / init),
                 config={"config": config})


def test_a_run_of_no_steps_makes_no_mistakes_and_a_longer_one_more(made):
    home, _ = made
    system, codec = (checkpoint.load(str(home / name), device="cpu") for name in ("dit", "codec0"))
    x, far = pictures(), []
    with torch.no_grad():
        mean, _ = codec.net.encode(x)
    for strength in (0.01, 0.2, 0.9):
        config = MistakesConfig(generator="dit", least=strength, most=strength)
        z = Mistakes(config, system, (4, 8, 8))(labelled(x), mean, codec.net.encoder, generator(2))
        far.append((z - mean).square().mean())
    assert far[0] < 1e-10 < far[1] < far[2]


def test_only_the_decoder_learns_and_a_released_codec_has_no_generator(made, tmp_path):
    home, _ = made
    mended(made, tmp_path / "run", features_weight=2.0, features=str(home / "features.safetensors"))
    before, after = (checkpoint.load(str(p), device="cpu") for p in (home / "codec0", tmp_path / "run"))
    old, new = before.net.state_dict(), after.net.state_dict()
    assert {n.split(".")[0] for n in new if not torch.equal(old[n], new[n])} == {"decoder"}
    assert not hasattr(after, "generator")


def test_the_share_that_is_a_generators_and_what_is_judged(made):
    home, _ = made
    x, system = pictures(4), checkpoint.build("vae", VAEConfig.preset("tiny-decoder").model_copy(update={
        "latent_noise": 0.0, "mistakes": MistakesConfig(generator=str(home / "dit"), share=0.5)}).to_json())
    system.net.load_state_dict(checkpoint.load(str(home / "codec0"), device="cpu").net.state_dict())
    seen = []
    system.net.decode_raw = lambda z: seen.append(z) or z.repeat_interleave(2, 2).repeat_interleave(2, 3)[:, :3]
    system.rebuild(x, generator(3), labelled(x))
    system.rebuild(x, generator(3))                                 # without labels no mistakes
    same = [torch.equal(a, b) for a, b in zip(*seen, strict=True)]
    assert same == [False, False, True, True]


def test_another_codecs_generator_is_refused(made, tmp_path):
    with pytest.raises(ModelError, match="latents of another codec") as caught:
        mended(made, tmp_path / "run", init="codec1")
    assert "--init" in caught.value.hint


@pytest.mark.parametrize("generator, said", [("codec1", "no diffusion or flow model"), ("tiny", "makes latents of")])
def test_a_model_of_other_latents_is_refused(made, tmp_path, generator, said):
    home, data = made
    if generator == "tiny":
        codec = {"net": KLConfig.presets["tiny"] | {"latent_channels": 2}}
        train("dit", data=data, run=tmp_path / "tiny", preset="tiny", flags=FLAGS, device="cpu",
              config={"config": {"codec": codec}}, overrides=["net.in_channels=2"])
        home = tmp_path
    with pytest.raises(ModelError, match=said):
        mended(made, tmp_path / "run", mistakes={"generator": str(home / generator)})


def test_missing_features_are_missed_before_a_step(made, tmp_path):
    with pytest.raises(ModelError, match="no file of EfficientNet weights") as caught:
        mended(made, tmp_path / "run", features_weight=1.0, features=str(tmp_path / "none"))
    assert "--to efficientnet" in caught.value.hint


@pytest.mark.parametrize("config, said", [
    ({"mistakes": {"generator": "dit"}}, "decoder_only is needed"),
    ({"decoder_only": True, "mistakes": {"generator": "dit", "least": 0.5, "most": 0.4}}, "least 0.5 is above most"),
])
def test_what_cannot_be_is_refused(config, said):
    with pytest.raises(InputError, match=said):
        VAEConfig.parse(VAEConfig.preset("tiny-codec").to_json() | config)


def test_perceptual_distance():
    x, y = pictures(2, 128).requires_grad_(), pictures(2, 128).flip(0).requires_grad_()

    def pyramid(p):
        return [p, 3 * p[:, :2, ::2, ::2]]          # lengths of features do not count
    far = perceptual_distance(pyramid, x, y)
    angles = [1 - torch.cosine_similarity(a, b, dim=1).mean() for a, b in zip(pyramid(x), pyramid(y), strict=True)]
    assert far.item() == pytest.approx((angles[0] + angles[1]).item(), rel=1e-4)     # |a - b|^2 = 2 - 2 cos
    assert perceptual_distance(pyramid, x, x.detach()) == 0
    far.backward()
    assert x.grad.any() and y.grad is None
    sizes = []
    perceptual_distance(lambda p: sizes.append(p.shape[-1]) or [p], pictures(1, 32), pictures(1, 32))
    assert sizes == [128, 128]
