"""log det(I + W^T W / e^2) and its gradient by a Cholesky factor of the Gram matrix of the smaller side.

With G = W^T W + e^2 I = L L^T for the n columns of a tall W (the rows of a wide one)::

    value = 2 sum_i log(L_ii / e),      gradient = 2 W G^{-1}

No singular values are needed. The Gram matrix carries an error of eps * sigma_1^2, which matters relative to e^2: it is
formed in float64 where float32 is not enough (or where W^T W would be lost beside e^2 I), and where that is not enough
either the answer is ``None`` and the caller takes the singular values.

Reference: M. Fazel, H. Hindi, S. Boyd, "Log-det heuristic for matrix rank minimization" (2003).
"""

from __future__ import annotations

import torch
from torch import Tensor

from groundstate.norms.spectral import prepare

# Bounds on ||W^T W||_F / e^2. Above, rounding in it shows in the directions that count least (relative error about eps
# times it); below, it is lost beside the identity (relative error of the value about eps over it).
_SMALLEST_SINGLE, _LARGEST_SINGLE = 1e-2, 1e2
_SMALLEST_DOUBLE, _LARGEST_DOUBLE = 1e-5, 1e6


def value(w: Tensor, e: float) -> Tensor | None:
    """Returns log det(I + W^T W / e^2), ``(*batch,)``, or ``None`` where sigma_1 / e is too large for a Gram matrix.

    Differentiable. Arguments and errors as of `groundstate.norms.spectral.singular_values`.
    """
    factored = _factor(w, e)
    if factored is None:
        return None
    return _from_factor(factored[1], e).to(torch.float64 if w.dtype == torch.float64 else torch.float32)


def value_and_gradient(w: Tensor, e: float) -> tuple[Tensor, Tensor] | None:
    """Returns the value and 2 W (W^T W + e^2 I)^{-1} in the dtype of w, without an autograd graph, or ``None``."""
    with torch.no_grad():
        w = w.detach()
        factored = _factor(w, e)
        if factored is None:
            return None
        tall, factor = factored
        gradient = 2 * torch.cholesky_solve(tall.mT, factor).mT
        if w.shape[-2] < w.shape[-1]:
            gradient = gradient.mT
        single = torch.float64 if w.dtype == torch.float64 else torch.float32
        return _from_factor(factor, e).to(single), gradient.to(w.dtype)


def _from_factor(factor: Tensor, e: float) -> Tensor:
    return 2 * (factor.diagonal(dim1=-2, dim2=-1) / e).log().sum(-1)


def _factor(w: Tensor, e: float) -> tuple[Tensor, Tensor] | None:
    """Returns the tall matrix, float32 or float64, and the Cholesky factor of its Gram matrix plus e^2 I."""
    work, scale = prepare(w)
    if scale is not None or not 1e-12 < e < 1e12:
        return None
    tall = work.mT if w.shape[-2] < w.shape[-1] else work
    gram = tall.mT @ tall
    size = float(torch.linalg.vector_norm(gram.detach(), dim=(-2, -1)).max()) / e**2 if gram.numel() else 0.0
    if tall.dtype == torch.float32 and not _SMALLEST_SINGLE < size < _LARGEST_SINGLE:
        tall = tall.double()
        gram = tall.mT @ tall
    if tall.dtype == torch.float64 and not _SMALLEST_DOUBLE < size < _LARGEST_DOUBLE:
        return None
    shifted = gram + e**2 * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    return None if bool(failed.any()) else (tall, factor)
