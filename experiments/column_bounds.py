"""Bounds of a nuclear norm anywhere, from one decomposition somewhere.

Idea: let W0 = Q H be the polar decomposition at the anchor, H = V diag(s) V^T. For every W, far or near::

    <Q, W>  <=  ||W||_*  <=  sum_i ||W v_i||_2

The left holds as ||Q||_2 <= 1 (duality); the right, for any orthonormal v_i, as W is the sum of the (W v_i) v_i^T, of
rank one each. At W0 both are ||W0||_*, and they stay close while W stays near: the gap grows as the square of the
distance. A step of training needs neither, only Q, which is a subgradient there; so a decomposition serves many steps,
and the bounds say for how long.

The smoothed norm sum_i sqrt(sigma_i^2 + e^2) - e has the same bounds: its gradient G is a subgradient, so that
<G, W> and a constant bound it from below, and sum_i sqrt(||W v_i||^2 + e^2) - e from above (the diagonal of W^T W in
any basis is majorized by its eigenvalues).

Reference: R. T. Rockafellar, "Convex Analysis" (1970), section 23 (subgradients); A. Marshall, I. Olkin, B. Arnold,
"Inequalities: theory of majorization" (2011), theorem 9.B.1 (Schur).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from groundstate.norms.gauges import smoothed_l1
from groundstate.norms.spectral import LinAlgError, prepare, svd, tolerance, working_dtype

_TALL = 0.7  # sides further apart than this: by the Gram matrix
_EVEN = 2.5e-3  # a float32 Gram matrix loses too many digits below this ratio of its eigenvalues
ROUNDING = 32.0  # rounding errors of the bounds, in units of eps times what they grow with


class Anchor(NamedTuple):
    """A nuclear norm decomposed at W0.

    Attributes:
        gradient: Its subgradient there, of the shape of W0, float64 or float32; minimal-norm.
        value: The norm there, a float64 scalar.
        shift: What is added to <gradient, W> to give the lower bound, a float64 scalar; 0 without smoothing.
        directions: The v_i as columns, ``(n, n)``, n the smaller side; empty where there are no bounds (zero or extreme
            weights).
        rounding: Bound on the relative error of the bounds as computed, a float64 scalar.
    """

    gradient: Tensor
    value: Tensor
    shift: Tensor
    directions: Tensor
    rounding: Tensor


def anchor(w: Tensor, smoothing: float = 0.0) -> Anchor:
    """Decomposes a matrix once, for bounds around it.

    Args:
        w: ``(m, n)``.
        smoothing: e >= 0.

    Raises:
        UsageError: not a real floating-point matrix.
        NonFiniteError: w holds NaN or infinity.

    Cost: 6 m n^2 flops and an ``eigh`` of the smaller side n (tall, wide), or one SVD (nearly square).

    >>> a = anchor(torch.eye(2))
    >>> [round(x, 3) for x in bounds(torch.diag(torch.tensor([1.0, 0.5])), a).tolist()]
    [1.5, 1.5]
    """
    with torch.no_grad():
        w = w.detach()
        work, scale = prepare(w)
        wide = w.shape[0] < w.shape[1]
        tall = work.mT if wide else work
        s, v, q = _decomposed(tall, tolerance(w), smoothing)
        value = smoothed_l1(s, smoothing)
        gradient = q.mT if wide else q
        shift = value - (gradient.double() * w.double()).sum() if smoothing else value.new_zeros(())
        if scale is not None or not float(value) > 0:
            value = value if scale is None else value * scale[0, 0]
            return Anchor(gradient, value, shift, work.new_zeros(0, 0), value.new_zeros(()))
        spread = 4 + len(s) ** 0.5 * s[0] / s.sum()
        return Anchor(gradient, value, shift, v.to(work.dtype), ROUNDING * torch.finfo(work.dtype).eps * spread)


def bounds(w: Tensor, at: Anchor, smoothing: float = 0.0) -> Tensor:
    """Returns the lower and the upper bound of the norm of w, a float64 tensor of two, without waiting for a device.

    Infinite, or NaN, where w is not finite or its squares overflow.

    Args:
        w: ``(m, n)``, the shape of W0.
        at: What `anchor` returned.
        smoothing: e, as it was given to `anchor`.

    Cost: 2 m n^2 flops.
    """
    with torch.no_grad():
        work = w.detach().to(working_dtype(w.dtype))
        tall = work.mT if w.shape[0] < w.shape[1] else work
        lower = torch.vdot(at.gradient.to(work.dtype).reshape(-1), work.reshape(-1)).double() + at.shift
        if at.directions.numel() == 0:
            return torch.stack([lower.clamp_min(0), torch.full_like(lower, torch.inf)])
        lengths = torch.linalg.vector_norm(tall @ at.directions, dim=0).double()
        upper = smoothed_l1(lengths, smoothing)
        error = at.rounding * upper
        return torch.stack([(lower - error).clamp_min(0), upper + error])


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
