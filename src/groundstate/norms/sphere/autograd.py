"""Autograd for values whose gradient is made in the forward pass.

Idea: a blocked kernel has no graph to differentiate. Its gradient by w is a by-product of its value, so the forward
pass keeps that one tensor and the backward pass multiplies it. A second derivative would need the Hessian of the
kernel: asking for it raises an error, where the first derivative taken as a constant would silently leave a term out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from groundstate.errors import UsageError

# (w, whether to make the gradient) -> (value and what comes with it, the gradient of the value by w)
Compute = Callable[[Tensor, bool], tuple[tuple[Tensor, ...], Tensor | None]]


def differentiable(w: Tensor, compute: Compute) -> tuple[Tensor, ...]:
    """Returns what ``compute`` returns for w; the first of it, ``(*batch,)``, is differentiable once by w.

    Raises:
        UsageError: in the backward pass, where a second derivative is asked for.
    """
    if not (isinstance(w, Tensor) and w.requires_grad and torch.is_grad_enabled()):
        with torch.no_grad():
            return compute(w, False)[0]
    made: Any = _Made.apply(w, compute)
    return made


class _Made(torch.autograd.Function):
    """Forward: value and gradient; backward: a product."""

    @staticmethod
    def forward(ctx: Any, w: Tensor, compute: Compute) -> tuple[Tensor, ...]:
        values, grad = compute(w, True)
        ctx.mark_non_differentiable(*values[1:])
        ctx.save_for_backward(w, grad)  # w only to be on the path of a second derivative
        return values

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        w, grad = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _Once.apply(outputs[0], grad, w), None
        return _scaled(outputs[0], grad), None


class _Once(torch.autograd.Function):
    """The first derivative, for ``create_graph=True``."""

    @staticmethod
    def forward(ctx: Any, upstream: Tensor, grad: Tensor, w: Tensor) -> Tensor:
        return _scaled(upstream, grad)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        raise UsageError(
            "this energy has no second derivative, its gradient is made in the forward pass: leave it out of gradient "
            "penalties and Hessian products, or write it for a small layer by its Gram matrix"
        )


def _scaled(upstream: Tensor, grad: Tensor) -> Tensor:
    return upstream[..., None, None].to(grad.dtype) * grad
