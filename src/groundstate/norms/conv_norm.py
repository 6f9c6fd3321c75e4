"""The operator norm of a convolution: exact on a grid of frequencies, by power iteration, and bounded from above.

Idea: the norm of a convolution with periodic padding is the largest of its symbols S(theta) (`groundstate.norms.conv`)
at the frequencies of its size; its gradient comes from the singular pair there. The bound is Gram iteration: for any
matrix S with G = S^H S, powers of G separate the largest singular value from the others::

    sigma_1(S)^2 = ||G||_2 <= ||G^(2^t)||_F^(1 / 2^t)

and each t squares the excess away. From the frequencies of a grid the bound carries over to all others. For a unit
vector u, ||S(theta) u||^2 is a trigonometric polynomial of degree r on each axis, r the largest difference of two
offsets in one phase (a factor e^{i <theta, o>} of a phase changes no norm). Such a polynomial stays above cos(r delta)
times its maximum within delta < pi / (2 r) of it (M. Riesz), so with N > 2 r points per axis::

    max over all theta of sigma_1^2 <= max over the grid of sigma_1^2 / prod over axes of cos(pi r / N)

Reference: B. Delattre, Q. Barthelemy, A. Araujo, A. Allauzen, "Efficient bound of Lipschitz constant for convolutional
layers by Gram iteration" (2023); H. Ehlich, K. Zeller, "Schwankung von Polynomen zwischen Gitterpunkten" (1964).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from groundstate.errors import UsageError
from groundstate.norms.conv import Sizes, adjoint, decomposed, each, frequencies, phases, symbol
from groundstate.norms.spectral import prepare, tolerance, working_dtype

_FIRST_ITERATIONS = 20
_ENTRIES = 1 << 22  # complex numbers of the symbols that are held at a time


def norm_and_gradient(
    kernel: Tensor,
    size: Sizes,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    groups: int = 1,
    with_gradient: bool = True,
) -> tuple[Tensor, Tensor]:
    """Returns the largest singular value of a convolution with periodic padding, and its gradient.

    Args:
        kernel: ``(out, in / groups, *k)``, any scale and dtype.
        size: Points of the output per axis.
        stride: As for `groundstate.norms.conv.symbol`, and so the others.
        dilation: See there.
        groups: See there.
        with_gradient: Without it the gradient is zero.

    Returns:
        The value, a float64 scalar, and the gradient in the shape and dtype of the kernel: where several singular
        values tie for the largest, shared evenly among them; zero at zero.

    Raises:
        UsageError: the shapes do not fit.
        NonFiniteError: the kernel holds NaN or infinity.

    Cost: one complex SVD without vectors for every two frequencies.

    >>> norm_and_gradient(torch.tensor([[[1.0, -2.0]]]), 2)
    (tensor(3., dtype=torch.float64), tensor([[[ 1., -1.]]]))
    """
    grid = each(size, kernel.ndim - 2, "size")
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    angles, weights = frequencies(grid)
    parts = decomposed(kernel, angles, weights, **options)
    s = torch.cat([values for _, values, _ in parts])
    top = float(s.max()) if s.numel() else 0.0
    if top == 0 or not with_gradient:
        return s.new_tensor(top), torch.zeros_like(kernel.detach())
    least = top * (1 - 4 * tolerance(kernel.flatten(1)))
    tied = (s >= least).sum((-2, -1)).cpu()
    share = weights * tied / (weights * tied).sum()
    chosen = tied > 0
    angles, weights = angles[chosen], (share / tied.clamp_min(1))[chosen].to(kernel.device)
    grad = torch.zeros(kernel.shape, dtype=working_dtype(kernel.dtype), device=kernel.device)
    for part, _, g in decomposed(kernel, angles, weights, **options, of=lambda x: (x[..., 0], (x >= least).double())):
        grad += adjoint(g, angles[part], kernel.shape, **options)
    return s.new_tensor(top), grad.to(kernel.dtype)


def power_step(
    kernel: Tensor,
    v: Tensor | None,
    grid: Sizes,
    *,
    generator: torch.Generator,
    iterations: int = 2,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    groups: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:
    """Improves estimates of the first right singular vectors at all frequencies of a grid, each by power iteration.

    Args:
        kernel: ``(out, in / groups, *k)``, any scale and dtype.
        v: What the last call returned, or ``None`` to draw them.
        grid: Frequencies per axis.
        generator: For the first draw.
        iterations: Products with S and with S^H.
        stride: As for `groundstate.norms.conv.symbol`, and so the others.
        dilation: See there.
        groups: See there.

    Returns:
        ``(value, gradient, v)``: the largest ||S v||, a float64 scalar and a lower bound of the norm; its gradient with
        the vectors held fixed, in the shape and dtype of the kernel; the vectors, real ``(F, groups, columns, 2)``.

    Raises:
        UsageError: the shapes do not fit.
        NonFiniteError: the kernel holds NaN or infinity.
    """
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    work, scale = prepare(kernel.detach().flatten(1))
    angles, _ = frequencies(each(grid, kernel.ndim - 2, "grid"))
    s = symbol(work.view(kernel.shape), angles, **options)
    if v is None:
        v = torch.randn((*s.shape[:2], s.shape[-1], 2), generator=generator, dtype=torch.float64)
        iterations = max(iterations, _FIRST_ITERATIONS)
    x = torch.view_as_complex(v.to(work).contiguous())[..., None]
    x = _unit(x)
    for _ in range(iterations):
        x = torch.where((y := s.mH @ (s @ x)).abs().sum(-2, keepdim=True) > 0, _unit(y), x)
    y = s @ x
    lengths = torch.linalg.vector_norm(y, dim=(-2, -1))
    value, place = lengths.flatten().max(0)
    f, group = divmod(int(place), lengths.shape[1])
    g = torch.zeros_like(s[f : f + 1])
    g[0, group] = _unit(y[f, group]) @ x[f, group].mH
    grad = adjoint(g, angles[f : f + 1], kernel.shape, **options).to(kernel.dtype)
    value = value.double() if scale is None else value.double() * scale[0, 0]
    return value, grad, torch.view_as_real(x[..., 0])


def _unit(x: Tensor) -> Tensor:
    norm = torch.linalg.vector_norm(x, dim=-2, keepdim=True)
    return x / torch.where(norm > 0, norm, 1.0)


def gram_iteration_bound(
    kernel: Tensor,
    size: Sizes,
    *,
    iterations: int = 8,
    every_size: bool = False,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    groups: int = 1,
) -> float:
    """Returns a certified upper bound of the operator norm of a convolution.

    Args:
        kernel: ``(out, in / groups, *k)``, any scale.
        size: Points of the output per axis (periodic padding).
        iterations: t; the bound is at most r^(1 / 2^(t + 1)) times too large for r singular values: 1.2 % for 512 and
            8 iterations.
        every_size: Bound the norm for every size and for zero padding too (there the operator is a part of the one on
            the whole lattice); the grid only serves to find it, and must have more than twice as many points as the
            offsets of the kernel reach.
        stride: As for `symbol`, and so the others.
        dilation: See there.
        groups: See there.

    Raises:
        UsageError: the shapes do not fit, or the grid is too coarse.
        NonFiniteError: the kernel holds NaN or infinity.

    Cost: ``iterations`` products of small Gram matrices for every two frequencies, in complex128.

    >>> round(gram_iteration_bound(torch.tensor([[[1.0, 2.0]]]), 4), 6)
    3.0
    >>> round(gram_iteration_bound(torch.tensor([[[1.0, 2.0]]]), 16, every_size=True), 4)
    3.0292
    """
    grid = each(size, kernel.ndim - 2, "size")
    if isinstance(iterations, bool) or not isinstance(iterations, int) or iterations < 0:
        raise UsageError(f"iterations must be a whole number from 0, got {iterations!r}")
    inflation = _between(kernel.shape[2:], grid, stride, dilation) if every_size else 1.0
    work, scale = prepare(kernel.detach().flatten(1).double())
    work, (angles, _) = work.view(kernel.shape), frequencies(grid)
    largest = 0.0
    for some in angles.split(max(1, _ENTRIES // max(1, kernel.numel() * 4))):
        s = symbol(work, some, stride=stride, dilation=dilation, groups=groups)
        g = s @ s.mH if s.shape[-2] <= s.shape[-1] else s.mH @ s
        log = torch.zeros(g.shape[:2], dtype=torch.float64, device=g.device)
        for step in range(iterations + 1):
            norm = torch.linalg.vector_norm(g, dim=(-2, -1))
            log = 2 * log + norm.log() if step else norm.log()
            if step < iterations:
                g = g / torch.where(norm > 0, norm, 1.0)[..., None, None]
                g = g @ g
        largest = max(largest, float((log / 2 ** (iterations + 1)).exp().max()))
    rounding = 1 + 8 * sum(kernel.shape) * torch.finfo(torch.float64).eps
    return largest * inflation * rounding * (1.0 if scale is None else float(scale))


def _between(size: Sequence[int], grid: Sequence[int], stride: Sizes, dilation: Sizes) -> float:
    """By what factor the norm between the points of a grid may exceed that on them."""
    found = [offsets for _, offsets in phases(size, stride, dilation)]
    square = 1.0
    for axis, points in enumerate(grid):
        reach = max(int(o[:, axis].max() - o[:, axis].min()) for o in found)
        if points <= 2 * reach:
            raise UsageError(
                f"a bound for every size needs more than {2 * reach} points on axis {axis}, twice the reach of the "
                f"kernel, got {points}"
            )
        square *= math.cos(math.pi * reach / points)
    return square**-0.5
