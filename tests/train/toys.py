"""Two small real systems, one phase and two, that use everything a resume could get wrong: dropout, noise, buffers."""

import hashlib
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from nexus import catalog
from nexus.config import Config
from nexus.media import Media
from nexus.phase import Phase
from nexus.rng import ItemNoise

PIXELS = 3 * 8 * 8


class ToyConfig(Config):
    """A denoiser of 8 x 8 pictures; `noise` and `dropout` 0 make its loss a plain mean over the batch."""

    presets = {"tiny": {}}
    default_preset = "tiny"
    recipes = {"tiny": {"steps": 12, "batch_size": 6, "save_every": 4, "log_every": 1, "samples": 4, "keep": 3,
                        "lr": 1e-2}}
    image_size: int = 8
    image_channels: int = 3
    hidden: int = 16
    noise: float = 0.5
    dropout: float = 0.1

    def adapt(self, facts) -> "ToyConfig":
        return self

    def build(self) -> "Toy":
        return Toy(self)


class Toy(nn.Module):
    """Linear, batch norm, dropout, linear; one parameter has no part in the loss."""

    def __init__(self, config: ToyConfig):
        super().__init__()
        self.config, self.external = config, {}
        norm = nn.BatchNorm1d(config.hidden) if config.noise else nn.Identity()
        self.net = nn.Sequential(nn.Linear(PIXELS, config.hidden), norm, nn.SiLU(), nn.Dropout(config.dropout),
                                 nn.Linear(config.hidden, PIXELS))
        self.net.unused = nn.Parameter(torch.ones(3))

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("denoise", self.net, self.loss),)

    def loss(self, batch: dict, rng: torch.Generator, step: int) -> dict[str, Tensor]:
        x = batch["image"].flatten(1)
        noise = torch.randn(x.shape, generator=rng).to(x)
        loss = (self.net(x + self.config.noise * noise).float() - x).square().mean()
        return {"loss": loss, "root": loss.detach().sqrt()}

    @torch.inference_mode()
    def generate(self, request, *, seeds, watch=None) -> Media:
        noise = ItemNoise(seeds).draw((PIXELS,)).to(next(self.parameters()))
        return Media("image", torch.cat([self.net(n[None]) for n in noise]).view(-1, 3, 8, 8).clamp(-1, 1))


class ToyGANConfig(ToyConfig):
    """Two phases: a critic that is trained `repeat` times a step, then the generator."""

    repeat: int = 5

    def build(self) -> "ToyGAN":
        return ToyGAN(self)


class ToyGAN(nn.Module):
    """A hinge GAN on 8 x 8 pictures."""

    def __init__(self, config: ToyGANConfig):
        super().__init__()
        self.config, self.external = config, {}
        self.net = nn.Sequential(nn.Linear(4, config.hidden), nn.SiLU(), nn.Linear(config.hidden, PIXELS), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(PIXELS, config.hidden), nn.SiLU(), nn.Dropout(config.dropout),
                                    nn.Linear(config.hidden, 1))

    def phases(self) -> tuple[Phase, ...]:
        return (Phase("critic", self.critic, self.critic_loss, self.config.repeat),
                Phase("net", self.net, self.net_loss))

    def _fake(self, n: int, rng: torch.Generator) -> Tensor:
        return self.net(torch.randn(n, 4, generator=rng))

    def critic_loss(self, batch: dict, rng: torch.Generator, step: int) -> Tensor:
        real = batch["image"].flatten(1)
        fake = self._fake(len(real), rng).detach()
        return (1 - self.critic(real)).relu().mean() + (1 + self.critic(fake)).relu().mean()

    def net_loss(self, batch: dict, rng: torch.Generator, step: int) -> Tensor:
        return -self.critic(self._fake(len(batch["image"]), rng)).mean()

    @torch.inference_mode()
    def generate(self, request, *, seeds, watch=None) -> Media:
        return Media("image", self.net(ItemNoise(seeds).draw((4,))).view(-1, 3, 8, 8))


ENTRIES = {"toy": catalog.Entry("toys:ToyConfig", "image", "a toy", ""),
           "toy-gan": catalog.Entry("toys:ToyGANConfig", "image", "a toy with two phases", "")}


def contents(run: Path) -> dict[str, str]:
    """sha256 of all that a run must reproduce: its newest checkpoint, its metrics, its sheets of samples."""
    newest = max(p for p in run.glob("step-*") if p.is_dir() and p.name[5:].isdigit())
    files = [p for p in newest.rglob("*") if p.is_file()] + [run / "metrics.jsonl", *run.glob("samples/*")]
    return {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def train_alone(begun, system: str, data: str, run: str, options: dict, environment: dict) -> None:
    """What a child process does: say that it begins, then train."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    catalog.CATALOG.update(ENTRIES)
    from nexus.train.start import train
    begun.set()
    train(system, data=data, run=Path(run), device="cpu", **options)
