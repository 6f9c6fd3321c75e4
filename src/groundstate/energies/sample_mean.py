"""Energies of the function that are means over samples: which function, which samples, and when its gradient is made.

    E = mean over x of e(J(x)), J the Jacobian of the output ``on`` by the input ``wrt``

In training a random part of the batch stands for it. What e is, and how it is estimated, is for each energy to say.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from groundstate.energies.base import FunctionEnergy, is_whole, require
from groundstate.errors import NonFiniteError
from groundstate.jacobian.function import Function, blame, function
from groundstate.jacobian.plan import plan_for


@dataclass(frozen=True, repr=False)
class SampleMean(FunctionEnergy):
    """Mean over samples of an energy of the Jacobian at each of them.

    Attributes:
        on: The output: ``logits``, ``probabilities``, ``loss``, ``output:KEY`` or the name of a layer.
        wrt: The input: ``input``, or the name of a layer whose output counts as the input.
        samples: How many samples of the batch take part in training, drawn anew each time; ``None``: all.
    """

    on: str = field(default="logits", kw_only=True)
    wrt: str = field(default="input", kw_only=True)
    samples: int | None = field(default=32, kw_only=True)

    def __post_init__(self) -> None:
        require(isinstance(self.on, str) and self.on != "", f"on must be text, got {self.on!r}")
        require(isinstance(self.wrt, str) and self.wrt != "", f"wrt must be text, got {self.wrt!r}")
        fits = self.samples is None or is_whole(self.samples, 1)
        require(fits, f"samples must be a whole number from 1 or None, got {self.samples!r}")

    @abstractmethod
    def in_training(self, run: Function, points: Tensor, probe: torch.Generator) -> Tensor:
        """Returns the energy of each sample, or an estimate, ``(B,)``, differentiable where ``run.grad_wanted``.

        Args:
            run: The function, during `groundstate.jacobian.function.frozen`.
            points: Where to differentiate it, ``(B, ...)``.
            probe: Source of everything random.
        """

    def value(self, f: Any, x: Tensor, y: Tensor | None = None, *, probe: torch.Generator) -> Tensor:
        """Returns the mean over (a random part of) the batch, a scalar, differentiable by the parameters.

        Raises:
            UsageError: no sample, integer inputs, an output that is not one row per sample, or one that has no gradient
                by the input.
            NonFiniteError: names the first tensor that is not finite.
        """
        x, y = self._part(x, y, probe)
        mixed = any(map(torch.is_autocast_enabled, ("cpu", "cuda")))
        with function(f, x, y, on=self.on, wrt=self.wrt) as (run, points):
            try:
                value = self.in_training(run, points, probe).mean()
            except NonFiniteError:
                raise blame(f, x, repr(self)) from None
            if not math.isfinite(value.detach().item()):
                raise blame(f, x, repr(self))
            # a closed form runs no module in backward, so it may wait for that of the loss, if that is as precise
            closed = run.module is not None and plan_for(run, points).chain is not None
            return value if closed and run.grad_wanted and not mixed else run.settle(value)

    def _part(self, x: Tensor, y: Tensor | None, probe: torch.Generator) -> tuple[Tensor, Tensor | None]:
        if self.samples is None or not isinstance(x, Tensor) or x.ndim == 0 or self.samples >= len(x):
            return x, y
        if isinstance(y, Tensor) and len(y) != len(x):
            return x, y  # refused further on, with the numbers
        index = torch.randperm(len(x), generator=probe)[: self.samples].to(x.device)
        return x[index], None if y is None else y[index.to(y.device)]
