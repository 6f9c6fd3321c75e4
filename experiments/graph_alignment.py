"""Does the alignment of consecutive layers, all that the graph energy adds to layer norms, help accuracy or pruning?

    python experiments/graph_alignment.py [--seeds 5]
    python experiments/graph_alignment.py --report

E <= 2 sum_l ||W_l||_*, with equality iff W_{l+1} W_l = 0 at every hidden layer. So at equal layer norms the graph
energy differs from their sum only in rewarding that the output directions of a layer are input directions of the next.
Both are trained at strengths that give overlapping norms, and every outcome is compared at equal sum_l ||W_l||_*: per
seed it is interpolated, linearly in log sum_l ||W_l||_*, to common values. Independently of norms, each outcome is also
compared at the strength that is best for it on the validation data.

MNIST, all 55,000 training images, ReLU, 6 epochs of SGD with momentum 0.9, batch 128, learning rate 0.1 falling
linearly to zero. Nothing is trained again after pruning. A killed experiment goes on where it was when started again.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any, NamedTuple

import numpy as np
import torch
from common import arguments, complete, describe_machine, load, mean_std, mlp, saved, table
from torch import Tensor, nn
from torch.nn import functional

import groundstate as gs
from groundstate.energies import GraphEnergy, Nuclear
from groundstate.report.statistics import Paired, adjust, paired
from groundstate.training.order import batch_order, keyed

EPOCHS, BATCH, RATE, GAP = 6, 128, 0.1, 0.01
SETTINGS = {  # title, widths, share of wrong training labels
    "wide": ("784-128-128-10", (784, 128, 128, 10), 0.0),
    "noisy": ("784-128-128-10, 20 % of the training labels wrong", (784, 128, 128, 10), 0.2),
    "deep": ("784-64-64-64-64-10", (784, 64, 64, 64, 64, 10), 0.0),
}
# At 3/4 of the strength the sum of layer norms gives about the same norms as the graph energy.
STRENGTHS = {"none": (0.0,), "graph": (4e-4, 8e-4, 1.6e-3, 3.2e-3), "nuclear": (3e-4, 6e-4, 1.2e-3, 2.4e-3)}
RANKS = (0.3, 0.2, 0.15, 0.1)  # of the parameters, kept in low-rank form
NEURONS = (0.75, 0.5, 0.25, 0.12)  # of each hidden layer, kept
WEIGHTS = (0.9, 0.95, 0.98)  # of all weights, removed
ENERGIES = {"graph": 1.0 * GraphEnergy(), "nuclear": 2.0 * Nuclear()}
POINTS = 4
ROTATIONS = 8


class Task(NamedTuple):
    """One run: a key of `SETTINGS`, a key of `STRENGTHS`, a strength, a seed."""

    setting: str
    kind: str
    strength: float
    seed: int


def tasks(seeds: int) -> list[Task]:
    """Returns all runs, one setting after the other."""
    return [
        Task(setting, kind, strength, seed)
        for setting in SETTINGS
        for seed in range(seeds)
        for kind, strengths in STRENGTHS.items()
        for strength in strengths
    ]


def run(task: Task) -> dict[str, Any]:
    """Trains one network, measures its weights, and prunes it in every way."""
    start = time.process_time()
    _, widths, noise = SETTINGS[task.setting]
    split = load("mnist", seed=task.seed, label_noise=noise)
    model = mlp(widths, task.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    if task.kind in ENERGIES:
        gs.Regularizer(model, task.strength * ENERGIES[task.kind], gap=GAP).attach(optimizer)
    samples = len(split.train_x)
    steps = EPOCHS * math.ceil(samples / BATCH)
    falling = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for epoch in range(EPOCHS):
        for index in batch_order(samples, task.seed, epoch).split(BATCH):
            loss = functional.cross_entropy(model(split.train_x[index]), split.train_y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
    trained = time.process_time() - start

    def judge(net: nn.Module) -> list[float]:
        return [accuracy(net, split.val_x, split.val_y), accuracy(net, split.test_x, split.test_y)]

    outcomes = {"accuracy": judge(model)}
    outcomes |= {f"rank {b:.0%}": judge(truncated(model, b)) for b in RANKS}
    outcomes |= {f"neurons {k:.0%}": judge(thinned(model, k)) for k in NEURONS}
    outcomes |= {f"weights {1 - s:.0%}": judge(sparse(model, s)) for s in WEIGHTS}
    figures = alignment([w.double() for w in weights(model)], keyed(task.seed, "rotations"))
    train = accuracy(model, split.train_x, split.train_y)
    seconds = {"train_cpu_seconds": round(trained, 2), "cpu_seconds": round(time.process_time() - start, 2)}
    return {**task._asdict(), "train": train, "outcomes": outcomes, **figures, **seconds}


# ---------------------------------------------------------------------- measuring and pruning


def weights(model: nn.Module) -> list[Tensor]:
    """Returns the matrices in the order of the forward pass."""
    return [p.detach() for p in model.parameters() if p.ndim == 2]


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Returns the share of right predictions."""
    return float((model(x).argmax(1) == y).double().mean())


@torch.no_grad()
def alignment(layers: Sequence[Tensor], seed: int) -> dict[str, Any]:
    """Returns layer norms, and how well consecutive layers are aligned.

    ``ratio`` is E / (2 sum_l ||W_l||_*): 1 where consecutive layers are orthogonal, never below ``floor``. ``chance``
    is its mean over random rotations of each hidden layer against the next, which keep all singular values.
    ``cosines`` are ||W_{l+1} W_l||_F / (||W_{l+1}||_F ||W_l||_F), one for each hidden layer.
    """
    norms = [float(torch.linalg.matrix_norm(w, "nuc")) for w in layers]
    total = sum(norms)

    def ratio(matrices: Sequence[Tensor]) -> float:
        return float(GraphEnergy().value(matrices)) / (2 * total)

    def cosines(matrices: Sequence[Tensor]) -> list[float]:
        return [float((b @ a).norm() / (b.norm() * a.norm())) for a, b in pairwise(matrices)]

    generator = torch.Generator().manual_seed(seed)
    turned = [rotated(layers, generator) for _ in range(ROTATIONS)]
    return {
        "norms": norms,
        "ratio": ratio(layers),
        "chance": fmean(ratio(m) for m in turned),
        "floor": max(sum(norms[::2]), sum(norms[1::2])) / total,
        "cosines": cosines(layers),
        "cosines_chance": np.mean([cosines(m) for m in turned], axis=0).tolist(),
    }


def rotated(layers: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """Returns the layers, each after the first behind a random rotation of its inputs."""
    found = [layers[0]]
    for w in layers[1:]:
        q, r = torch.linalg.qr(torch.randn((w.shape[1], w.shape[1]), generator=generator, dtype=w.dtype))
        found.append(w @ (q * r.diagonal().sign()))
    return found


def truncated(model: nn.Module, budget: float) -> nn.Module:
    """Returns the model without the singular values below a common fraction of the largest of their layer.

    The fraction is the least that leaves at most ``budget`` times the parameters of the matrices; a layer counts
    r (rows + columns), or all its entries where that is less.
    """
    small = copy.deepcopy(model)
    layers = weights(small)
    factors = [torch.linalg.svd(w, full_matrices=False) for w in layers]
    relative = [f.S / f.S[0].clamp_min(torch.finfo(f.S.dtype).tiny) for f in factors]
    allowed = budget * sum(w.numel() for w in layers)

    def ranks(fraction: float) -> list[int]:
        return [int((r >= fraction).sum()) for r in relative]

    def size(fraction: float) -> int:
        return sum(min(w.numel(), r * sum(w.shape)) for w, r in zip(layers, ranks(fraction)))

    fractions = sorted(float(v) for v in torch.cat(relative))
    fraction = next((f for f in fractions if size(f) <= allowed), math.inf)
    for w, f, r in zip(layers, factors, ranks(fraction)):
        w.copy_((f.U[:, :r] * f.S[:r]) @ f.Vh[:r])
    return small


def thinned(model: nn.Module, kept: float) -> nn.Module:
    """Returns the model with this share of each hidden layer: the largest products of incoming and outgoing norm."""
    small = copy.deepcopy(model)
    linear = [m for m in small.modules() if isinstance(m, nn.Linear)]
    found = [a.weight.detach().norm(dim=1) * b.weight.detach().norm(dim=0) for a, b in pairwise(linear)]
    with torch.no_grad():
        for product, after in zip(found, linear[1:]):
            removed = product.argsort(descending=True)[round(kept * len(product)) :]
            after.weight[:, removed] = 0.0
    return small


def sparse(model: nn.Module, share: float) -> nn.Module:
    """Returns the model without this share of all its weights: the smallest in magnitude."""
    small = copy.deepcopy(model)
    layers = weights(small)
    magnitudes = torch.cat([w.abs().reshape(-1) for w in layers])
    bound = magnitudes.kthvalue(max(1, round(share * len(magnitudes)))).values
    for w in layers:
        w.mul_(w.abs() > bound)
    return small


# ---------------------------------------------------------------------- tables


Runs = list[dict[str, Any]]


class Curve(NamedTuple):
    """The runs of one kind and seed by ascending sum of layer norms."""

    log_norms: np.ndarray
    runs: Runs

    def at(self, norms: float, value: Callable[[dict[str, Any]], float]) -> float:
        return float(np.interp(math.log(norms), self.log_norms, [value(r) for r in self.runs]))


def curves(runs: Runs, kind: str) -> dict[int, Curve]:
    """Returns a curve for each seed."""
    found = {}
    for seed in sorted({r["seed"] for r in runs}):
        own = sorted((r for r in runs if (r["kind"], r["seed"]) == (kind, seed)), key=total)
        found[seed] = Curve(np.log([total(r) for r in own]), own)
    return found


def total(r: dict[str, Any]) -> float:
    return sum(r["norms"])


def common(graph: Mapping[int, Curve], nuclear: Mapping[int, Curve]) -> list[float]:
    """Returns sums of norms, log-spaced, that every curve reaches."""
    both = [*graph.values(), *nuclear.values()]
    low, high = max(c.log_norms[0] for c in both), min(c.log_norms[-1] for c in both)
    return np.exp(np.linspace(low, high, POINTS)).tolist()


def outcome(key: str, split: int = 1) -> Callable[[dict[str, Any]], float]:
    """Returns what reads an accuracy in percent off a run; ``split``: 0 validation, 1 test."""
    return lambda r: 100 * r["outcomes"][key][split]


MEASURES: dict[str, Callable[[dict[str, Any]], float]] = {
    "E / (2 sum of norms)": lambda r: r["ratio"],
    "by chance": lambda r: r["chance"],
    "chance less found": lambda r: r["chance"] - r["ratio"],
    "cosine": lambda r: fmean(r["cosines"]),
    "by chance ": lambda r: fmean(r["cosines_chance"]),
}


def plus_minus(values: Sequence[float], digits: int = 2) -> str:
    mean, deviation = mean_std(values)
    return f"{mean:.{digits}f} ± {deviation:.{digits}f}"


def difference(p: Paired, digits: int = 2) -> str:
    """Returns mean and half interval of the differences, with a star where Holm's correction leaves p < 0.05."""
    star = "\\*" if p.p_t_adjusted < 0.05 else ""
    return f"{p.difference.mean:+.{digits}f} ± {p.difference.half_width:.{digits}f}{star}"


def trained(runs: Runs) -> str:
    """Returns norms, alignment and accuracy of every strength, over seeds."""
    rows = []
    for kind, strengths in STRENGTHS.items():
        for strength in strengths:
            own = [r for r in runs if (r["kind"], r["strength"]) == (kind, strength)]
            layers = ", ".join(f"{n:.0f}" for n in np.mean([r["norms"] for r in own], axis=0))
            name = kind if kind == "none" else f"{kind} {strength:g}"
            measured = [plus_minus([MEASURES[m](r) for r in own], 3) for m in ("E / (2 sum of norms)", "by chance")]
            cosines = [f"{fmean(MEASURES[m](r) for r in own):.2f}" for m in ("cosine", "by chance ")]
            accuracies = [plus_minus([outcome("accuracy", s)(r) for r in own]) for s in (0, 1)]
            rows.append(
                [name, plus_minus([total(r) for r in own], 1), layers, *measured, *cosines, *accuracies, f"{len(own)}"]
            )
    measures = ["E / 2 sum", "by chance", "cosine", "by chance"]
    return table(["", "sum of norms", "layer norms", *measures, "validation", "test", "seeds"], rows)


def read_off(runs: Runs, read: Callable[[dict[str, Any]], float]) -> list[dict[int, list[float]]]:
    """Returns, for graph and for nuclear, the values at the common norms by seed."""
    both = [curves(runs, kind) for kind in ("graph", "nuclear")]
    return [{seed: [c.at(p, read) for p in common(*both)] for seed, c in kind.items()} for kind in both]


def equal_norms(runs: Runs) -> str:
    """Returns alignment and outcomes of the nuclear norm, and the differences of the graph energy to it."""
    points, keys = common(curves(runs, "graph"), curves(runs, "nuclear")), list(runs[0]["outcomes"])
    readers = MEASURES | {key: outcome(key) for key in keys}
    values = {key: read_off(runs, read) for key, read in readers.items()}
    pairs, means = {}, {}
    for key, (a, b) in values.items():
        pairs[key] = [paired({s: v[i] for s, v in a.items()}, {s: v[i] for s, v in b.items()}) for i in range(POINTS)]
        means[key] = paired({s: fmean(v) for s, v in a.items()}, {s: fmean(v) for s, v in b.items()})
    corrected = iter(adjust([p for key in keys for p in pairs[key]]))
    pairs |= {key: [next(corrected) for _ in points] for key in keys}
    means |= dict(zip(keys, adjust([means[key] for key in keys])))
    rows = []
    for key, (_, b) in values.items():
        cells, digits = [], 2 if key in keys else 3
        for level, pair in zip(zip(*b.values()), pairs[key]):
            cells += [f"{fmean(level):.{digits}f}", difference(pair, digits)]
        rows.append([key, *cells, difference(means[key], digits)])
    header = [cell for p in points for cell in (f"nuclear at {p:.0f}", "graph less nuclear")]
    return table(["", *header, "mean of the four"], rows)


def best(runs: Runs, kind: str, key: str) -> tuple[float, dict[int, float]]:
    """Returns the strength of the best mean validation figure, and the test figures there by seed."""
    own = {s: [r for r in runs if (r["kind"], r["strength"]) == (kind, s)] for s in STRENGTHS[kind]}
    chosen = max(own, key=lambda s: fmean(outcome(key, 0)(r) for r in own[s]))
    return chosen, {r["seed"]: outcome(key)(r) for r in own[chosen]}


def at_best(runs: Runs) -> str:
    """Returns every outcome at the strength that validation data choose for it."""
    kinds, keys = list(STRENGTHS), list(runs[0]["outcomes"])
    chosen = {key: {kind: best(runs, kind, key) for kind in kinds} for key in keys}
    contrasts = (("graph", "nuclear"), ("graph", "none"), ("nuclear", "none"))
    pairs = adjust([paired(chosen[key][a][1], chosen[key][b][1]) for key in keys for a, b in contrasts])
    rows = []
    for i, key in enumerate(keys):
        cells = [plus_minus(list(chosen[key]["none"][1].values()))]
        for kind in ("graph", "nuclear"):
            strength, values = chosen[key][kind]
            cells.append(f"{plus_minus(list(values.values()))} ({strength:g})")
        rows.append([key, *cells, *[difference(p) for p in pairs[3 * i : 3 * i + 3]]])
    return table(["", *kinds, *[f"{a} less {b}" for a, b in contrasts]], rows)


def pooled(cases: Sequence[Runs]) -> str:
    """Returns graph less nuclear over all cases and seeds: the means over equal norms, and at the best strengths."""
    keys, columns = list(cases[0][0]["outcomes"]), ([], [])
    for key in keys:
        equal, chosen = [], []
        for runs in cases:
            a, b = read_off(runs, outcome(key))
            equal += [fmean(a[seed]) - fmean(b[seed]) for seed in a]
            a, b = best(runs, "graph", key)[1], best(runs, "nuclear", key)[1]
            chosen += [a[seed] - b[seed] for seed in a]
        for column, values in zip(columns, (equal, chosen)):
            column.append((paired(dict(enumerate(values)), dict.fromkeys(range(len(values)), 0.0)), values))
    rows = [[key] for key in keys]
    for column in columns:
        for row, pair, (_, values) in zip(rows, adjust([p for p, _ in column]), column):
            row += [difference(pair), f"{sum(v > 0 for v in values)} of {len(values)}"]
    return table(["", "at equal norms", "graph ahead", "at the best strengths", "graph ahead"], rows)


def report(result: Mapping[str, Any]) -> str:
    """Returns all tables in Markdown, of the seeds whose runs are all there."""
    parts, cases, whole = [], [], sum(map(len, STRENGTHS.values()))
    for setting, (title, _, _) in SETTINGS.items():
        own = [r for r in result["runs"] if r["setting"] == setting]
        runs = [r for r in own if sum(o["seed"] == r["seed"] for o in own) == whole]
        if runs:
            cases.append(runs)
            parts += [f"## {title}", trained(runs), "At equal sums of layer norms:", equal_norms(runs)]
            parts += ["At the strength that is best on the validation data, for each line:", at_best(runs)]
    if cases:
        parts += ["## All cases: graph less nuclear", pooled(cases)]
    seconds = sum(r["cpu_seconds"] for r in result["runs"])
    parts.append(f"{len(result['runs'])} runs, {seconds / 60:.1f} CPU-minutes.")
    return "\n\n".join(parts)


# ---------------------------------------------------------------------- command


def main() -> None:
    """Runs what is not there yet, saving after every run, and prints the tables."""
    parser = arguments("does the alignment of layers help accuracy or pruning?", "graph_alignment", seeds=5)
    options = parser.parse_args()
    result = saved(options.out, {"machine": describe_machine(), "runs": []})
    if not options.report:
        done = {Task(*(r[name] for name in Task._fields)) for r in result["runs"]}
        complete(result, run, [t for t in tasks(options.seeds) if t not in done], options)
    print(report(result))


if __name__ == "__main__":
    main()
