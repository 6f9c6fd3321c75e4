"""The inverse square root of a well-conditioned Gram matrix by polynomials alone: Polar Express, in its Gram form.

Idea: an odd polynomial of a matrix acts on its singular values alone. With the residual R = I - X^T X::

    X <- X (a I + b X^T X + c (X^T X)^2),   (a, b, c) = argmin max over [l, u] of |1 - (a x + b x^3 + c x^5)| = E

takes the interval [l, u] of the singular values to [1 - E, 1 + E]. The error of the best quintic takes its largest
value at four points with alternating signs (Chebyshev), which `coefficients` finds by exchange (Remez). A tall matrix
needs only its Gram matrix G: with symmetric factors P_1, P_2, ... that commute with G, Q = W P_1 P_2 ..., and each
product costs n^3. Nobody knows the interval, so it is guessed: that of a random matrix whose G has the same first two
moments (Marchenko and Pastur). **The residual decides** whether the guess was right. With r = ||R^2||_F^(1/2), a bound
on every |1 - x^2|, that of the last step is known before it is made::

    X (I + R / 2 + 3/8 R^2):                                    residual 5/8 R^3 + ...  <= 5/8 r^3 + 3/8 r^4
    X (I + R / 2 + 3/8 R^2 + 5/16 R^3 + 35/128 R^4):            residual 63/128 R^5 + ...

(Taylor's polynomials of (1 - r)^(-1/2); the coefficients of each residual are positive and add up to 1). The bound is
too wide for the second, so there ||I - Z G Z||_F is estimated with a few vectors of signs: one missing direction alone
would make it 1. Where it is not small the answer is that there is none.

Reference: N. Amsel, D. Persson, C. Musco, R. Gower, "The Polar Express" (2025); N. Higham, "Functions of Matrices"
(2008), section 8.3.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from groundstate.norms.polar_gram import fill_symmetric

_FLAT = 0.999  # the exchange is ill-conditioned on shorter intervals, and Taylor's quintic as good
_NARROWEST = 0.15  # least guess of sigma_n / sigma_1: below, one quintic leaves too large a residual for one more step
_WIDEST = 0.3  # ||R^2||_F^(1/2) over n^(1/4), about the rms of |1 - x^2|, from which on one more step is not enough
_PROBES = 8  # vectors that estimate the residual
_HEADROOM = 1.03  # on the guess of the largest eigenvalue
_SPLIT = 256  # a product known to be symmetric is made by blocks from this size on


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


def inverse_root(gram: Tensor, target: float) -> Tensor | None:
    """Returns G^(-1/2).

    Args:
        gram: G, ``(n, n)``, symmetric, float32, of moderate scale.
        target: For the error relative to the norm of the polar factor, ||I - G^(1/2) Z||_F / sqrt(n).

    Returns:
        ``(n, n)``, or ``None`` where the spectrum is too wide for a proof.

    Cost: five or six products of size n.

    >>> z = inverse_root(torch.tensor([[4.0, 0.0], [0.0, 2.25]]), 1e-4)
    >>> z is not None and torch.allclose(z, torch.tensor([[0.5, 0.0], [0.0, 2 / 3]]), atol=1e-4)
    True
    """
    n = len(gram)
    mean, norm = float(gram.trace()) / n, float(torch.linalg.vector_norm(gram))
    if not norm * norm < 2 * n * mean * mean:
        return None
    spread = math.sqrt(max(norm * norm / (n * mean * mean) - 1, 0.0))
    lower = (1 - spread) / (1 + spread)
    if lower < _NARROWEST:
        return None
    top = mean * (1 + spread) ** 2 * _HEADROOM
    a, b, c, _ = coefficients(round(lower, 3))
    factor = _product(gram, gram).mul_(c / top**2).add_(gram, alpha=b / top)
    factor.diagonal().add_(a)
    residual = _product(_product(gram, factor), factor).mul_(-1 / top)
    residual.diagonal().add_(1)
    square = _product(residual, residual)
    widest = math.sqrt(float(torch.linalg.vector_norm(square)))  # ||r||_4, at least the largest |r|
    # The error of a singular value is at most half its residual, as that is small.
    bound = 2 * target * math.sqrt(n)
    if widest**3 * (0.625 + 0.375 * widest) <= bound:
        return _last(factor, residual.mul_(0.5).add_(square, alpha=0.375), top)
    if not widest <= _WIDEST * n**0.25:
        return None
    last = _product(square, (5 / 16) * residual + (35 / 128) * square)
    z = _last(factor, last.add_(residual, alpha=0.5).add_(square, alpha=0.375), top)
    signs = _signs(n).to(gram)
    left = torch.linalg.vector_norm(signs - z @ (gram @ (z @ signs)))
    return z if float(left) <= bound * math.sqrt(_PROBES) else None


def _last(factor: Tensor, series: Tensor, top: float) -> Tensor:
    """factor (I + series) / sqrt(top), for commuting symmetric matrices."""
    series.diagonal().add_(1)
    return _product(factor, series).mul_(1 / math.sqrt(top))


@lru_cache(maxsize=16)
def _signs(n: int) -> Tensor:
    """Columns of signs without structure: those of cos(k j^2), the same in every call."""
    j = torch.arange(1, n + 1, dtype=torch.float64)[:, None]
    return (j * j * torch.arange(1, _PROBES + 1, dtype=torch.float64)).cos().sign()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """A B, known to be symmetric."""
    if len(a) < _SPLIT or a.device.type != "cpu":
        return a @ b
    product = torch.empty_like(a)
    fill_symmetric(product, a, b)
    return product
