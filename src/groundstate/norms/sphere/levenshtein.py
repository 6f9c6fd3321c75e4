"""Levenshtein's quadrature: closed-form floors of energies whose potential is absolutely monotone.

Idea: for n points on S^(d-1) there is a quadrature, exact on polynomials up to a degree tau(n, d), that has the node 1
with weight 1/n and other nodes a_i < 1 with weights rho_i. The polynomial that interpolates f at the a_i (value and
slope) stays below f, and by the linear-programming method of `groundstate.norms.sphere.floor` the pair mean is at least
n / (n-1) sum_i rho_i f(a_i). Lines (half-spaces) are points of the projective space, with u = 2 t^2 - 1 in place of t.

Reference: V. Levenshtein, "Universal bounds for codes and designs" (1998); P. Boyvalenkov, P. Dragnev, D. Hardin, E.
Saff, M. Stoyanova, "Universal lower bounds for potential energy of spherical codes" (2016), and "Energy bounds for
codes in polynomial metric spaces" (2019).
"""

from __future__ import annotations

import math

import numpy as np

from groundstate.norms.sphere.problem import EPS, Array, Problem

# Largest number of quadrature nodes. Beyond, the floor of fewer points is taken: the least mean grows with n.
_NODES = 1200


def quadrature_floor(problem: Problem) -> tuple[float, int]:
    """Returns the floor of the mean over pairs of the potential, and the degree (in t) of its polynomial.

    The potential of ``problem`` must be absolutely monotone in t, in half-space in t^2: all but the angular ones of the
    full space are.
    """
    nodes, weights, degree, points = _levenshtein(problem.n, problem.d, problem.half_space)
    # The potential increases with the nodes, so nodes that are a rounding error too small give too little.
    rounding = 8 * EPS * len(nodes)
    nodes = np.maximum(nodes - rounding, -1)
    angles = 2 * np.arcsin(np.sqrt((1 - nodes) / 2)) * (0.5 if problem.half_space else 1)
    terms = problem.potential(angles)
    value = float((weights * terms).sum()) - rounding * float((weights * np.abs(terms)).sum() + np.abs(terms[0]))
    return points / (points - 1) * value, degree * (2 if problem.half_space else 1)


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
