"""What a network does to its inputs, measured on samples: the other half of `groundstate.measure`.

One Jacobian spectrum per sample serves all its energies; then how loose the split bound is at every cut, how accuracy
falls under projected gradient ascent, how far the worst perturbations are singular vectors of the Jacobian (the regime
of the theorem that ties adversarial training to the spectral norm) and where they stop being so, how honest the
predicted probabilities are, and how well their entropy tells outliers.

What does not apply to a network (real targets, a single output, inputs without a derivative, skip connections at
every layer) is left out with a note that says why; samples that do not fit the network are an error. The numbers of a
part do not depend on which others are measured: each draws from the seed anew.

References: B. Dherin et al. (2022); C. Scarvelis, J. Solomon (2024); K. Roth, Y. Kilcher, T. Hofmann (2020); C. Guo et
al. (2017); their equations are in `groundstate.energies`, `groundstate.attack` and `groundstate.scores`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from groundstate.attack import Norm, ProjectedAscent, alignment, alignment_curve, robust_accuracy
from groundstate.energies.base import Estimate, FunctionEnergy
from groundstate.energies.jacobian import JacobianEnergy, spectra
from groundstate.energies.registry import registered
from groundstate.errors import NonFiniteError, UsageError
from groundstate.jacobian import exact
from groundstate.jacobian.cuts import Cut, Split, find_cuts
from groundstate.jacobian.factorized import half_sum, looseness
from groundstate.jacobian.function import Function, blame, frozen, function
from groundstate.jacobian.plan import plan_for
from groundstate.measure_data import check_samples, in_dtype_of, targets, width, with_gradients
from groundstate.norms import gram
from groundstate.outliers import families
from groundstate.scores import auroc, calibration, predictive_entropy

Progress = Callable[[int, int, str], None]
Part = Callable[[torch.Generator], None]

SAMPLES = 512
RADII = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3)
"""Radii of the attacks as shares of the size of the data: for l2 the root mean square distance of a sample from the
mean of all, for linf the standard deviation of all entries."""

_CUT_SAMPLES, _CUT_PASSES, _CUT_DRAWS = 32, 4096, 8
_ALIGNED, _ALIGNED_OUTPUTS, _STEPS, _LONG_STEP = 128, 32, 20, 1e6
_ENTRIES, _BATCH = 2**26, 128  # entries of Jacobians held at once; samples per pass of a plain evaluation
_NO_SIZE = "the samples are all the same, so there is no size of the data to measure radii by"


@dataclass(frozen=True)
class FunctionTable:
    """What `measure_function` found.

    Attributes:
        samples: How many samples it rests on.
        energies: Estimates with standard errors, by spec.
        spectrum: Means over the samples: ``s_1``, ``s_r`` (the smallest), ``rank``, ``stable_rank``,
            ``effective_rank``, and ``second``, s_2 / s_1.
        cuts: For every layer at which the network can be split: its ``name``, ``kind`` and ``width``, and means over 32
            samples: ``nuclear`` (of J), ``frobenius_g`` and ``frobenius_h`` (of the halves), the bounds ``product`` and
            ``half_sum``, and how many times too large they are: ``product/nuclear``, ``half_sum/nuclear``. Where that
            takes too many passes, ``half_sum`` is estimated by as many probes as ``draws`` says, and the norms of the
            halves and their product are absent.
        robustness: By norm, ``l2`` and ``linf``: radii ``epsilon``, the same as ``share`` of the size of the data, and
            ``accuracy`` under attack (an upper bound on robust accuracy).
        alignment: Radii, and the mean absolute cosine of perturbations with the top right singular vector of J:
            ``theorem`` (the output's change is ascended with long steps: the power method while the network is linear),
            ``logits`` (the same with ordinary steps) and ``cross_entropy`` (the attack). Where s_2 / s_1 is near 1 that
            vector is hardly determined, and so is the cosine.
        calibration: nll, ece (15 bins), ece_scaled, temperature (fitted to the same samples), brier, accuracy.
        outliers: AUROC of the predictive entropy, by family of `groundstate.outliers`.
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
    whole: bool | None = None,
    progress: Progress | None = None,
) -> FunctionTable:
    """Measures a network on samples.

    Args:
        model: The network; nothing of it changes. For tensors made in inference mode copies stand in meanwhile.
        x: Inputs, ``(B, ...)``; taken to the dtype of the parameters.
        y: Class labels ``(B,)``. Without them, with real targets (as many numbers as outputs), or with a single output,
            which is no score of each class, only energies, spectrum and cuts are measured.
        energies: What to estimate; default: the first example of every registered energy of the function.
        samples: At most so many samples, drawn by ``seed``.
        seed: Key of the choice of samples and of all probes.
        whole: Measure all parts of the table; or only the energies, and the spectrum where they share it. Default: all
            parts, unless ``energies`` leaves out some of the registered ones: who names one wants it alone.
        progress: Called as ``progress(done, total, what)``.

    Raises:
        UsageError: no sample, inputs that the network does not take, not as many labels, labels that are neither
            classes nor real targets of its outputs.
        NonFiniteError: x, y or a weight is not finite; it is named. (What overflows without that is left out, with a
            note.)

    Cost: a Jacobian spectrum per sample, Jacobians of both halves at every cut for 32 samples, and some 30 attacks of
    20 steps: a second for a small network.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
    >>> table = measure_function(model, torch.ones(5, 2))
    >>> table.energies["dirichlet"].value, table.energies["jacobian_nuclear"].value, table.spectrum["second"]
    (25.0, 7.0, 0.75)
    """
    known = [c.examples()[0] for c in registered().values() if issubclass(c, FunctionEnergy)]
    chosen = known if energies is None else list(energies)
    whole = set(known) <= set(chosen) if whole is None else whole
    x, y = _sample(model, x, y, samples, seed)
    table = FunctionTable(len(x))
    absent: dict[str, list[str]] = {}
    with with_gradients(model):
        parts = _parts(_Work(table, model, x, y), chosen, whole)
        for done, (what, part) in enumerate(parts, 1):
            try:
                part(torch.Generator().manual_seed(seed))
            except (UsageError, NonFiniteError) as error:
                absent.setdefault(str(error), []).append(what)
            if progress is not None:
                progress(done, len(parts), what)
    table.notes.extend(f"{', '.join(whats)}: left out: {reason}" for reason, whats in absent.items())
    return table


def _parts(work: _Work, energies: list[FunctionEnergy], whole: bool) -> list[tuple[str, Part]]:
    """Returns the parts of the table that are measured, in order, by name."""
    parts: list[tuple[str, Part]] = []
    if whole or any(_is_ordinary(e) for e in energies):
        parts.append(("spectrum", work.spectrum))
    parts += [(repr(energy), partial(work.energy, energy)) for energy in energies]
    reason = work.find_classes()
    if not whole:
        return parts
    parts.append(("cuts", work.cuts))
    if reason:
        work.table.notes.append(f"robustness, alignment, calibration, outliers: left out: {reason}")
    else:
        parts += [("robustness", work.robustness), ("alignment", work.alignment)]
        parts += [("calibration", work.calibration), ("outliers", work.outliers)]
    return parts


def _sample(model: nn.Module, x: Tensor, y: Tensor | None, samples: int, seed: int) -> tuple[Tensor, Tensor | None]:
    """Returns some of the samples, in the dtype of the parameters, once all is known to be finite."""
    check_samples(x, y)
    if samples < 1:
        raise UsageError(f"samples must be at least 1, got {samples}")
    if len(x) > samples:
        index = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:samples]
        x, y = x[index.to(x.device)], None if y is None else y[index.to(y.device)]
    if any(not bool(torch.isfinite(p.detach()).all()) for p in model.parameters() if p.is_floating_point()):
        raise blame(model, x, "what the network does")
    return in_dtype_of(model, x), y


def _is_ordinary(energy: FunctionEnergy) -> bool:
    """Whether it is an energy of the spectrum of the output by the input."""
    spectral = isinstance(energy, JacobianEnergy) and energy.on == "logits" and energy.wrt == "input"
    return spectral and getattr(energy, "method", "") != "factorized"


@dataclass
class _Work:
    """The parts of a table; one that does not apply raises. Each is given a generator of its own."""

    table: FunctionTable
    model: nn.Module
    x: Tensor
    y: Tensor | None
    labels: Tensor = field(default_factory=lambda: torch.zeros(0))
    spectra: tuple[Tensor, str] | NonFiniteError | None = None

    def find_classes(self) -> str:
        """Runs the network on all samples and keeps the labels where they are classes; if not, says why."""
        found = targets(self.y, width(self.model, self.x))
        if isinstance(found, str):
            return found
        if found.is_floating_point():
            return "the labels are real targets, no classes"
        self.labels = found
        return ""

    def spectrum(self, _: torch.Generator) -> None:
        try:
            with function(self.model, self.x) as (run, points):
                self.spectra = spectra(run, points, "auto", self.model)
        except NonFiniteError as error:
            self.spectra = error
            raise
        s = self.spectra[0].double()
        top = s[:, :1].clamp_min(torch.finfo(s.dtype).tiny)
        self.table.spectrum.update(
            s_1=_mean(s[:, 0]),
            s_r=_mean(s[:, -1]),
            rank=_mean((s > 0).sum(-1)),
            stable_rank=_mean(gram.stable_rank(s)),
            effective_rank=_mean(gram.effective_rank(s)),
            second=_mean(s[:, 1:2] / top) if s.shape[1] > 1 else 0.0,
        )

    def energy(self, energy: FunctionEnergy, generator: torch.Generator) -> None:
        if self.spectra is not None and isinstance(energy, JacobianEnergy) and _is_ordinary(energy):
            if isinstance(self.spectra, NonFiniteError):
                raise self.spectra
            found = Estimate.of(energy.of_singular_values(self.spectra[0]), self.spectra[1])
        else:
            found = energy.estimate(self.model, self.x, self.y, probe=generator)
        self.table.energies[repr(energy)] = found

    def cuts(self, generator: torch.Generator) -> None:
        left = _CUT_PASSES
        with function(self.model, self.x[:_CUT_SAMPLES]) as (run, points):
            outputs = plan_for(run, points).outputs
            small = len(points) * outputs * points[0].numel() <= _ENTRIES
            for cut in find_cuts(run, points):
                row: dict[str, Any] = {"name": cut.name, "kind": cut.kind, "width": cut.width}
                if small and cut.width + outputs <= left:
                    left -= cut.width + outputs
                    row |= looseness(Split(run, cut, points), points)
                else:
                    row |= self._estimated(run, points, cut, generator)
                self.table.cuts.append(row)
        if not self.table.cuts:
            raise UsageError("the network cannot be split at any layer, so there is no bound over a cut")

    def _estimated(self, run: Function, points: Tensor, cut: Cut, generator: torch.Generator) -> dict[str, float]:
        split = Split(run, cut, points)
        draws = [
            half_sum(split, points, estimator="vjp", probe=generator, differentiable=False) for _ in range(_CUT_DRAWS)
        ]
        found = {"half_sum": _mean(torch.stack(draws)), "draws": _CUT_DRAWS}
        if isinstance(self.spectra, tuple):
            nuclear = _mean(self.spectra[0][: len(points)].sum(-1))
            found |= {"nuclear": nuclear, "half_sum/nuclear": found["half_sum"] / nuclear if nuclear > 0 else math.inf}
        return found

    def robustness(self, generator: torch.Generator) -> None:
        for norm, size in _sizes(self.x).items():
            epsilons = [share * size for share in RADII]
            attack = ProjectedAscent(0.0, norm=norm, steps=_STEPS)
            accuracy = robust_accuracy(self.model, self.x, self.labels, epsilons, generator, attack=attack)
            self.table.robustness[norm] = {"epsilon": epsilons, "share": list(RADII), "accuracy": accuracy}

    def alignment(self, generator: torch.Generator) -> None:
        size = _sizes(self.x)["l2"]
        with function(self.model, self.x[:_ALIGNED]) as (run, points):
            outputs, inputs = plan_for(run, points).outputs, points[0].numel()
            index = torch.arange(min(len(points), _ENTRIES // (outputs * inputs)), device=points.device)
            if outputs > _ALIGNED_OUTPUTS or not len(index):
                raise UsageError(f"the Jacobian is {outputs} x {inputs}: its singular vectors cost too much")
            j = exact.by_loop(run.rows(index), points[index], False).double()
        if not bool(torch.isfinite(j).all()):
            raise blame(self.model, self.x, "the Jacobian")
        j = j / j.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(j.dtype).tiny)  # its square must not underflow
        v = (torch.linalg.eigh(j @ j.mT)[1][:, None, :, -1] @ j)[:, 0]
        there = index[v.abs().amax(1) > 0]
        if not len(there):
            raise UsageError("the Jacobian is zero at every sample: it has no singular vector")
        x, y, v = self.x[there], self.labels[there.to(self.labels.device)], v[there]
        shares = [1e-3, *RADII[1:]]
        epsilons = [share * size for share in shares]
        found = alignment_curve(self.model, x, y, v, epsilons, generator, attack=ProjectedAscent(0.0, steps=_STEPS))
        long = ProjectedAscent(0.0, steps=_STEPS, step_size=_LONG_STEP * size, objective="logits")
        theorem = [
            _mean(alignment(replace(long, epsilon=e).perturb(self.model, x, None, generator), v)) for e in epsilons
        ]
        self.table.alignment.update({"epsilon": epsilons, "share": shares, "theorem": theorem, **found})

    def calibration(self, _: torch.Generator) -> None:
        self.table.calibration.update(calibration(self._logits(self.x), self.labels))

    def outliers(self, generator: torch.Generator) -> None:
        inside = predictive_entropy(self._logits(self.x))
        for family, outliers in families(self.x, generator).items():
            self.table.outliers[family] = auroc(inside, predictive_entropy(self._logits(outliers)))

    def _logits(self, x: Tensor) -> Tensor:
        with frozen(self.model) as run, torch.no_grad():
            return torch.cat([run(part) for part in x.split(_BATCH)])


def _sizes(x: Tensor) -> dict[Norm, float]:
    """Returns the size of the data by norm; see `RADII`."""
    flat = x.flatten(1).double()
    distance = float((flat - flat.mean(0)).square().sum(-1).mean().sqrt())
    if distance == 0:
        raise UsageError(_NO_SIZE)
    return {"l2": distance, "linf": float(flat.std(correction=0))}


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
