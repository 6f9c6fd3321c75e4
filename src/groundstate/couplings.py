"""One term placed on one model: which weights it sees, its value, its gradients, its differentiable form."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from groundstate import idle
from groundstate.amortized import Amortized
from groundstate.blocks import Block, canonical, last_linear
from groundstate.energies.base import (
    Coupling,
    Energy,
    FunctionEnergy,
    MatrixEnergy,
    NetworkEnergy,
    Term,
    TrajectoryEnergy,
    is_number,
    summed,
)
from groundstate.energies.capabilities import Anchored, Evolving, OfModel, OfModule, Resolving
from groundstate.errors import NonFiniteError, UsageError
from groundstate.layers import ordered_layers


@dataclass(frozen=True)
class Turn:
    """What a term is given at one step: the path so far, what it keeps of each weight, its sources of probes.

    ``settled`` is what an energy of the function settles at its first batch.
    ``kept``, where given, returns the value and the gradients instead (`groundstate.amortized`).
    """

    trajectory: dict[str, Tensor]
    memories: dict[str, dict[str, Tensor]]
    probe: Callable[[str], torch.Generator]
    settled: dict[str, Tensor]
    kept: Callable[[], tuple[float, list[tuple[Block, Tensor]]]] | None = None


@dataclass(frozen=True)
class Placed:
    """A term with the weights that it sees; for a network energy the ordered layers, else the selected blocks.

    Attributes:
        energy: The energy.
        strength: Its factor.
        coupling: Where it acts.
        blocks: The weights.
        output: Name of the weight of the network's last linear layer, where it is among them.
    """

    energy: Energy
    strength: float
    coupling: Coupling
    blocks: tuple[Block, ...]
    output: str | None = None

    @cached_property
    def key(self) -> str:
        """The energy's spec: its name in metrics and reports."""
        return repr(self.energy)

    @property
    def per_block(self) -> bool:
        return isinstance(self.energy, MatrixEnergy)

    @property
    def acting(self) -> list[Energy]:
        """The energy as it acts: at each of its weights, or once."""
        return [self.at(b) for b in self.blocks] if self.per_block else [self.energy]

    def takes(self, option: str) -> bool:
        """Whether it takes an option, wherever it acts."""
        return all(idle.takes(option, energy, self.coupling) for energy in self.acting)

    def formula(self, optimizer: Optimizer | None) -> str:
        """Returns the exact update, for this optimizer."""
        if self.coupling == "monitor":
            return "measured only"
        if self.coupling == "prox":
            return f"after the step, W <- prox of lr * {self.strength:g} * {self.key}"
        if self.coupling == "loss":
            return f"loss + {self.strength:g} * {self.key}"
        if isinstance(self.energy, TrajectoryEnergy) and optimizer is not None:
            return self.energy.explain(self.strength, optimizer)
        return f"before the step, g <- g + {self.strength:g} * gradient of {self.key}"

    def at(self, block: Block) -> MatrixEnergy:
        """Returns the matrix energy that acts on a weight."""
        if not isinstance(self.energy, MatrixEnergy):
            raise UsageError(f"{self.key} is not an energy of single weights")
        energy = self.energy.at_output() if block.name == self.output else self.energy
        return energy.for_module(block.module, block.parameter.shape) if isinstance(energy, OfModule) else energy

    def by_block(self) -> dict[str, float]:
        """Returns the value of a matrix energy at each weight."""
        if not isinstance(self.energy, MatrixEnergy):
            return {}
        view = self.energy.view
        return {b.name: _named(self, b.name, partial(summed, self.at(b).value), b.seen(view)) for b in self.blocks}

    def amortized(self, gap: float) -> Amortized | None:
        """Returns what keeps gradients until they are ``gap`` too old; ``None``: the energy has no bounds."""
        groups = [(b,) for b in self.blocks] if self.per_block else [self.blocks]
        anchored = [e for e in self.acting if isinstance(e, Anchored)]
        if not (groups and self.takes("gap")):
            return None
        return Amortized(anchored, groups, gap, partial(_named, self))

    def memories(self, probe: Callable[[str], torch.Generator]) -> dict[str, dict[str, Tensor]]:
        """Returns what an evolving energy keeps of each weight before the first step."""
        found = {}
        for b in self.blocks if self.per_block else ():
            energy = self.at(b)
            if isinstance(energy, Evolving):
                seen, source = b.seen(energy.view), probe(b.name)
                found[b.name] = _named(self, b.name, partial(energy.remember, probe=source), seen)
        return found

    def value_and_gradients(self, turn: Turn | None = None) -> tuple[float, list[tuple[Block, Tensor]]]:
        """Returns the value and, for every weight that can be trained, the gradient as a matrix.

        Args:
            turn: What this step gives; without it evolving energies are taken as functions of the weight alone.

        Raises:
            NonFiniteError: names the energy and the weight; nothing has been written anywhere.
        """
        if turn is not None and turn.kept is not None:
            return turn.kept()
        if isinstance(self.energy, TrajectoryEnergy):
            trajectory = {} if turn is None else turn.trajectory
            value, by_name = self.energy.term(trajectory, {b.name: b.parameter.detach() for b in self.blocks})
            found = [(b, by_name[b.name]) for b in self.blocks]
            values = [value]
        elif isinstance(self.energy, NetworkEnergy):
            where = ", ".join(b.name for b in self.blocks)
            value, grads = _named(self, where, self.energy.value_and_grad, [b.matrix for b in self.blocks])
            found, values = list(zip(self.blocks, grads, strict=True)), [value]
        elif isinstance(self.energy, MatrixEnergy):
            pairs = [self._at_block(b, turn) for b in self.blocks]
            found, values = [(b, g) for b, (_, g) in zip(self.blocks, pairs, strict=True)], [v.sum() for v, _ in pairs]
        else:
            return 0.0, []
        for block, grad in found:
            if not bool(torch.isfinite(grad.sum())) and not bool(torch.isfinite(grad).all()):
                raise NonFiniteError(
                    f"the gradient of {self.key} at {block.name} is not finite: nothing was added; lower the learning "
                    "rate or the strength, or start again from a good checkpoint"
                )
        return sum(float(v) for v in values), found

    def _at_block(self, block: Block, turn: Turn | None) -> tuple[Tensor, Tensor]:
        energy = self.at(block)
        w = block.seen(energy.view)
        if turn is None or not isinstance(energy, Evolving):
            return _named(self, block.name, energy.value_and_grad, w)
        memory, probe = turn.memories[block.name], turn.probe(block.name)
        return _named(self, block.name, lambda seen: energy.step(seen, memory, probe), w)


def place(term: Term, model: nn.Module, blocks: list[Block], default: Coupling) -> Placed:
    """Settles the coupling of a term and the weights it sees.

    Raises:
        UsageError: the energy does not have that coupling, or the model cannot be ordered.
    """
    energy = term.energy
    coupling = idle.settle(term, default)
    if why := idle.misfit(term, coupling):
        raise UsageError(why)
    if isinstance(energy, OfModel):
        energy, named = energy.for_model(model)
        blocks = [Block(name, parameter) for name, parameter in named]
    elif isinstance(energy, NetworkEnergy):
        blocks = [Block(canonical(name), parameter) for name, parameter in ordered_layers(model)]
    if isinstance(energy, MatrixEnergy):
        rows, columns = energy.smallest
        shapes = [b.seen(energy.view).shape[-2:] for b in blocks]
        blocks = [b for b, shape in zip(blocks, shapes, strict=True) if shape[0] >= rows and shape[1] >= columns]
        if not blocks:
            raise UsageError(f"{energy!r} needs weights of at least {rows} x {columns}: no selected one is so large")
    for block in blocks:
        if type(block.parameter).__name__ == "DTensor" or type(block.parameter.data).__name__ == "DTensor":
            raise UsageError(f"{block.name} is a sharded parameter (DTensor), which is not supported yet")
    placed = Placed(energy, term.strength, coupling, tuple(blocks), last_linear(model))
    if isinstance(energy, OfModule):
        for block in blocks:
            placed.at(block)  # refuses modules that it cannot read, before training
    return placed


def refuse_idle(
    placed: list[Placed], *, coupling: Coupling, every: int, gap: float | None, select: str | None, schedule: Any
) -> None:
    """Refuses options that no term takes; the defaults, and an empty sum as of a baseline, pass.

    Raises:
        UsageError: names the option, and why it plays no part.
    """
    options: dict[str, tuple[Any, Any]] = {
        "coupling": (coupling, "grad"),
        "every": (every, 1),
        "gap": (gap, None),
        "select": (select, None),
        "schedule": (schedule, None),
    }
    given = {name: f"{name}={value!r}" for name, (value, default) in options.items() if value != default}
    taken = {name for name in given for p in placed if p.takes(name) or (name == "coupling" and p.coupling == coupling)}
    if placed:
        idle.refuse_idle(given, taken, " + ".join(f"{p.key}@{p.coupling}" for p in placed))


def keep_gradients(placed: list[Placed], gap: float, every: int) -> dict[str, Amortized]:
    """Returns what keeps the gradients of the terms that have certified bounds, by their keys.

    Raises:
        UsageError: the gap is not between 0 and 1, or terms are to act at some steps only.
    """
    if not (is_number(gap) and 0 < gap < 1):
        raise UsageError(f"gap must be a number between 0 and 1, the share of the energy that may open, got {gap!r}")
    if every != 1:
        raise UsageError(f"with a gap terms act at every step: leave every={every} out, or the gap")
    return {p.key: kept for p in placed if (kept := p.amortized(gap)) is not None}


def total_value(p: Placed) -> float | None:
    """Returns the value of a term of weights summed over its blocks, ``None`` for energies that need a batch."""
    if isinstance(p.energy, MatrixEnergy):
        return sum(p.by_block().values())
    if isinstance(p.energy, NetworkEnergy):
        with torch.no_grad():
            return _named(p, "the layers", partial(summed, p.energy.value), [b.matrix for b in p.blocks])
    return None


def differentiable_value(
    p: Placed, model: nn.Module, x: Tensor | None, y: Tensor | None, probe: torch.Generator, turn: Turn
) -> Tensor:
    """Returns the value of a term as a node of the autograd graph of the loss."""
    if isinstance(p.energy, FunctionEnergy):
        if x is None:
            raise UsageError(f"{p.key} needs the batch: call reg.loss(x, y) with the inputs of the step")
        energy = p.energy
        if isinstance(energy, Resolving):
            energy = energy.resolve(model, x, y, turn.settled)
        return energy.value(model, x, y, probe=probe)
    value: Tensor = _ClosedForm.apply(p, turn, *[b.parameter for b in p.blocks])  # pyright: ignore[reportAssignmentType]
    return value


class _ClosedForm(torch.autograd.Function):
    """The value of a weight energy whose gradient is its closed form; the decomposition runs once."""

    @staticmethod
    def forward(ctx: Any, p: Placed, turn: Turn, *weights: Tensor) -> Tensor:
        value, grads = p.value_and_gradients(turn)
        ctx.save_for_backward(*[block.like(g) for block, g in grads])
        dtype = weights[0].dtype if weights[0].dtype == torch.float64 else torch.float32
        return torch.tensor(value, dtype=dtype, device=weights[0].device)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> Any:
        return (None, None, *[outputs[0].to(g.dtype) * g for g in ctx.saved_tensors])


def add_to_gradients(additions: list[tuple[nn.Parameter, Tensor, float]]) -> None:
    """Adds ``factor * gradient`` to ``.grad`` of each parameter.

    Raises:
        UsageError: a gradient is sparse.
    """
    for parameter, gradient, factor in additions:
        if parameter.grad is not None and parameter.grad.is_sparse:
            raise UsageError("sparse gradients are not supported: leave that embedding out with select='!name'")
        if parameter.grad is not None:
            parameter.grad.add_(gradient, alpha=factor)


def warn_not_asked(firing: list[Placed], warned: set[str]) -> None:
    """Names the terms of the loss that were due in a step and were not asked for, each once."""
    if new := [p.key for p in firing if p.key not in warned]:
        warned.update(new)
        warnings.warn(
            f"{', '.join(new)} did not act in this step: add reg.loss(x, y) to the loss before backward", stacklevel=4
        )


def warn_without_samples(placed: list[Placed], warned: set[str]) -> None:
    """Names the energies of the function that are left out of values without samples, once."""
    left = [p.key for p in placed if isinstance(p.energy, FunctionEnergy)]
    if left and "samples" not in warned:
        warned.add("samples")
        warnings.warn(f"{', '.join(left)}: not among the values without samples, use values(x, y)", stacklevel=3)


def warn_without_gradient(blocks: list[Block], warned: set[str]) -> None:
    """Names the weights that the loss did not reach, each once."""
    missed = {b.name for b in blocks if b.parameter.grad is None and b.parameter.requires_grad}
    if new := [b.name for b in blocks if b.name in missed - warned]:
        warned.update(new)
        warnings.warn(
            f"no gradient reached {', '.join(new)}: their energy is measured but adds nothing (a term in the loss "
            "would; use coupling 'loss' if you want that)",
            stacklevel=5,
        )


def _named(p: Placed, where: str, function: Any, w: Any) -> Any:
    try:
        return function(w)
    except NonFiniteError as error:
        raise NonFiniteError(f"{p.key} at {where}: {error}") from None
