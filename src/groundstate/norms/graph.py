"""The graph energy of a layered network: sum |eigenvalues| of the adjacency of its weighted neuron graph.

Idea: the neurons of all layers are the nodes of one undirected graph, the weights its edges. W_1..W_L, W_l of shape
(d_l, d_{l-1}) as torch stores them, make a symmetric block-tridiagonal adjacency A over d_0 + ... + d_L nodes. Layers
of even and odd number color the graph with two colors, so A = [[0, B], [B^T, 0]] and::

    E = sum_i |lambda_i(A)| = 2 ||B||_*,        dE/dB = 2 B (B^T B)^{-1/2}

With M = B or B^T, whichever has fewer columns, M^T M is block tridiagonal and small, its blocks are products of single
weights, and the gradient is needed on the edges only. One eigendecomposition of the smaller color class therefore gives
value and gradient exactly, without A or B; of deep networks, partial fractions do (`groundstate.norms.staircase`).
Networks with skip connections are in `groundstate.norms.dag`.

On the kernel the minimal-norm subgradient is taken: singular values up to max(shape of B) * eps * sigma_1 count as zero
in the gradient, with eps that of float64 for float64 weights and that of float32 otherwise.

Reference: I. Gutman, "The energy of a graph" (1978); V. Nikiforov, "The energy of graphs and matrices" (2007), for
E(A) = ||A||_*.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.dag import adjacency_energy as adjacency_energy
from groundstate.norms.dag import promoted, refuse_nonfinite, sum_above_kernel, working
from groundstate.norms.staircase import Blocks, Staircase, inner, inverse_root, selected_inverse, spans, staircase

# A Gram matrix formed with rounding eps moves the polar factor by about eps * sigma_1^2 * rms(1 / sigma_i^2), relative
# to its own norm: a route is left when this estimate is above its bound. Measured errors were 0.15 to 0.4 of the
# estimate from 2e-6 up (initialized and trained networks), so float32 results stay within 1e-5. The bound on the
# product M Z is on eps * sigma_1 * rms(1 / sigma_i); its measured errors were 0.05 to 0.6 of that.
_TRUST_SINGLE = 2e-5
_TRUST_PERRON = 3.5e-5  # a float64 Gram rounded to float32: at most 0.25 of the estimate from 2e-5 up
_TRUST_DOUBLE = 1e-11
_TRUST_DOUBLE_FOR_SINGLE = 1e-6
_TRUST_PRODUCT = 3e-5

# Partial fractions of a float32 Gram are more accurate: measured errors were 0.01 to 0.06 of the estimate from 2e-5 up.
_TRUST_POLES = 1.5e-4
# They are faster beyond these depths (`Staircase.depth`): by a float32 Gram, by a float64 Gram for float32 results with
# half as many poles as for float64 results.
_DEEP_SINGLE, _DEEP_REDONE, _DEEP_DOUBLE = 16.0, 40.0, 80.0
# Relative error of the partial fractions, by the dtype of the weights.
_POLE_ERROR = {torch.float32: 1e-7, torch.float64: 1e-13}
# Power iterations with nonnegative layers; measured gaps lambda_2 / lambda_1 are 0.02 to 0.1.
_POWER_STEPS = 8


def node_sizes(layers: Sequence[Tensor]) -> list[int]:
    """Returns d_0, d_1, ..., d_L after checking that the matrices follow one another.

    Raises:
        UsageError: no layer, a layer that is not a real floating matrix, or two layers that do not fit.
    """
    if len(layers) == 0:
        raise UsageError("the graph energy needs at least one layer, got an empty list: pass [W_1, ..., W_L]")
    for number, w in enumerate(layers, 1):
        if not isinstance(w, Tensor) or w.ndim != 2 or not w.is_floating_point():
            what = f"{tuple(w.shape)} {w.dtype}" if isinstance(w, Tensor) else type(w).__name__
            raise UsageError(f"layer {number} must be a real floating matrix (out, in), got {what}")
    sizes = [layers[0].shape[1]]
    for number, w in enumerate(layers, 1):
        if w.shape[1] != sizes[-1]:
            raise UsageError(
                f"layers {number - 1} and {number} do not fit: layer {number - 1} of shape "
                f"{tuple(layers[number - 2].shape)} has {sizes[-1]} outputs, layer {number} of shape {tuple(w.shape)} "
                f"takes {w.shape[1]} inputs; give the weights (out, in) in the order of the forward pass"
            )
        sizes.append(w.shape[0])
    return sizes


def adjacency(layers: Sequence[Tensor]) -> Tensor:
    """Returns the dense symmetric adjacency over d_0 + ... + d_L nodes, in layer order.

    Args:
        layers: W_1..W_L, W_l of shape ``(d_l, d_{l-1})``.

    Returns:
        ``(N, N)``, N = sum of d_l, in the promoted dtype of the layers; differentiable. Memory N^2: for reference and
        small networks.

    >>> adjacency([torch.tensor([[2.0, 3.0]])])
    tensor([[0., 0., 2.],
            [0., 0., 3.],
            [2., 3., 0.]])
    """
    sizes = node_sizes(layers)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    a = torch.zeros(ends[-1], ends[-1], dtype=promoted(layers), device=layers[0].device)
    for layer, w in enumerate(layers, 1):
        middle = ends[layer - 1]
        source, target = slice(middle - sizes[layer - 1], middle), slice(middle, ends[layer])
        a[target, source] = w.to(a.dtype)
        a[source, target] = w.to(a.dtype).mT
    return a


def biadjacency(layers: Sequence[Tensor]) -> Tensor:
    """Returns the dense block staircase B of shape (nodes of even layers, nodes of odd layers); differentiable."""
    sizes = node_sizes(layers)
    b = torch.zeros(sum(sizes[::2]), sum(sizes[1::2]), dtype=promoted(layers), device=layers[0].device)
    places = spans(tuple(sizes))
    for layer, w in enumerate(layers, 1):
        if layer % 2:
            b[places[layer - 1], places[layer]] = w.mT.to(b.dtype)
        else:
            b[places[layer], places[layer - 1]] = w.to(b.dtype)
    return b


def energy(layers: Sequence[Tensor], absolute: bool = False) -> Tensor:
    """Returns E = 2 ||B||_* as a differentiable scalar, by a singular value decomposition of the dense B.

    Args:
        layers: W_1..W_L, W_l of shape ``(d_l, d_{l-1})``.
        absolute: Take |W_l| in place of W_l: the energy of the graph with nonnegative weights.

    Returns:
        A scalar, float64 where a layer is float64, else float32. Cost of one thin SVD of B; `energy_and_grad` is the
        fast way.

    Raises:
        UsageError: the layers do not make a network.
        NonFiniteError: a weight is NaN or infinite; the layer is named.

    One edge of weight 3 has eigenvalues +3 and -3:

    >>> energy([torch.tensor([[-3.0]])])
    tensor(6.)
    """
    b = biadjacency(layers)
    b = b.to(working(b.dtype))
    if not bool(b.detach().isfinite().all()):
        refuse_nonfinite(layers)
    if b.numel() == 0:
        return 2 * b.sum()
    sigma = torch.linalg.svdvals(b.abs() if absolute else b)
    return 2 * sum_above_kernel(sigma, max(b.shape) * torch.finfo(b.dtype).eps)


def energy_and_grad(layers: Sequence[Tensor], absolute: bool = False) -> tuple[Tensor, list[Tensor]]:
    """Returns E and dE/dW_l for every layer, in closed form and without an autograd graph.

    Float32 weights: float32 Gram where that is good to 1e-5, else float64 Gram. Float64 weights: float64 Gram where
    every singular value is well above its noise, else SVD of the dense B, so that value and gradient keep full accuracy
    in rank-deficient networks. Deep networks: partial fractions of the Gram's blocks, where G is far from singular.

    Args:
        layers: W_1..W_L, W_l of shape ``(d_l, d_{l-1})``; any scale; bfloat16 and half are computed in float32.
        absolute: Take |W_l| in place of W_l. The gradient is sign(W_l) times the gradient at |W_l|, zero where w = 0.

    Returns:
        The scalar E (float64 or float32) and the minimal-norm subgradient per layer, in each layer's shape and dtype.

    Raises:
        UsageError: the layers do not make a network.
        NonFiniteError: a weight is NaN or infinite (the layer is named), or E overflows its dtype.

    Cost: one ``eigh`` of size n, the nodes of the smaller color class, and about 4 d_l d_{l-1} n_l flops per layer; of
    a deep network about 15 times the inverses and 5 products of its n_l x n_l blocks.

    >>> energy_and_grad([torch.tensor([[-3.0]])])
    (tensor(6.), [tensor([[-2.]])])
    """
    found = _found(layers, absolute, spectrum=False)
    return found.value, found.grads


def energy_grad_and_spectrum(layers: Sequence[Tensor], absolute: bool = False) -> tuple[Tensor, list[Tensor], Tensor]:
    """Returns E, dE/dW_l for every layer, and the singular values of B, so that E can be bounded around the layers.

    The eigenvalues of the adjacency are these singular values, their negatives, and zeros.

    Args:
        layers: As of `energy_and_grad`.
        absolute: As of `energy_and_grad`; the singular values are those of the nonnegative weights.

    Returns:
        E and the gradients as `energy_and_grad` gives them, and the min(shape of B) singular values in descending
        order, in the dtype of E, each to about 1e-5 (float64: 1e-8) of the largest; E is twice their sum.

    Raises:
        UsageError: the layers do not make a network.
        NonFiniteError: a weight is NaN or infinite (the layer is named), or E overflows its dtype.

    Cost: as of `energy_and_grad`; in deep networks an ``eigvalsh`` of all n nodes in float64 more.

    >>> energy_grad_and_spectrum([torch.tensor([[0.0, -3.0], [4.0, 0.0]])])[2]
    tensor([4., 3.])
    """
    found = _found(layers, absolute, spectrum=True)
    sigma = torch.zeros_like(found.value)[None] if found.sigma is None else found.sigma
    return found.value, found.grads, sigma


def _found(layers: Sequence[Tensor], absolute: bool, spectrum: bool) -> _Found:
    task = _Task(staircase(tuple(node_sizes(layers))), absolute, spectrum)
    with torch.no_grad():
        dtype = working(promoted(layers))
        work = [w.detach().to(dtype) for w in layers]
        found = _at_any_scale([w.abs() for w in work] if absolute else work, layers, task)
        grads = [g.mul_(w.sign()) for g, w in zip(found.grads, work)] if absolute else found.grads
        return _Found(found.value, [g.to(w.dtype) for g, w in zip(grads, layers)], found.sigma)


@dataclass(frozen=True)
class _Found:
    """What a route gives: E, the gradients, and the singular values of B where they were asked for."""

    value: Tensor
    grads: list[Tensor]
    sigma: Tensor | None

    def to(self, dtype: torch.dtype) -> _Found:
        sigma = None if self.sigma is None else self.sigma.to(dtype)
        return _Found(self.value.to(dtype), [g.to(dtype) for g in self.grads], sigma)


@dataclass(frozen=True)
class _Task:
    """What every route is told: where the layers stand, whether they are nonnegative, and what is asked for."""

    plan: Staircase
    absolute: bool
    spectrum: bool


def _at_any_scale(work: list[Tensor], layers: Sequence[Tensor], task: _Task) -> _Found:
    """Weights whose squares leave the dtype's range are scaled by a power of two and back."""
    result = _by_best_route(work, task)
    if result is not None:
        return result
    refuse_nonfinite(layers)
    largest = max((float(w.abs().max()) for w in work if w.numel()), default=0.0)
    if largest == 0.0:
        zero = work[0].new_zeros(task.plan.small_side)
        return _Found(zero.sum(), [torch.zeros_like(w) for w in work], zero)
    limit = 1000 if work[0].dtype == torch.float64 else 120
    scale = 2.0 ** max(-limit, min(limit, -math.frexp(largest)[1]))
    result = _by_best_route([w * scale for w in work], task)
    if result is None or not bool((result.value / scale).isfinite()):
        raise NonFiniteError(
            f"the graph energy overflows {work[0].dtype} (largest weight {largest:.3g}): scale it down"
        )
    return _Found(result.value / scale, result.grads, None if result.sigma is None else result.sigma / scale)


def _by_best_route(work: list[Tensor], task: _Task) -> _Found | None:
    """Takes the cheapest route that is accurate enough, or None where the weights need scaling (or are not finite)."""
    plan, info, double = task.plan, torch.finfo(work[0].dtype), work[0].dtype == torch.float64
    tolerance = plan.long_side * info.eps

    def comfortable(total: float) -> bool:  # tr G = ||B||_F^2: every weight enters, so NaN and infinity show
        return 1e6 * info.tiny / info.eps < total < 1e-6 * info.max

    # Nonnegative weights have one eigenvalue far above the rest (Perron), out of reach of a float32 Gram.
    if not double and not task.absolute:
        gram, result = plan.gram(work), None
        if not comfortable(float(gram.trace())):
            return None
        if plan.depth > _DEEP_SINGLE:
            result = _by_poles(work, gram, task, 0.0, _TRUST_POLES)
        elif _promising(gram, _TRUST_SINGLE):
            result = _by_gram(work, gram, task, 0.0, _TRUST_SINGLE)
        if result is not None:
            return result
    exact, result = [w.double() for w in work], None
    gram = plan.gram(exact)
    if not comfortable(float(gram.trace())):
        return None
    if double:
        if plan.depth > _DEEP_DOUBLE:
            result = _by_poles(work, gram, task, tolerance, _TRUST_DOUBLE)
        return result or _by_gram(work, gram, task, 0.0, _TRUST_DOUBLE) or _by_svd(work, tolerance)
    if plan.depth > _DEEP_REDONE:
        result = _by_poles(work, gram, task, tolerance, _TRUST_DOUBLE_FOR_SINGLE)
    elif task.absolute and plan.depth <= _DEEP_SINGLE:
        result = _without_perron(work, gram, task, tolerance)
    result = result or _by_gram(work, gram, task, tolerance, _TRUST_DOUBLE_FOR_SINGLE) or _by_svd(exact, tolerance)
    return result.to(work[0].dtype)


def _promising(gram: Tensor, trust: float) -> bool:
    """Says whether a float32 Gram may do, so that few eigendecompositions are thrown away (at a tenth of their cost).

    lambda_max is at least the largest G_ii, the mean of 1 / lambda at least that of 1 / L_ii^2: what is refused here
    `_by_gram` would refuse too.
    """
    factor, failed = torch.linalg.cholesky_ex(gram)
    if int(failed):
        return False
    inverse = float(factor.diagonal().reciprocal().norm()) ** 2 / gram.shape[0]
    return torch.finfo(gram.dtype).eps * float(gram.diagonal().max()) * inverse < trust


def _by_gram(work: list[Tensor], gram: Tensor, task: _Task, tolerance: float, trust: float) -> _Found | None:
    """Closed form by the Gram's eigendecomposition, or None where rounding in the Gram would show in the result.

    Args:
        work: The layers; they may be float32 with a float64 Gram.
        gram: Lower triangle of M^T M.
        task: What to do.
        tolerance: Singular values up to tolerance * sigma_1 are kernel; 0: there must be none.
        trust: Bound on the estimated relative error of the gradient.
    """
    lam, vectors = torch.linalg.eigh(gram)
    smallest, largest = float(lam[0]), float(lam[-1])
    kernel = 0
    if smallest <= tolerance**2 * largest:
        if tolerance == 0.0:
            return None
        kernel = int((lam <= tolerance**2 * largest).sum())
    kept = lam[kernel:]
    rms = float(kept.reciprocal().norm()) / math.sqrt(kept.shape[0])
    if torch.finfo(gram.dtype).eps * largest * rms > trust:
        return None
    sigma = lam.clamp_min(0).sqrt()
    half = vectors[:, kernel:] * (2 / sigma[kernel:]).sqrt()
    z = task.plan.split(half @ half.mT)
    grads = _product(work, z, task.plan, largest * kept.reciprocal().mean())
    return _Found(2 * sigma.sum(), grads, sigma.flip(0))


def _product(work: list[Tensor], z: Blocks, plan: Staircase, condition: Tensor | float) -> list[Tensor]:
    """The gradients from the blocks of Z = 2 G^{-1/2}, where Z may be float64 and the layers float32.

    The product M Z may stay in float32 at condition numbers where the Gram may not: its error has 1 / sigma once.
    """
    single, double = work[0].dtype, z[0][0].dtype
    if single == double:
        return plan.gradients(work, *z)
    if torch.finfo(single).eps * math.sqrt(float(condition)) < _TRUST_PRODUCT:
        return plan.gradients(work, [b.to(single) for b in z[0]], [b.to(single) for b in z[1]])
    return plan.gradients([w.to(double) for w in work], *z)


def _without_perron(work: list[Tensor], gram: Tensor, task: _Task, tolerance: float) -> _Found | None:
    """Closed form by a float32 eigendecomposition of a float64 Gram without its largest eigenvalue, or None.

    For nonnegative layers: the power iteration starts at their Perron vector, nearly, and the gap is wide. What is left
    of G has an ordinary condition number. The eigenvalue is moved into the middle of the others, not to zero.
    """
    n, total = gram.shape[0], gram.trace()
    if n < 2:
        return None
    full = gram.tril().add_(gram.tril(-1).mT).div_(total)
    x = full.sum(0)
    for _ in range(_POWER_STEPS):
        x = full @ x
    x = x / x.norm()
    image = full @ x
    top = float(x @ image)
    error, middle = float((image - top * x).norm()), (1 - top) / (n - 1)
    rest = full.addr(x, x, alpha=middle - top).float()
    if not _promising(rest, _TRUST_PERRON):
        return None
    lam, vectors = torch.linalg.eigh(rest)
    rms = float(lam.reciprocal().norm()) / math.sqrt(n)
    wrong = (torch.finfo(lam.dtype).eps * float(lam[-1]) + error) * rms
    if not (float(lam[0]) > tolerance**2 * top and wrong < _TRUST_PERRON):
        return None
    half = vectors * (2 / lam.sqrt()).sqrt()
    root, x = math.sqrt(float(total)), x.float()
    z = (half @ half.mT).addr_(x, x, alpha=2 / math.sqrt(top) - 2 / math.sqrt(middle)).div_(root)
    sigma = lam.double().sqrt()
    sigma[int((lam - middle).abs().argmin())] = math.sqrt(top)
    sigma = root * sigma.sort(descending=True).values
    return _Found(2 * sigma.sum(), task.plan.gradients(work, *task.plan.split(z)), sigma)


def _by_poles(work: list[Tensor], gram: Tensor, task: _Task, tolerance: float, trust: float) -> _Found | None:
    """Closed form by partial fractions on the blocks of the Gram; arguments and result as of `_by_gram`."""
    blocks = task.plan.split(gram)
    for block in blocks[0]:
        block.copy_(block.tril() + block.tril(-1).mT)
    inverse = selected_inverse(*blocks)
    if inverse is None:
        return None
    # The trace of G^-1 bounds 1 / lambda_min, and ||G||_F bounds lambda_max; ||G||_F^2 / tr G is nearer, from below.
    trace, square = float(sum(d.trace() for d in inverse[0])), float(inner(blocks, blocks))
    largest, rms = 2 * square / float(gram.trace()), math.sqrt(float(inner(inverse, inverse)) / gram.shape[0])
    eps = torch.finfo(gram.dtype).eps
    if not (trace * math.sqrt(square) * max(tolerance, eps) ** 2 < 1 and eps * largest * rms < trust):
        return None
    z = inverse_root(*blocks, 1 / trace, math.sqrt(square), _POLE_ERROR[work[0].dtype])
    if z is None:
        return None
    value = 2 * inner(blocks, z)
    grads = _product(work, z, task.plan, largest * trace / gram.shape[0])
    sigma = None
    if task.spectrum:
        exact = task.plan.gram([w.double() for w in work])
        sigma = torch.linalg.eigvalsh(exact).clamp_min(0).sqrt().flip(0).to(gram.dtype)
    return _Found(value, [g.mul_(2) for g in grads], sigma)


def _by_svd(work: list[Tensor], tolerance: float) -> _Found:
    """Singular values and gradient by a thin SVD of the dense B."""
    b = biadjacency(work)
    u, sigma, vh = torch.linalg.svd(b, full_matrices=False)
    rank = int((sigma > tolerance * sigma[0]).sum())
    polar = 2 * (u[:, :rank] @ vh[:rank])
    places = spans(tuple(node_sizes(work)))
    grads = [
        polar[places[layer - 1], places[layer]].mT if layer % 2 else polar[places[layer], places[layer - 1]]
        for layer in range(1, len(places))
    ]
    return _Found(2 * sigma.sum(), [g.contiguous() for g in grads], sigma)
