"""Energies of the singular values of a weight matrix: nuclear norm and its relatives.

Idea: each is a symmetric function f of the singular values s, so value, gradient and proximal map are those of f
between the singular vectors (`groundstate.norms.spectral`)::

    E(W) = f(s),   dE/dW = U diag(f'(s)) V^T,   prox_tE(W) = U diag(prox_tf(s)) V^T

None changes when W is multiplied by orthogonal matrices, so none changes when neurons are permuted. A class below says
what f is; `UnitarilyInvariant` does the rest. Scalar functions of singular values run in float64 whatever the weights'
dtype.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from torch import Tensor

from groundstate.energies.base import Dualizable, MatrixEnergy, Proximable, Spectral, Traits, require
from groundstate.norms import gauges, spectral
from groundstate.norms.polar import polar


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
        u, s, vh = spectral.svd(w)
        return spectral.assemble(u, self._prox(s.double(), step), vh, w)


@dataclass(frozen=True, repr=False)
class SpectralNorm(SpectralProximable, Dualizable):
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


@dataclass(frozen=True, repr=False)
class Nuclear(SpectralNorm):
    """Nuclear norm, the sum of the singular values: the convex surrogate of the rank.

    Its gradient is the polar factor U V^T; its proximal map thresholds the singular values, which makes ranks exact.
    With ``smoothing`` e > 0 it is sum_i sqrt(sigma_i^2 + e^2) - e, which is smooth, lower by at most e per singular
    value, and convex, but no longer a norm: ``dual`` and ``lmo`` then speak of the set where it is at most 1.

    Attributes:
        smoothing: e, in the units of the weights.

    Reference: M. Fazel, "Matrix rank minimization with applications" (2002); J.-F. Cai, E. Candes, Z. Shen, "A singular
    value thresholding algorithm for matrix completion" (2010), theorem 2.1.

    >>> import torch
    >>> Nuclear().value(torch.diag(torch.tensor([3.0, 4.0])))
    tensor(7.)
    """

    smoothing: float = 0.0

    name: ClassVar[str] = "nuclear"
    traits: ClassVar[Traits] = Traits(
        formula="sum_i sigma_i(W); smoothing=e: sum_i sqrt(sigma_i^2 + e^2) - e",
        reference="Fazel 2002; Cai, Candes and Shen 2010",
        cost="one eigh of the smaller side (tall, wide) or one SVD (nearly square)",
        convex=True,
        degree=1.0,
        invariances=("orthogonal", "permutation"),
    )

    def __post_init__(self) -> None:
        require(
            math.isfinite(self.smoothing) and self.smoothing >= 0,
            f"smoothing must be finite and not negative, got {self.smoothing!r}",
        )
        if self.smoothing > 0:
            self._specialize(degree=None, smooth=True)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(smoothing=0.5)

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        if self.smoothing > 0:
            return super().value_and_grad(w)
        q, value = polar(w)
        return value, q

    def _value(self, s: Tensor) -> Tensor:
        return gauges.smoothed_l1(s, self.smoothing)

    def _gradient(self, s: Tensor, tie: float) -> Tensor:
        return gauges.smoothed_l1_gradient(s, self.smoothing)

    def _prox(self, s: Tensor, step: float) -> Tensor:
        return gauges.smoothed_l1_prox(s, self.smoothing, step)

    def _lmo(self, s: Tensor, tie: float) -> Tensor:
        return gauges.smoothed_l1_lmo(s, self.smoothing) if self.smoothing > 0 else gauges.top_k_gradient(s, 1, tie)
