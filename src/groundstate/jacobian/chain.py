"""Closed form of the output Gram for chains of linear layers and elementwise activations: no autograd through J.

Along W_1, D_1, W_2, ..., W_L (D_l the slopes of the activation at the sample) the Jacobian is
J = W_L D_{L-1} W_{L-1} ... D_1 W_1, and for rows R ``(B, k, C)`` (the identity, probes, the slope of a softmax)::

    P_{L-1} = R W_L D_{L-1},   P_{l-1} = P_l W_l D_{l-1},   M = P_1 (W_1 W_1^T) P_1^T = (R J) (R J)^T

The wide factor W_1 enters through its Gram, once for the whole batch. Where the slopes are constant almost everywhere
(ReLU and its kin) M depends on the weights through the products alone, and its gradient is written out below: 3.5 times
the flops of a plain step at batch 128 in 784-128-128-10, where autograd through J needs 12. Smooth activations take
their true slopes, differentiated by autograd.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from groundstate.errors import UsageError
from groundstate.jacobian.function import Function
from groundstate.layers import Step, chain_steps
from groundstate.norms.spectral import working_dtype

_PIECEWISE = (
    nn.ReLU, nn.LeakyReLU, nn.ReLU6, nn.Hardtanh, nn.Threshold, nn.Softshrink, nn.Hardshrink, nn.Identity, nn.Dropout,
    nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Flatten,
)  # fmt: skip
_UNCHANGED = (nn.Identity, nn.Dropout, nn.AlphaDropout, nn.FeatureAlphaDropout, nn.Flatten)


@dataclass(frozen=True)
class Chain:
    """A chain of layers: the operations before, between and after the linear ones.

    Attributes:
        linear: The layers W_1, ..., W_L.
        between: ``L + 1`` groups of elementwise operations; group l stands before layer l + 1, the last one at the end.
        piecewise: Whether all slopes are constant almost everywhere and free of parameters.
    """

    linear: tuple[nn.Linear, ...]
    between: tuple[tuple[Step, ...], ...]
    piecewise: bool


def chain_of(run: Function) -> Chain:
    """Returns the chain that a frozen function is.

    Raises:
        UsageError: it is none; says why.
    """
    module = run.module
    if module is None:
        raise UsageError("f is no module")
    if hooked := [n or "the model" for n, m in module.named_modules() if m._forward_hooks or m._forward_pre_hooks]:
        raise UsageError(f"{hooked[0]!r} has forward hooks, which may change its output")
    steps = chain_steps(module)
    if run.on.startswith("output:"):
        raise UsageError("the output is not one tensor")
    if run.on not in ("logits", "probabilities", "loss"):
        steps = steps[: _place(steps, run.on) + 1]
    if run.start is not None:
        steps = steps[_place(steps, run.start[0]) + 1 :]
    linear = tuple(s.linear for s in steps if s.linear is not None)
    if not linear:
        raise UsageError("there is no linear layer between input and output")
    groups: list[list[Step]] = [[]]
    for step in steps:
        if step.linear is not None:
            groups.append([])
        else:
            groups[-1].append(step)
    piecewise = all(isinstance(s.run, _PIECEWISE) for group in groups for s in group)
    return Chain(linear, tuple(map(tuple, groups)), piecewise)


def _place(steps: list[Step], name: str) -> int:
    for i, step in enumerate(steps):
        if step.name == name:
            return i
    raise UsageError(f"{name!r} is no single step of the chain")


def output_and_slopes(chain: Chain, points: Tensor, differentiable: bool) -> tuple[Tensor, list[Tensor | None]]:
    """Returns the output ``(B, C)`` and, for each group, its slopes ``(B, width)``, or ``None`` where they are all one.

    Args:
        chain: The chain, in eval mode.
        points: ``(B, ...)``.
        differentiable: Keep the graph to the parameters; needed for smooth activations.
    """
    slopes: list[Tensor | None] = []
    with torch.set_grad_enabled(differentiable):
        h = points
        for i, group in enumerate(chain.between):
            h, slope = _through(group, h, differentiable)
            slopes.append(slope)
            if i < len(chain.linear):
                h = chain.linear[i](h.flatten(1))
    return h, slopes


def _through(group: tuple[Step, ...], z: Tensor, differentiable: bool) -> tuple[Tensor, Tensor | None]:
    acting = [s for s in group if not isinstance(s.run, _UNCHANGED)]
    if not acting:
        for step in group:
            z = step.run(z)
        return z, None
    if len(acting) == 1 and type(acting[0].run) is nn.ReLU:
        h = torch.relu(z)
        return h, (h > 0).to(h.dtype).flatten(1)
    with torch.enable_grad():
        leaf = z if differentiable and z.requires_grad else z.detach().requires_grad_()
        h = leaf.clone()  # what acts in place must not act on the leaf
        for step in group:
            h = step.run(h)
        (slope,) = torch.autograd.grad(h.sum(), leaf, create_graph=differentiable)
    return (h if differentiable else h.detach()), slope.flatten(1)


def gram(chain: Chain, slopes: list[Tensor | None], rows: Tensor | None = None) -> Tensor:
    """Returns (R J)(R J)^T, ``(B, k, k)``, or (R J)^T (R J), ``(B, n, n)``, where the input is the smaller side.

    Args:
        chain: The chain.
        slopes: Of `output_and_slopes`.
        rows: R, ``(B, k, C)``; ``None`` is the identity.

    Differentiable by weights, slopes and rows where these ask for it. Without any slopes and rows all samples have the
    same Jacobian, and B is 1.
    """
    weights = [m.weight for m in chain.linear]
    if (dtype := working_dtype(weights[0].dtype)) != weights[0].dtype:
        weights, slopes = [w.to(dtype) for w in weights], [None if s is None else s.to(dtype) for s in slopes]
        rows = None if rows is None else rows.to(dtype)
    *inner, last = slopes
    scale = None
    if last is not None and rows is not None:
        rows = rows * last[:, None, :]
    elif last is not None and weights[0].shape[1] < last.shape[1]:
        rows = torch.diag_embed(last)
    else:
        scale = last
    fixed = chain.piecewise and (rows is None or not rows.requires_grad)
    if fixed and torch.is_grad_enabled() and any(w.requires_grad for w in weights):
        m: Tensor = _Gram.apply(inner, rows, *weights)  # pyright: ignore[reportAssignmentType]
    else:
        m = _end(_products(inner, rows, weights)[-1], weights[0], inner[0])[0]
    return m if scale is None else scale[:, :, None] * m * scale[:, None, :]


def _products(slopes: list[Tensor | None], rows: Tensor | None, weights: Sequence[Tensor]) -> list[Tensor | None]:
    """Returns R, P_{L-1}, ..., P_1; ``None`` is the identity."""
    kept = [rows]
    for w, slope in zip(reversed(weights[1:]), reversed(slopes[1:]), strict=True):
        p = w if kept[-1] is None else kept[-1] @ w
        kept.append(p if slope is None else p * slope[:, None, :])
    return kept


def _end(p: Tensor | None, w: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns M with what it was formed of: Q = P_1 W_1 W_1^T, or the rows of the Jacobian where that is cheaper."""
    width, n = w.shape
    height = width if p is None else p.shape[-2]
    count = 0 if p is None else p.shape[:-1].numel()
    if first is None and n >= height and count * n >= count * width + width * n:
        g = w @ w.mT
        q = g if p is None else p @ g
        return _with_batch(q if p is None else q @ p.mT), q, None
    j = w if p is None else p @ w
    j = j if first is None else j * first[:, None, :]
    return _with_batch(j.mT @ j if n < height else j @ j.mT), None, j


def _with_batch(m: Tensor) -> Tensor:
    return m if m.ndim == 3 else m[None]


class _Gram(torch.autograd.Function):
    """M with its gradient written out, for slopes and rows that do not depend on the weights."""

    @staticmethod
    def forward(ctx: Any, slopes: list[Tensor | None], rows: Tensor | None, *weights: Tensor) -> Tensor:
        kept = _products(slopes, rows, weights)
        m, ctx.q, ctx.j = _end(kept[-1], weights[0], slopes[0])
        ctx.slopes, ctx.kept = slopes, kept
        ctx.save_for_backward(*weights)
        return m

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        weights, kept, slopes = ctx.saved_tensors, ctx.kept, ctx.slopes
        s = outputs[0] + outputs[0].mT
        grads: list[Tensor | None] = [None] * len(weights)
        p, w = kept[-1], weights[0]
        dp = None
        if ctx.q is not None:
            grads[0] = (s.sum(0) if p is None else _outer(p, s @ p)) @ w
            dp = s @ ctx.q
        else:
            dj = ctx.j @ s if ctx.j.shape[-1] < ctx.j.shape[-2] else s @ ctx.j
            dj = dj if slopes[0] is None else dj * slopes[0][:, None, :]
            grads[0] = _outer(p, dj)
            dp = dj @ w.mT if len(weights) > 1 else dj
        for i in range(1, len(weights)):
            da = dp if slopes[i] is None else dp * slopes[i][:, None, :]
            p = kept[-1 - i]
            grads[i] = _outer(p, da)
            dp = da @ weights[i].mT if i < len(weights) - 1 else da
        return (None, None, *grads)


def _outer(a: Tensor | None, b: Tensor) -> Tensor:
    """Returns the sum of a^T b over batch and rows; ``None`` is the identity, and either may lack the batch."""
    if a is None or a.ndim < b.ndim:
        b = b.sum(0) if b.ndim == 3 else b
        return b if a is None else a.mT @ b
    if b.ndim < a.ndim:
        return a.sum(0).mT @ b
    return a.flatten(0, -2).mT @ b.flatten(0, -2)
