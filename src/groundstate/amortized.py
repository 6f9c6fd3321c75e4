"""Energies at next to no cost: a gradient is kept until it is too far from a fresh one.

Idea: training moves weights by little at a step, a decomposition costs much, and its gradient stays good for long. How
good a kept gradient G still is shows when the next decomposition gives E(W) anyway: a convex energy is at least
<G, W> + shift (`groundstate.norms.subgradient`), and what is missing,

    gap  =  E(W) - (<G, W> + shift)  >=  0,

is what a fresh gradient could find and the kept one cannot. Near the anchor W0 it grows as the square of the way from
there, and the factor hardly changes in training (by 4 to 15 % from one renewal to the next)::

    gap  =  kappa ||W - W0||_F^2,      kappa as found at the last renewal

So no bound has to be computed in between: the way from the anchor, which costs what one more momentum would, is
measured now and then, and extrapolated in the steps between. A term is given one gap, of the sum over its weights.
While the predicted sum is below it nothing is done; then the weight is renewed for which that saves most, so that
renewals spread over the steps by themselves, and cheap weights are renewed more often. At each renewal the gap that had
opened is known for certain; `Wear` tells the widest.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from groundstate.blocks import Block
from groundstate.energies.capabilities import Anchor, Anchored
from groundstate.errors import UsageError
from groundstate.norms.spectral import working_dtype

_AIM = 0.9  # of the gap, where anchors are renewed: predictions are 4 to 15 % off
_OWN = 3.0  # gaps that one weight may have by itself, where others leave it the room
_REACH = 4.0  # times the gap found last, beyond which kappa is not trusted
_LONGEST = 20  # steps without a look: weights may rest for long, and then be moved by something else
_STALE = 1.15  # ratio of ages beyond which a prediction is checked before a renewal
_FIGURES = ("value", "shift", "slack", "kappa", "found", "refreshed", "looked", "way", "lower", "upper", "refreshes",
            "looks", "widest", "age")  # fmt: skip


class Wear(NamedTuple):
    """What the gradients of one weight, or one network, have cost so far, and how good they were.

    Attributes:
        name: The weight, or the weights.
        refreshes: Decompositions.
        looks: Measurements of the way from the anchor.
        lower, upper: Certified bounds of the energy at the last renewal, by the gradient kept until then and by the
            decomposition.
        widest: The largest relative distance of such bounds, of this weight by itself.
        age: Steps from the last renewal but one to the last.
    """

    name: str
    refreshes: int
    looks: int
    lower: float
    upper: float
    widest: float
    age: int


@dataclass
class _Unit:
    """One anchor: of a weight, or of all layers."""

    energy: Anchored
    blocks: tuple[Block, ...]
    cost: float  # of a renewal, in any unit
    gradients: list[Tensor] = field(default_factory=list)
    origin: list[Tensor] = field(default_factory=list)  # W0
    value: float = 0.0
    shift: float = 0.0
    slack: float = 0.0
    kappa: float = math.inf
    found: float = math.inf
    refreshed: float = -1.0
    looked: float = 0.0
    way: float = -1.0  # ||W - W0||_F^2 at the last look; negative before the first one
    lower: float = 0.0
    upper: float = math.inf
    refreshes: float = 0.0
    looks: float = 0.0
    widest: float = 0.0
    age: float = 0.0

    @property
    def name(self) -> str:
        return ", ".join(b.name for b in self.blocks)

    def weights(self) -> list[Tensor]:
        return [b.matrix.detach() for b in self.blocks]

    @property
    def growth(self) -> float:
        """The gap over the square of the age: the way from the anchor is taken to grow like the age."""
        if self.way == 0.0:
            return 0.0
        if self.way < 0:  # until a look, as it did last time
            return self.found / self.age**2 if self.age else math.inf
        return self.kappa * self.way / (self.looked - self.refreshed) ** 2

    def predicted(self, step: int) -> float:
        """The gap now."""
        age = step - self.refreshed
        return self.growth * age**2 if age else 0.0

    def stale(self, step: int) -> bool:
        """Whether the prediction is too old to renew for it."""
        return self.way < 0 or step - self.refreshed > _STALE * (self.looked - self.refreshed)

    def look(self, step: int) -> None:
        """Measures the way from the anchor; at the anchor's own step there is none yet."""
        if step == self.refreshed:
            return
        pairs = zip(self.weights(), self.origin, strict=True)
        found = sum(float(torch.dist(_work(w, self.value), _work(o, self.value))) ** 2 for w, o in pairs)
        self.looks += 1
        self.looked, self.way = step, math.inf if math.isnan(found) else found

    def alone(self, gap: float) -> float:
        """The gap at which it is renewed whatever the others do."""
        return min(_OWN * gap * self.value, _REACH * self.found)


def _work(w: Tensor, value: float) -> Tensor:
    """In a dtype that holds the squares of steps of weights whose norm is about ``value``."""
    return w.to(working_dtype(w.dtype) if 1e-9 < value < 1e15 else torch.float64)


def _cost(block: Block) -> float:
    """What a decomposition takes on a processor, in units of 27 ps, by four shapes that were timed."""
    m, n = max(block.matrix.shape), min(block.matrix.shape)
    return 8e6 + n * n * (m + 15.0 * n)


class Amortized:
    """The kept gradients of one term.

    Args:
        energies: The energy at each weight, or one for all of them together.
        groups: The weights of each energy.
        gap: Largest distance of the energy of the term from its lower bound, relative to it.
        named: Calls a function of weights such that a `NonFiniteError` names the energy and the weight given.
    """

    def __init__(
        self,
        energies: Sequence[Anchored],
        groups: Sequence[tuple[Block, ...]],
        gap: float,
        named: Callable[[str, Callable[[list[Tensor]], Any], list[Tensor]], Any],
    ) -> None:
        self.units = [_Unit(e, g, sum(map(_cost, g))) for e, g in zip(energies, groups, strict=True)]
        self.gap = gap
        self._named = named
        self._rate = math.inf
        self._quiet = -1.0  # nothing can be due before
        self._kept: list[tuple[Block, Tensor]] = []

    def gradients(self, step: int) -> list[tuple[Block, Tensor]]:
        """Returns a gradient for each weight, renewing what is due at this step.

        Raises:
            NonFiniteError: names the energy and the weight.
        """
        if step < self._quiet:
            return self._kept
        for unit in self.units:
            if unit.refreshed < 0:
                self._renew(unit, step)
            elif step - max(unit.looked, unit.refreshed) >= _LONGEST:
                unit.look(step)
        self._renew_alone(step)
        known = [u for u in self.units if u.kappa < math.inf]
        room = _AIM * self.gap * sum(u.value for u in self.units)
        while known and sum(u.predicted(step) for u in known) > room:
            worst = max(known, key=lambda u: u.predicted(step) * (step - u.refreshed) / u.cost)
            if worst.stale(step):
                worst.look(step)
            else:
                self._renew(worst, step)
        self._kept = [(b, g) for u in self.units for b, g in zip(u.blocks, u.gradients, strict=True)]
        self._quiet = self._until(step, room)
        return self._kept

    def act(self, step: int, valued: bool, rate: float) -> tuple[float, list[tuple[Block, Tensor]]]:
        """Returns `value`, or 0 where it is not asked for, and `gradients`; looks again where the rate rose.

        Args:
            step: Number of the step.
            valued: Whether the value is asked for.
            rate: The largest learning rate; 0 where it is not known.
        """
        if rate > 2 * self._rate:
            for unit in self.units:
                if unit.refreshed >= 0:
                    unit.look(step)
            self._rate, self._quiet = rate, -1.0
        self._rate = min(self._rate, rate)
        grads = self.gradients(step)
        return self.value() if valued else 0.0, grads

    def value(self) -> float:
        """Returns the certified lower bound of the sum at the weights as they are now; waits for the device."""
        return sum(_anchor(u).lower(u.weights()) for u in self.units)

    def wear(self) -> list[Wear]:
        """Returns the counts and the last bounds of each anchor."""
        return [
            Wear(u.name, int(u.refreshes), int(u.looks), u.lower, u.upper, u.widest, int(u.age)) for u in self.units
        ]

    def _until(self, step: int, room: float) -> float:
        """The time before which nothing can be due: the next look, or where sum_i growth_i (age_i + d)^2 = room."""
        last = min(max(u.looked, u.refreshed) for u in self.units) + float(_LONGEST)
        a = b = c = 0.0
        for u in self.units:
            age, growth = step - u.refreshed, u.growth
            if growth > 0:
                a, b, c = a + growth, b + growth * age, c + growth * age**2
                last = min(last, u.refreshed + math.sqrt(u.alone(self.gap) / growth))
        if a == math.inf or c > room:
            return step
        return min(last, step + (math.sqrt(b * b + a * (room - c)) - b) / a) if a > 0 else last

    def _renew_alone(self, step: int) -> None:
        """Renews weights whose own gap is too wide, or out of reach of what is known; of the latter a few at a step."""
        left = max(4, len(self.units) // 4)
        for unit in sorted(self.units, key=lambda u: u.refreshed):
            if unit.predicted(step) > unit.alone(self.gap) and unit.stale(step):
                unit.look(step)
            if unit.predicted(step) > unit.alone(self.gap):
                out_of_reach = unit.kappa == math.inf or unit.predicted(step) <= _OWN * self.gap * unit.value
                if not out_of_reach or left > 0:
                    left -= out_of_reach
                    self._renew(unit, step)

    def _renew(self, unit: _Unit, step: int) -> None:
        weights = unit.weights()
        with torch.inference_mode(False):  # what is kept serves steps of training too
            at: Anchor = self._named(unit.name, unit.energy.anchor, weights)
            origin = [w.clone() for w in weights]
        upper = at.value * (1 + at.slack)
        if unit.refreshed >= 0:
            if unit.looked != step or unit.way < 0:
                unit.look(step)
            unit.lower, unit.age = _anchor(unit).lower(weights), step - unit.refreshed
            unit.widest = max(unit.widest, (upper - unit.lower) / unit.lower if unit.lower > 0 else math.inf)
            # Below the rounding errors nothing is known of the gap but that it is smaller.
            unit.found = max(upper - unit.lower, 2 * at.slack * at.value)
            if unit.found > 0 and 0 < unit.way < math.inf:  # weights that became zero say nothing
                unit.kappa = unit.found / unit.way
        else:
            unit.lower = upper
        unit.value, unit.shift, unit.slack, unit.upper = at.value, at.shift, at.slack, upper
        unit.gradients, unit.origin = at.gradients, origin
        unit.refreshes += 1
        unit.refreshed, unit.looked, unit.way = step, step, -1.0

    # ------------------------------------------------------------------ state

    def state(self) -> dict[str, Tensor]:
        """Returns everything that the next step depends on, as tensors by name."""
        found = {"rate": torch.tensor(self._rate, dtype=torch.float64)}
        for i, u in enumerate(self.units):
            figures = [getattr(u, name) for name in _FIGURES]
            found[f"{i}/figures"] = torch.tensor(figures, dtype=torch.float64)
            found |= {f"{i}/gradient/{k}": g for k, g in enumerate(u.gradients)}
            found |= {f"{i}/origin/{k}": w for k, w in enumerate(u.origin)}
        return {k: v.clone() for k, v in found.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restores `state`; an empty one, saved without a gap, leaves everything to be renewed.

        Raises:
            UsageError: it is of other weights, or of another version.
        """
        if not state:
            return
        if "rate" not in state:
            raise UsageError("the saved gradients are of another version: start the run anew, or resume without a gap")
        for i, u in enumerate(self.units):
            for kind in ("gradient", "origin"):
                saved = _numbered(state, f"{i}/{kind}/")
                figures = state.get(f"{i}/figures")
                fits = figures is not None and len(figures) == len(_FIGURES) and len(saved) in (0, len(u.blocks))
                if not fits or any(v.shape != b.matrix.shape for v, b in zip(saved, u.blocks, strict=False)):
                    raise UsageError(f"the saved gradients of {u.energy!r} are of other weights than {u.name}")
        self._rate, self._quiet = float(state["rate"]), -1.0
        for i, u in enumerate(self.units):
            for name, value in zip(_FIGURES, state[f"{i}/figures"].tolist(), strict=True):
                setattr(u, name, value)
            device = u.blocks[0].parameter.device
            u.gradients = [v.clone().to(device) for v in _numbered(state, f"{i}/gradient/")]
            u.origin = [v.clone().to(device) for v in _numbered(state, f"{i}/origin/")]


def _numbered(state: Mapping[str, Tensor], prefix: str) -> list[Tensor]:
    count = sum(k.startswith(prefix) for k in state)
    return [state[f"{prefix}{k}"] for k in range(count)]


def _anchor(unit: _Unit) -> Anchor:
    return Anchor(unit.value, unit.gradients, unit.shift, unit.slack)
