"""Factors on a strength, as functions of the step."""

from __future__ import annotations

import math
from collections.abc import Callable

from groundstate.errors import UsageError, nearest

_SHAPES: dict[str, Callable[[float], float]] = {
    "linear": lambda u: 1.0 - u,
    "cosine": lambda u: 0.5 * (1.0 + math.cos(math.pi * u)),
    "warmup": lambda u: u,
}


def schedule(spec: Callable[[int], float] | str | None) -> Callable[[int], float]:
    """Returns the factor at a step: a callable as it is, ``None`` for 1, or ``"shape:N"`` over N steps.

    Shapes: ``linear`` and ``cosine`` fall from 1 to 0, ``warmup`` rises from 0 to 1; all are constant after N.

    >>> schedule("linear:10")(5)
    0.5
    """
    if spec is None or spec == "constant":
        return lambda step: 1.0
    if callable(spec):
        return spec
    shape, _, length = spec.partition(":")
    if shape not in _SHAPES:
        raise UsageError(f"unknown schedule {spec!r}.{nearest(shape, _SHAPES)} Write e.g. 'linear:1000'")
    if not length.isdigit() or int(length) < 1:
        raise UsageError(f"the schedule {spec!r} needs a number of steps, e.g. '{shape}:1000'")
    return lambda step: _SHAPES[shape](min(step / int(length), 1.0))
