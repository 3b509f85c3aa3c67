import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nexus.errors import UsageError
from nexus.process.paths import AffinePath, DiscretePath, RectifiedPath, VEPath
from nexus.process.predictions import (
    PREDICTIONS,
    Estimate,
    clipped,
    denoiser,
    estimator,
    masked,
    noised,
    over,
    target,
    thresholded,
    x0_of,
)

PATHS = [DiscretePath(), RectifiedPath(), VEPath(),
         *(AffinePath(scheduler=s) for s in ("condot", "vp", "linear-vp", "cosine", "polynomial"))]


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(PATHS), st.sampled_from(sorted(PREDICTIONS)), st.floats(0.05, 0.95), st.integers(0, 99))
def test_the_right_answer_implies_x0(path, prediction, share, seed):
    rng = torch.Generator().manual_seed(seed)
    x0, eps = torch.randn(2, 3, 2, 4, 4, generator=rng, dtype=torch.float64)
    noise, data = path.ends()
    t = torch.tensor([share, 0.9 * share, 0.5], dtype=torch.float64) * (noise - data) + data
    out = target(path, prediction, x0, eps, t)
    torch.testing.assert_close(x0_of(path, prediction, out, noised(path, x0, eps, t), t), x0, rtol=0, atol=1e-8)


def test_flow_of_the_rectified_path_is_noise_minus_data():
    x0, eps = torch.randn(2, 3, 5)
    t = torch.rand(3)
    torch.testing.assert_close(target(RectifiedPath(), "flow", x0, eps, t), eps - x0)
    torch.testing.assert_close(target(AffinePath(), "flow", x0, eps, t), x0 - eps)       # the paper's clock


def test_denoiser_tells_the_network_its_time_and_dtype():
    seen = []

    def net(x, t, cond, prepared):
        seen.append((x.dtype, t, cond, prepared))
        return torch.zeros_like(x)

    x = torch.randn(2, 3, 4, 4)
    denoise = denoiser(net, RectifiedPath(), "flow", {"label": 1}, "ready", dtype=torch.bfloat16)
    x0 = denoise(x, torch.tensor(0.25, dtype=torch.float64))
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, x)                       # velocity 0: x is x0
    dtype, t, cond, prepared = seen[0]
    assert dtype == torch.bfloat16
    assert t.dtype == torch.float32
    assert t.tolist() == [250.0, 250.0]
    assert (cond, prepared) == ({"label": 1}, "ready")
    denoise(x, torch.tensor([0.25, 0.5]))
    assert seen[1][1].tolist() == [250.0, 500.0]
    assert seen[1][3] is None                               # prepared is for one time shared by the batch


def test_variance_half_is_split_off():
    def net(x, t, cond, prepared):
        return torch.cat([x * 0, x * 0 + 0.5], dim=1)

    x, t = torch.randn(2, 3, 4, 4), torch.tensor(10.0)
    result = estimator(net, DiscretePath(), "eps", learned_variance=True)(x, t)
    assert isinstance(result, Estimate)
    torch.testing.assert_close(result.fraction, torch.full_like(x, 0.75))
    torch.testing.assert_close(denoiser(net, DiscretePath(), "eps", learned_variance=True)(x, t), result.x0)


def test_eps_at_pure_noise_is_refused():
    x = torch.randn(2, 3)
    with pytest.raises(UsageError, match="pure noise"):
        x0_of(RectifiedPath(), "eps", x, x, torch.tensor(1.0))
    assert x0_of(RectifiedPath(), "v", x, x, torch.tensor(1.0)).isfinite().all()


def test_wrappers_change_x0_alone():
    x = torch.tensor([[-3.0, 0.5, 2.0, 1.0]])
    estimate = Estimate(x, torch.full_like(x, 0.3))
    result = clipped(lambda x, t: estimate)(x, None)
    assert result.x0.tolist() == [[-1, 0.5, 1, 1]]
    assert torch.equal(result.fraction, estimate.fraction)
    mask = torch.tensor([[True, False, True, False]])
    assert masked(lambda x, t: x, mask, torch.zeros(4))(x, None).tolist() == [[-3, 0, 2, 0]]


def test_dynamic_threshold_scales_by_the_items_own_quantile():
    x = torch.stack([torch.linspace(-4, 4, 101), torch.linspace(-0.5, 0.5, 101)])
    y = thresholded(lambda x, t: x, 1.0)(x, None)
    torch.testing.assert_close(y[0], x[0] / 4)
    torch.testing.assert_close(y[1], x[1])                  # never stretched
    assert thresholded(lambda x, t: x, 0.9)(x, None).abs().max() <= 1


def test_over():
    assert over(torch.ones(2), torch.ones(2, 3, 4, 4)).shape == (2, 1, 1, 1)
    assert over(torch.tensor(1.0), torch.ones(2, 3)).shape == ()
