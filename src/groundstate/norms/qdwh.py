"""Dynamically weighted Halley iteration: the polar factor by rational functions, a Cholesky factor per step.

Idea: Halley's iteration with the weights that are best for singular values in [l, 1]::

    X <- X (a I + b X^T X) (I + c X^T X)^(-1) = b/c X + (a - b/c) X (I + c X^T X)^(-1)
    d = (4 (1 - l^2) / l^4)^(1/3),  a = sqrt(1 + d) + sqrt(8 - 4 d + 8 (2 - l^2) / (l^2 sqrt(1 + d))) / 2
    b = (a - 1)^2 / 4,  c = a + b - 1,  l <- l (a + b l^2) / (1 + c l^2)

maps the interval to [l', 1] with l' about l^(1/3): one step does the work of three polynomials where l is small, and no
more than one where it is not, so `qdwh` goes over to `polar_express` there, which also proves the residual.

Rounding in I + c X^T X moves the polar factor, and nothing later repairs that; `halley_step` estimates by how much.
Singular values of zero stay zero, so a small residual proves full rank. On tall, well-conditioned
matrices everything happens on the Gram matrix G (`halley_gram`): K = (I + c G)^(-1) gives the first step and what it
does to G without a product, since c K G = I - K.

Reference: Y. Nakatsukasa, Z. Bai, F. Gygi, "Optimizing Halley's iteration for computing the matrix polar decomposition"
(2010), equations 3.16 and 3.19; Y. Nakatsukasa, N. Higham, "Stable and efficient spectral divide and conquer
algorithms" (2013), section 5.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from groundstate.norms.polar_express import express, express_gram, symmetric_product

_NARROWEST = 0.03  # least guess of sigma_n / sigma_1 for tall matrices
_EVEN = 0.6  # guess from which on hardly any singular value can be near zero
_MANY = 0.8  # rms of the eigenvalues of (I + c G)^(-1) over the largest, if the guess holds; 1/2 for a random matrix
_CLEAR = 1.03  # how far, as a factor, singular values must be from the threshold for their rounding not to matter
_OVERSHOOT = 1.06  # how far above 1 singular values may lie for a polynomial not to send them off
_HEADROOM = 1.02  # on the largest singular value, which a few products estimate from below


def weights(lower: float) -> tuple[float, float, float, float]:
    """Returns ``(a, b, c, lower')`` of the Halley step for singular values in [lower, 1], 0 < lower <= 1.

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


def largest(gram: Tensor, steps: int = 5) -> Tensor:
    """Returns an estimate of the largest singular value of X from X^T X: the power method from its longest column.

    Args:
        gram: ``(batch, n, n)``, symmetric.
        steps: Products with a vector.

    Returns:
        ``(batch, 1, 1)``, up to 2 per cent above the truth, or a few below it; the smallest normal number for a zero
        matrix.
    """
    tiny = torch.finfo(gram.dtype).tiny
    norms = torch.linalg.vector_norm(gram, dim=-2)
    size, longest = norms.max(-1)
    v = gram.gather(-1, longest[:, None, None].expand(-1, gram.shape[-1], 1)) / size.clamp_min(tiny)[:, None, None]
    before = v
    for k in range(steps):
        before, v = v, gram @ v
        if k % 3 == 2:  # a longer run would leave the range of float32
            before, v = (x / torch.linalg.vector_norm(v, dim=-2, keepdim=True).clamp_min(tiny) for x in (before, v))
    top = torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    top = top / torch.linalg.vector_norm(before, dim=-2, keepdim=True).clamp_min(tiny)
    return top.sqrt().clamp_min(tiny) * _HEADROOM


def smallest(x: Tensor, gram: Tensor, steps: int = 2) -> Tensor:
    """Returns an estimate of the smallest singular value of X, from above: inverse iteration on a shifted Gram matrix.

    A few vectors go through (X^T X + delta I)^(-1), delta a few units of rounding; then the smallest ||X v|| / ||v||
    counts, for which X itself is multiplied. So the estimate never lies below the truth and is zero, up to rounding,
    for most matrices without full rank, where the Gram matrix alone could not tell.

    Args:
        x: ``(batch, m, n)``, largest singular value about 1.
        gram: X^T X, ``(batch, n, n)``.
        steps: Of inverse iteration.

    Returns:
        ``(batch,)``; 0 where the Cholesky factorization fails.

    Cost: n^3 / 3 flops, and a few products with a matrix of four columns.
    """
    shifted = gram.clone()
    shifted.diagonal(dim1=-2, dim2=-1).add_(4 * torch.finfo(gram.dtype).eps)
    factor, failed = torch.linalg.cholesky_ex(shifted)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    weak = pivots.topk(min(4, pivots.shape[-1]), dim=-1, largest=False).indices
    v = torch.zeros(*weak.shape[:-1], gram.shape[-1], weak.shape[-1], dtype=gram.dtype, device=gram.device)
    v.scatter_(-2, weak[..., None, :], 1.0)
    for _ in range(steps):
        v = torch.cholesky_solve(v, factor)
        v = v / torch.linalg.vector_norm(v, dim=-2, keepdim=True)
    found = torch.linalg.vector_norm(x @ v, dim=-2).amin(-1)
    return torch.where((failed == 0) & found.isfinite(), found, 0.0)


def halley_step(x: Tensor, gram: Tensor, lower: float, trust: float) -> tuple[Tensor, float, float, Tensor]:
    """One Halley step, unless rounding would spoil it.

    Args:
        x: ``(batch, m, n)``, singular values in [lower, 1].
        gram: X^T X, overwritten.
        lower: Above 0.
        trust: Bound on the error by rounding, relative to ||Q||_F. Where it holds for no matrix, x is returned.

    Returns:
        ``(x, lower, gain, error)``: the next X and the start of its interval, a bound on the growth of any singular
        value, and the error by rounding of each matrix, infinite where the Cholesky factorization failed.

    The error is 0.6 u c ||(I + c G)^(-1)||_F / sqrt(n), u the unit roundoff, the norm estimated with a few vectors of
    signs; 0.6 is above all that spectra of many kinds gave, by a factor of up to ten.
    """
    a, b, c, _ = weights(lower)
    gram.mul_(c).diagonal(dim1=-2, dim2=-1).add_(1)
    factor, failed = torch.linalg.cholesky_ex(gram)
    signs = _signs(gram.shape[-1]).to(gram)
    through = torch.linalg.vector_norm(torch.cholesky_solve(signs.expand(len(x), -1, -1), factor), dim=(-2, -1))
    error = (0.3 * torch.finfo(x.dtype).eps * c / math.sqrt(signs.numel())) * through
    error = torch.where((failed == 0) & error.isfinite(), error, math.inf)
    if float(error.min()) <= trust:
        # Solves from the right are faster than from the left, and more accurate than with the inverse.
        y = torch.linalg.solve_triangular(factor.mT, x, upper=True, left=False)
        y = torch.linalg.solve_triangular(factor, y, upper=False, left=False)
        x = y.mul_(a - b / c).add_(x, alpha=b / c)
    return x, lower * (a + b * lower * lower) / (1 + c * lower * lower), a, error


@lru_cache(maxsize=16)
def _signs(n: int, columns: int = 8) -> Tensor:
    """Columns of signs without structure: those of cos(k j^2), the same in every call."""
    j = torch.arange(1, n + 1, dtype=torch.float64)[:, None]
    return (j * j * torch.arange(1, columns + 1, dtype=torch.float64)).cos().sign()


def qdwh(
    tall: Tensor, threshold: float, trust: float, target: float, halley_below: float, gram: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns the polar factors of matrices of full rank, and what is known about their error.

    Args:
        tall: ``(batch, m, n)``, m >= n, float32 or float64, of moderate scale.
        threshold: Serves only matrices proved to have no singular value up to threshold * sigma_1.
        trust: Bound on the error by rounding, relative to ||Q||_F.
        target: For ||I - Q^T Q||_F / sqrt(n).
        halley_below: Steps are Halley's while the interval of the singular values starts below this, polynomials then.
        gram: W^T W, if known.

    Returns:
        ``(q, error)``, error ``(batch,)`` relative to ||Q||_F and infinite where this is no way to the polar factor;
        q is anything there.

    Cost: for sigma_n about 1e-3 sigma_1 two Halley steps of 2 m n^2 (solves), m n^2 (Gram matrix) and n^3 / 3 flops
    each, and the last polynomial of 2 m n^2 + 3 n^3.

    >>> q, error = qdwh(torch.diag(torch.tensor([2.0, 0.5]))[None], 1e-6, 1e-3, 1e-4, 0.5)
    >>> torch.allclose(q, torch.eye(2), atol=1e-4), bool(error < 1e-3)
    (True, True)
    """
    gram = symmetric_product(tall) if gram is None else gram
    scale = largest(gram)
    x, gram = tall / scale, gram / scale.square()
    bottom = smallest(x, gram)
    error = torch.full_like(bottom, math.inf)
    some = bottom > _CLEAR * threshold
    if not bool(some.any()):
        return tall, error
    # Polynomials alone err by far less than the unit roundoff over sigma_n, most of which the mean hides.
    lower = max(0.7 * float(bottom[some].min()), threshold)
    rounding, gain = error.new_full(error.shape, 0.05 * torch.finfo(x.dtype).eps / lower), 1.0
    q, upper = x, _OVERSHOOT if lower >= halley_below else 1.0
    while lower < halley_below and bool(some.any()):
        step = halley_step(q, gram if q is x else symmetric_product(q), lower, trust)
        q, lower, gain, rounding = step[0], step[1], gain * step[2], rounding + step[3]
        some = some & (rounding <= trust)
    some = some & (rounding <= trust)
    if not bool(some.any()):
        return tall, error
    if bool(some.all()):
        return _finish(q, x, rounding, lower, upper, gain, threshold, target)
    q[some], error[some] = _finish(q[some], x[some], rounding[some], lower, upper, gain, threshold, target)
    return q, error


def _finish(
    q: Tensor, x: Tensor, rounding: Tensor, lower: float, upper: float, gain: float, threshold: float, target: float
) -> tuple[Tensor, Tensor]:
    """Polynomials, and the proof of full rank."""
    q, residual, growth = express(q, lower, target, upper)
    good = residual <= target
    if gain * growth * threshold >= 0.9 and bool(good.any()):
        good &= _above(symmetric_product(q, x), _CLEAR * threshold)
    return q, torch.where(good, rounding + residual / 2, math.inf)


def _above(h: Tensor, bound: float) -> Tensor:
    """Whether all eigenvalues of symmetric matrices are above a bound: they are singular values here, not squares."""
    h.diagonal(dim1=-2, dim2=-1).sub_(bound)
    return torch.linalg.cholesky_ex(h).info == 0


def halley_gram(tall: Tensor, trust: float, target: float, gram: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns polar factors and nuclear norms of tall, well-conditioned matrices by their Gram matrices.

    The interval of the singular values is guessed: that of a random matrix whose Gram matrix has the same first two
    moments (Marchenko and Pastur). The residual corrects the guess, at the price of a step.

    Args:
        tall: ``(batch, m, n)``, m >= n, float32 or float64, of moderate scale.
        trust: Bound on the error by rounding of the Gram matrix, eps * sigma_1^2 * rms(1 / sigma_i^2).
        target: For ||I - Q^T Q||_F / sqrt(n).
        gram: W^T W, if known.

    Returns:
        ``(q, value, error)``, the last two ``(batch,)``; error, relative to ||Q||_F, is infinite where the matrix is
        not well-conditioned enough.

    Cost: 4 m n^2 flops, of which 3/4 to 5/8 in the symmetric half, n^3, and three symmetric products of size n.

    >>> q, value, error = halley_gram(torch.tensor([[[3.0, 0.0], [4.0, 0.0], [0.0, 2.0]]]), 1e-4, 1e-4)
    >>> torch.allclose(value, torch.tensor([7.0])), bool(error < 1e-4)
    (True, True)
    """
    gram = symmetric_product(tall) if gram is None else gram
    scale, lower = _guess(gram)
    gram = gram / scale
    a, b, c, start = weights(lower)
    shifted = c * gram
    shifted.diagonal(dim1=-2, dim2=-1).add_(1)
    factor = torch.linalg.cholesky_ex(shifted).L
    z = torch.cholesky_inverse(factor)
    small = torch.linalg.vector_norm(z, dim=(-2, -1))  # each eigenvalue near 0 adds almost 1 to its square
    usual = _MANY * math.sqrt(gram.shape[-1]) / (1 + c * lower * lower)
    if lower < _EVEN and not float(small.min()) < usual:
        return tall, small, torch.full_like(small, math.inf)
    zg = (b / c * gram).sub_(z, alpha=(a - b / c) / c)
    zg.diagonal(dim1=-2, dim2=-1).add_((a - b / c) / c)
    z.mul_(a - b / c).diagonal(dim1=-2, dim2=-1).add_(b / c)
    z, residual, growth = express_gram(z, symmetric_product(z, zg), start, target)
    # sqrt(sum_i 1 / lambda_i) times a bound on lambda_n^(-1/2), as no singular value has grown by more than a * growth.
    rounding = torch.linalg.vector_norm(z, dim=(-2, -1))
    rounding *= 2 * torch.finfo(tall.dtype).eps * a * growth / math.sqrt(gram.shape[-1])
    error = torch.where((rounding <= trust) & (residual <= target), rounding + residual / 2, math.inf)
    root = scale.sqrt()
    value = (z * gram).sum((-2, -1), dtype=torch.float64) * root[:, 0, 0]
    return tall @ z.div_(root), value.to(tall.dtype), error


def _guess(gram: Tensor) -> tuple[Tensor, float]:
    """The largest eigenvalue of each Gram matrix, ``(batch, 1, 1)``, and the least sigma_n / sigma_1 of the batch."""
    mean = gram.diagonal(dim1=-2, dim2=-1).mean(-1)
    mean = mean.clamp_min(torch.finfo(gram.dtype).tiny)
    even = torch.linalg.vector_norm(gram, dim=(-2, -1)).div_(mean).square_().div_(gram.shape[-1])
    spread = (even - 1).clamp_(0.0, 0.9).sqrt_()
    widest = float(spread.max().nan_to_num_(0.9))
    return (mean * (1 + spread).square_())[:, None, None], max((1 - widest) / (1 + widest), _NARROWEST)
