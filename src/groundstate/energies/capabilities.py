"""What an energy may be able to do beyond its value and its gradient.

Idea: the kinds of energies in `groundstate.energies.base` say what an energy is a function of; each class here is one
capability that some have. Who uses it asks with ``isinstance``: `measure` shares decompositions between ``Spectral``
energies, the `Regularizer` moves ``Proximable`` ones by their prox, and so on.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from groundstate.energies.base import FunctionEnergy, MatrixEnergy, NetworkEnergy
from groundstate.norms.subgradient import inner


class Spectral(ABC):
    """A matrix energy that depends on the singular values only, so that several can share one decomposition."""

    @abstractmethod
    def of_singular_values(self, s: Tensor) -> Tensor:
        """Returns E for singular values ``(*batch, r)`` in descending order, r = min(out, in); shape ``(*batch,)``."""


class Evolving(ABC):
    """A matrix energy that draws anew, or learns, at every step (projections, stale decompositions).

    ``value`` and ``value_and_grad`` stay functions of the weight alone, for measuring; in training `step` is called
    instead. What it keeps is a flat mapping of tensors per weight, so that it can be saved.
    """

    @abstractmethod
    def remember(self, w: Tensor, probe: torch.Generator) -> dict[str, Tensor]:
        """Returns what is kept of the weight ``w`` before the first step; shapes and names stay the same."""

    @abstractmethod
    def step(self, w: Tensor, memory: dict[str, Tensor], probe: torch.Generator) -> tuple[Tensor, Tensor]:
        """Returns ``(E, dE/dW)`` at one training step; may change the tensors of ``memory`` in place.

        Args:
            w: The weight, ``(*batch, out, in)``.
            memory: What `remember` gave, and what the steps since made of it.
            probe: Source of everything random in this step.
        """


class Resolving(ABC):
    """An energy of the function that leaves something open until it sees a network and a batch (where to cut it).

    In training that is settled at the first batch and kept, as a flat mapping of tensors, so that a resumed run goes on
    with the same.
    """

    @abstractmethod
    def unresolved(self) -> dict[str, Tensor]:
        """Returns what is kept before the first batch, empty if nothing is open; shapes and names stay the same."""

    @abstractmethod
    def resolve(self, f: nn.Module, x: Tensor, y: Tensor | None, memory: dict[str, Tensor]) -> FunctionEnergy:
        """Returns the energy with nothing open: as ``memory`` says, which the first batch settles in place."""


class Anchor(NamedTuple):
    """A convex energy at some weights, with what bounds it from below everywhere.

    Attributes:
        value: E(W0).
        gradients: A subgradient for each weight.
        shift: E(W0) - <G, W0>; 0 for norms.
        slack: Bound of the relative error of the lower bound and of the value, as computed.
    """

    value: float
    gradients: list[Tensor]
    shift: float
    slack: float

    def lower(self, weights: Sequence[Tensor]) -> float:
        """Returns a certified lower bound of E at other weights, not negative; waits for the device."""
        found = inner(self.gradients, weights)
        return max(found + self.shift - self.slack * (abs(found) + abs(self.shift)), 0.0)


class Anchored(ABC):
    """A convex energy whose gradient costs so much that it should serve many steps.

    With `Regularizer(gap=...)` a gradient is kept until the energy is predicted to be that far above the lower bound
    that the gradient gives.
    """

    def bounded(self) -> bool:
        """Whether it is convex with its present options."""
        return True

    @abstractmethod
    def anchor(self, weights: Sequence[Tensor]) -> Anchor:
        """Returns the value and a subgradient, with certified errors.

        Args:
            weights: One ``(out, in)`` matrix for an energy of a weight, all layers for an energy of a network.
        """


@dataclass(frozen=True)
class Ground:
    """What an energy of a weight can be at all, for its shape.

    Attributes:
        floor: A lower bound that holds for every weight of that shape.
        random: Its expected value at random directions; ``None`` where it is not finite.
        how: Where the floor comes from.
    """

    floor: float
    random: float | None
    how: str


class Grounded(ABC):
    """A matrix energy whose ground state, or a certified lower bound of it, is known for every shape."""

    @abstractmethod
    def ground(self, rows: int, columns: int) -> Ground:
        """Returns the reference values for weights of a shape.

        Raises:
            UsageError: there is none for this shape.
        """


class Proximable(ABC):
    """Has a proximal map."""

    @abstractmethod
    def prox(self, w: Tensor, step: float) -> Tensor:
        """Returns argmin_u step * E(u) + 1/2 ||u - w||_F^2, shape of ``w``."""


class Dualizable(ABC):
    """A norm with a known dual norm and linear minimization oracle."""

    @abstractmethod
    def dual(self, g: Tensor) -> Tensor:
        """Returns the dual norm max over E(u) <= 1 of <g, u>, shape ``(*batch,)``."""

    @abstractmethod
    def lmo(self, g: Tensor) -> Tensor:
        """Returns argmin over E(u) <= 1 of <g, u>, shape of ``g`` (zero where g is zero)."""


class OfModule(ABC):
    """A matrix energy that needs to know more of a weight than its entries."""

    @abstractmethod
    def for_module(self, module: nn.Module | None, shape: Sequence[int]) -> MatrixEnergy:
        """Returns the energy that takes its place at a weight.

        Args:
            module: The owner of the weight; ``None`` where it is not known (stride 1, no groups are assumed).
            shape: Of the parameter.

        Raises:
            UsageError: the module is none whose weight can be read.
        """


class OfModel(ABC):
    """An energy that finds the weights it acts on in the model itself."""

    @abstractmethod
    def for_model(self, model: nn.Module) -> tuple[NetworkEnergy, list[tuple[str, nn.Parameter]]]:
        """Returns the energy of a list of weights that takes its place, and the list, by canonical names.

        Raises:
            UsageError: the model has none of them.
        """
