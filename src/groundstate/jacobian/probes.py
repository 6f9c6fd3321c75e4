"""Unbiased estimates of ||J||_F^2 per sample from a few random directions, each with its own generator.

With u uniform on the sphere of the output space and v Gaussian in the input space::

    C ||J^T u||^2 (vjp),     ||J v||^2 (jvp),     ||f(x + sigma v) - f(x)||^2 / sigma^2 (fd)

all have the mean ||J||_F^2 (fd: up to O(sigma^2), O(sigma) at kinks). Several vjp probes are orthonormal, exact at C of
them. Variance with M = J J^T: 2 (C tr M^2 - (tr M)^2) / (C + 2) for one vjp probe, 2 tr M^2 for the others.

Which one to train with is decided by the noise of the *gradient*: jvp and fd probes live in the input space, which has
far more directions than the output space of a classifier, and at the kinks of ReLU networks the gradient noise of fd
grows like 1/sigma. So vjp where there is a second derivative, jvp where only forward mode has one, fd as the last
resort.

References: M. Hutchinson, "A stochastic estimator of the trace" (1989); J. Hoffman, D. Roberts, S. Yaida, "Robust
learning with Jacobian regularization" (2019); the fd form: C. Scarvelis, J. Solomon, "Nuclear norm regularization for
deep learning" (2024), theorem 3.2.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from groundstate.errors import UsageError
from groundstate.jacobian import exact
from groundstate.jacobian.function import Function
from groundstate.jacobian.plan import plan_for
from groundstate.norms.spectral import working_dtype

ESTIMATORS = ("auto", "vjp", "jvp", "fd")


def squared_norms(
    run: Function,
    points: Tensor,
    *,
    generator: torch.Generator,
    estimator: str = "auto",
    probes: int = 1,
    sigma: float = 1e-2,
    differentiable: bool = False,
) -> Tensor:
    """Returns an estimate of ||J||_F^2 for each sample, ``(B,)``.

    Args:
        run: A function of `groundstate.jacobian.function.function`.
        points: Where to differentiate, ``(B, ...)``.
        generator: Source of the directions; on the CPU, so that all devices draw the same.
        estimator: ``vjp``, ``jvp``, ``fd``, or ``auto``: the first of them that this network can do.
        probes: Directions per sample; vjp takes at most as many as there are outputs.
        sigma: Length of the fd step, in units of the root mean square of the points.
        differentiable: Keep the graph to the parameters.

    Cost: one forward and one backward pass per vjp probe, one forward-mode pass per jvp probe, one forward pass per fd
    probe and one for all; closed form for chains of linear layers.
    """
    kind = usable(run, points, differentiable) if estimator == "auto" else estimator
    if kind == "vjp":
        return _by_vjp(run, points, generator, probes, differentiable)
    if kind == "jvp" and differentiable:
        exact.check_forward_mode(run, points)
    dtype = working_dtype(points.dtype)
    total = torch.zeros((), dtype=dtype, device=points.device)
    scale = sigma * float(points.square().mean().sqrt()) if kind == "fd" else 0.0
    if kind == "fd" and not scale > 0:
        raise UsageError("finite differences need points that are not all zero, to scale their step")
    with torch.set_grad_enabled(differentiable):
        here = run(points) if kind == "fd" else None
        for _ in range(probes):
            v = torch.randn(points.shape, generator=generator, dtype=points.dtype).to(points.device)
            moved = exact.jvp(run, points, v)[1] if here is None else (run(points + scale * v) - here) / scale
            total = total + moved.to(dtype).square().sum(-1)
    if here is not None:
        _warn_of_rounding(here.detach(), total.detach() / probes, scale)
    return total / probes


def usable(run: Function, points: Tensor, differentiable: bool) -> str:
    """Returns the first of vjp, jvp, fd that this network can do, found out once; warns where it is fd."""
    plan = plan_for(run, points)
    if plan.chain is not None:
        return "vjp"
    fact = f"usable differentiable={differentiable}"
    if fact not in plan.facts:
        plan.facts[fact] = _first_that_works(run, points, differentiable)
    return str(plan.facts[fact])


def _first_that_works(run: Function, points: Tensor, differentiable: bool) -> str:
    one, part = points[:1], run.rows(torch.zeros(1, dtype=torch.long, device=points.device))
    reasons: dict[str, str] = {}
    for kind in ("vjp", "jvp"):
        generator = torch.Generator().manual_seed(0)
        try:
            value = squared_norms(part, one, generator=generator, estimator=kind, differentiable=differentiable).sum()
            if differentiable and value.requires_grad and run.parameters:
                torch.autograd.grad(value, run.parameters, allow_unused=True)
            return kind
        except (RuntimeError, NotImplementedError) as error:
            reasons[kind] = exact.first_line(error)
    exact.warn_of_differences(reasons)
    return "fd"


def sphere(samples: int, outputs: int, probes: int, generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    """Returns orthonormal directions for each sample, uniform on the sphere, ``(samples, probes, outputs)``."""
    g = torch.randn((samples, probes, outputs), generator=generator, dtype=dtype)
    if probes == 1:
        return g / torch.linalg.vector_norm(g, dim=-1, keepdim=True).clamp_min(torch.finfo(dtype).tiny)
    q = torch.linalg.qr(g.mT).Q  # its span is uniform; that is all that the sum over the directions depends on
    return q.mT


def _by_vjp(run: Function, points: Tensor, generator: torch.Generator, probes: int, differentiable: bool) -> Tensor:
    plan = plan_for(run, points)
    outputs = plan.outputs
    probes = min(probes, outputs)
    dtype = working_dtype(points.dtype)
    u = sphere(len(points), outputs, probes, generator, dtype).to(points.device)
    if plan.chain is not None:
        m = exact.closed_form(run, points, plan, differentiable, u)
        traces = m.diagonal(dim1=-2, dim2=-1).sum(-1)
        return outputs / probes * traces
    points = points.detach().requires_grad_()
    out = run(points)
    total = torch.zeros((), dtype=dtype, device=points.device)
    for k in range(probes):
        row = exact.pulled_back(out, points, u[:, k].to(out.dtype), differentiable, differentiable or k < probes - 1)
        if differentiable and k == 0:
            exact.check_second_derivative(run, points, row)
        total = total + row.reshape(len(row), -1).to(dtype).square().sum(-1)
    return outputs / probes * total


def _warn_of_rounding(f: Tensor, squared: Tensor, scale: float) -> None:
    change = scale * float(squared.mean().sqrt())
    size = float(f.square().sum(-1).mean().sqrt())
    if 0 < change < 1e3 * torch.finfo(f.dtype).eps * size:
        warnings.warn(
            f"the finite difference changes the output by {change:.2g} of {size:.2g}, close to rounding: use a larger "
            "sigma, or float64",
            stacklevel=4,
        )
