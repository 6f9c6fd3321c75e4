"""The nuclear norm of the Jacobian, mean_x ||J(x)||_*: networks that are locally of low rank.

Exact where the output is small: from the output Gram, with the minimal-norm subgradient. For large outputs (images to
images) the factorized form: split the network f = g after h at a cut and minimize

    1/2 (||J_g(h(x))||_F^2 + ||J_h(x)||_F^2)  >=  ||J(x)||_*

which needs Frobenius norms only, one probe each. Over all smooth g and h the infimum of the right side is that of the
left; for the network at hand it is an upper bound, and measuring says how loose.

Reference: C. Scarvelis, J. Solomon, "Nuclear norm regularization for deep learning" (2024), theorems 3.1 and 3.2.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Self, cast

import torch
from torch import Tensor, nn

from groundstate.energies.base import Estimate, Traits, is_number, refuse_unused, require
from groundstate.energies.capabilities import Resolving
from groundstate.energies.jacobian import MAX_OUTPUTS, JacobianEnergy, spectra
from groundstate.errors import UsageError
from groundstate.jacobian import exact, probes
from groundstate.jacobian.cuts import Cut, Split, check_cut, find_cuts
from groundstate.jacobian.factorized import Estimator, half_sum, looseness, tightest
from groundstate.jacobian.function import Function, function
from groundstate.jacobian.plan import plan_for
from groundstate.layers import unwrapped

EXACT_OUTPUTS = 32
METHODS = ("auto", "exact", "factorized")
_UNUSED = {"auto": (), "exact": ("cut", "estimator", "sigma"), "factorized": ("route",)}
_ESTIMATORS = ("auto", "vjp", "fd", "exact")
_OPEN, _EXACT = -1, 0  # of the cut in training; any other number counts the modules of the network
_CHOOSING_SAMPLES = 64
_LOOSENESS_SAMPLES, _LOOSENESS_WIDTH = 32, 1024


@dataclass(frozen=True, repr=False)
class JacobianNuclear(JacobianEnergy, Resolving):
    """Mean nuclear norm of the Jacobian: the sum of its singular values.

    Between ||J||_F and sqrt(rank) ||J||_F; minimizing it makes the network vary along few directions at each sample.

    Attributes:
        on, wrt, samples, route: See `JacobianEnergy`.
        method: ``exact``; ``factorized``, the upper bound over a cut; ``auto``: exact for at most 32 outputs (or
            inputs) where the network has a second derivative, else factorized.
        cut: Of ``factorized``: the layer after which the network is split; ``auto``: the one with the smallest bound,
            among those that do not limit the rank. A `Regularizer` chooses at its first batch and saves the choice with
            its state; measuring chooses for the samples it is given, whatever was chosen before; the bare energy keeps
            its choice while the network lives.
        estimator: Of ``factorized``: ``vjp`` probes, ``fd`` (the published denoising form), ``exact``, or ``auto``: fd
            for smooth networks and those without a second derivative, vjp for networks with kinks.
        sigma: Step of ``fd``.

    >>> w = torch.nn.Linear(2, 2, bias=False); _ = w.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> JacobianNuclear().value(w, torch.ones(1, 2), probe=torch.Generator()).item()
    7.0
    """

    method: str = "auto"
    cut: str = "auto"
    estimator: str = "auto"
    sigma: float = 1e-2

    name: ClassVar[str] = "jacobian_nuclear"
    traits: ClassVar[Traits] = Traits(
        formula="mean_x ||J(x)||_*; factorized: 1/2 mean_x (||J_g(h(x))||_F^2 + ||J_h(x)||_F^2) >= it, f = g after h",
        reference="Scarvelis, Solomon 2024, theorems 3.1 and 3.2",
        cost="exact: the output Gram of 32 samples and its eigendecomposition; factorized: two more forward passes",
        convex=False,
        degree=1.0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.method in METHODS, f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        require(isinstance(self.cut, str) and self.cut != "", f"cut must be a layer's name or 'auto', got {self.cut!r}")
        known = self.estimator in _ESTIMATORS
        require(known, f"estimator must be one of {', '.join(_ESTIMATORS)}, got {self.estimator!r}")
        require(is_number(self.sigma) and self.sigma > 0, f"sigma must be finite and positive, got {self.sigma!r}")
        refuse_unused(self, f"method={self.method!r}", *_UNUSED[self.method])
        if self.estimator in ("vjp", "exact"):
            refuse_unused(self, f"estimator={self.estimator!r}", "sigma")

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(), cls(method="exact", samples=None)

    def of_singular_values(self, s: Tensor) -> Tensor:
        return s.sum(-1)

    def estimate(self, f: Any, x: Tensor, y: Tensor | None = None, *, probe: torch.Generator) -> Estimate:
        """Measures the nuclear norm exactly where J has at most 256 rows or columns, and the bound over the cut.

        ``details`` of the factorized form: ``bound`` (the half-sum), and on 32 samples, where the cut is not too wide,
        ``half_sum/nuclear`` and ``product/nuclear``: how many times too large the bounds are on this network.
        """
        with function(f, x, y, on=self.on, wrt=self.wrt) as (run, points):
            small = min(plan_for(run, points).outputs, points[0].numel()) <= MAX_OUTPUTS
            if self.method != "factorized" and small:
                s, how = spectra(run, points, self.route, f)
                return Estimate.of(self.of_singular_values(s), how)
            cut = self._tightest(run, points) if self.cut == "auto" else self.cut_of(run, points)
            values = torch.cat(
                [
                    half_sum(
                        Split(run.rows(i), cut, points[i]),
                        points[i],
                        estimator=cast(Estimator, self.estimator),
                        probe=probe,
                        sigma=self.sigma,
                        differentiable=False,
                    )
                    for i in torch.arange(len(points), device=points.device).split(256)
                ]
            )
            how = f"upper bound, {self.estimator} estimate over the cut {cut.name!r}"
            return Estimate.of(values, how, self._looseness(run, points, cut))

    def _looseness(self, run: Function, points: Tensor, cut: Cut) -> Mapping[str, float]:
        if plan_for(run, points).outputs > MAX_OUTPUTS or cut.width > _LOOSENESS_WIDTH:
            return {}
        few = torch.arange(min(len(points), _LOOSENESS_SAMPLES), device=points.device)
        return looseness(Split(run.rows(few), cut, points[few]), points[few])

    def in_training(self, run: Function, points: Tensor, probe: torch.Generator) -> Tensor:
        if self._method(run, points) == "exact":
            return super().in_training(run, points, probe)
        estimator = self.estimator
        if estimator == "auto" and run.grad_wanted and probes.usable(run, points, True) != "vjp":
            estimator = "fd"
        split = Split(run, self.cut_of(run, points), points)
        return half_sum(split, points, estimator=cast(Estimator, estimator), probe=probe, sigma=self.sigma)

    def _method(self, run: Function, points: Tensor) -> str:
        if self.method != "auto":
            return self.method
        plan = plan_for(run, points)
        if min(plan.outputs, points[0].numel()) > EXACT_OUTPUTS:
            return "factorized"
        if run.grad_wanted and exact.chosen(run, points, plan, self.route, True) == "fd":
            return "factorized"
        return "exact"

    def unresolved(self) -> dict[str, Tensor]:
        is_open = self.cut == "auto" and self.method != "exact"
        return {"cut": torch.tensor(_OPEN)} if is_open else {}

    def resolve(self, f: nn.Module, x: Tensor, y: Tensor | None, memory: dict[str, Tensor]) -> JacobianNuclear:
        """Returns the energy with its cut by name, or ``exact``.

        Raises:
            UsageError: as `value`; or the cut in ``memory`` is of another network.
        """
        if not memory:
            return self
        names = [name for name, _ in unwrapped(f).named_modules()]
        place = int(memory["cut"])
        if place == _OPEN:
            with function(f, x, y, on=self.on, wrt=self.wrt) as (run, points):
                exactly = self._method(run, points) == "exact"
                place = _EXACT if exactly else names.index(self._tightest(run, points).name)
            memory["cut"].fill_(place)
        if place == _EXACT:
            return self._by("exact")
        if not 0 < place < len(names):
            raise UsageError(f"the saved cut of {self!r} is at module {place} of a network with {len(names)} modules")
        return self._by("factorized", names[place])

    def _by(self, method: str, cut: str = "auto") -> JacobianNuclear:
        unused = {f.name: f.default for f in fields(self) if f.name in _UNUSED[method]}
        return replace(self, method=method, **{"cut": cut, **unused})

    def cut_of(self, run: Function, points: Tensor) -> Cut:
        """Returns the cut: the one named, verified, or the one with the smallest bound; found once per network.

        Raises:
            UsageError: the layer named is no cut (a skip connection crosses it: it is named), or there is none.
        """
        facts = plan_for(run, points).facts
        key = f"cut {self.cut}"
        if key not in facts:
            named = self.cut != "auto"
            facts[key] = check_cut(run, points, self.cut) if named else self._tightest(run, points)
        found = facts[key]
        if not isinstance(found, Cut):
            raise UsageError(f"{self!r}: there is no cut")
        return found

    @staticmethod
    def _tightest(run: Function, points: Tensor) -> Cut:
        few = torch.arange(min(len(points), _CHOOSING_SAMPLES), device=points.device)
        kind = "vjp" if probes.usable(run, points, False) == "vjp" else "fd"
        part, x = run.rows(few), points[few]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            probe = torch.Generator().manual_seed(0)
            return tightest(part, x, find_cuts(part, x), probe=probe, estimator=kind).cut
