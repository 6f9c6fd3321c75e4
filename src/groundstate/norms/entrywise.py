"""Functions of the entries of a matrix: the l1 norm, the Frobenius norm and its square.

Shapes ``(*batch, m, n)`` to ``(*batch,)``. Values are float64 for float64 and float32 otherwise; gradients and proximal
points have the dtype of the matrix. All are differentiable by autograd. The Frobenius norm scales by a power of two, so
that it neither overflows nor underflows where the norm itself is representable; its square may overflow to infinity.

Reference: N. Parikh, S. Boyd, "Proximal algorithms" (2014), section 6.5.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groundstate.errors import UsageError
from groundstate.norms import gauges
from groundstate.norms.spectral import prepare, refuse_nonfinite, working_dtype

_MATRIX = (-2, -1)


def l1(w: Tensor) -> Tensor:
    """Returns sum |w_ij|.

    >>> l1(torch.tensor([[1.0, -2.0]]))
    tensor(3.)
    """
    return _checked(_working(w).abs().sum(_MATRIX), w)


def l1_prox(w: Tensor, step: float) -> Tensor:
    """Returns the soft threshold sign(w_ij) (|w_ij| - step)_+."""
    return gauges.soft_threshold(w, step)


def l1_lmo(g: Tensor) -> Tensor:
    """Returns argmin over sum |u_ij| <= 1 of <g, u>: minus the sign of g at its first largest entry, 0 for g = 0."""
    if g.numel() == 0:
        return torch.zeros_like(g)
    flat = _working(g).flatten(-2)
    place = flat.abs().argmax(-1, keepdim=True)
    chosen = torch.zeros_like(flat).scatter(-1, place, -flat.sign().gather(-1, place))
    return chosen.view(g.shape).to(g.dtype)


def largest(w: Tensor) -> Tensor:
    """Returns max |w_ij|, 0 for an empty matrix: the dual norm of l1."""
    work = _working(w)
    if work.shape[-2] * work.shape[-1] == 0:
        return work.sum(_MATRIX)
    return _checked(work.abs().amax(_MATRIX), w)


def squared_frobenius(w: Tensor) -> Tensor:
    """Returns sum w_ij^2; infinite where that exceeds the range (entries above about 1e19 in float32).

    >>> squared_frobenius(torch.tensor([[3.0, 4.0]]))
    tensor(25.)
    """
    return _checked(_working(w).square().sum(_MATRIX), w)


def frobenius(w: Tensor) -> Tensor:
    """Returns (sum w_ij^2)^(1/2), at any scale.

    >>> frobenius(torch.tensor([[3.0, 4.0]]))
    tensor(5.)
    """
    work, scale = prepare(w)
    norm = torch.linalg.vector_norm(work, dim=_MATRIX)
    return norm if scale is None else (norm * scale[..., 0, 0]).to(norm.dtype)


def frobenius_direction(w: Tensor) -> Tensor:
    """Returns W / ||W||_F, 0 for a zero matrix: the minimal-norm subgradient of the Frobenius norm."""
    work, _ = prepare(w)
    norm = torch.linalg.vector_norm(work, dim=_MATRIX, keepdim=True)
    return (work / torch.where(norm > 0, norm, 1.0)).to(w.dtype)


def frobenius_prox(w: Tensor, step: float) -> Tensor:
    """Returns the block soft threshold (1 - step / ||W||_F)_+ W."""
    norm = frobenius(w)[..., None, None]
    kept = 1 - step / torch.where(norm > step, norm, 1.0)
    return torch.where(norm > step, w * kept, 0.0).to(w.dtype)


def _working(w: Tensor) -> Tensor:
    if w.ndim < 2 or not w.is_floating_point():
        raise UsageError(f"expected a real floating-point matrix (*batch, out, in), got {w.dtype} {tuple(w.shape)}")
    return w.to(working_dtype(w.dtype))


def _checked(value: Tensor, w: Tensor) -> Tensor:
    """Returns the value, unless it is not finite because the matrix is not."""
    if not bool(value.detach().isfinite().all()):
        refuse_nonfinite(w)
    return value
