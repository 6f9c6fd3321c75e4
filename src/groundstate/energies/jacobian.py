"""Energies of the input-output Jacobian J of a network, averaged over samples; all of them come from one output Gram.

    JacobianFrobenius  mean_x ||J(x)||_F        JacobianSpectral  mean_x s_1(J(x))

(`Dirichlet` is mean ||J||_F^2, `JacobianNuclear` mean ||J||_*.) At kinks (ReLU) J is the Jacobian of the linear piece
the sample lies in, and the gradient is that of the average over the samples given: the term that a population has from
pieces changing their borders is not in it, as in every method that differentiates J.

References: J. Hoffman, D. Roberts, S. Yaida, "Robust learning with Jacobian regularization" (2019), whose loss
(lambda / 2) mean ||J||_F^2 is ``lambda/2 * dirichlet``; K. Roth, Y. Kilcher, T. Hofmann, "Adversarial training is a
form of data-dependent operator norm regularization" (2020).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from groundstate.energies.base import Estimate, Traits, require
from groundstate.energies.capabilities import Spectral
from groundstate.energies.sample_mean import SampleMean
from groundstate.errors import NonFiniteError, UsageError
from groundstate.jacobian import exact
from groundstate.jacobian.function import Function, blame, function
from groundstate.jacobian.plan import plan_for
from groundstate.norms import gram

MAX_OUTPUTS = 256  # of the smaller side of J: beyond it an exact spectrum per sample costs too much


@dataclass(frozen=True, repr=False)
class JacobianEnergy(SampleMean, Spectral):
    """Mean over samples of a function of the singular values of J.

    Attributes:
        on, wrt, samples: See `SampleMean`.
        route: How J is formed; see `groundstate.jacobian.exact`.
    """

    route: str = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.route in exact.ROUTES, f"route must be one of {', '.join(exact.ROUTES)}, got {self.route!r}")

    @abstractmethod
    def of_singular_values(self, s: Tensor) -> Tensor:
        """Returns the energy of each sample, ``(B, r)`` descending to ``(B,)``, differentiable."""

    def of_gram(self, m: Tensor) -> Tensor:
        """Returns the energy of each sample from the Gram of the smaller side of J, ``(B, r, r)`` to ``(B,)``."""
        return gram.energy(m, self.of_singular_values)

    def estimate(self, f: Any, x: Tensor, y: Tensor | None = None, *, probe: torch.Generator) -> Estimate:
        """Measures the energy exactly on every sample; the standard error is that of sampling.

        Raises:
            UsageError: as `value`; or the spectrum of a larger Jacobian than 256 on its smaller side is asked for.
            NonFiniteError: names the first tensor that is not finite.
        """
        with function(f, x, y, on=self.on, wrt=self.wrt) as (run, points):
            s, how = spectra(run, points, self.route, f)
        return Estimate.of(self.of_singular_values(s), how)

    def in_training(self, run: Function, points: Tensor, probe: torch.Generator) -> Tensor:
        return self.of_gram(exact.output_gram(run, points, route=self.route, differentiable=run.grad_wanted))


def spectra(run: Function, points: Tensor, route: str, f: Any) -> tuple[Tensor, str]:
    """Returns the singular values of J at every sample, ``(B, r)`` descending, and the route in words.

    Raises:
        UsageError: J has more than `MAX_OUTPUTS` rows and columns.
        NonFiniteError: names the first tensor that is not finite.
    """
    plan = plan_for(run, points)
    smaller = min(plan.outputs, points[0].numel())
    if smaller > MAX_OUTPUTS:
        raise UsageError(
            f"the Jacobian is {plan.outputs} x {points[0].numel()}: an exact spectrum per sample is too expensive; "
            "measure dirichlet (it is estimated), or a layer with fewer units by on="
        )
    name = exact.chosen(run, points, plan, route, False)
    parts = torch.arange(len(points), device=points.device).split(512)
    try:
        found = [gram.singular_values(exact.output_gram(run.rows(i), points[i], route=name)) for i in parts]
    except NonFiniteError:
        raise blame(f, points, "the Jacobian") from None
    how = {"closed_form": "closed form"}.get(name, f"{name}, {smaller} passes")
    return torch.cat(found), how


@dataclass(frozen=True, repr=False)
class JacobianFrobenius(JacobianEnergy):
    """Mean Frobenius norm of the Jacobian, mean_x ||J(x)||_F: not squared, so large Jacobians weigh less.

    Invariant under rotations of the output and rescaling of ReLU neurons. Zero Jacobians get no gradient.

    >>> w = torch.nn.Linear(2, 2, bias=False); _ = w.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> JacobianFrobenius().value(w, torch.ones(1, 2), probe=torch.Generator()).item()
    5.0
    """

    name: ClassVar[str] = "jacobian_frobenius"
    traits: ClassVar[Traits] = Traits(
        formula="mean_x ||J(x)||_F, J the Jacobian of the output by the input",
        reference="Varga, Csiszarik, Zombori 2017; Hoffman, Roberts, Yaida 2019 (squared)",
        cost="the output Gram of 32 samples: closed form for chains of linear layers, else min(C, n) VJPs",
        convex=False,
        degree=1.0,
    )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(on="probabilities", samples=8)

    def of_singular_values(self, s: Tensor) -> Tensor:
        return torch.linalg.vector_norm(s, dim=-1)

    def of_gram(self, m: Tensor) -> Tensor:
        squared = gram.trace(m)
        there = squared > 0
        return torch.where(there, torch.where(there, squared, 1.0).sqrt(), 0.0)


@dataclass(frozen=True, repr=False)
class JacobianSpectral(JacobianEnergy):
    """Mean spectral norm of the Jacobian, mean_x s_1(J(x)): how far the worst small perturbation moves the output.

    Exact, from the output Gram. `DataDependentOperatorNorm` does the same by power iteration, for many outputs and for
    perturbations of finite length. Where the largest singular values are equal the gradient is shared among them.

    >>> w = torch.nn.Linear(2, 2, bias=False); _ = w.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> JacobianSpectral().value(w, torch.ones(1, 2), probe=torch.Generator()).item()
    4.0
    """

    name: ClassVar[str] = "jacobian_spectral"
    traits: ClassVar[Traits] = Traits(
        formula="mean_x s_1(J(x)), the largest singular value of the Jacobian of the output by the input",
        reference="Roth, Kilcher, Hofmann 2020, eq. (8)",
        cost="the output Gram of 32 samples and its eigendecomposition",
        convex=False,
        degree=1.0,
    )

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(on="probabilities", samples=None)

    def of_singular_values(self, s: Tensor) -> Tensor:
        return s.amax(-1)
