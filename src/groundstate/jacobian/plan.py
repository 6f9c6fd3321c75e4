"""What was found out once about a network as a function, and holds as long as its modules are the same.

A plan is kept per module (weakly), per output and input, and per kind of points; it holds the chain for the closed
form or the reason why there is none, and the routes that were timed. When it is made, two samples tell whether the
samples of a batch influence one another, in which case no per-sample energy exists.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Hashable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from groundstate.errors import UsageError
from groundstate.jacobian.chain import Chain, chain_of, output_and_slopes
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
    modules: list[nn.Module] = field(default_factory=list)


_plans: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, Plan]] = weakref.WeakKeyDictionary()


def plan_for(run: Function, points: Tensor) -> Plan:
    """Returns the plan of a function at points like these, made where there is none yet.

    Raises:
        UsageError: samples influence one another, or the network cannot be called on these points.
    """
    if run.module is None or isinstance(run.module, nn.Linear):  # its chain would keep the module alive
        return _made(run, points)
    start = None if run.start is None else run.start[0]
    key = (run.on, start, points.shape[1:], points.dtype, points.device)
    below = [m for m in run.module.modules() if m is not run.module]
    known = _plans.setdefault(run.module, {})
    plan = known.get(key)
    if plan is None or len(plan.modules) != len(below) or any(a is not b for a, b in zip(plan.modules, below)):
        plan = known[key] = _made(run, points)
        plan.modules = below
    return plan


def _made(run: Function, points: Tensor) -> Plan:
    index = torch.arange(min(len(points), 2), device=points.device)
    with torch.no_grad():
        out = run.rows(index)(points[index])
        scale = float(out.abs().max()) if out.numel() else 0.0
        if not math.isfinite(scale):
            raise blame(run.f, points, "the output of the network")
        if len(index) == 2:
            alone = run.rows(index[:1])(points[:1])
            rounding = 1e3 * torch.finfo(out.dtype).eps * scale
            if float((alone[0] - out[0]).abs().max()) > rounding:
                raise UsageError(
                    "the output of a sample depends on the other samples of its batch (a normalization without running "
                    "statistics?): no energy per sample exists; use running statistics or another normalization"
                )
    chain, why = None, ""
    try:
        chain = chain_of(run)
        _compare(run, chain, points[index], index)
    except UsageError as error:
        chain, why = None, str(error)
    return Plan(out.shape[1], chain, why)


def _compare(run: Function, chain: Chain, points: Tensor, index: Tensor) -> None:
    """Refuses a chain that does not compute what the network computes."""
    part = run.rows(index)
    if run.on in ("probabilities", "loss"):
        part.on = "logits"
    with torch.no_grad():
        expected = part(points)
        found = output_and_slopes(chain, points, False)[0].flatten(1)
        error = float((expected - found).abs().max()) if expected.shape == found.shape else torch.inf
        if not error <= 1e3 * torch.finfo(found.dtype).eps * max(1.0, float(expected.abs().max())):
            raise UsageError("the network does more than its chain of layers")
