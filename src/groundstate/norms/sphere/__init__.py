"""The hyperspherical energy: how strongly the directions of neurons repel one another on the unit sphere.

Idea: with u_i = w_i / ||w_i||, r_ij = ||u_i - u_j|| and f_s(r) = r^-s, f_0(r) = -log r::

    E_s = mean over pairs i < j of f_s(r_ij),
    dE/dw_i = (I - u_i u_i^T) 2 / (N (N - 1)) sum_{j != i} h'(u_i . u_j) u_j / ||w_i||,    h(c) = f_s(sqrt(2 - 2 c))

Low energy means well-spread neurons. In the half-space form each neuron stands for the line through it, and the points
are the 2N vectors u_i, -u_i. Their energy needs no 2N x 2N matrix: with r+ the distance to the antipode::

    E = [ sum_{i != j} (f(r_ij) + f(r+_ij)) + N f(2) ] / (N (2N - 1))

The energy of s = 0 is -log r, half of the -log r^2 of the authors' code. Angular energies take the angle, between 0 and
pi, in place of r. All are invariant under a common rotation and under positive scaling of single neurons; so gradients
go as 1 / ||w_i||, and weight decay silently raises the effective step of small neurons.

Reference: W. Liu et al., "Learning towards Minimum Hyperspherical Energy" (2018); H. Cohn, A. Kumar, "Universally
optimal distribution of points on spheres" (2007), for ground states.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.spectral import refuse_nonfinite, working_dtype
from groundstate.norms.sphere.autograd import differentiable
from groundstate.norms.sphere.blocks import pair_sums
from groundstate.norms.sphere.directions import (
    Directions,
    by_weights,
    checked,
    directions,
    directions_but_zeros,
    zero_rows,
)
from groundstate.norms.sphere.law import Law, law
from groundstate.norms.sphere.parallel import Progress

OnZero = Literal["error", "exclude"]

# Above this s float32 loses too many digits, (s / 2) eps / r^2, and overflows at pairs that are not even near. Below
# this N^2 d float64 is free, and one pair weighs too much for float32.
_LARGEST_SINGLE = 8
_SMALL = 2**20


def energy(
    w: Tensor,
    s: float = 1.0,
    *,
    half_space: bool = False,
    angular: bool = False,
    on_zero: OnZero = "error",
    on_duplicate: Literal["clip", "error"] = "clip",
    r_min: float = 1e-6,
    progress: Progress | None = None,
) -> Tensor:
    """Returns the mean energy of pairs of neurons, ``(*batch,)``; autograd differentiates it once.

    Args:
        w: Neurons in rows, ``(*batch, N, d)``, at any scale; a convolution as ``(out, in * kh * kw)``, no bias. Half
            precision is computed in float32; small layers and s > 8 in float64.
        s: Exponent of r^-s; 0 is -log r.
        half_space: Count each neuron's opposite too. For hidden layers: in an output layer opposite classes are not
            redundant.
        angular: Take angles in place of distances.
        on_zero: Neurons that are exactly zero have no direction: ``"error"``, or ``"exclude"`` them from the mean (with
            gradient zero; `zero_neurons` counts them).
        on_duplicate: Pairs closer than r_min (in half-spaces also to the antipode): ``"clip"`` them at the energy of
            r_min with gradient zero (`duplicates` counts them), or ``"error"``.
        r_min: Smallest distance that counts, in (0, 0.5].
        progress: Called as ``progress(pairs of blocks done, all of them)`` in the calling thread.

    Returns:
        float64 for float64 w, float32 otherwise; added up in float64 over the rows of blocks, and the same to the last
        bit for any number of threads. Its second derivative raises `UsageError`.

    Raises:
        UsageError: N < 2, d < 2, a parameter out of range, zero neurons or duplicates where they are refused.
        NonFiniteError: w holds NaN or infinity, or the result overflows.

    Cost: N^2 d flops, with a gradient 3 N^2 d, on ``torch.get_num_threads()`` threads; memory for 2 N d numbers and a
    few blocks a thread. Angles add the arc tangent of each cosine.

    Three orthogonal neurons, r = sqrt(2):

    >>> energy(torch.eye(3), s=2)
    tensor(0.5000)
    """
    rule = law(s, half_space, angular, on_duplicate, r_min)
    return differentiable(w, lambda x, gradient: _mean(x, rule, on_zero, gradient, progress))[0]


def energy_and_grad(
    w: Tensor,
    s: float = 1.0,
    *,
    half_space: bool = False,
    angular: bool = False,
    on_zero: OnZero = "error",
    on_duplicate: Literal["clip", "error"] = "clip",
    r_min: float = 1e-6,
    progress: Progress | None = None,
) -> tuple[Tensor, Tensor]:
    """Returns the energy, ``(*batch,)``, and its gradient, ``(*batch, N, d)`` in the dtype of w, without a graph.

    Arguments, errors and cost as of `energy`.

    Two neurons at a right angle: 1 / r = 2^-1/2, h'(0) = 2^-3/2 along the other, over the norm:

    >>> value, grad = energy_and_grad(torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
    >>> value
    tensor(0.7071)
    >>> grad
    tensor([[0.0000, 0.3536],
            [0.1768, 0.0000]])
    """
    rule = law(s, half_space, angular, on_duplicate, r_min)
    with torch.no_grad():
        (value,), grad = _mean(w, rule, on_zero, True, progress)
    return value, grad


def zero_neurons(w: Tensor) -> Tensor:
    """Returns how many neurons are exactly zero, ``(*batch,)``: what ``on_zero="exclude"`` leaves out.

    >>> zero_neurons(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
    tensor(1)
    """
    return zero_rows(w).sum(-1)


def duplicates(w: Tensor, *, half_space: bool = False, on_zero: OnZero = "error", r_min: float = 1e-6) -> Tensor:
    """Returns how many pairs are closer than r_min, ``(*batch,)``: what ``on_duplicate="clip"`` holds there.

    Arguments and errors as of `energy`, and the cost of its value.

    >>> duplicates(torch.tensor([[1.0, 0.0], [2.0, 0.0], [-1.0, 0.0]]))
    tensor(1)
    """
    rule = law(0.0, half_space, r_min=r_min)
    with torch.no_grad():
        counts = [pair_sums(of, rule, False).clipped for of in _parts(checked(w), rule, on_zero)]
    return torch.cat(counts).reshape(w.shape[:-2])


def pair_mean(total: Tensor, count: int, rule: Law) -> Tensor:
    """Returns the mean over ordered pairs from sums over them; in a half-space the antipodes join."""
    if rule.half_space:
        return (total + count * rule.antipodal) / (count * (2 * count - 1))
    return total / (count * (count - 1))


def pair_weight(count: int, rule: Law) -> float:
    """Returns the derivative of `pair_mean` by the total."""
    return 1 / (count * ((2 * count if rule.half_space else count) - 1))


def dtype_for(w: Tensor, s: float) -> torch.dtype:
    """Returns the dtype that cosines are computed in."""
    count, d = w.shape[-2:]
    return torch.float64 if s > _LARGEST_SINGLE or count**2 * d <= _SMALL else working_dtype(w.dtype)


def finite(x: Tensor, what: str, rule: Law) -> Tensor:
    """Returns x.

    Raises:
        NonFiniteError: x holds NaN or infinity.
    """
    if not bool(x.sum().isfinite()) and not bool(x.isfinite().all()):
        raise NonFiniteError(
            f"the {what} of the hyperspherical energy with s = {rule.s:g} overflows {x.dtype}: neurons nearly coincide "
            "or are tiny; use float64 weights or a smaller s, or draw such neurons anew"
        )
    return x


def _mean(
    w: Tensor, rule: Law, on_zero: OnZero, gradient: bool, progress: Progress | None
) -> tuple[tuple[Tensor], Tensor]:
    """Returns the value in a tuple and the gradient (empty unless asked for)."""
    flat = checked(w)
    values, grads = [], []
    for of in _parts(flat, rule, on_zero):
        count = of.u.shape[-2]
        sums = pair_sums(of, rule, gradient, progress)
        values.append(pair_mean(2 * sums.f, count, rule))
        if sums.gradient is not None:
            grad = by_weights(sums.gradient, of, 2 * pair_weight(count, rule))
            if of.numbers is not None:
                grad = torch.zeros_like(flat[:1]).index_copy_(1, of.numbers, grad)
            grads.append(finite(grad, "gradient", rule))
    value = finite(torch.cat(values).reshape(w.shape[:-2]).to(working_dtype(w.dtype)), "value", rule)
    if not gradient:
        return (value,), w.new_empty(0)
    return (value,), (grads[0] if len(grads) == 1 else torch.cat(grads)).reshape(w.shape)


def _parts(flat: Tensor, rule: Law, on_zero: OnZero) -> Iterator[Directions]:
    """Yields the directions of all groups at once or, where zero neurons are left out, of one group after another."""
    if on_zero not in ("error", "exclude"):
        raise UsageError(f"on_zero must be 'error' or 'exclude', got {on_zero!r}")
    dtype = dtype_for(flat, rule.s)
    made, zeros = (directions(flat, dtype), 0) if on_zero == "error" else directions_but_zeros(flat, dtype)
    if not zeros:
        yield made
        return
    zero = zero_rows(flat)
    refuse_nonfinite(flat)
    for k in range(flat.shape[0]):
        kept = (~zero[k]).nonzero()[:, 0]
        if kept.shape[0] < 2:
            raise UsageError(
                f"only {kept.shape[0]} of {flat.shape[1]} neurons are not zero: a mean over pairs needs 2 of them"
            )
        yield directions(flat[k : k + 1, kept], dtype)._replace(numbers=kept)
