"""Contracts of proximal maps, dual norms and linear minimization oracles.

With P(u) = t E(u) + 1/2 ||u - w||^2 and p = prox_t(w): no point has a smaller P; for convex E this says that (w - p)/t
is a subgradient at p. For a norm, Moreau's decomposition w = prox_t(w) + t proj(w/t) onto the dual unit ball reads
dual(w - p) <= t and <p, w - p> = t E(p).

Reference: N. Parikh, S. Boyd, "Proximal algorithms" (2014), sections 2.5 and 6.5.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from groundstate.energies.base import Energy
from groundstate.testing import samples
from groundstate.testing.expect import expect, expect_close, inner, size

_STEPS = (0.01, 0.3, 2.0)


def is_norm(energy: Energy) -> bool:
    """Whether the traits say that the energy is a norm."""
    return energy.traits.convex and energy.traits.degree == 1


def _weights() -> Iterator[tuple[str, Tensor]]:
    for shape in samples.SHAPES:
        yield f"a random {shape}", samples.normal(shape, 180)
    for name, w in samples.degenerate(torch.float64).items():
        if w.numel() and "1e" not in name:
            yield name, w


def _candidates(energy: Any, w: Tensor, p: Tensor, step: float) -> Iterator[tuple[str, Tensor]]:
    yield "w", w
    yield "0", torch.zeros_like(w)
    for c in (0.25, 0.5, 0.75, 0.9, 0.99, 1.01):
        yield f"{c} w", c * w
        yield f"{c} p", c * p
    for factor in (0.1, 0.5, 0.9, 1.1, 2.0):
        yield f"the prox of {factor} step", energy.prox(w, factor * step)
    for seed in range(190, 194):
        d = samples.normal(w.shape, seed)
        for distance in (1e-3, 1e-2, 0.1, 1.0):
            yield f"p + {distance} * noise", p + distance * d
            yield f"p + {distance} * noise of rank one", p + distance * torch.outer(d[:, 0], d[0])


def prox_minimizes(energy: Any) -> None:
    """No other point has a smaller step * E(u) + 1/2 ||u - w||^2; where E is convex, (w - p)/step is a subgradient."""
    for name, w in _weights():
        for step in _STEPS:
            p = energy.prox(w, step)
            best, at_p = step * energy.value(p) + 0.5 * inner(p - w, p - w), energy.value(p)
            what = f"{energy!r}.prox at {name}, step {step:g}"
            for other, u in _candidates(energy, w, p, step):
                there = step * energy.value(u) + 0.5 * inner(u - w, u - w)
                expect(
                    float(best) <= float(there) + 1e-9 * (size(there) + size(w) ** 2),
                    f"{what}: objective {float(best):.12g}, but {other} has {float(there):.12g}",
                )
                if energy.traits.convex:
                    tangent = step * at_p + inner(w - p, u - p)
                    expect(
                        float(step * energy.value(u)) >= float(tangent) - 1e-9 * (size(tangent) + size(w) ** 2),
                        f"{what}: (w - p)/step is no subgradient, seen from {other}",
                    )


def prox_is_stationary(energy: Any) -> None:
    """step * gradient(p) + p - w vanishes where E is smooth, and along p where E is homogeneous."""
    if not energy.traits.differentiable or not (energy.traits.smooth or energy.traits.degree is not None):
        return
    for name, w in _weights():
        for step in _STEPS:
            p = energy.prox(w, step)
            slope = step * energy.value_and_grad(p)[1]
            residual = slope + p - w
            bound = 1e-7 * (size(w) + size(slope))
            what = f"{energy!r}.prox at {name}, step {step:g}"
            if energy.traits.smooth:
                expect_close(residual, torch.zeros_like(w), bound, f"{what}: step * gradient(p) + p - w")
            along = inner(residual, p)
            expect_close(along, torch.zeros_like(along), bound * size(p) * p.numel(), f"{what}: stationarity along p")


def prox_is_safe(energy: Any) -> None:
    """Step 0 gives w; degenerate weights, half precisions and extreme scales give finite points like w."""
    w = samples.normal((5, 4), 200)
    expect_close(energy.prox(w, 0.0), w, 1e-12 * size(w) * w.numel(), f"{energy!r}.prox with step 0 against w")
    for dtype in samples.FLOATS:
        for name, w in samples.degenerate(dtype).items():
            for step in (0.5, 0.1 * size(w)):
                what = f"{energy!r}.prox at {name} in {str(dtype).removeprefix('torch.')}, step {step:g}"
                p = energy.prox(w, step)
                expect(p.shape == w.shape and p.dtype == w.dtype, f"{what}: gives {tuple(p.shape)} {p.dtype}")
                expect(bool(p.isfinite().all()), f"{what}: not finite")
                # The objective at p is at most that at w, so p is no farther out than rounding allows where E >= 0.
                grown = float(p.double().norm()) > (1 + 64 * torch.finfo(dtype).eps) * float(w.double().norm())
                expect(not (grown and _grows_outward(energy)), f"{what}: larger than w")


def _grows_outward(energy: Any) -> bool:
    degree = energy.traits.degree
    return degree is not None and degree > 0


def moreau(energy: Any) -> None:
    """For a norm: dual(w - p) <= step, and <p, w - p> = step * E(p)."""
    for name, w in _weights():
        for step in _STEPS:
            p = energy.prox(w, step)
            what = f"{energy!r} at {name}, step {step:g}"
            left = float(energy.dual(w - p))
            expect(
                left <= step * (1 + 1e-9) + 1e-13 * size(w), f"{what}: dual(w - prox) is {left:.12g}, above the step"
            )
            bound = 1e-9 * (size(w) ** 2 * w.numel() + step * size(energy.value(p)))
            expect_close(inner(p, w - p), step * energy.value(p), bound, f"{what}: <p, w - p> against step * E(p)")


def duality(energy: Any) -> None:
    """<g, u> <= dual(g) wherever E(u) <= 1."""
    for name, g in _weights():
        bound = float(energy.dual(g))
        expect(bound >= 0, f"{energy!r}.dual at {name} is negative: {bound:.6g}")
        for seed, length in ((210, 1.0), (211, 0.1), (212, 30.0), (0, 1.0)):
            u = length * (samples.normal(g.shape, seed) if seed else g)
            value = float(energy.value(u))
            # E is convex with E(0) = 0, so u / E(u) lies in the unit ball; for a norm, on its boundary.
            u = u / (value if is_norm(energy) and value > 0 else max(value, 1.0))
            product = float(inner(g, u))
            expect(
                product <= bound * (1 + 1e-9) + 1e-15,
                f"{energy!r} at {name}: <g, u> = {product:.12g} exceeds dual(g) = {bound:.12g} with E(u) <= 1",
            )


def lmo_attains_the_dual(energy: Any) -> None:
    """<g, lmo(g)> = -dual(g) with E(lmo(g)) = 1; zero for g = 0; finite at every scale."""
    for name, g in _weights():
        u, bound = energy.lmo(g), energy.dual(g)
        what = f"{energy!r} at {name}"
        if size(g) == 0:
            expect(size(u) == 0 and float(bound) == 0, f"{what}: lmo and dual of zero must be zero")
            continue
        expect_close(inner(g, u), -bound, 1e-9 * size(bound), f"{what}: <g, lmo(g)> against -dual(g)")
        expect_close(energy.value(u), torch.ones_like(bound), 1e-9, f"{what}: E(lmo(g)) against 1")
    for dtype in samples.FLOATS:
        for name, g in samples.degenerate(dtype).items():
            what = f"{energy!r} at {name} in {str(dtype).removeprefix('torch.')}"
            u = energy.lmo(g)
            expect(u.shape == g.shape and u.dtype == g.dtype, f"{what}: lmo gives {tuple(u.shape)} {u.dtype}")
            expect(
                bool(u.isfinite().all()) and bool(energy.dual(g).isfinite().all()), f"{what}: lmo or dual not finite"
            )
