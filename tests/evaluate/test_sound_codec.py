"""Codecs of sound against known distortions, known codes and known bitrates."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from nexus.codecs.encodec import Encoded
from nexus.evaluate.sound_codec import is_codec, log_mel_distance, measured, usage
from nexus.losses.spectral import si_sdr
from nexus.models.audio.encodec import EncodecSystemConfig
from nexus.models.audio.musicgen import MusicGenConfig

RATE = 1600


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Known(nn.Module):
    """A codec of 2 codebooks of 16, whose ids are frame numbers and whose sound is what `change` makes of it."""

    def __init__(self, change):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.config, self.change, self.net, self.given = EncodecSystemConfig.preset("tiny"), change, self, None

    def encode(self, x):
        self.given = x
        frames = torch.arange(x.shape[-1] // self.config.net.hop)
        return [Encoded(torch.stack([frames % 16, frames % 4])[None], None)]

    def decode(self, parts, length):
        return self.change(self.given)[..., :length]


def clips(count=3, seconds=2.0):
    return [0.1 * noise(1, round(seconds * RATE), seed=i).float().numpy() for i in range(count)]


def test_the_ratio_of_a_scaled_copy_is_as_high_as_it_is_counted():
    found = measured(Known(lambda x: 0.5 * x), clips(), seed=0)
    assert found["si-sdr (dB)"] == {"value": 100.0, "low": 100.0, "high": 100.0}
    assert found["log-mel distance (dB)"]["value"] == pytest.approx(20 * math.log10(2), rel=1e-4)
    same = measured(Known(lambda x: x), clips(), seed=0)
    assert same["log-mel distance (dB)"]["value"] == 0


@pytest.mark.parametrize("decibels", [20.0, 5.0, 0.0, -10.0])
def test_the_ratio_of_a_known_noise_is_its_level(decibels):
    x = noise(1, 4000)
    x = x - x.mean()
    n = noise(1, 4000, seed=1)
    n = n - n.mean()
    n = n - (n * x).sum() / x.square().sum() * x                        # what is left cannot be told from a scale
    n = n * (x.norm() / n.norm()) * 10 ** (-decibels / 20)
    assert float(si_sdr(3 * (x + n), x)) == pytest.approx(decibels, abs=1e-3)


def test_usage_and_perplexity_of_known_codes():
    shares, perplexity = usage(torch.tensor([[5, 5, 5, 5], [9, 0, 0, 0], [3, 3, 0, 0]]))
    assert shares.tolist() == [1.0, 0.25, 0.5]
    assert perplexity.tolist() == pytest.approx([4.0, 1.0, 2.0])


def test_codebooks_and_bitrate_of_a_known_codec():
    found = measured(Known(lambda x: x), clips(seconds=0.8), seed=0)    # 160 frames, 8 samples each
    assert (found["codebook 1, entries used"], found["codebook 2, entries used"]) == (1.0, 0.25)
    assert found["codebook 1, perplexity"] == pytest.approx(16) and found["codebook 2, perplexity"] == pytest.approx(4)
    assert found["bitrate (kbit/s)"] == pytest.approx(2 * 4 * RATE / 8 / 1000)


def test_the_mel_distance_grows_with_the_distortion_and_takes_a_click():
    x = torch.from_numpy(clips(1)[0])
    values = [log_mel_distance(x + level * noise(*x.shape, seed=9).float(), x, RATE) for level in (0.001, 0.01, 0.1)]
    assert 0 < values[0] < values[1] < values[2]
    assert math.isfinite(log_mel_distance(x[:, :7], 0 * x[:, :7], RATE))


def test_what_is_a_codec_and_its_whole_way():
    codec, music = EncodecSystemConfig.preset("tiny").build().eval(), MusicGenConfig.preset("tiny").build()
    assert is_codec(codec) and not is_codec(music)
    seen, made = [], []
    found = measured(codec, clips(seconds=0.3), seed=0, watch=seen.append, made=made.append)
    assert seen == [1, 2, 3] and all(x.shape == (1, 480) and np.abs(x).max() <= 1 for x in made)
    assert found["si-sdr (dB)"]["low"] <= found["si-sdr (dB)"]["value"] <= found["si-sdr (dB)"]["high"]
