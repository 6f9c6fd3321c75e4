"""Directions of neurons: w = norm * u, at any scale, and gradients by u turned into gradients by w.

Idea: an energy of directions has a gradient by u_i of which only the part tangent to the sphere matters::

    dE/dw = (g - (g . u) u) / ||w||,      g = dE/du

Norms are taken in float64 of rows scaled by a power of two, so that rows of 1e-300 or 1e300 have directions too.

Reference: W. Liu et al., "Learning towards Minimum Hyperspherical Energy" (2018), section 3.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from groundstate.errors import UsageError
from groundstate.norms.spectral import refuse_nonfinite

_COMFORTABLE = 1e100  # norms up to this, and down to its inverse, have squares in float64
_CHUNK = 2**16  # numbers taken to float64 at a time, to stay in the cache


class Directions(NamedTuple):
    """Unit rows u of ``(groups, N, d)``, w = scale * norm * u, with w as it was given.

    ``numbers`` are those by which messages call the rows, where rows were left out.
    """

    w: Tensor
    u: Tensor
    scale: Tensor
    norm: Tensor
    numbers: Tensor | None = None

    def exact(self, groups: slice, rows: slice | Tensor) -> Tensor:
        """Returns unit rows in float64, of w itself: those of u are rounded to its dtype."""
        if self.u.dtype == torch.float64:
            return self.u[groups, rows]
        scale, norm = self.scale[groups, rows, None], self.norm[groups, rows, None]
        return self.w[groups, rows].double() / scale / norm


def checked(w: Tensor) -> Tensor:
    """Returns w as ``(groups, N, d)`` without its autograd graph.

    Raises:
        UsageError: not a real floating tensor of neurons in rows, fewer than two of them, or d = 1.
    """
    if not isinstance(w, Tensor) or w.ndim < 2 or not w.is_floating_point():
        what = f"{w.dtype} {tuple(w.shape)}" if isinstance(w, Tensor) else type(w).__name__
        raise UsageError(f"expected neurons as rows of a real floating tensor (*batch, N, d), got {what}")
    count, d = w.shape[-2:]
    if count < 2:
        raise UsageError(f"the energy is a mean over pairs: at least 2 neurons are needed, got {tuple(w.shape)}")
    if d < 2:
        raise UsageError(f"neurons of {d} input(s) have no directions to spread, got {tuple(w.shape)}: leave it out")
    return w.detach().reshape(math.prod(w.shape[:-2]), count, d)


def zero_rows(w: Tensor) -> Tensor:
    """Returns which neurons are exactly zero, ``(*batch, N)``."""
    return (w.detach() == 0).all(-1)


def directions(w: Tensor, dtype: torch.dtype) -> Directions:
    """Returns the directions of ``(groups, N, d)``.

    Raises:
        UsageError: a neuron is zero; their number is given.
        NonFiniteError: w holds NaN or infinity.
    """
    made, zeros = directions_but_zeros(w, dtype)
    if zeros:
        raise UsageError(
            f"{zeros} of {w.shape[0] * w.shape[1]} neurons are zero and have no direction: leave them out "
            "(on_zero='exclude')"
        )
    return made


def directions_but_zeros(w: Tensor, dtype: torch.dtype) -> tuple[Directions, int]:
    """Returns the directions of ``(groups, N, d)``, NaN for neurons that are zero, and the number of these.

    Raises:
        NonFiniteError: w holds NaN or infinity.
    """
    groups, count, _ = w.shape
    u = torch.empty(w.shape, dtype=dtype, device=w.device)
    scale = torch.ones(groups, count, dtype=torch.float64, device=w.device)
    norm = torch.empty_like(scale)
    zeros = 0
    for g, rows in _chunks(w.shape):
        x = w[g, rows].double()
        n = torch.linalg.vector_norm(x, dim=-1)
        least, most = torch.aminmax(n)
        if not (float(least) > 1 / _COMFORTABLE and float(most) < _COMFORTABLE):
            largest = x.abs().amax(-1)
            if not bool(largest.isfinite().all()):
                refuse_nonfinite(w)
            zeros += int((largest == 0).sum())
            scale[g, rows] = torch.ldexp(torch.ones_like(largest), torch.frexp(largest).exponent - 1)
            x = x / scale[g, rows, None]
            n = torch.linalg.vector_norm(x, dim=-1)
        norm[g, rows] = n
        # In place, and rounded to float32 as a quotient would be; for float64 x may be w itself.
        u[g, rows] = x / n[..., None] if dtype == torch.float64 else x.mul_(n.reciprocal()[..., None])
    return Directions(w, u, scale, norm), zeros


def by_weights(g: Tensor, of: Directions, factor: float) -> Tensor:
    """Returns factor * (g - (g . u) u) / ||w|| in the dtype of w; overwrites g."""
    out = g if g.dtype == of.w.dtype else torch.empty_like(of.w)
    for k, rows in _chunks(g.shape):
        x, u = g[k, rows].double(), of.exact(k, rows)
        x = x.addcmul_((x * u).sum(-1, keepdim=True), u, value=-1)
        out[k, rows] = x.mul_((factor / of.norm[k, rows] / of.scale[k, rows])[..., None])
    return out


def _chunks(shape: torch.Size) -> list[tuple[slice, slice]]:
    groups, count, d = shape
    if count * d <= _CHUNK:
        step = max(1, _CHUNK // (count * d))
        return [(slice(g, g + step), slice(0, count)) for g in range(0, groups, step)]
    step = max(1, _CHUNK // d)
    return [(slice(g, g + 1), slice(r, r + step)) for g in range(groups) for r in range(0, count, step)]
