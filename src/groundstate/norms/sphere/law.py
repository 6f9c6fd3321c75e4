"""The repulsion between two directions as a function of their cosine: f(r), its slope h'(c), floats and near pairs.

Idea: on the unit sphere all is a function of c = u . v, of r^2 = 2 - 2 c and of the angle theta::

    f_s(r) = r^-s,  f_0(r) = -log r,      h(c) = f(sqrt(2 - 2 c)),      h'(c) = (s, or 1 for s = 0) r^(-s-2)

Angular laws replace r by theta, with h'(c) = -f'(theta) / sin theta; half-space laws add the same at -c (an antipode).
A matrix of cosines is one product, but it knows r^2 only to its rounding: near pairs are taken again from the
difference of the directions, in float64.

Reference: W. Liu et al., "Learning towards Minimum Hyperspherical Energy" (2018), equations 1, 2 and 4.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from groundstate.errors import UsageError

OnDuplicate = Literal["clip", "error"]

# Pairs with r^2 below this are computed from their difference. A product knows r^2 only to about 2 eps: above it the
# relative error is at most 2e-5 in float32 and 5e-13 in float64.
_NEAR = {torch.float32: 1e-2, torch.float64: 1e-3}
_LARGEST_R_MIN = 0.5
_CHUNK = 2**19  # numbers in a gathered list of difference vectors
_NO_PRODUCT = "donot_use_mm_for_euclid_dist"


class Law(NamedTuple):
    """What two directions at a distance cost, and what to do where they coincide."""

    s: float
    half_space: bool = False
    angular: bool = False
    on_duplicate: OnDuplicate = "clip"
    r_min: float = 1e-6

    def near(self, dtype: torch.dtype) -> float:
        """Returns the r^2 below which products in dtype are not trusted."""
        return max(_NEAR[dtype], 2 * self.r_min**2)

    @property
    def two_sided(self) -> bool:
        """Whether antipodal pairs need care too: duplicates in a half-space, a kink of the angle."""
        return self.half_space or self.angular

    @property
    def antipodal(self) -> float:
        """The energy f of a direction and its opposite."""
        return self._at(math.pi if self.angular else 2.0)

    @property
    def orthogonal(self) -> float:
        """The energy of two orthogonal directions."""
        return (2 if self.half_space else 1) * self._at(math.pi / 2 if self.angular else math.sqrt(2))

    def _at(self, distance: float) -> float:
        return -math.log(distance) if self.s == 0 else distance**-self.s


def law(
    s: float, half_space: bool = False, angular: bool = False, on_duplicate: str = "clip", r_min: float = 1e-6
) -> Law:
    """Returns the law after checking its parameters.

    Raises:
        UsageError: s negative or not finite, an unknown policy, or r_min outside (0, 0.5].
    """
    if isinstance(s, bool) or not isinstance(s, int | float) or not math.isfinite(s) or s < 0:
        raise UsageError(f"s must be a finite number of at least 0 (0: -log r, s > 0: r^-s), got {s!r}")
    if on_duplicate not in ("clip", "error"):
        raise UsageError(f"on_duplicate must be 'clip' or 'error', got {on_duplicate!r}")
    if not isinstance(r_min, int | float) or not 0 < r_min <= _LARGEST_R_MIN:
        raise UsageError(f"r_min must lie in (0, {_LARGEST_R_MIN}], got {r_min!r}")
    policy: OnDuplicate = "error" if on_duplicate == "error" else "clip"
    return Law(float(s), bool(half_space), bool(angular), policy, float(r_min))


def potential(r: Tensor, s: float) -> Tensor:
    """Returns f_s(r): -log r for s = 0, else r^-s."""
    return r.log().neg_() if s == 0 else r.pow(-s)


def slope(r: Tensor, s: float) -> Tensor:
    """Returns -f_s'(r)."""
    return r.reciprocal() if s == 0 else r.pow(-s - 1).mul_(s)


def fast(c: Tensor, work: list[Tensor], rule: Law, gradient: bool) -> tuple[Tensor, Tensor]:
    """Returns f and h'(c) for cosines of pairs that are not near, f as the sum of each row.

    Args:
        c: Cosines ``(*batch, n, m)``; overwritten.
        work: Two buffers like c; overwritten.
        rule: The law.
        gradient: Whether h' is needed; where it is not, what is returned for it has no meaning.

    Returns:
        ``(rows, slopes)``: float64 ``(*batch, n)`` and a tensor like c (one of the buffers). Rows are added up in the
        dtype of c, a few hundred terms.
    """
    if rule.angular:
        return _angular(c, rule, gradient)
    evaluate = _half_space if rule.half_space else _full_space
    return evaluate(c, work[0], work[1], rule.s, gradient)


def _rows(f: Tensor) -> Tensor:
    return f.sum(-1).double()


def _log_rows(x: Tensor) -> Tensor:
    """Sums of log x along rows, of products of up to eight: logarithms are dear. x lies between 1e-3 and 4."""
    for _ in range(3):
        half, odd = divmod(x.shape[-1], 2)
        if odd:
            break
        x = x[..., :half] * x[..., half:]
    return _rows(x.log())


def _full_space(c: Tensor, x: Tensor, y: Tensor, s: float, gradient: bool) -> tuple[Tensor, Tensor]:
    two = torch.full((), 2.0, dtype=c.dtype, device=c.device)
    r2 = torch.sub(two, c, alpha=2, out=c)
    if s == 0:
        return _log_rows(r2).mul_(-0.5), r2.reciprocal_() if gradient else x
    if s == 1:
        q = r2.rsqrt_()
        return _rows(q), torch.pow(q, 3, out=x) if gradient else x
    if s == 2:
        q = r2.reciprocal_()
        return _rows(q), torch.square(q, out=x).mul_(2) if gradient else x
    f = torch.pow(r2, -s / 2, out=x)
    return _rows(f), torch.div(f, r2, out=y).mul_(s) if gradient else y


def _half_space(c: Tensor, x: Tensor, y: Tensor, s: float, gradient: bool) -> tuple[Tensor, Tensor]:
    one = torch.ones((), dtype=c.dtype, device=c.device)
    if s in (0, 2):
        a = torch.sub(one, torch.mul(c, c, out=x), out=x)  # r-^2 r+^2 = 4 (1 - c^2)
        if s == 0:
            rows = _log_rows(a).add_(c.shape[-1] * math.log(4)).mul_(-0.5)
            return rows, c.div_(a) if gradient else c
        q = a.reciprocal_()
        return _rows(q), c.mul_(q).mul_(q).mul_(2) if gradient else c
    minus = torch.sub(2 * one, c, alpha=2, out=x)
    plus = torch.add(2 * one, c, alpha=2, out=y)
    if s == 1:
        minus.rsqrt_()
        plus.rsqrt_()
        rows = _rows(torch.add(minus, plus, out=c))
        return rows, minus.pow_(3).sub_(plus.pow_(3)) if gradient else c
    near, far = minus.pow(-s / 2), plus.pow(-s / 2)
    rows = _rows(torch.add(near, far, out=c))
    return rows, near.div_(minus).sub_(far.div_(plus)).mul_(s) if gradient else c


def _angular(c: Tensor, rule: Law, gradient: bool) -> tuple[Tensor, Tensor]:
    sine = (1 - c * c).clamp_min_(0).sqrt_()
    theta = torch.atan2(sine, c)  # several times as fast as acos, and as accurate at c = 0 as at its ends
    f, h = potential(theta, rule.s), slope(theta, rule.s) if gradient else c
    if rule.half_space:
        other = math.pi - theta
        f.add_(potential(other, rule.s))
        h = h.sub_(slope(other, rule.s)) if gradient else c
    return _rows(f), h.div_(sine) if gradient else c


class Exact(NamedTuple):
    """One side of an exactly computed block: pairs (u_i, sign * v_j)."""

    sign: int
    f: Tensor
    slopes: Tensor
    clipped: Tensor


def exact(x: Tensor, y: Tensor, same: Tensor | None, rule: Law) -> list[Exact]:
    """Returns f, h'(c) and which pairs were clipped for all pairs of two blocks, in float64 from their differences.

    Args:
        x: Directions ``(*batch, n, d)``, float64.
        y: Directions ``(*batch, m, d)``, float64.
        same: ``(n, m)``, True where both are one neuron: such entries cost nothing and have no slope.
        rule: The law. Pairs closer than r_min have the energy at r_min and slope zero.

    Returns:
        For the pairs with y, then for those with -y in a half-space.
    """
    toward = _distances(x, y)
    away = _distances(x, -y) if rule.two_sided else toward
    sides = [(1, toward, away)] + ([(-1, away, toward)] if rule.half_space else [])
    made = []
    for sign, r, opposite in sides:
        clipped = r < rule.r_min
        flat = clipped
        if same is not None:
            # A neuron and its own antipode are one constant, which the mean adds; they are no pair here.
            clipped = clipped & ~same
            flat = flat | same
        held = r.clamp_min(rule.r_min)
        if rule.angular:
            distance, steep = 2 * torch.atan2(held, opposite), held * opposite / 2
            flat = flat | (opposite < rule.r_min)  # the kink of the angle at pi
        else:
            distance, steep = held, held
        f = potential(distance, rule.s)
        if same is not None:
            f.masked_fill_(same, 0.0)
        slopes = torch.where(flat, 0.0, slope(distance, rule.s) / torch.where(flat, 1.0, steep))
        made.append(Exact(sign, f, slopes, clipped))
    return made


def _distances(x: Tensor, y: Tensor) -> Tensor:
    """Distances between float64 unit vectors: a product, and differences wherever it would lose digits."""
    r2 = (2 - 2 * (x @ y.mT)).clamp_min_(0)
    near = (r2 < _NEAR[x.dtype]).nonzero()
    if near.shape[0] > r2.numel() // 4:
        return torch.cdist(x, y, compute_mode=_NO_PRODUCT)
    for part in near.split(max(1, _CHUNK // x.shape[-1])):
        *batch, i, j = part.unbind(-1)
        r2[(*batch, i, j)] = (x[(*batch, i)] - y[(*batch, j)]).square_().sum(-1)
    return r2.sqrt_()
