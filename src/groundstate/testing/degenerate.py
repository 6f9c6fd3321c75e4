"""Contracts of matrix energies where formulas break: zero, rank deficient, tied, empty, huge and tiny weights.

At a kink the gradient is the subgradient of minimal norm. That subgradient is unique, so it has every symmetry of the
weight: it is zero at zero, lies in the range of a rank-one weight, and is a multiple of an orthogonal one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groundstate.energies.base import MatrixEnergy
from groundstate.testing import samples
from groundstate.testing.expect import expect, expect_close, size


def finite_at_degenerate_weights(energy: MatrixEnergy) -> None:
    """Value and gradient are finite wherever their exact size fits the dtype; the value agrees with float64.

    A value may be off by what rounding errors in the weight itself would do to it: where the rank decides (log-det of a
    huge rank-one matrix) that is much.
    """
    for dtype in samples.FLOATS:
        for name, w in samples.degenerate(dtype, energy.smallest).items():
            what = f"{energy!r} at {name} in {str(dtype).removeprefix('torch.')}"
            exact = energy.value(w.double())
            expect(not bool(exact.isnan()), f"{what}: value in float64 is NaN")
            value = energy.value(w)
            expect(not bool(value.isnan()), f"{what}: value is NaN")
            # A quarter of the range: a sum of a few entries, each within it, may be what overflows.
            fits = size(exact) < torch.finfo(value.dtype).max / 4
            expect(bool(value.isfinite()) or not fits, f"{what}: value is {float(value)}, exactly {float(exact):.6g}")
            if fits:
                rounding = torch.finfo(dtype if dtype == torch.float64 else torch.float32).eps
                bound = 1e-3 * size(exact) + torch.finfo(value.dtype).tiny + 4 * _sensitivity(energy, w, rounding)
                expect_close(value, exact.to(value.dtype), bound, f"{what}: value against float64")
            if energy.traits.differentiable:
                _finite_gradient(energy, w, fits, what)


def _sensitivity(energy: MatrixEnergy, w: Tensor, rounding: float) -> float:
    """Largest change of E in float64 under random relative errors of the size that a decomposition makes."""
    exact = energy.value(w.double())
    moved = [
        w.double() + rounding * max(w.shape[-2:], default=0) * size(w) * samples.normal(w.shape, seed)
        for seed in (145, 146, 147)
    ]
    return max(size(energy.value(m) - exact) for m in moved)


def _finite_gradient(energy: MatrixEnergy, w: Tensor, value_fits: bool, what: str) -> None:
    exact = energy.value_and_grad(w.double())[1]
    value, grad = energy.value_and_grad(w)
    expect(not bool(value.isnan()), f"{what}: value of value_and_grad is NaN")
    expect(grad.shape == w.shape and grad.dtype == w.dtype, f"{what}: gradient is {tuple(grad.shape)} {grad.dtype}")
    fits = size(exact) < torch.finfo(w.dtype).max / 4
    if fits:
        expect(bool(grad.isfinite().all()), f"{what}: gradient is not finite, exactly at most {size(exact):.6g}")
    if fits and value_fits:  # whoever puts the energy in the loss differentiates `value` at the same weights
        leaf = w.clone().requires_grad_()
        (slope,) = torch.autograd.grad(energy.value(leaf).sum(), leaf)
        expect(not bool(slope.isnan().any()), f"{what}: autograd of value gives NaN")


def gradient_is_zero_at_zero(energy: MatrixEnergy) -> None:
    """The gradient of a zero matrix is zero, alone and in a batch."""
    for dtype in samples.FLOATS:
        for shape in ((4, 3), (3, 3), *samples.shapes(energy.smallest)):
            grad = energy.value_and_grad(torch.zeros(shape, dtype=dtype))[1]
            expect(size(grad) == 0.0, f"{energy!r}: the gradient at a zero {shape} of {dtype} is {size(grad):.3g}")
        batch = samples.normal((3, 4, 3), 150, dtype)
        batch[1] = 0
        grad = energy.value_and_grad(batch)[1][1]
        expect(size(grad) == 0.0, f"{energy!r}: the gradient of a zero matrix in a batch is {size(grad):.3g}")


def gradient_lies_in_the_range(energy: MatrixEnergy) -> None:
    """At w = u v^T the gradient is a multiple of u v^T (orthogonal invariance), or zero where w is (sign)."""
    if "orthogonal" in energy.traits.invariances:
        for dtype in samples.FLOATS:
            sizes = (1.0,) if dtype == torch.float16 else (1.0, *samples.EXTREMES)
            for scale in sizes:
                w, u, v = samples.rank_one(6, 4, torch.float64)
                grad = energy.value_and_grad((scale * w).to(dtype))[1].double()
                u, v = u / u.norm(), v / v.norm()
                # Rounding of the decomposition, then of the gradient to the dtype of the weight.
                bound = (1e-10 if dtype == torch.float64 else 1e-4 + torch.finfo(dtype).eps) * size(grad)
                what = f"{energy!r} at a rank-one matrix near {scale:g} in {dtype}: gradient outside of its range"
                expect_close(grad, torch.outer(u, v) * (u @ grad @ v), bound, what)
    if "sign" in energy.traits.invariances:
        w = samples.normal((5, 4), 160)
        w[1:3, 2] = 0
        outside = energy.value_and_grad(w)[1][w == 0]
        expect(size(outside) == 0.0, f"{energy!r}: the gradient at entries that are zero is {size(outside):.3g}")


def gradient_is_shared_among_ties(energy: MatrixEnergy) -> None:
    """At c Q with orthonormal rows or columns the gradient is a multiple of Q (orthogonal invariance)."""
    if "orthogonal" not in energy.traits.invariances:
        return
    for name, q in {
        "identity": torch.eye(4, dtype=torch.float64),
        "orthogonal": samples.orthogonal(5, 170),
        "tall": samples.orthogonal(6, 171)[:, :3],
        "wide": samples.orthogonal(6, 172)[:3],
    }.items():
        for dtype in (torch.float64, torch.float32):
            for c in (1.0, 3.0):
                value, grad = energy.value_and_grad((c * q).to(dtype))
                grad = grad.double()
                factor = (grad * q).sum() / q.square().sum()
                bound = (1e-9 if dtype == torch.float64 else 1e-3) * (size(grad) + size(value) / c)
                bound += 100 * torch.finfo(dtype).eps * c  # rounding, where the energy has its minimum there
                what = f"{energy!r} at {c:g} Q, Q {name}, in {dtype}: gradient not shared evenly among ties"
                expect_close(grad, factor * q, bound, what)
