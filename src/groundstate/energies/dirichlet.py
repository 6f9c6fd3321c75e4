"""Geometric complexity, the discrete Dirichlet energy of a network: mean_x ||J(x)||_F^2 over the samples.

For a linear map it is the squared Frobenius norm of the weights, so it is to functions what weight decay is to weights.
Training under Gaussian input noise of deviation sigma adds about sigma^2 / 2 times it to a squared loss.

It grows as training goes on, so compare networks at equal training loss, never at equal epochs: at equal epochs the
effect of the learning rate comes out reversed.

References: B. Dherin, M. Munn, M. Rosca, D. Barrett, "Why neural networks find simple solutions: the many regularizers
of geometric complexity" (2022); the one-probe estimator: J. Hoffman, D. Roberts, S. Yaida, "Robust learning with
Jacobian regularization" (2019), whose loss has an additional factor 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from groundstate.energies.base import Estimate, Traits, is_number, is_whole, refuse_unused, require
from groundstate.energies.jacobian import MAX_OUTPUTS, JacobianEnergy
from groundstate.jacobian import probes as probing
from groundstate.jacobian.function import Function, function
from groundstate.jacobian.plan import plan_for
from groundstate.norms import gram


@dataclass(frozen=True, repr=False)
class Dirichlet(JacobianEnergy):
    """Geometric complexity: mean over samples of the squared Frobenius norm of the Jacobian.

    In training an unbiased estimate: one random output direction for each of 16 samples, at 1.2 to 1.9 times the cost
    of a plain step; with ``Regularizer(every=4)`` a fraction of that. Measured exactly.

    Attributes:
        on, wrt, samples, route: See `SampleMean` and `JacobianEnergy`; ``route`` is that of ``estimator="exact"``.
        estimator: ``vjp`` (one pass per probe), ``jvp``, ``fd`` (finite differences: noisy gradients on networks with
            kinks), ``exact``, or ``auto``: the first of vjp, jvp, fd that the network can do.
        probes: Random directions per sample; orthonormal for ``vjp``, exact at as many as there are outputs.
        sigma: Step of ``fd``, relative to the root mean square of the inputs.

    >>> w = torch.nn.Linear(2, 2, bias=False); _ = w.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> Dirichlet(estimator="exact").value(w, torch.ones(1, 2), probe=torch.Generator()).item()
    25.0
    """

    samples: int | None = field(default=16, kw_only=True)
    estimator: str = "auto"
    probes: int = 1
    sigma: float = 1e-2

    name: ClassVar[str] = "dirichlet"
    aliases: ClassVar[tuple[str, ...]] = ("geometric_complexity", "gc")
    traits: ClassVar[Traits] = Traits(
        formula="mean_x ||J(x)||_F^2, J the Jacobian of the output by the input (no 1/2)",
        reference="Dherin, Munn, Rosca, Barrett 2022 (geometric complexity)",
        cost="training: one VJP of 16 samples, differentiated; measuring: min(C, n) VJPs, or a closed form",
        convex=False,
        degree=2.0,
        smooth=True,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        known = (*probing.ESTIMATORS, "exact")
        require(self.estimator in known, f"estimator must be one of {', '.join(known)}, got {self.estimator!r}")
        require(is_whole(self.probes, 1), f"probes must be a whole number from 1, got {self.probes!r}")
        require(is_number(self.sigma) and self.sigma > 0, f"sigma must be finite and positive, got {self.sigma!r}")
        if self.estimator in ("vjp", "jvp", "exact"):
            refuse_unused(self, f"estimator={self.estimator!r}", "sigma")
        if self.estimator == "exact":
            refuse_unused(self, "estimator='exact'", "probes")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(estimator="exact", samples=None), cls(on="probabilities", probes=2)

    def of_singular_values(self, s: Tensor) -> Tensor:
        return s.square().sum(-1)

    def of_gram(self, m: Tensor) -> Tensor:
        return gram.trace(m)

    def estimate(self, f: Any, x: Tensor, y: Tensor | None = None, *, probe: torch.Generator) -> Estimate:
        """Measures exactly where J has at most 256 rows or columns, else by 8 probes a sample."""
        with function(f, x, y, on=self.on, wrt=self.wrt) as (run, points):
            plan = plan_for(run, points)
            if min(plan.outputs, points[0].numel()) <= MAX_OUTPUTS:
                return super().estimate(f, x, y, probe=probe)
            kind = probing.usable(run, points, False) if self.estimator in ("auto", "exact") else self.estimator
            options: dict[str, Any] = {"generator": probe, "estimator": kind, "probes": 8, "sigma": self.sigma}
            parts = torch.arange(len(points), device=points.device).split(256)
            values = [probing.squared_norms(run.rows(i), points[i], **options).detach() for i in parts]
        return Estimate.of(torch.cat(values), f"8 {kind} probes")

    def in_training(self, run: Function, points: Tensor, probe: torch.Generator) -> Tensor:
        if self.estimator == "exact":
            return super().in_training(run, points, probe)
        return probing.squared_norms(
            run,
            points,
            generator=probe,
            estimator=self.estimator,
            probes=self.probes,
            sigma=self.sigma,
            differentiable=run.grad_wanted,
        )
