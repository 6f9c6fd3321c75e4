r"""What the energy of N directions on the sphere S^(d-1) can be compared with: chance, and the ground state.

Idea: for the pair means of f_s(r) = r^-s, f_0(r) = -log r, closed forms give an absolute scale. Independent uniform
directions have the expected energy (finite for s < d - 1)::

    V_s(d) = 2^(d-2-s) Gamma(d/2) Gamma((d-1-s)/2) / (sqrt(pi) Gamma(d-1-s/2))
    V_0(d) = -log 2 - psi((d-1)/2) / 2 + psi(d-1) / 2

and some configurations minimize f_s for every s >= 0 at once, because f_s is completely monotone in r^2 (up to a
constant for s = 0): regular polygons, the simplex, the cross-polytope, the icosahedron, E8, the Leech lattice and a few
more. Their energies follow from the inner products seen from one point. Half-space energies are those of the 2N points
{u, -u}; there sum c_ij^2 >= N^2 / d gives a floor of its own.

Angular energies have theta in place of r. Their random mean is an integral over the density of the angle, and in the
full space few of their ground states are proved: N <= 3 and the regular polygons, both by convexity of f in theta (the
sum of the angles of N points, and of the k-th neighbors on a circle, is bounded). The half-space energies of both are
absolutely monotone in c^2, so they share ground states whose lines are universally optimal in projective space.

Reference: H. Cohn, A. Kumar, "Universally optimal distribution of points on spheres" (2007), table 1; half-space
floor: L. Welch, "Lower bounds on the maximum cross correlation of signals" (1974); N = 5, d = 3: P. Dragnev, D. Legg,
D. Townsend, "Discrete logarithmic energy on the sphere" (2002), R. Schwartz, "Five point energy minimization" (2020).
"""

from __future__ import annotations

import math
import operator
from functools import lru_cache

import torch
from torch import Tensor

from groundstate.errors import UsageError

Code = tuple[tuple[float, int], ...]

_FIFTH = 1 / math.sqrt(5)
_GOLDEN = (1 + math.sqrt(5)) / 4
# Inner products seen from one point with their counts, by (n, d): the sporadic universally optimal codes.
_SPORADIC: dict[tuple[int, int], Code] = {
    (12, 3): ((-1, 1), (_FIFTH, 5), (-_FIFTH, 5)),
    (120, 4): (
        *((-1, 1), (1 / 2, 20), (-1 / 2, 20), (0, 30)),
        *((_GOLDEN, 12), (-_GOLDEN, 12), (_GOLDEN - 1 / 2, 12), (1 / 2 - _GOLDEN, 12)),
    ),
    (16, 5): ((1 / 5, 10), (-3 / 5, 5)),
    (56, 7): ((-1, 1), (1 / 3, 27), (-1 / 3, 27)),
    (240, 8): ((-1, 1), (1 / 2, 56), (-1 / 2, 56), (0, 126)),
    (162, 21): ((1 / 7, 105), (-2 / 7, 56)),
    (100, 22): ((1 / 11, 77), (-4 / 11, 22)),
    (275, 22): ((1 / 6, 162), (-1 / 4, 112)),
    (891, 22): ((1 / 4, 336), (-1 / 8, 512), (-1 / 2, 42)),
    (552, 23): ((-1, 1), (1 / 5, 275), (-1 / 5, 275)),
    (4600, 23): ((-1, 1), (1 / 3, 891), (-1 / 3, 891), (0, 2816)),
    (196560, 24): ((-1, 1), (1 / 2, 4600), (-1 / 2, 4600), (1 / 4, 47104), (-1 / 4, 47104), (0, 93150)),
}
# The sporadic codes that are their own antipodes: half of one is optimal for the half-space energy.
_ANTIPODAL = frozenset(key for key, code in _SPORADIC.items() if code[0] == (-1, 1))
# Those of them whose lines are a projective design of high enough degree: 2m - 1 for m values of c^2, less one with 0.
_SHARP = _ANTIPODAL - {(120, 4)}
# Isotropic subspaces: one code for each prime power q up to a million points; q = 2 gives the 27 points in d = 6.
_PRIME_POWERS = (2, 3, 4, 5, 7, 8, 9, 11, 13, 16, 17, 19, 23, 25, 27, 29, 31)
# The triangular bipyramid is proved to be optimal up to s = 15.04...
_BIPYRAMID_LIMIT = 15.0


def check(n: int, d: int, s: float) -> tuple[int, int, float]:
    """Returns ``(n, d, s)`` as int, int and float.

    Raises:
        UsageError: n < 2 or d < 2, not integers, or s negative or not finite.
    """
    for name, what, value in (("n", "number of points", n), ("d", "dimension", d)):
        if isinstance(value, bool) or not hasattr(value, "__index__") or operator.index(value) < 2:
            raise UsageError(f"the {what} {name} must be an integer of at least 2, got {value!r}")
    if isinstance(s, bool | str) or not hasattr(s, "__float__") or not 0 <= float(s) < math.inf:
        raise UsageError(f"the exponent s must be finite and not negative (0 is the logarithm), got {s!r}")
    return operator.index(n), operator.index(d), float(s)


def potential(squared_distance: float, s: float) -> float:
    """Returns f_s(r) from r^2 > 0: r^-s, or -log r for s = 0.

    Raises:
        UsageError: r^-s is not a positive float64.

    >>> potential(4.0, 1.0)
    0.5
    """
    if s == 0:
        return -0.5 * math.log(squared_distance)
    exponent = -0.5 * s * math.log(squared_distance)
    if abs(exponent) > 700:
        raise UsageError(
            f"r^-s leaves the range of float64 for r^2 = {squared_distance:.3g}, s = {s:g}: take a smaller s"
        )
    return squared_distance ** (-0.5 * s)


def _of_cosine(c: float, s: float, angular: bool) -> float:
    """Returns the energy of a pair with that inner product."""
    return potential(math.acos(c) ** 2 if angular else 2 - 2 * c, s)


def random_mean(d: int, s: float, angular: bool = False) -> float | None:
    """Returns the expected pair energy V_s(d) of independent uniform directions; ``None`` for s >= d - 1: divergent.

    Absolute error about 1e-16 d log d. The Monte-Carlo error of a sample is infinite already for s >= (d - 1) / 2. For
    angles the closed form is corrected by a quadrature of 300 + 30 d^1/2 points.

    Raises:
        UsageError: d < 2 or not an integer, or s negative or not finite.

    >>> random_mean(8, 2.0)  # (d - 2) / (2 (d - 3))
    0.6
    >>> random_mean(3, 2.0) is None
    True
    """
    _, d, s = check(2, d, s)
    if s >= d - 1:
        return None
    if angular:
        return (random_mean(d, s) or 0.0) - _mean_excess(d, s)
    if s == 2:
        return (d - 2) / (2 * (d - 3))
    if s == 0:
        psi = torch.digamma(torch.tensor([(d - 1) / 2, d - 1], dtype=torch.float64)).tolist()
        return -math.log(2) + (psi[1] - psi[0]) / 2
    logs = math.lgamma(d / 2) + math.lgamma((d - 1 - s) / 2) - math.lgamma(d - 1 - s / 2)
    return math.exp((d - 2 - s) * math.log(2) + logs) / math.sqrt(math.pi)


def _mean_excess(d: int, s: float) -> float:
    """Returns the expected f(r) - f(theta), which is two powers smoother at 0 than either.

    Trapezoidal rule in x, theta = pi / (1 + exp(-pi sinh x)), which also smooths the ends.
    """
    step = min(1 / 32, 1 / (4 * math.sqrt(d)))
    x = torch.arange(-3.5, 3.5 + step, step, dtype=torch.float64)
    theta = math.pi * torch.sigmoid(math.pi * x.sinh())
    ratio = torch.log(theta / (2 * torch.sin(theta / 2)))
    excess = ratio if s == 0 else (2 * torch.sin(theta / 2)).pow(-s) * -torch.expm1(-s * ratio)
    slope = theta * (1 - theta / math.pi) * math.pi * x.cosh()
    return float((excess * angle_density(theta, d) * slope).sum()) * step


def random_half_space(n: int, d: int, s: float, angular: bool = False) -> float | None:
    """Returns the expected half-space energy of n independent uniform directions: (2 (n-1) V_s + f_s(2)) / (2n - 1).

    ``None`` for s >= d - 1. The second term belongs to the n pairs {u, -u}, whose distance is always 2 (angle: pi).

    Raises:
        UsageError: as for `check`.

    >>> round(random_half_space(2, 8, 2.0), 12)  # (2 * 0.6 + 0.25) / 3
    0.483333333333
    """
    n, d, s = check(n, d, s)
    mean = random_mean(d, s, angular)
    return None if mean is None else (2 * (n - 1) * mean + _of_cosine(-1, s, angular)) / (2 * n - 1)


def angle_density(theta: Tensor, d: int) -> Tensor:
    """Returns the density at theta of the angle between two independent uniform directions: sin(theta)^(d-2) / B.

    Args:
        theta: Angles in radians, any shape; the density is 0 outside [0, pi].
        d: Dimension, at least 2 (where the angle is uniform).

    Raises:
        UsageError: d < 2 or not an integer.

    >>> angle_density(torch.tensor([torch.pi / 2]), 3)  # sin(theta) / 2
    tensor([0.5000])
    """
    check(2, d, 0)
    log_constant = math.lgamma(d / 2) - math.lgamma((d - 1) / 2) - 0.5 * math.log(math.pi)
    sine = theta.sin().clamp(min=0)
    return torch.where((theta < 0) | (theta > math.pi), 0.0, (torch.xlogy(d - 2, sine) + log_constant).exp())


def angle_cdf(theta: Tensor, d: int) -> Tensor:
    """Returns the probability that two independent uniform directions are at most theta apart.

    By parts, with I_m the integral of sin^m over [0, pi]: F_m = F_(m-2) - cos(theta) sin(theta)^(m-1) / (m I_m).
    Computed in float64, absolute error about 1e-15.

    Args:
        theta: Angles in radians, any shape; values outside [0, pi] count as the nearer end.
        d: Dimension, at least 2.

    Raises:
        UsageError: d < 2 or not an integer.

    Cost: d / 2 passes over theta.

    >>> angle_cdf(torch.tensor([torch.pi / 3]), 3)  # (1 - cos(theta)) / 2
    tensor([0.2500])
    """
    check(2, d, 0)
    angle = theta.double().clamp(0, math.pi)
    cosine, sine = angle.cos(), angle.sin()
    odd = d % 2
    value, power = ((1 - cosine) / 2, sine.square()) if odd else (angle / math.pi, sine)
    integral = 2.0 if odd else math.pi
    for m in range(2 + odd, d - 1, 2):
        integral *= (m - 1) / m
        value = value - cosine * power * (1 / (m * integral))
        power = power * sine.square()
    return value.clamp(0, 1).to(theta.dtype if theta.dtype.is_floating_point else torch.float64)


def universal_code(n: int, d: int) -> Code | None:
    """Returns the inner products, with counts, from one point of the universally optimal code; ``None`` if unknown.

    It minimizes the energy for every s >= 0. Regular polygons (d = 2) are not listed: see `ground_state`.

    Raises:
        UsageError: as for `check`.

    >>> universal_code(4, 3)
    ((-0.3333333333333333, 3),)
    """
    n, d, _ = check(n, d, 0)
    if n <= d + 1:
        return ((-1 / (n - 1), n - 1),)
    if n == 2 * d:
        return ((-1, 1), (0, n - 2))
    for q in _PRIME_POWERS:
        if (n, d) == ((q + 1) * (q**3 + 1), q * (q**3 + 1) // (q + 1)):
            near = (n - 1 + q * q) // (q + 1)
            return ((-1 / q, near), (1 / q**2, n - 1 - near))
    return _SPORADIC.get((n, d))


@lru_cache(maxsize=1024, typed=True)
def ground_state(n: int, d: int, s: float, half_space: bool = False, angular: bool = False) -> float | None:
    """Returns the least possible pair mean where a proof of it is known, else ``None``.

    Known: n <= d + 1 (simplex), n = 2d (cross-polytope), d = 2 (regular polygon), the codes of `universal_code`, and
    n = 5, d = 3 for s <= 15. In half-space: n <= d (orthonormal), n = d + 1 (lines of the simplex), d = 2, and one half
    of a universally optimal code that is its own antipode. Of angular energies: n <= 3, d = 2, and all those of the
    half-space but the 60 lines of the 600-cell.

    Args:
        n: Number of points (neurons).
        d: Dimension of the space.
        s: Exponent, 0 for -log r.
        half_space: Count -u_i beside u_i; all 2n points, pairs {u, -u} included.
        angular: Angles in place of distances.

    Raises:
        UsageError: as for `check`, or the energy leaves the range of float64.

    Cost: closed form, except O(n) for polygons with s other than 0 and 2.

    >>> ground_state(64, 100, 2.0)  # (1 - 1/n) / 2
    0.4921875
    """
    n, d, s = check(n, d, s)
    if half_space:
        n *= 2
    if d == 2:
        return _polygon(n, s, angular)
    if half_space and n // 2 <= d + 1:
        return welch_floor(n // 2, d, s, angular)
    if angular and not half_space:
        # A mean angle of at most pi n / (2 (n-1)) is attained by all pairs at once for n = 2 only, 2 pi / 3 for n = 3.
        return potential((2 * math.pi / n) ** 2, s) if n <= 3 else None
    if half_space and ((n, d) not in _ANTIPODAL or (angular and (n, d) not in _SHARP)):
        return None
    code = universal_code(n, d)
    if code is not None:
        return math.fsum(count * _of_cosine(c, s, angular) for c, count in code) / (n - 1)
    if (n, d) == (5, 3) and s <= _BIPYRAMID_LIMIT:
        return (potential(4, s) + 6 * potential(2, s) + 3 * potential(3, s)) / 10
    return None


def _polygon(n: int, s: float, angular: bool) -> float:
    if s == 0 and not angular:
        return -math.log(n) / (n - 1)
    if s == 2 and not angular:
        return (n + 1) / 12
    angles = (2 * math.pi * k / n for k in range(1, (n + 1) // 2))
    half = 2 * math.fsum(potential(x**2 if angular else 4 * math.sin(x / 2) ** 2, s) for x in angles)
    return (half + (_of_cosine(-1, s, angular) if n % 2 == 0 else 0)) / (n - 1)


def welch_floor(n: int, d: int, s: float, angular: bool = False) -> float:
    """Returns a floor of the half-space energy, from mean c^2 >= t = max(0, (n - d) / (d (n - 1))) over pairs.

    f(sqrt(2 - 2c)) + f(sqrt(2 + 2c)) is convex and increasing in c^2, so with G its value at c^2 = t the floor is
    ((n-1) G + f(2)) / (2n - 1). Attained exactly by equiangular tight frames, and for n <= d by orthonormal rows. The
    same holds for angles.

    Args:
        n: Number of points u_i; the energy counts the 2n points {u_i, -u_i}.
        d: Dimension of the space.
        s: Exponent, 0 for -log r.
        angular: Angles in place of distances.

    Raises:
        UsageError: as for `check`, or the energy leaves the range of float64.

    >>> welch_floor(2, 2, 2.0)  # the square: 4 sides with r^2 = 2 and 2 diagonals with r^2 = 4
    0.4166666666666667
    """
    n, d, s = check(n, d, s)
    c = math.sqrt(max(0.0, (n - d) / (d * (n - 1))))
    both = _of_cosine(c, s, angular) + _of_cosine(-c, s, angular)
    return ((n - 1) * both + _of_cosine(-1, s, angular)) / (2 * n - 1)
