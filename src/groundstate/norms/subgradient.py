"""How far a subgradient from somewhere else is from one here.

Idea: a subgradient G of a convex E at W0 bounds E from below everywhere, so E(W) itself tells how good G still is::

    E(W) - (<G, W> + shift)  >=  0,      shift = E(W0) - <G, W0>;   0 for norms

is zero where G is a subgradient at W, and small as long as following G does nearly what following a fresh one would.
The bound is as exact as G is: a polar factor from a float32 Gram matrix is not quite of operator norm 1, and
`excess_norm` bounds by how much.

Reference: R. T. Rockafellar, "Convex Analysis" (1970), section 23.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from groundstate.norms.polar_gram import symmetric_product
from groundstate.norms.spectral import working_dtype

ROUNDING = 32.0  # rounding errors of a value and of inner products, in units of eps times what they grow with


def excess_norm(q: Tensor) -> float:
    """Returns a bound of ||Q||_2 - 1, for ``(m, n)`` that is a partial isometry up to small errors.

    The eigenvalues mu of M = Q^T Q have |mu (mu - 1)| <= ||M^2 - M||_F, so that none is above 1 by more than that.

    Cost: 2 m n^2 + 2 n^3 flops, n the smaller side.

    >>> excess_norm(torch.eye(3)) < 1e-5
    True
    """
    work = q.detach().to(working_dtype(q.dtype))
    m = symmetric_product(work if work.shape[0] < work.shape[1] else work.mT)
    found = float(torch.linalg.matrix_norm(torch.addmm(m, m, m, beta=-1)))
    return found / 2 + 8 * torch.finfo(work.dtype).eps * (1 + len(m) ** 0.5)


def inner(gradients: Sequence[Tensor], weights: Sequence[Tensor]) -> float:
    """Returns <G, W>, of matrices of one dtype or of gradients in half precision.

    >>> inner([torch.ones(2, 2)], [torch.eye(2)])
    2.0
    """
    total = 0.0
    for g, w in zip(gradients, weights, strict=True):
        dtype = working_dtype(w.dtype)
        total += float(torch.vdot(g.detach().to(dtype).reshape(-1), w.detach().to(dtype).reshape(-1)))
    return total


def rounding(gradients: Sequence[Tensor], weights: Sequence[Tensor], value: float) -> float:
    """Returns a bound of the relative errors of a value and of <G, W>, both as computed in the dtype of the weights.

    >>> rounding([torch.zeros(1, 1)], [torch.zeros(1, 1)], 0.0) == 4 * ROUNDING * torch.finfo(torch.float32).eps
    True
    """
    eps = torch.finfo(working_dtype(weights[0].dtype)).eps
    norms = [_length(g) * _length(w) for g, w in zip(gradients, weights, strict=True)]
    return ROUNDING * eps * (4 + (sum(norms) / value if value > 0 else 0.0))


def _length(a: Tensor) -> float:
    """The Frobenius norm; added up in float64, which is slower, where squares may leave the range."""
    found = float(torch.linalg.vector_norm(a.detach().to(working_dtype(a.dtype))))
    return found if 1e-12 < found < torch.inf else float(torch.linalg.vector_norm(a.detach(), dtype=torch.float64))
