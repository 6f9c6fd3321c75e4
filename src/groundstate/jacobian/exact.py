"""The output Gram M = J J^T of every sample, exactly, by the cheapest route for this network.

Routes: ``closed_form`` (chains of linear layers), ``loop`` (one VJP per output), ``batched`` (all VJPs at once by
vmap: faster for multilayer perceptrons, 2 to 3 times slower for convolutions on a CPU), ``jvp`` (one forward-mode pass
per input, where inputs are fewer than outputs), ``fd`` (central differences: networks that have no derivative of the
order needed). ``auto`` takes the closed form where there is one, else the fastest of the others in one timed trial on
the batch; the choice is kept per network, and bits of results depend on it, so force a route where they must not.

Whichever side of J is smaller makes the Gram: its eigenvalues are the squared singular values either way.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd import forward_ad

from groundstate.errors import UsageError
from groundstate.jacobian import chain
from groundstate.jacobian.function import Function
from groundstate.jacobian.plan import Plan, plan_for

ROUTES = ("auto", "closed_form", "loop", "batched", "jvp", "fd")
TRIAL_SAMPLES = 32
_LARGEST = 1 << 25  # entries of the Jacobians held at once


def output_gram(run: Function, points: Tensor, *, route: str = "auto", differentiable: bool = False) -> Tensor:
    """Returns the Gram of the smaller side of J for each sample, ``(B, r, r)`` with r = min(C, n).

    Args:
        run: A function of `groundstate.jacobian.function.function`.
        points: Where to differentiate, ``(B, ...)``.
        route: One of `ROUTES`.
        differentiable: Keep the graph to the parameters.

    Raises:
        UsageError: the route cannot do this network, or samples influence one another.

    Cost: closed form about 1.6 plain steps of 784-128-128-10 at batch 128, other routes min(C, n) backward (forward)
    passes; memory of the Jacobians, B C n.
    """
    plan = plan_for(run, points)
    name = chosen(run, points, plan, route, differentiable)
    if name == "closed_form":
        return closed_form(run, points, plan, differentiable)
    step = max(1, _LARGEST // max(1, plan.outputs * points[0].numel()))
    if differentiable or len(points) <= step:
        return _of(_JACOBIANS[name](run, points, differentiable))
    parts = torch.arange(len(points), device=points.device).split(step)
    return torch.cat([_of(_JACOBIANS[name](run.rows(i), points[i], False)) for i in parts])


def chosen(run: Function, points: Tensor, plan: Plan, route: str, differentiable: bool) -> str:
    """Returns the route that ``route`` stands for.

    Raises:
        UsageError: the route is unknown, or cannot do this network; says why.
    """
    if route not in ROUTES:
        raise UsageError(f"route must be one of {', '.join(ROUTES)}, got {route!r}")
    if route == "closed_form" and plan.chain is None:
        raise UsageError(f"there is no closed form for this network: {plan.why_no_chain}")
    if route != "auto":
        return route
    if plan.chain is not None:
        return "closed_form"
    if differentiable not in plan.routes:
        plan.routes[differentiable] = _fastest(run, points, plan, differentiable)
    return plan.routes[differentiable][0]


def closed_form(run: Function, points: Tensor, plan: Plan, differentiable: bool, rows: Tensor | None = None) -> Tensor:
    """Returns the Gram of ``rows`` times J (default: of J) of a chain, ``(B, k, k)``."""
    if plan.chain is None:
        raise UsageError(f"there is no closed form for this network: {plan.why_no_chain}")
    head = run.on in ("probabilities", "loss")
    out, slopes = chain.output_and_slopes(plan.chain, points, differentiable and (head or not plan.chain.piecewise))
    with torch.set_grad_enabled(differentiable):
        if head:
            inner = _head(run, out)
            rows = inner if rows is None else rows @ inner
        m = chain.gram(plan.chain, slopes, rows)
    return m if len(m) == len(points) else m.expand(len(points), *m.shape[1:])


def _head(run: Function, logits: Tensor) -> Tensor:
    """Returns the Jacobian of the output by the logits: diag p - p p^T, or (p - e_y)^T."""
    p = logits.softmax(-1)
    if run.on == "probabilities":
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    if run.y is None:
        raise UsageError("on='loss' needs the labels: give y")
    return (p - torch.nn.functional.one_hot(run.y, p.shape[-1]).to(p.dtype))[:, None, :]


def _of(j: Tensor) -> Tensor:
    return j.mT @ j if j.shape[-1] < j.shape[-2] else j @ j.mT


# ---------------------------------------------------------------------- Jacobians, (B, C, n)


def by_loop(run: Function, points: Tensor, differentiable: bool) -> Tensor:
    """Returns J, one VJP per output."""
    points = points.detach().requires_grad_()
    out = connected(run(points))
    count = out.shape[1]
    rows = [
        _or_zero(
            torch.autograd.grad(
                out[:, c].sum(),
                points,
                create_graph=differentiable,
                retain_graph=differentiable or c < count - 1,
                allow_unused=True,
            )[0],
            points,
        )
        for c in range(count)
    ]
    return torch.stack(rows, 1).flatten(2)


def by_batched(run: Function, points: Tensor, differentiable: bool) -> Tensor:
    """Returns J, all VJPs in one batched backward pass."""
    points = points.detach().requires_grad_()
    out = connected(run(points))
    eye = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)
    directions = eye[:, None, :].expand(-1, len(points), -1)
    (j,) = torch.autograd.grad(
        out, points, directions, is_grads_batched=True, create_graph=differentiable, allow_unused=True
    )
    return (torch.zeros_like(points).expand(out.shape[1], *points.shape) if j is None else j).transpose(0, 1).flatten(2)


def by_jvp(run: Function, points: Tensor, differentiable: bool) -> Tensor:
    """Returns J, one forward-mode pass per input."""
    with torch.set_grad_enabled(differentiable):
        return torch.stack([jvp(run, points, v)[1] for v in _axes(points)], -1)


def by_differences(run: Function, points: Tensor, differentiable: bool) -> Tensor:
    """Returns J by central differences, two passes per input; error O(h^2) + eps |f| / h, h = eps^(1/3) rms(x)."""
    h = torch.finfo(points.dtype).eps ** (1 / 3) * max(1e-3, float(points.square().mean().sqrt()))
    with torch.set_grad_enabled(differentiable):
        return torch.stack([(run(points + h * v) - run(points - h * v)) / (2 * h) for v in _axes(points)], -1)


_JACOBIANS: dict[str, Callable[[Function, Tensor, bool], Tensor]] = {
    "loop": by_loop,
    "batched": by_batched,
    "jvp": by_jvp,
    "fd": by_differences,
}


def jvp(run: Function, points: Tensor, direction: Tensor) -> tuple[Tensor, Tensor]:
    """Returns ``f(points)`` and J v, ``(B, C)``, in forward mode."""
    with forward_ad.dual_level():
        out, tangent = forward_ad.unpack_dual(run(forward_ad.make_dual(points, direction)))
        return out, torch.zeros_like(out) if tangent is None else tangent


def connected(out: Tensor) -> Tensor:
    """Returns the output if autograd reached it from the points.

    Raises:
        UsageError: the network detaches it.
    """
    if not out.requires_grad:
        raise UsageError(
            "the output has no gradient by the input: the forward pass runs under no_grad or detaches; remove that, or "
            "use finite differences (route='fd', estimator='fd')"
        )
    return out


def _or_zero(grad: Tensor | None, points: Tensor) -> Tensor:
    return torch.zeros_like(points) if grad is None else grad


def _axes(points: Tensor) -> list[Tensor]:
    n = points[0].numel()
    eye = torch.eye(n, dtype=points.dtype, device=points.device)
    return [e.view(1, *points.shape[1:]).expand_as(points) for e in eye]


# ---------------------------------------------------------------------- the choice


def _fastest(run: Function, points: Tensor, plan: Plan, differentiable: bool) -> tuple[str, str]:
    """Times the routes that work on a few samples; returns the fastest and what was found."""
    index = torch.arange(min(len(points), TRIAL_SAMPLES), device=points.device)
    few, part = points[index], run.rows(index)
    inputs = points[0].numel()
    names = ["loop"] if plan.outputs == 1 else ["loop", "batched"]
    if inputs < plan.outputs:
        names.append("jvp")
    found: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in names:
        try:
            _trial(part, few, name, differentiable)  # the first call of a route sets things up
            begin = time.perf_counter()
            _trial(part, few, name, differentiable)
            found[name] = time.perf_counter() - begin
        except (RuntimeError, NotImplementedError) as error:
            failed[name] = (str(error).strip() or type(error).__name__).splitlines()[0]
    told = [f"{n} {1e3 * t:.2g} ms" for n, t in found.items()] + [f"{n} impossible ({w})" for n, w in failed.items()]
    if not found:
        return "fd", f"central differences; {'; '.join(told)}"
    best = min(found, key=lambda n: found[n])
    return best, f"{best} of {len(index)} samples: {', '.join(told)}"


def _trial(run: Function, points: Tensor, name: str, differentiable: bool) -> None:
    m = _of(_JACOBIANS[name](run, points, differentiable))
    if differentiable and run.parameters and m.requires_grad:
        torch.autograd.grad(m.sum(), run.parameters, allow_unused=True)
    elif points.is_cuda:
        torch.cuda.synchronize()
