r"""Certified floors of the energy of n points on the sphere, for any n, d and s: how far from the ground state at most.

Idea (Delsarte, Yudin): let P_k be the Gegenbauer polynomials of S^(d-1) with P_k(1) = 1. They are positive definite, so
any h(t) = sum_k h_k P_k(t) with h_k >= 0 for k >= 1 that stays below the potential, h(c) <= f(c) for all inner products
c < 1, bounds the pair mean of every configuration::

    sum_{i != j} f(c_ij) >= sum_{i,j} h(c_ij) - n h(1) >= n^2 h_0 - n h(1),  so  mean >= h_0 - sum_{k>=1} h_k / (n-1)

Two choices of h, the better one counts:

* Closed form. Levenshtein's quadrature, exact on polynomials up to a degree tau(n, d), has the node 1 with weight 1/n
  and other nodes a_i with weights rho_i. Interpolating f at the a_i (value and slope) gives a valid h, and the bound
  n / (n-1) sum_i rho_i f(a_i). It needs f to be absolutely monotone in t, as all f_s are; any degree costs little.
* A linear program over h_0..h_K, which may use degrees above tau. Its constraints hold at finitely many angles only, so
  the result is verified: in the angle, |h''| <= sum_k h_k k (k+d-2) / (d-1) everywhere, because the cosine coefficients
  of P_k(cos theta) are not negative. Cells of angles are halved until the bound on f - h that follows is sharp, and the
  worst value, rounding included, is taken off h_0.

Half-space energies: the same with even polynomials, that is on projective space, with u = 2 t^2 - 1.

Reference: V. Yudin, "Minimum potential energy of a point system of charges" (1993); P. Boyvalenkov, P. Dragnev,
D. Hardin, E. Saff, M. Stoyanova, "Universal lower bounds for potential energy of spherical codes" (2016), and "Energy
bounds for codes in polynomial metric spaces" (2019); H. Cohn, A. Kumar (2007).
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.sphere.references import (
    check,
    ground_state,
    potential,
    random_half_space,
    random_mean,
    welch_floor,
)

Array = npt.NDArray[np.float64]

_EPS = float(np.finfo(np.float64).eps)
# Degrees of the linear program; the next is tried while the last one gained more than _GAIN, relative to the potential.
_DEGREES = (14, 18, 24)
_GAIN = 1e-8
# Largest number of quadrature nodes. Beyond, the floor of fewer points is taken: the least mean grows with n.
_NODES = 1200
# Angles of the first program; grid that is searched for more; rounds of adding those where h exceeds f by more than
# _SETTLED; how finely each is located; the cluster added around it, in steps of the grid, so that the points where h
# touches f are met quickly.
_ANGLES = 100
_GRID = 4000
_ROUNDS = 8
_SETTLED = 1e-10
_FINER = 64
_CLUSTER = np.concatenate([[0.0], *([x, -x] for x in 4.0 ** -np.arange(6))])
# Cells of the verification: how many to start with, how often the worst are split.
_CELLS = 4096
_SPLITS = 12


class Floor(NamedTuple):
    """A value that no configuration can undercut.

    Attributes:
        value: Lower bound of the pair mean (half-space: of the mean over all pairs of the 2n points).
        method: Where it comes from, in words.
        exact: It is attained: the value is the ground-state energy, by a known proof.
    """

    value: float
    method: str
    exact: bool


class _Problem(NamedTuple):
    """Bound the mean over pairs of f (half-space: of G(t) = f(t) + f(-t)), divided by ``scale``."""

    n: int
    d: int
    s: float
    half_space: bool
    scale: float = 1.0

    def potential(self, theta: Array) -> Array:
        """Returns the scaled potential at angles in (0, pi], (0, pi/2] in half-space, where it decreases."""
        value = self._chord(2 * np.sin(theta / 2))
        return value + self._chord(2 * np.cos(theta / 2)) if self.half_space else value

    def _chord(self, r: Array) -> Array:
        return -np.log(r) if self.s == 0 else np.exp(np.minimum(-self.s * np.log(r) - math.log(self.scale), 600))

    def curvature(self, low: Array, high: Array) -> Array:
        """Returns an upper bound of the second derivative of the potential in theta on each cell [low, high]."""
        value = self._curvature(low)
        return value + self._curvature(math.pi - high) if self.half_space else value

    def _curvature(self, theta: Array) -> Array:
        # With r = 2 sin(theta / 2): f'' = f (s^2 cot^2 + s csc^2) / 4, and csc^2 / 4 for the logarithm; decreasing.
        csc = 1 / np.sin(theta / 2) ** 2
        if self.s == 0:
            return csc / 4
        return self._chord(2 * np.sin(theta / 2)) * (self.s**2 * (csc - 1) + self.s * csc) / 4

    def degrees(self, highest: int) -> Array:
        step = 2 if self.half_space else 1
        return np.arange(step, highest + 1, step, dtype=np.float64)

    @property
    def end(self) -> float:
        return math.pi / 2 if self.half_space else math.pi

    def mean(self, value: float) -> float:
        """Returns the energy from the mean over pairs of the potential, not scaled."""
        return ((self.n - 1) * value + potential(4, self.s)) / (2 * self.n - 1) if self.half_space else value


@lru_cache(maxsize=1024, typed=True)
def floor(n: int, d: int, s: float, half_space: bool = False) -> Floor:
    """Returns the best certified lower bound of the energy of n points on S^(d-1).

    The exact ground state where a proof is known, else the better of Levenshtein's quadrature and a verified linear
    program (with the Welch bound in half-space). It rests on float64 arithmetic, whose rounding is estimated to first
    order and subtracted.

    Args:
        n: Number of points (neurons), at least 2.
        d: Dimension of the space, at least 2.
        s: Exponent, 0 for -log r.
        half_space: Count -u_i beside u_i.

    Raises:
        UsageError: n < 2 or d < 2, not integers; s negative or not finite, or so large that r^-s overflows.

    Cost: at most about a second, whatever n and d; remembered. Polygons (d = 2) cost O(n).

    >>> floor(12, 3, 2.0)
    Floor(value=0.5909090909090909, method='exact ground state', exact=True)
    >>> floor(7, 3, 1.0).value < 14.452977414 / 21  # the best known energy of 7 charges
    True
    """
    n, d, s = check(n, d, s)
    exact = ground_state(n, d, s, half_space)
    if exact is not None:
        return Floor(exact, "exact ground state", True)
    problem = _Problem(n, d, s, half_space)
    value, tau = _quadrature_floor(problem)
    found = [Floor(problem.mean(value), f"Levenshtein quadrature, degree {tau}", False)]
    if half_space:
        found.append(Floor(welch_floor(n, d, s), "Welch bound", False))
    else:
        found.append(Floor(potential(2 * n / (n - 1), s), "simplex bound", False))
    note = ""
    if tau <= _DEGREES[-1]:
        scaled = problem if s == 0 else problem._replace(scale=value)
        program, used, note = _program_floor(scaled)
        found.append(Floor(problem.mean(program * scaled.scale), f"linear program, degree {used}", False))
    best = max(found, key=lambda candidate: candidate.value)
    return best._replace(method=best.method + note)


def uniformity(energy: float, n: int, d: int, s: float, half_space: bool = False) -> float | None:
    """Returns (E_random - E) / (E_random - E_floor): 0 like random directions, 1 at the floor, negative if clustered.

    ``None`` where the expected energy of random directions diverges, s >= d - 1.

    Raises:
        UsageError: as for `floor`.
        NonFiniteError: the energy is NaN or infinite.

    >>> round(uniformity(0.45, 10, 9, 2.0), 12)  # the simplex
    1.0
    """
    _finite(energy)
    random = random_half_space(n, d, s) if half_space else random_mean(d, s)
    if random is None:
        return None
    return (random - energy) / (random - floor(n, d, s, half_space).value)


def gap(energy: float, floor: Floor | float) -> float:
    """Returns (E - E_floor) / |E_floor|: how far above the ground state the energy can be at most, relatively.

    Raises:
        UsageError: the floor is 0.
        NonFiniteError: the energy is NaN or infinite.

    >>> gap(0.75, 0.5)
    0.5
    """
    _finite(energy)
    value = floor.value if isinstance(floor, Floor) else float(floor)
    if value == 0:
        raise UsageError("a gap relative to a floor of 0 is not defined: compare the energies themselves")
    return (energy - value) / abs(value)


def _finite(energy: float) -> None:
    if not math.isfinite(energy):
        raise NonFiniteError(f"the energy must be finite, got {energy!r}: look for zero rows or duplicates")


# --- Levenshtein's quadrature ---------------------------------------------------------------------------------------


def _jacobi(alpha: float, beta: float, size: int) -> tuple[Array, Array]:
    """Returns a_0..a_{size-1} and b_1..b_size of the orthonormal polynomials for (1-t)^alpha (1+t)^beta on [-1, 1]."""
    j = np.arange(1, size + 1, dtype=np.float64)
    total = alpha + beta
    first = (beta - alpha) / (total + 2)
    a = np.concatenate(([first], (beta**2 - alpha**2) / ((2 * j + total) * (2 * j + total + 2))))[:size]
    # (j + total) / (2 j + total - 1) is 1 at j = 1, also where both are 0.
    ratio = np.concatenate(([1.0], (j[1:] + total) / (2 * j[1:] + total - 1)))
    square = 4 * j * (j + alpha) * (j + beta) * ratio / ((2 * j + total) ** 2 * (2 * j + total + 1))
    return a, np.sqrt(square)


def _values_at_one(a: Array, b: Array, n: float) -> list[float]:
    """Returns the orthonormal polynomials p_0(1), p_1(1), ... until the sum of their squares reaches n."""
    values, total, last = [1.0], 1.0, 0.0
    for k in range(len(b)):
        if total >= n:
            break
        value = ((1 - a[k]) * values[-1] - (b[k - 1] * last if k else 0.0)) / b[k]
        last = values[-1]
        values.append(float(value))
        total += value**2
    return values


def _with_node_one(a: Array, b: Array, values: list[float], k: int, n: float) -> tuple[Array, Array]:
    """Returns the k other nodes, and weights, of the quadrature that has the node 1 with weight 1/n; degree 2k - 1.

    The Jacobi matrix of order k + 1 whose last row is changed so that 1 is an eigenvalue with that weight.
    """
    from scipy.linalg import eigh_tridiagonal

    residual = b[k - 1] * values[k]
    square = residual**2 / (n - sum(v * v for v in values[:k]))
    diagonal = np.append(a[:k], 1 - square * values[k - 1] / residual)
    nodes, vectors = eigh_tridiagonal(diagonal, np.append(b[: k - 1], math.sqrt(square)))
    return nodes[:-1], vectors[0, :-1] ** 2


def _levenshtein(n: int, d: int, half_space: bool) -> tuple[Array, Array, int, float]:
    """Returns the nodes below 1, the weights, the degree of exactness and the number of points of the quadrature.

    The nodes are inner products t, in half-space u = 2 t^2 - 1.
    """
    alpha, beta = (d - 3) / 2, -0.5 if half_space else (d - 3) / 2
    a, b = _jacobi(alpha, beta, _NODES)
    values = _values_at_one(a, b, n)
    k = len(values) - 1
    points = min(float(n), sum(v * v for v in values))
    nodes, weights = _with_node_one(a, b, values, k, points)
    if nodes[0] >= -1:
        return nodes, weights, 2 * k - 1, points
    # Otherwise -1 is a node too, and the others belong to the weight (1 + t), whose mean is c.
    c = 2 * (beta + 1) / (alpha + beta + 2)
    a, b = _jacobi(alpha, beta + 1, k)
    nodes, weights = _with_node_one(a, b, _values_at_one(a, b, math.inf), k - 1, points * c / 2)
    weights = weights * c / (1 + nodes)
    rest = max(0.0, 1 - 1 / points - float(weights.sum()))
    return np.append(-1.0, nodes), np.append(rest, weights), 2 * k - 2, points


def _quadrature_floor(problem: _Problem) -> tuple[float, int]:
    """Returns the closed-form floor of the mean over pairs, and the degree (in t) of its polynomial."""
    nodes, weights, degree, points = _levenshtein(problem.n, problem.d, problem.half_space)
    # The potential increases with the nodes, so nodes that are a rounding error too small give too little.
    rounding = 8 * _EPS * len(nodes)
    nodes = np.maximum(nodes - rounding, -1)
    angles = 2 * np.arcsin(np.sqrt((1 - nodes) / 2)) * (0.5 if problem.half_space else 1)
    terms = problem.potential(angles)
    value = float((weights * terms).sum()) - rounding * float((weights * np.abs(terms)).sum() + np.abs(terms[0]))
    return points / (points - 1) * value, degree * (2 if problem.half_space else 1)


# --- The linear program ---------------------------------------------------------------------------------------------


def _gegenbauer(degrees: Array, d: int, theta: Array) -> Array:
    """Returns P_k(cos theta) for 0 and the given degrees, normalized to P_k(1) = 1: ``(len(theta), 1 + len(degrees))``.

    By (k + d - 2) P_{k+1} = (2k + d - 2) t P_k - k P_{k-1}; nothing overflows, as |P_k| <= 1.
    """
    t = np.cos(theta)
    columns = [np.ones_like(t), t]
    for k in range(1, int(degrees[-1])):
        columns.append(((2 * k + d - 2) * t * columns[k] - k * columns[k - 1]) / (k + d - 2))
    return np.stack([columns[0], *(columns[int(k)] for k in degrees)], axis=1)


def _program_floor(problem: _Problem) -> tuple[float, int, str]:
    """Returns the best floor of the programs of growing degree, that degree, and what went wrong, if anything did.

    The floor is that of the mean over pairs, scaled; minus infinity where no program was solved.
    """
    best, used = -math.inf, 0
    for highest in _DEGREES:
        degrees = problem.degrees(highest)
        h, message = _solve(problem, degrees)
        if h is None:
            return best, used, f" (linear program of degree {highest} failed: {message})"
        bound = float(h[0] - h[1:].sum() / (problem.n - 1)) + _worst(problem, degrees, h)
        gained = bound - best
        if gained > 0:
            best, used = bound, highest
        if gained < _GAIN:
            break
    return best, used, ""


def _solve(problem: _Problem, degrees: Array) -> tuple[Array | None, str]:
    """Returns nearly optimal h_0, h_k >= 0, in the order of ``degrees``, or None and what the solver said."""
    from scipy.optimize import linprog

    theta = problem.end * np.arange(1, _ANGLES + 1) / _ANGLES
    fine = problem.end * np.arange(1, _GRID + 1) / _GRID
    cost = np.append(-1.0, np.full(len(degrees), 1 / (problem.n - 1)))
    bounds = [(None, None), *[(0.0, None)] * len(degrees)]
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    h: Array | None = None
    for _ in range(_ROUNDS):
        # Rows are scaled to a right side of at most 1: the potential is huge at small angles.
        value = problem.potential(theta)
        row = 1 / np.maximum(1.0, np.abs(value))
        matrix = _gegenbauer(degrees, problem.d, theta) * row[:, None]
        result: Any = linprog(cost, matrix, value * row, bounds=bounds, method="highs-ds", options=options)
        if result.status != 0:
            return h, str(result.message)
        h = np.append(result.x[0], np.maximum(result.x[1:], 0.0))
        slack = problem.potential(fine) - _gegenbauer(degrees, problem.d, fine) @ h
        low = slack <= np.minimum(np.append(slack[1:], np.inf), np.append(np.inf, slack[:-1]))
        step = problem.end / _GRID
        around = fine[low][:, None] + step * np.linspace(-1, 1, 2 * _FINER + 1)
        around = np.clip(around, step / _FINER, problem.end)
        slack = problem.potential(around) - (_gegenbauer(degrees, problem.d, around.ravel()) @ h).reshape(around.shape)
        if slack.min() > -_SETTLED:
            break
        worst = around[np.arange(len(around)), slack.argmin(axis=1)]
        added = (worst[:, None] + step * _CLUSTER).ravel()
        theta = np.append(theta, added[(added > 0) & (added <= problem.end)])
    return h, ""


def _worst(problem: _Problem, degrees: Array, h: Array) -> float:
    """Returns a lower bound of f - h over all angles, rounding included.

    On a cell the difference g is at least the lesser end value minus width^2 / 8 times the largest g''. Near theta = 0
    the bound g >= f(high) - h(1) is the better one. Cells that could hold the minimum are split.
    """
    total = float(h[1:].sum())
    bend = float((h[1:] * degrees * (degrees + problem.d - 2)).sum()) / (problem.d - 1)
    rounding = 64 * _EPS * float(degrees[-1]) * (abs(float(h[0])) + total)
    edges = problem.end * np.arange(_CELLS + 1) / _CELLS
    low, high, settled, pending = edges[:-1], edges[1:], math.inf, -math.inf
    for _ in range(_SPLITS):
        f_high = problem.potential(high)
        inner = low > 0
        left, right = low[inner], high[inner]
        g_left = problem.potential(left) - _gegenbauer(degrees, problem.d, left) @ h
        g_right = f_high[inner] - _gegenbauer(degrees, problem.d, right) @ h
        drop = (right - left) ** 2 / 8 * np.maximum(problem.curvature(left, right) + bend, 0)
        bound = f_high - (h[0] + total)
        bound[inner] = np.maximum(bound[inner], np.minimum(g_left, g_right) - drop)
        seen = min(float(g_left.min(initial=math.inf)), float(g_right.min(initial=math.inf)))
        open_ = bound < min(seen, 0.0) - 1e-12
        settled = min(settled, float(bound[~open_].min(initial=math.inf)))
        if not open_.any():
            return settled - rounding
        middle = (low[open_] + high[open_]) / 2
        low, high = np.append(low[open_], middle), np.append(middle, high[open_])
        pending = float(bound[open_].min())
    return min(settled, pending) - rounding
