"""What an energy of the singular values is: a symmetric function f of them, lifted to matrices.

Idea: value, gradient, proximal map and linear minimizer of E(W) = f(s) are those of f between the singular vectors::

    dE/dW = U diag(f'(s)) V^T,   prox_tE(W) = U diag(prox_tf(s)) V^T,   lmo_E(G) = U diag(lmo_f(s)) V^T

A new energy of this kind says what f is (functions of vectors are in `groundstate.norms.gauges`) and inherits the rest.
f runs in float64 whatever the dtype of the weights: singular values are few.

Reference: A. S. Lewis, "The convex analysis of unitarily invariant matrix functions" (1995), theorem 3.1.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from groundstate.energies.base import MatrixEnergy, require
from groundstate.energies.capabilities import Anchor, Anchored, Dualizable, Proximable, Spectral
from groundstate.norms import spectral
from groundstate.norms.subgradient import inner, rounding


def require_step(step: float) -> None:
    """Raises `UsageError` unless the step of a proximal map is finite and not negative."""
    require(0 <= step < math.inf, f"the step of a proximal map must be finite and not negative, got {step!r}")


@dataclass(frozen=True, repr=False)
class UnitarilyInvariant(MatrixEnergy, Spectral):
    """A matrix energy given by a function of the singular values and its gradient."""

    @abstractmethod
    def _value(self, s: Tensor) -> Tensor:
        """Returns f(s), shape ``(*batch,)``, for float64 s in descending order; differentiable by autograd."""

    @abstractmethod
    def _gradient(self, s: Tensor, tie: float) -> Tensor:
        """Returns the minimal-norm subgradient of f, zero where s is; s that differ by tie * s_1 or less are equal."""

    def of_singular_values(self, s: Tensor) -> Tensor:
        return self._value(s.double()).to(s.dtype)

    def value(self, w: Tensor) -> Tensor:
        return self.of_singular_values(spectral.singular_values(w))

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        u, s, vh = spectral.svd(w)
        coefficients = self._gradient(spectral.above_tolerance(s, w), spectral.tolerance(w))
        return self.of_singular_values(s), spectral.assemble(u, coefficients, vh, w)

    def _specialize(self, **facts: bool | float | None) -> None:
        """Gives this instance traits of its own, where they depend on its fields."""
        object.__setattr__(self, "traits", replace(type(self).traits, **facts))  # pyright: ignore[reportArgumentType]


@dataclass(frozen=True, repr=False)
class SpectralProximable(UnitarilyInvariant, Proximable):
    """A function of the singular values with a known proximal map."""

    @abstractmethod
    def _prox(self, s: Tensor, step: float) -> Tensor:
        """Returns argmin_x step * f(x) + ||x - s||^2 / 2."""

    def prox(self, w: Tensor, step: float) -> Tensor:
        require_step(step)
        u, s, vh = spectral.svd(w)
        return spectral.assemble(u, self._prox(s.double(), step), vh, w)


@dataclass(frozen=True, repr=False)
class SpectralNorm(SpectralProximable, Dualizable, Anchored):
    """A function of the singular values with a known dual and linear minimization oracle."""

    @abstractmethod
    def _lmo(self, s: Tensor, tie: float) -> Tensor:
        """Returns argmax of <s, u> over f(u) <= 1, zero where s is zero."""

    def _dual(self, s: Tensor) -> Tensor:
        return (s * self._lmo(s, 0.0)).sum(-1)

    def dual(self, g: Tensor) -> Tensor:
        s = spectral.singular_values(g)
        return self._dual(s.double()).to(s.dtype)

    def lmo(self, g: Tensor) -> Tensor:
        u, s, vh = spectral.svd(g)
        return -spectral.assemble(u, self._lmo(spectral.above_tolerance(s, g), spectral.tolerance(g)), vh, g)

    def anchor(self, weights: Sequence[Tensor]) -> Anchor:
        value, gradient = self.value_and_grad(weights[0])
        shift = 0.0 if self.traits.degree == 1 else float(value) - inner([gradient], weights)
        return Anchor(float(value), [gradient], shift, rounding([gradient], weights, float(value)))
