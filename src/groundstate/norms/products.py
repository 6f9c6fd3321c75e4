"""The nuclear norm of a product of two thin matrices, A B^T, without the product.

Idea: with A = Q_a R_a and B = Q_b R_b, A B^T = Q_a (R_a R_b^T) Q_b^T, so the singular values are those of the small
matrix in the middle, and for its decomposition U S V^T::

    ||A B^T||_* = sum_i s_i,    dE/dA = (Q_a U)(V^T R_b),    dE/dB = (Q_b V)(U^T R_a)

with U and V restricted to the singular values above rounding, which gives the subgradient of the product of minimal
norm. The factored bound ||A B^T||_* <= (||A||_F^2 + ||B||_F^2) / 2 is what weight decay on A and B penalizes.

Reference: N. Srebro, J. Rennie, T. Jaakkola, "Maximum-margin matrix factorization" (2005); S. Kobayashi, Y. Akram,
J. von Oswald, "Weight decay induces low-rank attention layers" (2024).
"""

from __future__ import annotations

import torch
from torch import Tensor

from groundstate.errors import UsageError
from groundstate.norms import spectral
from groundstate.norms.spectral import prepare, tolerance


def product_nuclear(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ||A B^T||_* and its gradients by A and by B, without an autograd graph.

    Args:
        a: ``(*batch, m, r)``, any scale and floating dtype.
        b: ``(*batch, n, r)``, of the same dtype; r may be larger than m or n.

    Returns:
        ``(value, gradient by a, gradient by b)``: value ``(*batch,)``, float64 for float64 and float32 otherwise (it is
        infinite where the norm is beyond its range); gradients in shape and dtype of a and b. Singular values up to
        max(m, n) * eps * ||A||_F ||B||_F count as zero: of factors that are nearly orthogonal to one another the
        product is rounding.

    Raises:
        UsageError: not real floating-point matrices, or shapes or dtypes that do not fit.
        NonFiniteError: a or b holds NaN or infinity.

    Cost: 8 (m + n) r^2 flops and an SVD of size r.

    >>> a, b = torch.tensor([[3.0], [4.0]]), torch.tensor([[2.0]])
    >>> product_nuclear(a, b)
    (tensor(10.), tensor([[1.2000],
            [1.6000]]), tensor([[5.]]))
    """
    if a.ndim < 2 or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-1] or a.dtype != b.dtype:
        raise UsageError(
            f"expected factors (*batch, m, r) and (*batch, n, r) of one dtype, got {a.dtype} {tuple(a.shape)} and "
            f"{b.dtype} {tuple(b.shape)}"
        )
    with torch.no_grad():
        (left, scale_a), (right, scale_b) = prepare(a.detach()), prepare(b.detach())
        qa, ra = torch.linalg.qr(left)
        qb, rb = torch.linalg.qr(right)
        u, s, vh = spectral.svd(ra @ rb.mT)
        sizes = torch.linalg.vector_norm(ra, dim=(-2, -1)) * torch.linalg.vector_norm(rb, dim=(-2, -1))
        rounding = max(tolerance(a), tolerance(b)) * sizes[..., None]
        kept = (s > rounding).to(s.dtype)[..., None, :]
        one, other = u * kept, vh.mT * kept
        by_a, by_b = (qa @ one) @ (vh @ rb), (qb @ other) @ (u.mT @ ra)
        value = (s * kept[..., 0, :]).sum(-1).double()
        for scale in (scale_a, scale_b):
            value = value if scale is None else value * scale[..., 0, 0]
        by_a, by_b = _times(by_a, scale_b), _times(by_b, scale_a)
        return value.to(s.dtype), by_a.to(a.dtype), by_b.to(b.dtype)


def _times(w: Tensor, scale: Tensor | None) -> Tensor:
    return w if scale is None else w.double() * scale
