"""Contracts of the energies of one matrix: gradient, homogeneity, invariances, convexity, batches, layouts.

Tolerances are in float64 unless said otherwise. Relative ones are taken of the gradient's size plus E / |W|, because a
gradient may vanish where the energy does not (the stable rank of a single row).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from groundstate.energies.base import MatrixEnergy
from groundstate.energies.capabilities import Dualizable, Proximable
from groundstate.testing import samples
from groundstate.testing.expect import expect, expect_close, expect_nonfinite_error, inner, size, untouched


def gradient_equals_autograd(energy: MatrixEnergy) -> None:
    """``value_and_grad`` gives the value of ``value`` and its gradient by autograd, to 1e-8."""
    for shape in (*samples.shapes(energy.smallest), (3, 2, 5, 4)):
        w = samples.normal(shape, 40)
        leaf = w.clone().requires_grad_()
        expected = energy.value(leaf)
        (slope,) = torch.autograd.grad(expected.sum(), leaf)
        value, grad = energy.value_and_grad(w)
        what = f"{energy!r} at a random {shape}"
        expect_close(value, expected, 1e-10 * size(expected), f"{what}: value_and_grad against value")
        expect_close(grad, slope, 1e-8 * _slope_size(value, slope, w), f"{what}: gradient against autograd of value")


def gradient_matches_differences(energy: MatrixEnergy) -> None:
    """<gradient, D> is the central difference of the value along random directions D."""
    for number, shape in enumerate(samples.shapes(energy.smallest)):
        w = samples.normal(shape, 50 + number)
        value, grad = energy.value_and_grad(w)
        for seed in (60, 61):
            d = samples.normal(shape, seed)
            # Truncation falls as h^2 and rounding grows as 1 / h: the best h depends on the curvature of the energy.
            steps = (1e-3, 1e-4, 1e-5, 1e-6)
            slopes = [float(energy.value(w + h * d) - energy.value(w - h * d)) / (2 * h) for h in steps]
            slope = float(inner(grad, d))
            nearest = min(slopes, key=lambda s: abs(s - slope))
            bound = 1e-6 * _slope_size(value, grad, w) * w.numel()
            what = f"{energy!r} at a random {shape}: <gradient, D> against central differences"
            expect_close(torch.tensor(slope), torch.tensor(nearest), bound, what)


def homogeneous(energy: MatrixEnergy) -> None:
    """E(cW) = |c|^d E(W) for the declared degree d, and <gradient, W> = d E."""
    degree = energy.traits.degree
    if degree is None:
        return
    for shape in samples.shapes(energy.smallest):
        w = samples.normal(shape, 70)
        value = energy.value(w)
        for c in (2.0, -0.3, 7.0):
            what = f"{energy!r} at a random {shape}: E({c:g} W) against |{c:g}|^{degree:g} E(W)"
            expect_close(energy.value(c * w), abs(c) ** degree * value, 1e-9 * abs(c) ** degree * size(value), what)
        if energy.traits.differentiable:
            euler = inner(energy.value_and_grad(w)[1], w)
            what = f"{energy!r} at a random {shape}: <gradient, W> against {degree:g} E(W)"
            expect_close(euler, degree * value, 1e-8 * size(value) * max(1.0, degree), what)


def invariant(energy: MatrixEnergy) -> None:
    """E(T W) = E(W) for the declared isometries T, and the gradient at T W is T of the gradient at W."""
    for invariance in energy.traits.invariances:
        for shape in samples.shapes(energy.smallest):
            w = samples.normal(shape, 80)
            for name, isometry in samples.isometries(invariance, *shape).items():
                what = f"{energy!r} is declared {invariance!r}, {name} at a random {shape}"
                value, moved = energy.value(w), isometry(w)
                expect_close(energy.value(moved), value, 1e-9 * size(value), f"{what}: value")
                if energy.traits.differentiable:
                    grad = energy.value_and_grad(w)[1]
                    bound = 1e-7 * _slope_size(value, grad, w)
                    expect_close(energy.value_and_grad(moved)[1], isometry(grad), bound, f"{what}: gradient")


def convex(energy: MatrixEnergy) -> None:
    """Where declared convex: E is at most its chords, and at least its tangents also where it has a kink."""
    if not energy.traits.convex:
        return
    for shape in samples.shapes(energy.smallest):
        u, v = samples.normal(shape, 90), samples.normal(shape, 91)
        for t in (0.1, 0.5, 0.8):
            middle, ends = energy.value((1 - t) * u + t * v), (1 - t) * energy.value(u) + t * energy.value(v)
            expect(
                float(middle) <= float(ends) + 1e-10 * size(ends),
                f"{energy!r} is declared convex, but at a random {shape} lies {float(middle - ends):.3g} above a chord",
            )
    if not energy.traits.differentiable:
        return
    for name, w in samples.degenerate(torch.float64, energy.smallest).items():
        if w.numel() == 0 or "1e" in name:
            continue
        value, grad = energy.value_and_grad(w)
        for seed, distance in ((92, 1.0), (93, 0.1), (94, 10.0)):
            v = w + distance * samples.normal(w.shape, seed)
            tangent, there = value + inner(grad, v - w), energy.value(v)
            expect(
                float(there) >= float(tangent) - 1e-9 * size(tangent, there, value),
                f"{energy!r} at {name}: its gradient is no subgradient, E(V) = {float(there):.9g} lies below the "
                f"tangent {float(tangent):.9g}",
            )


def batch_equals_loop(energy: MatrixEnergy) -> None:
    """A batch gives what its matrices give one by one: value, gradient, prox, dual, lmo."""
    for shape in ((3, 2, 4, 3), (2, 1, 5), (3, 5, 5)):
        w = samples.normal(shape, 100)
        w[0] = 0  # one matrix of the batch is degenerate
        flat = w.reshape(-1, *shape[-2:])
        for name, call in _operations(energy).items():
            batched = call(w)
            singles = torch.stack([call(one) for one in flat]).reshape(batched.shape)
            what = f"{energy!r}.{name} of a batch {shape} against one by one"
            expect_close(batched, singles, 1e-9 * max(size(singles), 1e-300), what)


def shapes_and_dtypes_are_kept(energy: MatrixEnergy) -> None:
    """Values are ``(*batch,)``, gradients like the weight; no autograd graph is left; half precisions work."""
    for dtype in samples.FLOATS:
        for shape in ((4, 3), (2, 3, 4), (2, 1, 3, 3)):
            w = samples.normal(shape, 110, dtype).requires_grad_()
            what = f"{energy!r} of {str(dtype).removeprefix('torch.')} {shape}"
            value = energy.value(w)
            expect(value.shape == shape[:-2], f"{what}: expected value of shape {shape[:-2]}, got {tuple(value.shape)}")
            expect(value.is_floating_point(), f"{what}: value is {value.dtype}")
            expect(dtype != torch.float64 or value.dtype == dtype, f"{what}: value is only {value.dtype}")
            for name, call in _operations(energy).items():
                result = call(w)
                if name not in ("value", "dual"):
                    kept = result.shape == w.shape and result.dtype == dtype
                    expect(kept, f"{what}: {name} has {tuple(result.shape)} {result.dtype}")
                expect(name in ("value", "dual") or not result.requires_grad, f"{what}: {name} keeps an autograd graph")


def single_agrees_with_double(energy: MatrixEnergy) -> None:
    """Float32 gives the value to 1e-4 and the gradient to 1e-2 of float64 (condition numbers here are below 100)."""
    for shape in ((6, 4), (3, 5), (1, 5)):
        w = samples.normal(shape, 120, torch.float32)
        what = f"{energy!r} at a random {shape}: float32 against float64"
        value = energy.value(w.double())
        expect_close(energy.value(w).double(), value, 1e-4 * size(value), f"{what}, value")
        if energy.traits.differentiable:
            grad = energy.value_and_grad(w.double())[1]
            bound = 1e-2 * _slope_size(value, grad, w)
            expect_close(energy.value_and_grad(w)[1].double(), grad, bound, f"{what}, gradient")


def layout_does_not_matter(energy: MatrixEnergy) -> None:
    """Transposed, strided, sliced and expanded weights give what a contiguous copy gives."""
    for layout, w in samples.layouts().items():
        plain = w.clone(memory_format=torch.contiguous_format)
        for name, call in _operations(energy).items():
            expected = call(plain)
            bound = 1e-9 * max(size(expected), 1e-300)
            expect_close(call(w), expected, bound, f"{energy!r}.{name} of a weight that is {layout}")


def inputs_and_generators_are_left_alone(energy: MatrixEnergy) -> None:
    """Nothing changes the weight or a global generator, and no result shares memory with the weight."""
    for dtype in (torch.float64, torch.float32):
        for shape in ((4, 3), (1, 5), (2, 3, 3)):
            w = samples.normal(shape, 130, dtype).requires_grad_()
            for name, call in _operations(energy).items():
                with untouched([w], f"{energy!r}.{name}"):
                    result = call(w)
                    with torch.no_grad():
                        result.detach().fill_(1.0)


def nonfinite_weights_are_named(energy: MatrixEnergy) -> None:
    """NaN and infinity in the weight raise `NonFiniteError` from value and from gradient."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        for bad in (float("nan"), float("inf"), -float("inf")):
            w = samples.normal((2, 4, 3), 140, dtype)
            w[1, 2, 1] = bad
            what = f"{energy!r} of {str(dtype).removeprefix('torch.')} with an entry {bad}"
            expect_nonfinite_error(partial(energy.value, w), f"{what}: value")
            if energy.traits.differentiable:
                expect_nonfinite_error(partial(energy.value_and_grad, w), f"{what}: value_and_grad")


def _operations(energy: MatrixEnergy) -> dict[str, Callable[[Tensor], Tensor]]:
    """Everything the energy can do with one tensor, by name."""
    found: dict[str, Callable[[Tensor], Tensor]] = {"value": energy.value}
    if energy.traits.differentiable:
        found["gradient"] = lambda w: energy.value_and_grad(w)[1]
    if isinstance(energy, Proximable):
        found["prox"] = lambda w: energy.prox(w, 0.3)
    if isinstance(energy, Dualizable):
        found["dual"] = energy.dual
        found["lmo"] = energy.lmo
    return found


def _slope_size(value: Tensor, grad: Tensor, w: Tensor) -> float:
    """Size of a gradient, at least that of E / |W|."""
    return size(grad) + size(value) / size(w)
