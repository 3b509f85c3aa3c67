"""EnCodec as a system: it learns, its phases keep to themselves, a run goes on bit for bit, what it makes."""

import math
import os
import signal
from pathlib import Path

import pytest
import torch

from nexus import checkpoint
from nexus.errors import InputError, StoppedError, UsageError
from nexus.models.audio.encodec import Encodec, EncodecSystemConfig
from nexus.nn.stft_critic import StftCriticConfig
from nexus.requests import SampleRequest
from nexus.train.args import TrainArgs
from nexus.train.engine import Hooks, fit
from nexus.train.state import new_state, restore

pytestmark = pytest.mark.usefixtures("one_thread")
ARGS = {"steps": 6, "batch_size": 4, "save_every": 2, "log_every": 1, "lr": 3e-3, "ema": 0.9}


def tones(size, rng, samples=400, rate=1600):
    """Sums of two tones of random pitch: audio [B, 1, T] in [-1, 1]."""
    hertz = 50 + 350 * torch.rand(size, 2, 1, generator=rng)
    phase = 2 * math.pi * torch.rand(size, 2, 1, generator=rng)
    return 0.4 * torch.sin(2 * math.pi * hertz / rate * torch.arange(samples) + phase).sum(1, keepdim=True)


def batch_at(position, size, rng):
    return {"audio": tones(size, rng), "index": torch.arange(size)}


def built(seed=0, **changes) -> Encodec:
    torch.manual_seed(seed)
    return EncodecSystemConfig.parse(EncodecSystemConfig.presets["tiny"] | changes).build()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def trained(run: Path, *, stop_after=None, **changes):
    """A run's state after it went as far as it does; a run that is there is gone on with."""
    args = TrainArgs.parse(ARGS | changes)
    state = new_state("encodec", built(), args)
    newest = sorted(run.glob("step-*"))
    if newest:
        restore(state, run, int(newest[-1].name[5:]))
    run.mkdir(exist_ok=True)

    def progress(row):
        if row["step"] == stop_after:
            os.kill(os.getpid(), signal.SIGTERM)
    try:
        fit(state, run, Hooks(batch_at, progress), facts={})
    except StoppedError:
        pass
    return state


@pytest.mark.parametrize("changes", [{}, {"accumulate": 2}, {"precision": "bfloat16"}, {"optimizer": "muon"}],
                         ids=["plain", "parts", "bfloat16", "muon"])
def test_a_stopped_run_goes_on_bit_for_bit(changes, tmp_path):
    whole = trained(tmp_path / "whole", **changes)
    trained(tmp_path / "run", stop_after=3, **changes)
    again = trained(tmp_path / "run", **changes)
    assert whole.step == again.step == 6
    for file in ("model.safetensors", "ema.safetensors", "manifest.json"):
        assert (tmp_path / "whole/step-0000006" / file).read_bytes() == \
            (tmp_path / "run/step-0000006" / file).read_bytes()


def test_codebooks_and_the_balance_are_saved_and_only_the_codec_is_released(tmp_path):
    trained(tmp_path / "run")
    stored, released = (checkpoint.read_tensors(tmp_path / f"run/step-0000006/{name}.safetensors")
                        for name in ("model", "ema"))
    assert stored["net.quantizer.books.0.cluster_size"].sum() > 0 and stored["balancer.seen"].min() > 0
    assert all(name.startswith("net.") for name in released)
    loaded = checkpoint.load(str(tmp_path / "run/step-0000006"), device="cpu")
    assert loaded.critic is None and torch.equal(loaded.net.state_dict()["encoder.first.gain"],
                                                 released["net.encoder.first.gain"])


def test_it_learns_to_rebuild_tones():
    system = built(critic=None, wave=1.0)
    optimizer = torch.optim.Adam(system.net.parameters(), lr=1e-2)
    seen = []
    for step in range(80):
        out = system.loss({"audio": tones(8, rng(step))}, rng(step), step)
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
        seen.append(out["si_sdr"].item())
    assert sum(seen[-10:]) / 10 > sum(seen[:10]) / 10 + 8 and out["used"] > 0.6


def test_a_decoder_learns_alone_and_every_id_stays():
    """Others have learnt to write these ids; a decoder of a codec that knows some tones gets better at them."""
    torch.manual_seed(0)
    system = built(critic=None, decoder_only=True)
    x = tones(16, rng(1))
    system.net.quantizer(system.net.latents(x), None, rng(2))       # k-means begins the codebooks
    begun = {n: t.clone() for n, t in system.net.state_dict().items()}
    ids, first = system.net.codes(x), float(system.loss({"audio": x}, rng(), 0)["mel"])
    phase, = system.phases()
    optimizer = torch.optim.Adam(phase.module.parameters(), 3e-3)
    for step in range(60):
        optimizer.zero_grad()
        loss = system.loss({"audio": tones(16, rng(step))}, rng(step), step)
        loss["loss"].backward()
        optimizer.step()
    assert torch.equal(system.net.codes(x), ids)
    for name, value in system.net.state_dict().items():
        assert name.startswith("decoder.") or torch.equal(value, begun[name]), name
    assert not torch.equal(begun["decoder.last.conv.weight"], system.net.decoder.last.conv.weight)
    assert float(system.loss({"audio": x}, rng(), 0)["mel"]) < 0.8 * first


def test_the_codec_deceives_and_the_critics_judge_by_turns():
    system = built()
    batch = batch_at(0, 4, rng())
    out = system.loss(batch, rng(), 0)
    out["loss"].backward()
    assert {"wave", "mel", "adversarial", "features", "commitment", "si_sdr", "used"} <= out.keys()
    assert all(p.grad is not None for p in system.net.parameters())
    assert all(p.grad is None and p.requires_grad for p in system.critic.parameters())
    system.net.zero_grad(set_to_none=True)
    before = {name: tensor.clone() for name, tensor in system.net.state_dict().items()}
    system.critic_loss(batch, rng(), 0)["loss"].backward()
    assert all(p.grad is not None for p in system.critic.parameters())
    assert all(p.grad is None for p in system.net.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in system.net.state_dict().items())


def test_critics_wait_and_begin_a_little_earlier():
    critic = EncodecSystemConfig.presets["tiny"]["critic"] | {"start": 10, "lead": 3}
    system, batch = built(critic=critic), batch_at(0, 2, rng())
    assert "adversarial" not in system.loss(batch, rng(), 9) and "adversarial" in system.loss(batch, rng(), 10)
    assert system.critic_loss(batch, rng(), 6)["loss"] == 0 and system.critic_loss(batch, rng(), 7)["loss"] > 0


def test_a_batch_is_coded_with_one_of_the_choices():
    system = built(net=EncodecSystemConfig.presets["tiny"]["net"] | {"quantizers": 4, "choices": (1, 4)})
    batch = batch_at(0, 2, rng())
    drawn = [system._count(rng(seed), batch["audio"]) for seed in range(20)]
    assert set(drawn) == {1, 4}
    system.loss(batch, rng(drawn.index(1)), 0)
    begun = [bool(book.cluster_size.any()) for book in system.net.quantizer.books]
    assert begun == [True, False, False, False]


def test_the_gradient_at_the_sound_is_the_balance_of_the_losses():
    """The commitment aside, whatever the losses' own scales."""
    system = built(commitment=0.0, decay=0.0)
    seen, net = [], system.net

    class Watched(torch.nn.Module):
        quantizer = net.quantizer

        def forward(self, *given, **more):
            found = net(*given, **more)
            found.audio.register_hook(seen.append)
            return found
    del system.net
    system.net = Watched()
    system.loss(batch_at(0, 4, rng()), rng(), 0)["loss"].backward()
    assert 0 < seen[-1].flatten(1).norm(dim=1).mean() <= 1 + 1e-3


def test_critics_see_every_resolution_and_both_channels():
    config = StftCriticConfig(windows=(128, 64), width=4)
    critics, x = config.build(2), torch.randn(3, 2, 1000)
    scores, hidden = critics(x)
    assert [s.shape[:3] for s in scores] == [(3, 1, 1000 // 32 + 1), (3, 1, 1000 // 16 + 1)]
    assert len(hidden) == 2 * 5 and hidden[0].shape[3] == 65 and hidden[3].shape[3] == 9
    assert not torch.equal(scores[0], critics(x.flip(1))[0][0])
    assert torch.allclose(critics(x[:1])[0][0], scores[0][:1], atol=1e-5)


def test_what_it_makes_is_as_long_as_asked_and_depends_on_its_seed_alone():
    system = built().eval()
    made = system.generate(SampleRequest(duration=0.5), seeds=[3, 4])
    assert made.kind == "audio" and made.data.shape == (2, 1, 800) and made.rate == 1600
    assert made.data.abs().max() <= 1 and not torch.equal(made.data[0], made.data[1])
    alone = system.generate(SampleRequest(duration=0.5), seeds=[4])
    torch.testing.assert_close(alone.data[0], made.data[1], atol=1e-5, rtol=1e-4)
    with pytest.raises(UsageError, match="--prompt"):
        system.generate(SampleRequest(prompt="piano"), seeds=[1])


def test_rows_that_training_never_met_are_not_drawn():
    system = built().eval()
    system.net.quantizer.books[0].cluster_size[3] = 1.0
    assert system._drawn(0, 50)[0].unique().tolist() == [3] and system._drawn(0, 50)[1].unique().numel() > 5


@pytest.mark.parametrize("changes", [{"seconds": 0.01}, {"wave": 0.0, "mel": 0.0}, {"exponents": ()}])
def test_what_does_not_fit_is_refused(changes):
    with pytest.raises(InputError):
        EncodecSystemConfig.parse(EncodecSystemConfig.presets["tiny"] | changes)
