"""Energies of entries: l1, Frobenius and its square."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from groundstate.energies.entrywise import L1, Frobenius, SquaredFrobenius
from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms import entrywise


def random(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("energy", [L1(), Frobenius(), SquaredFrobenius()], ids=repr)
def test_closed_form_equals_autograd(energy: L1 | Frobenius | SquaredFrobenius) -> None:
    for shape in ((6, 4), (3, 2, 5), (1, 1), (2, 0), (0, 3, 3)):
        w = random(shape, 1).requires_grad_()
        value = energy.value(w)
        (expected,) = torch.autograd.grad(value.sum(), w)
        closed, grad = energy.value_and_grad(w)
        assert torch.allclose(closed, value, rtol=1e-14, atol=0)  # the same sums
        assert torch.allclose(grad, expected, rtol=1e-12, atol=0)


def test_l1_prox_is_the_soft_threshold() -> None:
    w = torch.tensor([[3.0, -0.5], [0.0, -2.0]])
    assert torch.equal(L1().prox(w, 1.0), torch.tensor([[2.0, 0.0], [0.0, -1.0]]))
    # One step of ISTA on |w|_1 + |A w - b|^2 / 2 does not raise the objective when step <= 1 / |A|^2.
    a, b = random((8, 6), 2), random((8, 1), 3)
    step, w = 1 / float(torch.linalg.matrix_norm(a, 2)) ** 2, random((6, 1), 4)
    objective = []
    for _ in range(50):
        objective.append(float(L1().value(w) + (a @ w - b).square().sum() / 2))
        w = L1().prox(w - step * a.mT @ (a @ w - b), step)
    assert all(later <= earlier + 1e-12 for earlier, later in pairwise(objective))
    residual = a.mT @ (b - a @ w)
    assert float(residual.abs().max()) <= 1 + 0.5  # near |A^T (b - A w)| <= 1, the optimality condition
    assert objective[-1] < objective[0]


@pytest.mark.parametrize("energy", [L1(), Frobenius()], ids=repr)
def test_norms_prox_duality_and_minimizer(energy: L1 | Frobenius) -> None:
    for w in (random((7, 5), 5), random((4, 3, 8), 6), torch.ones(3, 3, dtype=torch.float64)):
        g = random(w.shape, 7)
        assert ((w * g).sum((-2, -1)).abs() <= energy.value(w) * energy.dual(g) * (1 + 1e-12)).all()
        u = energy.lmo(g)
        assert torch.allclose((u * g).sum((-2, -1)), -energy.dual(g), rtol=1e-12, atol=0)
        assert torch.allclose(energy.value(u), torch.ones_like(energy.value(u)), rtol=1e-12, atol=0)
        for step in (0.1, 1.0, 50.0):
            p = energy.prox(w, step)
            z = w - p
            # z is in step * subdifferential at p: rounding only.
            assert (energy.dual(z) <= step * (1 + 1e-12)).all()
            assert torch.allclose((z * p).sum((-2, -1)), step * energy.value(p), rtol=1e-12, atol=1e-12)


def test_squared_frobenius_shrinks() -> None:
    w = random((4, 3), 8)
    p = SquaredFrobenius().prox(w, 0.3)
    assert torch.allclose(p + 0.3 * SquaredFrobenius().value_and_grad(p)[1], w, rtol=1e-14, atol=0)  # stationarity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("energy", [L1(), Frobenius(), SquaredFrobenius()], ids=repr)
def test_degenerate_matrices(energy: L1 | Frobenius | SquaredFrobenius, dtype: torch.dtype) -> None:
    for scale in (1.0, 1e25, 1e-25, 0.0):
        if dtype is torch.float16 and scale == 1e25:
            continue
        w = (random((6, 4), 9) * scale).to(dtype)
        value, grad = energy.value_and_grad(w)
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert grad.dtype == dtype
        assert grad.isfinite().all()
        single = dtype != torch.float64 and scale == 1e25
        assert value.isinf() if single and isinstance(energy, SquaredFrobenius) else value.isfinite()
        assert energy.prox(w, 0.1).isfinite().all()
        if scale == 0:
            assert value == 0
            assert (grad == 0).all()
        elif isinstance(energy, Frobenius):
            assert value.item() == pytest.approx(w.double().norm().item(), rel=1e-5)  # float32 rounding
    if isinstance(energy, L1 | Frobenius):
        zero = torch.zeros(3, 2, dtype=dtype)
        assert (energy.lmo(zero) == 0).all()
        assert energy.lmo(zero[:0]).shape == (0, 2)
        assert energy.dual(zero[:0]) == 0


@pytest.mark.parametrize("energy", [L1(), Frobenius(), SquaredFrobenius()], ids=repr)
def test_bad_input(energy: L1 | Frobenius | SquaredFrobenius) -> None:
    w = torch.ones(3, 2)
    w[0, 0] = torch.nan
    w[1, 1] = torch.inf
    for act in (energy.value, energy.value_and_grad):
        with pytest.raises(NonFiniteError, match=r"\(3, 2\) has 2 NaN or infinite"):
            act(w)
        with pytest.raises(UsageError, match="real floating-point matrix"):
            act(torch.ones(3, dtype=torch.float64))


def test_largest_entry() -> None:
    assert entrywise.largest(torch.tensor([[1.0, -4.0]])) == 4
