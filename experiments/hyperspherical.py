"""Does hyperspherical energy help small networks, and is half the sphere better than all of it at equal strength?

    python experiments/hyperspherical.py [--seeds 5] [--workers 1] [--cases NAME...]
    python experiments/hyperspherical.py --report

Narrow networks (`CASES`) are trained plainly and with each of `METHODS`. Strengths are scanned with two seeds; the one
with the best mean validation accuracy is trained again with fresh seeds and tested. Equal seeds share initial weights,
training images and order, so that methods are compared by paired differences. Full-space and half-space energy are
tested at every strength. To save time an energy acts at every `EVERY`-th step only, as many times as strong.
A killed experiment goes on where it was when started again.

References: Liu et al., "Learning towards minimum hyperspherical energy" (2018); Lin et al., "Regularizing neural
networks via minimizing hyperspherical energy" (2020); Bansal et al. 2018 (SRIP); Wang et al. 2020 (MMA).
"""

from __future__ import annotations

import importlib
import math
import sys
import time
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from common import ROOT, arguments, complete, describe_machine, load, mean_std, mlp, save_json, saved, table
from torch import Tensor, nn
from torch.nn import functional

import groundstate as gs
from groundstate.blocks import last_linear, select
from groundstate.energies.angles import MinimumAngle
from groundstate.energies.base import MatrixEnergy
from groundstate.energies.compressive import CompressiveHypersphericalEnergy
from groundstate.energies.hyperspherical import HypersphericalEnergy
from groundstate.energies.orthogonality import SoftOrthogonality, SpectralIsometry
from groundstate.errors import NonFiniteError
from groundstate.report.statistics import Paired, adjust, paired
from groundstate.training.evaluation import accuracy_and_loss
from groundstate.training.order import batch_order, keyed

RATE, MOMENTUM, EVERY = 0.05, 0.9, 2
SCAN_SEEDS = (100, 101)


class Case(NamedTuple):
    """A network, its data, and how long it is trained."""

    network: str
    data: str
    width: int
    train_size: int | None
    batch: int
    epochs: int

    def __str__(self) -> str:
        return f"{self.network}-{self.data}-{self.width}"

    def build(self, seed: int) -> nn.Sequential:
        """Returns a network with two hidden layers: of ``width`` units, or of half as many and as many channels."""
        if self.network == "mlp":
            return mlp((64 if self.data == "digits" else 784, self.width, self.width, 10), seed)
        half = self.width // 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(keyed(seed, "network"))
            return nn.Sequential(
                nn.Unflatten(1, (1, 28, 28)),
                nn.Conv2d(1, half, 3, stride=2), nn.ReLU(), nn.MaxPool2d(2),
                nn.Conv2d(half, self.width, 3), nn.ReLU(), nn.MaxPool2d(2),
                nn.Flatten(), nn.Linear(4 * self.width, 10),
            )  # fmt: skip


CASES = {
    str(case): case
    for width in (16, 32)
    for case in (
        Case("mlp", "digits", width, None, 64, 40),
        Case("mlp", "mnist", width, 10000, 128, 8),
        Case("cnn", "mnist", width, 4000, 64, 6),
    )
}


class Method(NamedTuple):
    """An energy (``None``: none, or weight decay) and the strengths to be tried."""

    energy: MatrixEnergy | None
    strengths: tuple[float, ...]


_SPHERE, _PROJECTED = (0.1, 0.5, 2.0, 10.0), (0.01, 0.1, 1.0, 10.0)
NONE, DECAY, FULL, HALF, RANDOM = "none", "weight decay", "MHE s=2", "half-space MHE s=2", "CoMHE random"
NARROW, FAST = "CoMHE random, narrow layers too", "CoMHE adversarial, rate 0.1"
METHODS = {
    NONE: Method(None, (0.0,)),
    DECAY: Method(None, (1e-3, 3e-3, 1e-2, 3e-2)),
    "orthogonality": Method(SoftOrthogonality(), (1e-4, 1e-3, 1e-2, 1e-1)),
    "SRIP": Method(SpectralIsometry(), (1e-3, 1e-2, 3e-2, 1e-1)),
    "MHE s=0": Method(HypersphericalEnergy(s=0), _SPHERE),
    "MHE s=1": Method(HypersphericalEnergy(s=1), _SPHERE),
    FULL: Method(HypersphericalEnergy(s=2), _SPHERE),
    HALF: Method(HypersphericalEnergy(s=2, half_space=True), _SPHERE),
    RANDOM: Method(CompressiveHypersphericalEnergy(), _PROJECTED),
    "CoMHE angle-preserving": Method(CompressiveHypersphericalEnergy("angle-preserving"), _PROJECTED),
    "CoMHE adversarial": Method(CompressiveHypersphericalEnergy("adversarial"), _PROJECTED),
    "MMA": Method(MinimumAngle(), (0.01, 0.05, 0.2, 1.0)),
    NARROW: Method(CompressiveHypersphericalEnergy(), _PROJECTED),
    FAST: Method(CompressiveHypersphericalEnergy("adversarial", rate=0.1), _PROJECTED),
}
SCANNED = {NARROW: "cnn-mnist-16", FAST: "mlp-digits-16"}  # only these, and not tested: they do not end well
TESTED = tuple(name for name in METHODS if name not in SCANNED)


class Task(NamedTuple):
    """One run."""

    case: str
    method: str
    strength: float
    seed: int


class Training:
    """One network in training.

    Projected energies see half the inputs of a neuron, at most 30 dimensions. Layers are not projected where that were
    fewer than ``least``: with s = 2 the gradient has a finite variance over Gaussian projections from 8 on.
    """

    def __init__(
        self, model: nn.Module, energy: MatrixEnergy | None, strength: float, every: int, seed: int = 0,
        decay: float = 0.0, least: int = 8,
    ) -> None:  # fmt: skip
        self.model = model
        self.optimizer = torch.optim.SGD(model.parameters(), RATE, MOMENTUM, weight_decay=decay)
        terms = [] if energy is None else [(strength * energy, None)]
        if isinstance(energy, CompressiveHypersphericalEnergy):
            inputs = {block.name: block.matrix.shape[1] for block in select(model)}
            seen = {name: min(30, n // 2) if n // 2 >= least else n for name, n in inputs.items()}
            terms = [(strength * replace(energy, dimensions=k), name) for name, k in seen.items()]
        for term, name in terms:
            gs.Regularizer(model, term, every=every, seed=seed, select=name).attach(self.optimizer)

    def step(self, x: Tensor, y: Tensor, count: int = 1) -> None:
        """Makes steps of SGD on one batch."""
        for _ in range(count):
            loss = functional.cross_entropy(self.model(x), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()


def run(task: Task) -> dict[str, Any]:
    """Trains one network; those of scan seeds are validated, the others tested and measured."""
    case = CASES[task.case]
    split = load(case.data)
    kept = torch.randperm(len(split.train_x), generator=torch.Generator().manual_seed(keyed(task.seed, "images")))
    x, y = (part[kept[: case.train_size]] for part in (split.train_x, split.train_y))
    start = time.process_time()
    model = case.build(task.seed)
    found: dict[str, Any] = {"initial": spread(model)} if task.method == NONE else {}
    decay, least = task.strength if task.method == DECAY else 0.0, 2 if task.method == NARROW else 8
    training = Training(model, METHODS[task.method].energy, task.strength, EVERY, task.seed, decay, least)
    found["finite"] = fit(training, case, x, y, task.seed)
    if task.seed in SCAN_SEEDS:
        found["val_accuracy"], found["val_loss"] = accuracy_and_loss(model, split.val_x, split.val_y)
    else:
        found["test_accuracy"], found["test_loss"] = accuracy_and_loss(model, split.test_x, split.test_y)
        found["train_accuracy"], found["train_loss"] = accuracy_and_loss(model, x, y)
        found["final"] = spread(model) if found["finite"] else None
    return {**task._asdict(), **found, "cpu_seconds": round(time.process_time() - start, 2)}


def fit(training: Training, case: Case, x: Tensor, y: Tensor, seed: int) -> bool:
    """Trains to the end, the learning rate falling to zero as a cosine; returns whether the weights stayed finite."""
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(training.optimizer, case.epochs * math.ceil(len(x) / case.batch))
    for epoch in range(case.epochs):
        for index in batch_order(len(x), seed, epoch).split(case.batch):
            try:
                training.step(x[index], y[index])
            except NonFiniteError:
                return False
            rate.step()
    return all(bool(p.isfinite().all()) for p in training.model.parameters())


def spread(model: nn.Module) -> dict[str, float]:
    """Returns where the hidden layers lie between random directions (0) and the certified floor (1), and the gaps.

    Each is the mean over the hidden layers, of the energy with s = 2 in the full space and in the half-space.
    """
    spaces = {"full": HypersphericalEnergy(s=2), "half": HypersphericalEnergy(s=2, half_space=True)}
    rows = [r for r in gs.measure(model, list(spaces.values())).rows if r.grounds and r.name != last_linear(model)]
    found = {}
    for space, energy in spaces.items():
        grounds = [r.grounds[repr(energy)] for r in rows if repr(energy) in r.grounds]
        for what in ("uniformity", "gap"):
            found[f"{space} {what}"] = mean_std([v for g in grounds if (v := g[what]) is not None])[0]
    return found


def costs(rounds: int = 60) -> dict[str, Any]:
    """Times steps in turns, the energy acting at each but for one row; a call is four steps (published CNN: one)."""
    sys.path.append(str(ROOT / "benchmarks"))
    compare = importlib.import_module("runner").compare
    one = CompressiveHypersphericalEnergy(count=1)
    timed = {m: (METHODS[m].energy, 1) for m in TESTED if m != DECAY}
    timed |= {f"{RANDOM}, one projection": (one, 1), f"{RANDOM}, every 4th step": (METHODS[RANDOM].energy, 4)}
    found = {}
    for name in ("mlp-mnist-32", "cnn-mnist-32", "published CNN"):
        case = CASES.get(name)
        size, batch, steps = ((784,), case.batch, 4) if case else ((3, 32, 32), 128, 1)
        x, y = torch.randn(batch, *size, generator=torch.Generator().manual_seed(0)), torch.arange(batch) % 10
        functions = {}
        for method, (energy, every) in timed.items():
            if case or method in (NONE, FULL, HALF, RANDOM, f"{RANDOM}, one projection"):
                training = Training(case.build(0) if case else published(16), energy, 1e-3, every)
                functions[method] = partial(training.step, x, y, steps)
        found[name] = compare(functions, rounds=rounds if case else max(6, rounds // 8)) | {"steps": steps}
    return found


def published(width: int) -> nn.Sequential:
    """Returns the CNN of the published experiments on 32x32 color images (width 64 there), ten hidden layers."""
    widths = [3] + [width] * 3 + [2 * width] * 3 + [4 * width] * 3
    parts: list[nn.Module] = []
    for k, (a, b) in enumerate(pairwise(widths), 1):
        parts += [nn.Conv2d(a, b, 3, padding=1, bias=False), nn.BatchNorm2d(b), nn.ReLU()]
        parts += [nn.MaxPool2d(2)] if k % 3 == 0 else []
    return nn.Sequential(*parts, nn.Conv2d(4 * width, 4 * width, 4, bias=False), nn.Flatten(), nn.Linear(4 * width, 10))


# ---------------------------------------------------------------------- tables

Runs = list[dict[str, Any]]


def pick(runs: Runs, case: str, method: str, strength: float, key: str) -> dict[int, float]:
    """Returns one figure by seed, NaN where it is not finite; ``final full gap`` is that of the part ``final``."""
    part, _, rest = key.partition(" ")
    asked, found = (case, method, strength), {}
    for r in runs:
        if (r["case"], r["method"], r["strength"]) == asked and part in r:
            value = (r[part] or {}).get(rest) if rest else r[part]
            found[r["seed"]] = math.nan if value is None else value
    return found


def best(runs: Runs, case: str, method: str) -> float:
    """Returns the strength with the best mean validation accuracy, of equal ones the one with the lower loss."""
    scored = {}
    for strength in METHODS[method].strengths:
        accuracy, loss = (pick(runs, case, method, strength, key).values() for key in ("val_accuracy", "val_loss"))
        if len(accuracy) == len(SCAN_SEEDS):
            scored[strength] = (mean_std(list(accuracy))[0], -mean_std(list(loss))[0])
    return max(scored, key=scored.__getitem__, default=math.nan)


def figures(runs: Runs, method: str, strengths: dict[str, float], key: str) -> dict[int, float]:
    """Returns one figure by seed, the mean over cases, each with its strength."""
    told = [pick(runs, case, method, strength, key) for case, strength in strengths.items()]
    return {seed: mean_std([of[seed] for of in told])[0] for seed in set.intersection(*map(set, told))}


def cell(comparison: Paired) -> str:
    """Returns a mean difference in % with half its 95 % interval, a star where Holm's p is below 0.05."""
    d, star = comparison.difference, "\\*" if comparison.p_t_adjusted < 0.05 else ""
    return f"{100 * d.mean:+.2f} ± {100 * d.half_width:.2f}{star}" if d.n else "-"


def accuracy_table(runs: Runs, cases: list[str], key: str) -> str:
    """Returns the baseline and the differences to it at the chosen strengths; Holm per column."""
    rows: dict[str, list[str]] = {m: [] for m in TESTED}
    for group in [[c] for c in cases] + [cases] * (len(cases) > 1):
        chosen = {m: {c: best(runs, c, m) for c in group} for m in TESTED}
        plain, *others = (figures(runs, m, chosen[m], key) for m in TESTED)
        mean, std = mean_std(list(plain.values()))
        rows[NONE].append(f"{100 * mean:.2f} ± {100 * std:.2f}")
        for method, comparison in zip(TESTED[1:], adjust([paired(o, plain) for o in others]), strict=True):
            strength = f" ({chosen[method][group[0]]:g})" if len(group) == 1 and comparison.difference.n else ""
            rows[method].append(cell(comparison) + strength)
    return table(["", *cases, *["mean"] * (len(cases) > 1)], [[m, *line] for m, line in rows.items()])


def strengths_table(runs: Runs, cases: list[str], one: str, other: str) -> str:
    """Returns the difference of two methods at every equal strength (``other`` may be none); Holm per row."""

    def of(method: str, group: list[str], strength: float) -> dict[int, float]:
        return figures(runs, method, dict.fromkeys(group, 0.0 if method == NONE else strength), "test_accuracy")

    strengths, rows = METHODS[one].strengths, []
    for group in [[c] for c in cases] + [cases] * (len(cases) > 1):
        pairs = [paired(of(one, group, s), of(other, group, s)) for s in strengths]
        rows.append([group[0] if len(group) == 1 else "mean", *map(cell, adjust(pairs))])
    return table(["", *(f"{s:g}" for s in strengths)], rows)


def spread_table(runs: Runs, cases: list[str], what: str) -> str:
    """Returns the mean over seeds of one figure of `spread`, before and after training at the chosen strengths."""
    rows = []
    for title, method, key in [("at the start", NONE, "initial"), *((m, m, "final") for m in TESTED)]:
        told = [pick(runs, c, method, best(runs, c, method), f"{key} {what}") for c in cases]
        rows.append([title, *(f"{mean_std([v for v in of.values() if v == v])[0]:.3f}" for of in told)])
    return table(["", *cases], rows)


def scan_table(runs: Runs, cases: list[str]) -> str:
    """Returns mean validation accuracies of the scan, in the order of the strengths."""
    rows = []
    for name, method in METHODS.items():
        told = [[pick(runs, c, name, s, "val_accuracy").values() for s in method.strengths] for c in cases]
        cells = [", ".join(f"{100 * mean_std(list(v))[0]:.1f}" for v in line if v) for line in told]
        rows.append([f"{name}: {', '.join(f'{s:g}' for s in method.strengths)}", *cells])
    return table(["", *cases], rows)


def costs_table(found: dict[str, Any]) -> str:
    """Returns the medians as multiples of a plain step, which is in the header."""
    medians = {c: {m: v["median"] / one["steps"] for m, v in one["milliseconds"].items()} for c, one in found.items()}
    names = dict.fromkeys(m for of in medians.values() for m in of)
    rows = [[m, *(f"{of[m] / of[NONE]:.2f}" if m in of else "" for of in medians.values())] for m in names]
    return table(["", *(f"{case}, {of[NONE]:.1f} ms" for case, of in medians.items())], rows)


def report(result: dict[str, Any]) -> str:
    """Returns every table of the experiment in Markdown."""
    runs = result["runs"]
    cases = [c for c in CASES if any(r["case"] == c for r in runs)]
    parts = [
        "### Test accuracy, %: without energy, and differences to it",
        accuracy_table(runs, cases, "test_accuracy"),
    ]
    for one, other in ((HALF, FULL), (FULL, NONE), (HALF, NONE)):
        parts += [f"### {one} less {other}, by strength", strengths_table(runs, cases, one, other)]
    for what in ("full uniformity", "half uniformity", "full gap"):
        parts += [f"### Hidden layers: {what}", spread_table(runs, cases, what)]
    parts += ["### Training accuracy, %", accuracy_table(runs, cases, "train_accuracy")]
    parts += ["### Scan: validation accuracy, %", scan_table(runs, cases)]
    if "costs" in result:
        parts += ["### A step, plain = 1", costs_table(result["costs"])]
    broken, minutes = sum(not r["finite"] for r in runs), sum(r["cpu_seconds"] for r in runs) / 60
    parts.append(f"{len(runs)} runs, {minutes:.1f} CPU-minutes; {broken} ended with weights that are not finite.")
    return "\n\n".join(parts)


# ---------------------------------------------------------------------- command


def fresh(runs: Runs, case: str) -> list[tuple[str, float]]:
    """Returns what is tested: every method at its chosen strength, full-space and half-space at all."""
    pairs = [(m, best(runs, case, m)) for m in TESTED]
    return list(dict.fromkeys([*pairs, *((m, s) for m in (FULL, HALF) for s in METHODS[m].strengths)]))


def main() -> None:
    """Runs what is not there yet, saving after every run, and prints the tables."""
    parser = arguments("does hyperspherical energy help small networks", "hyperspherical", seeds=5)
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    asked = {"every": EVERY, "rate": RATE, "cases": {name: case._asdict() for name, case in CASES.items()}}
    result = saved(options.out, {"machine": describe_machine(), **asked, "runs": []})
    if options.report:
        print(report(result))
        return
    if {k: result[k] for k in asked} != asked:
        parser.error(f"{options.out} is of other settings: name another file with --out")
    if "costs" not in result:
        result["costs"] = costs()
        save_json(options.out, result)

    def finish(case: str, pairs: list[tuple[str, float]], seeds: Iterable[int]) -> None:
        done = {tuple(r[k] for k in Task._fields) for r in result["runs"]}
        waiting = [t for seed in seeds for m, s in pairs if (t := Task(case, m, s, seed)) not in done]
        complete(result, run, waiting, options)

    for case in options.cases:
        names = [m for m in METHODS if SCANNED.get(m, case) == case]
        finish(case, [(m, s) for m in names for s in METHODS[m].strengths], SCAN_SEEDS)
        finish(case, fresh(result["runs"], case), range(options.seeds))
    print(report(result))


if __name__ == "__main__":
    main()
