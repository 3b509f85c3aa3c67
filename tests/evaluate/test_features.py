"""Features of pictures: of each alone, kept on disk, and from the right weights."""

import numpy as np
import pytest
import torch

from nexus.checkpoint import tensor_bytes
from nexus.errors import InputError, ModelError, UsageError
from nexus.evaluate.features import CHUNK, cached_features, features, open_extractor, prepared


def pictures(count: int, side: int = 16, channels: int = 3) -> list[np.ndarray]:
    return list(np.random.default_rng(0).integers(0, 256, (count, side, side, channels), dtype=np.uint8))


def test_features_do_not_depend_on_how_many_pictures_there_are(tiny):
    made, seen = pictures(CHUNK + 3), []
    whole = features(tiny, made, lambda done, total: seen.append((done, total)))
    assert whole.shape == (CHUNK + 3, 12) and whole.dtype == torch.float64
    assert seen == [(CHUNK, CHUNK + 3), (CHUNK + 3, CHUNK + 3)]
    for i in (0, CHUNK - 1, CHUNK, CHUNK + 2):
        assert torch.equal(features(tiny, [made[i]])[0], whole[i])
    assert torch.equal(features(tiny, made[::-1]), whole.flip(0))


def test_lite0_features_do_not_depend_on_how_many_pictures_there_are(lite0):
    extractor, made = open_extractor(), pictures(CHUNK + 1)
    whole = features(extractor, made)
    assert whole.shape == (CHUNK + 1, 1280)
    for i in (5, CHUNK):
        assert torch.equal(features(extractor, [made[i]])[0], whole[i])


def test_grey_pictures_are_shown_in_three_equal_channels_and_sizes_are_fitted():
    x = prepared(pictures(1, 20, 1)[0], 8)
    assert x.shape == (3, 8, 8) and torch.equal(x[0], x[2])
    flat = prepared(np.full((20, 20, 3), 51, np.uint8), 8)
    torch.testing.assert_close(flat, torch.full((3, 8, 8), 0.2))
    assert prepared(pictures(1)[0], None).shape == (3, 16, 16)


def test_no_pictures_are_refused(tiny):
    with pytest.raises(InputError):
        features(tiny, [])


def test_features_are_kept_for_the_same_pictures_and_weights_alone(tiny, home):
    made = pictures(4)
    first = cached_features(tiny, made)
    torch.testing.assert_close(first, features(tiny, made))
    other = tiny._replace(embed=lambda x: x.new_ones(len(x), 12))
    assert torch.equal(cached_features(other, made), first)                         # read, not computed
    assert cached_features(other._replace(digest="1" * 64), made).mean() == 1       # other weights
    assert cached_features(other, made[:3]).mean() == 1                             # other pictures
    for file in (home / "cache" / "evaluate").iterdir():
        file.write_bytes(b"damaged")
    assert cached_features(other, made).mean() == 1


def test_a_cache_that_cannot_be_written_costs_no_result(tiny, home):
    home.write_text("a file where the folder should be")
    assert cached_features(tiny, pictures(2)).shape == (2, 12)


def test_unknown_extractors_and_foreign_weights_are_refused(lite0, tmp_path):
    with pytest.raises(UsageError):
        open_extractor("clip")
    with pytest.raises(ModelError):
        open_extractor(str(tmp_path / "missing.safetensors"))
    (tmp_path / "other.safetensors").write_bytes(tensor_bytes({"weight": torch.zeros(2)}))
    with pytest.raises(ModelError, match="EfficientNet"):
        open_extractor(str(tmp_path / "other.safetensors"))
