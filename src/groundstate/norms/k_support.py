"""The k-support norm of a vector: value, gradient, proximal map, dual norm, linear minimization.

Idea: its unit ball is the convex hull of the vectors with at most k nonzero entries and l2 norm at most 1. It treats
the large entries as the l2 norm does and the small ones as the l1 norm does; its dual is the l2 norm of the k largest
entries::

    (s_1^2 + ... + s_j^2 + (s_{j+1} + ... + s_n)^2 / (k - j))^(1/2),      0 <= j < k splitting large from small

Vectors ``(*batch, n)`` are nonnegative and descending, as in `gauges`; k above n acts as n.

Reference: A. Argyriou, R. Foygel, N. Srebro, "Sparse prediction with the k-support norm" (2012), proposition 2.1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from groundstate.norms.gauges import bisect


def _heads(s: Tensor, k: int) -> Tensor:
    """Returns the number j < k of leading entries that the k-support norm keeps apart, int64 of shape (*batch, 1).

    The squared norm is the least of sum_{i <= j} s_i^2 + (sum_{i > j} s_i)^2 / (k - j) over the j for which
    s_{j+1} <= (sum_{i > j} s_i) / (k - j); j = k - 1 always is one.
    """
    first = s[..., :k]
    tail = s.flip(-1).cumsum(-1).flip(-1)[..., :k]
    left = torch.arange(k, 0, -1, dtype=s.dtype, device=s.device)
    square = first.square().cumsum(-1) - first.square() + tail.square() / left
    allowed = first * left <= tail
    allowed[..., -1] = True
    return torch.where(allowed, square, math.inf).argmin(-1, keepdim=True)


def value(s: Tensor, k: int) -> Tensor:
    """Returns the k-support norm: the l1 norm for k = 1, the l2 norm for k = n.

    (sum_{i <= j} s_i^2 + (sum_{i > j} s_i)^2 / (k - j))^(1/2) with j = k - r - 1 of the reference.

    Reference: A. Argyriou, R. Foygel, N. Srebro, "Sparse prediction with the k-support norm" (2012), proposition 2.1.

    >>> value(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64), 2)
    tensor(7.0711, dtype=torch.float64)
    """
    if s.shape[-1] == 0:
        return s.sum(-1)
    k = min(k, s.shape[-1])
    heads = _heads(s.detach(), k)
    head = torch.arange(s.shape[-1], device=s.device) < heads
    tail = torch.where(head, 0.0, s).sum(-1)
    square = torch.where(head, s, 0.0).square().sum(-1) + tail.square() / (k - heads[..., 0])
    positive = square > 0
    return torch.where(positive, torch.where(positive, square, 1.0).sqrt(), 0.0)


def gradient(s: Tensor, k: int) -> Tensor:
    """Returns s_i / norm for the leading entries and the mean of the tail, sum_{i > j} s_i / (k - j), / norm after."""
    if s.shape[-1] == 0:
        return s
    k = min(k, s.shape[-1])
    heads = _heads(s, k)
    head = torch.arange(s.shape[-1], device=s.device) < heads
    tail = torch.where(head, 0.0, s).sum(-1, keepdim=True) / (k - heads)
    norm = value(s, k)[..., None]
    return torch.where(s > 0, torch.where(head, s, tail) / torch.where(norm > 0, norm, 1.0), 0.0)


def dual(s: Tensor, k: int) -> Tensor:
    """Returns (s_1^2 + ... + s_k^2)^(1/2)."""
    return torch.linalg.vector_norm(s[..., :k], dim=-1)


def lmo(s: Tensor, k: int) -> Tensor:
    """Returns argmax of <s, u> over k_support(u) <= 1: the k leading entries over their l2 norm, zero for s = 0."""
    norm = dual(s, k)[..., None]
    first = torch.arange(s.shape[-1], device=s.device) < k
    return torch.where(first, s, 0.0) / torch.where(norm > 0, norm, 1.0)


def prox(s: Tensor, k: int, step: float) -> Tensor:
    """Returns the proximal map of step * k_support.

    s minus its projection z on the dual ball of radius step. z_i = max(min(s_i, c), rho s_i) with 0 < rho < 1; c
    follows from rho (`_level`), and rho, by bisection, from the dual norm of z being step.

    Reference: A. McDonald, M. Pontil, D. Stamos, "New perspectives on k-support and cluster norms" (2016), section 5,
    for theta_i = clip(alpha s_i - lambda, 0, 1) with lambda = rho / (1 - rho), c = lambda / alpha.
    """
    n = s.shape[-1]
    k = min(k, n)
    if n == 0 or step == 0:
        return s
    norm = dual(s, k)[..., None]
    scaled = s / torch.where(norm > 0, norm, 1.0)
    radius = step / torch.where(norm > 0, norm, math.inf)

    def projected(rho: Tensor) -> Tensor:
        return torch.maximum(torch.minimum(scaled, _level(scaled, k, rho)), rho * scaled)

    def excess(rho: Tensor) -> Tensor:
        return dual(projected(rho), k)[..., None] - radius

    zero = torch.zeros_like(radius)
    rho = bisect(excess, zero, torch.ones_like(radius))
    return torch.where(norm > step, s - norm * projected(rho), 0.0).clamp_min(0)


def _level(s: Tensor, k: int, rho: Tensor) -> Tensor:
    """Returns c with sum_i theta_i = k, theta_i = clip((s_i / c - 1) rho / (1 - rho), 0, 1); 0 where no c reaches k.

    In beta = 1 / c the sum rises piecewise linearly, with breakpoints 1 / s_i and 1 / (rho s_i): evaluated there
    exactly and interpolated.
    """
    ascending = s.flip(-1).clamp_min(1e-30)
    lam = rho / (1 - rho).clamp_min(1e-300)
    starts, ends = 1 / s.clamp_min(1e-30), 1 / (rho.clamp_min(1e-150) * s.clamp_min(1e-30))
    breaks = torch.cat([starts, ends], -1).sort(-1).values
    below = torch.cat([torch.zeros_like(s[..., :1]), ascending.cumsum(-1)], -1)  # sum of the m smallest
    n = s.shape[-1]
    active = torch.searchsorted(starts, breaks, right=True)  # entries with theta > 0, the largest ones
    full = torch.searchsorted(ends, breaks, right=True)
    middle = below.gather(-1, n - full) - below.gather(-1, n - active)
    sums = full + lam * (breaks * middle - (active - full))
    right = torch.searchsorted(sums.cummax(-1).values, torch.full_like(rho, k)).clamp(1, 2 * n - 1)
    left = right - 1
    s0, s1 = sums.gather(-1, left), sums.gather(-1, right)
    b0, b1 = breaks.gather(-1, left), breaks.gather(-1, right)
    share = ((k - s0) / torch.where(s1 > s0, s1 - s0, 1.0)).clamp(0, 1)
    return 1 / (b0 + share * (b1 - b0))
