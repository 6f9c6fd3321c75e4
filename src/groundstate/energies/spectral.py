"""Energies of the singular values of a weight matrix: nuclear norm and its relatives.

Idea: each is a symmetric function f of the singular values; a class below says which, and `unitarily_invariant` lifts
it to matrices. None changes when W is multiplied by orthogonal matrices from either side, so none changes when neurons
are permuted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

from torch import Tensor

from groundstate.energies.base import Traits, is_whole, require
from groundstate.energies.capabilities import Anchor
from groundstate.energies.unitarily_invariant import (
    SpectralNorm,
    SpectralProximable,
    UnitarilyInvariant,
    require_step,
)
from groundstate.norms import gauges, k_support, log_det, spectral
from groundstate.norms.polar import polar
from groundstate.norms.subgradient import excess_norm
from groundstate.norms.thresholding import singular_value_threshold


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
        cost="one eigh of the smaller side; an SVD where most singular values are small",
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

    def prox(self, w: Tensor, step: float) -> Tensor:
        if self.smoothing > 0:
            return super().prox(w, step)
        require_step(step)
        return singular_value_threshold(w, step)

    def anchor(self, weights: Sequence[Tensor]) -> Anchor:
        found = super().anchor(weights)
        return found if self.smoothing > 0 else found._replace(slack=found.slack + excess_norm(found.gradients[0]))

    def _value(self, s: Tensor) -> Tensor:
        return gauges.smoothed_l1(s, self.smoothing)

    def _gradient(self, s: Tensor, tie: float) -> Tensor:
        return gauges.smoothed_l1_gradient(s, self.smoothing)

    def _prox(self, s: Tensor, step: float) -> Tensor:
        return gauges.smoothed_l1_prox(s, self.smoothing, step)

    def _lmo(self, s: Tensor, tie: float) -> Tensor:
        return gauges.smoothed_l1_lmo(s, self.smoothing) if self.smoothing > 0 else gauges.top_k_gradient(s, 1, tie)


@dataclass(frozen=True, repr=False)
class Schatten(SpectralProximable):
    """Sum of the p-th powers of the singular values, the Schatten-p norm to the power p: no root is taken.

    p = 1 is the nuclear norm, p = 2 the squared Frobenius norm. For p < 1 it is not convex, approaches the rank as p
    falls, and its slope at zero is infinite: singular values that count as zero get gradient 0, and the proximal map
    (closed form for p = 1/2 and 2/3) sets small ones to zero in a jump.

    Attributes:
        p: Any finite number above 0.

    Reference: F. Nie, H. Huang, C. Ding, "Low-rank matrix recovery via efficient Schatten p-norm minimization" (2012).

    >>> import torch
    >>> Schatten(p=0.5).value(torch.diag(torch.tensor([4.0, 9.0])))
    tensor(5.)
    """

    p: float

    name: ClassVar[str] = "schatten"
    traits: ClassVar[Traits] = Traits(
        formula="sum_i sigma_i(W)^p (degree p; convex for p >= 1)",
        reference="Nie, Huang and Ding 2012",
        cost="one SVD",
        convex=False,
        degree=None,
        invariances=("orthogonal", "permutation"),
    )

    def __post_init__(self) -> None:
        require(math.isfinite(self.p) and self.p > 0, f"p must be finite and positive, got {self.p!r}")
        self._specialize(convex=self.p >= 1, degree=float(self.p), smooth=self.p > 1)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return tuple(cls(p=p) for p in (0.5, 2 / 3, 0.8, 1.0, 1.5, 2.0, 3.0))

    def _value(self, s: Tensor) -> Tensor:
        return gauges.power(s, self.p)

    def _gradient(self, s: Tensor, tie: float) -> Tensor:
        return gauges.power_gradient(s, self.p)

    def _prox(self, s: Tensor, step: float) -> Tensor:
        return gauges.power_prox(s, self.p, step)


@dataclass(frozen=True, repr=False)
class OperatorNorm(SpectralNorm):
    """Largest singular value: the Lipschitz constant of the linear map. Dual to the nuclear norm.

    The gradient is u_1 v_1^T, shared evenly where singular values tie for the largest. The linear minimizer is minus
    the polar factor: the direction of the Muon optimizer.

    Reference: Y. Yoshida, T. Miyato, "Spectral norm regularization for improving the generalizability of deep learning"
    (2017).

    >>> import torch
    >>> OperatorNorm().value(torch.diag(torch.tensor([3.0, 4.0])))
    tensor(4.)
    """

    name: ClassVar[str] = "operator"
    traits: ClassVar[Traits] = Traits(
        formula="max_i sigma_i(W)",
        reference="Yoshida and Miyato 2017",
        cost="one SVD",
        convex=True,
        degree=1.0,
        invariances=("orthogonal", "permutation"),
    )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(),)

    def dual(self, g: Tensor) -> Tensor:
        return spectral.singular_values(g).sum(-1)

    def lmo(self, g: Tensor) -> Tensor:
        return -polar(g)[0]

    def _value(self, s: Tensor) -> Tensor:
        return gauges.top_k(s, 1)

    def _gradient(self, s: Tensor, tie: float) -> Tensor:
        return gauges.top_k_gradient(s, 1, tie)

    def _prox(self, s: Tensor, step: float) -> Tensor:
        return gauges.top_k_prox(s, 1, step)

    def _lmo(self, s: Tensor, tie: float) -> Tensor:
        return s.sign()


@dataclass(frozen=True, repr=False)
class KyFan(SpectralNorm):
    """Sum of the k largest singular values; k above the number of singular values acts as that number.

    k = 1 is the operator norm, k = min(out, in) the nuclear norm. Its dual is max(sigma_1, nuclear norm / k).

    Attributes:
        k: How many, at least 1.

    Reference: K. Fan, "Maximum properties and inequalities for the eigenvalues of completely continuous operators"
    (1951).

    >>> import torch
    >>> KyFan(k=2).value(torch.diag(torch.tensor([3.0, 4.0, 1.0])))
    tensor(7.)
    """

    k: int

    name: ClassVar[str] = "ky_fan"
    traits: ClassVar[Traits] = Traits(
        formula="sigma_1(W) + ... + sigma_k(W)",
        reference="Fan 1951",
        cost="one SVD",
        convex=True,
        degree=1.0,
        invariances=("orthogonal", "permutation"),
    )

    def __post_init__(self) -> None:
        _require_count(self.k)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(k=1), cls(k=3)

    def _value(self, s: Tensor) -> Tensor:
        return gauges.top_k(s, self.k)

    def _gradient(self, s: Tensor, tie: float) -> Tensor:
        return gauges.top_k_gradient(s, self.k, tie)

    def _prox(self, s: Tensor, step: float) -> Tensor:
        return gauges.top_k_prox(s, self.k, step)

    def _dual(self, s: Tensor) -> Tensor:
        return gauges.top_k_dual(s, self.k)

    def _lmo(self, s: Tensor, tie: float) -> Tensor:
        return gauges.top_k_lmo(s, self.k, tie)


@dataclass(frozen=True, repr=False)
class SpectralKSupport(SpectralNorm):
    """Spectral k-support norm: the tightest convex surrogate of "rank at most k and Frobenius norm at most 1".

    Between the nuclear norm (k = 1) and the Frobenius norm (k = min(out, in) or more), falling with k. Large singular
    values are treated as by the Frobenius norm, small ones as by the nuclear norm. Its dual is the l2 norm of the k
    largest singular values.

    Attributes:
        k: At least 1.

    Reference: A. McDonald, M. Pontil, D. Stamos, "Spectral k-support norm regularization" (2014).

    >>> import torch
    >>> SpectralKSupport(k=2).value(torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0])))
    tensor(7.0711)
    """

    k: int

    name: ClassVar[str] = "k_support"
    traits: ClassVar[Traits] = Traits(
        formula="(sum_{i<=j} sigma_i^2 + (sum_{i>j} sigma_i)^2 / (k - j))^(1/2), j < k splitting large from small",
        reference="McDonald, Pontil and Stamos 2014",
        cost="one SVD",
        convex=True,
        degree=1.0,
        invariances=("orthogonal", "permutation"),
    )

    def __post_init__(self) -> None:
        _require_count(self.k)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(k=1), cls(k=3)

    def _value(self, s: Tensor) -> Tensor:
        return k_support.value(s, self.k)

    def _gradient(self, s: Tensor, tie: float) -> Tensor:
        return k_support.gradient(s, self.k)

    def _prox(self, s: Tensor, step: float) -> Tensor:
        return k_support.prox(s, self.k, step)

    def _dual(self, s: Tensor) -> Tensor:
        return k_support.dual(s, self.k)

    def _lmo(self, s: Tensor, tie: float) -> Tensor:
        return k_support.lmo(s, self.k)


@dataclass(frozen=True, repr=False)
class LogDet(SpectralProximable):
    """Logarithm of det(I + W^T W / e^2): the cheapest surrogate of the rank, without singular values.

    Singular values far above e count as nearly equal, those far below as nothing, so e is the size from which a
    direction counts. Not convex. Value and gradient 2 W (W^T W + e^2 I)^{-1} come from a Cholesky factor
    (`groundstate.norms.log_det`).

    Attributes:
        eps: e, in the units of the weights.

    Reference: M. Fazel, H. Hindi, S. Boyd, "Log-det heuristic for matrix rank minimization" (2003).

    >>> import torch
    >>> LogDet(eps=0.5).value(torch.zeros(3, 2))
    tensor(0.)
    """

    eps: float

    name: ClassVar[str] = "log_det"
    traits: ClassVar[Traits] = Traits(
        formula="log det(I + W^T W / e^2) = sum_i log(1 + sigma_i(W)^2 / e^2)",
        reference="Fazel, Hindi and Boyd 2003",
        cost="4 m n min(m, n) flops and a Cholesky factor of size min(m, n)",
        convex=False,
        degree=None,
        invariances=("orthogonal", "permutation"),
        smooth=True,
    )

    def __post_init__(self) -> None:
        require(math.isfinite(self.eps) and self.eps > 0, f"eps must be finite and positive, got {self.eps!r}")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(eps=0.5), cls(eps=0.01)

    def value(self, w: Tensor) -> Tensor:
        by_cholesky = log_det.value(w, self.eps)
        return super().value(w) if by_cholesky is None else by_cholesky

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        by_cholesky = log_det.value_and_gradient(w, self.eps)
        return super().value_and_grad(w) if by_cholesky is None else by_cholesky

    def _value(self, s: Tensor) -> Tensor:
        return gauges.log_sum(s, self.eps)

    def _gradient(self, s: Tensor, tie: float) -> Tensor:
        return gauges.log_sum_gradient(s, self.eps)

    def _prox(self, s: Tensor, step: float) -> Tensor:
        return gauges.log_sum_prox(s, self.eps, step)


@dataclass(frozen=True, repr=False)
class StableRank(UnitarilyInvariant):
    """Squared Frobenius norm over the squared largest singular value: a rank that noise does not change.

    Between 1 and the rank; 0 for the zero matrix, whose gradient is 0. It does not depend on the scale of the weights,
    so its gradient grows as they shrink: a measure first of all.

    Reference: M. Rudelson, R. Vershynin, "Sampling from large matrices: an approach through geometric functional
    analysis" (2007).

    >>> import torch
    >>> StableRank().value(torch.diag(torch.tensor([2.0, 1.0])))
    tensor(1.2500)
    """

    name: ClassVar[str] = "stable_rank"
    traits: ClassVar[Traits] = Traits(
        formula="||W||_F^2 / sigma_1(W)^2",
        reference="Rudelson and Vershynin 2007",
        cost="one SVD",
        convex=False,
        degree=0.0,
        invariances=("orthogonal", "permutation", "scale"),
    )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(),)

    def _value(self, s: Tensor) -> Tensor:
        return gauges.stable_rank(s)

    def _gradient(self, s: Tensor, tie: float) -> Tensor:
        return gauges.stable_rank_gradient(s, tie)


def _require_count(k: object) -> None:
    require(is_whole(k, 1), f"k must be a whole number from 1, got {k!r}")
