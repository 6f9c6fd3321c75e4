"""One term placed on one model: which weights it sees, its value, its gradients, its differentiable form."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from groundstate.blocks import Block, canonical, last_linear
from groundstate.energies.base import (
    Coupling,
    Energy,
    Evolving,
    FunctionEnergy,
    MatrixEnergy,
    NetworkEnergy,
    Proximable,
    Term,
    TrajectoryEnergy,
)
from groundstate.errors import NonFiniteError, UsageError
from groundstate.layers import ordered_layers


@dataclass(frozen=True)
class Turn:
    """What a term is given at one step: the path so far, what it keeps of each weight, and its sources of probes."""

    trajectory: dict[str, Tensor]
    memories: dict[str, dict[str, Tensor]]
    probe: Callable[[str], torch.Generator]


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

    @property
    def key(self) -> str:
        """The energy's spec: its name in metrics and reports."""
        return repr(self.energy)

    @property
    def per_block(self) -> bool:
        return isinstance(self.energy, MatrixEnergy)

    def at(self, block: Block) -> MatrixEnergy:
        """Returns the matrix energy that acts on a weight."""
        if not isinstance(self.energy, MatrixEnergy):
            raise UsageError(f"{self.key} is not an energy of single weights")
        return self.energy.at_output() if block.name == self.output else self.energy

    def by_block(self) -> dict[str, float]:
        """Returns the value of a matrix energy at each weight."""
        if not isinstance(self.energy, MatrixEnergy):
            return {}
        view = self.energy.view
        return {b.name: float(_named(self, b.name, self.at(b).value, b.seen(view)).sum()) for b in self.blocks}

    def memories(self, probe: Callable[[str], torch.Generator]) -> dict[str, dict[str, Tensor]]:
        """Returns what an evolving energy keeps of each weight before the first step."""
        found = {}
        for b in self.blocks if isinstance(self.energy, Evolving) else ():
            energy = self.at(b)
            if isinstance(energy, Evolving):
                found[b.name] = energy.remember(b.seen(energy.view), probe(b.name))
        return found

    def value_and_gradients(self, turn: Turn | None = None) -> tuple[float, list[tuple[Block, Tensor]]]:
        """Returns the value and, for every weight that can be trained, the gradient as a matrix.

        Args:
            turn: What this step gives; without it evolving energies are taken as functions of the weight alone.

        Raises:
            NonFiniteError: names the energy and the weight; nothing has been written anywhere.
        """
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
    coupling = term.coupling or ("loss" if isinstance(energy, FunctionEnergy) and default != "monitor" else default)
    if coupling == "prox" and not isinstance(energy, Proximable):
        raise UsageError(f"{energy!r} has no proximal map: let it act by '{term.strength:g}*{energy!r}@grad'")
    if coupling in ("grad", "loss") and not energy.traits.differentiable:
        raise UsageError(f"{energy!r} only measures: write '{energy!r}@monitor'")
    if isinstance(energy, TrajectoryEnergy) and coupling == "loss":
        raise UsageError(f"{energy!r} acts on steps, not in the loss: write '{term.strength:g}*{energy!r}@grad'")
    if isinstance(energy, FunctionEnergy) and coupling == "grad":
        raise UsageError(
            f"{energy!r} needs the batch: write '{term.strength:g}*{energy!r}@loss' and add reg.loss(x, y)"
        )
    if isinstance(energy, NetworkEnergy):
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
    return Placed(energy, term.strength, coupling, tuple(blocks), last_linear(model))


def total_value(p: Placed) -> float | None:
    """Returns the value of a term of weights summed over its blocks, ``None`` for energies that need a batch."""
    if isinstance(p.energy, MatrixEnergy):
        return sum(p.by_block().values())
    if isinstance(p.energy, NetworkEnergy):
        with torch.no_grad():
            return float(_named(p, "the layers", p.energy.value, [b.matrix for b in p.blocks]))
    return None


def differentiable_value(
    p: Placed, model: nn.Module, x: Tensor | None, y: Tensor | None, probe: torch.Generator, turn: Turn
) -> Tensor:
    """Returns the value of a term as a node of the autograd graph of the loss."""
    if isinstance(p.energy, FunctionEnergy):
        if x is None:
            raise UsageError(f"{p.key} needs the batch: call reg.loss(x, y) with the inputs of the step")
        return p.energy.value(model, x, y, probe=probe)
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


def _named(p: Placed, where: str, function: Any, w: Any) -> Any:
    try:
        return function(w)
    except NonFiniteError as error:
        raise NonFiniteError(f"{p.key} at {where}: {error}") from None


__all__ = ["Placed", "Turn", "add_to_gradients", "differentiable_value", "place", "total_value"]
