"""The polar factor by eigenvectors of the Gram matrix, with the small singular values treated apart.

Idea: for a tall W, W^T W = V diag(lambda) V^T gives Q = W V diag(lambda^(-1/2)) V^T and ||W||_* = sum_i lambda_i^(1/2),
several times as fast as an SVD. But rounding of the Gram matrix is relative to its largest entry, so it moves Q,
relative to its norm, by about::

    eps * sigma_1^2 * rms(1 / sigma_i^2)

which a few small singular values spoil. These are deflated: with V = [V_b, V_s] split where the sum over the large ones
alone is small enough, and W V_s made orthogonal to W V_b once more,

    Q = W V_b diag(lambda_b^(-1/2)) V_b^T + polar(W V_s - W V_b diag(1 / lambda_b) (W V_b)^T W V_s) V_s^T

The second matrix is small and has few columns; its polar factor is found in the same way, in a Gram matrix of its own
scale, or by an SVD. Singular values up to the threshold end up in the last of these and get none of Q, so the result is
the minimal-norm one for any rank.

Reference: N. Higham, "Functions of Matrices" (2008), chapter 8; the deflation is elementary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groundstate.norms.polar_express import symmetric_product
from groundstate.norms.spectral import LinAlgError, svd

# Eigenvalues below this, relative to the largest, are never taken from a Gram matrix: in float32 a third of their
# digits are left, and the column that belongs to them has noise of a tenth of a percent to be made orthogonal.
_SMALLEST_RATIO = 1e-4
_FEW = 24  # columns up to which an SVD is as fast
_MOST = 0.75  # share of the columns above which deflating them is not worth a Gram matrix of their own


def gram_polar(
    tall: Tensor, zero: float, trust: float, largest: Tensor | None = None, gram: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns minimal-norm polar factors and nuclear norms.

    Args:
        tall: ``(batch, m, n)``, m >= n, float32 or float64, of moderate scale.
        zero: Singular values up to zero * ``largest`` get none of Q.
        trust: Bound on the error from any one Gram matrix, relative to sqrt(n).
        largest: ``(batch,)``, by default the largest singular value.
        gram: W^T W, if known.

    Returns:
        ``(q, value, error)``, the last two ``(batch,)``; error is an estimate relative to sqrt(n), at most a few times
        ``trust``.

    Raises:
        NonFiniteError: an SVD of the small part does not converge.

    Cost: 3.5 m n^2 + 2 n^3 flops and an eigh of size n; for k small singular values about 6 m n k and an SVD or less of
    m x k.

    >>> q, value, _ = gram_polar(torch.tensor([[[0.0, 3.0], [0.0, 4.0]]]), 1e-6, 1e-4)
    >>> q, value
    (tensor([[[0.0000, 0.6000],
             [0.0000, 0.8000]]]), tensor([5.]))
    """
    gram = symmetric_product(tall) if gram is None else gram
    try:
        lam, v = torch.linalg.eigh(gram)
    except LinAlgError:
        return svd_polar(tall, zero, largest)
    eps, n = torch.finfo(lam.dtype).eps, lam.shape[-1]
    top = lam[:, -1:].clamp_min(torch.finfo(lam.dtype).tiny)
    largest = lam[:, -1].clamp_min(0).sqrt() if largest is None else largest
    floor = torch.maximum(top * _SMALLEST_RATIO, (zero * largest).square_()[:, None])
    large = lam > floor
    inverse = torch.maximum(lam, floor).reciprocal_()
    spoiled = (inverse * top).square_().flip(-1).cumsum(-1).flip(-1).mul_(4 * eps**2 / n).sqrt_()
    large &= spoiled <= trust
    root = inverse.sqrt().where(large, 0.0)
    half = v * root.sqrt()[:, None, :]
    q = tall @ (half @ half.mT)
    value = (lam * root).sum(-1)
    products = eps * largest * torch.linalg.vector_norm(root, dim=-1) / n**0.5  # rounding of W V, and of W as a block
    error = spoiled.where(large, 0.0).amax(-1) + products
    for i, few in enumerate((~large).sum(-1).tolist()):
        if not few:
            continue
        small = v[i, :, :few]
        block = _orthogonal(tall[i], v[i], inverse[i], few)
        size = torch.linalg.vector_norm(block)
        if size <= zero * largest[i] and few**0.5 * size <= 16 * torch.finfo(lam.dtype).eps * value[i]:
            continue  # no singular value is above the norm
        if few <= _FEW or few > _MOST * len(small):
            part, extra, more = svd_polar(block[None], zero, largest[i : i + 1])
        else:
            part, extra, more = gram_polar(block[None], zero, trust, largest[i : i + 1])
        q[i] += part[0] @ small.mT
        value[i] += extra[0]
        error[i] += more[0] * (few / len(small)) ** 0.5
    return q, value, error


def _orthogonal(tall: Tensor, v: Tensor, inverse: Tensor, few: int) -> Tensor:
    """W V_s for the ``few`` smallest eigenvalues, made orthogonal to W V_b."""
    block, large = tall @ v[:, :few], v[:, few:]
    return block - tall @ (large @ (inverse[few:, None] * (large.mT @ (tall.mT @ block))))


def svd_polar(tall: Tensor, zero: float, largest: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The same as `gram_polar`, by the singular value decomposition; the error is eps * ``largest`` * rms(1 / sigma_i).

    >>> svd_polar(torch.tensor([[[0.0], [2.0]]]), 1e-6)[:2]
    (tensor([[[0.],
             [1.]]]), tensor([2.]))
    """
    try:
        u, s, vh = torch.linalg.svd(tall, full_matrices=False)
    except LinAlgError:
        u, s, vh = svd(tall)
    top = s[:, :1] if largest is None else largest[:, None]
    kept = s > zero * top
    error = torch.linalg.vector_norm((top / s).where(kept, 0.0), dim=-1)
    error *= torch.finfo(s.dtype).eps / max(s.shape[-1], 1) ** 0.5
    return (u * kept[:, None, :]) @ vh, s.sum(-1), error
