"""Estimates of the hyperspherical energy: unbiased by exhaustion, inside their standard errors, refused near pairs."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms import sphere
from groundstate.norms.sphere.blocks import block_size, row_sums
from groundstate.norms.sphere.directions import directions
from groundstate.norms.sphere.estimators import Estimate, estimate, sampled
from groundstate.norms.sphere.law import law

F64 = torch.float64
BLOCK = block_size(torch.device("cpu"))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def gaussian(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=dtype)


def error(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def with_gradient(
    function: Callable[..., Estimate], w: Tensor, *args: object, **options: object
) -> tuple[Estimate, Tensor]:
    x = w.clone().requires_grad_()
    made = function(x, *args, **options)
    (grad,) = torch.autograd.grad(made.value.sum(), x)
    return Estimate(made.value.detach(), made.standard_error), grad


@pytest.mark.parametrize("function", [sampled, estimate])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("s", [0, 1, 2, 3.3])
def test_all_rows_are_exact(function: Callable[..., Estimate], half: bool, s: float) -> None:
    w = gaussian(BLOCK + 40, 16)
    made, grad = with_gradient(function, w, s, half_space=half, rows=10**6, generator=generator())
    value, slope = sphere.energy_and_grad(w, s, half_space=half)
    assert float(made.value) == pytest.approx(float(value), rel=1e-13)
    assert float(made.standard_error) == 0
    assert error(grad, slope) < 1e-12


@pytest.mark.parametrize("function", [sampled, estimate])
@pytest.mark.parametrize("half", [False, True])
def test_unbiased_over_all_samples(
    function: Callable[..., Estimate], half: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over all 15 samples of 4 of 6 neurons is the energy, for the value and for the gradient."""
    w = gaussian(6, 12, seed=8)
    values, grads = [], []
    for drawn in itertools.combinations(range(6), 4):
        order = torch.tensor([*drawn, *(k for k in range(6) if k not in drawn)])
        monkeypatch.setattr(torch, "randperm", lambda n, order=order, **_: order)
        made, grad = with_gradient(function, w, 1, half_space=half, rows=4, generator=generator())
        values.append(made.value)
        grads.append(grad)
    value, slope = sphere.energy_and_grad(w, 1, half_space=half)
    assert float(torch.stack(values).mean()) == pytest.approx(float(value), rel=1e-13)
    assert error(torch.stack(grads).mean(0), slope) < 1e-12


@pytest.mark.parametrize("function", [sampled, estimate])
def test_gradient_is_that_of_the_value(function: Callable[..., Estimate]) -> None:
    w = gaussian(7, 8).requires_grad_()
    options = {"rows": 4, "half_space": True}
    assert torch.autograd.gradcheck(lambda x: function(x, 1, generator=generator(), **options).value, w)
    options["half_space"] = False
    assert torch.autograd.gradcheck(lambda x: function(x, 0, generator=generator(), **options).value, w)


@pytest.mark.parametrize("function", [sampled, estimate])
def test_standard_error_is_the_spread(function: Callable[..., Estimate]) -> None:
    w = gaussian(300, 24)
    value = sphere.energy(w, 1)
    draw = generator(3)
    made = [function(w, 1, rows=30, generator=draw) for _ in range(100)]
    off = torch.stack([m.value for m in made]) - value
    claimed = torch.stack([m.standard_error for m in made]).square().mean().sqrt()
    # 100 draws know their spread to 7 percent, their mean to 0.1 spreads: three and four of these.
    assert float(off.square().mean().sqrt() / claimed) == pytest.approx(1, abs=0.2)
    assert abs(float(off.mean() / claimed)) < 0.4


def test_moments_leave_little_to_sample() -> None:
    w = gaussian(3000, 128, dtype=torch.float32)
    for s in (0, 1, 2):
        for half in (False, True):
            exact = sphere.energy(w.double(), s, half_space=half)
            made = estimate(w, s, half_space=half, generator=generator())
            plain = sampled(w, s, half_space=half, generator=generator())
            assert error(made.value, exact) < 1e-5
            assert float(made.standard_error) < 0.2 * float(plain.standard_error)
            rounding = 1e-7 * float(exact.abs())
            for m in (made, plain):
                assert abs(float(m.value - exact)) < 5 * float(m.standard_error) + rounding


def test_rows_are_chosen_by_the_dimension() -> None:
    for d, rows in ((16, 256), (128, 128), (600, 32)):
        w = gaussian(700, d)
        made, asked = estimate(w, 1, generator=generator(3)), estimate(w, 1, rows=rows, generator=generator(3))
        assert torch.equal(made.value, asked.value)
        assert torch.equal(made.standard_error, asked.standard_error)


def test_few_rows_are_enough_in_many_dimensions() -> None:
    w = gaussian(3000, 512, dtype=torch.float32)
    for s in (0, 1, 2):
        exact = sphere.energy(w.double(), s)
        # 1e-5 is asked for; the standard error is 1e-6.
        assert all(error(estimate(w, s, generator=generator(k)).value, exact) < 1e-5 for k in range(3))


def test_row_sums_add_up_to_all_pairs() -> None:
    w = gaussian(BLOCK + 9, 5)
    of, rule = directions(w[None], F64), law(2, True)
    rows = torch.randperm(len(w), generator=generator())
    total = row_sums(of, rows, rule, False).f.sum()
    n = len(w)
    known = sphere.energy(w, 2, half_space=True) * n * (2 * n - 1) - n / 4
    assert float(total) == pytest.approx(float(known), rel=1e-12)


def test_angular_and_batches() -> None:
    w = gaussian(2, 3, 20, 9)
    made, grad = with_gradient(sampled, w, 1, angular=True, rows=20, generator=generator())
    value, slope = sphere.energy_and_grad(w, 1, angular=True)
    assert made.value.shape == made.standard_error.shape == (2, 3)
    assert error(made.value, value) < 1e-13
    assert error(grad, slope) < 1e-12
    assert sampled(w[:0], generator=generator()).value.shape == (0, 3)
    assert not estimate(w, rows=5, generator=generator()).value.requires_grad


def test_the_generator_alone_decides() -> None:
    w = gaussian(100, 20)
    state = torch.get_rng_state()
    a, b = (estimate(w, rows=10, generator=generator(7)) for _ in range(2))
    c = estimate(w, rows=10, generator=generator(8))
    assert torch.equal(a.value, b.value)
    assert not torch.equal(a.value, c.value)
    assert torch.equal(torch.get_rng_state(), state)


def test_refuses_an_infinite_variance() -> None:
    for d, s in ((3, 1), (3, 2), (5, 2), (4, 5)):
        with pytest.raises(UsageError, match="variance"):
            estimate(gaussian(50, d), s, generator=generator())
    assert bool(sampled(gaussian(50, 3), 2, rows=10, generator=generator()).value.isfinite())


@pytest.mark.parametrize(("half", "sign"), [(False, 1), (True, 1), (True, -1)])
@pytest.mark.parametrize("distance", [0.0, 1e-4, 0.005])
def test_refuses_near_pairs_that_no_sample_saw(half: bool, sign: int, distance: float) -> None:
    w = gaussian(2000, 64)
    w[1234] = sign * 2 * (w[77] + distance * w[77].norm() * torch.nn.functional.normalize(w[78], dim=0))
    with pytest.raises(UsageError, match=r"closer than 0\.03"):
        estimate(w, 1, half_space=half, rows=2, generator=generator(1))


def test_refuses_drawn_near_pairs() -> None:
    w = gaussian(20, 30)
    w[4] = w[11] * 3
    with pytest.raises(UsageError, match=r"closer than 0\.03"):
        estimate(w, 1, rows=20, generator=generator())
    exact = sphere.energy(w, 1)
    assert float(sampled(w, 1, rows=20, generator=generator()).value) == pytest.approx(float(exact), rel=1e-12)
    with pytest.raises(UsageError, match="neurons 4 and 11"):
        sampled(w, 1, rows=20, on_duplicate="error", generator=generator())


@pytest.mark.parametrize("function", [sampled, estimate])
def test_refuses_bad_arguments(function: Callable[..., Estimate]) -> None:
    w = gaussian(8, 9)
    for rows in (1, 0, -3, 2.5, True):
        with pytest.raises(UsageError, match="rows"):
            function(w, rows=rows, generator=generator())
    with pytest.raises(UsageError, match="generator"):
        function(w, generator=None)
    w[3] = 0
    with pytest.raises(UsageError, match="1 of 8 neurons are zero"):
        function(w, generator=generator())
    w[3] = math.nan
    with pytest.raises(NonFiniteError):
        function(w, generator=generator())
    with pytest.raises(UsageError, match="at least 2 neurons"):
        function(w[:1], generator=generator())
