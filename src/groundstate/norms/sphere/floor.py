r"""Certified floors of the energy of n points on the sphere, for any n, d and s: how far from the ground state at most.

Idea (Delsarte, Yudin): let P_k be the Gegenbauer polynomials of S^(d-1) with P_k(1) = 1. They are positive definite, so
any h(t) = sum_k h_k P_k(t) with h_k >= 0 for k >= 1 that stays below the potential, h(c) <= f(c) for all inner products
c < 1, bounds the pair mean of every configuration::

    sum_{i != j} f(c_ij) >= sum_{i,j} h(c_ij) - n h(1) >= n^2 h_0 - n h(1),  so  mean >= h_0 - sum_{k>=1} h_k / (n-1)

Two choices of h, the better one counts:

* Closed form: interpolating f at the nodes of Levenshtein's quadrature (`groundstate.norms.sphere.levenshtein`). It
  needs f to be absolutely monotone in t, as all f_s are; any degree costs little.
* A linear program over h_0..h_K, verified between its angles (`groundstate.norms.sphere.program`), which may use
  degrees above those of the quadrature.

Half-space energies: the same with even polynomials, that is on projective space, with u = 2 t^2 - 1. There the angular
potentials are absolutely monotone too: theta = pi/2 - arcsin(t), so that theta^-s has positive coefficients in t, and
f(theta) + f(pi - theta) twice those of even degree. In the full space they are not, as their slope in t is infinite at
-1; there the program knows two more functions (`groundstate.norms.sphere.problem`), and the largest possible sum of
angles gives a closed form.

Reference: V. Yudin, "Minimum potential energy of a point system of charges" (1993); H. Cohn, A. Kumar, "Universally
optimal distribution of points on spheres" (2007).
"""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache
from typing import NamedTuple

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.sphere.levenshtein import quadrature_floor
from groundstate.norms.sphere.problem import AngularProblem, Problem, excess_angle
from groundstate.norms.sphere.program import DEGREES, program_floor
from groundstate.norms.sphere.references import (
    check,
    ground_state,
    potential,
    random_half_space,
    random_mean,
    welch_floor,
)


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


@lru_cache(maxsize=1024, typed=True)
def floor(n: int, d: int, s: float, half_space: bool = False, angular: bool = False) -> Floor:
    """Returns the best certified lower bound of the energy of n points on S^(d-1).

    The exact ground state where a proof is known, else the best of the bounds that hold: a verified linear program,
    Levenshtein's quadrature (not for angles in the full space), the bounds of simplex, Welch or angles. It rests on
    float64 arithmetic, whose rounding is estimated to first order and subtracted.

    Args:
        n: Number of points (neurons), at least 2.
        d: Dimension of the space, at least 2.
        s: Exponent, 0 for -log r.
        half_space: Count -u_i beside u_i.
        angular: Angles in place of distances.

    Raises:
        UsageError: n < 2 or d < 2, not integers; s negative or not finite, or so large that r^-s overflows.

    Cost: at most about a second, for angles two, whatever n and d; remembered. Polygons (d = 2) cost O(n).

    >>> floor(12, 3, 2.0)
    Floor(value=0.5909090909090909, method='exact ground state', exact=True)
    >>> floor(7, 3, 1.0).value < 14.452977414 / 21  # the best known energy of 7 charges
    True
    """
    n, d, s = check(n, d, s)
    exact = ground_state(n, d, s, half_space, angular)
    if exact is not None:
        return Floor(exact, "exact ground state", True)
    problem = Problem(n, d, s, half_space, angular)
    value, tau = quadrature_floor(problem)
    scale = 1.0 if s == 0 else value
    if angular and not half_space:  # here the quadrature gives the order of magnitude, no bound
        found = [Floor(potential((math.pi / 2 + excess_angle(n)) ** 2, s), "sum of angles", False)]
        problem, tau = AngularProblem(n, d, s, angular=True, base=floor(n, d, s).value / scale), 0
    else:
        found = [Floor(problem.mean(value), f"Levenshtein quadrature, degree {tau}", False)]
        if half_space:
            found.append(Floor(welch_floor(n, d, s, angular), "Welch bound", False))
        else:
            found.append(Floor(potential(2 * n / (n - 1), s), "simplex bound", False))
    note = ""
    if tau <= DEGREES[-1]:
        program, used, note = program_floor(replace(problem, scale=scale))
        found.append(Floor(problem.mean(program * scale), f"linear program, degree {used}", False))
    best = max(found, key=lambda candidate: candidate.value)
    return best._replace(method=best.method + note)


def uniformity(
    energy: float, n: int, d: int, s: float, half_space: bool = False, angular: bool = False
) -> float | None:
    """Returns (E_random - E) / (E_random - E_floor): 0 like random directions, 1 at the floor, negative if clustered.

    ``None`` where the expected energy of random directions diverges, s >= d - 1.

    Raises:
        UsageError: as for `floor`.
        NonFiniteError: the energy is NaN or infinite.

    >>> round(uniformity(0.45, 10, 9, 2.0), 12)  # the simplex
    1.0
    """
    _finite(energy)
    random = random_half_space(n, d, s, angular) if half_space else random_mean(d, s, angular)
    if random is None:
        return None
    return (random - energy) / (random - floor(n, d, s, half_space, angular).value)


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
