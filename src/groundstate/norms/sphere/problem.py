r"""What the linear program bounds: a potential of the angle, and functions whose pair means have floors of their own.

Idea: if sum_j x_j g_j(theta) <= f(theta) for all angles, with x_j >= 0 and the pair mean of g_j at least m_j for every
configuration of n points, then the pair mean of f is at least sum_j x_j m_j. Such g_j are the Gegenbauer polynomials
P_k(cos theta) with m_k = -1/(n-1), because they are positive definite, and the constant.

Potentials of the angle itself, theta^-s or -log theta, are not near polynomials at either end: they are singular at 0,
and at pi they have a slope, which no smooth function of cos theta has. Two more functions take that up::

    r^-s (-log r),   m its Euclidean floor;      pi/2 - theta,   m = -pi / (2 (n-1)) for even n, -pi / (2n) for odd n

The last floor: an angle is pi times the share of hyperplanes that separate the two points, and of n points a hyperplane
separates n^2 / 4 pairs at most.

Reference: V. Yudin, "Minimum potential energy of a point system of charges" (1993); for the sum of angles L. Fejes
Toth, "Ueber eine Punktverteilung auf der Kugel" (1959).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from groundstate.norms.sphere.references import potential

Array = npt.NDArray[np.float64]

EPS = float(np.finfo(np.float64).eps)
# Below this half of an angle log(x / sin x) is summed as a series, whose next term is 6e-16 of its value.
_SMALL = 0.1
_SERIES = (1 / 6, 1 / 180, 1 / 2835, 1 / 37800, 1 / 467775)
# Least share of r^-s that is given back for s > 2, where theta^-s - r^-s is unbounded.
_SHARE = 1e-9


@dataclass(frozen=True)
class Problem:
    """Bound the mean over pairs of f (half-space: of f(theta) + f(pi - theta)), divided by ``scale``.

    Attributes:
        n, d, s: As of `groundstate.norms.sphere.floor`.
        half_space: Angles of lines, in (0, pi/2].
        angular: The potential is theta^-s and not r^-s.
        scale: What the potential is divided by.
        base: Floor of a part of the potential that ``target`` leaves out.
    """

    n: int
    d: int
    s: float
    half_space: bool = False
    angular: bool = False
    scale: float = 1.0
    base: float = 0.0

    @property
    def end(self) -> float:
        return math.pi / 2 if self.half_space else math.pi

    def degrees(self, highest: int) -> Array:
        step = 2 if self.half_space else 1
        return np.arange(step, highest + 1, step, dtype=np.float64)

    def potential(self, theta: Array) -> Array:
        """Returns the scaled potential at angles in (0, end]; it decreases."""
        value = self._at(self._distance(theta))
        return value + self._at(self._distance(math.pi - theta)) if self.half_space else value

    def mean(self, value: float) -> float:
        """Returns the energy from the mean over pairs of the potential, not scaled."""
        opposite = potential(math.pi**2 if self.angular else 4, self.s)
        return ((self.n - 1) * value + opposite) / (2 * self.n - 1) if self.half_space else value

    # ------------------------------------------------------------------ what the program combines

    def target(self, theta: Array) -> Array:
        """Returns what the sum of the x_j g_j must not exceed."""
        return self.potential(theta)

    def functions(self, degrees: Array, theta: Array) -> Array:
        """Returns the functions g_j, the constant first: ``(len(theta), j)``."""
        return gegenbauer(degrees, self.d, theta)

    def means(self, degrees: Array) -> Array:
        """Returns the floors m_j of their pair means."""
        return np.append(1.0, np.full(len(degrees), -1 / (self.n - 1)))

    def limits(self, degrees: Array) -> Array:
        """Returns lower and upper limits of the x_j, ``(j, 2)``."""
        return np.array([(-math.inf, math.inf), *[(0.0, math.inf)] * len(degrees)])

    # ------------------------------------------------------------------ what the verification needs

    def smooth(self, degrees: Array, theta: Array, x: Array) -> Array:
        """Returns the part of the sum whose curvature is at most ``bend``."""
        return self.functions(degrees, theta) @ x

    def peak(self, degrees: Array, x: Array) -> float:
        """Returns an upper bound of that part over all angles."""
        return float(x[0] + x[1 : 1 + len(degrees)].sum())

    def bend(self, degrees: Array, x: Array) -> float:
        """Returns an upper bound of its second derivative: the cosine coefficients of P_k(cos theta) are positive."""
        return float((x[1 : 1 + len(degrees)] * degrees * (degrees + self.d - 2)).sum()) / (self.d - 1)

    def rest(self, theta: Array, x: Array) -> tuple[Array, Array]:
        """Returns the target less the other part, and the rounding error of that."""
        value = self.target(theta)
        return value, np.zeros_like(value)

    def falling(self, high: Array, x: Array) -> npt.NDArray[np.bool_]:
        """Returns where the rest is known to decrease on (0, high]."""
        return np.ones(high.shape, dtype=np.bool_)

    def curvature(self, low: Array, high: Array, x: Array) -> Array:
        """Returns an upper bound of the second derivative of the rest on each cell [low, high]."""
        value = self._curvature(low)
        return value + self._curvature(math.pi - high) if self.half_space else value

    # ------------------------------------------------------------------

    def _distance(self, theta: Array) -> Array:
        return theta if self.angular else chord(theta)

    def _at(self, r: Array) -> Array:
        return -np.log(r) if self.s == 0 else np.exp(np.minimum(-self.s * np.log(r) - math.log(self.scale), 600))

    def _curvature(self, theta: Array) -> Array:
        s, r = self.s, self._distance(theta)
        if self.angular:
            return r**-2 if s == 0 else s * (s + 1) * self._at(r) / r**2
        # With r = 2 sin(theta / 2): f'' = f (s^2 cot^2 + s csc^2) / 4, and csc^2 / 4 for the logarithm; decreasing.
        csc = 4 / r**2
        return csc / 4 if s == 0 else self._at(r) * (s**2 * (csc - 1) + s * csc) / 4


@dataclass(frozen=True)
class AngularProblem(Problem):
    """The angular potential in the full space, as r^-s and what differs, with two more functions (last in x).

    ``base`` is the floor of the pair mean of r^-s (-log r). A share x[-1] of r^-s is given back to the target.
    """

    def target(self, theta: Array) -> Array:
        ratio = log_ratio(theta)
        return -ratio if self.s == 0 else -self._at(theta) * np.expm1(np.minimum(self.s * ratio, 600))

    def functions(self, degrees: Array, theta: Array) -> Array:
        more = [math.pi / 2 - theta, -self._at(chord(theta))]
        return np.column_stack([gegenbauer(degrees, self.d, theta), *more])

    def means(self, degrees: Array) -> Array:
        return np.append(super().means(degrees), [-excess_angle(self.n), -self.base])

    def limits(self, degrees: Array) -> Array:
        return np.vstack([super().limits(degrees), [(0.0, math.inf), (0.0 if self.s <= 2 else _SHARE, 1.0)]])

    def smooth(self, degrees: Array, theta: Array, x: Array) -> Array:
        return gegenbauer(degrees, self.d, theta) @ x[:-2] + x[-2] * (math.pi / 2 - theta)

    def peak(self, degrees: Array, x: Array) -> float:
        return super().peak(degrees, x) + float(x[-2]) * math.pi / 2

    def rest(self, theta: Array, x: Array) -> tuple[Array, Array]:
        # Near 0 these two are far smaller than theta^-s and r^-s, of which they are the difference.
        near, far = (1 - x[-1]) * self.target(theta), x[-1] * self._at(theta)
        direct = np.where(theta / 2 < _SMALL, 0, self._at(theta) if self.s else 1)  # the error of `log_ratio`
        return near + far, 16 * EPS * (1 + self.s) * (np.abs(near) + np.abs(far) + direct)

    def falling(self, high: Array, x: Array) -> npt.NDArray[np.bool_]:
        # The slope is negative iff y cos(theta/2) (theta / r)^(s+1) < 1, y = 1 - x[-1]; for s <= 2 since
        # cos z < (sin z / z)^3.
        steep = (1 - x[-1]) * np.exp(np.minimum((self.s + 1) * log_ratio(high), 600)) < 1
        return steep | (self.s <= 2)

    def curvature(self, low: Array, high: Array, x: Array) -> Array:
        # (theta^-s - r^-s)'' = s^2 r^-s / 4 - s (s+1) (r^(-s-2) - theta^(-s-2)), for s = 0 without s (s+1) and s^2.
        s, far = self.s, chord(high)
        apart = -np.expm1(-(s + 2) * log_ratio(low)) * (s * (s + 1) * self._at(far) if s else 1) / far**2
        return x[-1] * self._curvature(low) + (1 - x[-1]) * (s**2 / 4 * self._at(chord(low)) - apart)


def gegenbauer(degrees: Array, d: int, theta: Array) -> Array:
    """Returns P_k(cos theta) for 0 and the given degrees, normalized to P_k(1) = 1: ``(len(theta), 1 + len(degrees))``.

    By (k + d - 2) P_{k+1} = (2k + d - 2) t P_k - k P_{k-1}; nothing overflows, as |P_k| <= 1.
    """
    t = np.cos(theta)
    columns = [np.ones_like(t), t]
    for k in range(1, int(degrees[-1])):
        columns.append(((2 * k + d - 2) * t * columns[k] - k * columns[k - 1]) / (k + d - 2))
    return np.stack([columns[0], *(columns[int(k)] for k in degrees)], axis=1)


def excess_angle(n: int) -> float:
    """Returns by how much the mean angle of the pairs of n points can exceed pi/2: that of two antipodal piles does.

    An angle is pi times the share of hyperplanes that separate the two, and none separates more than n^2 / 4 pairs.
    """
    return math.pi / (2 * (n - 1 if n % 2 == 0 else n))


def chord(theta: Array) -> Array:
    """Returns the distance r = 2 sin(theta / 2)."""
    return 2 * np.sin(theta / 2)


def log_ratio(theta: Array) -> Array:
    """Returns log(theta / r) >= 0, to its own rounding also at small angles."""
    half = theta / 2
    square = np.minimum(half, _SMALL) ** 2
    series = square * np.polynomial.polynomial.polyval(square, _SERIES)
    return np.where(half < _SMALL, series, np.log(half / np.sin(np.maximum(half, EPS))))
