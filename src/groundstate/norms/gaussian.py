"""The log density of function values under a Gaussian whose covariance is low rank plus diagonal.

Idea: values f_1, ..., f_C of C outputs at N points are independent draws of N(0, K), with features phi of the points::

    K = c (phi phi^T + 1 1^T) + d I = d (I + r P P^T),     P = [phi, 1],  r = c / d
    R = -sum_k log N(f_k; 0, K) = 1/2 tr F^T K^-1 F + C/2 log det K + N C / 2 log 2 pi

The quadratic form is ridge regression in disguise: the least of ||F - P w||^2 / d + ||w||^2 / c over w. So R charges
for values that the features do not explain. For more points than features it is computed as that sum of two squares
(Woodbury's identity without its difference of large numbers), otherwise as ||L^-1 F||^2 / d with I + r P P^T = L L^T.
By Sylvester's identity log det K = N log d + log det A with A = I + r P P^T or I + r P^T P, whichever is smaller.

Reference: C. E. Rasmussen, C. K. I. Williams, "Gaussian Processes for Machine Learning" (2006), sections 2.7 and A.3;
as a prior on networks: T. G. J. Rudner et al., "Function-Space Regularization in Neural Networks" (2023).
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.spectral import working_dtype

Method = Literal["auto", "cholesky", "woodbury"]

# Bounds on c lambda_max / d, the condition number of the covariance. Times eps it is the relative error of K^-1 f to
# expect: at the bound about 1e-3 in either dtype (the value, by its sums of squares, keeps several digits more).
_LARGEST = {torch.float32: 1e5, torch.float64: 1e13}


def negative_log_density(
    f: Tensor, phi: Tensor, c: float, d: float, *, method: Method = "auto", log_det: bool = True
) -> Tensor:
    """Returns R = -sum_k log N(f_k; 0, c (phi phi^T + 1 1^T) + d I), differentiable in f any number of times.

    Half precision is computed in float32. Float32 is computed in float64 where c * lambda_max / d may exceed 1e5
    (estimated from above by a Frobenius norm), because there float32 no longer resolves d beside the features.

    Args:
        f: Function values ``(N, C)``, N points, C outputs.
        phi: Features ``(N, m)`` of the points, m may be 0; data, not differentiated.
        c: Scale of the features' covariance, at least 0.
        d: Variance that the features do not explain, above 0. Nothing is added to it where K is ill-conditioned.
        method: ``"cholesky"`` of size N; ``"woodbury"`` of size m + 1; ``"auto"``: Woodbury for m + 1 < N.
        log_det: False leaves out what does not depend on f, and returns 1/2 tr F^T K^-1 F.

    Returns:
        A scalar, float64 for float64 f and float32 otherwise. Its gradient is K^-1 f.

    Raises:
        UsageError: c < 0, d <= 0, shapes that do not fit, no point or no output, an unknown method, or a covariance so
            ill-conditioned (c * lambda_max / d above 1e13) that float64 cannot tell it from a singular one.
        NonFiniteError: f or phi holds NaN or infinity, the factorization fails, or R overflows.

    Cost: with s = min(N, m + 1), N (m + 1) s + s^3 / 3 flops, and 2 N s C for each of value and gradient.

    >>> f = torch.tensor([[2.0], [0.0]])
    >>> negative_log_density(f, torch.zeros(2, 0), c=0.5, d=1.0, log_det=False)  # K = [[1.5, 0.5], [0.5, 1.5]]
    tensor(1.5000)
    >>> negative_log_density(f, torch.zeros(2, 0), c=0.0, d=1.0)  # 2 + log(2 pi)
    tensor(3.8379)
    """
    return _density(f, phi, c, d, method, log_det)[0]


def value_and_gradient(
    f: Tensor, phi: Tensor, c: float, d: float, *, method: Method = "auto", log_det: bool = True
) -> tuple[Tensor, Tensor]:
    """Returns `negative_log_density` and its gradient K^-1 f, shape and dtype of ``f``, without a graph.

    Arguments, errors and cost as there; a small problem takes half the time of autograd.

    >>> value_and_gradient(torch.tensor([[2.0], [0.0]]), torch.zeros(2, 0), c=0.5, d=1.0, log_det=False)
    (tensor(1.5000), tensor([[ 1.5000],
            [-0.5000]]))
    """
    with torch.no_grad():
        value, grad = _density(f, phi, c, d, method, log_det)
    return value, grad.to(f.dtype)


def _density(f: Tensor, phi: Tensor, c: float, d: float, method: str, log_det: bool) -> tuple[Tensor, Tensor]:
    _check(f, phi, c, d, method)
    points, outputs = f.shape
    ratio = c / d
    narrow = method == "woodbury" or (method == "auto" and phi.shape[1] + 1 < points)
    if c == 0:
        rest, log_det_a = f.to(working_dtype(f.dtype)), 0.0
        quadratic = rest.square().sum()
    else:
        p, factor = _factor(phi.detach(), ratio, narrow, working_dtype(f.dtype))
        values = f.to(factor.dtype)
        if narrow:
            w = torch.cholesky_solve(p.mT @ values, factor)
            rest = values - ratio * (p @ w)
            quadratic = rest.square().sum() + ratio * w.square().sum()
        else:
            half = torch.linalg.solve_triangular(factor, values, upper=False)
            rest = torch.linalg.solve_triangular(factor.mT, half, upper=True)
            quadratic = half.square().sum()
        log_det_a = 2 * factor.diagonal().log().sum() if log_det else 0.0
    total = quadratic / (2 * d)
    if log_det:
        total = total + outputs / 2 * (log_det_a + points * math.log(2 * math.pi * d))
    total = total.to(working_dtype(f.dtype))
    if not math.isfinite(float(total.detach())):
        raise NonFiniteError(
            f"the negative log density of values up to {float(f.detach().abs().max()):.3g} with d={d:g} overflows "
            f"{str(total.dtype).removeprefix('torch.')}: scale f down, or raise d"
        )
    return total, rest / d


def _factor(phi: Tensor, ratio: float, narrow: bool, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Returns ``(P, L)``: P = [phi, 1], L L^T = I + ratio P^T P if ``narrow``; else phi and L L^T = I + ratio P P^T."""
    bound = math.nan
    for work in dict.fromkeys((dtype, torch.float64)):
        p = phi.to(work)
        if narrow:
            p = torch.cat([p, p.new_ones(len(p), 1)], dim=1)
            gram = p.mT @ p
        else:
            gram = (p @ p.mT).add_(1.0)
        bound = ratio * float(torch.linalg.vector_norm(gram))
        if bound <= _LARGEST[work]:  # False for NaN too
            gram.mul_(ratio).diagonal().add_(1.0)
            factor, failed = torch.linalg.cholesky_ex(gram)
            if bool(failed):
                raise NonFiniteError(
                    f"the Cholesky factorization of the covariance failed (c * lambda_max / d = {bound:.3g}): lower c, "
                    "raise d, or scale the features down"
                )
            return p, factor
    raise UsageError(
        f"the covariance is too ill-conditioned: c * lambda_max / d is up to {bound:.3g}, float64 bears "
        f"{_LARGEST[torch.float64]:g}; lower c, raise d, or scale the features down"
    )


def _check(f: Tensor, phi: Tensor, c: float, d: float, method: str) -> None:
    if method not in ("auto", "cholesky", "woodbury"):
        raise UsageError(f"method must be 'auto', 'cholesky' or 'woodbury', got {method!r}")
    if not (math.isfinite(c) and c >= 0):
        raise UsageError(f"c scales a covariance: it must be finite and not negative, got {c!r}")
    if not (math.isfinite(d) and d > 0):
        raise UsageError(f"d is a variance: it must be finite and positive, got {d!r}")
    for name, t, shape in (("f", f, "(points, outputs)"), ("phi", phi, "(points, features)")):
        if t.ndim != 2 or not t.is_floating_point():
            raise UsageError(
                f"{name} must be a real floating-point matrix {shape}, got {t.dtype} of shape {tuple(t.shape)}"
            )
    if f.numel() == 0 or f.shape[0] != phi.shape[0]:
        raise UsageError(
            f"f and phi must have the same points, at least one, and f an output; got shapes {tuple(f.shape)} and "
            f"{tuple(phi.shape)}"
        )
    for name, t in (("function values f", f), ("features phi", phi)):
        if not math.isfinite(float(t.detach().sum())) and (
            bad := int((~t.detach().isfinite()).sum())
        ):  # the sum is faster
            raise NonFiniteError(f"the {name} of shape {tuple(t.shape)} have {bad} NaN or infinite entries")
