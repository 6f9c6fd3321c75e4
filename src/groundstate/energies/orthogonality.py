"""Orthogonality of the rows or columns of a weight, whichever are fewer: its singular values shall all be one.

    SoftOrthogonality  ||G - I||_F^2 = sum_i (s_i^2 - 1)^2        SpectralIsometry  ||G - I||_2^2 = max_i (s_i^2 - 1)^2

G is the Gram matrix of the smaller side. (The published code of SRIP takes the Gram of the columns even where these are
more than the rows; then G - I has the eigenvalue -1 whatever the weight is, and the penalty cannot reach zero.)

Reference: N. Bansal, X. Chen, Z. Wang, "Can we gain more from orthogonality regularizations in training deep CNNs?"
(2018), which estimates the norm of G - I by one power iteration; here it is exact.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from groundstate.energies.base import Traits
from groundstate.energies.unitarily_invariant import UnitarilyInvariant


@dataclass(frozen=True, repr=False)
class SoftOrthogonality(UnitarilyInvariant):
    """Squared Frobenius distance of the Gram matrix of the smaller side from the identity.

    >>> SoftOrthogonality().value(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))  # (4 - 1)^2
    tensor(9.)
    """

    name: ClassVar[str] = "orthogonality"
    traits: ClassVar[Traits] = Traits(
        formula="||G - I||_F^2 = sum_i (s_i^2 - 1)^2, G the Gram matrix of the smaller side",
        reference="Bansal, Chen, Wang 2018, eq. (2)",
        cost="one SVD",
        convex=False,
        degree=None,
        invariances=("orthogonal", "permutation"),
        smooth=True,
    )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(),)

    def _value(self, s: Tensor) -> Tensor:
        return (s.square() - 1).square().sum(-1)

    def _gradient(self, s: Tensor, tie: float) -> Tensor:
        return 4 * s * (s.square() - 1)


@dataclass(frozen=True, repr=False)
class SpectralIsometry(UnitarilyInvariant):
    """Squared spectral distance of the Gram matrix of the smaller side from the identity (SRIP).

    The gradient is shared among singular values that are equally far from one.

    >>> SpectralIsometry().value(torch.tensor([[2.0, 0.0], [0.0, 1.0]]))
    tensor(9.)
    """

    name: ClassVar[str] = "srip"
    aliases: ClassVar[tuple[str, ...]] = ("spectral_isometry",)
    traits: ClassVar[Traits] = Traits(
        formula="||G - I||_2^2 = max_i (s_i^2 - 1)^2, G the Gram matrix of the smaller side",
        reference="Bansal, Chen, Wang 2018, eq. (5)",
        cost="one SVD",
        convex=False,
        degree=None,
        invariances=("orthogonal", "permutation"),
    )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(),)

    def _value(self, s: Tensor) -> Tensor:
        if s.shape[-1] == 0:
            return s.sum(-1)
        return (s.square() - 1).square().amax(-1)

    def _gradient(self, s: Tensor, tie: float) -> Tensor:
        if s.shape[-1] == 0:
            return s
        off = (s.square() - 1).abs()
        worst = off >= off.amax(-1, keepdim=True) * (1 - 2 * tie)
        return torch.where(worst, 4 * s * (s.square() - 1), 0.0) / worst.sum(-1, keepdim=True)
