"""Singular values of a convolution itself, by its symbol: a small complex matrix for each frequency.

Idea: a convolution with periodic padding is block diagonal in the Fourier basis. With the kernel K, taps t in Z^d,
dilation D and stride s, write the position D t of a tap as s o + p, with the offset o and the phase p in {0..s-1}^d. At
the frequency theta of the *output* (angles, one per axis), the block is the symbol::

    S(theta) [o_channel, (phase p, i_channel)] = sum over taps of phase p of K_t [o_channel, i_channel] e^{i <theta, o>}

(the phases are the s^d inputs that one output point sees; for stride 1 there is one). The singular values of the whole
operator are those of all S(theta), and an energy per output point is a mean over frequencies::

    e(K) = mean over theta of sum_i f(sigma_i(S(theta))),    dE/dK_t = mean of Re(U f'(sigma) V^H e^{-i <theta, o>})

The mean over a coarse grid that is shifted by a uniformly random vector is an unbiased estimate, in value and gradient,
of the mean over all frequencies, which is what the energy per point of a large image tends to. Symbols are summed tap
by tap, so grids may be coarser than the kernel. A transposed convolution is the adjoint of the convolution with the
same weight, so it has the same singular values.

Reference: H. Sedghi, V. Gupta, P. Long, "The singular values of convolutional layers" (2019).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.spectral import LinAlgError, prepare, tolerance, working_dtype

Sizes = int | Sequence[int]
OfSingularValues = Callable[[Tensor], tuple[Tensor, Tensor]]

_ENTRIES = 1 << 24  # complex numbers of the symbols that are held at a time
# Below this share of the largest eigenvalue of a Gram matrix, in units of its eps, an eigenvalue is mostly rounding.
_ROUNDING = 4.0


def frequencies(grid: Sequence[int], shift: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Returns the angles of a grid of frequencies, float64 ``(F, d)``, and their weights ``(F,)``, of sum 1.

    Args:
        grid: Points per axis.
        shift: In steps of the grid, ``(d,)``; all prod(grid) points are returned then. ``None``: of each pair of
            frequencies theta and -theta, where the symbols of a real kernel are conjugate, one with twice the weight.

    >>> angles, weights = frequencies([4])
    >>> (angles[:, 0] / torch.pi).tolist(), weights.tolist()
    ([0.0, 0.5, 1.0], [0.25, 0.5, 0.25])
    """
    points = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in grid)).view(-1, len(grid))
    sizes = torch.tensor(grid, dtype=torch.float64)
    if shift is not None:
        shifted = (points + shift.to(points)) / sizes
        return 2 * math.pi * shifted, torch.full((len(points),), 1 / len(points), dtype=torch.float64)
    opposite = _opposites(grid)
    kept = torch.arange(len(points)) <= opposite
    weights = 1 + (torch.arange(len(points)) < opposite)[kept].double()
    return 2 * math.pi * points[kept] / sizes, weights / len(points)


def _opposites(grid: Sequence[int]) -> Tensor:
    """Returns the flat index of -theta for each point theta of a grid, ``(prod(grid),)``."""
    axes = tuple(range(len(grid)))
    return torch.arange(math.prod(grid)).view(*grid).flip(axes).roll((1,) * len(grid), axes).flatten()


def phases(size: Sequence[int], stride: Sizes = 1, dilation: Sizes = 1) -> list[tuple[Tensor, Tensor]]:
    """Returns, for each phase that has taps, their flat indices ``(T_p,)`` and offsets ``(T_p, d)``, float64."""
    steps, spacing = each(stride, len(size), "stride"), each(dilation, len(size), "dilation")
    found: dict[tuple[int, ...], list[tuple[int, tuple[int, ...]]]] = {}
    for index, tap in enumerate(itertools.product(*map(range, size))):
        place = [t * d for t, d in zip(tap, spacing, strict=True)]
        phase = tuple(x % s for x, s in zip(place, steps, strict=True))
        found.setdefault(phase, []).append((index, tuple(x // s for x, s in zip(place, steps, strict=True))))
    return [
        (torch.tensor([i for i, _ in taps]), torch.tensor([o for _, o in taps], dtype=torch.float64))
        for _, taps in sorted(found.items())
    ]


def is_constant(size: Sequence[int], stride: Sizes = 1, dilation: Sizes = 1) -> bool:
    """Whether the singular values are those of the kernel as a matrix at every frequency: no two taps of a phase.

    So it is for kernels of one point, and where the stride is the size of the kernel (patches).

    >>> is_constant([1, 1], 2), is_constant([4, 4], 4), is_constant([3, 3])
    (True, True, False)
    """
    return all(len(index) == 1 for index, _ in phases(size, stride, dilation))


def symbol(kernel: Tensor, angles: Tensor, *, stride: Sizes = 1, dilation: Sizes = 1, groups: int = 1) -> Tensor:
    """Returns the symbols of a convolution.

    Args:
        kernel: ``(out, in / groups, *size)``, one to three spatial axes, real.
        angles: Frequencies of the output, ``(F, d)``.
        stride: One number, or one per axis.
        dilation: Likewise.
        groups: Of the convolution.

    Returns:
        Complex, ``(F, groups, out / groups, phases * in / groups)``; phases without taps, whose columns would be zero,
        are left out.

    Raises:
        UsageError: the shapes do not fit.

    >>> symbol(torch.tensor([[[1.0, 2.0]]]), torch.tensor([[0.0], [torch.pi]])).real.flatten()
    tensor([ 3., -1.])
    """
    k, (count, size) = _grouped(kernel, groups), (len(angles), kernel.shape[2:])
    parts = []
    for index, offsets in phases(size, stride, dilation):
        both = _taps(k, index).flatten(0, 2) @ _wave(angles, offsets, k)
        parts.append(torch.view_as_complex(both.unflatten(1, (count, 2))).mT.reshape(count, *k.shape[:3]))
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def adjoint(
    g: Tensor, angles: Tensor, shape: Sequence[int], *, stride: Sizes = 1, dilation: Sizes = 1, groups: int = 1
) -> Tensor:
    """Returns the adjoint of `symbol`, sum over theta of Re(g(theta) e^{-i <theta, o>}), of the shape of the kernel.

    Args:
        g: ``(F, groups, out / groups, phases * in / groups)``, complex or real.
        angles: ``(F, d)``.
        shape: Of the kernel.
        stride: As for `symbol`, and so the others.
        dilation: See there.
        groups: See there.
    """
    found = phases(shape[2:], stride, dilation)
    grads = []
    for (_, offsets), part in zip(found, g.chunk(len(found), -1), strict=True):
        waves = _wave(angles, offsets, part)
        flat = part.flatten(1).mT
        if g.is_complex():
            grads.append(torch.view_as_real(flat.contiguous()).flatten(1) @ waves.mT)
        else:
            grads.append(flat @ waves[:, ::2].mT)
    order = torch.cat([index for index, _ in found]).argsort().to(g.device)
    return (grads[0] if len(grads) == 1 else torch.cat(grads, -1)[:, order]).view(*shape)


def singular_values(kernel: Tensor, size: Sizes, *, stride: Sizes = 1, dilation: Sizes = 1, groups: int = 1) -> Tensor:
    """Returns the singular values of a convolution with periodic padding, without an autograd graph.

    Args:
        kernel: ``(out, in / groups, *k)``, any scale; with a stride the input has stride * size points per axis.
        size: Points of the output per axis; may be smaller than the kernel, which then wraps around.
        stride: As for `symbol`, and so the others.
        dilation: See there.
        groups: See there.

    Returns:
        ``(prod(size), groups, r)``, descending in each block, float64 for float64 and float32 otherwise. Where a phase
        of the stride has no tap, zeros that belong to it are left out.

    Raises:
        UsageError: the shapes do not fit.
        NonFiniteError: the kernel holds NaN or infinity.

    Cost: one complex SVD (values alone) of a block for every two frequencies.

    >>> singular_values(torch.tensor([[[1.0, 2.0]]]), 2).flatten()
    tensor([3., 1.])
    """
    _check(kernel)
    grid = each(size, kernel.ndim - 2, "size")
    parts = decomposed(kernel, *frequencies(grid), stride=stride, dilation=dilation, groups=groups)
    found = torch.cat([s for _, s, _ in parts])
    opposite = _opposites(grid)
    whole = found.new_empty((len(opposite), *found.shape[1:]))
    kept = torch.arange(len(opposite)) <= opposite
    whole[opposite[kept]] = found
    whole[kept] = found
    return whole.to(working_dtype(kernel.dtype))


def mean_of(
    kernel: Tensor,
    of: OfSingularValues,
    grid: Sizes,
    shift: Tensor | None = None,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    groups: int = 1,
    with_gradient: bool = True,
    fast: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the mean over frequencies of a function of the singular values, and its gradient.

    Args:
        kernel: ``(out, in / groups, *k)``, any scale and dtype.
        of: Maps float64 singular values ``(F, groups, r)``, descending, to f ``(F, groups)`` and its slopes; the groups
            are summed. Singular values up to max(m, n) * eps * ||K||_F are zero for it.
        grid: Frequencies per axis.
        shift: Of the grid, see `frequencies`; uniform in [0, 1)^d it makes the result unbiased for the mean over all.
        stride: As for `symbol`, and so the others.
        dilation: See there.
        groups: See there.
        with_gradient: Without it the gradient is zero and the decompositions lack vectors.
        fast: By eigenvectors of the Gram matrix of the smaller side. Singular values below about 7e-4 (float32) or
            3e-8 (float64) of the largest then act as if they were that large: slopes there are too small.

    Returns:
        The value, a float64 scalar, and the gradient in the shape and dtype of the kernel; no autograd graph.

    Raises:
        UsageError: the shapes do not fit.
        NonFiniteError: the kernel holds NaN or infinity.

    >>> value, gradient = mean_of(torch.tensor([[[1.0, 2.0]]]), lambda s: (s.sum(-1), s.sign()), 2)
    >>> value, gradient
    (tensor(2., dtype=torch.float64), tensor([[[0., 1.]]]))
    """
    _check(kernel)
    options: dict[str, Any] = {"stride": stride, "dilation": dilation, "groups": groups}
    total = torch.zeros((), dtype=torch.float64, device=kernel.device)
    sums = torch.zeros(kernel.shape, dtype=working_dtype(kernel.dtype), device=kernel.device)
    angles, weights = frequencies(each(grid, kernel.ndim - 2, "grid"), shift)
    weights = weights.to(kernel.device)
    if not with_gradient:
        for part, s, _ in decomposed(kernel, angles, weights, **options):
            total += (weights[part] * of(s)[0].sum(-1)).sum()
        return total, sums.to(kernel.dtype)
    for part, value, g in decomposed(kernel, angles, weights, **options, of=of, fast=fast):
        total += (weights[part] * value.sum(-1)).sum()
        sums += adjoint(g, angles[part], kernel.shape, **options)
    return total, sums.to(kernel.dtype)


def decomposed(
    kernel: Tensor,
    angles: Tensor,
    weights: Tensor,
    *,
    stride: Sizes = 1,
    dilation: Sizes = 1,
    groups: int = 1,
    of: OfSingularValues | None = None,
    fast: bool = False,
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Decomposes the symbols part by part; what `singular_values` and `mean_of` are made of.

    Args:
        kernel: ``(out, in / groups, *k)``.
        angles: ``(F, d)``.
        weights: Of the frequencies in the gradient, ``(F,)``.
        stride: As for `symbol`, and so the others.
        dilation: See there.
        groups: See there.
        of: As for `mean_of`.
        fast: See there.

    Yields:
        ``(part, singular values, the symbols)``, or with ``of`` ``(part, f, weight times the gradient by the symbols)``
        for each part of the frequencies.
    """
    with torch.no_grad():
        work, scale = prepare(kernel.detach().flatten(1))
        factor = 1.0 if scale is None else float(scale)
        zero = _zero(kernel, work) * factor
        at_zero = not bool(angles.any())
        size = max(1, _ENTRIES // max(1, kernel.numel() * 2))
        for start in range(0, len(angles), size):
            part = slice(start, min(start + size, len(angles)))
            s = symbol(work.view(kernel.shape), angles[part], stride=stride, dilation=dilation, groups=groups)
            s = s.real if at_zero else s
            if of is None:
                values = _svdvals(s).double() * factor
                yield part, torch.where(values > zero, values, 0.0), s
                continue
            coefficients = weights[part].view(-1, 1, 1)
            found = _by_gram if fast else _by_svd
            value, g = found(s, lambda x, c=coefficients: _scaled(of, x * factor, zero, c))
            yield part, value, g


def _zero(kernel: Tensor, work: Tensor) -> float:
    """Below which a singular value is zero: of the whole kernel, for a single symbol may vanish up to rounding."""
    return tolerance(kernel.flatten(1)) * float(torch.linalg.vector_norm(work))


def _scaled(of: OfSingularValues, s: Tensor, zero: float, weights: Tensor) -> tuple[Tensor, Tensor]:
    value, slope = of(torch.where(s > zero, s, 0.0))
    return value, weights * slope


def _by_svd(s: Tensor, of: OfSingularValues) -> tuple[Tensor, Tensor]:
    try:
        u, values, vh = torch.linalg.svd(s, full_matrices=False)
    except LinAlgError:
        raise NonFiniteError(_no_convergence(s)) from None
    value, slope = of(values.double())
    return value, (u * slope.to(values.dtype)[..., None, :]) @ vh


def _by_gram(s: Tensor, of: OfSingularValues) -> tuple[Tensor, Tensor]:
    wide = s.shape[-2] <= s.shape[-1]
    try:
        lam, v = torch.linalg.eigh(s @ s.mH if wide else s.mH @ s)
    except LinAlgError:
        return _by_svd(s, of)
    lam, v = lam.flip(-1).clamp_min(0), v.flip(-1)
    floor = (_ROUNDING * torch.finfo(lam.dtype).eps * lam[..., :1]).double().sqrt()
    values = lam.double().sqrt()
    value, _ = of(values)
    values = torch.maximum(values, floor)
    _, slope = of(values)
    ratio = torch.where(values > 0, slope / torch.where(values > 0, values, 1.0), 0.0).to(lam.dtype)
    z = (v * ratio[..., None, :]) @ v.mH
    return value, z @ s if wide else s @ z


def _svdvals(s: Tensor) -> Tensor:
    try:
        return torch.linalg.svdvals(s if s.shape[-2] >= s.shape[-1] else s.mH)
    except LinAlgError:
        raise NonFiniteError(_no_convergence(s)) from None


def _no_convergence(s: Tensor) -> str:
    return f"no SVD of the symbols of shape {tuple(s.shape)} converges: look for extreme entries in the kernel"


def _wave(angles: Tensor, offsets: Tensor, like: Tensor) -> Tensor:
    """Returns cos and sin of <theta, o> in turns, ``(T, 2 F)``."""
    theta = offsets.to(angles.device) @ angles.double().mT
    return torch.stack([theta.cos(), theta.sin()], -1).flatten(1).to(like.device, like.real.dtype)


def _taps(k: Tensor, index: Tensor) -> Tensor:
    return k if len(index) == k.shape[-1] else k[..., index.to(k.device)]


def _check(kernel: Tensor) -> None:
    if kernel.ndim < 3 or kernel.is_complex() or not kernel.is_floating_point():
        raise UsageError(f"expected a real kernel (out, in / groups, *size), got {kernel.dtype} {tuple(kernel.shape)}")


def _grouped(kernel: Tensor, groups: int) -> Tensor:
    _check(kernel)
    if groups < 1 or kernel.shape[0] % groups:
        raise UsageError(f"{kernel.shape[0]} output channels do not divide into {groups} groups")
    return kernel.flatten(2).unflatten(0, (groups, -1))


def each(value: Sizes, axes: int, name: str) -> list[int]:
    """Returns a size for every axis, from one for all or a sequence.

    Raises:
        UsageError: not positive, or not as many as there are axes.
    """
    found = [value] * axes if isinstance(value, int) else [int(v) for v in value]
    if len(found) != axes or axes < 1 or min(found) < 1:
        raise UsageError(f"{name} must be a whole number from 1, or one for each of {axes} axes, got {value!r}")
    return found
