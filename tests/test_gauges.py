"""Functions of vectors: gradients against autograd, proximal maps and duals against their definitions."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from groundstate.norms import gauges, k_support

Value = Callable[[Tensor], Tensor]
Prox = Callable[[Tensor, float], Tensor]

SMOOTHED = [0.0, 1e-3, 0.5, 20.0]
POWERS = [0.3, 0.5, 2 / 3, 0.9, 1.0, 1.2, 1.5, 2.0, 3.0, 5.0]
SCALES = [1e-4, 0.5, 30.0]


def descending(shape: tuple[int, ...], seed: int) -> Tensor:
    """Random nonnegative vectors in descending order, float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).abs()
    return x.sort(-1, descending=True).values


def separable() -> list[tuple[str, Value, Prox]]:
    cases: list[tuple[str, Value, Prox]] = []
    for e in SMOOTHED:
        cases.append(
            (f"smoothed {e}", partial(gauges.smoothed_l1, e=e), lambda s, t, e=e: gauges.smoothed_l1_prox(s, e, t))
        )
    for p in POWERS:
        cases.append((f"power {p:.2f}", partial(gauges.power, p=p), lambda s, t, p=p: gauges.power_prox(s, p, t)))
    for e in (0.05, 0.5, 5.0):
        cases.append((f"log {e}", partial(gauges.log_sum, e=e), lambda s, t, e=e: gauges.log_sum_prox(s, e, t)))
    return cases


def norms(n: int) -> list[tuple[str, Value, Value, Prox, Callable[[Tensor], Tensor]]]:
    """Name, norm, dual norm, proximal map and linear minimizer of every norm on n entries."""
    cases: list[tuple[str, Value, Value, Prox, Callable[[Tensor], Tensor]]] = []
    for k in {1, 2, 3, max(n - 1, 1), n, n + 5}:
        cases.append((
            f"top {k}",
            partial(gauges.top_k, k=k),
            partial(gauges.top_k_dual, k=min(k, n)),
            lambda s, t, k=k: gauges.top_k_prox(s, k, t),
            lambda s, k=k: gauges.top_k_lmo(s, k, 0.0),
        ))  # fmt: skip
        cases.append((
            f"k-support {k}",
            partial(k_support.value, k=k),
            partial(k_support.dual, k=k),
            lambda s, t, k=k: k_support.prox(s, k, t),
            lambda s, k=k: k_support.lmo(s, k),
        ))  # fmt: skip
    return cases


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("name", "value", "prox"), separable(), ids=lambda x: x if isinstance(x, str) else "")
def test_separable_prox_is_the_least_over_a_grid(name: str, value: Value, prox: Prox, scale: float) -> None:
    s = scale * descending((40,), 1)
    for step in (1e-3, 0.3, 4.0):
        x = prox(s, step)

        def objective(u: Tensor, step: float = step) -> Tensor:
            return step * value(u[..., None]) + (u - s) ** 2 / 2

        grid = torch.linspace(0, 1, 4001, dtype=torch.float64)[:, None] * s
        near = (x + torch.linspace(-1, 1, 101, dtype=torch.float64)[:, None] * 1e-3 * s).clamp_min(0)
        best = torch.minimum(objective(grid).amin(0), objective(near).amin(0))
        # The proximal point is not beaten by any point of a grid; 1e-12 allows for rounding in the objective.
        assert (objective(x) <= best * (1 + 1e-12) + 1e-300).all(), (name, step)
        assert (x >= 0).all()
        assert (x <= s).all()


@pytest.mark.parametrize("n", [4, 7, 30])
def test_prox_of_norms_satisfies_the_optimality_identity(n: int) -> None:
    s = torch.cat([
        descending((20, n), 2),
        torch.ones(1, n, dtype=torch.float64),
        torch.eye(n, dtype=torch.float64)[:1],
        torch.zeros(1, n, dtype=torch.float64),
        descending((5, n), 3) * (torch.arange(n) < n // 2),
        descending((5, n), 4) ** 8,
    ])  # fmt: skip
    for name, value, dual, prox, _ in norms(n):
        for step in (1e-3, 0.1, 1.0, 3.0, 50.0):
            x = prox(s, step)
            z = s - x
            # z = s - x is in step * subdifferential(x) exactly if dual(z) <= step and <z, x> = step * norm(x).
            # Bisection stops at the spacing of float64, felt to 1e-10 of the step; s - x loses 1e-14 of s_1.
            z_sorted, x_sorted = z.sort(-1, descending=True).values, x.sort(-1, descending=True).values
            assert (dual(z_sorted) <= step * (1 + 1e-10) + 1e-14 * s[:, 0]).all(), (name, step)
            error = ((z * x).sum(-1) - step * value(x_sorted)).abs()
            assert (error <= 1e-10 * step * value(s) + 1e-13 * s[:, 0] ** 2).all(), (name, step)
            assert (x >= 0).all()


@pytest.mark.parametrize("n", [1, 2, 5, 12])
def test_linear_minimizers_attain_the_dual_norm(n: int) -> None:
    s = torch.cat([descending((30, n), 5), torch.ones(1, n, dtype=torch.float64)])
    others = descending((200, 1, n), 6)
    for name, value, dual, _, lmo in norms(n):
        u = lmo(s)
        assert torch.allclose((s * u).sum(-1), dual(s), rtol=1e-13, atol=0), name  # sums of n terms
        assert torch.allclose(value(u), torch.ones(len(s), dtype=torch.float64), rtol=1e-13, atol=0), name
        # No vector does better: <s, x> <= norm(x) dual(s).
        assert ((s * others).sum(-1) <= value(others) * dual(s) * (1 + 1e-13)).all(), name
        assert (lmo(torch.zeros(n, dtype=torch.float64)) == 0).all()


@pytest.mark.parametrize("e", [1e-6, 1e-2, 0.5, 100.0])
def test_smoothed_linear_minimizer_is_on_the_boundary_and_best(e: float) -> None:
    s = torch.cat(
        [descending((20, 6), 7), torch.ones(1, 6, dtype=torch.float64), torch.eye(6, dtype=torch.float64)[:1]]
    )
    u = gauges.smoothed_l1_lmo(s, e)
    # The bound is met to the accuracy of the bisection; its slope in log(y) is below 100 in these cases.
    assert torch.allclose(gauges.smoothed_l1(u, e), torch.ones(len(s), dtype=torch.float64), rtol=1e-9, atol=0)
    # Stationarity: s is a multiple of the gradient of the smoothed norm at u.
    gradient = gauges.smoothed_l1_gradient(u, e)
    multiple = (s * gradient).sum(-1, keepdim=True) / gradient.square().sum(-1, keepdim=True)
    assert torch.allclose(s, multiple * gradient, rtol=0, atol=1e-9)


def gradients() -> list[tuple[str, Value, Callable[[Tensor], Tensor]]]:
    cases: list[tuple[str, Value, Callable[[Tensor], Tensor]]] = []
    cases += [
        (f"smoothed {e}", partial(gauges.smoothed_l1, e=e), partial(gauges.smoothed_l1_gradient, e=e)) for e in SMOOTHED
    ]
    cases += [(f"power {p}", partial(gauges.power, p=p), partial(gauges.power_gradient, p=p)) for p in POWERS]
    cases += [(f"log {e}", partial(gauges.log_sum, e=e), partial(gauges.log_sum_gradient, e=e)) for e in (0.1, 2.0)]
    cases += [
        (f"top {k}", partial(gauges.top_k, k=k), partial(gauges.top_k_gradient, k=k, tie=1e-14)) for k in (1, 3, 9)
    ]
    cases += [(f"k-support {k}", partial(k_support.value, k=k), partial(k_support.gradient, k=k)) for k in (1, 2, 5, 9)]
    cases += [("stable rank", gauges.stable_rank, partial(gauges.stable_rank_gradient, tie=1e-14))]
    return cases


@pytest.mark.parametrize(("name", "value", "gradient"), gradients(), ids=lambda x: x if isinstance(x, str) else "")
def test_gradients_equal_autograd_and_vanish_at_zeros(
    name: str, value: Value, gradient: Callable[[Tensor], Tensor]
) -> None:
    s = descending((10, 7), 8).requires_grad_()
    (expected,) = torch.autograd.grad(value(s).sum(), s)
    assert torch.allclose(gradient(s.detach()), expected, rtol=1e-12, atol=1e-12), name  # float64 rounding
    some_zero = descending((4, 7), 9) * (torch.arange(7) < 3)
    assert (gradient(some_zero)[..., 3:] == 0).all()
    assert (gradient(torch.zeros(7, dtype=torch.float64)) == 0).all()
    assert gradient(some_zero).isfinite().all()
    empty = torch.zeros(3, 0, dtype=torch.float64)
    assert value(empty).shape == (3,)
    assert gradient(empty).shape == (3, 0)


def test_ties_share_the_gradient() -> None:
    s = torch.tensor([2.0, 1.0, 1.0, 1.0, 0.0])
    assert gauges.top_k_gradient(s, 2, 1e-6).tolist() == pytest.approx([1.0, 1 / 3, 1 / 3, 1 / 3, 0.0], rel=1e-6)
    assert gauges.top_k_gradient(torch.ones(4), 1, 1e-6).tolist() == [0.25] * 4


def test_k_support_goes_from_l1_to_l2() -> None:
    s = descending((50, 6), 10)
    values = torch.stack([k_support.value(s, k) for k in range(1, 9)])
    assert torch.allclose(values[0], s.sum(-1), rtol=1e-14, atol=0)
    assert torch.allclose(values[5], s.norm(dim=-1), rtol=1e-14, atol=0)
    assert (values[6:] == values[5]).all()
    assert (values[1:] <= values[:-1] * (1 + 1e-14)).all()  # falls with k
    exact = [10.0, 50.0**0.5, 34.0**0.5, 30.0**0.5]  # by hand at (4, 3, 2, 1)
    spectrum = torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)
    assert [k_support.value(spectrum, k).item() for k in (1, 2, 3, 4)] == pytest.approx(exact, rel=1e-14)


def test_projection_on_the_l1_ball_against_its_definition() -> None:
    s = descending((50, 9), 11)
    u = gauges.project_capped(s, 1.0, 1.0)
    assert (u.sum(-1) <= 1 + 1e-14).all()
    # Variational inequality over the vertices of the ball: <s - u, v - u> <= 0.
    for vertex in [*torch.eye(9, dtype=torch.float64), torch.zeros(9, dtype=torch.float64)]:
        assert (((s - u) * (vertex - u)).sum(-1) <= 1e-13).all()
