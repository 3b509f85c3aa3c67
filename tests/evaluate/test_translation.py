"""Translators against counterparts: known answers on known translations; the digit reader on real digits."""

import pytest
import torch
from torch import nn

from nexus.data.images import DIGITS, open_images
from nexus.errors import InputError, ModelError, UsageError
from nexus.evaluate import classify
from nexus.evaluate.translation import grey, measured, pairs
from nexus.models.gan.cycle_gan import CycleGANConfig


class Known(nn.Module):
    """Answers the pictures of one kind with their counterparts of a list [(a, b), ...]; without one, as they are."""

    directions = ("ab", "ba")

    def __init__(self, answers=None):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.config = CycleGANConfig.preset("emoji")
        self.answers = answers

    def translate(self, x, direction):
        if self.answers is None:
            return x
        return next(both["ab".index(direction[1])] for both in self.answers
                    if torch.equal(both["ab".index(direction[0])], x))


def of(system, **more):
    settings = {"split": "pair", "count": 10, "seed": 0, "batch_size": 5, "watch": lambda done, total: None}
    return measured(system, "emoji:flat|twemoji", **(settings | more))


def test_an_untouched_picture_is_measured_as_itself():
    numbers, facts = of(Known())
    assert facts["pairs"] == 10 and facts["split"] == "pair"
    for way in ("ab", "ba"):
        assert numbers[f"ssim, {way}"] == numbers[f"ssim, {way}, untouched"]
        assert 0 < numbers[f"ssim, {way}"]["value"] < 1
        assert numbers[f"cycle l1, {way}"]["value"] == 0
    assert numbers["ssim, ab"]["value"] == pytest.approx(numbers["ssim, ba"]["value"])


def test_a_perfect_translation_scores_one():
    from nexus.evaluate.judge import order
    a, b, known = pairs("emoji:flat|twemoji", "pair", size=64, channels=3)
    chosen = [known[i] for i in order(len(known), 10, 0)]
    assert all(a.captions[i] == b.captions[j] for i, j in chosen)
    batches = [tuple(zip(*chosen[s:s + 5], strict=True)) for s in (0, 5)]
    answers = [(a.batch(list(rows))["image"], b.batch(list(others))["image"]) for rows, others in batches]
    numbers, _ = of(Known(answers))
    assert numbers["ssim, ab"]["value"] == pytest.approx(1.0) and numbers["psnr (dB), ba"]["value"] == 100.0
    assert numbers["cycle l1, ba"]["value"] == 0


def test_coming_back_is_measured_in_units_of_the_networks_range():
    class Lighter(Known):
        def translate(self, x, direction):
            return x + 0.25
    numbers, _ = of(Lighter())
    assert numbers["cycle l1, ab"]["value"] == pytest.approx(0.5, abs=1e-6)


def test_the_grey_baseline_is_the_luma_of_the_given_picture():
    x = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1).expand(1, 3, 12, 12)
    assert torch.allclose(grey(x), torch.full((1, 3, 12, 12), 0.299 - 0.587))
    assert torch.allclose(grey(grey(x)), grey(x)) and torch.equal(grey(x[:, :1]), x[:, :1])
    numbers, _ = of(Known())
    assert numbers["ssim, ab, grey"]["value"] != numbers["ssim, ab, untouched"]["value"]


def test_data_must_be_two_kinds_with_counterparts(tmp_path):
    with pytest.raises(UsageError, match="two"):
        pairs("emoji", "pair")
    with pytest.raises(InputError, match="counterpart"):
        pairs("emoji:flat|mnist", "pair", size=28, channels=3)


# --- the digit reader ------------------------------------------------------------------------------------------------

needs_reader = pytest.mark.skipif(not classify.WEIGHTS.exists(), reason="python scripts/train_digits.py was not run")


@needs_reader
@pytest.mark.parametrize("size, channels", [(28, 1), (32, 1), (64, 3)])
def test_the_reader_reads_real_digits(size, channels):
    test = open_images("mnist", split="pair", size=size, channels=channels)
    count = len(test) if size == 28 else 500
    found = classify.read(classify.open_reader(), [test.get(i) for i in range(count)])
    right = (found == torch.from_numpy(test.labels[:count])).double().mean().item()
    assert right >= (0.99 if size == 28 else 0.98)


@needs_reader
def test_hits_are_of_digits_alone():
    test = open_images("mnist", split="pair")
    pictures = [test.get(i) for i in range(50)]
    assert classify.digit_hits(DIGITS, pictures, test.labels[:50]).mean() > 0.95
    assert classify.digit_hits(DIGITS, pictures, (test.labels[:50] + 1) % 10).mean() < 0.05
    assert classify.digit_hits(("cat",), pictures, [0] * 50) is None


def test_a_damaged_reader_is_told(tmp_path):
    from nexus.checkpoint import tensor_bytes
    (tmp_path / "digits.safetensors").write_bytes(tensor_bytes({"x": torch.zeros(2)}))
    with pytest.raises(ModelError, match="digit reader"):
        classify.open_reader(tmp_path / "digits.safetensors")
