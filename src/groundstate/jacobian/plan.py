"""What was found out once about a network as a function, and holds as long as its modules are the same.

A plan is kept per module (weakly), per output and input, and per kind of points; it holds the chain for the closed
form or the reason why there is none, and the routes that were timed. When it is made, two samples tell whether the
samples of a batch influence one another, in which case no per-sample energy exists. Of a network in half precision that
is asked in float32, on a copy of its weights that lives as long as the question.
"""

from __future__ import annotations

import copy
import math
import weakref
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from groundstate.errors import UsageError
from groundstate.jacobian.chain import Chain, chain_of, gram, output_and_slopes
from groundstate.jacobian.function import Function, blame


@dataclass
class Plan:
    """What is known of one function.

    Attributes:
        outputs: C.
        chain: The chain, or ``None``.
        why_no_chain: The reason, where there is none.
        routes: The fastest route and how it was found, for Jacobians without and with a graph.
        facts: What callers found out: cuts, whether there is a second derivative, by name.
        modules: The modules that the plan was made of.
    """

    outputs: int
    chain: Chain | None
    why_no_chain: str
    routes: dict[bool, tuple[str, str]] = field(default_factory=dict)
    facts: dict[str, object] = field(default_factory=dict)
    modules: list[weakref.ref[nn.Module]] = field(default_factory=list)


_HALF = torch.bfloat16, torch.float16

_plans: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Plan]] = weakref.WeakKeyDictionary()


def plan_for(run: Function, points: Tensor) -> Plan:
    """Returns the plan of a function at points like these, made where there is none yet.

    Raises:
        UsageError: samples influence one another, or the network cannot be called on these points.
    """
    kind = (points.shape[1:], points.dtype, len(points) > 1)
    if run.memo is None or run.memo[0] != kind:
        run.memo = kind, _found(run, points)
    return run.memo[1]


def _found(run: Function, points: Tensor) -> Plan:
    if run.module is None or isinstance(run.module, nn.Linear):  # its chain would keep the module alive
        return _made(run, points)
    start = None if run.start is None else run.start[0]
    modules = run.modules
    hooked = any(m._forward_hooks or m._forward_pre_hooks for m in modules)
    key = (run.on, start, points.shape[1:], points.dtype, points.device, len(points) > 1, hooked)
    known = _plans.setdefault(run.module, {})
    plan = known.get(key)
    if plan is None or len(plan.modules) != len(modules) or any(a() is not b for a, b in zip(plan.modules, modules)):
        plan = known[key] = _made(run, points)
        plan.modules = [weakref.ref(m) for m in modules]
    return plan


def _made(run: Function, points: Tensor) -> Plan:
    index = torch.arange(min(len(points), 2), device=points.device)
    part, few = run.rows(index), points[index]
    with torch.no_grad():
        out = part(few)
    if out.numel() and not math.isfinite(float(out.abs().max())):
        raise blame(run.f, points, "the output of the network")
    chain, why = _in_single(part, few) or _examined(part, few, out)
    return Plan(out.shape[1], chain, why)


def _in_single(run: Function, points: Tensor) -> tuple[Chain | None, str] | None:
    """`_examined` in float32 for a network in half precision, whose rounding would hide what is looked for.

    The network itself runs, with float32 copies of its tensors in their places. ``None`` where there is no need, or
    where it cannot run so (it casts by itself, or the copies do not fit into memory).
    """
    if run.module is None:
        return None
    named = [*run.module.named_parameters(remove_duplicate=False), *run.module.named_buffers(remove_duplicate=False)]
    copies: dict[int, Tensor] = {id(t): t.detach().float() for _, t in named if t.dtype in _HALF}
    if not copies and points.dtype not in _HALF:
        return None
    wide = copy.copy(run)
    if run.start is not None:
        name, start = run.start
        wide.start = name, start.float() if start.dtype in _HALF else start
    try:
        tensors = {f"module.{name}": copies[id(t)] for name, t in named if id(t) in copies}
        acting = partial(_examined, wide, points.float())
        return torch.func.functional_call(_Holder(run.module), tensors, (acting,), tie_weights=False)
    except UsageError:
        raise
    except (RuntimeError, TypeError, ValueError):
        return None


class _Holder(nn.Module):
    """Lets `torch.func.functional_call` put tensors in a network during any function, hooks of layers included."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, act: Callable[[], Any]) -> Any:
        return act()


def _examined(run: Function, points: Tensor, out: Tensor | None = None) -> tuple[Chain | None, str]:
    """Returns the chain of a function at one or two points, or why there is none.

    Raises:
        UsageError: the first sample has another output without the second.
    """
    with torch.no_grad():
        out = run(points) if out is None else out
        if len(points) == 2:
            first = torch.zeros(1, dtype=torch.long, device=points.device)
            try:
                alone = run.rows(first)(points[:1])
            except (ValueError, RuntimeError) as error:
                raise UsageError(f"{_COUPLED} (one sample alone: {error})") from error
            gap, size = ((alone[0] - out[0]).abs(), out.abs())
            if out.numel() and not float(gap.max()) <= _rounding(out.dtype) * float(size.max()):
                raise UsageError(_COUPLED)
    try:
        chain = chain_of(run)
        _compare(run, chain, points)
        return chain, ""
    except UsageError as error:
        return None, str(error)


_COUPLED = (
    "the output of a sample depends on the other samples of its batch (a normalization without running statistics?) or "
    "is random in eval mode: no energy per sample exists; use running statistics or another normalization"
)


def _compare(run: Function, chain: Chain, points: Tensor) -> None:
    """Refuses a chain that does not compute what the network computes, or has another derivative."""
    part = copy.copy(run)
    if run.on in ("probabilities", "loss"):
        part.on = "logits"
    leaf = points.detach().requires_grad_()
    expected = part(leaf)
    u = torch.linspace(1, 2, expected.shape[1]).to(expected).expand_as(expected)
    row = torch.autograd.grad(expected, leaf, u, allow_unused=True)[0] if expected.requires_grad else None
    if row is None:
        raise UsageError("the network detaches its output from its input")
    with torch.no_grad():
        try:
            out, slopes = output_and_slopes(chain, points, False)
        except (RuntimeError, IndexError) as error:
            raise UsageError(f"the layers of the network do not follow one another: {error}") from None
        length = gram(chain, slopes, u[:, None, :])[:, 0, 0].expand(len(points))
    if not (_alike(expected, out.flatten(1)) and _alike(row.reshape(len(row), -1).square().sum(1), length)):
        raise UsageError("the network does more than its chain of layers, or has derivatives of its own")


def _alike(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    a, b = a.detach(), b.detach()
    return float((a - b).abs().max()) <= _rounding(a.dtype) * max(1.0, float(a.abs().max()))


def _rounding(dtype: torch.dtype) -> float:
    """The share of the largest output by which two ways to compute the same may differ.

    A thousand units of rounding come together in a deep network; in half precision that is more than the outputs, and
    where nothing but half precision can be had, a sixteenth of them must do.
    """
    return min(1e3 * torch.finfo(dtype).eps, 1 / 16)
