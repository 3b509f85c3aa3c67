import math

import pytest
import torch

from nexus.errors import NexusError
from nexus.process import ode


@pytest.mark.parametrize(("method", "order"), [("euler", 1), ("heun", 2), ("midpoint", 2), ("heun3", 3), ("rk4", 4)])
def test_fixed_step_orders(method, order):
    def error(n):
        w = torch.linspace(0, 1, n + 1, dtype=torch.float64)
        y = ode.integrate(lambda y, t: y * y * (t - 0.3), torch.ones(1, 1, dtype=torch.float64), w, method)
        return abs(y.item() - 1 / (1 - 0.5 + 0.3))          # y' = y^2 (t - 0.3)
    assert math.log2(error(32) / error(64)) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("tableau", [*ode.METHODS.values(), ode.DOPRI5])
def test_rows_sum_to_their_nodes(tableau):
    assert sum(tableau.weights) == pytest.approx(1)
    for node, row in zip(tableau.nodes, tableau.rows, strict=True):
        assert sum(row) == pytest.approx(node)


@pytest.mark.parametrize("end", [2.0, -2.0])
def test_dopri5_meets_its_tolerance_in_both_directions(end):
    y = torch.tensor([[1.0], [-2.0]], dtype=torch.float64)
    for tolerance in (1e-4, 1e-8):
        got = ode.dopri5(lambda y, w: -y * w[:, None], y, 0.0, end, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(got, y * math.exp(-2), rtol=0, atol=20 * tolerance)


def test_dopri5_gives_up():
    with pytest.raises(NexusError, match="did not arrive"):
        ode.dopri5(lambda y, w: -1e4 * y, torch.ones(1, 1), 0.0, 1.0, rtol=1e-6, atol=1e-6, limit=10)
