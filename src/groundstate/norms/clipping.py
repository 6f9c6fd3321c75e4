"""Singular values cut off from above, U diag(min(s, t)) V^T, from the eigenvectors of a Gram matrix.

Idea: with W^T W = V diag(lambda) V^T, clipping is the product W V diag(min(1, t / s)) V^T, and W minus that is
thresholding: cheap where most singular values survive. Rounding of the Gram matrix moves the result by about::

    t eps s_1^2 |1 / s_i^2|

so V = [V_b, V_s] is split where that is small enough for the singular values of V_b alone, which are all above t. With
Q = W V_b diag(1 / s_b) V_b^T and C = Q^T W V_s, what is left of W is B V_s^T, B = W V_s - Q C. It has a Gram matrix of
its own, (W V_s)^T W V_s - C^T C = X diag(mu^2) X^T, relative to whose largest entry t is no longer small::

    t Q + B X diag(min(1, t / mu)) X^T V_s^T

is one product with W, and has exactly as many singular values t as there are s above t. This is the split of
`polar_gram` with min(s, t) in the place of s > 0.

Reference: N. Higham, "Functions of Matrices" (2008), chapter 8; the deflation is elementary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from groundstate.norms.polar_gram import symmetric_product
from groundstate.norms.spectral import LinAlgError

# Eigenvalues below this, relative to the largest, and those so near t^2, in eps * lambda_1, go to V_s.
_SMALLEST_RATIO, _NEAR = 1e-4, 64.0
_SAFETY = 3.0  # by which the residuals of eigenvectors exceed eps * lambda_1
_SURE = 10.0  # where there is room for so many times of that, residuals need not be computed
_SHARE = 0.1  # of the error that is allowed, for the Gram matrix of B
_PROBES = 4


def clip_by_gram(tall: Tensor, lam: Tensor, v: Tensor, t: float, allowed: float) -> tuple[Tensor, int] | None:
    """Returns U diag(min(s, t)) V^T and the number of singular values above t.

    Args:
        tall: W, ``(m, n)`` with m >= n, of moderate scale.
        lam: The eigenvalues of W^T W in ascending order, ``(n,)``.
        v: Its eigenvectors, ``(n, n)``.
        t: The level, positive.
        allowed: Bound on the error, in the Frobenius norm, apart from rounding of W itself.

    Returns:
        ``(clipped, r)``; ``None`` where that bound is not met, or no eigendecomposition converges.

    Cost: 2 m n^2 + 3/2 n^3 flops; for k singular values in V_s 6 m n k + 6 n^2 k and an eigendecomposition of size k.

    >>> w = torch.diag(torch.tensor([3.0, 4.0]))
    >>> clip_by_gram(w, *torch.linalg.eigh(w.mT @ w), 3.5, 1e-6)
    (tensor([[3.0000, 0.0000],
            [0.0000, 3.5000]]), 1)
    """
    values = lam.tolist()
    k, expected = _few(values, t, allowed, torch.finfo(lam.dtype).eps)
    big, large, small = lam[k:], v[:, k:], v[:, :k]
    unsure = _SURE * expected > allowed
    if unsure and probed_residual(tall, large, big.double(), t / big.double()) > allowed:
        return None
    z = symmetric_product(large * (t * big.rsqrt()).sqrt())  # W Z = t Q
    r = len(values) - k
    if k:
        image = tall @ small
        across = z @ (tall.mT @ image) / t
        found = _rest(image, across, t, allowed, values[k - 1])
        if found is None:
            return None
        share, above = found
        z.addmm_(torch.addmm(small, z, across, alpha=-1 / t) @ share, small.mT)
        r += above
    return (tall @ z if tall.is_contiguous() else (z.mT @ tall.mT).mT), r  # the memory as W has it


def _few(values: list[float], t: float, allowed: float, eps: float) -> tuple[int, float]:
    """Returns how many of the ascending eigenvalues belong to V_s, and the error to be expected from the others."""
    top, k = values[-1], len(values)
    floor = max(_SMALLEST_RATIO * top, t * t + _NEAR * eps * top)
    unit = _SAFETY * eps * top * t
    total = 0.0
    for value in reversed(values):
        if not (value > floor and unit * math.sqrt(total + 1 / value**2) <= allowed):
            break
        total += 1 / value**2
        k -= 1
    return k, unit * math.sqrt(total)


def _rest(p: Tensor, c: Tensor, t: float, allowed: float, largest: float) -> tuple[Tensor, int] | None:
    """X diag(min(1, t / mu)) X^T for P^T P - C^T C, and how many mu are above t."""
    dtype = p.dtype
    if torch.finfo(dtype).eps * largest * math.sqrt(p.shape[1]) > _SHARE * allowed * t:
        if dtype == torch.float64:
            return None
        p, c = p.double(), c.double()
    try:
        lam, x = torch.linalg.eigh(torch.addmm(p.mT @ p, c.mT, c, alpha=-1))
    except LinAlgError:
        return None
    above = int((lam > t * t).sum())
    return ((x * (t * lam.clamp_min(t * t).rsqrt())) @ x.mT).to(dtype), above


def probed_residual(tall: Tensor, v: Tensor, lam: Tensor, weights: Tensor) -> float:
    """Returns sqrt(5 / 4) ||(W^T W V - V diag(lam)) diag(weights)||_F, by a product with random signs.

    Its mean square is exact; v may be float32, lam and weights are float64. With weights 1 / s that bounds the error of
    W V (1 - t / s) V^T: its derivative by the Gram matrix has entries below 1 / s_i and, for the transposed pair,
    1 / (2 s_i), hence the factor. With weights t / s^2 it bounds that of t W V diag(1 / s) V^T.
    """
    if not len(lam):
        return 0.0
    generator = torch.Generator().manual_seed(0)
    signs = (2 * torch.randint(0, 2, (len(lam), _PROBES), generator=generator, dtype=torch.float64) - 1).to(lam.device)
    v = v.double()
    signs = signs * weights[:, None]
    wide = tall.double()
    residual = wide.mT @ (wide @ (v @ signs)) - v @ (signs * lam[:, None])
    return math.sqrt(1.25 / _PROBES) * float(torch.linalg.vector_norm(residual))
