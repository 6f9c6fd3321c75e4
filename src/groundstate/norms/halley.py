"""The polar factor of a nearly square matrix by Halley's iteration with dynamic weights (QDWH).

Idea: the best rational function of its degree for singular values in [l, 1]::

    X <- X (a I + b X^T X) (I + c X^T X)^(-1) = b/c X + (a - b/c) X (I + c X^T X)^(-1)
    d = (4 (1 - l^2) / l^4)^(1/3),  a = sqrt(1 + d) + sqrt(8 - 4 d + 8 (2 - l^2) / (l^2 sqrt(1 + d))) / 2
    b = (a - 1)^2 / 4,  c = a + b - 1,  l <- l (a + b l^2) / (1 + c l^2)

takes the interval to [l', 1], l' about 2 l^(1/3): two steps, each one Cholesky factorization and two triangular solves,
where polynomials take six. What is left, R = I - s X^T X with s = 2 / (1 + l^2), is small, and a series ends it::

    Q = sqrt(s) X (I + R / 2 + 3/8 R^2),      I - Q^T Q = 5/8 R^3 + 3/8 R^4 + ...,  at most 5/8 r^3 + 3/8 r^4 in norm

with r = ||R^2||_F^(1/2), which proves the result: a singular value that l did not cover, zero above all, stays small,
so that r is near 1. The start l comes from inverse iteration. Rounding in I + c X^T X moves Q by about u c
||(I + c X^T X)^(-1)||_F, which nothing later repairs, and which is estimated with a few vectors of signs.

Reference: Y. Nakatsukasa, Z. Bai, F. Gygi, "Optimizing Halley's iteration for computing the matrix polar decomposition"
(2010), equations 3.16 and 3.19; Y. Nakatsukasa, N. Higham, "Stable and efficient spectral divide and conquer algorithms
for the symmetric eigenvalue decomposition and the SVD" (2013), section 5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from groundstate.norms.polar_express import PROBES, signs
from groundstate.norms.polar_gram import symmetric_product

_TARGET = 2e-4  # for ||I - Q^T Q||_F / sqrt(n), twice the error that it means
_TRUST = 8e-4  # on the estimated error by rounding, which is two to ten times the true one
_CLEAR = 1.05  # how far, as a factor, singular values must be above those that count as zero
_ENOUGH = 0.9  # where the series takes over
_SHORTFALL = 0.7  # of the estimate of the smallest singular value, which may lie above the truth
_HEADROOM = 1.02  # on the estimate of the largest, which may lie below
_STEPS = 4  # of Halley, at most: for any l above 1e-7 there are three


def weights(lower: float) -> tuple[float, float, float, float]:
    """Returns ``(a, b, c, lower')`` of the step for singular values in [lower, 1], 0 < lower <= 1.

    >>> weights(1.0)
    (3.0, 1.0, 3.0, 1.0)
    """
    square = lower * lower
    d = (4 * (1 - square) / square**2) ** (1 / 3)
    root = math.sqrt(1 + d)
    a = root + math.sqrt(max(8 - 4 * d + 8 * (2 - square) / (square * root), 0.0)) / 2
    b = (a - 1) ** 2 / 4
    c = a + b - 1
    return a, b, c, min(1.0, lower * (a + b * square) / (1 + c * square))


def halley_polar(tall: Tensor, gram: Tensor, zero: float) -> tuple[Tensor, Tensor] | None:
    """Returns the polar factor and the nuclear norm of a matrix of full rank.

    Args:
        tall: ``(m, n)``, m >= n, float32, of moderate scale.
        gram: W^T W, symmetric.
        zero: Serves only matrices all of whose singular values are above zero * sigma_1.

    Returns:
        ``(q, value)``, q within 1e-3 of the polar factor, relative to its norm; ``None`` where that is not certain.

    Cost: n^3 / 3 flops to find out whether it will do; then two or three times 3 m n^2 + n^3 / 3, half of it in
    triangular solves, and 2 m n^2 + n^3.

    >>> q, value = halley_polar(torch.diag(torch.tensor([2.0, 0.5])), torch.diag(torch.tensor([4.0, 0.25])), 1e-6)
    >>> torch.allclose(q, torch.eye(2), atol=1e-3), torch.allclose(value, torch.tensor(2.5), atol=1e-3)
    (True, True)
    """
    n = len(gram)
    top = _largest(gram)
    x, gram = tall / top, gram / (top * top)
    found = _smallest(x, gram)
    if not found > _CLEAR * zero:
        return None
    lower, rounding, steps = max(_SHORTFALL * found, zero), 0.0, 0
    while lower < _ENOUGH:
        a, b, c, after = weights(lower)
        gram.mul_(c).diagonal().add_(1)
        factor, failed = torch.linalg.cholesky_ex(gram)
        through = torch.linalg.vector_norm(torch.cholesky_solve(signs(n).to(gram), factor))
        rounding += 0.3 * torch.finfo(x.dtype).eps * c / math.sqrt(n * PROBES) * float(through)
        steps += 1
        if int(failed) or not rounding <= _TRUST or steps > _STEPS:
            return None
        # Two solves err by far less than a product with the inverse.
        y = torch.linalg.solve_triangular(factor.mT, x, upper=True, left=False)
        y = torch.linalg.solve_triangular(factor, y, upper=False, left=False)
        x = y.mul_(a - b / c).add_(x, alpha=b / c)
        lower, gram = after, symmetric_product(x.mT)
    s = 2 / (1 + lower * lower)
    residual = gram.mul_(-s)
    residual.diagonal().add_(1)
    square = symmetric_product(residual)
    r = math.sqrt(float(torch.linalg.vector_norm(square)))
    if not r**3 * (0.625 + 0.375 * r) <= _TARGET * math.sqrt(n):
        return None
    series = residual.mul_(0.5).add_(square, alpha=0.375)
    series.diagonal().add_(1)
    q = x @ series.mul_(math.sqrt(s))
    return q, (q * tall).sum(dtype=torch.float64).to(tall.dtype)


def _largest(gram: Tensor, steps: int = 5) -> float:
    """The largest singular value, up to 2 % above it or a few below, by the power method from the longest column."""
    v = gram[:, int(torch.linalg.vector_norm(gram, dim=0).argmax())]
    for _ in range(steps):
        v = gram @ (v / torch.linalg.vector_norm(v))
    return math.sqrt(float(torch.linalg.vector_norm(v))) * _HEADROOM


def _smallest(x: Tensor, gram: Tensor, steps: int = 2) -> float:
    """The smallest singular value, or a little more, by inverse iteration; 0 where the Cholesky factorization fails.

    A few vectors go through (X^T X + delta I)^(-1), delta some units of rounding; then the least ||X v|| counts, for
    which X itself is multiplied. So the answer is never below the truth, and zero up to rounding for most matrices
    without full rank, where the Gram matrix alone could not tell.
    """
    shifted = gram.clone()
    shifted.diagonal().add_(4 * torch.finfo(gram.dtype).eps)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    if int(failed):
        return 0.0
    weak = factor.diagonal().topk(min(4, len(gram)), largest=False).indices
    v = torch.eye(len(weak), dtype=gram.dtype, device=gram.device)
    v = torch.zeros(len(gram), len(weak), dtype=gram.dtype, device=gram.device).index_copy_(0, weak, v)
    for _ in range(steps):
        v = torch.cholesky_solve(v, factor)
        v = v / torch.linalg.vector_norm(v, dim=0)
    return float(torch.linalg.vector_norm(x @ v, dim=0).min())
