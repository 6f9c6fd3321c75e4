"""Energies at next to no cost: a gradient is kept until a certificate says that it is too old.

Idea: training moves weights by little at a step, a decomposition costs much, and its gradient stays good for long. An
`Anchored` energy bounds itself from one decomposition, from below and from above, so nobody has to guess for how long::

    lower <= E(W) <= upper,    kept until a look finds  (upper - lower) / lower > gap, or nearly

The gradient that acts is the subgradient at the anchor, so that a step in between costs one addition and nothing that
waits for a device. The bounds are looked at less often than at every step: the gap grows like the square of the age or
slower, so each look says when it is worth looking again: before it is predicted to pass, at twice the age at most, and
after 20 steps or where the learning rate doubles anyhow. Between looks the gap may pass; `Wear.widest` tells by how
much. Anchors of different weights are renewed at different steps: in the mean of a step as many are due as their ages
say, and where none is forced, the oldest, relative to its limit, is renewed early.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from groundstate.blocks import Block
from groundstate.energies.capabilities import Anchored
from groundstate.errors import UsageError

_FIRST = 0.7  # of the predicted remaining age, until the next look; then all of it
_LONGEST = 20  # steps without a look: weights may rest for long, and then be moved by something else
_WORTH = 0.12  # with less than this part of its limit left an anchor is renewed, which costs no more than further looks
_RIPE = 0.6  # of its limit, before which no anchor is renewed early
_FIGURES = ("refreshed", "limit", "due", "first", "lower", "upper", "refreshes", "looks", "widest")


class Wear(NamedTuple):
    """What the gradients of one weight, or one network, have cost so far, and how good they were.

    Attributes:
        name: The weight, or the weights.
        refreshes: Decompositions.
        looks: Evaluations of the bounds.
        lower, upper: The last bounds.
        widest: The largest relative distance of the bounds seen at a look, after which the anchor was renewed.
        limit: Age, in steps, at which the gap is predicted to be reached.
    """

    name: str
    refreshes: int
    looks: int
    lower: float
    upper: float
    widest: float
    limit: float


@dataclass
class _Unit:
    """One anchor: of a weight, or of all layers."""

    energy: Anchored
    blocks: tuple[Block, ...]
    gradients: list[Tensor] = field(default_factory=list)
    memory: dict[str, Tensor] = field(default_factory=dict)
    refreshed: float = -1.0
    limit: float = math.inf
    due: float = 0.0
    first: float = 0.0
    lower: float = 0.0
    upper: float = math.inf
    refreshes: float = 0.0
    looks: float = 0.0
    widest: float = 0.0

    @property
    def name(self) -> str:
        return ", ".join(b.name for b in self.blocks)

    def weights(self) -> list[Tensor]:
        return [b.matrix for b in self.blocks]


class Amortized:
    """The kept gradients of one term.

    Args:
        energy: The energy.
        blocks: The weights.
        per_block: Whether it acts on each weight by itself, or on all of them together.
        gap: Largest relative distance of the bounds.
        named: Calls a function of weights such that a `NonFiniteError` names the energy and the weight given.
    """

    def __init__(
        self,
        energy: Anchored,
        blocks: tuple[Block, ...],
        per_block: bool,
        gap: float,
        named: Callable[[str, Callable[[list[Tensor]], Any], list[Tensor]], Any],
    ) -> None:
        groups = [(b,) for b in blocks] if per_block else [blocks]
        self.units = [_Unit(energy, group) for group in groups]
        self.gap = gap
        self._named = named
        self._credit = 0.0
        self._rate = math.inf

    def gradients(self, step: int) -> list[tuple[Block, Tensor]]:
        """Returns a gradient for each weight, renewing what is due at this step.

        Raises:
            NonFiniteError: names the energy and the weight.
        """
        forced = [u for u in self.units if step >= u.due and not self._good(u, step)]
        for unit in forced:
            self._renew(unit, step)
        self._credit += sum(1 / u.limit for u in self.units)
        if forced:
            self._credit = max(self._credit - len(forced), 0.0)
        elif self._credit >= 1.0:
            oldest = max(self.units, key=lambda u: (step - u.refreshed) / u.limit)
            if step - oldest.refreshed >= max(_RIPE * oldest.limit, 1.0):
                self._renew(oldest, step)
            self._credit = 0.0
        return [(b, g) for u in self.units for b, g in zip(u.blocks, u.gradients, strict=True)]

    def act(self, step: int, valued: bool, rate: float) -> tuple[float, list[tuple[Block, Tensor]]]:
        """Returns `value`, or 0 where it is not asked for, and `gradients`; looks again where the rate rose.

        Args:
            step: Number of the step.
            valued: Whether the value is asked for.
            rate: The largest learning rate; 0 where it is not known.
        """
        if rate > 2 * self._rate:
            for unit in self.units:
                unit.due = min(unit.due, step)
            self._rate = rate
        self._rate = min(self._rate, rate)
        grads = self.gradients(step)
        return self.value() if valued else 0.0, grads

    def value(self) -> float:
        """Returns the certified lower bound of the sum at the weights as they are now; waits for the device."""
        found = [u.energy.bounds(u.weights(), u.gradients, u.memory)[0] for u in self.units]
        return float(torch.stack(found).sum())

    def wear(self) -> list[Wear]:
        """Returns the counts and the last bounds of each anchor."""
        return [Wear(u.name, int(u.refreshes), int(u.looks), u.lower, u.upper, u.widest, u.limit) for u in self.units]

    def _good(self, unit: _Unit, step: int) -> bool:
        """Looks at the bounds, and says when to look again."""
        if unit.refreshed < 0:
            return False
        unit.looks += 1
        lower, upper = unit.energy.bounds(unit.weights(), unit.gradients, unit.memory).tolist()
        age = step - unit.refreshed
        wide = (upper - lower) / lower if lower > 0 else math.inf
        if math.isfinite(wide):
            unit.widest = max(unit.widest, wide)
            opened = (wide - unit.first) / max(self.gap - unit.first, 1e-30)
            unit.limit = max(age / math.sqrt(opened) if opened > 1e-4 else 100.0 * age, 1.0)
        left = unit.limit - age
        if not wide <= self.gap or left < max(_WORTH * unit.limit, 1.0):
            return False
        unit.lower, unit.upper = lower, upper
        unit.due = step + max(1, int(min(left if left < age else _FIRST * left, age, _LONGEST)))
        return True

    def _renew(self, unit: _Unit, step: int) -> None:
        weights = unit.weights()
        gradients, memory = self._named(unit.name, unit.energy.anchor, weights)
        lower, upper = unit.energy.bounds(weights, gradients, memory).tolist()
        unit.gradients, unit.memory = gradients, memory
        unit.lower, unit.upper = lower, upper
        unit.first = (upper - lower) / lower if lower > 0 and math.isfinite(upper) else math.inf
        unit.refreshes += 1
        useless = not unit.first < self.gap  # zero or extreme weights, say: exact at every step
        unit.limit = 1.0 if useless or unit.limit == math.inf else unit.limit
        unit.refreshed, unit.due = step, step + (1 if useless else max(1, int(min(_FIRST * unit.limit, _LONGEST))))

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Tensor]:
        """Returns everything that the next step depends on, as tensors by name."""
        found = {"credit": torch.tensor([self._credit, self._rate], dtype=torch.float64)}
        for i, u in enumerate(self.units):
            figures = [getattr(u, name) for name in _FIGURES]
            found[f"{i}/figures"] = torch.tensor(figures, dtype=torch.float64)
            found |= {f"{i}/gradient/{k}": g for k, g in enumerate(u.gradients)}
            found |= {f"{i}/memory/{k}": v for k, v in u.memory.items()}
        return {k: v.clone() for k, v in found.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state`; an empty one, saved without a gap, leaves everything to be renewed.

        Raises:
            UsageError: it is of other weights.
        """
        if not state:
            return
        for i, u in enumerate(self.units):
            gradients = [v for k, v in sorted(state.items()) if k.startswith(f"{i}/gradient/")]
            fits = f"{i}/figures" in state and len(gradients) in (0, len(u.blocks))
            if not fits or any(g.numel() != b.matrix.numel() for g, b in zip(gradients, u.blocks, strict=False)):
                raise UsageError(f"the saved gradients of {u.energy!r} are of other weights than {u.name}")
        self._credit, self._rate = state["credit"].tolist()
        for i, u in enumerate(self.units):
            for name, value in zip(_FIGURES, state[f"{i}/figures"].tolist(), strict=True):
                setattr(u, name, value)
            device = u.blocks[0].parameter.device
            count = sum(k.startswith(f"{i}/gradient/") for k in state)
            u.gradients = [state[f"{i}/gradient/{k}"].clone().to(device) for k in range(count)]
            prefix = f"{i}/memory/"
            u.memory = {k.removeprefix(prefix): v.clone().to(device) for k, v in state.items() if k.startswith(prefix)}
