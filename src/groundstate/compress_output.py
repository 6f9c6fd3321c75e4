"""Ranks by what they do to the output: data-aware SVD, and one tolerance shared out among the layers.

Data-aware SVD. On data with second moment C = E x x^T at the input of a layer, the error that counts is that of its
output, E |(W - B A) x|^2 = ||(W - B A) C^(1/2)||_F^2, and the best rank r is the truncated SVD of W C^(1/2), taken
back through C^(-1/2). With U_r its leading left singular vectors that is::

    B A = U_r U_r^T W,      (W C^(1/2)) (W C^(1/2))^T = W C W^T = U diag(lambda) U^T

so neither the root nor the inverse of C is needed, which may be singular: U are the principal axes of the outputs
without bias, and the relative squared error of the layer is sum_{i>r} lambda_i / sum_i lambda_i. The SVD of the weight
itself has the same form with U that of W. Where m > n the moment is taken in an orthonormal basis of the range of W.

One tolerance for the network: the change ||f'(X) - f(X)||_F / ||f(X)||_F of the outputs is measured, with the layers
really factored. First for each layer alone at some ranks; errors of different layers add like d_1^2 + d_2^2 + ..., so
the ranks that minimize parameters + price * d^2 layer by layer are on the frontier for every price, and bisection finds
the price whose network is just within the tolerance. At last each rank is lowered as far as the measured change allows.

Reference: P. Chen et al., "DRONE: Data-aware low-rank compression for large NLP models" (2021); X. Wang et al.,
"SVD-LLM" (2024), the same by C^(1/2).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from groundstate.compress_factors import Factorized, Layer, finite_matrix, projected
from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.spectral import svd, working_dtype

Data = Tensor | tuple[Tensor, ...]
Ranks = tuple[int | None, ...]

_BATCH, _ROWS = 512, 65536
_PRICES = 1e-9, 1e12  # of a change as large as the tolerance, in sizes of the network
_ROUNDS = 2


@dataclass(frozen=True)
class Allocation:
    """Ranks within a tolerance on the output, and what they cost.

    Attributes:
        ranks: One per layer; ``None`` where it stays dense.
        change: ||f'(X) - f(X)||_F / ||f(X)||_F with all layers at their ranks, as measured.
        alone: The same with this layer factored and no other.
        local: The relative error of the layer's own output (without bias) on its inputs in the dense network.
        silent: Which layers gave no output on the data, so that nothing is known of them.
    """

    ranks: Ranks
    change: float
    alone: tuple[float, ...]
    local: tuple[float, ...]
    silent: tuple[bool, ...]


def allocate(model: nn.Module, layers: Sequence[Layer], data: Data, tolerance: float, data_aware: bool) -> Allocation:
    """Finds ranks whose network changes its outputs on the data by at most the tolerance; sets the terms of the layers.

    Args:
        model: The network, in any mode; it is as before when this returns.
        layers: Those of its layers that may be factored.
        data: Inputs, or a tuple of inputs, samples first.
        tolerance: In (0, 1).
        data_aware: Cut the layers' outputs; else the weights themselves.

    Raises:
        UsageError: no samples, or outputs that are not one tensor, or all zero.
        NonFiniteError: a weight, an output, or what a layer gives is not finite.
    """
    network = Network(model, layers, data)
    with network.evaluating():
        local = _find_terms(network, data_aware)
        free = [k for k, layer in enumerate(layers) if layer.terms is not None]
        ranks = _lowered(network, free, tolerance, _priced(network, free, tolerance))
        found = [r if r is None else (k, r) for k, r in enumerate(ranks)]
        alone = tuple(0.0 if f is None else network.change(_only(len(layers), *f)) for f in found)
        errors = tuple(0.0 if f is None else float(local[f[0]][f[1] - 1]) for f in found)
        silent = tuple(layer.terms is None for layer in layers)
        return Allocation(ranks, network.change(ranks), alone, errors, silent)


# ---------------------------------------------------------------------- the network with some layers factored


@dataclass
class Network:
    """A network, its outputs on the data, and what becomes of them when layers are factored.

    Attributes:
        model: The network.
        layers: Those that may be factored.
        data: Inputs, samples first.
    """

    model: nn.Module
    layers: Sequence[Layer]
    data: Data
    _known: dict[Ranks, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._holder = nn.ModuleList([self.model])
        wanted = {id(m) for layer in self.layers for m in layer.modules}
        self._places = [
            (parent, short, child)
            for parent in list(self._holder.modules())
            for short, child in parent._modules.items()
            if child is not None and id(child) in wanted
        ]
        self._batches = _batches(self.data)
        self._reference: list[Tensor] = []
        self._norm = 0.0

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Within this context the network is in eval mode, without gradients, and its outputs are known."""
        modes = [(m, m.training) for m in self._holder.modules()]
        try:
            with torch.no_grad():
                self._holder.eval()
                self._reference = [self.run(batch).clone() for batch in self._batches]
                self._norm = math.sqrt(sum(_squared(r) for r in self._reference))
                if not math.isfinite(self._norm):
                    raise NonFiniteError("the outputs on the data hold NaN or infinities: look for them in the data")
                if self._norm == 0:
                    raise UsageError("the outputs on the data are all zero, so no change is a share of them")
                yield
        finally:
            self._put({})
            for module, training in modes:
                module.training = training

    def run(self, batch: tuple[Tensor, ...]) -> Tensor:
        """Returns the output of the network as it is now."""
        try:
            output = self._holder[0](*batch)
        except (RuntimeError, TypeError, ValueError, IndexError) as error:
            shapes = ", ".join(str(tuple(x.shape)) for x in batch)
            raise UsageError(f"the network cannot take data of shape {shapes}: {error}") from None
        if not isinstance(output, Tensor):
            raise UsageError(f"expected a network with one tensor as output, got {type(output).__name__}")
        return output

    def each(self) -> Iterator[Tensor]:
        """Runs all of the data."""
        return map(self.run, self._batches)

    def change(self, ranks: Ranks) -> float:
        """Returns ||f'(X) - f(X)||_F / ||f(X)||_F at these ranks; infinite where an output is not finite."""
        if ranks not in self._known:
            new: dict[int, Factorized] = {}
            for layer, rank in zip(self.layers, ranks, strict=True):
                new |= {} if rank is None else layer.factorized(rank)
            self._put(new)
            total = sum(_squared(output - before) for output, before in zip(self.each(), self._reference, strict=True))
            self._known[ranks] = math.sqrt(total) / self._norm if math.isfinite(total) else math.inf
        return self._known[ranks]

    def size(self, ranks: Ranks) -> int:
        """Returns the parameters of the layers at these ranks."""
        return sum(layer.parameters(r) for layer, r in zip(self.layers, ranks, strict=True))

    def _put(self, new: dict[int, Factorized]) -> None:
        for parent, short, child in self._places:
            setattr(parent, short, new.get(id(child), child))


def output_change(before: nn.Module, after: nn.Module, data: Data) -> float:
    """Returns ||f'(X) - f(X)||_F / ||f(X)||_F of the outputs of two networks on the same inputs, in eval mode.

    Raises:
        UsageError, NonFiniteError: as `groundstate.compress.compress` with ``output_tolerance``.
    """
    one, two = Network(before, [], data), Network(after, [], data)
    with one.evaluating(), two.evaluating():
        total = sum(_squared(b - a) for a, b in zip(one._reference, two._reference, strict=True))
        return math.sqrt(total) / one._norm


def _squared(x: Tensor) -> float:
    return float(torch.linalg.vector_norm(x, dtype=torch.float64).square()) if x.numel() else 0.0


def _batches(data: Any) -> list[tuple[Tensor, ...]]:
    inputs = data if isinstance(data, tuple) else (data,)
    if not inputs or not all(isinstance(x, Tensor) and x.ndim for x in inputs):
        raise UsageError("data must be a tensor of inputs, or a tuple of them, samples first")
    sizes = {len(x) for x in inputs}
    if len(sizes) != 1 or 0 in sizes:
        raise UsageError(f"data must have at least one sample, and as many in each tensor, got {sorted(sizes)}")
    return list(zip(*(x.split(_BATCH) for x in inputs), strict=True))


# ---------------------------------------------------------------------- what a rank does to its layer


def _find_terms(network: Network, data_aware: bool) -> list[Tensor]:
    """Sets the terms of every layer; returns the relative error of its output at the ranks 1, 2, ..., by layer."""
    moments = [_Moment.of(layer) for layer in network.layers]
    hooks = [
        module.register_forward_hook(partial(moment.add, channels=layer.weight.ndim - 1))
        for layer, moment in zip(network.layers, moments, strict=True)
        for module in layer.modules
    ]
    try:
        for _ in network.each():
            pass
    finally:
        for hook in hooks:
            hook.remove()
    return [moment.terms(layer, data_aware) for layer, moment in zip(network.layers, moments, strict=True)]


@dataclass
class _Moment:
    """The sum of z z^T over the outputs y of a layer without bias, z = Q^T y in a basis of the range of W if m > n."""

    basis: Tensor | None
    gram: Tensor

    @classmethod
    def of(cls, layer: Layer) -> _Moment:
        matrix = finite_matrix(layer.name, layer.weight).double()
        basis = torch.linalg.qr(matrix).Q if matrix.shape[0] > matrix.shape[1] else None
        k = min(matrix.shape)
        return cls(basis, matrix.new_zeros(k, k))

    def add(self, module: Any, inputs: Any, output: Tensor, *, channels: int) -> None:
        rows = output.movedim(-channels, -1).reshape(-1, output.shape[-channels])
        for part in rows.split(_ROWS):
            z = part.double() if module.bias is None else part.double() - module.bias.double()
            z = z if self.basis is None else z @ self.basis
            self.gram += z.mT @ z

    def terms(self, layer: Layer, data_aware: bool) -> Tensor:
        total = float(self.gram.trace())
        if not math.isfinite(total):
            raise NonFiniteError(f"the outputs of {layer.name!r} on the data hold NaN or infinities")
        if total == 0 or layer.largest == 0:
            return self.gram.new_zeros(0)
        if data_aware:
            values, axes = torch.linalg.eigh(self.gram)
            values, axes = values.flip(0).clamp_min(0), axes.flip(1)
            u = axes if self.basis is None else self.basis @ axes
            s, method = values.sqrt(), "data-aware svd"
        else:
            u, s, _ = svd(finite_matrix(layer.name, layer.weight))
            axes = u.double() if self.basis is None else self.basis.mT @ u.double()
            values, method = (axes * (self.gram @ axes)).sum(0), "svd"
        layer.terms = projected(layer.weight, u.to(working_dtype(layer.weight.dtype)), s, method)
        return (1 - values.cumsum(0) / total).clamp_min(0).sqrt()


# ---------------------------------------------------------------------- the ranks of all layers


def _only(layers: int, k: int, rank: int) -> Ranks:
    return tuple(rank if i == k else None for i in range(layers))


def _priced(network: Network, free: Sequence[int], tolerance: float) -> Ranks:
    """Returns the smallest network within the tolerance that one price for all layers gives, by bisection."""
    best: Ranks = (None,) * len(network.layers)
    options = {k: _options(network, k, tolerance) for k in free}
    whole = network.size(best)
    low, high = map(math.log, _PRICES)
    while high - low > 0.01:
        price = math.exp((low + high) / 2) * whole / tolerance**2
        ranks: list[int | None] = [None] * len(network.layers)
        for k, (counts, squares) in options.items():
            costs = counts * float(sum(network.layers[k].sides)) + price * squares
            if len(costs) and costs.min() < network.layers[k].parameters(None):
                ranks[k] = int(counts[costs.argmin()])
        tried = tuple(ranks)
        if network.change(tried) <= tolerance:
            high = (low + high) / 2
            best = min(best, tried, key=network.size)
        else:
            low = (low + high) / 2
    return best


def _options(network: Network, k: int, tolerance: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns ranks of a layer and the squared changes of the output they make alone, within the tolerance.

    Measured at ranks in steps of sqrt(2), geometric in between.
    """
    largest = network.layers[k].largest
    steps = range(2 * largest.bit_length() + 1)
    tried = sorted({max(1, round(largest * 2 ** (-j / 2))) for j in steps}, reverse=True)
    ranks: list[int] = []
    changes: list[float] = []
    for rank in tried:
        change = network.change(_only(len(network.layers), k, rank))
        if change > tolerance:
            break
        ranks.append(rank)
        changes.append(max(change, 1e-12 * tolerance))
    if not ranks:
        return np.empty(0), np.empty(0)
    counts = np.arange(ranks[-1], ranks[0] + 1)
    return counts, np.exp(2 * np.interp(counts, ranks[::-1], np.log(changes[::-1])))


def _lowered(network: Network, free: Sequence[int], tolerance: float, ranks: Ranks) -> Ranks:
    """Lowers one rank after another as far as the tolerance allows, those worth most parameters first."""

    def good(k: int, rank: int) -> bool:
        return network.change((*ranks[:k], rank, *ranks[k + 1 :])) <= tolerance

    for _ in range(_ROUNDS):
        before = ranks
        for k in sorted(free, key=lambda k: -sum(network.layers[k].sides)):
            here = ranks[k]
            high = network.layers[k].largest + 1 if here is None else here
            high = _first(partial(good, k), high)
            if high <= network.layers[k].largest:
                ranks = (*ranks[:k], high, *ranks[k + 1 :])
        if ranks == before:
            break
    return ranks


def _first(good: Callable[[int], bool], high: int) -> int:
    """Returns a small rank that is good, at most ``high``, which is: by bisection, if ``high - 1`` is good at all."""
    if high == 1 or not good(high - 1):
        return high
    low, high = 0, high - 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if good(middle) else (middle, high)
    return high
