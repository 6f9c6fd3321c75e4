"""The polar factor of a matrix, W = Q H with H = (W^T W)^(1/2): the gradient of the nuclear norm.

Idea: several routes lead to Q and ||W||_* = tr H; which is fastest depends on the shape and on the singular values.

- ``svd``: Q = U V^T, always works.
- ``gram``: eigenvectors of the Gram matrix, small singular values treated apart (`polar_gram.split_polar`).
- ``double``: eigenvectors of a float64 Gram matrix of float32 weights (`polar_gram.double_polar`).
- ``express``: polynomials of the Gram matrix (`polar_express`); tall, well-conditioned matrices.

``auto`` predicts the fastest one from the shape and from the Cholesky pivots of the Gram matrix of one half of the
columns. Each route knows what it cannot do; then
the next one follows, at last the SVD. So a wrong prediction costs time only, and `polar_table` holds the constants.
Singular values that count as zero (`spectral.tolerance`, with the eps of the weights) get none of Q: the minimal-norm
subgradient.

Reference: N. Higham, "Functions of Matrices" (2008), chapter 8.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from groundstate.errors import UsageError
from groundstate.norms.polar_express import inverse_root
from groundstate.norms.polar_gram import (
    complete_symmetric,
    double_polar,
    pivots,
    small_share,
    split_polar,
    svd_polar,
    symmetric_product,
)
from groundstate.norms.polar_table import constants
from groundstate.norms.spectral import prepare, tolerance

Route = Literal["auto", "svd", "gram", "double", "express"]
_ROUTES = get_args(Route)

# Bounds on the estimated relative error of Q from one Gram matrix, also where singular values are asked for, and of
# float64 matrices; then from polynomials.
_TRUST, _TRUST_SPECTRUM, _TRUST_DOUBLE = 4e-4, 4e-5, 2e-11
_TARGET = 4e-4
# Traces of a Gram matrix between which no square in float32 leaves its range.
_LOW, _HIGH = 2.0**-80, 2.0**80


def polar(w: Tensor, route: Route = "auto") -> tuple[Tensor, Tensor]:
    """Returns the minimal-norm polar factor and the nuclear norm, without an autograd graph.

    Args:
        w: ``(*batch, m, n)``, any scale; m or n may be 0. In a batch each matrix takes the route that suits it.
        route: ``"auto"``, or what to try first, whatever it costs: ``"svd"``, ``"gram"``, ``"double"``, ``"express"``.

    Returns:
        ``(q, value)``: q of the shape and dtype of w, value ``(*batch,)``, float64 for float64 and float32 otherwise.
        In float32 q is within 1e-3 of the exact one, relative to its norm, or as good as the SVD where singular values
        are so small that this is not; in float64 within 1e-10. The value is more accurate than q: in float32 mostly to
        1e-6, to 2e-5 at worst.

    Raises:
        UsageError: an unknown route, or not a real floating-point matrix.
        NonFiniteError: w holds NaN or infinity, or no decomposition converges.

    Cost: half to two thirds of an SVD for square matrices, a quarter to a half for tall and wide ones; up to an SVD
    where most singular values are below a hundredth of the largest.

    >>> polar(torch.tensor([[0.0, 3.0], [0.0, 0.0]]))
    (tensor([[0., 1.],
            [0., 0.]]), tensor(3.))
    """
    if route not in _ROUTES:
        raise UsageError(f"route must be one of {', '.join(map(repr, _ROUTES))}, got {route!r}")
    with torch.no_grad():
        w = w.detach()
        found = _quick(w, route, False)
        if found is not None:
            return found[0], found[1].sum(-1)
        q, s, scale = _careful(w, route, False)
        value = s.sum(-1)
        return q, value if scale is None else (value * scale[..., 0, 0]).to(value.dtype)


def polar_and_spectrum(w: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the minimal-norm polar factor and the singular values, without an autograd graph.

    Args:
        w: ``(*batch, m, n)``, any scale; m or n may be 0.

    Returns:
        ``(q, s)``: q as `polar` gives it, in float32 mostly within 1e-4 of the exact one; s ``(*batch, min(m, n))`` in
        descending order, float64 for float64 and float32 otherwise, there within about 1e-6 sigma_1. Singular values
        that count as zero may be exactly 0.

    Raises:
        UsageError: not a real floating-point matrix.
        NonFiniteError: w holds NaN or infinity, or no decomposition converges.

    Cost: as `polar`, without the polynomials.

    >>> polar_and_spectrum(torch.tensor([[3.0], [4.0]]))
    (tensor([[0.6000],
            [0.8000]]), tensor([5.]))
    """
    with torch.no_grad():
        w = w.detach()
        found = _quick(w, "auto", True)
        q, s, scale = (*found, None) if found is not None else _careful(w, "auto", True)
        s = s.sort(descending=True).values
        return q, s if scale is None else (s * scale[..., 0]).to(s.dtype)


def _quick(w: Tensor, route: Route, spectrum: bool) -> tuple[Tensor, Tensor] | None:
    """The answer for one float32 matrix of ordinary scale, which needs no preparation."""
    if w.ndim != 2 or w.dtype != torch.float32 or w.numel() == 0 or route not in ("auto", "gram"):
        return None
    return _one(w, tolerance(w), route, spectrum)


def _careful(w: Tensor, route: Route, spectrum: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Q, numbers that add up to the nuclear norm (the singular values if asked for), and a scale to multiply these."""
    work, scale = prepare(w)
    zero = tolerance(w)
    if work.numel() == 0 or (scale is not None and not bool(work.any())):
        return torch.zeros_like(w), work.new_zeros(*w.shape[:-2], min(w.shape[-2:])), None
    table = constants(w.device.type)
    n, double, auto = min(w.shape[-2:]), w.dtype == torch.float64, route == "auto"
    tiny = n <= table.tiny
    elongated = n <= table.aspect * max(w.shape[-2:])
    if route == "svd" or (auto and (double if tiny else not elongated and (double or n <= table.square))):
        q, s = svd_polar(work, zero)
    elif (auto and tiny) or (route == "double" and not double):
        q, s = double_polar(work, zero) or svd_polar(work, zero)
    else:
        each = [_one(x, zero, route, spectrum) or svd_polar(x, zero) for x in work.reshape(-1, *work.shape[-2:])]
        if not spectrum:
            each = [(q, s.sum()[None]) for q, s in each]
        q, s = each[0] if len(each) == 1 else map(torch.stack, zip(*each))
        q, s = q.reshape(w.shape), s.reshape(*w.shape[:-2], -1)
    return q.to(w.dtype), s, scale


def _one(w: Tensor, zero: float, route: Route, spectrum: bool) -> tuple[Tensor, Tensor] | None:
    """The best route for one matrix, ``(m, n)``, or ``None`` where its scale is extreme or nothing but an SVD helps."""
    double = w.dtype == torch.float64
    tall = w.shape[0] >= w.shape[1]
    rows = w.mT if tall else w
    n, table = len(rows), constants(w.device.type)
    if route == "auto" and n <= max(table.tiny, 1):
        found = None if double else double_polar(w, zero)
        return found if found is not None and _LOW < float(found[1][-1]) ** 2 < _HIGH else None
    gram, half = w.new_empty(n, n), n // 2
    trust = _TRUST_DOUBLE if double else _TRUST_SPECTRUM if spectrum else _TRUST
    even = True
    if route == "auto":
        elongated = n <= table.aspect * rows.shape[1]
        if not elongated and n <= table.square:
            return None
        found = pivots(symmetric_product(rows[:half], out=gram[:half, :half]))
        if not _LOW < sum(found) < _HIGH:
            return None
        if small_share(found) > table.small:
            return double_polar(w, zero) if elongated and not double else svd_polar(w, zero)
        complete_symmetric(gram, rows)
        even = elongated and not spectrum and min(found) >= table.even * max(found)
    else:
        symmetric_product(rows, out=gram)
        if not _LOW < float(gram.trace()) < _HIGH:
            return None
    if even and not double and route in ("auto", "express"):
        gram[:half, half:] = gram[half:, :half].mT
        z = inverse_root(gram, _TARGET)
        if z is not None:
            return (w @ z if tall else z @ w), (z * gram).sum(dtype=torch.float64).to(w.dtype)[None]
    if double and not _promising(gram):
        return None
    return split_polar(w, gram, zero, trust)


def _promising(gram: Tensor) -> bool:
    """Whether a float64 Gram matrix, its lower triangle, may be accurate enough.

    The largest eigenvalue is at least ||G||_F^2 / tr G; the smallest is mostly below a tenth of the least pivot.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    largest = float(torch.linalg.vector_norm(gram.tril())) ** 2 / float(gram.trace())
    least = float(factor.diagonal().min()) ** 2
    return not int(failed) and torch.finfo(gram.dtype).eps * largest <= 0.1 * _TRUST_DOUBLE * least
