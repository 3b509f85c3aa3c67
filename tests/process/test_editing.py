"""Pictures as a start: SDEdit on flows against the exact map, painting around a picture, variations of one."""

import numpy as np
import pytest
import torch

from nexus.errors import InputError, UsageError
from nexus.images import read_image, write_image
from nexus.process.outpaint import Frame, asked, framed, sized
from nexus.requests import SampleRequest, margins
from nexus.rng import ItemNoise
from tests.exact import gaussian_flow
from tests.process.test_diffusion import made, system

MEAN, STD = 0.2, 0.3


class Exact(torch.nn.Module):
    """The velocity of data N(MEAN, STD^2) on the straight line x = (1 - t) x0 + t eps, which a perfect network has.

    `flow` counts time as Lipman et al. do, towards the data, and so points its velocity there.
    """

    def __init__(self, net, path):
        super().__init__()
        self.config, self.path, self.seen = net.config, path, []
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x, t, cond=None, prepared=None, **more):
        s = (t / self.path.time_scale).view(-1, 1, 1, 1)
        s = 1 - s if self.path.kind == "affine" else s
        a = 1 - s
        x0 = MEAN + a * STD**2 / (a * a * STD**2 + s * s) * (x - a * MEAN)
        self.seen.append(x)
        return (x0 - x) / s if self.path.kind == "affine" else (x - x0) / s


@pytest.fixture
def picture(tmp_path):
    """picture(high, wide) -> a file and its pixels [3, H, W] in [-1, 1]."""
    def make(high=16, wide=16, name="in.png"):
        array = np.random.default_rng(0).integers(0, 256, (high, wide, 3), dtype=np.uint8)
        return str(write_image(tmp_path / name, array)), torch.from_numpy(array).permute(2, 0, 1) / 127.5 - 1
    return make


@pytest.mark.parametrize("name", ["flow", "mmdit"])
@pytest.mark.parametrize("strength", [0.25, 0.6, 0.9])
def test_an_edit_starts_at_the_lines_point_and_follows_the_exact_flow(name, strength, picture):
    built = system(name, codec=None, size=16) if name == "flow" else system(name)
    path = built.config.path
    built.net = Exact(built.net, path)
    image = picture()[0]
    points = path.times(400, schedule="native", shape=built.config.latent_shape)
    first = points[len(points) - int(len(points) * strength)].item()
    ends = []
    built.decode = lambda z: ends.append(z) or torch.zeros(len(z), 3, 16, 16)
    built.encode, latent = encoded(built)
    noise = ItemNoise([0, 1]).draw(built.config.latent_shape)
    made(built, seeds=(0, 1), image=image, strength=strength, steps=400, sampler="heun", guidance=1.0)
    start = (1 - first) * latent + first * noise
    torch.testing.assert_close(built.net.seen[0], start.float(), atol=1e-5, rtol=0)
    want = gaussian_flow(start, MEAN, STD, (1 - first, first), (1.0, 0.0))
    torch.testing.assert_close(ends[-1], want.float(), atol=2e-3, rtol=0)


def encoded(built):
    """An encoder that gives the same latent for every picture, and that latent."""
    latent = torch.randn(1, *built.config.latent_shape, generator=torch.Generator().manual_seed(5)) * STD + MEAN
    return lambda x: latent, latent


@pytest.mark.parametrize("name", ["flow", "mmdit", "dit"])
def test_variations_differ_by_seed_and_stay_near_the_picture(name, picture):
    built, (image, pixels) = system(name), picture()
    near = made(built, seeds=range(4), image=image, strength=0.4, prompt="cat")
    assert len({v.numpy().tobytes() for v in near}) == 4
    again = made(built, seeds=(2,), image=image, strength=0.4, prompt="cat")
    assert (again[0] - near[2]).abs().max() <= 2 / 255
    whole = built.decode(built.encode(pixels[None]))
    far = made(built, seeds=range(4), image=image, strength=1.0, prompt="cat")
    assert (near - whole).abs().mean() < (far - whole).abs().mean()


# --- painting around ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, frame", [("8,0,4,2", (8, 0, 4, 2)), ("50%,25%,0,0", (12, 4, 0, 0)), ("8", (8,) * 4),
                                         ("12.5%", (3, 2, 3, 2))])
def test_margins_are_pixels_or_percent_of_the_side(text, frame):
    assert asked(text, 24, 16) == Frame(*frame)
    assert SampleRequest(outpaint=text).outpaint == ",".join(margins(text))


@pytest.mark.parametrize("text", ["", "1,2", "1,2,3", "0,0,0,0", "-8,0,0,0", "8px", "1e3", "0%", "8,,0,0", "999999"])
def test_what_are_no_margins_is_refused(text):
    with pytest.raises(InputError):
        SampleRequest.parse({"outpaint": text})
    assert SampleRequest.parse({"outpaint": [8, 0, "5%", 0]}).outpaint == "8,0,5%,0"


def test_the_border_is_the_edge_carried_outwards_and_white_in_the_mask():
    array = np.random.default_rng(0).integers(0, 256, (10, 12, 3), dtype=np.uint8)
    wide, mask = framed("3,0,1,2", (array, None), 16, 12)
    assert wide.shape == (12, 16, 3) and np.array_equal(wide[:10, 3:15], array)
    assert (wide[:10, :3] == array[:, :1]).all() and (wide[10:, 3:15] == array[-1]).all()
    assert (mask[:10, 3:15] == 0).all() and mask.sum() == 255 * (12 * 16 - 120)
    inner = np.full((10, 12, 1), 255, np.uint8)
    assert (framed("4,0,0,0", (array, inner), 16, 10)[1] == 255).all()


def test_what_the_model_needs_more_goes_to_the_wider_side(picture):
    request = sized(SampleRequest(image=picture(16, 16)[0], outpaint="5,0,2,0"), 8)
    assert (request.width, request.height) == (24, 16)
    wide, mask = framed("5,0,2,0", (read_image(request.image), None), 24, 16)
    assert (mask[0, :, 0] == 0).nonzero()[0].tolist() == list(range(6, 22))


KINDS = [("ddpm", "tiny", None), ("dit", "tiny", "cat"), ("flow", "tiny", "cat"), ("mmdit", "tiny", "cat"),
         ("conditional", "inpaint-tiny", "cat"), ("consistency", "tiny", None)]


@pytest.mark.parametrize("name, preset, prompt", KINDS)
def test_the_users_pixels_stay_as_they_are(name, preset, prompt, picture):
    image, pixels = picture()
    out = made(system(name, preset), seeds=(0, 1), image=image, outpaint="4,0,25%,4", prompt=prompt)
    assert out.shape == (2, *out.shape[1:2], 20, 24)
    assert torch.equal(out[:, :, :16, 4:20], pixels.expand(2, -1, -1, -1))
    assert not torch.equal(out[0, :, :, :4], out[1, :, :, :4])


def test_the_mask_of_the_picture_counts_too(picture, tmp_path):
    image, pixels = picture()
    mask = np.zeros((16, 16, 1), np.uint8)
    mask[2:6, 2:6] = 255
    path = str(write_image(tmp_path / "mask.png", mask))
    out = made(system("ddpm"), image=image, mask=path, outpaint="8,0,0,0")[0, :, :, 8:]
    hole = torch.from_numpy(mask[:, :, 0] > 0)
    assert torch.equal(out[:, ~hole], pixels[:, ~hole]) and not torch.equal(out[:, hole], pixels[:, hole])


@pytest.mark.parametrize("more, match", [({"width": 32}, "--width"), ({"image": None}, "--image")])
def test_what_does_not_go_with_it(more, match, picture):
    with pytest.raises(UsageError, match=match):
        made(system("ddpm"), **{"image": picture()[0], "outpaint": "8", **more})


def test_a_side_that_stays_must_fit(picture):
    with pytest.raises(UsageError, match="height 15"):
        made(system("ddpm"), image=picture(15, 16, "low.png")[0], outpaint="8,0,8,0")
    with pytest.raises(UsageError, match="enlarges"):
        made(system("conditional", "upscale-tiny"), image=picture()[0], outpaint="8")
