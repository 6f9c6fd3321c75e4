"""Leading singular triplets from random samples of the range, with an error that is measured, not hoped for.

Idea: the range of Y = (W W^T)^q W Omega, with Omega Gaussian of a few more columns than the rank k, nearly holds the
leading left singular vectors of W. With Q an orthonormal basis of it, the SVD of the small matrix Q^T W gives
U S V^T: about (2 q + 2) m n k multiplications by matrices in the place of a full decomposition.

Nothing about the result rests on how well that went. The residual E = W - U S V^T is formed, so ||E||_F is exact, and
||E||_2 is bounded from fresh Gaussian vectors w_1 .. w_p, which know nothing of E::

    ||E||_2^(2 q + 1) <= 10 sqrt(2 / pi) max_i ||(E E^T)^q E w_i||       but with probability at most 10^-p

(Halko et al., lemma 4.1 and equation 4.3, for (E E^T)^q E, whose norm is ||E||_2^(2 q + 1)). All singular values
found are lower bounds of those of W, so bound / s_{k+1} bounds how far from the best possible the result can be.

Reference: N. Halko, P. Martinsson, J. Tropp, "Finding structure with randomness" (2011), algorithms 4.2 and 4.4;
P. Martinsson, S. Voronin, "A randomized blocked algorithm for efficiently computing rank-revealing factorizations of
matrices" (2016).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from groundstate.errors import UsageError
from groundstate.norms.spectral import LinAlgError, prepare, svd

PROBES = 10
"""Vectors of the bound by default: it fails with probability at most 1e-10."""

_BASE = 10.0  # alpha of lemma 4.1
_BOUND_POWER = 4  # the slack of the bound is its ninth root: at most 1.3 from alpha, 1.5 from a flat 1000 x 1000 tail


class LowRankError(NamedTuple):
    """How far U S V^T is from W.

    Attributes:
        frobenius: ||W - U S V^T||_F, to the rounding of the product.
        spectral: An upper bound of ||W - U S V^T||_2.
        failure: The largest probability, over the probes, that ``spectral`` is too small; 0 where it is certain.
    """

    frobenius: float
    spectral: float
    failure: float


def randomized_svd(
    w: Tensor, rank: int, *, oversample: int = 10, power: int = 2, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns about the leading ``rank`` singular triplets, without an autograd graph.

    Exact up to rounding where the rank of w is at most ``rank + oversample``. `low_rank_error` tells how good it is.

    Args:
        w: ``(*batch, m, n)``, any scale.
        rank: From 1 to min(m, n).
        oversample: Columns of the sample beyond ``rank``; at least 0.
        power: Passes (W W^T) over the sample; more for a spectrum that falls slowly.
        generator: Draws the sample.

    Returns:
        ``(u, s, vh)`` of shapes ``(*batch, m, rank)``, ``(*batch, rank)``, ``(*batch, rank, n)``, s descending, float64
        for float64 and float32 otherwise. u and the rows of vh are orthonormal, s_i is at most sigma_i(W).

    Raises:
        UsageError: not a real floating-point matrix, or a count out of range.
        NonFiniteError: w holds NaN or infinity.

    Cost: 2 (power + 1) products of W with ``rank + oversample`` columns, as many QR, one SVD of that many columns.

    >>> u, s, vh = randomized_svd(torch.diag(torch.tensor([5.0, 3.0, 0.0])), 1, generator=torch.Generator())
    >>> [round(x, 4) for x in s.tolist()]
    [5.0]
    """
    with torch.no_grad():
        work, scale = prepare(w.detach())
        sides = min(w.shape[-2:])
        _whole("rank", rank, 1, sides)
        _whole("oversample", oversample, 0)
        _whole("power", power, 0)
        q = _range(work, min(rank + oversample, sides), power, generator)
        small, s, vh = svd(q.mT @ work)
        s = s[..., :rank]
        u, vh = q @ small[..., :rank], vh[..., :rank, :]
        return u, (s if scale is None else (s * scale[..., 0]).to(s.dtype)), vh


def low_rank_error(
    w: Tensor, u: Tensor, s: Tensor, vh: Tensor, *, probes: int = PROBES, generator: torch.Generator
) -> LowRankError:
    """Measures how far ``u @ diag(s) @ vh`` is from w.

    Args:
        w: ``(m, n)``, any scale.
        u: ``(m, k)``; need not be orthonormal.
        s: ``(k,)``.
        vh: ``(k, n)``.
        probes: Vectors p of the bound; it fails with probability at most 10^-p.
        generator: Draws them. They must be independent of u, s and vh: never a copy of the generator that these came
            from, in the state it had then.

    Raises:
        UsageError: w is not a single real floating-point matrix, or ``probes`` is not a count.
        NonFiniteError: w holds NaN or infinity.

    Cost: one product of the size of W, and 9 products of E with ``probes`` columns. Rounding adds at most about
    eps ||W||_F to either norm.

    >>> w = torch.diag(torch.tensor([5.0, 3.0, 4.0]))
    >>> low_rank_error(w, w[:, :1] / 5, torch.tensor([5.0]), w[:1] / 5, generator=torch.Generator()).frobenius
    5.0
    """
    with torch.no_grad():
        work, scale = prepare(_single(w))
        unit = 1.0 if scale is None else float(scale)
        _whole("probes", probes, 1)
        residual = work - (u.to(work.dtype) * (s.double() / unit).to(work.dtype)) @ vh.to(work.dtype)
        frobenius = float(torch.linalg.vector_norm(residual, dtype=torch.float64))
        spectral = _spectral_bound(residual, frobenius, probes, generator)
        certain = spectral == frobenius
        return LowRankError(frobenius * unit, spectral * unit, 0.0 if certain else _BASE**-probes)


def smallest_error(w: Tensor, rank: int) -> float | None:
    """Returns the smallest ||W - X||_F over all X of a rank, from the eigenvalues of the smaller Gram matrix.

    A comparison, not a certificate: good to about 1 %, and ``None`` where rounding may hide it (it squares the
    condition number), or no eigenvalues are found.

    Args:
        w: ``(m, n)``, any scale.
        rank: From 0.

    Raises:
        UsageError: not a single real floating-point matrix, or ``rank`` is not a count.
        NonFiniteError: w holds NaN or infinity.

    Cost: one product and one ``eigvalsh`` of size min(m, n): a fifth of an SVD.

    >>> round(smallest_error(torch.diag(torch.tensor([5.0, 3.0, 4.0])), 1), 5)
    5.0
    """
    with torch.no_grad():
        work, scale = prepare(_single(w))
        _whole("rank", rank, 0)
        n = min(w.shape)
        if rank >= n:
            return 0.0
        try:
            values = torch.linalg.eigvalsh(work.mT @ work if w.shape[0] >= w.shape[1] else work @ work.mT)
        except LinAlgError:
            return None
        tail = float(values[: n - rank].double().clamp_min(0).sum())
        rounding = math.sqrt(n) * torch.finfo(values.dtype).eps * float(values[-1])
        return math.sqrt(tail) * (1.0 if scale is None else float(scale)) if tail > 100 * rounding else None


def adaptive_svd(
    w: Tensor,
    tolerance: float,
    *,
    norm: Literal["frobenius", "spectral"] = "frobenius",
    block: int = 32,
    power: int = 1,
    probes: int = PROBES,
    most: int | None = None,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns U, S, V^T of a rank that is found: ||W - U S V^T|| <= tolerance ||W||, in one norm.

    The sample of the range grows by blocks, each taken from what the blocks before left of W, until that is small
    enough. One pass over the whole sample makes up for what the early blocks did not know; then the smallest rank
    within the tolerance is kept. That rank is at least the smallest possible, and one or two in a hundred larger where
    the spectrum is flat.

    Args:
        w: ``(m, n)``, any scale.
        tolerance: Between 0 and 1; 0 keeps all but rounding.
        norm: ``frobenius``, certain up to rounding; or ``spectral``, which fails with probability at most
            10^-probes (times the number of blocks) and compares with the largest singular value found.
        block: Columns by which the sample grows.
        power: As in `randomized_svd`.
        probes: As in `low_rank_error`.
        most: The largest rank to look for. Where it will not do, as soon as that can be foreseen, what was found so
            far is returned, which is not within the tolerance: its error tells (`low_rank_error`).
        generator: Draws samples and probes.

    Returns:
        ``(u, s, vh)`` as in `randomized_svd`; a matrix of zeros has rank 0.

    Raises:
        UsageError: an argument out of range, or a batch of matrices.
        NonFiniteError: w holds NaN or infinity.

    Cost: (2 power + 7) products of W with as many columns as the rank, rounded up to blocks; memory of one copy of W.

    >>> u, s, vh = adaptive_svd(torch.diag(torch.tensor([4.0, 3.0, 0.1])), 0.1, generator=torch.Generator())
    >>> [round(x, 4) for x in s.tolist()]
    [4.0, 3.0]
    """
    if norm not in ("frobenius", "spectral"):
        raise UsageError(f"norm must be 'frobenius' or 'spectral', got {norm!r}")
    if not 0 <= tolerance < 1:
        raise UsageError(f"tolerance must be at least 0 and less than 1 (a fraction of the norm), got {tolerance!r}")
    for name, count, low in (("block", block, 1), ("power", power, 0), ("probes", probes, 1)):
        _whole(name, count, low)
    with torch.no_grad():
        work, scale = prepare(_single(w))
        _whole("most", min(w.shape) if most is None else most, 0)
        rounding = max(1, *w.shape) * torch.finfo(work.dtype).eps
        goal = _Goal(max(tolerance, rounding), norm, probes, generator)
        sides = min(w.shape)
        q, b, error, target = _grown(work, goal, block, power, sides if most is None else min(most, sides))
        small, s, vh = svd(b)
        k = _smallest(s, 0.0 if q.shape[1] == sides else error, target, norm)
        u, s, vh = q @ small[:, :k], s[:k], vh[:k]
        return u, (s if scale is None else (s * scale[0]).to(s.dtype)), vh


class _Sample(NamedTuple):
    """Q and B = Q^T W, the error ||W - Q B||, and what it should be at most."""

    q: Tensor
    b: Tensor
    error: float
    target: float


@dataclass(frozen=True)
class _Goal:
    """A tolerance in one norm."""

    tolerance: float
    norm: str
    probes: int
    generator: torch.Generator

    def judge(self, work: Tensor, q: Tensor, b: Tensor, left: Tensor) -> _Sample:
        """Measures a sample by what it leaves of W."""
        error = float(torch.linalg.vector_norm(left, dtype=torch.float64))
        if self.norm == "spectral" and error > 0:
            largest = float(torch.linalg.matrix_norm(b, 2)) if len(b) else 0.0
            return _Sample(q, b, _spectral_bound(left, error, self.probes, self.generator), self.tolerance * largest)
        return _Sample(q, b, error, self.tolerance * float(torch.linalg.vector_norm(work, dtype=torch.float64)))

    def foreseen(self, before: _Sample, now: _Sample) -> float:
        """Returns the fewest columns that will do if later blocks take no more than the last one; 0 if unknown."""
        taken = before.error**2 - now.error**2
        if self.norm != "frobenius" or taken <= 0:
            return 0.0
        columns = now.q.shape[1]
        return columns + (columns - before.q.shape[1]) * (now.error**2 - now.target**2) / taken


def _grown(work: Tensor, goal: _Goal, block: int, power: int, most: int) -> _Sample:
    """Grows a sample of the range to the goal, or until it is seen not to reach it with so many columns."""
    left = work.clone()
    now = goal.judge(work, work[:, :0], work[:0], left)
    while now.error > now.target and now.q.shape[1] < most:
        before = now
        fresh = _range(left, min(block, most - now.q.shape[1]), power, goal.generator)
        fresh = torch.linalg.qr(fresh - now.q @ (now.q.mT @ fresh)).Q  # the residual is orthogonal up to rounding only
        rows = fresh.mT @ left
        left -= fresh @ rows
        now = goal.judge(work, torch.cat([now.q, fresh], 1), torch.cat([now.b, rows]), left)
        if now.error > now.target and goal.foreseen(before, now) > most:
            return now
    if now.error > now.target or now.q.shape[1] in (0, min(work.shape)):
        return now
    q = torch.linalg.qr(work @ torch.linalg.qr(now.b.mT).Q).Q
    b = q.mT @ work
    better = goal.judge(work, q, b, torch.sub(work, q @ b, out=left))
    return better if better.error <= better.target else now


def _range(work: Tensor, columns: int, power: int, generator: torch.Generator) -> Tensor:
    """Returns an orthonormal basis ``(*batch, m, columns)`` of about the range of (W W^T)^power W Omega."""
    q = torch.linalg.qr(work @ _gaussian((*work.shape[:-2], work.shape[-1], columns), work, generator)).Q
    for _ in range(power):  # orthonormalized in between, or the small directions drown in rounding
        q = torch.linalg.qr(work.mT @ q).Q
        q = torch.linalg.qr(work @ q).Q
    return q


def _spectral_bound(e: Tensor, frobenius: float, probes: int, generator: torch.Generator) -> float:
    """Returns a bound of ||E||_2 that holds but with probability 10^-probes; never above the Frobenius norm."""
    if frobenius == 0.0:
        return 0.0
    unit = e / frobenius
    y = _gaussian((e.shape[1], probes), e, generator).mT @ unit.mT  # a few rows take a tenth of the time of columns
    for _ in range(_BOUND_POWER):
        y = (y @ unit) @ unit.mT
    largest = float(torch.linalg.vector_norm(y, dim=1, dtype=torch.float64).max())
    bound = (_BASE * math.sqrt(2 / math.pi) * largest) ** (1 / (2 * _BOUND_POWER + 1))
    return frobenius * min(bound, 1.0)


def _smallest(s: Tensor, left: float, target: float, norm: str) -> int:
    """Returns the smallest k for which what is left of W, and s from k on, are together within the target."""
    squared = s.double().square()
    tail = squared.flip(0).cumsum(0).flip(0) if norm == "frobenius" else squared
    return int((tail + left**2 > target**2).sum()) if target > left else len(s)


def _gaussian(shape: tuple[int, ...], like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=generator, device=generator.device, dtype=like.dtype).to(like.device)


def _single(w: Tensor) -> Tensor:
    if w.ndim != 2:
        raise UsageError(f"expected one matrix (out, in), got shape {tuple(w.shape)}")
    return w.detach()


def _whole(name: str, value: object, low: int, high: int | None = None) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < low or (high is not None and value > high):
        upper = "" if high is None else f" to {high}"
        raise UsageError(f"{name} must be a whole number from {low}{upper}, got {value!r}")
