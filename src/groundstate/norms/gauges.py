"""Symmetric functions of a vector: value, gradient, proximal map, dual norm, linear minimization.

Idea: a matrix function of singular values only is one of these functions at the vector of singular values (`spectral`
lifts them). So each is written once, for vectors ``(*batch, n)`` of nonnegative numbers ``s`` in descending order, as
singular values come. Values have shape ``(*batch,)`` and are differentiable by autograd; gradients, proximal points and
linear minimizers have the shape of ``s``. Callers that mind the scale pass float64.

Gradients are the minimal-norm subgradients: entries that are zero get zero, entries that tie (to within ``tie`` times
the largest) share evenly.

Reference: J. von Neumann (1937) for symmetric gauges; N. Parikh, S. Boyd, "Proximal algorithms" (2014), section 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

# Bisection halves an interval of relative length 1 down to the spacing of float64.
_HALVINGS = 54


def soft_threshold(x: Tensor, step: float) -> Tensor:
    """Returns sign(x_i) (|x_i| - step)_+, the proximal map of step * sum |x_i|; x may have any sign and shape.

    >>> soft_threshold(torch.tensor([3.0, 0.5]), 1.0)
    tensor([2., 0.])
    """
    return x.sign() * (x.abs() - step).clamp_min(0)


# The smoothed l1 norm: sum_i sqrt(s_i^2 + e^2) - e.


def smoothed_l1(s: Tensor, e: float) -> Tensor:
    """Returns sum_i sqrt(s_i^2 + e^2) - e for e >= 0; without cancellation where s_i is far below e.

    >>> smoothed_l1(torch.tensor([3.0]), 4.0)
    tensor(1.)
    """
    return s.sum(-1) if e == 0 else (s * (s / (_hypot(s, e) + e))).sum(-1)


def smoothed_l1_gradient(s: Tensor, e: float) -> Tensor:
    """Returns s_i / sqrt(s_i^2 + e^2); for e = 0, 1 where s_i > 0 and 0 elsewhere."""
    return s.sign() if e == 0 else s / _hypot(s, e)


def smoothed_l1_prox(s: Tensor, e: float, step: float) -> Tensor:
    """Returns the root x of x + step * x / sqrt(x^2 + e^2) = s, by Newton's method from below (the left is concave)."""
    if e == 0:
        return soft_threshold(s, step)

    def newton(x: Tensor) -> Tensor:
        h = _hypot(x, e)
        return x - (x + step * (x / h) - s) / (1 + step * (e / h) ** 2 / h)

    return _iterate(newton, torch.maximum(s - step, s / (1 + step / e)))


def smoothed_l1_lmo(s: Tensor, e: float) -> Tensor:
    """Returns argmax of <s, u> over smoothed_l1(u, e) <= 1, zero for s = 0.

    With a_i = s_i / s_1 the maximizer is u_i = e x a_i / sqrt(1 - x^2 a_i^2), with the x in (0, 1) that meets the bound
    with equality; y = sqrt(1 - x^2) is found by bisection of its logarithm. For e = 0 it is the first unit vector.
    """
    if s.shape[-1] == 0:
        return s
    top = s[..., :1]
    a = s / torch.where(top > 0, top, 1.0)
    if e == 0:
        return torch.zeros_like(s).index_fill(-1, torch.zeros(1, dtype=torch.long, device=s.device), 1.0) * top.sign()

    def root(log_y: Tensor) -> Tensor:  # sqrt(1 - x^2 a^2)
        return ((1 - a) * (1 + a) + (a * log_y.exp()) ** 2).sqrt()

    def excess(log_y: Tensor) -> Tensor:  # increasing in y: the bound minus the smoothed norm
        r = root(log_y)
        x2a2 = (1 - (2 * log_y).exp()) * a**2
        return 1 - (e * x2a2 / (r * (1 + r))).sum(-1, keepdim=True)

    low = math.log(e / (1 + 2 * e * s.shape[-1])) - 1
    log_y = bisect(excess, torch.full_like(top, low), torch.zeros_like(top))
    x = (1 - (2 * log_y).exp()).clamp_min(0).sqrt()
    return e * x * a / root(log_y)


# Powers: sum_i s_i^p.


def power(s: Tensor, p: float) -> Tensor:
    """Returns sum_i s_i^p, p > 0; its gradient is 0 where s_i = 0.

    >>> power(torch.tensor([4.0, 1.0, 0.0]), 0.5)
    tensor(3.)
    """
    positive = s > 0
    return torch.where(positive, torch.where(positive, s, 1.0) ** p, 0.0).sum(-1)


def power_gradient(s: Tensor, p: float) -> Tensor:
    """Returns p s_i^(p - 1), 0 where s_i = 0."""
    positive = s > 0
    return torch.where(positive, p * torch.where(positive, s, 1.0) ** (p - 1), 0.0)


def power_prox(s: Tensor, p: float, step: float) -> Tensor:
    """Returns argmin_x step * x^p + (x - s_i)^2 / 2 over x >= 0, entry by entry.

    Closed forms for p = 1, 2, 1/2 and 2/3, Newton's method otherwise. For p < 1 entries at or below
    (2 - p) / (2 - 2p) * (2 step (1 - p))^(1 / (2 - p)) become zero; there the two minimizers tie.

    Reference: Z. Xu et al., "L1/2 regularization" (2012), eq. 8; W. Cao et al., "Fast image deconvolution using
    closed-form thresholding formulas of Lq (q = 1/2, 2/3)" (2013), eq. 12.
    """
    if step == 0:
        return s
    if p == 1:
        return soft_threshold(s, step)
    if p == 2:
        return s / (1 + 2 * step)
    if p > 1:
        return _convex_power_prox(s, p, step)
    inflection = (2 * step * (1 - p)) ** (1 / (2 - p))
    kept = s > (2 - p) / (2 - 2 * p) * inflection
    x = torch.where(kept, s, 2 * inflection)
    if p == 0.5:
        x = _half_power_root(x, step)
    elif p == 2 / 3:
        x = _two_thirds_power_root(x, step)
    else:
        target = x
        x = _iterate(
            lambda x: x - (x - target + step * p * x ** (p - 1)) / (1 - step * p * (1 - p) * x ** (p - 2)), target
        )
    return torch.where(kept, x, 0.0)


def _half_power_root(s: Tensor, step: float) -> Tensor:
    angle = (step / 4 * (s / 3) ** -1.5).clamp(-1, 1).arccos()
    return 2 / 3 * s * (1 + torch.cos(2 * math.pi / 3 - 2 / 3 * angle))


def _two_thirds_power_root(s: Tensor, step: float) -> Tensor:
    angle = (27 / 16 * s**2 * (2 * step) ** -1.5).clamp_min(1).arccosh()
    a = 2 / math.sqrt(3) * (2 * step) ** 0.25 * (angle / 3).cosh().sqrt()
    return ((a + (2 * s / a - a**2).clamp_min(0).sqrt()) / 2) ** 3


def _convex_power_prox(s: Tensor, p: float, step: float) -> Tensor:
    """Root of x + step p x^(p - 1) = s: concave for p < 2 (Newton from below), convex for p > 2 (from above)."""
    positive = s > 0
    target = torch.where(positive, s, 1.0)
    by_power = (target / (2 * step * p)) ** (1 / (p - 1))
    start = torch.minimum(target / 2, by_power) if p < 2 else torch.minimum(target, 2 ** (1 / (p - 1)) * by_power)
    x = _iterate(lambda x: x - (x + step * p * x ** (p - 1) - target) / (1 + step * p * (p - 1) * x ** (p - 2)), start)
    return torch.where(positive, x, 0.0)


# The log-sum: sum_i log(1 + s_i^2 / e^2).


def log_sum(s: Tensor, e: float) -> Tensor:
    """Returns sum_i log(1 + s_i^2 / e^2).

    >>> log_sum(torch.tensor([0.0, 0.0]), 0.5)
    tensor(0.)
    """
    return torch.log1p((s / e).square()).sum(-1)


def log_sum_gradient(s: Tensor, e: float) -> Tensor:
    """Returns 2 s_i / (s_i^2 + e^2)."""
    return 2 * s / (s.square() + e * e)


def log_sum_prox(s: Tensor, e: float, step: float) -> Tensor:
    """Returns argmin_x step * log(1 + x^2 / e^2) + (x - s_i)^2 / 2, the best of its local minima.

    Stationary points are roots in [0, s] of q(x) = x^3 - s x^2 + (e^2 + 2 step) x - s e^2. Newton's method from 0,
    where q is concave, finds the smallest; from s, where it is convex, the largest; between them lies at most a
    maximum.
    """
    linear = e * e + 2 * step

    def newton(x: Tensor) -> Tensor:
        slope = (3 * x - 2 * s) * x + linear
        moved = x - (((x - s) * x + linear) * x - s * e * e) / torch.where(slope > 0, slope, math.inf)
        return torch.minimum(moved.clamp_min(0), s)

    def objective(x: Tensor) -> Tensor:
        return step * torch.log1p((x / e).square()) + (x - s).square() / 2

    small, large = _iterate(newton, torch.zeros_like(s)), _iterate(newton, s)
    return torch.where(objective(small) < objective(large), small, large)


# The sum of the k largest, and its dual norm max(s_1, sum_i s_i / k).


def top_k(s: Tensor, k: int) -> Tensor:
    """Returns s_1 + ... + s_k; k = 1 is the largest entry.

    >>> top_k(torch.tensor([4.0, 3.0, 2.0]), 2)
    tensor(7.)
    """
    return s[..., :k].sum(-1)


def top_k_gradient(s: Tensor, k: int, tie: float) -> Tensor:
    """Returns 1 above s_k and 0 below it; entries that tie with s_k share what is left of k."""
    if s.shape[-1] == 0:
        return s
    slack = tie * s[..., :1]
    edge = s[..., min(k, s.shape[-1]) - 1, None]
    above = (s > edge + slack).to(s.dtype)
    tied = ((s - edge).abs() <= slack).to(s.dtype)
    share = (min(k, s.shape[-1]) - above.sum(-1, keepdim=True)) / tied.sum(-1, keepdim=True)
    return torch.where(s > 0, above + share * tied, 0.0)


def top_k_prox(s: Tensor, k: int, step: float) -> Tensor:
    """Returns the proximal map of step * top_k: s minus its projection on the dual ball of radius step."""
    return s - project_capped(s, step, k * step)


def top_k_dual(s: Tensor, k: int) -> Tensor:
    """Returns max(s_1, sum_i s_i / k)."""
    return torch.maximum(top_k(s, 1), s.sum(-1) / k)


def top_k_lmo(s: Tensor, k: int, tie: float) -> Tensor:
    """Returns argmax of <s, u> over top_k(u) <= 1."""
    concentrated = s[..., :1] * k > s.sum(-1, keepdim=True)
    return torch.where(concentrated, top_k_gradient(s, 1, tie), s.sign() / k)


def project_capped(s: Tensor, cap: float, total: float) -> Tensor:
    """Returns the projection on {0 <= u_i <= cap, sum_i u_i <= total}: clip(s_i - theta, 0, cap) with one theta >= 0.

    Reference: J. Duchi et al., "Efficient projections onto the l1-ball" (2008), for cap >= total.
    """
    if s.shape[-1] == 0:
        return s

    def excess(theta: Tensor) -> Tensor:
        return total - (s - theta).clamp(0, cap).sum(-1, keepdim=True)

    zero = torch.zeros_like(s[..., :1])
    theta = bisect(excess, zero, s[..., :1])
    shifted = s - theta
    inside = (shifted > 0) & (shifted < cap)
    count = inside.sum(-1, keepdim=True)
    room = total - cap * (shifted >= cap).sum(-1, keepdim=True).to(s.dtype)
    exact = ((s * inside).sum(-1, keepdim=True) - room) / count.clamp_min(1)
    theta = torch.where((excess(zero) < 0), torch.where(count > 0, exact, theta), 0.0)
    return (s - theta).clamp(0, cap)


# The stable rank: sum_i s_i^2 / s_1^2.


def stable_rank(s: Tensor) -> Tensor:
    """Returns sum_i (s_i / s_1)^2, 0 for s = 0.

    >>> stable_rank(torch.tensor([2.0, 1.0]))
    tensor(1.2500)
    """
    top = s[..., :1]
    return (s / torch.where(top > 0, top, 1.0)).square().sum(-1)


def stable_rank_gradient(s: Tensor, tie: float) -> Tensor:
    """Returns 2 s_i / s_1^2, less 2 stable_rank / s_1 at s_1 (shared where entries tie for the largest)."""
    top = s[..., :1]
    top = torch.where(top > 0, top, 1.0)
    return 2 * (s / top - stable_rank(s)[..., None] * top_k_gradient(s, 1, tie)) / top


# Helpers.


def bisect(increasing: Callable[[Tensor], Tensor], low: Tensor, high: Tensor) -> Tensor:
    """Returns a point where an increasing function changes sign between low and high, elementwise."""
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        above = increasing(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return (low + high) / 2


def _iterate(step: Callable[[Tensor], Tensor], x: Tensor, limit: int = 100) -> Tensor:
    """Iterates to a fixed point, to within rounding."""
    eps = 4 * torch.finfo(x.dtype).eps
    for _ in range(limit):
        moved = step(x)
        done = bool(((moved - x).abs() <= eps * x.abs()).all())
        x = moved
        if done:
            break
    return x


def _hypot(s: Tensor, e: float) -> Tensor:
    return torch.hypot(s, torch.as_tensor(e, dtype=s.dtype, device=s.device))
