"""Singular value thresholding, and projections on nuclear and operator balls, without a full SVD where that pays.

Idea: with W = U diag(s) V^T and a threshold t, only what lies above the threshold is needed::

    SVT_t(W) = U diag((s - t)_+) V^T = W V_r diag(1 - t / s_r) V_r^T,   V_r: the eigenvectors of W^T W above t^2

and W - SVT_t(W) is the projection on the operator ball of radius t (Moreau). Three routes give V_r: the SVD of W; the
Gram matrix W^T W, all its eigenvalues but only the eigenvectors above t^2; or a block of vectors from a matrix nearby,
improved by power steps. Rounding of the Gram matrix costs eps * s_1^2 / t, so that route is for t not far below s_1.
A fourth needs all eigenvectors, and serves where most singular values are above t: it computes the clipped matrix
instead, which rounding disturbs less the smaller t is, and subtracts it (`clipping`).

A fast route proves its result, or the SVD takes over. Residuals R = W^T W V_r - V_r S_r^2 bound the error, because W is
within |R S_r^-1| of a matrix with exactly these singular vectors, and thresholding does not expand distances. The rank
is right if nothing lies within rounding of t and nothing above t was missed: the Gram matrix shows all eigenvalues; for
a block V with Ritz values L and mu < t, mu^2 - Z^T Z, Z = W - W V V^T, must have a Cholesky factor, and then the Schur
complement of W^T W - t^2 has no positive eigenvalue if ::

    mu^2 + sum_(L_j < t^2) |R_j|^2 / (t^2 - L_j) < t^2

Reference: J.-F. Cai, E. Candes, Z. Shen, "A singular value thresholding algorithm for matrix completion" (2010); B.
Parlett, "The Symmetric Eigenvalue Problem" (1998), chapters 3 and 11.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from groundstate.errors import UsageError
from groundstate.norms.clipping import clip_by_gram, probed_residual
from groundstate.norms.eigenvectors import eigenpairs, gram
from groundstate.norms.gauges import project_capped
from groundstate.norms.polar_gram import pivots, small_share
from groundstate.norms.spectral import LinAlgError, assemble, prepare, svd

Route = Literal["auto", "svd", "gram"]

# Allowed error of a fast route, relative to the result (a float32 SVD errs by 1e-6 to 6e-6), or in eps * |s| of the
# singular values kept, which is what the SVD itself cannot improve on.
_TOLERANCE = {torch.float32: 8e-6, torch.float64: 1e-12}
_FLOOR = 8.0
# Rounding of a Gram matrix and of its eigenvalues, in eps * s_1^2; singular values so near t are left to the SVD.
_ROUNDING = 16.0
# Below these the SVD is as fast: smaller side, and m * n * min(m, n).
_SMALLEST_SIDE, _SMALL = 48, 1e6
_ASPECT = 0.7  # above this ratio of the sides a float64 Gram matrix is no faster than a float32 SVD
# Where the mean square of the singular values is so many times the threshold's, most of them survive.
_MANY = 0.004
# Where a larger share of the pivots is so small, relative to the largest, clipping pays no more.
_SMALL_PIVOT, _MOSTLY = 1e-2, 0.35
# A block for the next matrix: how wide, at most what share of the smaller side, mu / t, and the most power steps.
_OVERSAMPLING, _LARGEST_BLOCK, _MARGIN, _STEPS = 1.4, 0.36, 0.95, 4


class _Found(NamedTuple):
    """A thresholded tall matrix, and right vectors that span what survived and a little more (or None: too many)."""

    result: Tensor
    basis: Tensor | None


@dataclass(frozen=True)
class _Request:
    """What is asked of a fast route, besides the threshold."""

    clip: bool = False  # the result is W - SVT(W)
    basis: bool = False  # a block for the next matrix

    def allowed(self, dtype: torch.dtype, s: Tensor, t: float) -> float:
        """Returns the error that a result with these singular values (above t, float64) may have."""
        rounding = torch.finfo(dtype).eps * float(torch.linalg.vector_norm(s))
        if self.clip:  # rounding of the products stays behind in W - SVT(W), which the SVD assembles without it
            return _TOLERANCE[dtype] * t * math.sqrt(len(s)) - rounding
        return max(_TOLERANCE[dtype] * float(torch.linalg.vector_norm(s - t)), _FLOOR * rounding)


_PLAIN = _Request()


def singular_value_threshold(w: Tensor, t: float, route: Route = "auto", subspace: Tensor | None = None) -> Tensor:
    """Returns U diag((s - t)_+) V^T, the proximal map of t times the nuclear norm, without an autograd graph.

    Args:
        w: ``(*batch, m, n)``, any scale; m or n may be 0.
        t: The threshold, finite and not negative.
        route: ``"svd"``; ``"gram"``, the Gram matrix for any shape, and the SVD only where that cannot prove its
            result; ``"auto"``, the same unless the matrix is small or nothing is gained.
        subspace: What `threshold_with_subspace` returned for a matrix near w; not for a batch.

    Returns:
        The shape and dtype of w. Its rank, before it is rounded to half precision, is the number of singular values
        above t.

    Raises:
        UsageError: an unknown route, a bad threshold, a subspace of the wrong shape, or not a real floating-point
            matrix.
        NonFiniteError: w holds NaN or infinity, or no decomposition converges.

    Cost: one SVD; or a Gram matrix, its tridiagonal form and 4 m n r + 2 n^2 r flops for the r singular values that
    survive (n the smaller side): from side 512 on, a fifth to two fifths of an SVD. Where nearly all of them survive,
    one ``eigh`` and `clip_by_gram`: half of an SVD to all of it. Where singular values fall like 1 / i and t is among
    the small ones, up to 1.8 SVDs: one, and what it took to find out. The BLAS of scipy keeps threads of its own.

    >>> singular_value_threshold(torch.diag(torch.tensor([3.0, 4.0])), 3.5)
    tensor([[0.0000, 0.0000],
            [0.0000, 0.5000]])
    """
    return _threshold(w, t, route, subspace, _PLAIN)[0]


def threshold_with_subspace(
    w: Tensor, t: float, route: Route = "auto", subspace: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Returns `singular_value_threshold` and the subspace to pass with the next matrix, a little different from w.

    Pays where few singular values survive, step after step, and others stay well below t; at any ratio of s_1 to t.

    Returns:
        ``(result, subspace)``: the subspace has orthonormal columns of the length of the smaller side. It is ``None``
        for a batch, where nothing survives, and where so much survives that it would not help.

    >>> w = torch.diag(torch.tensor([3.0, 4.0]))
    >>> threshold_with_subspace(w, 5.0)
    (tensor([[0., 0.],
            [0., 0.]]), None)
    """
    return _threshold(w, t, route, subspace, _Request(basis=w.ndim == 2))


def project_operator_ball(w: Tensor, radius: float, route: Route = "auto") -> Tensor:
    """Returns the nearest matrix with singular values of at most ``radius``: U diag(min(s, radius)) V^T.

    By Moreau's identity it is w - `singular_value_threshold` (w, radius); arguments, errors and cost are the same. The
    largest singular value exceeds the radius by rounding at most, about 1e-5 of it in float32.

    >>> project_operator_ball(torch.diag(torch.tensor([3.0, 4.0])), 3.5)
    tensor([[3.0000, 0.0000],
            [0.0000, 3.5000]])
    """
    _check(w, radius, "radius", route, None)
    with torch.no_grad():
        w = w.detach()
        work, scale = prepare(w)
        if w.numel() == 0 or _all_below(work, scale, radius):
            return w.clone()
        if radius == 0:
            return torch.zeros_like(w)
        found = _fast(work, scale, radius, route, None, _Request(clip=True))
        if found is not None:
            return _restored(work - found.result, scale, w)
        u, s, vh = svd(w)
        return assemble(u, s.double().clamp_max(radius), vh, w)


def project_nuclear_ball(w: Tensor, radius: float, route: Route = "auto") -> Tensor:
    """Returns the nearest matrix whose singular values sum to at most ``radius``: those lowered by one amount.

    Arguments, errors and cost as of `singular_value_threshold`, with a radius in the place of the threshold.

    >>> project_nuclear_ball(torch.diag(torch.tensor([3.0, 4.0])), 5.0)
    tensor([[2., 0.],
            [0., 3.]])
    """
    _check(w, radius, "radius", route, None)
    with torch.no_grad():
        w = w.detach()
        work, scale = prepare(w)
        if radius == 0 or w.numel() == 0:
            return torch.zeros_like(w)
        if _all_below(work, scale, radius / math.sqrt(min(w.shape[-2:]))):
            return w.clone()
        if route == "gram" or (route == "auto" and _worth_trying(work)):
            found = _each(work, scale, lambda tall, one: _by_gram(tall, lambda s: _lowering(s, radius / one), None))
            if found is not None:
                return _restored(found.result, scale, w)
        u, s, vh = svd(w)
        s = s.double()
        inside = s.sum(-1) <= radius
        return torch.where(inside[..., None, None], w, assemble(u, project_capped(s, float(s.max()), radius), vh, w))


def _threshold(
    w: Tensor, t: float, route: Route, subspace: Tensor | None, request: _Request
) -> tuple[Tensor, Tensor | None]:
    _check(w, t, "threshold", route, subspace)
    with torch.no_grad():
        w = w.detach()
        work, scale = prepare(w)
        if t == 0 or w.numel() == 0:
            return w.clone(), None
        if _all_below(work, scale, t):
            return torch.zeros_like(w), None
        found = _fast(work, scale, t, route, subspace, request)
        if found is not None:
            return _restored(found.result, scale, w), found.basis
        u, s, vh = svd(w)
        lowered = (s.double() - t).clamp_min(0)
        basis = None
        if request.basis and (k := _width(int((lowered > 0).sum()), s.shape[-1])):
            basis = u[:, :k] if w.shape[0] < w.shape[1] else vh[:k].mT
        return assemble(u, lowered, vh, w), basis


def _check(w: Tensor, t: float, name: str, route: Route, subspace: Tensor | None) -> None:
    if not 0 <= t < math.inf:
        raise UsageError(f"the {name} must be finite and not negative, got {t!r}")
    if route not in ("auto", "svd", "gram"):
        raise UsageError(f"route must be 'auto', 'svd' or 'gram', got {route!r}")
    if subspace is None:
        return
    if w.ndim != 2 or subspace.ndim != 2 or subspace.shape[0] != min(w.shape) or subspace.shape[1] > min(w.shape):
        raise UsageError(
            f"a subspace for a matrix of shape {tuple(w.shape)} has as many rows as its smaller side and no more "
            f"columns (batches take none), got {tuple(subspace.shape)}: pass what `threshold_with_subspace` returned"
        )


def _all_below(work: Tensor, scale: Tensor | None, t: float) -> bool:
    """Whether the Frobenius norms, which bound all singular values, are at most t."""
    size = torch.linalg.vector_norm(work.double(), dim=(-2, -1), keepdim=True)
    return bool((size * (1.0 if scale is None else scale) <= t).all())


def _restored(result: Tensor, scale: Tensor | None, w: Tensor) -> Tensor:
    return (result if scale is None else result * scale.to(result.dtype)).to(w.dtype)


def _worth_trying(work: Tensor) -> bool:
    small, large = sorted(work.shape[-2:])
    return small >= _SMALLEST_SIDE and large * small**2 > _SMALL


def _fast(
    work: Tensor, scale: Tensor | None, t: float, route: Route, subspace: Tensor | None, request: _Request
) -> _Found | None:
    """Thresholds every matrix of a batch by a fast route, or returns ``None``."""
    if route == "svd" or (route == "auto" and not _worth_trying(work)):
        return None

    def one(tall: Tensor, factor: float) -> _Found | None:
        level = t / factor
        if float(torch.linalg.vector_norm(tall)) <= level:
            return _Found(torch.zeros_like(tall), None)
        if subspace is not None and subspace.shape[1]:
            found = _carried(tall, level, subspace.to(tall), request)
            if found is not None:
                return found
        return _by_gram(tall, lambda s: level, level, request)

    return _each(work, scale, one)


def _each(work: Tensor, scale: Tensor | None, one: Callable[[Tensor, float], _Found | None]) -> _Found | None:
    """Calls ``one`` with every matrix of a batch, transposed where wide, and its scale; ``None`` if any gives that."""
    m, n = work.shape[-2:]
    flat = (work.mT if m < n else work).reshape(-1, max(m, n), min(m, n))
    factors = [1.0] * len(flat) if scale is None else scale.flatten().tolist()
    found: list[_Found] = []
    for tall, factor in zip(flat, factors):
        result = one(tall, factor) if factor and tall.any() else _Found(torch.zeros_like(tall), None)
        if result is None:
            return None
        found.append(result)
    stacked = torch.stack([x.result for x in found]) if len(found) > 1 else found[0].result[None]
    return _Found((stacked.mT if m < n else stacked).reshape(work.shape), found[0].basis)


# The Gram matrix.


def _by_gram(
    tall: Tensor, choose: Callable[[Tensor], float], least: float | None, request: _Request = _PLAIN
) -> _Found | None:
    """Thresholds by the eigenvectors of the Gram matrix, in float32 and, for tall matrices, in float64.

    Args:
        tall: ``(m, n)``, m >= n.
        choose: Maps the singular values (float64, descending) to the threshold; 0 or less: no result.
        least: The threshold itself, where it is known.
        request: What else is asked for.
    """
    double_pays = tall.dtype == torch.float64 or tall.shape[-1] <= _ASPECT * tall.shape[-2]
    for dtype in dict.fromkeys((tall.dtype, torch.float64)):
        if dtype != tall.dtype and not double_pays:
            return None
        g = gram(tall.to(dtype))
        eps, size = torch.finfo(dtype).eps, float(g.diagonal().sum())
        resolved = _ROUNDING * eps * float(torch.linalg.vector_norm(g)) ** 2 / size
        try:
            if least is not None and dtype == tall.dtype and least**2 < max(resolved, _MANY * size / len(g)):
                half = (len(g) + 1) // 2
                if small_share(pivots(g[:half, :half]), _SMALL_PIVOT) > _MOSTLY:
                    continue
                lam, v = torch.linalg.eigh(g)
                found = _by_clipping(tall, lam, v, least, request)
                if found is not None:
                    return found
                continue
            if least is not None and least**2 <= resolved:
                continue
            lam, leading = eigenpairs(g)
        except LinAlgError:
            continue
        lam = lam.double()
        t = choose(lam.clamp_min(0).sqrt())
        if t <= 0:
            continue
        if bool(((lam - t**2).abs() <= _ROUNDING * eps * lam[0]).any()):
            most = len(lam) - int((lam > t**2).sum()) > _MOSTLY * len(lam)
            if least is not None and dtype == tall.dtype and not (double_pays and most):
                found = _by_clipping(tall, lam.flip(0).to(dtype), leading(len(lam)).flip(1), t, request)
                if found is not None:
                    return found
            continue
        r = int((lam > t**2).sum())
        s = lam[:r].sqrt()
        allowed = request.allowed(tall.dtype, s, t)
        if eps * float(lam[0] * torch.linalg.vector_norm(1 / s)) > 2 * allowed:  # no less than half of it is met with
            continue
        k = _width(r, len(lam)) if request.basis else 0
        basis = leading(max(k, r))
        v = basis[:, :r]
        if probed_residual(tall, v, lam[:r], 1 / s) <= allowed:
            v, basis = v.to(tall.dtype), basis.to(tall.dtype)
            result = (tall @ v * (1 - t / s).to(tall.dtype)) @ v.mT
            return _Found(result, basis if k else None)
    return None


def _by_clipping(tall: Tensor, lam: Tensor, v: Tensor, t: float, request: _Request) -> _Found | None:
    """Thresholds by what `clip_by_gram` leaves of a tall matrix."""
    s = lam[lam > t**2].double().sqrt()
    if not request.clip and 4 * t * t > float(lam[-1]):  # what rounding leaves of the others could count in the rank
        return None
    found = clip_by_gram(tall, lam, v, t, request.allowed(tall.dtype, s, t))
    if found is None:
        return None
    clipped, r = found
    k = _width(r, len(lam)) if request.basis else 0
    return _Found(torch.sub(tall, clipped, out=clipped), v[:, -k:].flip(1) if k else None)


def _lowering(s: Tensor, total: float) -> float:
    """Returns by how much nonnegative numbers are lowered until they sum to the total; 0 or less: by nothing."""
    if float(s.sum()) <= total:
        return 0.0
    return float(s[0] - project_capped(s, float(s[0]), total)[0])


def _width(r: int, n: int) -> int:
    """Returns how many leading vectors, of r that survive and n in all, serve for the next matrix; 0: none do."""
    k = int(_OVERSAMPLING * r) + 8
    return k if r > 0 and k <= _LARGEST_BLOCK * n else 0


# A block of vectors from a matrix nearby.


def _carried(tall: Tensor, t: float, y: Tensor, request: _Request) -> _Found | None:
    """Thresholds by a block of vectors and power steps of W; at any ratio of s_1 to t."""
    edge, eps = (_MARGIN * t) ** 2, torch.finfo(tall.dtype).eps
    previous = math.inf
    for _ in range(_STEPS):
        q = _orthonormal(y)
        try:
            u, s, zh = torch.linalg.svd(tall @ q, full_matrices=False)
        except LinAlgError:
            return None
        v, y = q @ zh.mT, tall.mT @ u
        residual = torch.linalg.vector_norm(y - v * s, dim=0).double() * s.double()
        lam = s.double().square()
        r, k = int((s > t).sum()), int((lam > edge).sum())
        error = _turned(lam[:r], residual[:r], t, edge)
        if error <= request.allowed(tall.dtype, s[:r].double(), t):
            gap = (lam[:k] - t**2).abs()
            rounding = _ROUNDING * eps * float(s[0]) * t
            missed = edge + rounding + float((residual[r:k].square() / gap[r:]).sum())
            if bool((gap <= rounding).any()) or missed >= t**2:
                return None
            if not _bounded(tall - (u[:, :k] * s[:k]) @ v[:, :k].mT, edge):
                return None
            return _Found(
                (u[:, :r] * (s[:r].double() - t).to(s.dtype)) @ v[:, :r].mT,
                v[:, : _width(r, len(v)) or None] if r else None,
            )
        if error > previous / 2:
            return None
        previous = error
    return None


def _turned(lam: Tensor, residual: Tensor, t: float, rest: float) -> float:
    """Returns a bound (of first order) on the error of a thresholded matrix.

    A residual e_i = |R_i| / s_i to one side turns the pair of s_i and of an x <= sqrt(rest) off the block, and the
    result by e_i (s_i - t) (s_i^2 + x^2)^(1/2) / (s_i^2 - x^2).
    """
    s = lam.sqrt()
    return float(torch.linalg.vector_norm(residual / s * (s - t) * (lam + rest).sqrt() / (lam - rest)))


def _bounded(z: Tensor, edge: float) -> bool:
    """Whether the singular values of z are at most sqrt(edge), by a Cholesky factor of edge - Z^T Z."""
    rest = gram(z).neg_()
    rest.diagonal().add_(edge)
    return int(torch.linalg.cholesky_ex(rest).info) == 0


def _orthonormal(y: Tensor) -> Tensor:
    size = torch.linalg.vector_norm(y, dim=0)
    return torch.linalg.qr(y / torch.where(size > 0, size, 1.0)).Q
