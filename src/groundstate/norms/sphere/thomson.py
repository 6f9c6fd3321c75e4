r"""Ground states of a few points on the sphere, by search: the Thomson problem for any exponent and dimension.

Idea: the energy sum_{i<j} f_s(|u_i - u_j|), f_s(r) = r^-s, f_0 = -log r, has many local minima. L-BFGS in the free
coordinates w, u = w / |w|, started from many independent random configurations, finds the lowest of them for small N.
The result is an upper bound of the ground state, no proof: with `groundstate.norms.sphere.floor` it encloses it.

With c = u_i . u_j and h(c) = f(sqrt(2 - 2c)), the gradient is g_i = sum_j h'(c_ij) u_j less its part along u_i.

Reference: J. J. Thomson (1904); T. Erber, G. Hockney, "Equilibrium configurations of N
equal charges on a sphere" (1991).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.sphere.references import check

Array = npt.NDArray[np.float64]

LARGEST_EXPONENT = 30.0
_ITERATIONS = 5000
_MEMORY = 20


class Configuration(NamedTuple):
    """Points on the sphere and their energy.

    Attributes:
        points: Unit vectors ``(n, d)``, float64.
        total: The energy, summed over unordered pairs.
        mean: The energy, averaged over pairs.
        gradient_norm: Frobenius norm of the gradient of ``total`` along the sphere.
    """

    points: Tensor
    total: float
    mean: float
    gradient_norm: float


def thomson(
    n: int, d: int = 3, s: float = 1.0, *, restarts: int = 60, generator: torch.Generator, tolerance: float = 1e-8
) -> Configuration:
    """Searches for the configuration of n points on S^(d-1) with the least energy.

    Args:
        n: Number of points, at least 2.
        d: Dimension of the space, at least 2.
        s: Exponent, 0 for -log r.
        restarts: Number of independent random starts. The chance of missing the ground state grows quickly with n.
        generator: Source of the starts (on the CPU).
        tolerance: A search ends where no entry of the gradient of the total, relative to max(1, |total|), is larger.

    Returns:
        The best configuration found. Its total is accurate to about 1e-13 relative; its gradient may stop above the
        tolerance where rounding hides the descent, see ``gradient_norm``.

    Raises:
        UsageError: n < 2 or d < 2, not integers; s negative or not finite; restarts < 1; tolerance not positive.
        NonFiniteError: no search ended at a finite energy (an exponent too large for float64).

    Cost: restarts * some hundred evaluations of n^2 d flops each.

    >>> round(thomson(4, generator=torch.Generator().manual_seed(0), restarts=2).total, 6)  # tetrahedron: 6 / sqrt(8/3)
    3.674235
    """
    n, d, s = check(n, d, s)
    if s > LARGEST_EXPONENT:
        raise UsageError(
            f"the search descends on r^-s itself, which has too few digits above s = {LARGEST_EXPONENT:g}, got {s:g}: "
            "a smaller exponent has nearly the same ground states (the limit is the best packing)"
        )
    if isinstance(restarts, bool) or not isinstance(restarts, int) or restarts < 1:
        raise UsageError(f"restarts must be an integer of at least 1, got {restarts!r}")
    if not tolerance > 0:
        raise UsageError(f"the tolerance of the gradient must be positive, got {tolerance!r}")
    best: Array | None = None
    least = np.inf
    for _ in range(restarts):
        start = torch.randn(n, d, generator=generator, dtype=torch.float64).numpy()
        u = _descend(start, s, tolerance)
        total, _ = _energy_and_grad(u, s)
        if total < least:
            best, least = u, total
    if best is None or (2 - 2 * (best @ best.T)[np.triu_indices(n, 1)]).min() <= _closest(s):
        raise NonFiniteError(
            f"the energy of {n} points in dimension {d} is too large: take an exponent below s = {s:g}"
        )
    _, grad = _energy_and_grad(best, s)
    norm = float(np.linalg.norm(grad))
    return Configuration(torch.from_numpy(best), float(least), float(least) / (n * (n - 1) / 2), norm)


def _descend(start: Array, s: float, tolerance: float) -> Array:
    """Returns the unit vectors at which L-BFGS, started at ``start``, ends."""
    from scipy.optimize import minimize

    def objective(flat: Array) -> tuple[float, Array]:
        w = flat.reshape(start.shape)
        norm = np.linalg.norm(w, axis=1, keepdims=True)
        total, grad = _energy_and_grad(w / norm, s)
        return total / scale, (grad / (norm * scale)).ravel()

    scale, u = 1.0, start / np.linalg.norm(start, axis=1, keepdims=True)
    options: dict[str, Any] = {"maxiter": _ITERATIONS, "maxfun": 2 * _ITERATIONS, "maxcor": _MEMORY, "ftol": 0.0}
    # Random starts have a much larger energy than ground states: the scale is right after a first, coarse descent.
    for gtol in (1e-3, tolerance):
        scale = max(1.0, abs(_energy_and_grad(u, s)[0]))
        w = minimize(objective, u.ravel(), jac=True, method="L-BFGS-B", options={**options, "gtol": gtol}).x
        u = w.reshape(start.shape)
        u = u / np.linalg.norm(u, axis=1, keepdims=True)
    return u


def _closest(s: float) -> float:
    """Returns the squared distance below which pairs count as this far apart, so that r^-s is at most 1e100."""
    return 10.0 ** (-200 / max(s, 16.0))


def _energy_and_grad(u: Array, s: float) -> tuple[float, Array]:
    """Returns the energy summed over pairs of unit vectors and its gradient along the sphere."""
    gram = u @ u.T
    square = np.maximum(2 - 2 * gram, _closest(s))
    np.fill_diagonal(square, 1.0)
    if s == 0:
        total, slope = -0.25 * np.log(square).sum(), 1 / square
    else:
        power = square ** (-s / 2)
        total, slope = 0.5 * (power.sum() - len(u)), s * power / square
    np.fill_diagonal(slope, 0.0)
    grad = slope @ u
    grad -= (slope * gram).sum(axis=1, keepdims=True) * u
    return float(total), grad
