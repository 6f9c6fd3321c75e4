"""Unbiased estimates of the hyperspherical energy from a sample of neurons, with their standard errors.

Idea: the energy is the mean over neurons i of e_i, the mean of f over the pairs of i. A sample of m neurons against all
the others costs m N d where the whole costs N^2 d / 2. Its error falls by orders of magnitude when only what differs
from a polynomial is sampled, because a polynomial of degree two has its mean over all pairs in closed form::

    f = T + (f - T),    T(c) = 2^-b (1 + b c + b (b + 1) / 2 c^2),  b = s / 2   (s = 0: -log(2) / 2 + c / 2 + c^2 / 4)
    sum_{i,j} c_ij = |sum u|^2,       sum_{i,j} c_ij^2 = ||U^T U||_F^2

In d dimensions cosines are about d^-1/2, so f - T is small, unless a few pairs are so close that they outweigh all
others. No sample sees those, and `estimate` refuses where they must be expected (2 s >= d - 1: for uniform directions
the variance of f is infinite) or where one is found by hashing.

Reference: P. Glasserman, "Monte Carlo Methods in Financial Engineering" (2003), section 4.1, for control variates; M.
Datar et al., "Locality-sensitive hashing scheme based on p-stable distributions" (2004).
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from groundstate.errors import UsageError
from groundstate.norms.spectral import working_dtype
from groundstate.norms.sphere import dtype_for, finite, pair_mean, pair_weight
from groundstate.norms.sphere.autograd import differentiable
from groundstate.norms.sphere.blocks import row_sums
from groundstate.norms.sphere.directions import Directions, by_weights, checked, directions
from groundstate.norms.sphere.law import Law, law

# Closer pairs than this outweigh thousands of others at s = 2.
_TOO_NEAR = 0.03
# A pair at that distance falls into one cell of a table with probability 0.75, so into none with 0.4 percent; a random
# pair does with 8e-6. Of each number of a cell, 6 bits count: no two cells within 16 deviations are mixed up.
_TABLES, _HASHES, _WIDTH, _NEIGHBORS, _BITS = 4, 6, 0.5, 8, 6
_PAIRS = 1024  # candidates whose distance is taken at a time
_COLUMNS = 128  # of a block of U^T U, which is symmetric
# Rows that are drawn: _ROWS / d, in these limits. The polynomial leaves the less the larger d is, and costs the more.
_ROWS, _FEWEST, _MOST = 2**14, 32, 256


class Estimate(NamedTuple):
    """An estimate, ``(*batch,)``, and its standard error; the value is differentiable."""

    value: Tensor
    standard_error: Tensor


class _Moments(NamedTuple):
    """T(c) = t0 + t1 c + t2 c^2 and sum u, U^T U over all neurons."""

    t0: float
    t1: float
    t2: float
    v: Tensor
    m: Tensor


def sampled(
    w: Tensor,
    s: float = 1.0,
    rows: int = 256,
    *,
    generator: torch.Generator,
    half_space: bool = False,
    angular: bool = False,
    on_duplicate: Literal["clip", "error"] = "clip",
    r_min: float = 1e-6,
) -> Estimate:
    """Returns an unbiased estimate of the energy from ``rows`` neurons, drawn without replacement, against all others.

    The mini-batch form of the energy: its gradient is an unbiased estimate of the energy's, and reaches all neurons.

    Args:
        w: Neurons in rows, ``(*batch, N, d)``, none of them zero.
        s: Exponent of r^-s; 0 is -log r.
        rows: How many neurons to draw, at least 2; from N on all, and the value is exact.
        generator: Where the drawing comes from.
        half_space: As of `sphere.energy`, like the rest.
        angular: Take angles in place of distances.
        on_duplicate: What to do with drawn duplicates.
        r_min: Smallest distance that counts.

    Returns:
        Value and standard error, float64 for float64 w and float32 otherwise. The standard error is that of the drawing
        and misses what no draw shows: a few pairs far closer than all others.

    Raises:
        UsageError, NonFiniteError: as of `sphere.energy`; fewer than 2 rows.

    Cost: 2 rows N d flops, 6 rows N d with a gradient; on one thread.

    >>> sampled(torch.eye(5), s=2, rows=2, generator=torch.Generator().manual_seed(0)).value
    tensor(0.5000)
    """
    rule = law(s, half_space, angular, on_duplicate, r_min)
    _check(rows, generator)
    return Estimate(*differentiable(w, lambda x, gradient: _estimate(x, rule, rows, generator, gradient, False)))


def estimate(
    w: Tensor, s: float = 1.0, *, half_space: bool = False, rows: int | None = None, generator: torch.Generator
) -> Estimate:
    """Returns an unbiased estimate of the energy: moments of all pairs, and a sample of what they leave.

    For well-spread neurons its error is 10 to 100 times smaller than that of `sampled`, more in more dimensions.

    Args:
        w: Neurons in rows, ``(*batch, N, d)``, none of them zero.
        s: Exponent of r^-s; 0 is -log r.
        half_space: Count each neuron's opposite too.
        rows: How many neurons to draw, at least 2; from N on all, and the value is exact. ``None``: 16384 / d, but 32
            to 256, the more the less the moments know.
        generator: Where the drawing and the hashing come from.

    Returns:
        Value and standard error, float64 for float64 w and float32 otherwise.

    Raises:
        UsageError: as of `sphere.energy`; fewer than 2 rows; 2 s >= d - 1; a pair closer than 0.03 (in a half-space
            also to the antipode) among the drawn pairs, or found by hashing, which misses one in 250.
        NonFiniteError: as of `sphere.energy`.

    Cost: 1.2 N d^2 + 2 rows N d flops, with a gradient 3.2 N d^2 + 6 rows N d; memory d^2 and 2 N d numbers. At
    N = 8192, d = 512 the value takes 1/22 of the time of the exact value and gradient, with its gradient 1/9.

    >>> estimate(torch.eye(8), s=1, rows=4, generator=torch.Generator().manual_seed(0)).value
    tensor(0.7071)
    """
    rule = law(s, half_space, r_min=_TOO_NEAR)
    if rows is None:
        rows = min(max(_ROWS // max(1, checked(w).shape[-1]), _FEWEST), _MOST)
    _check(rows, generator)
    return Estimate(*differentiable(w, lambda x, gradient: _estimate(x, rule, rows, generator, gradient, True)))


def _check(rows: int, generator: torch.Generator) -> None:
    if isinstance(rows, bool) or not isinstance(rows, int) or rows < 2:
        raise UsageError(f"rows must be an integer of at least 2 (one has no standard error), got {rows!r}")
    if not isinstance(generator, torch.Generator):
        raise UsageError(f"generator must be a torch.Generator, got {type(generator).__name__}")


def _estimate(
    w: Tensor, rule: Law, rows: int, generator: torch.Generator, gradient: bool, moments: bool
) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """Returns value and standard error, and the gradient (empty unless asked for)."""
    flat = checked(w)
    d = flat.shape[-1]
    if moments and 2 * rule.s >= d - 1:
        raise UsageError(
            f"with s = {rule.s:g} in {d} dimensions the variance of r^-s is infinite (2 s >= d - 1), so that a sample "
            "tells nothing: use the exact energy, or sampled with care"
        )
    values, errors, grads = [], [], []
    for k in range(flat.shape[0]):
        one = flat[k : k + 1]
        value, error, grad = _single(directions(one, dtype_for(one, rule.s)), rule, rows, generator, gradient, moments)
        values.append(value)
        errors.append(error)
        if grad is not None:
            grads.append(finite(grad, "gradient", rule))
    dtype, batch = working_dtype(w.dtype), w.shape[:-2]
    value, error = (torch.stack(x).reshape(batch) if x else w.new_empty(batch).double() for x in (values, errors))
    both = finite(value.to(dtype), "value", rule), error.to(dtype)
    return both, (torch.cat(grads) if grads else flat[:0]).reshape(w.shape) if gradient else w.new_empty(0)


def _single(
    of: Directions, rule: Law, rows: int, generator: torch.Generator, gradient: bool, moments: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    count = of.u.shape[1]
    drawn = torch.randperm(count, generator=generator, device=generator.device)[:rows].to(of.u.device)
    if moments:
        _refuse_hashed_pair(of.u[0], rule, generator)
    sums = row_sums(of, drawn, rule, gradient)
    each, blown = sums.f, count / drawn.shape[0]
    known = torch.zeros((), dtype=torch.float64, device=each.device)
    g = None if sums.gradient is None else sums.gradient.mul_(blown)
    if moments:
        if bool(sums.clipped.any()):
            raise UsageError(_near_message(f"neuron {int(drawn[sums.clipped.argmax()])} and another"))
        at = _moments(of.u[0], rule)
        known, expected = _polynomial_sums(of.u[0], drawn, at)
        each = each - expected
        if g is not None:
            _add_polynomial_gradient(g[0], of.u[0], drawn, at)
    value = pair_mean(known + blown * each.sum(), count, rule)
    left = math.sqrt(max(0.0, 1 - 1 / blown))  # of the variance, when drawing without replacement
    error = each.std() * (left * count / math.sqrt(drawn.shape[0]) * pair_weight(count, rule))
    return value, error, None if g is None else by_weights(g, of, pair_weight(count, rule))


def _moments(u: Tensor, rule: Law) -> _Moments:
    b = rule.s / 2
    t0, t1, t2 = (-math.log(2) / 2, 0.5, 0.25) if b == 0 else (2**-b, 2**-b * b, 2**-b * b * (b + 1) / 2)
    if rule.half_space:
        t0, t1, t2 = 2 * t0, 0.0, 2 * t2
    d = u.shape[1]
    m = u.new_zeros(d, d)
    for start in range(0, d, _COLUMNS):
        end = min(start + _COLUMNS, d)
        m[start:end, :end] = u[:, start:end].mT @ u[:, :end]
    return _Moments(t0, t1, t2, u.sum(0).double(), m.tril() + m.tril(-1).mT)


def _polynomial_sums(u: Tensor, drawn: Tensor, at: _Moments) -> tuple[Tensor, Tensor]:
    """Returns the sum of T over all ordered pairs, and over those of each drawn neuron, in float64."""
    count, x = u.shape[0], u[drawn]
    linear, square = x.double() @ at.v, ((x @ at.m) * x).sum(-1).double()
    each = (count - 1) * at.t0 + at.t1 * (linear - 1) + at.t2 * (square - 1)
    s1, s2 = at.v.square().sum() - count, at.m.double().square().sum() - count
    return count * (count - 1) * at.t0 + at.t1 * s1 + at.t2 * s2, each


def _add_polynomial_gradient(g: Tensor, u: Tensor, drawn: Tensor, at: _Moments) -> None:
    """Adds the gradient of the sum of T over all pairs less that of the drawn ones, N / m fold, to g."""
    x, blown = u[drawn], u.shape[0] / drawn.shape[0]
    v = at.v.to(u.dtype)
    g.add_(at.t1 * (2 * v - blown * x.sum(0)))
    g.addmm_(u, 4 * at.t2 * at.m - (2 * at.t2 * blown) * (x.mT @ x))
    g.index_add_(0, drawn, at.t1 * v + 2 * at.t2 * (x @ at.m), alpha=-blown)


def _refuse_hashed_pair(u: Tensor, rule: Law, generator: torch.Generator) -> None:
    """Raises `UsageError` for a pair closer than r_min that falls into one cell of a table of random projections."""
    shape = u.shape[1], _TABLES * _HASHES
    lines = torch.randn(shape, generator=generator, device=generator.device).to(u)
    seen = u @ lines
    places = seen.unflatten(1, (_TABLES, _HASHES)).movedim(1, 0)
    flips = places[..., 0] < 0 if rule.half_space else torch.zeros_like(places[..., 0], dtype=torch.bool)
    cells = torch.where(flips[..., None], -places, places).div_(_WIDTH).floor_().long() & (2**_BITS - 1)
    keys, order = (cells << _BITS * torch.arange(_HASHES, device=u.device)).sum(-1).sort()
    found = []
    for step in range(1, min(_NEIGHBORS, len(u) - 1) + 1):
        table, first = (keys[:, step:] == keys[:, :-step]).nonzero().unbind(1)
        i, j = order[table, first], order[table, first + step]
        sign = torch.where(flips[table, i] == flips[table, j], 1, -1)
        # Of two at the distance r, the projections are r^2 times a chi-square apart, which exceeds 100 with 1e-11.
        near = (seen[i] - sign[:, None] * seen[j]).square_().sum(1) < 100 * rule.r_min**2
        found.append(torch.stack([i, j, sign])[:, near])
    for i, j, sign in (part.unbind() for part in torch.cat(found, 1).split(_PAIRS, 1)):
        r = (u[i] - sign[:, None] * u[j]).square_().sum(1).sqrt_()
        if r.numel() and float(r.min()) < rule.r_min:
            k = int(r.argmin())
            raise UsageError(_near_message(f"neurons {int(i[k])} and {int(j[k])}"))


def _near_message(who: str) -> str:
    return (
        f"{who} are closer than {_TOO_NEAR} (or antipodes, in a half-space): such pairs outweigh the others, a sample "
        "of neurons misses most of them, and its standard error is no bound; use the exact energy"
    )
