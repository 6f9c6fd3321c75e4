"""The search for ground states against the classical tables, exact codes and certified floors."""

from __future__ import annotations

import math

import pytest
import torch

from groundstate.errors import UsageError
from groundstate.norms.sphere.floor import floor
from groundstate.norms.sphere.references import ground_state
from groundstate.norms.sphere.thomson import _energy_and_grad, thomson


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        (2, (-0.693147181, 0.5, 0.25)),
        (3, (-1.647918433, 1.732050808, 1.0)),
        (7, (-8.182477864, 14.452977414, 10.25)),
        (11, (-18.420479721, 40.596450508, 31.834721637)),
        (12, (-21.606145230, 49.165253058, 39.0)),
        (16, (-36.106152162, 92.911655303, 78.772649031)),
        (20, (-54.011129975, 150.881568334, 133.936978568)),
    ],
)
def test_classical_table(n: int, expected: tuple[float, ...]) -> None:
    for s, total in enumerate(expected):
        found = thomson(n, 3, s, restarts=60 if n == 20 else 20, generator=seeded(n))
        # The table has 9 digits after the point.
        assert found.total == pytest.approx(total, abs=1e-8)
        assert found.mean == pytest.approx(found.total / (n * (n - 1) / 2), rel=1e-15)
        assert found.gradient_norm < 1e-5
        assert found.points.shape == (n, 3)
        assert found.points.dtype == torch.float64
        torch.testing.assert_close(found.points.norm(dim=1), torch.ones(n, dtype=torch.float64), rtol=0, atol=1e-15)
        # Never below the certified floor; rounding of the total aside.
        assert floor(n, 3, s).value <= found.mean + 1e-13


@pytest.mark.parametrize(
    ("n", "d", "s"), [(5, 2, 3.0), (9, 8, 2.0), (10, 5, 0.0), (16, 5, 1.0), (27, 6, 2.0), (5, 3, 10)]
)
def test_exact_ground_states_are_found(n: int, d: int, s: float) -> None:
    found = thomson(n, d, s, restarts=20, generator=seeded(0))
    # The tolerance on the gradient, squared over the curvature, is far below 1e-10.
    assert found.mean == pytest.approx(ground_state(n, d, s), rel=1e-10)


@pytest.mark.parametrize("s", [0.0, 1.0, 2.0, 3.7])
def test_gradient(s: float) -> None:
    u = torch.nn.functional.normalize(torch.randn(7, 4, generator=seeded(1), dtype=torch.float64), dim=1)
    w = u.clone().requires_grad_()
    r = torch.pdist(torch.nn.functional.normalize(w, dim=1))
    total = (-r.log() if s == 0 else r**-s).sum()
    (expected,) = torch.autograd.grad(total, w)
    value, grad = _energy_and_grad(u.numpy(), s)
    assert value == pytest.approx(float(total.detach()), rel=1e-13)
    torch.testing.assert_close(torch.from_numpy(grad), expected, rtol=1e-11, atol=1e-11)


def test_same_generator_same_points() -> None:
    a, b = (thomson(9, restarts=3, generator=seeded(4)) for _ in range(2))
    assert torch.equal(a.points, b.points)
    assert thomson(9, restarts=3, generator=seeded(5)).total == pytest.approx(a.total, rel=1e-9)


def test_global_generator_is_left_alone() -> None:
    before = torch.random.get_rng_state()
    thomson(3, restarts=1, generator=seeded(0))
    assert torch.equal(torch.random.get_rng_state(), before)


def test_bad_input() -> None:
    for n, d, s in ((1, 3, 1.0), (4, 1, 1.0), (4.0, 3, 1.0), (4, 3, -1.0), (4, 3, math.nan)):
        with pytest.raises(UsageError):
            thomson(n, d, s, generator=seeded(0))  # pyright: ignore[reportArgumentType]
    with pytest.raises(UsageError, match="restarts"):
        thomson(4, restarts=0, generator=seeded(0))
    with pytest.raises(UsageError, match="tolerance"):
        thomson(4, tolerance=0.0, generator=seeded(0))
    with pytest.raises(UsageError, match="digits"):
        thomson(60, 2, 500.0, restarts=1, generator=seeded(0))
