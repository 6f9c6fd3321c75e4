"""Polar Express: the polar factor by polynomials, each the best one for where the singular values are by then.

Idea: an odd polynomial of a matrix acts on its singular values alone. With the residual R = I - X^T X::

    X <- X (a I + b X^T X + c (X^T X)^2),   (a, b, c) = argmin max over [l, u] of |1 - (a x + b x^3 + c x^5)| = E

takes the interval [l, u] of the singular values to [1 - E, 1 + E], and the next step starts from there. The error of
the best quintic takes its largest value at four points with alternating signs (Chebyshev), which `coefficients` finds
by exchange (Remez). Nobody knows the smallest singular value, so l is only a guess: **the residual decides**. Its norms
bound every |1 - x^2|; once that bound is below 1 it gives the interval, and the error of a last step is known before it
is made::

    X (I + R / 2):                                              residual 3/4 R^2 + ...
    X (I + R / 2 + 3/8 R^2):                                    residual 5/8 R^3 + ...
    X (I + R / 2 + 3/8 R^2 + 5/16 R^3 + 35/128 R^4):            residual 63/128 R^5 + ...

(Taylor's polynomials of (1 - r)^(-1/2); the coefficients of each residual are positive and add up to 1). A guess that
was too high costs steps, never accuracy. `express` iterates on X itself, which keeps singular values that
a Gram matrix would round away; `express_gram` iterates on the Gram matrix of a tall, well-conditioned one.

Reference: N. Amsel, D. Persson, C. Musco, R. Gower, "The Polar Express" (2025); N. Higham, "Functions of Matrices"
(2008), section 8.3.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

_FLAT = 0.999  # the exchange is ill-conditioned on shorter intervals, and Taylor's quintic as good
_NEAR = 0.3  # the largest |1 - x^2| from which on Taylor's polynomials are tried
_SPLIT = 256  # a symmetric product of at least this size is made by blocks, without those above the diagonal


class Step(NamedTuple):
    """A factor P of x <- x P, and what is known about x P.

    Attributes:
        factor: ``(batch, n, n)``, symmetric.
        lower: Singular values are believed to lie between this
        upper: and this.
        residual: Bound on ||I - P x^T x P||_F / sqrt(n), ``(batch,)``; infinite where none is proved.
        gain: No singular value has grown by a larger factor.
    """

    factor: Tensor
    lower: float
    upper: float
    residual: Tensor
    gain: float


@lru_cache(maxsize=1024)
def coefficients(lower: float, upper: float = 1.0) -> tuple[float, float, float, float]:
    """Returns ``(a, b, c, error)`` of the odd quintic a x + b x^3 + c x^5 closest to 1 on [lower, upper].

    Args:
        lower: Above 0.
        upper: Not below ``lower``. Where they differ by less than a thousandth the answer is Taylor's quintic.

    Returns:
        The coefficients, and the largest distance to 1 on the interval, below 1.

    >>> a, b, c, error = coefficients(0.3)
    >>> at_start, at_end = 0.3 * a + 0.3**3 * b + 0.3**5 * c, a + b + c
    >>> round(1 - at_start, 6) == round(at_end - 1, 6) == round(error, 6) == 0.108521
    True
    >>> coefficients(1.0)[:3]
    (1.875, -1.25, 0.375)
    """
    if lower > _FLAT * upper:
        half = 1 - lower / upper
        return 15 / 8 / upper, -10 / 8 / upper**3, 3 / 8 / upper**5, 2.5 * half**3
    inner = (3 * lower + upper) / 4, (lower + 3 * upper) / 4
    a = b = c = error = 0.0
    for _ in range(50):
        a, b, c, error = _alternating((lower, *inner, upper))
        root = math.sqrt(max(9 * b * b - 20 * a * c, 0.0))
        found = math.sqrt((-3 * b - root) / (10 * c)), math.sqrt((-3 * b + root) / (10 * c))
        moved = max(abs(new - old) for new, old in zip(found, inner))
        inner = found
        if moved < 1e-14 * upper:
            break
    return a, b, c, abs(error)


def _alternating(points: tuple[float, float, float, float]) -> tuple[float, float, float, float]:
    """Solves a x + b x^3 + c x^5 + (-1)^i E = 1 at the four points, by elimination in the powers of x^2.

    Divided differences of 1 / x over x^2 leave E: the third one vanishes for a + b t + c t^2.
    """
    t = [x * x for x in points]
    one = [1 / x for x in points]
    sign = [(-1) ** i / x for i, x in enumerate(points)]
    error = _divided(t, one)[3] / _divided(t, sign)[3]
    d = _divided(t, [p - error * q for p, q in zip(one, sign)])
    c = d[2]
    b = d[1] - c * (t[0] + t[1])
    a = d[0] - d[1] * t[0] + c * t[0] * t[1]
    return a, b, c, error


def _divided(t: list[float], f: list[float]) -> list[float]:
    """Newton's divided differences f[t_0], f[t_0, t_1], ..."""
    f = list(f)
    for order in range(1, len(t)):
        for i in range(len(t) - 1, order - 1, -1):
            f[i] = (f[i] - f[i - 1]) / (t[i] - t[i - order])
    return f


def symmetric_product(a: Tensor, b: Tensor | None = None) -> Tensor:
    """Returns A^T B where that is known to be symmetric: A itself, or commuting symmetric matrices.

    Args:
        a: ``(batch, m, n)``.
        b: The same shape; A by default.

    Returns:
        ``(batch, n, n)``.

    Cost: 2 m n^2 flops; on a CPU three quarters of them from n = 256 on, five eighths from 1024 on.

    >>> symmetric_product(torch.tensor([[[3.0, 0.0], [4.0, 1.0]]]))
    tensor([[[25.,  4.],
             [ 4.,  1.]]])
    """
    b = a if b is None else b
    n = a.shape[-1]
    if n < _SPLIT or a.device.type != "cpu":
        return a.mT @ b
    product = a.new_empty(*a.shape[:-2], n, n)
    for one, left, right in zip(product, a, b):  # a batch is no faster at this size
        _fill(one, left, right)
    return product


def _fill(product: Tensor, a: Tensor, b: Tensor) -> None:
    half = a.shape[-1] // 2
    if half < 2 * _SPLIT:
        torch.mm(a[:, half:].mT, b, out=product[half:])
        torch.mm(a[:, :half].mT, b[:, :half], out=product[:half, :half])
    else:
        torch.mm(a[:, half:].mT, b[:, :half], out=product[half:, :half])
        _fill(product[:half, :half], a[:, :half], b[:, :half])
        _fill(product[half:, half:], a[:, half:], b[:, half:])
    product[:half, half:] = product[half:, :half].mT


def deviation(gram: Tensor) -> Tensor:
    """Turns a Gram matrix into the residual I - G, in place."""
    gram.neg_().diagonal(dim1=-2, dim2=-1).add_(1)
    return gram


def next_step(residual: Tensor, lower: float, upper: float, target: float) -> Step:
    """Returns the next factor: a polynomial of Taylor's where it reaches ``target``, else the best quintic.

    Args:
        residual: R = I - x^T x, ``(batch, n, n)``; overwritten.
        lower: Guess of the smallest singular value of any x in the batch, above 0.
        upper: Guess of the largest. Both are overruled by what R proves.
        target: For ||I - x^T x||_F / sqrt(n).

    Cost: none, one or two symmetric products of size n.
    """
    root = math.sqrt(residual.shape[-1])
    scale = 1.0
    if _spread(lower, upper) < _NEAR:  # moves the singular values around 1, where Taylor's polynomials are best
        scale = math.sqrt(2 / (lower * lower + upper * upper))
        residual.mul_(scale**2).diagonal(dim1=-2, dim2=-1).add_(1 - scale**2)
        lower, upper = lower * scale, upper * scale
    if _spread(lower, upper) ** 2 <= 4 * target:
        norm = torch.linalg.vector_norm(residual, dim=(-2, -1))
        bound = norm.square() * (0.75 + 0.25 * norm) / root
        if float(bound.max()) <= target:
            return _taylor(residual.mul_(0.5), bound, scale, 1.5)
    square = symmetric_product(residual)
    widest = torch.linalg.vector_norm(square, dim=(-2, -1)).sqrt()  # ||r||_4 >= max |r|
    bound = widest**3 * (0.625 + 0.375 * widest) / root
    if float(bound.max()) <= target:
        return _taylor(residual.mul_(0.5).add_(square, alpha=0.375), bound, scale, 1.875)
    proved = float(widest.max())
    if proved < 1:
        lower, upper = max(lower, math.sqrt(1 - proved)), min(upper, math.sqrt(1 + proved))
    if not 0 < lower <= upper:  # a guess that the residual contradicts
        lower, upper = (math.sqrt(1 - proved), math.sqrt(1 + proved)) if proved < 1 else (0.5, 1.0)
    if _spread(lower, upper) ** 5 <= 4 * target:
        third = symmetric_product(square, (5 / 16) * residual + (35 / 128) * square)
        # |r|^3 <= |its eigenvalue| / (5/16 - 35/128 |r|) sharpens ||r||_4 to ||r||_6.
        sharp = torch.linalg.vector_norm(third, dim=(-2, -1)) / (5 / 16 - 35 / 128 * widest).clamp_min(0.03)
        widest = torch.where(widest < 1, torch.minimum(widest, sharp ** (1 / 3)), widest)
        bound = widest**5 * (0.5 + 0.5 * widest) / root
        step = _taylor(third.add_(residual, alpha=0.5).add_(square, alpha=0.375), bound, scale, 2.5)
        return step._replace(residual=torch.where(bound <= target, bound, math.inf))
    a, b, c, error = coefficients(lower, upper)
    factor = square.mul_(c * scale).sub_(residual, alpha=(b + 2 * c) * scale)
    factor.diagonal(dim1=-2, dim2=-1).add_((a + b + c) * scale)
    return Step(factor, 1 - error, 1 + error, torch.full_like(bound, math.inf), a * scale)


def _spread(lower: float, upper: float) -> float:
    """The largest |1 - x^2| on the interval after the best scaling."""
    return (upper * upper - lower * lower) / (upper * upper + lower * lower)


def _taylor(factor: Tensor, bound: Tensor, scale: float, gain: float) -> Step:
    """The factor scale * (I + what is given)."""
    factor.diagonal(dim1=-2, dim2=-1).add_(1)
    return Step(factor if scale == 1 else factor.mul_(scale), 1.0, 1.0, bound, gain * scale)


def express(
    x: Tensor, lower: float, target: float, upper: float = 1.0, limit: int = 12
) -> tuple[Tensor, Tensor, float]:
    """Iterates on X until its residual is proved to be small.

    Args:
        x: ``(batch, m, n)``, m >= n, singular values about [lower, upper].
        lower: A guess, above 0; too high a guess costs steps.
        target: For ||I - X^T X||_F / sqrt(n).
        upper: A guess that singular values should not exceed by more than a few per cent.
        limit: Most steps.

    Returns:
        ``(x, residual, gain)``: the residual of each matrix, proved where it is within the target and measured
        otherwise (NaN where the iteration ran away), and a bound on how much any singular value has grown.

    Cost: per step 2 m n^2 flops and 5/4 to 3/2 (m + n) n^2 for the products that are symmetric.

    >>> q, residual, _ = express(torch.diag(torch.tensor([1.0, 0.5])).double()[None], 0.5, 1e-12)
    >>> torch.allclose(q, torch.eye(2).double())
    True
    """
    gain = 1.0
    for _ in range(limit):
        step = next_step(deviation(symmetric_product(x)), lower, upper, target)
        x = x @ step.factor
        gain *= step.gain
        lower, upper = step.lower, step.upper
        if not math.isinf(float(step.residual.max())):
            return x, step.residual, gain
    left = torch.linalg.vector_norm(deviation(symmetric_product(x)), dim=(-2, -1))
    return x, left / math.sqrt(x.shape[-1]), gain


def express_gram(
    z: Tensor, gram: Tensor, lower: float, target: float, upper: float = 1.0, limit: int = 2
) -> tuple[Tensor, Tensor, float]:
    """Iterates on Z and G = Z A Z until Z is proved to be A^(-1/2).

    Args:
        z: ``(batch, n, n)``, symmetric, commuting with G.
        gram: G = Z A Z; its eigenvalues are about [lower^2, upper^2].
        lower: See `express`.
        target: For ||I - Z A Z||_F / sqrt(n).
        upper: See `express`.
        limit: Most steps.

    Returns:
        ``(z, residual, gain)``: the residual of each matrix, infinite where it was not proved, and a bound on the
        growth of the square root of any eigenvalue.

    Cost: per step 2 to 4 symmetric products of size n.
    """
    residual = gram.new_full(gram.shape[:-2], math.inf)
    gain = 1.0
    for k in range(limit):
        step = next_step(deviation(gram.clone()), lower, upper, target)
        z = symmetric_product(z, step.factor)
        residual, lower, upper, gain = step.residual, step.lower, step.upper, gain * step.gain
        if k + 1 == limit or not math.isinf(float(residual.max())):
            break
        gram = symmetric_product(symmetric_product(gram, step.factor), step.factor)
    return z, residual, gain
