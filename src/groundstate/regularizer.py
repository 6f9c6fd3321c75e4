"""The driver: where and when an energy acts on a model in training.

Energies are stateless; this one class holds the model, the step count and the trajectories, and adds each term through
its coupling:

* ``grad`` (default): before the optimizer's step, g <- g + strength * gradient, once per step;
* ``prox``: after the step, W <- prox of lr * strength, with the learning rate of the weight's own group;
* ``loss``: in the forward pass, as ``loss + reg.loss(x, y)``;
* ``monitor``: measured, never acting.

`attach` hooks the optimizer (it is never wrapped) and acts after gradient clipping; `add_gradients`, called by hand
between ``backward`` and clipping, acts before it and then equals the term in the loss.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from groundstate import blocks as blocks_of
from groundstate.amortized import Wear
from groundstate.blocks import Block
from groundstate.couplings import (
    Placed,
    Turn,
    add_to_gradients,
    differentiable_value,
    keep_gradients,
    place,
    refuse_idle,
    total_value,
    warn_not_asked,
    warn_without_gradient,
    warn_without_samples,
)
from groundstate.energies.base import Coupling, Energy, FunctionEnergy, Sum, Term, TrajectoryEnergy
from groundstate.energies.capabilities import Proximable
from groundstate.energies.registry import parse
from groundstate.errors import NonFiniteError, UsageError
from groundstate.flat_state import below, restore
from groundstate.memories import Memories, Settled
from groundstate.schedules import schedule as make_schedule

Schedule = Callable[[int], float]


class Regularizer:
    """Adds energies to the training of a model.

    Args:
        model: The module whose weights (and function) the energies see.
        energy: An energy, a term ``1e-4 * energy``, a sum, or a spec such as ``"1e-3*nuclear + 1e-4*path_energy"``.
        coupling: The coupling of the terms that name none.
        every: Act at every k-th step only, k times as strong (``grad`` and ``loss``), with k times the step (``prox``).
            Trajectories are observed, and their term acts, at every step.
        gap: Keep the gradients of convex energies that need decompositions (nuclear, graph, ...) from step to step, and
            renew one before the energy of the term is further above its lower bound than this share, say 0.01: see
            `wear`.
        select: Comma-separated shell patterns of weight names; default: every matrix and convolution, no biases,
            normalizations, embeddings.
        schedule: Factor on the strengths as a function of the step, or ``"linear:N"``, ``"cosine:N"`` (1 to 0 over N
            steps), ``"warmup:N"`` (0 to 1).
        seed: Key of the private generators of random probes.

    Raises:
        UsageError: nothing is selected; a coupling that an energy does not have; a model that a network energy cannot
            order; sharded parameters; a gap together with ``every``; an option that plays no part.

    Example:
        >>> import torch
        >>> from groundstate.energies import SquaredFrobenius
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> reg = Regularizer(model, 0.5 * SquaredFrobenius()).attach(optimizer)
        >>> _ = torch.nn.init.ones_(model.weight)
        >>> (0 * model.weight.sum()).backward(); optimizer.step()
        >>> model.weight.tolist()  # w - 0.1 * 0.5 * 2 w
        [[0.8999999761581421, 0.8999999761581421]]
    """

    def __init__(
        self,
        model: nn.Module,
        energy: Energy | Term | Sum | str,
        *,
        coupling: Coupling = "grad",
        every: int = 1,
        gap: float | None = None,
        select: str | None = None,
        schedule: Schedule | str | None = None,
        seed: int = 0,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise UsageError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        if not isinstance(every, int) or every < 1:
            raise UsageError(f"every must be a whole number of steps from 1, got {every!r}")
        self.model = model
        self.energy = parse(energy) if isinstance(energy, str) else Sum.of(energy)
        self.every = every
        self.seed = seed
        self.step_count = 0
        self.schedule = make_schedule(schedule)
        self.blocks: list[Block] = blocks_of.select(model, select) if self.energy.terms else []
        self.placed: list[Placed] = [place(t, model, self.blocks, coupling) for t in self.energy.terms]
        self._trajectories: dict[str, dict[str, Tensor]] = {}
        for p in self.placed:
            if isinstance(p.energy, TrajectoryEnergy) and p.key not in self._trajectories:
                self._trajectories[p.key] = p.energy.init(self._matrices())
        refuse_idle(self.placed, coupling=coupling, every=every, gap=gap, select=select, schedule=schedule)
        self._memories = Memories({p.key: p.memories(partial(self._probe, p)) for p in self.placed})
        self._settled = Settled((p.key, p.energy) for p in self.placed if p.coupling == "loss")
        self._amortized = {} if gap is None else keep_gradients(self.placed, gap, every)
        self._optimizer: Optimizer | None = None
        self._handles: list[Any] = []
        self._added = self._asked = False
        self._warned: set[str] = set()

    # ------------------------------------------------------------------ attaching

    def attach(self, optimizer: Optimizer) -> Self:
        """Hooks ``optimizer``: gradients before its step, prox and observation after it. Returns ``self``.

        Raises:
            UsageError: attached already, not a torch optimizer, none of the selected weights is in it, or a term makes
                it unstable.
        """
        if self._optimizer is not None:
            raise UsageError("this regularizer is attached already: call detach() first, or make another one")
        if not isinstance(optimizer, Optimizer):
            raise UsageError(
                f"expected a torch.optim.Optimizer, got {type(optimizer).__name__}: pass the inner optimizer, or call "
                "add_gradients() by hand"
            )
        held = {id(p) for g in optimizer.param_groups for p in g["params"]}
        if self.blocks and not any(id(b.parameter) in held for b in self.blocks):
            names = ", ".join(b.name for b in self.blocks[:4])
            raise UsageError(f"none of the selected weights ({names}, ...) is in the optimizer's parameter groups")
        for p in self.placed:
            if isinstance(p.energy, TrajectoryEnergy) and p.coupling == "grad":
                p.energy.explain(p.strength, optimizer)
        self._optimizer = optimizer
        self._handles = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]
        return self

    def detach(self) -> None:
        """Takes the hooks off the optimizer; the step count and the trajectories stay."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._optimizer, self._added = [], None, False

    # ------------------------------------------------------------------ acting

    def loss(self, x: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Returns the terms of coupling ``loss``, a scalar to add to the loss of the (micro-)batch ``x, y``.

        With gradient accumulation divide it with the loss, by the number of micro-batches of the window. Attach the
        regularizer first: the optimizer's steps decide which samples, probes and lazy firings come next. An energy that
        learns does so once in each of them, and not under ``torch.no_grad()``.

        Raises:
            NonFiniteError: names the energy and the weight.
        """
        first = next(self.model.parameters(), None)
        total = torch.zeros((), device=None if first is None else first.device)
        learning = torch.is_grad_enabled()
        self._asked |= learning
        for p in self._firing("loss"):
            turn = self._turn(p, learning=learning)
            total = total + self._scale(p) * differentiable_value(p, self.model, x, y, self._probe(p), turn)
        return total

    def add_gradients(self, scale: float = 1.0) -> None:
        """Adds the gradients of the ``grad`` terms to ``.grad``, by hand: after ``backward``, before clipping.

        Only existing gradients are added to; weights that the loss did not reach are named in a warning once. The hook
        then adds nothing in this step.

        Args:
            scale: The scale of a ``GradScaler`` whose gradients are not unscaled yet (``scaler.get_scale()``).

        Raises:
            UsageError: called twice in one step.
            NonFiniteError: an energy is not finite; no gradient has been touched.
        """
        if self._added:
            raise UsageError("the energy gradients of this step were added already: call add_gradients() once per step")
        self._add(scale)
        self._added = self._optimizer is not None
        if self._optimizer is None:
            if self._trajectories and any(p.coupling == "grad" for p in self.placed if p.key in self._trajectories):
                raise UsageError("a trajectory must see every step: call attach(optimizer) before training")
            self.step_count += 1

    def apply_prox(self, step: float) -> None:
        """Applies the proximal map of ``step * strength`` of every term that has one, e.g. as the last act of training.

        A gradient leaves small singular values (or entries) that never become zero; one prox makes ranks exact. Warns
        where no term has one.

        Args:
            step: Step length, finite and not negative; the threshold of a nuclear norm is ``step * strength``.
        """
        if not math.isfinite(step) or step < 0:
            raise UsageError(f"the step of a prox must be finite and not negative, got {step!r}")
        movable = [p for p in self.placed if p.takes("final_prox")]
        if not movable:
            warnings.warn(f"no term of {self.energy!r} that acts has a prox: the weights are unchanged", stacklevel=2)
        for p in movable:
            self._prox(p, {b.name: step for b in self.blocks})

    # ------------------------------------------------------------------ measuring

    def values(self, x: Tensor | None = None, y: Tensor | None = None) -> dict[str, float]:
        """Returns the value of every term, without its strength, by the energy's spec; trajectories add a summary.

        Args:
            x: Samples on which energies of the function are measured, all of them and as `groundstate.measure` does,
                with the same probes every time. ``None`` leaves these energies out, and a warning names them once; so
                does an empty batch, without a word.
            y: Labels, where an energy needs them.
        """
        found: dict[str, float] = {}
        if x is None:
            warn_without_samples(self.placed, self._warned)
        for p in self.placed:
            if isinstance(p.energy, TrajectoryEnergy):
                found |= p.energy.summary(self._trajectories[p.key])
            elif isinstance(p.energy, FunctionEnergy) and x is not None and len(x):
                found[p.key] = p.energy.estimate(self.model, x, y, probe=torch.Generator().manual_seed(0)).value
            elif (value := total_value(p)) is not None:
                found[p.key] = value
        return found

    def block_values(self) -> dict[str, dict[str, float]]:
        """Returns, for every matrix energy, its value at each weight by name."""
        return {p.key: p.by_block() for p in self.placed if p.per_block}

    def wear(self) -> dict[str, list[Wear]]:
        """Returns, for every term that keeps its gradients, how often each was renewed, and the last bounds."""
        return {key: kept.wear() for key, kept in self._amortized.items()}

    def describe(self) -> str:
        """Returns what acts where, the exact update of each term, and the weights it sees."""
        lines = [f"energy: {self.energy!r}"]
        for p in self.placed:
            lines.append(f"- {p.key}, strength {p.strength:g}, coupling {p.coupling}: {p.formula(self._optimizer)}")
        if self.every > 1:
            lines.append(f"acting at every {self.every}th step, {self.every} times as strong")
        for key, kept in self._amortized.items():
            lines.append(f"gradients of {key} kept until it is {kept.gap:g} of itself above the bound by them")
        lines.append(f"weights ({len(self.blocks)}): {', '.join(b.name for b in self.blocks)}")
        if half := [b.name for b in self.blocks if b.parameter.dtype in (torch.bfloat16, torch.float16)]:
            lines.append(f"half precision ({', '.join(half)}): changes below half a unit in the last place are lost")
        return "\n".join(lines)

    # ------------------------------------------------------------------ state

    def state_dict(self) -> dict[str, Any]:
        """Returns the step, the spec and the trajectories as one flat mapping of tensors and plain values."""
        state: dict[str, Any] = {"version": 1, "energy": repr(self.energy), "step": self.step_count}
        for key, trajectory in self._trajectories.items():
            state |= {f"trajectory/{key}/{k}": v.clone() for k, v in trajectory.items()}
        for key, kept in self._amortized.items():
            state |= {f"kept/{key}/{k}": v for k, v in kept.state().items()}
        state |= {f"settled/{k}": v.clone() for k, v in self._settled.flat().items()}
        return state | {f"memory/{k}": v.clone() for k, v in self._memories.flat(self.step_count).items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores `state_dict`; load the weights of the model first.

        If the weights are not those at which a trajectory was saved, the jump stays out of its energy, with a warning.
        Choices of the first batch that an earlier version did not save are made anew, with a warning too.

        Raises:
            UsageError: the state is of another energy, or other weights.
        """
        if state.get("version") != 1 or state.get("energy") != repr(self.energy):
            raise UsageError(
                f"the saved state is of the energy {state.get('energy')!r}, this regularizer has {self.energy!r}"
            )
        matrices = self._matrices()
        for key, trajectory in self._trajectories.items():
            restore(trajectory, state, f"trajectory/{key}/", matrices)
            energy = next(p.energy for p in self.placed if p.key == key)
            if isinstance(energy, TrajectoryEnergy):
                _, jump = energy.rebase(trajectory, matrices)
                if jump > 0:
                    warnings.warn(
                        f"the weights moved by {jump:.3g} since the state of {key} was saved: not counted in its path",
                        stacklevel=2,
                    )
        restore(self._memories.flat(), state, "memory/", matrices)
        self._memories.restart()
        self._settled.load(below(state, "settled/"), begun=state["step"] > 0)
        for key, kept in self._amortized.items():
            kept.load(below(state, f"kept/{key}/"))
        self.step_count = int(state["step"])
        self._added = False

    # ------------------------------------------------------------------ hooks and helpers

    def _before_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        closure = kwargs.get("closure") or (args[1] if len(args) > 1 else None)
        if closure is None:
            if not self._added:
                scale = getattr(optimizer, "grad_scale", None)
                self._add(1.0 if scale is None else float(scale))
            return None

        def with_energies() -> Any:
            self._added = False
            with torch.enable_grad():
                loss = closure()
            energy = 0.0 if self._added else self._add(1.0, valued=True)
            self._added = True
            return None if loss is None else loss + energy

        if "closure" in kwargs:
            return tuple(args), {**kwargs, "closure": with_energies}
        return (args[0], with_energies, *args[2:]), kwargs

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        self._asked, asked, self._added = False, self._asked, False
        if not asked:
            warn_not_asked(self._firing("loss"), self._warned)
        found_inf = getattr(optimizer, "found_inf", None)
        if found_inf is not None and float(found_inf) > 0:
            return
        rate = self._rates(optimizer)
        for p in self._firing("prox"):
            self._prox(p, {name: lr * self.every * self.schedule(self.step_count) for name, lr in rate.items()})
        if self._trajectories:
            matrices = self._matrices()
            for p in {p.key: p for p in self.placed}.values():
                if isinstance(p.energy, TrajectoryEnergy):
                    self._trajectories[p.key] = p.energy.observe(self._trajectories[p.key], matrices, rate)
        self.step_count += 1

    def _add(self, scale: float, valued: bool = False) -> float:
        """Adds every firing gradient, all or none, and returns the value of what was added, of kept ones if asked."""
        firing = self._firing("grad")
        if not firing:
            return 0.0
        held = None
        if self._optimizer is not None:
            held = {
                id(q): (-1.0 if g.get("maximize") else 1.0) for g in self._optimizer.param_groups for q in g["params"]
            }
        warn_without_gradient(self.blocks, self._warned)
        additions: list[tuple[nn.Parameter, Tensor, float]] = []
        total = 0.0
        for p in firing:
            strength = self._scale(p)
            value, grads = p.value_and_gradients(self._turn(p, valued))
            for block, grad in grads:
                sign = 1.0 if held is None else held.get(id(block.parameter), 0.0)
                if block.parameter.grad is not None and block.parameter.requires_grad and sign != 0.0:
                    additions.append((block.parameter, block.like(grad), sign * strength * scale))
            total += strength * value
        add_to_gradients(additions)
        return total

    def _prox(self, p: Placed, step: Mapping[str, float]) -> None:
        if not isinstance(p.energy, Proximable):
            raise UsageError(f"{p.key} has no proximal map")
        for block in self.blocks:
            if block.name in step and step[block.name] > 0 and p.strength > 0 and block.parameter.requires_grad:
                moved = p.energy.prox(block.matrix, step[block.name] * p.strength)
                if not bool(torch.isfinite(moved.sum())):
                    raise NonFiniteError(
                        f"the prox of {p.key} at {block.name} is not finite: the weights are unchanged"
                    )
                with torch.no_grad():
                    block.parameter.copy_(block.like(moved))

    def _rates(self, optimizer: Optimizer) -> dict[str, float]:
        """Returns the learning rate of every block that the optimizer holds; 0 for the others where observed."""
        by_id = {id(q): float(g["lr"]) for g in optimizer.param_groups for q in g["params"]}
        return {b.name: by_id.get(id(b.parameter), 0.0) for b in self.blocks}

    def _firing(self, coupling: Coupling) -> list[Placed]:
        due = self.step_count % self.every == 0
        return [
            p
            for p in self.placed
            if p.coupling == coupling and p.strength > 0 and (due or isinstance(p.energy, TrajectoryEnergy))
        ]

    def _scale(self, p: Placed) -> float:
        scale = p.strength * self.schedule(self.step_count)
        return scale if isinstance(p.energy, TrajectoryEnergy) else scale * self.every

    def _turn(self, p: Placed, valued: bool = True, learning: bool = True) -> Turn:
        kept = self._amortized.get(p.key)
        rates = [] if self._optimizer is None else [float(g["lr"]) for g in self._optimizer.param_groups]
        act = None if kept is None else partial(kept.act, self.step_count, valued, max(rates, default=0.0))
        memories = self._memories.at(p.key, self.step_count, learning)
        settled = self._settled.at(p.key, learning)
        return Turn(self._trajectories.get(p.key, {}), memories, partial(self._probe, p), settled, act)

    def _probe(self, p: Placed, name: str = "") -> torch.Generator:
        key = f"{self.seed}/{self.step_count}/{p.key}" + (f"/{name}" if name else "")
        generator = torch.Generator()
        generator.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:7], "big"))
        return generator

    def _matrices(self) -> dict[str, Tensor]:
        return {b.name: b.parameter.detach() for b in self.blocks}
