"""Energies of the entries of a weight matrix: the l1 norm, the Frobenius norm and its square.

No decomposition is needed, and each has a proximal map in closed form: the soft threshold entry by entry (l1), on the
matrix as one block (Frobenius), and a plain shrinkage (its square, ordinary weight decay up to a factor).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor

from groundstate.energies.base import MatrixEnergy, Traits
from groundstate.energies.capabilities import Dualizable, Proximable, Spectral
from groundstate.energies.unitarily_invariant import require_step
from groundstate.norms import entrywise


@dataclass(frozen=True, repr=False)
class L1(MatrixEnergy, Proximable, Dualizable):
    """Sum of absolute values of the entries: minimizing it makes entries exactly zero (through the prox).

    Reference: R. Tibshirani, "Regression shrinkage and selection via the lasso" (1996).

    >>> L1().value(torch.tensor([[1.0, -2.0]]))
    tensor(3.)
    """

    name: ClassVar[str] = "l1"
    traits: ClassVar[Traits] = Traits(
        formula="sum_ij |w_ij|",
        reference="Tibshirani 1996",
        cost="one pass over the weights",
        convex=True,
        degree=1.0,
        invariances=("permutation", "sign"),
    )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(),)

    def value(self, w: Tensor) -> Tensor:
        return entrywise.l1(w)

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        w = w.detach()
        return entrywise.l1(w), w.sign()

    def prox(self, w: Tensor, step: float) -> Tensor:
        require_step(step)
        return entrywise.l1_prox(w.detach(), step)

    def dual(self, g: Tensor) -> Tensor:
        return entrywise.largest(g)

    def lmo(self, g: Tensor) -> Tensor:
        return entrywise.l1_lmo(g.detach())


@dataclass(frozen=True, repr=False)
class SquaredFrobenius(MatrixEnergy, Spectral, Proximable):
    """Sum of squares of the entries; no factor 1/2, so the gradient is 2W.

    Equals the sum of squares of the singular values. Infinite where that exceeds the range of the result: in float32,
    for entries above about 1e19 (the gradient stays finite).

    >>> SquaredFrobenius().value(torch.tensor([[3.0, 4.0]]))
    tensor(25.)
    """

    name: ClassVar[str] = "squared_frobenius"
    traits: ClassVar[Traits] = Traits(
        formula="sum_ij w_ij^2 = sum_i sigma_i(W)^2",
        reference="Hoerl and Kennard 1970 (ridge); Krogh and Hertz 1991 (weight decay)",
        cost="one pass over the weights",
        convex=True,
        degree=2.0,
        invariances=("orthogonal", "permutation", "sign"),
        smooth=True,
    )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(),)

    def value(self, w: Tensor) -> Tensor:
        return entrywise.squared_frobenius(w)

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        w = w.detach()
        return entrywise.squared_frobenius(w), 2 * w

    def of_singular_values(self, s: Tensor) -> Tensor:
        return s.square().sum(-1)

    def prox(self, w: Tensor, step: float) -> Tensor:
        require_step(step)
        return w.detach() / (1 + 2 * step)


@dataclass(frozen=True, repr=False)
class Frobenius(MatrixEnergy, Spectral, Proximable, Dualizable):
    """Square root of the sum of squares of the entries: the group lasso with the matrix as its group.

    Its own dual norm. At any scale the value is finite wherever the norm itself is.

    Reference: M. Yuan, Y. Lin, "Model selection and estimation in regression with grouped variables" (2006).

    >>> Frobenius().value(torch.tensor([[3.0, 4.0]]))
    tensor(5.)
    """

    name: ClassVar[str] = "frobenius"
    traits: ClassVar[Traits] = Traits(
        formula="(sum_ij w_ij^2)^(1/2) = (sum_i sigma_i(W)^2)^(1/2)",
        reference="Yuan and Lin 2006",
        cost="two passes over the weights",
        convex=True,
        degree=1.0,
        invariances=("orthogonal", "permutation", "sign"),
    )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(),)

    def value(self, w: Tensor) -> Tensor:
        return entrywise.frobenius(w)

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        w = w.detach()
        return entrywise.frobenius(w), entrywise.frobenius_direction(w)

    def of_singular_values(self, s: Tensor) -> Tensor:
        return torch.linalg.vector_norm(s.double(), dim=-1).to(s.dtype)

    def prox(self, w: Tensor, step: float) -> Tensor:
        require_step(step)
        return entrywise.frobenius_prox(w.detach(), step)

    def dual(self, g: Tensor) -> Tensor:
        return entrywise.frobenius(g)

    def lmo(self, g: Tensor) -> Tensor:
        return -entrywise.frobenius_direction(g.detach())
