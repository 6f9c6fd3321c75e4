r"""The linear program of `groundstate.norms.sphere.floor`, and the verification of what its solver returns.

Idea: maximize sum_j x_j m_j subject to sum_j x_j g_j(theta) <= f(theta) (see `groundstate.norms.sphere.problem`). The
constraints of the program hold at finitely many angles only, so the result is verified: the second derivative of
f - sum_j x_j g_j has an upper bound on each cell of angles, cells are halved until the lower bound of the function
itself that follows is sharp, and the worst value, rounding included, is taken off the constant.

Reference: V. Yudin, "Minimum potential energy of a point system of charges" (1993).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from groundstate.norms.sphere.problem import EPS, Array, Problem

# Degrees of the program; the next is tried while the last one gained more than _GAIN, relative to the potential.
DEGREES = (14, 18, 24)
_GAIN = 1e-8
# Angles of the first program; grid that is searched for more; rounds of adding those where h exceeds f by more than
# _SETTLED; how finely each is located; the cluster added around it, in steps of the grid, so that the points where h
# touches f are met quickly.
_ANGLES = 100
_GRID = 4000
_ROUNDS = 16
_SETTLED = 1e-10
_FINER = 64
_CLUSTER = np.concatenate([[0.0], *([x, -x] for x in 4.0 ** -np.arange(6))])
# Cells of the verification: how many to start with, how often the worst are split.
_CELLS = 4096
_SPLITS = 12


def program_floor(problem: Problem) -> tuple[float, int, str]:
    """Returns the best floor of the programs of growing degree, that degree, and what went wrong, if anything did.

    The floor is that of the mean over pairs, scaled; minus infinity where no program was solved.
    """
    best, used = -math.inf, 0
    for highest in DEGREES:
        degrees = problem.degrees(highest)
        x, message = solve(problem, degrees)
        if x is None:
            return best, used, f" (linear program of degree {highest} failed: {message})"
        bound = problem.base + float(problem.means(degrees) @ x) + worst(problem, degrees, x)
        gained = bound - best
        if gained > 0:
            best, used = bound, highest
        if gained < _GAIN:
            break
    return best, used, ""


def solve(problem: Problem, degrees: Array) -> tuple[Array | None, str]:
    """Returns nearly optimal x_j, or None and what the solver said."""
    from scipy.optimize import linprog

    theta = problem.end * np.arange(1, _ANGLES + 1) / _ANGLES
    fine = problem.end * np.arange(1, _GRID + 1) / _GRID
    limits = problem.limits(degrees)
    options = {"primal_feasibility_tolerance": 1e-10, "dual_feasibility_tolerance": 1e-10}
    last: Array | None = None
    for _ in range(_ROUNDS):
        # Rows are scaled to a right side of at most 1: the potential is huge at small angles.
        value = problem.target(theta)
        row = 1 / np.maximum(1.0, np.abs(value))
        matrix = problem.functions(degrees, theta) * row[:, None]
        cost = -problem.means(degrees)
        result: Any = linprog(cost, matrix, value * row, bounds=limits, method="highs-ds", options=options)
        if result.status != 0:
            return last, str(result.message)
        x = last = np.clip(result.x, limits[:, 0], limits[:, 1])
        slack = problem.rest(fine, x)[0] - problem.smooth(degrees, fine, x)
        low = slack <= np.minimum(np.append(slack[1:], np.inf), np.append(np.inf, slack[:-1]))
        step = problem.end / _GRID
        around = fine[low][:, None] + step * np.linspace(-1, 1, 2 * _FINER + 1)
        around = np.clip(around, step / _FINER, problem.end)
        slack = problem.rest(around, x)[0] - problem.smooth(degrees, around.ravel(), x).reshape(around.shape)
        if slack.min() > -_SETTLED:
            break
        lowest = around[np.arange(len(around)), slack.argmin(axis=1)]
        added = (lowest[:, None] + step * _CLUSTER).ravel()
        theta = np.append(theta, added[(added > 0) & (added <= problem.end)])
    return last, ""


def worst(problem: Problem, degrees: Array, x: Array) -> float:
    """Returns a lower bound of f - sum_j x_j g_j over all angles, rounding included.

    On a cell the difference g is at least the lesser end value minus width^2 / 8 times the largest g''. Near theta = 0,
    where f decreases, the bound g >= f(high) - (the largest of the others) is the better one. Cells that could hold the
    minimum are split.
    """
    peak, bend = problem.peak(degrees, x), problem.bend(degrees, x)
    rounding = 64 * EPS * float(degrees[-1]) * (abs(float(x[0])) + peak - float(x[0]))
    edges = problem.end * np.arange(_CELLS + 1) / _CELLS
    low, high, settled, pending = edges[:-1], edges[1:], math.inf, -math.inf

    def rest(theta: Array) -> Array:
        value, error = problem.rest(theta, x)
        return value - error

    for _ in range(_SPLITS):
        f_high = rest(high)
        inner = low > 0
        left, right = low[inner], high[inner]
        g_left = rest(left) - problem.smooth(degrees, left, x)
        g_right = f_high[inner] - problem.smooth(degrees, right, x)
        drop = (right - left) ** 2 / 8 * np.maximum(problem.curvature(left, right, x) + bend, 0)
        bound = np.where(problem.falling(high, x), f_high - peak, -math.inf)
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
