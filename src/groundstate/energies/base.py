"""What an energy is: a frozen dataclass that holds hyper-parameters and nothing else.

A concrete energy says how to compute its value (and, where a closed form is known, its gradient). It knows nothing of
models, optimizers, devices or steps: ``Regularizer`` does. Capabilities are small abstract classes (``Proximable``,
``Dualizable``) and the capability test is ``isinstance``.

Algebra: ``1e-4 * e`` is a `Term`, ``e1 + e2`` a `Sum`, ``term.via("prox")`` (in specs: ``1e-4*nuclear@prox``) fixes the
coupling of one term. ``repr`` of all of them is the spec that `groundstate.energies.parse` reads back.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, ClassVar, Literal, Self, TypeGuard

import torch
from torch import Tensor

from groundstate.errors import UsageError

Coupling = Literal["loss", "grad", "prox", "monitor"]
COUPLINGS: tuple[Coupling, ...] = ("loss", "grad", "prox", "monitor")

Invariance = Literal["orthogonal", "permutation", "sign", "scale", "neuron_sign", "neuron_permutation"]


@dataclass(frozen=True)
class Traits:
    """Facts about an energy that the contract suite checks and the documentation prints.

    Attributes:
        formula: The value, in plain text, e.g. ``"sum_i sigma_i(W)"``.
        reference: Author, year, equation.
        cost: Leading cost of one value and gradient.
        convex: Whether E is convex.
        degree: Homogeneity degree d, E(cW) = |c|^d E(W); ``None`` where there is none.
        invariances: Of a matrix energy: ``orthogonal`` E(PWQ) = E(W), ``permutation`` of rows and columns, ``sign`` of
            single entries, ``scale`` E(cW) = E(W). Of a network energy: ``neuron_sign``, ``neuron_permutation``.
        smooth: Whether E is differentiable everywhere.
        differentiable: False for energies that only measure (no gradient is asked of them).
        surrogate: The gradient is not the derivative of the value but of a surrogate that equals it at convergence
            (directions of a power iteration are held fixed).
    """

    formula: str
    reference: str
    cost: str
    convex: bool
    degree: float | None
    invariances: tuple[Invariance, ...] = ()
    smooth: bool = False
    differentiable: bool = True
    surrogate: bool = False


@dataclass(frozen=True, repr=False)
class Energy(ABC):
    """A scalar function to measure and minimize. Concrete energies are frozen dataclasses and final."""

    name: ClassVar[str]
    traits: ClassVar[Traits]
    aliases: ClassVar[tuple[str, ...]] = ()

    @classmethod
    @abstractmethod
    def examples(cls) -> tuple[Self, ...]:
        """The instances that contracts, benchmarks and documentation use."""

    def __mul__(self, strength: float) -> Term:
        return Term(float(strength), self)

    __rmul__ = __mul__

    def __add__(self, other: Energy | Term | Sum) -> Sum:
        return Sum.of(self, other)

    def via(self, coupling: Coupling) -> Term:
        """Returns this energy, at strength 1, acting through ``coupling``."""
        return Term(1.0, self, coupling)

    def __repr__(self) -> str:
        shown = [
            f"{f.name}={getattr(self, f.name)!r}"
            for f in fields(self)
            if f.default is MISSING or getattr(self, f.name) != f.default
        ]
        return f"{self.name}({', '.join(shown)})" if shown else self.name


class MatrixEnergy(Energy):
    """Energy of one weight block: shape ``(*batch, out, in)`` to ``(*batch,)``.

    Attributes:
        view: How it sees a weight: ``matrix``, or ``neurons``, where each group of a grouped convolution is a matrix of
            its own; its energies are summed.
        smallest: Fewest rows and columns on which it is defined; smaller weights are left out.
        quick_rows: Rows beyond which it is slow or large, so that measuring everything leaves it out.
    """

    view: ClassVar[Literal["matrix", "neurons"]] = "matrix"
    smallest: ClassVar[tuple[int, int]] = (0, 0)
    quick_rows: ClassVar[int | None] = None

    def at_output(self) -> MatrixEnergy:
        """Returns the energy that takes its place at the last linear layer of a network; by default itself."""
        return self

    @abstractmethod
    def value(self, w: Tensor) -> Tensor:
        """Returns E for each matrix of the batch, shape ``(*batch,)``; differentiable by autograd."""

    def value_and_grad(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Returns ``(E, dE/dW)`` of shapes ``(*batch,)`` and ``(*batch, out, in)``, without an autograd graph."""

        def total(u: Tensor) -> tuple[Tensor, Tensor]:
            value = self.value(u)
            return value.sum(), value

        grad, value = torch.func.grad(total, has_aux=True)(w.detach())
        return value.detach(), grad.detach()


class NetworkEnergy(Energy):
    """Energy of the ordered layers of a network: matrices W_1..W_L, W_l of shape ``(d_l, d_{l-1})``, to a scalar."""

    @abstractmethod
    def value(self, layers: Sequence[Tensor]) -> Tensor:
        """Returns E, a scalar tensor; differentiable by autograd."""

    def value_and_grad(self, layers: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Returns E and one gradient per layer, without an autograd graph."""
        with recording():
            leaves = [w.detach().clone().requires_grad_() for w in layers]
            value = self.value(leaves)
            grads = torch.autograd.grad(value, leaves, allow_unused=True)
        return value.detach(), [torch.zeros_like(w) if g is None else g for g, w in zip(grads, leaves, strict=True)]


@dataclass(frozen=True)
class Estimate:
    """What measuring an energy of the function gave.

    Attributes:
        value: The energy.
        standard_error: Of ``value`` as an estimate for the distribution that the samples come from, random probes
            included; ``None`` where one sample, or no average over samples, leaves it unknown.
        samples: How many samples it rests on.
        how: The route or estimator, in words.
        details: Further figures, by name.
    """

    value: float
    standard_error: float | None
    samples: int
    how: str = ""
    details: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, values: Tensor, how: str = "", details: Mapping[str, float] | None = None) -> Self:
        """Returns the mean of per-sample values ``(B,)`` with its standard error."""
        wide = values.detach().double()
        error = float(wide.std() / len(wide) ** 0.5) if len(wide) > 1 else None
        return cls(float(wide.mean()), error, len(wide), how, dict(details or {}))


class FunctionEnergy(Energy):
    """Energy of the function x -> f(x); needs the batch and acts through ``Regularizer.loss(x, y)``.

    Attributes:
        least_outputs: Fewest outputs on which it is defined.
    """

    least_outputs: ClassVar[int] = 1

    @abstractmethod
    def value(self, f: Any, x: Tensor, y: Tensor | None = None, *, probe: torch.Generator) -> Tensor:
        """Returns E on the batch, a scalar tensor; differentiable with respect to the parameters of ``f``.

        It may be an unbiased estimate on a part of the batch, as training needs it.

        Args:
            f: The network (a module, or any callable on tensors).
            x: Inputs, ``(B, ...)``.
            y: Labels, where the energy needs them.
            probe: Source of everything random.
        """

    def estimate(self, f: Any, x: Tensor, y: Tensor | None = None, *, probe: torch.Generator) -> Estimate:
        """Measures E on all samples, as exactly as is affordable, with its standard error; builds no graph."""
        with torch.no_grad():
            return Estimate(float(self.value(f, x, y, probe=probe)), None, len(x))


class TrajectoryEnergy(Energy):
    """Energy of the sequence of weights. The state is a flat mapping of tensors, so that it can be saved."""

    @abstractmethod
    def init(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns the state at the first point of the trajectory."""

    @abstractmethod
    def observe(
        self, state: dict[str, Tensor], blocks: Mapping[str, Tensor], dt: Mapping[str, float]
    ) -> dict[str, Tensor]:
        """Returns the state after one optimizer step that led to ``blocks``.

        Args:
            state: The state before the step; may be changed in place.
            blocks: The weights now, by name.
            dt: The learning rate of that step, by name of block.
        """

    @abstractmethod
    def value(self, state: Mapping[str, Tensor]) -> Tensor:
        """Returns the energy of the path so far, a float64 scalar."""

    @abstractmethod
    def term(self, state: Mapping[str, Tensor], blocks: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the value that the energy adds to the objective at the current weights and its gradient, by name."""

    @abstractmethod
    def rebase(self, state: dict[str, Tensor], blocks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        """Returns the state moved to ``blocks`` without counting the jump, and the length of the jump."""

    def summary(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns the figures that a report shows, by name."""
        return {self.name: float(self.value(state))}

    def explain(self, strength: float, optimizer: torch.optim.Optimizer) -> str:
        """Returns what the term does to this optimizer.

        Raises:
            UsageError: the term makes the optimizer unstable.
        """
        return f"g <- g + {strength:g} * gradient of {self!r}"


@dataclass(frozen=True, repr=False)
class Term:
    """``strength * energy``, with the coupling it acts through (``None``: the regularizer's default)."""

    strength: float
    energy: Energy
    coupling: Coupling | None = None

    def __post_init__(self) -> None:
        if not math.isfinite(self.strength) or self.strength < 0:
            raise UsageError(
                f"the strength of {self.energy.name!r} must be finite and not negative, got {self.strength!r}: "
                f"energies are minimized; write e.g. 1e-4*{self.energy.name}"
            )
        if self.coupling is not None and self.coupling not in COUPLINGS:
            raise UsageError(f"coupling must be one of {', '.join(COUPLINGS)}, got {self.coupling!r}")

    def __mul__(self, factor: float) -> Term:
        return Term(self.strength * float(factor), self.energy, self.coupling)

    __rmul__ = __mul__

    def __add__(self, other: Energy | Term | Sum) -> Sum:
        return Sum.of(self, other)

    def via(self, coupling: Coupling) -> Term:
        """Returns this term acting through ``coupling``: loss, grad, prox or monitor."""
        return Term(self.strength, self.energy, coupling)

    def __repr__(self) -> str:
        base = repr(self.energy) if self.strength == 1.0 else f"{self.strength!r}*{self.energy!r}"
        return base if self.coupling is None else f"{base}@{self.coupling}"


@dataclass(frozen=True, repr=False)
class Sum:
    """A sum of terms; the empty sum is spelled ``none``."""

    terms: tuple[Term, ...] = ()

    @classmethod
    def of(cls, *parts: Energy | Term | Sum) -> Sum:
        """Collects energies, terms and sums into one flat sum."""
        terms: list[Term] = []
        for part in parts:
            if isinstance(part, Sum):
                terms.extend(part.terms)
            elif isinstance(part, Term):
                terms.append(part)
            elif isinstance(part, Energy):
                terms.append(Term(1.0, part))
            else:
                raise UsageError(f"only energies can be added, got {type(part).__name__}: write e.g. 1e-4*Nuclear()")
        return cls(tuple(terms))

    def __add__(self, other: Energy | Term | Sum) -> Sum:
        return Sum.of(self, other)

    def __mul__(self, factor: float) -> Sum:
        return Sum(tuple(t * factor for t in self.terms))

    __rmul__ = __mul__

    def __repr__(self) -> str:
        return " + ".join(map(repr, self.terms)) if self.terms else "none"


@contextmanager
def recording() -> Iterator[None]:
    """Has autograd record, in inference mode too; make copies inside, what was made in that mode cannot be used."""
    with torch.inference_mode(False), torch.enable_grad():
        yield


def summed(value: Callable[[Any], Tensor], weights: Tensor | Sequence[Tensor]) -> float:
    """Returns the sum of ``value(weights)``, of float64 weights where that of the given ones leaves the range.

    >>> summed(torch.sum, torch.full((2,), 2.0**127)) / 2.0**127  # float32 ends below 2^128
    2.0
    """
    found = float(value(weights).double().sum())
    if math.isfinite(found):
        return found
    wide = weights.double() if isinstance(weights, Tensor) else [w.double() for w in weights]
    return float(value(wide).sum())


def require(condition: bool, message: str) -> None:
    """Raises `UsageError` with ``message`` unless ``condition`` holds: for hyper-parameters in ``__post_init__``."""
    if not condition:
        raise UsageError(message)


def refuse_unused(energy: Energy, where: str, *names: str) -> None:
    """Raises `UsageError` where one of these fields is not at its default: for fields without effect beside others."""
    for f in fields(energy):
        if f.name in names and (got := getattr(energy, f.name)) != f.default:
            raise UsageError(f"{f.name}={got!r} of {energy.name} plays no part with {where}: leave it out")


def is_whole(value: object, least: int = 0) -> TypeGuard[int]:
    """Whether a value is a whole number (``True`` is none) from ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a finite real number (``True`` is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
