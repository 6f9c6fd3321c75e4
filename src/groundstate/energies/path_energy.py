"""The energy of the path that training takes through weight space.

With knots w_0, ..., w_T at times 0 = s_0 < ... < s_T = 1 the piecewise linear path gamma has::

    E = 1/2 integral ||gamma'(s)||^2 ds = 1/2 sum_t ||w_{t+1} - w_t||^2 / (s_{t+1} - s_t)

In the *step* clock every step lasts 1/T, in the *learning-rate* clock a step lasts lr_t / sum lr (the time of gradient
flow, for which E is half the total time times the loss it descends). With length L and displacement D = ||w_T - w_0||,
Cauchy-Schwarz gives 2E >= L^2 >= D^2, so the straightness D^2 / (2E) lies in [0, 1] and factors into (D/L)^2, how
little the path winds, and L^2/(2E), how even its speed is.

As a penalty, 1/2 mu ||w_t - w_{t-1}||^2 has the gradient mu (w_t - w_{t-1}). Under SGD with momentum beta that is no
new force: it is exactly the momentum beta - mu * lr. `PathEnergy.explain` says so.

Reference: L. Ambrosio, N. Gigli, G. Savare, *Gradient Flows* (2008), section 1.1 (action of a curve).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

from groundstate.energies.base import Traits, TrajectoryEnergy, require
from groundstate.errors import UsageError

SCALARS = ("steps", "sum_squared", "sum_squared_per_lr", "sum_lr", "length")


@dataclass(frozen=True, repr=False)
class PathEnergy(TrajectoryEnergy):
    """1/2 of the integral of ||gamma'||^2 along the path of the weights.

    Its state holds five float64 scalars on the device of the weights and two copies of the weights (the first and the
    last; a third, the last step, where it acts as a penalty). Nothing is read back before `value` or `summary`.
    A step that moved nothing (a skipped step of a gradient scaler) must not be observed; `Regularizer` sees to it.

    Attributes:
        clock: ``"step"`` or ``"lr"``: the clock of `value`. `summary` gives both.

    >>> import torch
    >>> energy = PathEnergy()
    >>> state = energy.init({"w": torch.zeros(1, 2)})
    >>> for w in ([[3.0, 4.0]], [[6.0, 8.0]]):  # two straight steps of length 5
    ...     state = energy.observe(state, {"w": torch.tensor(w)}, {"w": 0.1})
    >>> float(energy.value(state)), energy.summary(state)["straightness"]
    (50.0, 1.0)
    """

    clock: Literal["step", "lr"] = "step"

    name: ClassVar[str] = "path_energy"
    traits: ClassVar[Traits] = Traits(
        formula="1/2 sum_t ||w_{t+1} - w_t||^2 / (s_{t+1} - s_t)",
        reference="Ambrosio, Gigli, Savare 2008, section 1.1",
        cost="three passes over the weights per step; two copies of the weights",
        convex=True,
        degree=2.0,
        smooth=True,
    )

    def __post_init__(self) -> None:
        require(self.clock in ("step", "lr"), f"the clock of path_energy is 'step' or 'lr', got {self.clock!r}")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(clock="lr")

    def init(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        require(bool(blocks), "path_energy needs at least one weight")
        device = next(iter(blocks.values())).device
        state = {k: torch.zeros((), dtype=torch.float64, device=device) for k in SCALARS}
        for name, w in blocks.items():
            state[f"start/{name}"] = w.detach().clone()
            state[f"last/{name}"] = w.detach().clone()
            state[f"step/{name}"] = torch.zeros_like(w)
        return state

    def observe(
        self, state: dict[str, Tensor], blocks: Mapping[str, Tensor], dt: Mapping[str, float]
    ) -> dict[str, Tensor]:
        names = list(blocks)
        now = [blocks[n].detach() for n in names]
        last = [state[f"last/{n}"] for n in names]
        step = [state[f"step/{n}"] for n in names]
        torch._foreach_copy_(step, now)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_sub_(step, last)  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_copy_(last, now)  # pyright: ignore[reportPrivateImportUsage]
        norms = torch._foreach_norm(step, dtype=torch.float64)  # pyright: ignore[reportPrivateImportUsage]
        squares = torch.stack(norms).square_()
        total = squares.sum()
        rates = [dt[n] for n in names]
        state["steps"] += 1
        state["sum_squared"] += total
        state["length"] += total.sqrt()
        if all(r == rates[0] for r in rates):
            per_lr = total / rates[0] if rates[0] > 0 else total * 0
        else:
            inverse = [1 / r if r > 0 else 0.0 for r in rates]
            per_lr = squares @ torch.tensor(inverse, dtype=torch.float64, device=squares.device)
        state["sum_squared_per_lr"] += per_lr
        state["sum_lr"] += sum(rates) / len(rates)
        return state

    def rebase(self, state: dict[str, Tensor], blocks: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], float]:
        jump = 0.0
        for name, w in blocks.items():
            last = state[f"last/{name}"]
            jump += float((w.detach().double() - last.double()).square().sum())
            last.copy_(w.detach())
        return state, math.sqrt(jump)

    def value(self, state: Mapping[str, Tensor]) -> Tensor:
        if self.clock == "lr":
            return 0.5 * state["sum_lr"] * state["sum_squared_per_lr"]
        return 0.5 * state["steps"] * state["sum_squared"]

    def term(self, state: Mapping[str, Tensor], blocks: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns 1/2 ||w_t - w_{t-1}||^2 and w_t - w_{t-1} by name; zero before the first step."""
        grads = {n: (w.detach() - state[f"last/{n}"]) + state[f"step/{n}"] for n, w in blocks.items()}
        return 0.5 * sum((g.double().square().sum() for g in grads.values()), torch.zeros(())), grads

    def summary(self, state: Mapping[str, Tensor]) -> dict[str, float]:
        """Returns energies in both clocks, length, displacement, straightness and its two factors.

        The ratios are NaN where nothing moved. ``sum_squared`` is the sum of ||w_t - w_{t-1}||^2.
        """
        steps, squared, per_lr, total_lr, length = (float(state[k]) for k in SCALARS)
        starts = [k for k in state if k.startswith("start/")]
        chords = [state["last/" + k.removeprefix("start/")].double() - state[k].double() for k in starts]
        displacement = math.sqrt(sum(float(c.square().sum()) for c in chords))
        twice = steps * squared
        return {
            "path_energy": 0.5 * twice,
            "path_energy_lr": 0.5 * total_lr * per_lr,
            "length": length,
            "displacement": displacement,
            "straightness": displacement**2 / twice if twice > 0 else math.nan,
            "tortuosity_squared": (displacement / length) ** 2 if length > 0 else math.nan,
            "speed_uniformity": length**2 / twice if twice > 0 else math.nan,
            "sum_squared": squared,
            "steps": steps,
        }

    def explain(self, strength: float, optimizer: torch.optim.Optimizer) -> str:
        if type(optimizer) is not torch.optim.SGD:
            return (
                f"g <- g + {strength:g} (w_t - w_(t-1)): a real extra gradient under {type(optimizer).__name__} "
                "(only under plain SGD is it a change of momentum)"
            )
        lines = []
        for group in optimizer.param_groups:
            lr, beta = float(group["lr"]), float(group["momentum"])
            shifted = beta - strength * lr * (1 - float(group["dampening"]))
            if group["nesterov"]:
                lines.append(f"g <- g + {strength:g} (w_t - w_(t-1)); with Nesterov it enters twice, no plain shift")
                continue
            lines.append(
                f"exactly SGD with momentum {beta:g} - {strength:g}*lr = {shifted:.12g} (at lr {lr:g}) on the weights "
                f"it sees, {beta:g} on the others"
            )
            if beta == 0:
                lines[-1] += "; without momentum the buffer is absent, so it acts as w_(t+1) = w_t - lr g - lr mu step"
            if shifted <= -1:
                raise UsageError(
                    f"{strength:g}*path_energy makes SGD unstable: the momentum {beta:g} - {strength:g}*{lr:g} = "
                    f"{shifted:g} must stay above -1; use a strength below {(1 + beta) / lr:g}"
                )
            if shifted < 0:
                warnings.warn(
                    f"{strength:g}*path_energy makes the momentum of SGD negative: {beta:g} - {strength:g}*{lr:g} = "
                    f"{shifted:g}; steps alternate",
                    stacklevel=2,
                )
        return "; ".join(lines)
