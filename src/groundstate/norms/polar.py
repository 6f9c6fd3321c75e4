"""The polar factor of a matrix, W = Q H with H = (W^T W)^(1/2): the gradient of the nuclear norm.

Idea: several routes lead to Q and ||W||_* = tr H; which is fastest depends on the shape and on the singular values.

- ``svd``: Q = U V^T, always works.
- ``gram``: eigenvectors of the Gram matrix, small singular values treated apart (`polar_gram`). Works for any rank.
- ``halley``: one rational function of the Gram matrix (`qdwh.halley_gram`); tall, well-conditioned matrices.
- ``qdwh``: Halley's iteration (`qdwh`), and ``express``, polynomials alone (`polar_express`); full rank.

``auto`` tries them in an order that `polar_table` holds the constants of. Each estimates its own error from what it
computed, and a matrix whose estimate is above the tolerance goes on to the next; the last is the SVD. Singular values
that count as zero (`spectral.tolerance`, with the eps of the weights) get none of Q: the minimal-norm subgradient. The
iterations cannot tell them from small ones, so they only serve matrices proved to have none.

Reference: N. Higham, "Functions of Matrices" (2008), chapter 8.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from groundstate.errors import UsageError
from groundstate.norms.polar_express import symmetric_product
from groundstate.norms.polar_gram import gram_polar, svd_polar
from groundstate.norms.polar_table import constants
from groundstate.norms.qdwh import halley_gram, largest, qdwh
from groundstate.norms.spectral import prepare, tolerance

Route = Literal["auto", "svd", "gram", "qdwh", "express"]
_Factors = tuple[Tensor, Tensor, Tensor]

# Bounds on the estimated relative error of Q: of tall matrices in float32, where more costs little, of nearly square
# ones, and of both in float64.
_TRUST_TALL, _TRUST_SQUARE, _TRUST_DOUBLE = 1e-4, 5e-4, 2e-11
# The same for Halley's iteration, whose estimate is two to ten times the error.
_TRUST_HALLEY = 8e-4
# Bounds on ||I - Q^T Q||_F / sqrt(n) where an iteration may stop; what it is then is mostly far smaller.
_TARGET_SQUARE, _TARGET_TALL, _TARGET_DOUBLE = 2e-4, 1e-5, 1e-13


def polar(w: Tensor, route: Route = "auto") -> tuple[Tensor, Tensor]:
    """Returns the minimal-norm polar factor and the nuclear norm, without an autograd graph.

    Args:
        w: ``(*batch, m, n)``, any scale; m or n may be 0. In a batch each matrix takes the first route that is accurate
            enough for it.
        route: ``"auto"``, or what to try first, whatever it costs: ``"svd"``, ``"gram"``, ``"qdwh"``, ``"express"``.
            Where that is not accurate enough the SVD follows.

    Returns:
        ``(q, value)``: q of the shape and dtype of w, value ``(*batch,)``, float64 for float64 and float32 otherwise.
        In float32 q is within 1e-3 of the exact one (1e-4 for tall and wide matrices), relative to its norm, or as good
        as the SVD where singular values are so small that this is not; in float64 within 1e-10. The value is more
        accurate than q: mostly to 1e-6 in float32, to 1e-4 at worst.

    Raises:
        UsageError: an unknown route, or not a real floating-point matrix.
        NonFiniteError: w holds NaN or infinity, or no decomposition converges.

    Cost: for min(m, n) <= 0.7 max(m, n) about 4 m n min(m, n) flops and ten times min(m, n)^3; else half to two thirds
    of an SVD. For ill-conditioned matrices an SVD.

    >>> polar(torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
    (tensor([[0., 1.],
            [0., 0.]]), tensor(3.))
    """
    return polar_with_error(w, route)[:2]


def polar_with_error(w: Tensor, route: Route = "auto") -> tuple[Tensor, Tensor, Tensor]:
    """Returns what `polar` does, and an estimate of the error of q before it is rounded to the dtype of w.

    Returns:
        ``(q, value, error)``: error ``(*batch,)`` relative to the square root of min(m, n), good to a factor of about
        three.

    >>> float(polar_with_error(torch.eye(3))[2]) < 1e-5
    True
    """
    if route not in get_args(Route):
        raise UsageError(f"route must be one of {', '.join(map(repr, get_args(Route)))}, got {route!r}")
    with torch.no_grad():
        w = w.detach()
        work, scale = prepare(w)
        if work.numel() == 0 or (scale is not None and not bool(work.any())):
            nothing = work.new_zeros(w.shape[:-2])
            return torch.zeros_like(w), nothing, nothing
        wide = w.shape[-2] < w.shape[-1]
        flat = (work.mT if wide else work).reshape(-1, max(w.shape[-2:]), min(w.shape[-2:]))
        q, value, error = _first_accurate(_routes(flat, route), flat, tolerance(w))
        q = (q.mT if wide else q).reshape(w.shape).to(w.dtype)
        value, error = value.reshape(w.shape[:-2]), error.reshape(w.shape[:-2])
        return q, value if scale is None else (value * scale[..., 0, 0]).to(value.dtype), error


def smoothed_polar(w: Tensor, e: float) -> tuple[Tensor, Tensor] | None:
    """Returns W (W^T W + e^2 I)^(-1/2) and sum_i sqrt(sigma_i^2 + e^2) - e, by the Gram matrix of the smaller side.

    Args:
        w: ``(*batch, m, n)``.
        e: Above 0, in the units of w.

    Returns:
        ``(gradient, value)``, gradient in the dtype of w, or ``None`` where an SVD is as fast, or e so small beside
        sigma_1 that a Gram matrix is not accurate (about 1/20 in float32), or the scale is extreme.

    Raises:
        UsageError: not a real floating-point matrix.
        NonFiniteError: w holds NaN or infinity.

    Cost: 3.5 m n^2 + 2 n^3 flops and an eigh of size n, n the smaller side.
    """
    with torch.no_grad():
        work, scale = prepare(w.detach())
        wide = w.shape[-2] < w.shape[-1]
        m, n = max(w.shape[-2:]), min(w.shape[-2:])
        if scale is not None or work.numel() == 0 or (n < constants(w.device.type).side and m * n * n <= 1e6):
            return None
        tall = (work.mT if wide else work).reshape(-1, m, n)
        gram = symmetric_product(tall)
        size = float(largest(gram).max()) ** 2
        trust = _TRUST_DOUBLE if work.dtype == torch.float64 else _TRUST_TALL
        if 2 * torch.finfo(work.dtype).eps * size > trust * e * e:
            return None
        lam, v = torch.linalg.eigh(gram)
        root = (lam.clamp_min_(0) + e * e).sqrt_()
        half = v * root.rsqrt()[:, None, :]
        q = tall @ (half @ half.mT)
        value = (lam / (root + e)).sum(-1)  # root - e, without the cancellation
        return (q.mT if wide else q).reshape(w.shape).to(w.dtype), value.reshape(w.shape[:-2])


def _first_accurate(routes: list[Callable[[Tensor, float], _Factors]], tall: Tensor, zero: float) -> _Factors:
    """Takes each matrix of a batch from the first route whose error is finite there."""
    q, value, error = routes[0](tall, zero)
    if len(routes) == 1:
        return q, value, error
    left = ~error.isfinite()
    if not bool(left.any()):
        return q, value, error
    again = _first_accurate(routes[1:], tall[left], zero)
    if bool(left.all()):
        return again
    q[left], value[left], error[left] = again
    return q, value, error


def _routes(tall: Tensor, route: Route) -> list[Callable[[Tensor, float], _Factors]]:
    """What to try, in this order."""
    named: dict[str, Callable[[Tensor, float], _Factors]] = {"gram": _gram, "qdwh": _qdwh, "express": _express}
    if route != "auto":
        return [named[route], svd_polar] if route in named else [svd_polar]
    table, (m, n) = constants(tall.device.type), tall.shape[-2:]
    is_tall = n <= table.aspect * m
    if m * n * n <= table.work if is_tall else n < table.side:
        return [svd_polar]
    gram = symmetric_product(tall)
    evenness = _evenness(gram)
    if is_tall and evenness >= table.even:
        return [partial(_halley, gram=gram), _gram]
    if n >= table.qdwh_side and evenness < (table.steep if is_tall else table.flat):
        return [partial(_qdwh, gram=gram), svd_polar]
    return [svd_polar] if not is_tall and evenness < table.steep else [partial(_gram, gram=gram)]


def _evenness(gram: Tensor) -> float:
    """(tr G)^2 / (n tr G^2), the least of a batch; NaN, which is neither above nor below, for a zero matrix."""
    trace = gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    ratio = trace / torch.linalg.vector_norm(gram, dim=(-2, -1))
    return float(ratio.min()) ** 2 / gram.shape[-1]


def _gram(tall: Tensor, zero: float, gram: Tensor | None = None) -> _Factors:
    nearly_square = tall.shape[-1] > constants(tall.device.type).aspect * tall.shape[-2]
    single = _TRUST_SQUARE if nearly_square else _TRUST_TALL
    return gram_polar(tall, zero, _TRUST_DOUBLE if tall.dtype == torch.float64 else single, gram=gram)


def _halley(tall: Tensor, zero: float, gram: Tensor | None = None) -> _Factors:
    double = tall.dtype == torch.float64
    trust, target = (_TRUST_DOUBLE, _TARGET_DOUBLE) if double else (_TRUST_TALL, _TARGET_TALL)
    return halley_gram(tall, trust, target, gram)


def _qdwh(tall: Tensor, zero: float, gram: Tensor | None = None) -> _Factors:
    return _iterated(tall, zero, constants(tall.device.type).halley_below, gram)


def _express(tall: Tensor, zero: float) -> _Factors:
    return _iterated(tall, zero, 0.0)


def _iterated(tall: Tensor, zero: float, halley_below: float, gram: Tensor | None = None) -> _Factors:
    double = tall.dtype == torch.float64
    trust, target = (_TRUST_DOUBLE, _TARGET_DOUBLE) if double else (_TRUST_HALLEY, _TARGET_SQUARE)
    q, error = qdwh(tall, zero, trust, target, halley_below, gram)
    return q, (q * tall).sum((-2, -1), dtype=torch.float64).to(tall.dtype), error
