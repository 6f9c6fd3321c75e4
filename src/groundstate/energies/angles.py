"""What else spreads the directions of neurons: the smallest angles, a Gaussian potential, the volume they span.

    MinimumAngle     -mean_i min_j angle(u_i, u_j)          Uniformity  log mean over pairs of exp(-t ||u_i - u_j||^2)
    GramDeterminant  -log det(K + 1e-6 I),  K_ij = exp(-||u_i - u_j||^2)

References: Z. Wang, C. Xiang, W. Zou, C. Xu, "MMA regularization: decorrelating weights of neural networks by
maximizing the minimal angles" (2020); T. Wang, P. Isola, "Understanding contrastive representation learning through
alignment and uniformity on the hypersphere" (2020), eq. (6); W. Liu, R. Lin, Z. Liu, L. Xiong, B. Schoelkopf,
A. Weller, "Learning with hyperspherical uniformity" (2021), maximum Gram determinant.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from groundstate.energies.base import MatrixEnergy, Traits, is_number, recording, require
from groundstate.energies.hyperspherical import of_live
from groundstate.norms.spectral import refuse_nonfinite, working_dtype
from groundstate.norms.sphere.autograd import differentiable

_ROWS = 256  # rows of the matrix of cosines held at once
_SINGLE = 15


class OfDirections(MatrixEnergy):
    """An energy of the directions of neurons; those that are exactly zero have none and stay where they are."""

    view: ClassVar[Any] = "neurons"
    smallest: ClassVar[tuple[int, int]] = (2, 2)
    quick_rows: ClassVar[int | None] = 8192

    @abstractmethod
    def of_directions(self, u: Tensor) -> Tensor:
        """Returns E of unit vectors in rows, ``(N, d)`` with N at least 2, a scalar; differentiable."""

    def value(self, w: Tensor) -> Tensor:
        """Returns E of each matrix of neurons in rows, ``(*batch, N, d)`` to ``(*batch,)``.

        Zero where fewer than two neurons are not zero.

        Raises:
            NonFiniteError: NaN or infinite weights.
        """
        refuse_nonfinite(w)
        return of_live(w, self._each)[0]

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        with recording():
            leaf = w.detach().clone().requires_grad_()
            value = self.value(leaf)
            (grad,) = torch.autograd.grad(value.sum(), leaf)
        return value.detach(), grad.detach()

    def _each(self, w: Tensor) -> tuple[Tensor]:
        found = [self.of_directions(_directions(x)) for x in w.reshape(-1, *w.shape[-2:])]
        return (torch.stack(found).reshape(w.shape[:-2]),)


def _directions(w: Tensor) -> Tensor:
    wide = w.to(working_dtype(w.dtype))
    wide = wide[(wide != 0).any(-1)]
    wide = wide / wide.detach().abs().amax(-1, keepdim=True)  # so that squares neither overflow nor vanish
    return wide / torch.linalg.vector_norm(wide, dim=-1, keepdim=True)


@dataclass(frozen=True, repr=False)
class MinimumAngle(OfDirections):
    """Minus the mean, over neurons, of the angle to the nearest one (MMA): only nearest neighbors repel.

    Opposite neurons attain the largest angle, pi. Neurons that coincide have no direction to part, opposite ones none
    to part further, and get no gradient.

    >>> MinimumAngle().value(torch.eye(2))  # -pi / 2
    tensor(-1.5708)
    """

    name: ClassVar[str] = "mma"
    aliases: ClassVar[tuple[str, ...]] = ("minimum_angle",)
    traits: ClassVar[Traits] = Traits(
        formula="-mean_i min_{j != i} angle(u_i, u_j), u the directions of the neurons",
        reference="Wang, Xiang, Zou, Xu 2020",
        cost="N^2 d flops; memory of 256 rows of cosines",
        convex=False,
        degree=0.0,
        invariances=("scale",),
    )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(),)

    def of_directions(self, u: Tensor) -> Tensor:
        with torch.no_grad():
            nearest = torch.cat([_nearest(u, rows) for rows in torch.arange(len(u), device=u.device).split(_ROWS)])
        v = u[nearest]
        # the half angle by both of its sides: the arc sine of one has no digits left where the other is short
        chord, opposite = torch.linalg.vector_norm(u - v, dim=-1), torch.linalg.vector_norm(u + v, dim=-1)
        return -2 * torch.atan2(chord, opposite).mean()


def _nearest(u: Tensor, rows: Tensor) -> Tensor:
    cosines = u[rows] @ u.mT
    cosines[torch.arange(len(rows), device=u.device), rows] = -math.inf
    return cosines.argmax(-1)


@dataclass(frozen=True, repr=False)
class Uniformity(OfDirections):
    """Logarithm of the mean Gaussian potential of pairs of neurons (Wang-Isola uniformity).

    Attributes:
        t: Sharpness of the potential.

    >>> Uniformity(t=2.0).value(torch.eye(3))  # all squared distances are 2
    tensor(-4.)
    """

    t: float = 2.0

    name: ClassVar[str] = "uniformity"
    traits: ClassVar[Traits] = Traits(
        formula="log mean over pairs of exp(-t ||u_i - u_j||^2), u the directions of the neurons",
        reference="Wang, Isola 2020, eq. (6)",
        cost="4 N^2 d flops; memory of 256 rows of cosines",
        convex=False,
        degree=0.0,
        invariances=("scale",),
    )

    def __post_init__(self) -> None:
        fits = is_number(self.t) and 0 < self.t <= 150
        require(
            fits, f"t must be positive and at most 150 (beyond, the potential of opposite neurons is 0), got {self.t!r}"
        )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(t=0.5)

    def of_directions(self, u: Tensor) -> Tensor:
        return differentiable(u, self._potential)[0]

    def _potential(self, u: Tensor, gradient: bool) -> tuple[tuple[Tensor], Tensor | None]:
        """Returns the value and the gradient by the directions, in blocks of rows."""
        wide = u if self.t <= _SINGLE else u.double()  # beyond, exp(-4 t) leaves the range of float32
        total, slopes = 0.0, []
        for rows in torch.arange(len(u), device=u.device).split(_ROWS):
            k = torch.exp(self.t * (2 * (wide[rows] @ wide.mT) - 2))
            k[torch.arange(len(rows), device=u.device), rows] = 0
            total += float(k.sum(dtype=torch.float64))
            if gradient:
                slopes.append(k @ wide)
        value = u.new_tensor(math.log(total / (len(u) * (len(u) - 1))))
        return (value,), (torch.cat(slopes) * (4 * self.t / total)).to(u.dtype) if gradient else None


@dataclass(frozen=True, repr=False)
class GramDeterminant(OfDirections):
    """Minus the log-determinant of the Gaussian kernel matrix of the neurons (MGD): the volume that they span.

    Attributes:
        ridge: Added to the diagonal, so that neurons that coincide stay finite.

    >>> round(GramDeterminant().value(torch.eye(2)).item(), 4)  # -log(1 - exp(-2)^2)
    0.0185
    """

    ridge: float = 1e-6

    name: ClassVar[str] = "mgd"
    aliases: ClassVar[tuple[str, ...]] = ("gram_determinant",)
    quick_rows: ClassVar[int | None] = 512
    traits: ClassVar[Traits] = Traits(
        formula="-log det(K + ridge I), K_ij = exp(-||u_i - u_j||^2), u the directions of the neurons",
        reference="Liu, Lin, Liu, Xiong, Schoelkopf, Weller 2021, maximum Gram determinant",
        cost="one Cholesky factorization of size N; memory of N^2 numbers",
        convex=False,
        degree=0.0,
        invariances=("scale",),
    )

    def __post_init__(self) -> None:
        require(is_number(self.ridge) and self.ridge > 0, f"ridge must be finite and positive, got {self.ridge!r}")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (cls(),)

    def of_directions(self, u: Tensor) -> Tensor:
        wide = u.double()  # the ridge is below the rounding of float32
        k = torch.exp(2 * (wide @ wide.mT) - 2)
        k = k + self.ridge * torch.eye(len(u), dtype=k.dtype, device=k.device)
        return (-2 * torch.linalg.cholesky(k).diagonal().log().sum()).to(u.dtype)
