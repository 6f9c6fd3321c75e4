"""The output Gram M = J J^T of every sample, exactly, by the cheapest route for this network.

Routes: ``closed_form`` (chains of linear layers), ``loop`` (one VJP per output), ``batched`` (all VJPs at once by
vmap: faster for multilayer perceptrons, 2 to 3 times slower for convolutions on a CPU), ``jvp`` (one forward-mode pass
per input, where inputs are fewer than outputs), ``fd`` (central differences: networks that have no derivative of the
order needed). ``auto`` takes the closed form where there is one, else the fastest of the others in one timed trial on
the batch; the choice is kept per network, and bits of results depend on it, so force a route where they must not.

Whichever side of J is smaller makes the Gram: its eigenvalues are the squared singular values either way.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from groundstate.errors import UsageError
from groundstate.jacobian import chain
from groundstate.jacobian.function import Function
from groundstate.jacobian.plan import Plan, plan_for
from groundstate.norms.spectral import working_dtype

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
            rows = inner if rows is None else rows @ inner.to(rows.dtype)
        m = chain.gram(plan.chain, slopes, rows)
    return m if len(m) == len(points) else m.expand(len(points), *m.shape[1:])


def _head(run: Function, logits: Tensor) -> Tensor:
    """Returns the Jacobian of the output by the logits: diag p - p p^T, or that of cross-entropy, (p - e_y)^T."""
    p = logits.softmax(-1)
    if run.on == "probabilities":
        return torch.diag_embed(p) - p[:, :, None] * p[:, None, :]
    targets = run.targets(p)
    return (p * targets.sum(-1, keepdim=True) - targets)[:, None, :]


def _of(j: Tensor) -> Tensor:
    j = j.to(working_dtype(j.dtype))
    return j.mT @ j if j.shape[-1] < j.shape[-2] else j @ j.mT


# ---------------------------------------------------------------------- Jacobians, (B, C, n)


def by_loop(run: Function, points: Tensor, differentiable: bool) -> Tensor:
    """Returns J, one VJP per output."""
    points = points.detach().requires_grad_()
    out = run(points)
    rows = [
        pulled_back(out[:, c].sum(), points, None, differentiable, differentiable or c < out.shape[1] - 1)
        for c in range(out.shape[1])
    ]
    if differentiable:
        check_second_derivative(run, points, rows[0])
    return torch.stack(rows, 1).reshape(len(points), len(rows), -1)


def by_batched(run: Function, points: Tensor, differentiable: bool) -> Tensor:
    """Returns J, all VJPs in one batched backward pass."""
    points = points.detach().requires_grad_()
    out = run(points)
    eye = torch.eye(out.shape[1], dtype=out.dtype, device=out.device)
    directions = eye[:, None, :].expand(-1, len(points), -1)
    rows = pulled_back(out, points, directions, differentiable, differentiable, batched=True)
    if differentiable:
        check_second_derivative(run, points, rows)
    return rows.transpose(0, 1).reshape(len(points), len(rows), -1)


def by_jvp(run: Function, points: Tensor, differentiable: bool) -> Tensor:
    """Returns J, one forward-mode pass per input."""
    if differentiable:
        check_forward_mode(run, points)
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
        out, tangent = forward_ad.unpack_dual(run(_dual(points.clone(), direction)))
        if tangent is None:
            raise UsageError(_DETACHED)
        return out, tangent


def _dual(points: Tensor, direction: Tensor) -> Tensor:
    if "torch._decomp.decompositions_for_jvp" in sys.modules:
        return forward_ad.make_dual(points, direction)
    with warnings.catch_warnings():  # its first call imports what torch itself calls deprecated
        warnings.simplefilter("ignore", DeprecationWarning)
        return forward_ad.make_dual(points, direction)


class NoDerivativeError(UsageError, RuntimeError):
    """The network has no derivative of the order needed by the way asked for."""


def check_second_derivative(run: Function, points: Tensor, of_jacobian: Tensor) -> None:
    """Refuses networks with an own ``autograd.Function`` whose backward is not differentiable, once per network.

    ``torch.autograd.grad`` leaves out what is behind such a backward, without a word.

    Raises:
        NoDerivativeError: there is one in the graph of ``of_jacobian``.
    """
    facts = plan_for(run, points).facts
    key = f"second derivative by {len(run.parameters)} parameters"  # those that are frozen now may not be later
    if key not in facts:
        known, todo = set(), [of_jacobian.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in known:
                known.add(node)
                todo += [after for after, _ in node.next_functions]
        facts[key] = all(node.name() != "torch::autograd::Error" for node in known)
    if not facts[key]:
        raise NoDerivativeError(
            "the network has a backward pass that cannot be differentiated (a once_differentiable autograd.Function): "
            "use finite differences (route='fd', estimator='fd')"
        )


def check_forward_mode(run: Function, points: Tensor) -> None:
    """Refuses networks whose J v of forward mode cannot be differentiated rightly, found out once per network.

    Some operations refuse it (softmax), and for some (layer and instance normalization, log-determinants) torch 2.13
    returns a right J v with a wrong gradient. So the gradient of u^T J v is compared with that of reverse mode.

    Raises:
        NoDerivativeError: says why.
    """
    facts = plan_for(run, points).facts
    key = f"forward mode by {len(run.parameters)} parameters"
    if key not in facts:
        facts[key] = _forward_mode_fault(run, points)
    if facts[key]:
        raise NoDerivativeError(f"forward mode cannot be differentiated here: {facts[key]}")


def _forward_mode_fault(run: Function, points: Tensor) -> str:
    index, g = torch.arange(min(len(points), 2), device=points.device), torch.Generator().manual_seed(0)
    part, leaf = run.rows(index), points[index].detach().requires_grad_()
    v = torch.randn(leaf.shape, generator=g).to(leaf)
    u = torch.randn((len(index), plan_for(run, points).outputs), generator=g).to(leaf)
    by = [leaf, *run.parameters]

    def gradient(product: Tensor) -> Tensor:
        if not product.requires_grad:
            return torch.zeros(1)
        return torch.cat([g.flatten() for g in torch.autograd.grad(product, by, materialize_grads=True)])

    try:
        forward = gradient((jvp(part, leaf, v)[1] * u).sum())
    except (RuntimeError, NotImplementedError) as error:
        return first_line(error)
    try:
        row = pulled_back(part(leaf), leaf, u, True, True)
        check_second_derivative(run, points, row)
        reverse = gradient((row * v).sum())
    except (RuntimeError, NotImplementedError):
        modules = run.module.modules() if run.module else ()
        named = sorted({type(m).__name__ for m in modules if isinstance(m, _WRONG_FORWARD)})
        return f"torch differentiates {' and '.join(named)} wrongly in forward mode" if named else ""
    gap, size = float((forward - reverse).norm()), float(torch.maximum(forward.norm(), reverse.norm()))
    if gap <= max(1e-2, 30 * torch.finfo(leaf.dtype).eps) * size:  # rounding; a wrong formula is off by its size
        return ""
    return f"its gradient is off by {gap / size:.1%} (torch: layer and instance normalization, log-determinants)"


_WRONG_FORWARD = (nn.LayerNorm, nn.modules.instancenorm._InstanceNorm)


def pulled_back(
    out: Tensor, points: Tensor, u: Tensor | None, differentiable: bool, retain: bool, batched: bool = False
) -> Tensor:
    """Returns u^T J, the gradient of ``out`` by ``points``.

    Raises:
        UsageError: there is none: the network detaches.
    """
    found = None
    if out.requires_grad:
        (found,) = torch.autograd.grad(
            out,
            points,
            u,
            retain_graph=retain,
            create_graph=differentiable,
            is_grads_batched=batched,
            allow_unused=True,
        )
    if found is None:
        raise UsageError(_DETACHED)
    return found


def connected(out: Tensor) -> Tensor:
    """Returns the output if autograd recorded it.

    Raises:
        UsageError: the network detaches it.
    """
    if not out.requires_grad:
        raise UsageError(_DETACHED)
    return out


_DETACHED = (
    "the output has no gradient by the input: the forward pass runs under no_grad, detaches, or does not use it; "
    "change that, or use finite differences (route='fd', estimator='fd')"
)


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
        names.insert(0, "jvp")
    found: dict[str, float] = {}
    failed: dict[str, str] = {}
    for name in names:
        if "jvp" in found and plan.outputs > 16 * inputs:
            break  # a pass per output cannot win
        try:
            _trial(part, few, name, differentiable)  # the first call of a route sets things up
            begin = time.perf_counter()
            _trial(part, few, name, differentiable)
            found[name] = time.perf_counter() - begin
        except (RuntimeError, NotImplementedError) as error:
            failed[name] = first_line(error)
    told = [f"{n} {1e3 * t:.2g} ms" for n, t in found.items()] + [f"{n} impossible ({w})" for n, w in failed.items()]
    if not found:
        if differentiable:
            warn_of_differences(failed)
        return "fd", f"central differences; {'; '.join(told)}"
    best = min(found, key=lambda n: found[n])
    return best, f"{best} of {len(index)} samples: {', '.join(told)}"


def warn_of_differences(reasons: dict[str, str]) -> None:
    """Says that finite differences are used, and why nothing better can be."""
    told = "; ".join(f"{name}: {reason}" for name, reason in reasons.items())
    warnings.warn(
        f"this network has no derivative of the order needed ({told}): finite differences are used; for a network with "
        "kinks (ReLU, max pooling) their gradient is noisy, like 1/sigma",
        stacklevel=5,
    )


def first_line(error: BaseException) -> str:
    """Returns what an error says, on one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _trial(run: Function, points: Tensor, name: str, differentiable: bool) -> None:
    m = _of(_JACOBIANS[name](run, points, differentiable))
    if differentiable and run.parameters and m.requires_grad:
        torch.autograd.grad(m.sum(), run.parameters, allow_unused=True)
    elif points.is_cuda:
        torch.cuda.synchronize()
