"""What a network does to its inputs, measured on samples: the other half of `groundstate.measure`.

One Jacobian spectrum per sample serves all its energies; then how loose the split bound is at every cut, how accuracy
falls under projected gradient ascent, how far the worst perturbations are singular vectors of the Jacobian (the regime
of the theorem that ties adversarial training to the spectral norm) and where they stop being so, how honest the
predicted probabilities are, and how well their entropy tells outliers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from groundstate.attack import ProjectedAscent, alignment_curve, robust_accuracy
from groundstate.energies.base import Estimate, FunctionEnergy
from groundstate.energies.jacobian import JacobianEnergy, spectra
from groundstate.energies.registry import registered
from groundstate.errors import UsageError
from groundstate.jacobian import exact
from groundstate.jacobian.cuts import Cut, Split, find_cuts
from groundstate.jacobian.factorized import half_sum, looseness
from groundstate.jacobian.function import Function, frozen, function
from groundstate.jacobian.plan import plan_for
from groundstate.norms import gram
from groundstate.outliers import families
from groundstate.scores import auroc, calibration, predictive_entropy

Progress = Callable[[int, int, str], None]

SAMPLES = 512
RADII = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
"""Radii of the attacks as shares of the typical size of a perturbation: for l2 the root mean square distance of a
sample from the mean of all, for linf the standard deviation of all entries."""

_CUT_SAMPLES, _CUT_WIDTH, _ALIGNED, _STEPS, _LONG_STEP = 32, 1024, 128, 20, 1e6


@dataclass(frozen=True)
class FunctionTable:
    """What `measure_function` found.

    Attributes:
        samples: How many samples it rests on.
        energies: Estimates with standard errors, by spec.
        spectrum: Means over the samples: ``s_1``, ``s_r`` (the smallest), ``rank``, ``stable_rank``,
            ``effective_rank``.
        cuts: For every layer at which the network can be split: its name, kind and width, the factor norms, and how
            many times too large the bounds on the nuclear norm are there.
        robustness: Per norm: radii and accuracy under attack (an upper bound on robust accuracy).
        alignment: Radii, and the mean absolute cosine of perturbations with the top right singular vector of J:
            ``theorem`` (the output's change is ascended with long steps: the power method while the network is linear),
            ``logits`` (the same with ordinary steps) and ``cross_entropy`` (the attack).
        calibration: nll, ece (15 bins), ece_scaled, temperature, brier, accuracy.
        outliers: AUROC of the predictive entropy, by family.
        notes: What is absent, and why.
    """

    samples: int
    energies: dict[str, Estimate] = field(default_factory=dict)
    spectrum: dict[str, float] = field(default_factory=dict)
    cuts: list[dict[str, Any]] = field(default_factory=list)
    robustness: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    alignment: dict[str, list[float]] = field(default_factory=dict)
    calibration: dict[str, float] = field(default_factory=dict)
    outliers: dict[str, float | None] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; numbers that JSON cannot write (NaN, infinity) become ``None``."""
        return _plain(asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure_function(
    model: nn.Module,
    x: Tensor,
    y: Tensor | None = None,
    *,
    energies: Iterable[FunctionEnergy] | None = None,
    samples: int = SAMPLES,
    seed: int = 0,
    progress: Progress | None = None,
) -> FunctionTable:
    """Measures a network on samples.

    Args:
        model: The network; nothing of it changes.
        x: Inputs, ``(B, ...)``.
        y: Class labels ``(B,)``; without them accuracy under attack and calibration are left out.
        energies: What to estimate; default: the first example of every registered energy of the function.
        samples: At most so many samples, drawn by ``seed``.
        seed: Key of the choice of samples and of all probes.
        progress: Called as ``progress(done, total, what)``.

    Raises:
        UsageError: no sample, or an output that is not one row per sample.
        NonFiniteError: names the first tensor that is not finite.

    Cost: a Jacobian spectrum per sample, Jacobians of both halves at every cut for 32 samples, and some 30 attacks of
    20 steps: a second for a small network.
    """
    generator = torch.Generator().manual_seed(seed)
    if len(x) > samples:
        index = torch.randperm(len(x), generator=generator)[:samples]
        x, y = x[index.to(x.device)], None if y is None else y[index.to(y.device)]
    chosen = list(energies) if energies is not None else [c.examples()[0] for c in _known()]
    table = FunctionTable(len(x))
    steps: list[tuple[str, Callable[[], None]]] = [
        ("spectrum and energies", lambda: _energies(table, model, x, y, chosen, generator)),
        ("cuts", lambda: _cuts(table, model, x, generator)),
    ]
    if y is not None:
        labels = y
        steps += [
            ("robustness", lambda: _robustness(table, model, x, labels, generator)),
            ("alignment", lambda: _alignment(table, model, x, labels, generator)),
            ("calibration", lambda: _calibration(table, model, x, labels, generator)),
        ]
    for done, (what, step) in enumerate(steps, 1):
        step()
        if progress is not None:
            progress(done, len(steps), what)
    return table


def _known() -> list[type[FunctionEnergy]]:
    return [c for c in registered().values() if issubclass(c, FunctionEnergy)]


def _energies(
    table: FunctionTable,
    model: nn.Module,
    x: Tensor,
    y: Tensor | None,
    energies: Iterable[FunctionEnergy],
    generator: torch.Generator,
) -> None:
    shared: tuple[Tensor, str] | None = None
    with function(model, x) as (run, points):
        try:
            shared = spectra(run, points, "auto", model)
        except UsageError as error:
            table.notes.append(str(error))
    if shared is not None:
        s, _ = shared
        top = s[:, :1]
        table.spectrum.update(
            s_1=_mean(s[:, 0]),
            s_r=_mean(s[:, -1]),
            rank=_mean((s > 0).sum(-1)),
            stable_rank=_mean(gram.stable_rank(s)),
            effective_rank=_mean(gram.effective_rank(s)),
            second=_mean(s[:, 1:2] / top.clamp_min(torch.finfo(s.dtype).tiny)) if s.shape[1] > 1 else 0.0,
        )
    for energy in energies:
        try:
            if shared is not None and isinstance(energy, JacobianEnergy) and _is_ordinary(energy):
                table.energies[repr(energy)] = Estimate.of(energy.of_singular_values(shared[0]), shared[1])
            else:
                table.energies[repr(energy)] = energy.estimate(model, x, y, probe=generator)
        except UsageError as error:
            table.notes.append(f"{energy!r}: {error}")


def _is_ordinary(energy: JacobianEnergy) -> bool:
    """Whether it is an energy of the spectrum of the output by the input."""
    return energy.on == "logits" and energy.wrt == "input" and getattr(energy, "method", "") != "factorized"


def _cuts(table: FunctionTable, model: nn.Module, x: Tensor, generator: torch.Generator) -> None:
    with function(model, x[:_CUT_SAMPLES]) as (run, points):
        outputs = plan_for(run, points).outputs
        for cut in find_cuts(run, points):
            row: dict[str, Any] = {"name": cut.name, "kind": cut.kind, "width": cut.width}
            table.cuts.append(row | _at_cut(run, points, cut, outputs, generator))
    if not table.cuts:
        table.notes.append("the network cannot be split at any layer: no bounds over cuts")


def _at_cut(run: Function, points: Tensor, cut: Cut, outputs: int, generator: torch.Generator) -> dict[str, float]:
    split = Split(run, cut, points)
    if cut.width <= _CUT_WIDTH and outputs <= _CUT_WIDTH:
        return looseness(split, points)
    draws = [half_sum(split, points, estimator="vjp", probe=generator, differentiable=False) for _ in range(8)]
    return {"half_sum": _mean(torch.stack(draws))}


def _robustness(table: FunctionTable, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
    for norm, size in _sizes(x).items():
        epsilons = [share * size for share in RADII]
        attack = ProjectedAscent(0.0, norm=norm, steps=_STEPS)  # pyright: ignore[reportArgumentType]
        accuracy = robust_accuracy(model, x, y, epsilons, generator, attack=attack)
        table.robustness[norm] = {"epsilon": epsilons, "share": list(RADII), "accuracy": accuracy}


def _sizes(x: Tensor) -> dict[str, float]:
    flat = x.flatten(1).double()
    return {"l2": float((flat - flat.mean(0)).square().sum(-1).mean().sqrt()), "linf": float(flat.std(correction=0))}


def _alignment(table: FunctionTable, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
    x, y = x[:_ALIGNED], y[:_ALIGNED]
    with function(model, x) as (run, points):
        plan = plan_for(run, points)
        if plan.outputs > exact.TRIAL_SAMPLES or plan.outputs < 2:
            table.notes.append(f"alignment: left out for {plan.outputs} outputs")
            return
        j = exact.by_loop(run, points, False).double()
    _, q = torch.linalg.eigh(j @ j.mT)
    v = (q[:, None, :, -1] @ j)[:, 0].to(x.dtype)
    size = _sizes(x)["l2"]
    shares = [1e-3, *RADII[1:]]
    epsilons = [share * size for share in shares]
    found = alignment_curve(model, x, y, v, epsilons, generator, attack=ProjectedAscent(0.0, steps=_STEPS))
    long = ProjectedAscent(0.0, steps=_STEPS, step_size=_LONG_STEP * size)
    theorem = alignment_curve(model, x, y, v, epsilons, generator, attack=long)["logits"]
    table.alignment.update({"epsilon": epsilons, "share": shares, "theorem": theorem, **found})


def _calibration(table: FunctionTable, model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> None:
    with frozen(model) as run, torch.no_grad():
        logits = run(x)
        if logits.shape[1] < 2:
            table.notes.append("calibration: left out for one output")
            return
        table.calibration.update(calibration(logits, y))
        inside = predictive_entropy(logits)
        for family, outliers in families(x, generator).items():
            table.outliers[family] = auroc(inside, predictive_entropy(run(outliers)))


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
