"""The energy of any graph of node groups: networks with skip connections, where the adjacency is no chain of blocks.

Idea: a group of neurons is a node of a small graph; a weight joins all neurons of one group to all of another, a
residual connection joins neuron i of one to neuron i of another by an edge of weight 1 (an identity edge). Edges
between the same two groups add up. The adjacency A of all neurons has energy::

    E = sum_i |lambda_i(A)| = tr(A sign(A)),        dE/dW = 2 sign(A) on the edges of W

and falls into connected components. A breadth-first search colors the groups of each with two colors. Where that
succeeds the component is bipartite and E = 2 ||B||_*, with B half the size; where it fails (a residual connection over
two weight layers closes a triangle) sign(A) comes from an eigendecomposition of A. Identity edges count in the value
and have no gradient. On the kernel the minimal-norm subgradient is taken: magnitudes up to N * eps * the largest, N the
side of the matrix at hand, count as zero in the gradient, with eps that of float64 for float64 weights and that of
float32 otherwise.

Reference: I. Gutman, "The energy of a graph" (1978); V. Nikiforov, "The energy of graphs and matrices" (2007).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.polar import polar_and_spectrum

# Polar factors in float32 are off by a few times eps * sigma_1 * rms(1 / sigma_i), relative to their norm; above this
# bound the decomposition is repeated in float64. Eigenvectors of A in float32 would nearly never do.
_TRUST_SINGLE = 2e-6

Pair = tuple[int, int]


@dataclass(frozen=True)
class Wiring:
    """Which groups of neurons a network has, and what joins them; the weights themselves are given apart.

    Attributes:
        sizes: Neurons of each group.
        edges: ``(source, target)`` of each weight W_l, of shape ``(sizes[target], sizes[source])``.
        identities: ``(source, target)`` of each identity edge, between groups of one size.

    Raises:
        UsageError: a group that does not exist or is joined to itself, or an identity edge between unequal sizes.
    """

    sizes: tuple[int, ...]
    edges: tuple[Pair, ...]
    identities: tuple[Pair, ...] = ()

    def __post_init__(self) -> None:
        for source, target in (*self.edges, *self.identities):
            if not (0 <= source < len(self.sizes) and 0 <= target < len(self.sizes)) or source == target:
                raise UsageError(
                    f"an edge must join two different groups of 0..{len(self.sizes) - 1}, got {source} -> {target}"
                )
        for source, target in self.identities:
            if self.sizes[source] != self.sizes[target]:
                raise UsageError(
                    f"an identity edge must join groups of one size, got {source} -> {target} with "
                    f"{self.sizes[source]} and {self.sizes[target]} neurons"
                )

    @property
    def is_chain(self) -> bool:
        """Whether the weights follow one another, W_l from group l-1 to group l, and nothing else."""
        return not self.identities and self.edges == tuple((t, t + 1) for t in range(len(self.sizes) - 1))


@dataclass(frozen=True)
class Component:
    """Connected groups, and their colors where two are enough, so that every edge joins 0 and 1."""

    groups: tuple[int, ...]
    colors: tuple[int, ...] | None


def components(wiring: Wiring) -> list[Component]:
    """Returns the connected components, each colored by breadth-first search.

    >>> components(Wiring((2, 3, 2), ((0, 1), (1, 2)), ((0, 2),)))
    [Component(groups=(0, 1, 2), colors=None)]
    """
    neighbors: list[list[int]] = [[] for _ in wiring.sizes]
    for source, target in (*wiring.edges, *wiring.identities):
        neighbors[source].append(target)
        neighbors[target].append(source)
    color: dict[int, int] = {}
    found = []
    for start in range(len(wiring.sizes)):
        if start in color:
            continue
        color[start] = 0
        queue, bipartite = [start], True
        for group in queue:
            for other in neighbors[group]:
                if other not in color:
                    color[other] = 1 - color[group]
                    queue.append(other)
                bipartite &= color[other] != color[group]
        groups = tuple(sorted(queue))
        found.append(Component(groups, tuple(color[g] for g in groups) if bipartite else None))
    return found


def adjacency(wiring: Wiring, layers: Sequence[Tensor], absolute: bool = False) -> Tensor:
    """Returns the dense symmetric adjacency over all neurons, group by group; differentiable.

    Args:
        wiring: The groups and edges.
        layers: The weights, one for each of ``wiring.edges``.
        absolute: Take |W_l| in place of W_l; identity edges keep weight 1.

    Raises:
        UsageError: the layers do not fit the wiring.

    >>> adjacency(Wiring((1, 1), ((0, 1),), ((0, 1),)), [torch.tensor([[3.0]])])
    tensor([[0., 4.],
            [4., 0.]])
    """
    check(wiring, layers)
    every = range(len(wiring.sizes))
    return _symmetric(wiring, [w.abs() if absolute else w for w in layers], tuple(every), promoted(layers))


def energy(wiring: Wiring, layers: Sequence[Tensor], absolute: bool = False) -> Tensor:
    """Returns E as a differentiable scalar, by the eigenvalues of the dense adjacency.

    Arguments as of `adjacency`. `energy_and_grad` is the fast way.

    Raises:
        UsageError: the layers do not fit the wiring.
        NonFiniteError: a weight is NaN or infinite; it is named.

    A weight of 3 beside a residual connection is an edge of weight 4, with eigenvalues +4 and -4:

    >>> energy(Wiring((1, 1), ((0, 1),), ((0, 1),)), [torch.tensor([[3.0]])])
    tensor(8.)
    """
    a = adjacency(wiring, layers, absolute)
    refuse_nonfinite(layers)
    return adjacency_energy(a)


def energy_and_grad(wiring: Wiring, layers: Sequence[Tensor], absolute: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Returns E and dE/dW_l for every weight, in closed form and without an autograd graph.

    Args:
        wiring: The groups and edges.
        layers: The weights, one for each of ``wiring.edges``; any scale; bfloat16 and half are computed in float32.
        absolute: Take |W_l| in place of W_l. The gradient is sign(W_l) times the gradient at |W_l|, zero where w = 0.

    Returns:
        The scalar E (float64 or float32) and the minimal-norm subgradient per weight, in its shape and dtype.

    Raises:
        UsageError: the layers do not fit the wiring.
        NonFiniteError: a weight is NaN or infinite (it is named), or E overflows its dtype.

    Cost: of a bipartite component the polar factor of B, in float64 where float32 is not accurate to 1e-5; of another
    an ``eigh`` of all its neurons in float64.
    """
    check(wiring, layers)
    refuse_nonfinite(layers)
    dtype = working(promoted(layers))
    with torch.no_grad():
        work = [w.detach().to(dtype) for w in layers]
        used = [w.abs() for w in work] if absolute else work
        value, grads = used[0].new_zeros(()), [torch.zeros_like(w) for w in work]
        for component in components(wiring):
            value = value + _add_component(wiring, used, component, grads)
        if not bool(value.isfinite()):
            raise NonFiniteError(f"the graph energy overflows {dtype}: scale the weights down")
        if absolute:
            grads = [g * w.sign() for g, w in zip(grads, work, strict=True)]
        return value, [g.to(w.dtype) for g, w in zip(grads, layers, strict=True)]


def adjacency_energy(a: Tensor) -> Tensor:
    """Returns sum |lambda_i| of any symmetric adjacency, bipartite or not; the dense reference.

    Args:
        a: Symmetric ``(N, N)``. Half precisions are computed in float32.

    Returns:
        A scalar; differentiable, dE/dA = sign(A), zero on the kernel. Cost of one ``eigvalsh`` of size N.

    Raises:
        UsageError: not square or not symmetric.
        NonFiniteError: an entry is NaN or infinite.

    The complete graph on four nodes, E = 2 (n - 1):

    >>> round(float(adjacency_energy(torch.ones(4, 4) - torch.eye(4))), 5)
    6.0
    """
    if a.ndim != 2 or a.shape[0] != a.shape[1] or not a.is_floating_point():
        raise UsageError(f"an adjacency must be a real square matrix, got {tuple(a.shape)} {a.dtype}")
    work = a.to(working(a.dtype))
    fixed = work.detach()
    if not bool(fixed.isfinite().all()):
        raise NonFiniteError(f"the adjacency of shape {tuple(a.shape)} has NaN or infinite entries")
    if a.numel() == 0:
        return work.sum()
    eps = torch.finfo(work.dtype).eps
    gap, largest = float((fixed - fixed.mT).abs().max()), float(fixed.abs().max())
    if gap > 8 * eps * largest:
        raise UsageError(
            f"an adjacency must be symmetric, got entries that differ from their mirror by up to {gap:.3g}: "
            "symmetrize it, e.g. (a + a.T) / 2"
        )
    return sum_above_kernel(torch.linalg.eigvalsh(work).abs(), a.shape[0] * eps)


def sum_above_kernel(magnitudes: Tensor, tolerance: float) -> Tensor:
    """Returns the sum of all magnitudes; the gradient is zero for those up to tolerance times the largest."""
    fixed = magnitudes.detach()
    return torch.where(fixed > tolerance * fixed.max(), magnitudes, fixed).sum()


def promoted(layers: Sequence[Tensor]) -> torch.dtype:
    """Returns the dtype that all layers fit in."""
    dtype = layers[0].dtype
    for w in layers:
        dtype = torch.promote_types(dtype, w.dtype)
    return dtype


def working(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype that an energy is computed in: float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def refuse_nonfinite(layers: Sequence[Tensor]) -> None:
    """Raises `NonFiniteError`, naming the layer, where a weight is NaN or infinite."""
    for number, w in enumerate(layers, 1):
        bad = int((~w.detach().isfinite()).sum())
        if bad:
            raise NonFiniteError(
                f"layer {number} of shape {tuple(w.shape)} has {bad} NaN or infinite weights: "
                "the graph energy is not defined there"
            )


def check(wiring: Wiring, layers: Sequence[Tensor]) -> None:
    """Raises `UsageError` where the layers do not fit the wiring."""
    if not layers or len(layers) != len(wiring.edges):
        raise UsageError(f"the wiring has {len(wiring.edges)} weights (at least one is needed), got {len(layers)}")
    for number, (w, (source, target)) in enumerate(zip(layers, wiring.edges, strict=True), 1):
        shape = (wiring.sizes[target], wiring.sizes[source])
        if not isinstance(w, Tensor) or not w.is_floating_point() or tuple(w.shape) != shape:
            what = f"{tuple(w.shape)} {w.dtype}" if isinstance(w, Tensor) else type(w).__name__
            raise UsageError(f"layer {number} must be a real floating matrix (out, in) of shape {shape}, got {what}")


def _blocks(wiring: Wiring, layers: Sequence[Tensor], groups: Sequence[int]) -> list[tuple[int, int, Tensor | None]]:
    """``(source, target, weight)`` of the edges within some groups, weight ``None`` for an identity."""
    pairs = [*zip(wiring.edges, layers, strict=True), *((pair, None) for pair in wiring.identities)]
    return [(source, target, w) for (source, target), w in pairs if source in groups]


def _places(wiring: Wiring, groups: Sequence[int]) -> dict[int, slice]:
    found, filled = {}, 0
    for group in groups:
        found[group] = slice(filled, filled + wiring.sizes[group])
        filled += wiring.sizes[group]
    return found


def _symmetric(wiring: Wiring, layers: Sequence[Tensor], groups: Sequence[int], dtype: torch.dtype) -> Tensor:
    place = _places(wiring, groups)
    n = sum(wiring.sizes[g] for g in groups)
    a = torch.zeros(n, n, dtype=dtype, device=layers[0].device)
    for source, target, w in _blocks(wiring, layers, groups):
        block = w.to(dtype) if w is not None else torch.eye(wiring.sizes[source], dtype=dtype, device=a.device)
        a[place[target], place[source]] += block
        a[place[source], place[target]] += block.mT
    return a


def _add_component(wiring: Wiring, layers: list[Tensor], component: Component, grads: list[Tensor]) -> Tensor:
    """Returns the energy of one component and writes the gradients of its weights."""
    groups, dtype = component.groups, layers[0].dtype
    if component.colors is None:
        rows = columns = _places(wiring, groups)
        value, sign = _sign(_symmetric(wiring, layers, groups, dtype))
    else:
        sides = [[g for g, c in zip(groups, component.colors, strict=True) if c == side] for side in (0, 1)]
        rows, columns = (_places(wiring, side) for side in sides)
        b = layers[0].new_zeros(*(sum(wiring.sizes[g] for g in side) for side in sides))
        for source, target, w in _blocks(wiring, layers, groups):
            block = w if w is not None else torch.eye(wiring.sizes[source], dtype=dtype, device=b.device)
            if target in rows:
                b[rows[target], columns[source]] += block
            else:
                b[rows[source], columns[target]] += block.mT
        value, sign = _polar(b)
    for number, (source, target) in enumerate(wiring.edges):
        if source in groups:
            straight = target in rows
            block = sign[rows[target], columns[source]] if straight else sign[rows[source], columns[target]].mT
            grads[number] = 2 * block
    return value


def _polar(b: Tensor) -> tuple[Tensor, Tensor]:
    """Returns 2 ||B||_* and the minimal-norm polar factor of B, in the dtype of B."""
    q, s = polar_and_spectrum(b)
    if b.dtype == torch.float64 or not bool(s.any()):
        return 2 * s.sum(), q
    eps = torch.finfo(b.dtype).eps
    inverse = s[s > max(b.shape) * eps * s[0]].reciprocal()
    if eps * float(s[0] * inverse.norm()) / math.sqrt(max(1, inverse.numel())) < _TRUST_SINGLE:
        return 2 * s.sum(), q
    u, s, vh = torch.linalg.svd(b.double(), full_matrices=False)
    kept = s > max(b.shape) * eps * s[0]
    return 2 * s.sum().to(b.dtype), ((u * kept) @ vh).to(b.dtype)


def _sign(a: Tensor) -> tuple[Tensor, Tensor]:
    """Returns sum |lambda_i| and sign(A), zero on the kernel, in the dtype of A."""
    lam, vectors = torch.linalg.eigh(a.double())
    kept = lam.abs() > a.shape[0] * torch.finfo(a.dtype).eps * lam.abs().max() if a.numel() else lam > 0
    sign = (vectors * (lam.sign() * kept)) @ vectors.mT
    return lam.abs().sum().to(a.dtype), sign.to(a.dtype)
