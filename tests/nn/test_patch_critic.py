"""PatchGAN: published sizes, the patch that one score sees, and what its norms do."""

import pytest
import torch

from nexus.nn.patch_critic import PatchCritic


def count(critic):
    return sum(p.numel() for p in critic.parameters())


def test_published_sizes():
    with torch.device("meta"):
        assert count(PatchCritic()) == 2_764_737                            # CycleGAN's 70x70, systems.md
        assert count(PatchCritic(norm="batch")) == 2_764_737 - (128 + 256 + 512) + 2 * (128 + 256 + 512)


@pytest.mark.parametrize("layers, patch", [(1, 16), (2, 34), (3, 70)])
def test_a_score_sees_a_patch_of_the_published_side(layers, patch):
    torch.manual_seed(0)
    critic = PatchCritic(1, 4, layers, norm="none")
    x = torch.randn(1, 1, 128, 128).requires_grad_()
    scores = critic(x)
    middle = scores.shape[-1] // 2
    scores[0, 0, middle, middle].backward()
    rows = x.grad[0, 0].abs().sum(1).nonzero().flatten()
    assert rows.max() - rows.min() + 1 == patch


def test_the_score_is_the_last_layer_of_the_last_feature_map():
    torch.manual_seed(1)
    critic, x = PatchCritic(3, 8, 2), torch.randn(2, 3, 32, 32)
    maps = critic.features(x)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 16), (16, 8, 8), (32, 7, 7)]
    assert torch.equal(critic.last(maps[-1]), critic(x)) and critic(x).shape == (2, 1, 6, 6)


def test_instance_norm_keeps_pictures_apart_and_batch_norm_does_not():
    torch.manual_seed(2)
    x, other = torch.randn(2, 1, 3, 32, 32)
    for norm, apart in (("instance", True), ("none", True), ("batch", False)):
        critic = PatchCritic(3, 8, 2, norm=norm)
        assert torch.allclose(critic(x), critic(torch.cat([x, other]))[:1], atol=1e-5) == apart, norm
