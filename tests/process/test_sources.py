"""A user's picture and mask meet a model's shape without being stretched, by the same rule everywhere."""

import numpy as np
import pytest
import torch

from nexus.images import fitted, write_image
from nexus.models.cv.vae.vae import read_picture
from nexus.models.diffusion.base_diffusion import DDPMConfig
from nexus.process.sources import read_known
from nexus.requests import SampleRequest

CONFIG = DDPMConfig.preset("tiny")
CPU = torch.device("cpu")


def known(shape=(3, 16, 16), **request):
    return read_known(SampleRequest(**request), shape, CONFIG, CPU)


@pytest.fixture
def file(tmp_path):
    """file(array) -> the name of a new picture file with these pixels."""
    names = iter("abcdef")
    return lambda array: str(write_image(tmp_path / f"{next(names)}.png", array))


def noise(high, wide, channels=3):
    return np.random.default_rng(0).integers(0, 256, (high, wide, channels), dtype=np.uint8)


@pytest.mark.parametrize("high, wide, rows, cols", [(16, 48, slice(0, 16), slice(16, 32)),
                                                    (40, 16, slice(12, 28), slice(0, 16))])
def test_a_long_picture_gives_its_middle_square(file, high, wide, rows, cols):
    array = noise(high, wide)
    picture = known(image=file(array)).picture[0].permute(1, 2, 0)
    assert torch.equal(((picture + 1) * 127.5).round(), torch.from_numpy(array[rows, cols]).float())


def test_a_wide_run_takes_the_middle_rows_of_a_square(file):
    array = noise(32, 32)
    picture = known((3, 16, 32), image=file(array)).picture[0].permute(1, 2, 0)
    assert torch.equal(((picture + 1) * 127.5).round(), torch.from_numpy(array[8:24]).float())


def test_a_circle_stays_a_circle(file):
    """Of a disc in a picture of 3:1, width and height after fitting agree, wherever the resampling rounds."""
    y, x = np.mgrid[:96, :288]
    disc = ((y - 47.5) ** 2 + (x - 143.5) ** 2 < 30**2)[:, :, None].repeat(3, 2) * np.uint8(255)
    white = known(image=file(disc)).picture[0, 0] > 0
    assert white.any(0).sum() == white.any(1).sum() == 10


def test_the_mask_is_cut_as_its_picture_is(file):
    mask = np.zeros((16, 48, 1), np.uint8)
    mask[4:9, 18:27] = 255
    found = known(image=file(noise(16, 48)), mask=file(mask))
    assert torch.equal(found.mask[0, 0], torch.from_numpy(mask[:, 16:32, 0] > 127))


def test_half_a_pixel_of_mask_is_averaged_and_not_overshot(file):
    array = np.zeros((32, 32, 1), np.uint8)
    array[:, 16:] = 200
    assert set(np.unique(fitted(array, 16, 16, mask=True))) == {0, 200}


@pytest.mark.parametrize("high, wide", [(16, 48), (40, 16), (7, 9), (1, 50), (33, 33)])
def test_a_codec_sees_the_same_pixels_as_a_diffusion_model(file, high, wide):
    path = file(noise(high, wide))
    assert torch.equal(known(image=path).picture, read_picture(path, 16, 3))


def test_no_picture_is_nothing_known():
    assert known() is None
