"""Codes, their truncation and their walks; pictures of any size through a translator."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from nexus.errors import UsageError
from nexus.process.latents import codes, slerp, truncated
from nexus.process.translation import check_translation, read_source, translated
from nexus.requests import SampleRequest
from nexus.rng import ItemNoise


def test_codes_are_the_seeds_and_a_walk_joins_two_of_them():
    plain = codes(SampleRequest(), [3, 4], 16)
    assert torch.equal(plain, ItemNoise([3, 4]).draw((16,)))
    walk = codes(SampleRequest(interpolate=5), [3], 16)
    assert walk.shape == (1, 5, 16)
    assert torch.allclose(walk[0, 0], plain[0], atol=1e-5) and torch.allclose(walk[0, -1], plain[1], atol=1e-5)


def test_a_walk_keeps_to_the_sphere_at_even_angles():
    a, b = torch.nn.functional.normalize(torch.randn(2, 1, 64, generator=torch.Generator().manual_seed(0)), dim=2)
    steps = torch.cat([slerp(a, b, k / 8) for k in range(9)])
    assert torch.allclose(steps.norm(dim=1), torch.ones(9), atol=1e-5)
    angles = torch.cosine_similarity(steps[1:], steps[:-1]).arccos()
    assert torch.allclose(angles, angles[:1].expand(8), atol=1e-4)
    assert torch.allclose(slerp(a, a, 0.5), a, atol=1e-3)


@pytest.mark.parametrize("limit", [0.5, 1.0, 2.0])
def test_truncated_codes_follow_the_truncated_normal_law(limit):
    z = torch.randn(100_000, generator=torch.Generator().manual_seed(1))
    cut = truncated(z, limit)
    assert cut.abs().max() <= limit
    density, mass = math.exp(-limit**2 / 2) / math.sqrt(2 * math.pi), math.erf(limit / math.sqrt(2))
    assert cut.var().item() == pytest.approx(1 - 2 * limit * density / mass, rel=0.02)
    order = z.argsort()
    assert (cut[order].diff() >= 0).all()
    assert truncated(z, None) is z and torch.allclose(truncated(z, 10.0), z, atol=1e-3)


def test_codes_can_be_given_but_not_walked_from(tmp_path):
    noise = torch.randn(2, 16)
    save_file({"noise": noise}, tmp_path / "z.safetensors")
    given = SampleRequest(initial_noise=str(tmp_path / "z.safetensors"))
    assert torch.equal(codes(given, [0, 1], 16), noise)
    with pytest.raises(UsageError, match="interpolate"):
        codes(given.model_copy(update={"interpolate": 4}), [0, 1], 16)


@pytest.mark.parametrize("sides", [(16, 16), (17, 31), (5, 3), (100, 40), (130, 257)])
def test_what_changes_pixels_alone_is_not_disturbed_by_padding_or_tiles(sides):
    x = torch.rand(2, 3, *sides, generator=torch.Generator().manual_seed(2))
    asked = []

    def translate(part):
        asked.append(tuple(part.shape[2:]))
        return 1 - part
    for large in (32, 64, 1024):
        made = translated(translate, x, 8, large=large, overlap=8)
        assert made.shape == x.shape and torch.allclose(made, 1 - x, atol=1e-6)
    assert all(h % 8 == 0 and w % 8 == 0 and h >= 16 and w >= 16 for h, w in asked)


def test_tiles_blend_without_seams():
    def translate(part):                                # each tile is a constant of its own
        count[0] += 1
        return torch.full_like(part, float(count[0]))
    count = [0]
    made = translated(translate, torch.zeros(1, 1, 32, 120), 4, large=48, overlap=16)
    assert count[0] == 4 and made.min() >= 1 and made.max() <= 4
    assert made[0, 0, 0].diff().abs().max() < 0.2


def test_a_source_keeps_its_size_or_takes_the_asked_one(tmp_path):
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(tmp_path / "a.png")
    name = str(tmp_path / "a.png")
    assert read_source(SampleRequest(image=name), 3).shape == (1, 3, 20, 40)
    assert read_source(SampleRequest(image=name, width=20), 1).shape == (1, 1, 10, 20)
    assert read_source(SampleRequest(image=name, width=16, height=16), 3).shape == (1, 3, 16, 16)
    with pytest.raises(UsageError, match="picture"):
        check_translation(SampleRequest(), ("ab",))
