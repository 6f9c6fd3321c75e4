"""The polar factor of a matrix, W = Q H with H = (W^T W)^(1/2): the gradient of the nuclear norm.

Idea: two routes give Q and ||W||_* = tr H exactly. The SVD, Q = U V^T, always works. The eigendecomposition of the Gram
matrix of the smaller side, Q = W V diag(1/sigma) V^T, is faster for matrices that are not nearly square, but squares
the condition number. Its error is known beforehand: a Gram matrix rounded to eps moves Q, relative to its norm, by
about::

    eps * sigma_1^2 * rms(1 / sigma_i^2)

So ``route="auto"`` tries the Gram matrix in float32, then in float64, then the SVD, and takes the first whose estimate
is small enough. Singular values that count as zero (`spectral.tolerance`, with the eps of the weights, not that of the
Gram matrix) get none of Q: the minimal-norm subgradient.

Reference: N. Higham, "Functions of Matrices" (2008), chapter 8.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from groundstate.errors import UsageError
from groundstate.norms.spectral import LinAlgError, above_tolerance, assemble, prepare, svd, tolerance

Route = Literal["auto", "svd", "gram"]

# Above this ratio of the sides the Gram matrix is nearly as large as the matrix, and the SVD as fast; below this
# product of the sides times the smaller one, too.
_ASPECT = 0.7
_SMALL = 1e6
# Bounds on the estimated relative error of Q: float32 weights in a float32 and a float64 Gram matrix, float64 weights.
_TRUST_SINGLE = 5e-5
_TRUST_SINGLE_IN_DOUBLE = 1e-6
_TRUST_DOUBLE = 1e-11
# A float32 Gram matrix is no use below this ratio of its eigenvalues, whatever the estimate.
_SMALLEST_RATIO = 1e-4
# Bound on eps * sigma_1 * rms(1 / sigma_i), the error of the product W Z in float32.
_TRUST_PRODUCT = 2e-5


def polar(w: Tensor, route: Route = "auto") -> tuple[Tensor, Tensor]:
    """Returns the minimal-norm polar factor and the nuclear norm, without an autograd graph.

    Args:
        w: ``(*batch, m, n)``, any scale; m or n may be 0. In a batch each matrix takes the first route that is accurate
            enough for it.
        route: ``"svd"``; ``"gram"``, the Gram matrix for any shape, and the SVD only where that is not accurate
            enough; ``"auto"``, the same for min(m, n) <= 0.7 max(m, n) unless the matrix is small, else the SVD.

    Returns:
        ``(q, value)``: q of the shape and dtype of w, value ``(*batch,)``, float64 for float64 and float32 otherwise.

    Raises:
        UsageError: an unknown route, or not a real floating-point matrix.
        NonFiniteError: w holds NaN or infinity, or no decomposition converges.

    Cost: 4 m n min(m, n) flops and an ``eigh`` of size min(m, n), in float32, sometimes float64 too; or one SVD.

    >>> polar(torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
    (tensor([[0., 1.],
            [0., 0.]]), tensor(3.))
    """
    if route not in ("auto", "svd", "gram"):
        raise UsageError(f"route must be 'auto', 'svd' or 'gram', got {route!r}")
    with torch.no_grad():
        w = w.detach()
        if w.numel() == 0 or route == "svd" or (route == "auto" and not _worth_a_gram(*w.shape[-2:])):
            return _by_svd(w)
        work, scale = prepare(w)
        wide = w.shape[-2] < w.shape[-1]
        flat = (work.mT if wide else work).reshape(-1, max(w.shape[-2:]), min(w.shape[-2:]))
        q, value = _by_best_route(flat, tolerance(w))
        q, value = (q.mT if wide else q).reshape(w.shape), value.reshape(w.shape[:-2])
        return q.to(w.dtype), value if scale is None else (value * scale[..., 0, 0]).to(value.dtype)


def _worth_a_gram(m: int, n: int) -> bool:
    return min(m, n) <= _ASPECT * max(m, n) and m * n * min(m, n) > _SMALL


def _by_svd(w: Tensor) -> tuple[Tensor, Tensor]:
    u, s, vh = svd(w)
    return assemble(u, above_tolerance(s, w).sign(), vh, w), s.sum(-1)


def _by_best_route(tall: Tensor, zero: float) -> tuple[Tensor, Tensor]:
    """Polar factors of ``(batch, m, n)``, m >= n, float32 or float64; singular values up to zero * sigma_1 are zero."""
    if tall.dtype == torch.float64:
        q, value, ok = _by_gram(tall, torch.float64, zero, _TRUST_DOUBLE)
        return _redo(q, value, ok, tall, zero, None)
    q, value, ok = _by_gram(tall, torch.float32, 0.0, _TRUST_SINGLE)
    return _redo(q, value, ok, tall, zero, _TRUST_SINGLE_IN_DOUBLE)


def _redo(
    q: Tensor, value: Tensor, ok: Tensor, tall: Tensor, zero: float, trust: float | None
) -> tuple[Tensor, Tensor]:
    """Repeats the matrices that are not ``ok`` on the next route: a float64 Gram matrix with ``trust``, or the SVD."""
    if bool(ok.all()):
        return q, value
    left = ~ok
    if trust is None:
        u, s, vh = svd(tall[left].double())
        unit = (u * (s > zero * s[..., :1])[..., None, :]) @ vh
        again = unit.to(tall.dtype), s.sum(-1).to(tall.dtype)
    else:
        again = _redo(*_by_gram(tall[left], torch.float64, zero, trust), tall[left], zero, None)
    if bool(left.all()):
        return again
    q[left], value[left] = again
    return q, value


def _by_gram(tall: Tensor, dtype: torch.dtype, zero: float, trust: float) -> tuple[Tensor, Tensor, Tensor]:
    """Polar factors by the Gram matrix in ``dtype``.

    Args:
        tall: ``(batch, m, n)``, m >= n.
        dtype: Of the Gram matrix and its eigendecomposition.
        zero: Singular values up to zero * sigma_1 get none of Q; 0: there must be none.
        trust: Bound on the estimated relative error of Q.

    Returns:
        Q, the nuclear norm, and whether the estimate is within the bound, ``(batch,)``.
    """
    work = tall.to(dtype)
    eps = torch.finfo(dtype).eps
    gram = _gram(work)
    nothing = torch.zeros(tall.shape[0], dtype=torch.bool, device=tall.device)
    if dtype == tall.dtype and not bool(_promising(gram, trust).any()):
        return tall, tall[:, 0, 0], nothing
    try:
        lam, v = torch.linalg.eigh(gram)
    except LinAlgError:
        return tall, tall[:, 0, 0], nothing
    top = lam[:, -1:]
    kept = lam > max(zero**2, lam.shape[-1] * eps) * top
    inverse = torch.where(kept, 1 / torch.where(kept, lam, 1.0), 0.0)
    count = kept.sum(-1).clamp_min(1)
    ok = eps * top[:, 0] * (inverse.square().sum(-1) / count).sqrt() <= trust
    if zero == 0:
        ok &= lam[:, 0] > _SMALLEST_RATIO * top[:, 0]
    else:  # no singular value may be lost in the rounding of the Gram matrix
        ok &= (kept | (lam <= zero**2 * top)).all(-1)
    if not bool(ok.any()):
        return tall, tall[:, 0, 0], nothing
    half = v * inverse.sqrt().sqrt()[:, None, :]
    z = half @ half.mT
    product_error = torch.finfo(tall.dtype).eps * (top[:, 0] * inverse.sum(-1) / count).sqrt()
    in_single = float(product_error[ok].max()) <= _TRUST_PRODUCT
    q = tall @ z.to(tall.dtype) if in_single else (work @ z).to(tall.dtype)
    return q, lam.clamp_min(0).sqrt().sum(-1).to(tall.dtype), ok


def _promising(gram: Tensor, trust: float) -> Tensor:
    """Predicts from a Cholesky factor which Gram matrices are accurate enough, ``(batch,)``; only speed rests on it.

    The largest eigenvalue is at least ||G||_F^2 / tr G, the largest of the inverse at least 1 / L_ii^2.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    square = torch.linalg.vector_norm(gram, dim=(-2, -1)).square()  # may lack a block above the diagonal: a bound still
    inverse = factor.diagonal(dim1=-2, dim2=-1).square().amin(-1).reciprocal()
    return (failed == 0) & (torch.finfo(gram.dtype).eps * square / diagonal.sum(-1) * inverse <= trust)


def _gram(tall: Tensor) -> Tensor:
    """Returns W^T W, valid in its lower triangle at least: three quarters of the products where that pays."""
    n = tall.shape[-1]
    if n < 64:
        return tall.mT @ tall
    half = n // 2
    gram = tall.new_zeros(tall.shape[0], n, n)
    gram[:, half:] = tall[..., half:].mT @ tall
    gram[:, :half, :half] = tall[..., :half].mT @ tall[..., :half]
    return gram
