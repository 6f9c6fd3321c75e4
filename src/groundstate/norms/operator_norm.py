"""The (p, q) operator norm: how far a matrix stretches a vector, lengths in l_p before and in l_q after.

Idea: the norm is a bilinear maximum, and maximizing over one side at a time is a closed form::

    ||J||_{p->q} = max over ||v||_p <= 1 of ||J v||_q = max over ||v||_p <= 1, ||u||_{q*} <= 1 of u^T J v

    u <- argmax of <J v, u> = dual_vector(J v, q*),     v <- argmax of <J^T u, v> = dual_vector(J^T u, p)

with 1/p + 1/p* = 1. For p = q = 2 this is the power method on J^T J. No half step lowers u^T J v, so ||J v||_q rises
with each iteration, for all p and q, and is a lower bound of the norm at each; but it may stop at a local maximum.
Certified, because in closed form, are (2, 2), the largest singular value, (1, q), the largest l_q norm of a column, and
(p, inf), the largest l_p* norm of a row. (inf, 1), (inf, 2) and their like are NP-hard: there the lower bound is all
there is, and restarts raise it.

Reference: D. Boyd, "The power method for l^p norms" (1974); N. Higham, "Estimating the matrix p-norm" (1992);
K. Roth, Y. Kilcher, T. Hofmann, "Adversarial training is a form of data-dependent operator norm regularization" (2020).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms import spectral
from groundstate.norms.spectral import prepare, working_dtype


def conjugate(p: float) -> float:
    """Returns the exponent p* of the dual norm, 1/p + 1/p* = 1.

    Raises:
        UsageError: p is not a number in [1, inf].

    >>> conjugate(4), conjugate(1), conjugate(math.inf)
    (1.3333333333333333, inf, 1.0)
    """
    if isinstance(p, bool) or not isinstance(p, (int, float)) or not p >= 1:
        raise UsageError(f"the exponent of an l_p norm must be a number in [1, inf], got {p!r}; infinity is math.inf")
    if p == 1:
        return math.inf
    return 1.0 if p == math.inf else float(p) / (float(p) - 1.0)


def lp_norm(v: Tensor, p: float) -> Tensor:
    """Returns (sum_i |v_i|^p)^(1/p) over the last dimension, max |v_i| for p = inf, at any scale.

    Args:
        v: ``(*batch, n)``, real floating point; the norm of no entries is 0.
        p: In [1, inf].

    Returns:
        ``(*batch,)``, float64 for float64 and float32 otherwise; NaN and infinity go through, and a norm beyond the
        range is infinite. Differentiable, with gradient 0 at v = 0.

    Raises:
        UsageError: p is below 1, or v not a real floating-point vector.

    >>> lp_norm(torch.tensor([[3.0, -4.0], [3e20, 4e20]]), 2)
    tensor([5.0000e+00, 5.0000e+20])
    """
    conjugate(p)
    work = _vector(v)
    if work.shape[-1] == 0:
        return work.sum(-1)
    if p in (1, math.inf):
        return torch.linalg.vector_norm(work, p, dim=-1)
    largest = work.detach().abs().amax(-1, keepdim=True)
    scale = torch.where((largest > 0) & largest.isfinite(), largest, 1.0)
    return torch.linalg.vector_norm(work / scale, p, dim=-1) * scale[..., 0]


def dual_vector(w: Tensor, p: float) -> Tensor:
    """Returns argmax over ||v||_p <= 1 of <w, v>, where it is ||w||_p*: a half step of the power method.

    It is sign(w) for p = inf, the signed first largest entry for p = 1, else sign(w_i) |w_i|^(p*-1) of unit l_p norm.
    Where there are several maximizers, this one has zeros where w has; w = 0 gives 0.

    Args:
        w: ``(*batch, n)``, real floating point, any scale.
        p: In [1, inf].

    Returns:
        Shape and dtype of w, without an autograd graph. All NaN where w holds NaN or infinity.

    Raises:
        UsageError: p is below 1, or w not a real floating-point vector.

    >>> dual_vector(torch.tensor([3.0, -4.0]), 2)
    tensor([ 0.6000, -0.8000])
    >>> dual_vector(torch.tensor([3.0, -4.0]), math.inf), dual_vector(torch.tensor([3.0, -4.0]), 1)
    (tensor([ 1., -1.]), tensor([ 0., -1.]))
    """
    conjugate(p)
    work = _vector(w.detach())
    if work.shape[-1] == 0:
        return w.detach().clone()
    largest = work.abs().amax(-1, keepdim=True)
    sign = work.sign()
    if p == math.inf:
        out = sign
    elif p == 1:
        place = work.abs().argmax(-1, keepdim=True)
        out = torch.zeros_like(work).scatter(-1, place, sign.gather(-1, place))
    else:
        out = sign * (work.abs() / torch.where(largest > 0, largest, 1.0)) ** (1 / (p - 1))  # p* - 1 = 1 / (p - 1)
        norm = lp_norm(out, p)[..., None]
        out = out / torch.where(norm > 0, norm, 1.0)
    return (out + (largest - largest)).to(w.dtype)  # the sign of NaN is 0: what is not finite must not pass as zero


def certified(matrix: Tensor, p: float, q: float) -> Tensor | None:
    """Returns ||J||_{p->q} where a closed form is known, else ``None``.

    (1, q): the largest l_q norm of a column; (p, inf): the largest l_p* norm of a row; (2, 2): the largest singular
    value.

    Args:
        matrix: ``(*batch, m, n)``, any scale; m or n may be 0, the norm is 0 then.
        p: In [1, inf], of the inputs.
        q: In [1, inf], of the outputs.

    Returns:
        ``(*batch,)``, float64 for float64 and float32 otherwise, or ``None``. Differentiable; zero gradient at J = 0.

    Raises:
        UsageError: p or q is below 1, or not a real floating-point matrix.
        NonFiniteError: the matrix holds NaN or infinity.

    >>> certified(torch.tensor([[3.0, -1.0], [4.0, 2.0]]), 1, 2), certified(torch.ones(2, 2), math.inf, 1)
    (tensor(5.), None)
    """
    work, scale = prepare(matrix)
    if not _has_closed_form(p, q):
        return None
    if matrix.shape[-2] * matrix.shape[-1] == 0:
        return work.sum((-2, -1))
    if p == 2 and q == 2:
        return spectral.singular_values(matrix)[..., 0]
    norm = (lp_norm(work.mT, q) if p == 1 else lp_norm(work, conjugate(p))).amax(-1)
    return norm if scale is None else (norm * scale[..., 0, 0]).to(norm.dtype)


def power_method(
    apply: Callable[[Tensor], Tensor],
    apply_transpose: Callable[[Tensor], Tensor],
    v: Tensor,
    p: float,
    q: float,
    iterations: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns a lower bound of ||J||_{p->q} for a linear map J, and the vectors that attain it.

    In exact arithmetic the value never falls from one iteration to the next, for any p, q in [1, inf]. For p = q = 2
    its error shrinks by (s_2 / s_1)^4 per iteration; for p >= q and a positive J it converges to the norm from any
    positive start; in general it converges to a local maximum. A start in the kernel of J stays there with value 0.

    Args:
        apply: v ``(*batch, n)`` to J v ``(*batch, m)``, linear; called ``iterations + 1`` times, in the caller's
            grad mode, on tensors without a graph. What it returns is detached.
        apply_transpose: u ``(*batch, m)`` to J^T u ``(*batch, n)``; called ``iterations`` times.
        v: The start, ``(*batch, n)``, nonzero, any scale.
        p: In [1, inf], of the inputs.
        q: In [1, inf], of the outputs.
        iterations: 0 evaluates the start.

    Returns:
        ``(value, u, v)``: ||v||_p = 1 to the rounding of its dtype, value = ||J v||_q of shape ``(*batch,)``, and u
        with ||u||_q* = 1 and u^T J v = value. Where J v = 0, the value and u are 0.

    Raises:
        UsageError: p or q is below 1, iterations negative, the start zero, or shapes do not fit.
        NonFiniteError: the start, J v or J^T u holds NaN or infinity.

    >>> j = torch.tensor([[2.0, 1.0], [0.0, 1.0]])
    >>> value, u, v = power_method(lambda v: v @ j.mT, lambda u: u @ j, torch.tensor([1.0, 0.0]), math.inf, 1, 5)
    >>> value, u, v
    (tensor(4.), tensor([1., 1.]), tensor([1., 1.]))
    """
    dual = conjugate(q)
    _at_least("iterations", iterations, 0)
    v = _normalized(v.detach(), p)
    y = _applied(apply, v, None)
    for _ in range(iterations):
        w = _applied(apply_transpose, dual_vector(y, dual), v.shape)
        step = dual_vector(w, p).to(v.dtype)
        v = torch.where((w == 0).all(-1, keepdim=True), v, step)  # w = 0: all v are maximizers, so keep a unit vector
        y = _applied(apply, v, y.shape)
    value = lp_norm(y, q) / lp_norm(v, p)  # of the v returned, which half precision rounds
    if not bool(value.isfinite().all()):
        raise NonFiniteError(
            f"||J v||_{q:g} is NaN or infinite for {int((~value.isfinite()).sum())} of {value.numel()} maps: look for "
            "NaN in them and their inputs; if they overflow, scale them or use float64"
        )
    return value, dual_vector(y, dual), v


def operator_norm(
    matrix: Tensor, p: float, q: float, *, iterations: int = 50, restarts: int = 8, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, bool]:
    """Returns ||J||_{p->q} of a matrix with its maximizers, and whether it is certified or a lower bound.

    In closed form where `certified` has one. Else the largest value of `power_method` from several starts: the first
    right singular vector, the dual vector of the row of largest l_p* norm, the column of largest l_q norm, random ones.
    So from three starts on it is at least the l_p* norm of each row and the l_q norm of each column. Of 400 Gaussian
    10 x 10 matrices, 8 starts found ||J||_{inf->1} for 84 % (0.6 % too low on average), 32 starts for 98 %.

    Args:
        matrix: ``(*batch, m, n)``, any scale; m or n may be 0.
        p: In [1, inf], of the inputs.
        q: In [1, inf], of the outputs.
        iterations: Per start; unused in closed form, as are the next two.
        restarts: Number of starts, at least 1; from the fourth on they are random.
        generator: For the random starts, on any device.

    Returns:
        ``(value, u, v, certified)``: value ``(*batch,)``, u ``(*batch, m)`` with ||u||_q* = 1, v ``(*batch, n)`` with
        ||v||_p = 1, u^T J v = value, float64 for float64 and float32 otherwise, without an autograd graph; u v^T is a
        subgradient of the norm where the value is the norm. J = 0 gives u = 0.

    Raises:
        UsageError: p or q is below 1, iterations or restarts too small, or not a real floating-point matrix.
        NonFiniteError: the matrix holds NaN or infinity.

    Cost: 4 m n * iterations * restarts flops per matrix and one SVD; only the latter for (2, 2).

    >>> j = torch.tensor([[3.0, -1.0], [4.0, 2.0]])
    >>> value, u, v, exact = operator_norm(j, math.inf, 2, generator=torch.Generator())
    >>> round(float(value), 4), exact
    (6.3246, False)
    """
    exact = _has_closed_form(p, q)
    _at_least("iterations", iterations, 0)
    _at_least("restarts", restarts, 1)
    work, scale = prepare(matrix.detach())
    if matrix.numel() == 0:
        return work.sum((-2, -1)), work.sum(-1), work.sum(-2), exact
    starts = _maximizer(work, p, q)[None] if exact else _starts(work, p, q, restarts, generator)

    def times(j: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda x: (j @ x.movedim(0, -1)).movedim(-1, 0)  # all starts in one product

    values, u, v = power_method(times(work), times(work.mT), starts, p, q, 0 if exact else iterations)
    best = values.argmax(0, keepdim=True)
    value = values.take_along_dim(best, 0)[0]
    u, v = (x.take_along_dim(best[..., None], 0)[0] for x in (u, v))
    return value if scale is None else (value * scale[..., 0, 0]).to(value.dtype), u, v, exact


def _has_closed_form(p: float, q: float) -> bool:
    for exponent in (p, q):
        conjugate(exponent)  # refuses what is no exponent
    return p == 1 or q == math.inf or (p == 2 and q == 2)


def _maximizer(work: Tensor, p: float, q: float) -> Tensor:
    """A maximizer in the cases with a closed form, ``(*batch, n)``."""
    if p == 1:
        return _largest_column(work, q)
    return _largest_row(work, p) if q == math.inf else _top_singular(work)


def _starts(work: Tensor, p: float, q: float, restarts: int, generator: torch.Generator) -> Tensor:
    """Starts ``(restarts, *batch, n)``. Random ones J^T u are outside the kernel of J, and find more than random v."""
    fixed = torch.stack([_top_singular(work), _largest_row(work, p), _largest_column(work, q)][:restarts])
    shape = (max(restarts - 3, 0), *work.shape[:-1])
    random = torch.randn(shape, generator=generator, device=generator.device, dtype=torch.float64).to(work)
    return torch.cat([fixed, _not_zero((random[..., None, :] @ work)[..., 0, :])])


def _top_singular(work: Tensor) -> Tensor:
    return spectral.svd(work)[2][..., 0, :]


def _largest_row(work: Tensor, p: float) -> Tensor:
    place = lp_norm(work, conjugate(p)).argmax(-1)[..., None, None]
    return dual_vector(_not_zero(work.take_along_dim(place, -2)[..., 0, :]), p)


def _largest_column(work: Tensor, q: float) -> Tensor:
    place = lp_norm(work.mT, q).argmax(-1, keepdim=True)
    return torch.zeros_like(work[..., 0, :]).scatter(-1, place, 1.0)


def _not_zero(v: Tensor) -> Tensor:
    return torch.where((v == 0).all(-1, keepdim=True), 1.0, v)


def _vector(v: Tensor) -> Tensor:
    if v.ndim < 1 or not v.is_floating_point():
        raise UsageError(f"expected a real floating-point vector (*batch, n), got {v.dtype} {tuple(v.shape)}")
    return v.to(working_dtype(v.dtype))


def _normalized(v: Tensor, p: float) -> Tensor:
    largest = lp_norm(v, math.inf)[..., None]
    if not bool(largest.isfinite().all()):
        raise NonFiniteError(
            f"the start of shape {tuple(v.shape)} holds NaN or infinity: the power method cannot begin"
        )
    if not bool((largest > 0).all()):
        raise UsageError(
            f"{int((largest == 0).sum())} of {largest.numel()} starts of the power method are zero and would stay so: "
            "pass nonzero ones, e.g. torch.randn with a generator"
        )
    unit = _vector(v) / largest  # first the largest entry: the norm itself may be beyond the range
    return (unit / lp_norm(unit, p)[..., None]).to(v.dtype)


def _applied(apply: Callable[[Tensor], Tensor], x: Tensor, shape: torch.Size | None) -> Tensor:
    y = apply(x).detach()
    wrong = y.shape[:-1] != x.shape[:-1] if shape is None else y.shape != shape
    if wrong:
        expected = f"(*{tuple(x.shape[:-1])}, m)" if shape is None else str(tuple(shape))
        raise UsageError(f"expected a linear map of {tuple(x.shape)} to {expected}, got {tuple(y.shape)}")
    return y


def _at_least(name: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UsageError(f"{name} must be a whole number of at least {least}, got {value!r}")
