"""Bounds of a nuclear norm anywhere, from one decomposition somewhere.

Idea: let W0 = Q H be the polar decomposition at the anchor. For every W, far or near::

    <Q, W>  <=  ||W||_*  <=  ( tr(W K W^T) + tr K^-1 ) / 2,        K any positive definite matrix

The left holds as ||Q||_2 <= 1 (duality), the right as sigma <= (sigma^2 k + 1/k) / 2 (the variational form behind
iteratively reweighted least squares). Both are equal to ||W0||_* at W0 if K = H^-1, and stay close to ||W||_* while W
stays near W0: the gap grows as the square of the distance. A step of training needs neither, only Q, which is a
subgradient there; so a decomposition serves many steps, and the bounds say for how long.

H is singular, or nearly, where W0 is, and it grows: a change D of W makes H^2 larger by about D^T D. So K takes
(H^2 + d^2)^(1/2) in place of H, as if every singular value had moved by d already, with the largest d that costs no
more than a given share of the gap at the anchor. That makes the bounds good for 2 to 3 times longer than d = 0 would.

The smoothed norm sum_i sqrt(sigma_i^2 + e^2) - e has the same bounds, shifted: its gradient G is a subgradient, and
sqrt(sigma^2 + e^2) <= ((sigma^2 + e^2) k + 1/k) / 2.

Reference: K. Mohan, M. Fazel, "Iterative reweighted algorithms for matrix rank minimization" (2012); R. T. Rockafellar,
"Convex Analysis" (1970), section 23 (subgradients).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from groundstate.norms.spectral import LinAlgError, prepare, svd, tolerance, working_dtype

SLACK = 0.15  # the part of the gap that d may cost at the anchor; the bounds then stay within it for the longest
_TALL = 0.7  # sides further apart than this: by the Gram matrix
_EVEN = 2.5e-3  # a float32 Gram matrix loses too many digits below this ratio of its eigenvalues
ROUNDING = 32.0  # rounding errors of the bounds, in units of eps times what they grow with; largest seen: 0.6


class Anchor(NamedTuple):
    """A nuclear norm decomposed at W0.

    Attributes:
        gradient: Its subgradient there, shape and dtype of W0; minimal-norm.
        value: The norm there, a float64 scalar.
        shift: What is added to <gradient, W> to give the lower bound, a float64 scalar; 0 without smoothing.
        metric: K, ``(n, n)``, n the smaller side; empty where there are no bounds (zero or extreme weights).
        constant: tr K^-1 / 2 and what smoothing adds, a float64 scalar.
        rounding: Bound on the relative error of the bounds as computed, a float64 scalar.
    """

    gradient: Tensor
    value: Tensor
    shift: Tensor
    metric: Tensor
    constant: Tensor
    rounding: Tensor


def anchor(w: Tensor, gap: float, smoothing: float = 0.0) -> Anchor:
    """Decomposes a matrix once, for bounds around it.

    Args:
        w: ``(m, n)``.
        gap: The relative distance of the bounds that will still be good: it decides d.
        smoothing: e >= 0.

    Raises:
        UsageError: not a real floating-point matrix.
        NonFiniteError: w holds NaN or infinity.

    Cost: 6 m n^2 flops and an ``eigh`` of the smaller side n (tall, wide), or one SVD (nearly square), and 2 n^3.

    >>> a = anchor(torch.eye(2), 0.01)
    >>> [round(x, 2) for x in bounds(torch.diag(torch.tensor([1.0, 0.5])), a).tolist()]  # the norm is 1.5
    [1.5, 1.64]
    """
    with torch.no_grad():
        w = w.detach()
        work, scale = prepare(w)
        wide = w.shape[0] < w.shape[1]
        tall = work.mT if wide else work
        s, v, q = _decomposed(tall, tolerance(w), smoothing)
        root = torch.hypot(s, s.new_tensor(smoothing)) if smoothing else s
        value = (s * (s / (root + smoothing)) if smoothing else s).sum()  # root - e, without the cancellation
        gradient = (q.mT if wide else q).to(w.dtype)
        shift = value - (gradient.double() * w.double()).sum() if smoothing else value.new_zeros(())
        if scale is not None or not float(value) > 0:
            if scale is not None:
                value = value * scale[0, 0]
            return Anchor(gradient, value, shift, work.new_zeros(0, 0), value, value.new_zeros(()))
        moved = displacement(root, SLACK * gap * float(value))
        held = torch.hypot(root, root.new_tensor(moved))
        metric = ((v / held.to(v.dtype)) @ v.mT).to(work.dtype)
        above = (s.square() + moved**2) / (held + smoothing)  # held - e
        constant = (above * (above / held)).sum() / 2
        rounding = ROUNDING * torch.finfo(work.dtype).eps * (4 + float(held[0] / held[-1]))
        return Anchor(gradient, value, shift, metric, constant, value.new_tensor(rounding))


def bounds(w: Tensor, at: Anchor) -> Tensor:
    """Returns the lower and the upper bound of the norm of w, a float64 tensor of two, without waiting for a device.

    Infinite, or NaN, where w is not finite or its squares overflow.

    Cost: 2 m n^2 flops.
    """
    with torch.no_grad():
        work = w.detach().to(working_dtype(w.dtype))
        tall = work.mT if w.shape[0] < w.shape[1] else work
        lower = torch.vdot(at.gradient.to(work.dtype).reshape(-1), work.reshape(-1)).double() + at.shift
        if at.metric.numel() == 0:
            return torch.stack([lower.clamp_min(0), torch.full_like(lower, torch.inf)])
        quadratic = torch.vdot((tall @ at.metric).reshape(-1), tall.reshape(-1)).double()
        upper = quadratic / 2 + at.constant
        error = at.rounding * upper.abs()
        return torch.stack([(lower - error).clamp_min(0), upper + error])


def displacement(s: Tensor, budget: float) -> float:
    """Returns nearly the largest d for which (H^2 + d^2)^(1/2) in place of H costs at most ``budget`` at the anchor.

    The cost is sum_i (s_i^2 / m_i + m_i) / 2 - s_i with m_i = hypot(s_i, d); d is s_1 times a power of 2^(1/4).

    Args:
        s: Singular values in descending order, float64, not all zero.
        budget: Above 0.

    >>> displacement(torch.tensor([1.0, 0.0], dtype=torch.float64), 0.6)  # d / 2 + (1/m + m) / 2 - 1 with d = 1: 0.56
    1.0
    """
    tried = s[0] * 2.0 ** (-torch.arange(80, dtype=s.dtype, device=s.device) / 4)
    m = torch.hypot(s, tried[:, None])
    cost = ((s * (s / m) + m) / 2 - s).sum(-1)
    return float(tried[min(int((cost > budget).sum()), len(tried) - 1)])


def _decomposed(tall: Tensor, zero: float, e: float) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the singular values (descending, float64), the right singular vectors and the gradient."""
    if tall.shape[1] <= _TALL * tall.shape[0] and tall.dtype == torch.float32:
        for dtype in (torch.float32, torch.float64):
            wide = tall.to(dtype)
            try:
                lam, v = torch.linalg.eigh(wide.mT @ wide)
            except LinAlgError:
                break
            if dtype == torch.float64 or float(lam[0]) > _EVEN * float(lam[-1]):
                s = lam.double().clamp_min(0).sqrt()
                z = (v * _slope_over_s(s, zero, e).to(dtype)) @ v.mT
                return s.flip(0), v.flip(1), (wide @ z).to(tall.dtype)
    u, s, vh = svd(tall)
    s = s.double()
    q = (u * (_slope_over_s(s, zero, e) * s).to(u.dtype)) @ vh
    return s, vh.mT, q


def _slope_over_s(s: Tensor, zero: float, e: float) -> Tensor:
    """Returns f'(s) / s of the norm, smoothed or not; 0 at singular values that count as zero."""
    if e > 0:
        return torch.hypot(s, s.new_tensor(e)).reciprocal()
    kept = s > zero * s.max()
    return torch.where(kept, torch.where(kept, s, 1.0).reciprocal(), 0.0)
