"""Energies of wide matrices J, ``(*batch, C, n)``, from their small Gram M = J J^T alone.

M has the squared singular values of J as eigenvalues, so with M = Q diag(lambda) Q^T and s_i = sqrt(lambda_i)::

    E = e(s_1, ..., s_C),    dE/dM = Q diag(e_i / (2 s_i)) Q^T,    e_i = de/ds_i

This gives ||J||_F^2 = tr M, ||J||_* = sum s_i, ||J||_2 = s_1, the stable rank tr M / s_1^2 and the effective rank
||J||_*^2 / tr M of one decomposition of size C, however large n is. Autograd through the singular values of J returns a
subgradient that is not of minimal norm where J lacks rank; here directions with s_i below `tolerance` get none.

The price of the Gram: singular values below about sqrt(eps) of the largest drown in rounding (3e-4 in float32), and
squares must be representable: in float32 a J above 1e19 is reported as overflow, one below 1e-22 counts as zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from groundstate.errors import NonFiniteError, UsageError


def tolerance(m: Tensor) -> float:
    """Returns the share of the largest eigenvalue below which an eigenvalue of the Gram is rounding: 8 C eps."""
    return 8 * m.shape[-1] * torch.finfo(m.dtype).eps


def singular_values(m: Tensor) -> Tensor:
    """Returns the singular values of J in descending order, ``(*batch, C)``; those that are rounding are zero.

    Raises:
        NonFiniteError: M has NaN or infinite entries (``eigvalsh`` would return numbers all the same).

    Cost: one symmetric eigendecomposition of size C a matrix, without vectors.

    >>> singular_values(torch.tensor([[9.0, 0.0], [0.0, 16.0]]))
    tensor([4., 3.])
    """
    m = _checked(m)
    return _kept(torch.linalg.eigvalsh(m).flip(-1), tolerance(m)).sqrt()


def energy(m: Tensor, of_singular_values: Callable[[Tensor], Tensor]) -> Tensor:
    """Returns E(J), ``(*batch,)``, for an energy of the singular values; differentiable by M.

    Args:
        m: Grams ``(*batch, C, C)``, symmetric and positive semidefinite.
        of_singular_values: Maps ``(*batch, C)``, descending, to ``(*batch,)``, differentiable.

    Raises:
        NonFiniteError: M has NaN or infinite entries.

    >>> m = torch.tensor([[9.0, 0.0], [0.0, 0.0]], requires_grad=True)
    >>> energy(m, lambda s: s.sum(-1)).backward(); m.grad  # 1 / (2 * 3), and nothing where J has no rank
    tensor([[0.1667, 0.0000],
            [0.0000, 0.0000]])
    """
    if not (m.requires_grad and torch.is_grad_enabled()):
        return of_singular_values(singular_values(m))
    made: Tensor = _Energy.apply(m, of_singular_values)  # pyright: ignore[reportAssignmentType]
    return made


def trace(m: Tensor) -> Tensor:
    """Returns tr M = ||J||_F^2, ``(*batch,)``."""
    return m.diagonal(dim1=-2, dim2=-1).sum(-1)


def stable_rank(s: Tensor) -> Tensor:
    """Returns sum s_i^2 / s_1^2, between 1 and the rank; 0 for zero. Shape ``(*batch, r)`` to ``(*batch,)``."""
    top = s[..., :1]
    return torch.where(top > 0, s / torch.where(top > 0, top, 1.0), 0.0).square().sum(-1)


def effective_rank(s: Tensor) -> Tensor:
    """Returns (sum s_i)^2 / sum s_i^2, between 1 and the rank; 0 for zero. Shape ``(*batch, r)`` to ``(*batch,)``."""
    top = s[..., :1]
    share = torch.where(top > 0, s / torch.where(top > 0, top, 1.0), 0.0)
    squares = share.square().sum(-1)
    return torch.where(squares > 0, share.sum(-1).square() / torch.where(squares > 0, squares, 1.0), 0.0)


def _checked(m: Tensor) -> Tensor:
    if m.ndim < 2 or m.shape[-1] != m.shape[-2]:
        raise UsageError(f"a Gram is (*batch, C, C), got {tuple(m.shape)}")
    m = m if m.dtype in (torch.float32, torch.float64) else m.float()
    if not math.isfinite(m.detach().sum().item()) and not bool(torch.isfinite(m).all()):
        raise NonFiniteError("the Gram of the Jacobian has NaN or infinite entries")
    return m


def _kept(values: Tensor, share: float) -> Tensor:
    """Returns the eigenvalues, descending, with zero for those that are rounding."""
    return torch.where(values > share * values[..., :1].clamp_min(0), values, 0.0)


class _Energy(torch.autograd.Function):
    """Forward: value and dE/dM of one decomposition; backward: a product."""

    @staticmethod
    def forward(ctx: Any, m: Tensor, of_singular_values: Callable[[Tensor], Tensor]) -> Tensor:
        wide = _checked(m)
        values, q = torch.linalg.eigh(wide)
        values, q = _kept(values.flip(-1), tolerance(wide)), q.flip(-1)
        with torch.enable_grad():
            s = values.sqrt().requires_grad_()
            e = of_singular_values(s)
            (slope,) = torch.autograd.grad(e.sum(), s)
        slope = torch.where(values > 0, slope / (2 * torch.where(values > 0, s.detach(), 1.0)), 0.0)
        ctx.save_for_backward(((q * slope[..., None, :]) @ q.mT).to(m.dtype))
        return e.detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        (grad,) = ctx.saved_tensors
        return outputs[0][..., None, None].to(grad.dtype) * grad, None
