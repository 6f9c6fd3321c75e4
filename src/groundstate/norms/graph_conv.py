"""The graph energy of a chain of convolutions, frequency by frequency.

Idea: the nodes are all channels at all pixels of a torus, the taps of the kernels the edges. In the Fourier basis the
adjacency is block diagonal: at each frequency theta that of a layered graph with the channels as nodes and the symbols
K_l(theta) (`groundstate.norms.conv`) as weights. With B(theta) the weights between channels of even and of odd layers,
as in `groundstate.norms.graph`, the energy per pixel is::

    E = mean over theta of 2 ||B(theta)||_*
    dE/dK_l = mean of the adjoint symbol of 2 Q[l, l-1] (even l), 2 Q[l-1, l]^H (odd l),   Q = B (B^H B)^{-1/2}

Periodic padding shifts the pixels of a layer: in a chain that only renames them. At the border of the image other
padding differs from the torus. Minimal-norm subgradient: singular values up to max(shape of B) * eps times the largest
one at any frequency count as zero in the gradient.

Reference: V. Nikiforov, "The energy of graphs and matrices" (2007); H. Sedghi, V. Gupta, P. Long, "The singular values
of convolutional layers" (2019).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.conv import Sizes, adjoint, each, frequencies, symbol
from groundstate.norms.dag import promoted, refuse_nonfinite, working
from groundstate.norms.graph import node_sizes
from groundstate.norms.staircase import spans

_ENTRIES = 1 << 24  # complex numbers of B that are held at a time


@dataclass(frozen=True)
class _Chain:
    """Kernels of a comfortable scale, how they join, and the frequencies to look at."""

    kernels: list[Tensor]
    scale: float
    dilations: Sequence[Sizes]
    sizes: tuple[int, ...]
    angles: Tensor
    weights: Tensor

    def zero(self, s: Tensor) -> Tensor:
        """Up to which singular values count as zero, from those of all frequencies."""
        eps = torch.finfo(s.dtype).eps
        return max(sum(self.sizes[::2]), sum(self.sizes[1::2])) * eps * (s.max() if s.numel() else s.sum())

    def parts(self) -> list[slice]:
        step = max(1, _ENTRIES // max(1, sum(self.sizes[::2]) * sum(self.sizes[1::2])))
        return [slice(start, start + step) for start in range(0, len(self.angles), step)]

    def biadjacency(self, part: slice) -> Tensor:
        """B at some frequencies, complex ``(F, nodes of even layers, nodes of odd layers)``."""
        angles, places = self.angles[part], spans(self.sizes)
        symbols = [symbol(k, angles, dilation=d)[:, 0] for k, d in zip(self.kernels, self.dilations, strict=True)]
        b = symbols[0].new_zeros(len(angles), sum(self.sizes[::2]), sum(self.sizes[1::2]))
        for layer, s in enumerate(symbols, 1):
            if layer % 2:
                b[:, places[layer - 1], places[layer]] = s.mH
            else:
                b[:, places[layer], places[layer - 1]] = s
        return b

    def singular_values(self) -> Tensor:
        return torch.cat([torch.linalg.svdvals(self.biadjacency(part)) for part in self.parts()])

    def total(self, s: Tensor) -> Tensor:
        """E from the singular values at all frequencies."""
        value = (2 * self.scale * (self.weights[:, None] * s).sum()).to(s.dtype)
        if not bool(value.detach().isfinite()):
            raise NonFiniteError(f"the graph energy overflows {s.dtype}: scale the kernels down")
        return value


def energy(kernels: Sequence[Tensor], size: Sizes, dilations: Sequence[Sizes] | None = None) -> Tensor:
    """Returns E per pixel as a differentiable scalar.

    Args:
        kernels: K_1..K_L, K_l of shape ``(d_l, d_{l-1}, *k)``, one to three spatial axes, of stride 1; any scale.
        size: Pixels of the torus per axis, that is frequencies; kernels may be larger and then wrap around.
        dilations: Of every layer, one number or one per axis; ``None``: 1.

    Returns:
        A scalar, float64 where a kernel is float64, else float32. Cost: singular values of B for every two frequencies.

    Raises:
        UsageError: the kernels do not make a chain.
        NonFiniteError: a kernel is NaN or infinite (the layer is named), or E overflows its dtype.

    A kernel (1, 2) on two pixels has the symbols 3 and -1, so E = 2 (3 + 1) / 2:

    >>> energy([torch.tensor([[[1.0, 2.0]]])], 2)
    tensor(4.)
    """
    chain = _chain(kernels, size, dilations)
    s = chain.singular_values()
    fixed = s.detach()
    return chain.total(torch.where(fixed > chain.zero(fixed), s, fixed))


def energy_and_grad(
    kernels: Sequence[Tensor], size: Sizes, dilations: Sequence[Sizes] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """Returns E per pixel and dE/dK_l for every layer, in closed form and without an autograd graph.

    As of `energy`; gradients in each kernel's shape and dtype. Cost: a complex SVD of B for every two frequencies.

    >>> energy_and_grad([torch.tensor([[[1.0, 2.0]]])], 2)
    (tensor(4.), [tensor([[[0., 2.]]])])
    """
    with torch.no_grad():
        chain = _chain(kernels, size, dilations)
        parts, places = chain.parts(), spans(chain.sizes)
        zero = chain.zero(chain.singular_values()) if len(parts) > 1 else None
        grads, values = [torch.zeros_like(k) for k in chain.kernels], []
        for part in parts:
            u, s, vh = torch.linalg.svd(chain.biadjacency(part), full_matrices=False)
            kept = s > (chain.zero(s) if zero is None else zero)
            q = (u * (2 * chain.weights[part, None] * kept).to(s.dtype)[:, None]) @ vh
            for layer, (grad, dilation) in enumerate(zip(grads, chain.dilations, strict=True), 1):
                before, after = places[layer - 1], places[layer]
                g = q[:, before, after].mH.resolve_conj() if layer % 2 else q[:, after, before]
                grad += adjoint(g[:, None], chain.angles[part], grad.shape, dilation=dilation)
            values.append(s)
        return chain.total(torch.cat(values)), [g.to(k.dtype) for g, k in zip(grads, kernels, strict=True)]


def _chain(kernels: Sequence[Tensor], size: Sizes, dilations: Sequence[Sizes] | None) -> _Chain:
    for number, k in enumerate(kernels, 1):
        if not isinstance(k, Tensor) or not k.is_floating_point() or not 3 <= k.ndim == kernels[0].ndim:
            what = f"{tuple(k.shape)} {k.dtype}" if isinstance(k, Tensor) else type(k).__name__
            raise UsageError(f"layer {number} must be a real kernel (out, in, *k), as many axes in all, got {what}")
    sizes = tuple(node_sizes([k.new_empty(k.shape[:2]) for k in kernels]))
    spacing = [1] * len(kernels) if dilations is None else list(dilations)
    if len(spacing) != len(kernels):
        raise UsageError(f"{len(kernels)} kernels need as many dilations, got {len(spacing)}")
    work = [k.to(working(promoted(kernels))) for k in kernels]
    largest = max((float(k.detach().abs().max()) for k in work if k.numel()), default=0.0)
    refuse_nonfinite(kernels)
    limit = 1000 if work[0].dtype == torch.float64 else 120
    scale = 2.0 ** max(-limit, min(limit, math.frexp(largest)[1]))
    points = each(size, kernels[0].ndim - 2, "size")
    grid = [1 if all(k.shape[2 + axis] == 1 for k in kernels) else n for axis, n in enumerate(points)]
    angles, weights = frequencies(grid)
    return _Chain([k / scale for k in work], scale, spacing, sizes, angles, weights.to(work[0].device))
