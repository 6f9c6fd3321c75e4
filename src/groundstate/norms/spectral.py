"""Singular values at any scale and dtype, and functions of them lifted back to matrices.

Idea: a function E of a matrix that does not change when the matrix is multiplied by orthogonal matrices from either
side is a symmetric function f of its singular values, and everything about it is read off f::

    W = U diag(s) V^T,   E(W) = f(s),   dE/dW = U diag(f'(s)) V^T,   prox_tE(W) = U diag(prox_tf(s)) V^T

So the functions of vectors live in `gauges`, and this module lifts them. Decompositions run in float32 at least
(float64 for float64), on matrices scaled by a power of two where squares would leave the range. Singular values up to
max(m, n) * eps * sigma_1 count as zero, with eps that of float64 for float64 weights and that of float32 otherwise
(half-precision weights are exact numbers in float32, and 784 * eps of bfloat16 would be above 1).

Reference: J. von Neumann, "Some matrix-inequalities and metrization of matric-space" (1937); A. S. Lewis, "The convex
analysis of unitarily invariant matrix functions" (1995), theorem 3.1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError

LinAlgError: type[RuntimeError] = torch.linalg.LinAlgError  # pyright: ignore[reportPrivateImportUsage]

_COMFORTABLE = 2.0**40  # squares, and sums of 2^40 of them, stay within float32


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that computations on ``dtype`` run in: float64 for float64, float32 otherwise."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def tolerance(w: Tensor) -> float:
    """Returns max(m, n) * eps: singular values up to this times sigma_1 count as zero."""
    return max(w.shape[-2:]) * torch.finfo(working_dtype(w.dtype)).eps


def refuse_nonfinite(w: Tensor) -> None:
    """Raises `NonFiniteError` where w holds NaN or infinity; reads the whole of w."""
    bad = int((~w.detach().isfinite()).sum())
    if bad:
        raise NonFiniteError(
            f"the weight of shape {tuple(w.shape)} has {bad} NaN or infinite entries: its energy is not defined"
        )


def prepare(w: Tensor) -> tuple[Tensor, Tensor | None]:
    """Checks a matrix and brings it to a dtype and a scale that decompositions bear.

    Args:
        w: ``(*batch, m, n)``, real floating point.

    Returns:
        ``(work, scale)``: w = work * scale with work in float32 or float64 and scale a float64 power of two of shape
        ``(*batch, 1, 1)``, or ``None`` where no scaling is needed. Differentiable.

    Raises:
        UsageError: not a real floating-point tensor of at least two dimensions.
        NonFiniteError: w holds NaN or infinity.
    """
    if w.ndim < 2 or not w.is_floating_point():
        raise UsageError(f"expected a real floating-point matrix (*batch, out, in), got {w.dtype} {tuple(w.shape)}")
    work = w.to(working_dtype(w.dtype))
    if work.numel() == 0:
        return work, None
    detached = work.detach()
    low, high = torch.aminmax(torch.linalg.vector_norm(detached, dim=(-2, -1)))  # many times as fast as the largest |w|
    if float(high) < _COMFORTABLE and float(low) > 1 / _COMFORTABLE:
        return work, None
    largest = detached.abs().amax((-2, -1), keepdim=True)
    if not bool(largest.isfinite().all()):
        refuse_nonfinite(w)
    limit = 1000 if work.dtype == torch.float64 else 120
    exponent = torch.frexp(largest).exponent.clamp(-limit, limit)
    scale = torch.ldexp(torch.ones_like(largest, dtype=torch.float64), exponent)
    return work * scale.reciprocal().to(work.dtype), scale


def singular_values(w: Tensor) -> Tensor:
    """Returns the singular values in descending order.

    Args:
        w: ``(*batch, m, n)``, any scale; m or n may be 0.

    Returns:
        ``(*batch, min(m, n))``, float64 for float64 and float32 otherwise. Differentiable; singular values that count
        as zero carry no gradient, which gives minimal-norm subgradients.

    Raises:
        UsageError: not a real floating-point matrix.
        NonFiniteError: w holds NaN or infinity, or no decomposition converges.

    Cost: one LAPACK ``gesdd``, with vectors where a gradient is asked for.

    >>> singular_values(torch.tensor([[0.0, 3.0], [4.0, 0.0]]))
    tensor([4., 3.])
    """
    work, scale = prepare(w)
    s = _svdvals(work.mT if w.shape[-2] < w.shape[-1] else work)
    if s.shape[-1] and s.requires_grad:
        fixed = s.detach()
        s = torch.where(fixed > tolerance(w) * fixed[..., :1], s, fixed)
    return s if scale is None else (s * scale[..., 0]).to(s.dtype)


def _svdvals(tall: Tensor) -> Tensor:
    """Singular values of tall matrices (a quarter of the time of the same wide ones), differentiable."""
    try:
        return torch.linalg.svdvals(tall)
    except LinAlgError:
        pass
    try:
        return torch.linalg.svdvals(tall.double()).to(tall.dtype)
    except LinAlgError:
        if tall.requires_grad:
            raise NonFiniteError(_no_convergence(tall)) from None
        return _stubborn_svd(tall.double())[1].to(tall.dtype)


def _no_convergence(w: Tensor) -> str:
    return (
        f"no singular value decomposition of the weight of shape {tuple(w.shape)} (or its transpose) converges: "
        "look for extreme entries in it"
    )


def svd(w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the thin singular value decomposition, without an autograd graph.

    Args:
        w: ``(*batch, m, n)``, any scale; m or n may be 0.

    Returns:
        ``(u, s, vh)`` of shapes ``(*batch, m, r)``, ``(*batch, r)``, ``(*batch, r, n)``, r = min(m, n), s descending;
        float64 for float64 and float32 otherwise.

    Raises:
        UsageError: not a real floating-point matrix.
        NonFiniteError: w holds NaN or infinity, or no decomposition converges.

    Cost: one LAPACK ``gesdd``. Where it does not converge: once more in float64, then by the Gram matrix.
    """
    with torch.no_grad():
        work, scale = prepare(w.detach())
        wide = w.shape[-2] < w.shape[-1]
        tall = work.mT if wide else work  # LAPACK takes half the time for a tall matrix that it takes for a wide one
        try:
            u, s, vh = torch.linalg.svd(tall, full_matrices=False)
        except LinAlgError:
            u, s, vh = (x.to(work.dtype) for x in _stubborn_svd(tall.double()))
        if wide:
            u, vh = vh.mT, u.mT
        return u, (s if scale is None else (s * scale[..., 0]).to(s.dtype)), vh


def _stubborn_svd(tall: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """SVD in float64 for tall matrices on which the first attempt failed; then by Gram eigenvectors and a QR."""
    try:
        return torch.linalg.svd(tall, full_matrices=False)
    except LinAlgError:
        pass
    gram = tall.mT @ tall
    jitter = 1e-15 * gram.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    try:
        _, v = torch.linalg.eigh(gram + jitter * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device))
    except LinAlgError as error:
        raise NonFiniteError(_no_convergence(tall)) from error
    v = v.flip(-1)
    u, triangle = torch.linalg.qr(tall @ v)  # tall V = U diag(s), so the triangle is diagonal up to rounding
    diagonal = triangle.diagonal(dim1=-2, dim2=-1)
    u = u * torch.where(diagonal < 0, -1.0, 1.0)[..., None, :]
    s, order = diagonal.abs().sort(dim=-1, descending=True)
    u = u.gather(-1, order[..., None, :].expand_as(u))
    v = v.gather(-1, order[..., None, :].expand_as(v))
    return u, s, v.mT


def rank(w: Tensor) -> Tensor:
    """Returns the number of singular values above max(m, n) * eps * sigma_1, int64 of shape ``(*batch,)``.

    >>> rank(torch.ones(3, 2))
    tensor(1)
    """
    s = singular_values(w.detach())
    return (s > tolerance(w) * s[..., :1]).sum(-1)


def above_tolerance(s: Tensor, w: Tensor) -> Tensor:
    """Returns s in float64 with the singular values of w that count as zero set to zero."""
    return torch.where(s > tolerance(w) * s[..., :1], s, 0.0).double()


def assemble(u: Tensor, coefficients: Tensor, vh: Tensor, like: Tensor) -> Tensor:
    """Returns U diag(coefficients) V^T in the dtype of ``like``."""
    scaled = u * coefficients.to(u.dtype)[..., None, :]
    return (scaled @ vh).to(like.dtype)
