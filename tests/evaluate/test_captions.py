"""The probe of captions: least squares, pictures that can be told apart, pictures that cannot."""

import pytest
import torch

from nexus.errors import InputError
from nexus.evaluate.captions import embed_texts, fit, ranks, ridge, shuffled_hits, style_hits
from nexus.evaluate.sets import beside_real, read_by

CAPTIONS, STYLES, FEATURES, TEXT = 9, 2, 24, 16


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def features(labels, style_ids, seed: int, noise: float = 0.05) -> torch.Tensor:
    """A caption's text through a fixed matrix, a direction for the style, and noise."""
    shown = random(CAPTIONS, TEXT)[labels] @ random(TEXT, FEATURES, seed=1)
    return shown + 3 * random(STYLES, FEATURES, seed=2)[style_ids] + noise * random(len(labels), FEATURES, seed=seed)


def everything(copies: int):
    labels = torch.arange(CAPTIONS).repeat(STYLES * copies)
    return labels, torch.arange(STYLES).repeat_interleave(CAPTIONS).repeat(copies)


@pytest.fixture
def probe():
    labels, style_ids = everything(5)
    return fit(features(labels, style_ids, 10), labels, style_ids, random(CAPTIONS, TEXT))


def test_ridge_is_least_squares_without_a_penalty_and_the_mean_with_an_endless_one():
    x, y = random(40, 5), random(40, 3, seed=1)
    padded = torch.cat([x, torch.ones(40, 1)], 1)
    want = padded @ torch.linalg.lstsq(padded, y).solution
    torch.testing.assert_close(ridge(x, y, 0.0)(x), want)
    torch.testing.assert_close(ridge(x, y, 1e12)(x), y.mean(0).expand(40, 3))


def test_ridge_means_the_same_at_any_scale_and_for_twice_the_pictures():
    x, y = random(20, 5), random(20, 3, seed=1)
    want = ridge(x, y, 0.1)(x)
    torch.testing.assert_close(ridge(100 * x + 7, y, 0.1)(100 * x + 7), want)
    torch.testing.assert_close(ridge(x.repeat(2, 1), y.repeat(2, 1), 0.1)(x), want)


def test_ridge_takes_features_that_never_change():
    assert ridge(torch.ones(4, 3), random(4, 2))(torch.ones(1, 3)).isfinite().all()


def test_new_pictures_of_separable_captions_and_styles_are_all_read(probe):
    labels, style_ids = everything(2)
    x = features(labels, style_ids, 11)
    assert ranks(probe, x, labels).tolist() == [0] * len(labels)
    assert style_hits(probe, x, style_ids).mean() == 1
    assert style_hits(probe, x, 1 - style_ids).mean() == 0


def test_pictures_of_nothing_are_read_by_chance(probe):
    labels, style_ids = everything(60)
    found = read_by(probe, random(len(labels), FEATURES, seed=12), labels, style_ids, 0)
    shuffled = "caption top-5, captions shuffled"
    assert set(found) == {"caption top-1", "caption top-5", shuffled, "style", "caption top-5 and style"}
    for name, chance in (("caption top-1", 1 / CAPTIONS), ("caption top-5", 5 / CAPTIONS), (shuffled, 5 / CAPTIONS),
                         ("style", 1 / STYLES)):
        assert found[name]["value"] == pytest.approx(chance, abs=0.06)


def test_shuffled_captions_are_every_other_pictures(probe):
    labels = torch.tensor([0, 0, 3, 7, 8, 8, 8])
    x = features(labels, torch.zeros_like(labels), 13, noise=0.7)
    want = [torch.stack([(ranks(probe, x[i:i + 1], other[None]) < 2).double()[0] for other in labels
                         if other != labels[i]]).mean() for i in range(len(labels))]
    torch.testing.assert_close(shuffled_hits(probe, x, labels, 2), torch.stack(want))
    assert shuffled_hits(probe, x, labels, CAPTIONS).eq(1).all()
    assert shuffled_hits(probe, x[:2], labels[:2], 2) is None


def test_captions_that_read_alike_count_against_the_picture():
    labels, style_ids = torch.tensor([0, 1, 2, 2]), torch.zeros(4, dtype=torch.int64)
    texts = torch.eye(3)[[0, 0, 1]]
    probe = fit(torch.eye(3)[[0, 1, 2, 2]], labels, style_ids, texts)
    assert ranks(probe, torch.eye(3)[[0, 2]], torch.tensor([0, 2])).tolist() == [1, 0]
    assert "style" not in read_by(probe, torch.eye(3), torch.arange(3), style_ids[:3], 0)


def test_shares_of_real_are_left_out_where_real_has_none():
    one = {"value": 0.2, "low": 0.1, "high": 0.3}
    found = beside_real({"a": one, "b": one}, {"a": {**one, "value": 0.4}, "b": {**one, "value": 0.0}})
    assert found["a, share of real"] == 0.5 and "b, share of real" not in found and found["real b"]["value"] == 0


def test_a_probe_needs_a_label_for_every_picture():
    with pytest.raises(InputError):
        fit(random(4, 3), torch.zeros(3, dtype=torch.int64), torch.zeros(4, dtype=torch.int64), random(2, 2))


def test_texts_of_like_meaning_lie_near(minilm):
    texts = embed_texts(["fast car", "automobile", "red apple"])
    assert texts.shape == (3, 384)
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(3).double())
    near = texts @ texts.T
    assert near[0, 1] > 0.7 > 0.4 > near[0, 2]
    assert torch.equal(embed_texts(["fast car", "automobile", "red apple"]), texts.float().double())     # kept
