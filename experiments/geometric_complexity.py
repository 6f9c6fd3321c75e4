"""What moves geometric complexity: learning rate, batch size, L2, initial weights, noise, an explicit penalty.

    python experiments/geometric_complexity.py [--seeds 5] [--train-size 6000] [--workers 1] [--data mnist|digits]
    python experiments/geometric_complexity.py --report

Networks of two hidden layers of 128 ReLU units, plain SGD without momentum, one knob at a time around a base. They are
compared where their training loss (cross-entropy on all training inputs, without noise and penalties) first comes down
to 0.1: it is looked at eight times per epoch, and GC is interpolated, linearly in log loss, between the two looks
around 0.1. As a loss that fluctuates comes down to 0.1 early, the last crossing is recorded too. The same runs are
measured after 15 epochs, whatever their loss. A killed experiment goes on where it was when started again.

Reference: B. Dherin, M. Munn, M. Rosca, D. Barrett, "Why neural networks find simple solutions: the many regularizers
of geometric complexity" (2022).
"""

from __future__ import annotations

import copy
import math
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from common import arguments, complete, describe_machine, load, mean_std, mlp, saved, table
from torch import Tensor
from torch.nn import functional

import groundstate as gs
from groundstate.energies.dirichlet import Dirichlet
from groundstate.report.statistics import holm, sample
from groundstate.training.data import Dataset
from groundstate.training.evaluation import accuracy_and_loss
from groundstate.training.order import batch_order, keyed

LOSSES = (0.3, 0.1)
"""Training losses at which networks are compared; a run ends when it has crossed all, and done `FIXED_EPOCHS`."""
LOSS = LOSSES[-1]
FIXED_EPOCHS = 15
LOOKS = 8  # per epoch
HIDDEN = (128, 128)
POINTS = 1000  # test images on which GC is the mean


@dataclass(frozen=True)
class Setting:
    """How to train; the defaults are the base."""

    lr: float = 0.05
    batch: int = 128
    l2: float = 0.0
    init: float = 1.0
    noise: float = 0.0
    penalty: float = 0.0
    label_noise: float = 0.0

    def __str__(self) -> str:
        changed = [f"{f.name}={getattr(self, f.name):g}" for f in fields(self) if getattr(self, f.name) != f.default]
        return " ".join(changed) or "base"


class Knob(NamedTuple):
    """A row of the tables: values of one field of `Setting`, and the direction in which GC is expected to go."""

    title: str
    values: tuple[float, ...]
    expected: int


KNOBS = {
    "lr": Knob("learning rate", (0.0125, 0.05, 0.2), -1),
    "batch": Knob("batch size", (8, 32, 128, 512), +1),
    "l2": Knob("L2 (weight decay)", (0.0, 1e-3, 1e-2), -1),
    "init": Knob("scale of the initial weights", (0.5, 1.0, 2.0, 3.0), +1),
    "noise": Knob("input noise", (0.0, 0.3, 1.0), -1),
    "penalty": Knob("strength of the GC penalty", (0.0, 1e-2, 3e-2), -1),
    "label_noise": Knob("label noise", (0.0, 0.1, 0.2), +1),
}


class Task(NamedTuple):
    """One run."""

    setting: Setting
    seed: int

    def __str__(self) -> str:
        return f"{self.setting}, seed {self.seed}"


class Look(NamedTuple):
    """A network at one moment."""

    epochs: float
    loss: float
    weights: dict[str, Tensor]


class Training:
    """One network in training; equal seeds share training samples, initial weights and, at equal batches, the order."""

    def __init__(self, task: Task, split: Dataset) -> None:
        self.setting, self.seed, self.split = task.setting, task.seed, split
        self.model = mlp((split.inputs, *HIDDEN, split.classes), task.seed, self.setting.init)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=self.setting.lr, weight_decay=self.setting.l2)
        self.regularizer = gs.Regularizer(self.model, self.setting.penalty * Dirichlet(), seed=task.seed)
        self.regularizer.attach(self.optimizer)
        self.noise = torch.Generator().manual_seed(keyed(task.seed, "noise"))

    def step(self, index: Tensor) -> None:
        """Makes one step of SGD."""
        x, y = self.split.train_x[index], self.split.train_y[index]
        if self.setting.noise > 0:
            x = x + self.setting.noise * torch.randn(x.shape, generator=self.noise)
        loss = functional.cross_entropy(self.model(x), y)
        if self.setting.penalty > 0:
            loss = loss + self.regularizer.loss(x, y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()

    def look(self, epochs: float) -> Look:
        """Returns the training loss and a copy of the weights."""
        _, loss = accuracy_and_loss(self.model, self.split.train_x, self.split.train_y)
        return Look(epochs, math.nan if loss is None else loss, copy.deepcopy(self.model.state_dict()))

    def measured(self, look: Look) -> dict[str, float]:
        """Returns GC on the fixed test points, test accuracy and what the look was."""
        twin = copy.deepcopy(self.model)
        twin.load_state_dict(look.weights)
        points = torch.randperm(len(self.split.test_x), generator=torch.Generator().manual_seed(0))[:POINTS]
        gc = Dirichlet().estimate(twin, self.split.test_x[points], probe=torch.Generator()).value
        accuracy, _ = accuracy_and_loss(twin, self.split.test_x, self.split.test_y)
        return {"epochs": look.epochs, "train_loss": look.loss, "gc": gc, "test_accuracy": accuracy or 0.0}

    def between(self, before: Look, after: Look, loss: float) -> dict[str, float]:
        """Returns everything at training loss ``loss``, linear in log loss between two looks around it."""
        a, b = self.measured(before), self.measured(after)
        share = math.log(before.loss / loss) / math.log(before.loss / after.loss)
        return {
            **{k: a[k] + share * (b[k] - a[k]) for k in ("epochs", "gc", "test_accuracy")},
            "loss_before": before.loss,
            "loss_after": after.loss,
            "gc_before": a["gc"],
            "gc_after": b["gc"],
        }


def run(task: Task, *, data: str, train_size: int | None, max_epochs: int) -> dict[str, Any]:
    """Trains one network until it has crossed every loss of `LOSSES` and done `FIXED_EPOCHS`, or to ``max_epochs``.

    The result has, for each loss, what `Training.between` says of the first crossing and of the last one.
    """
    start = time.process_time()
    split = load(data, train_size, task.seed, task.setting.label_noise)
    training = Training(task, split)
    last = first = training.look(0.0)
    crossings: dict[str, list[dict[str, float]]] = {f"{loss:g}": [] for loss in LOSSES}
    fixed, epoch = None, 0
    while epoch < max_epochs and (fixed is None or not all(crossings.values())) and math.isfinite(last.loss):
        batches = batch_order(len(split.train_x), task.seed, epoch).split(task.setting.batch)
        looks = {round(len(batches) * k / LOOKS) for k in range(1, LOOKS + 1)}
        for k, index in enumerate(batches, 1):
            training.step(index)
            if k in looks:
                before, last = last, training.look(epoch + k / len(batches))
                if not math.isfinite(last.loss):
                    break
                for loss in LOSSES:
                    if (before.loss > loss) != (last.loss > loss):
                        crossings[f"{loss:g}"][1:] = [training.between(before, last, loss)]
        else:
            epoch += 1
            if epoch == FIXED_EPOCHS:
                fixed = training.measured(last)
    return {
        "setting": asdict(task.setting),
        "seed": task.seed,
        "initial": training.measured(first),
        "crossings": crossings,
        "fixed": fixed,
        "end": training.measured(last) if math.isfinite(last.loss) else {"epochs": last.epochs, "train_loss": None},
        "cpu_seconds": round(time.process_time() - start, 2),
    }


def settings(names: list[str]) -> list[Setting]:
    """Returns the base and every setting that differs from it in one knob, each once."""
    found = {Setting(): None}
    for name in names:
        found |= {replace(Setting(), **{name: value}): None for value in KNOBS[name].values}
    return list(found)


# ---------------------------------------------------------------------- tables


def moment(entry: dict[str, Any], at: str, which: int = 0) -> dict[str, Any] | None:
    """Returns what a run was at ``at``: a loss (its first crossing, or the last with ``which=-1``), or ``fixed``."""
    if at == "fixed":
        return entry["fixed"]
    return entry["crossings"][at][which] if entry["crossings"][at] else None


def levels(
    runs: list[dict[str, Any]], name: str, at: str, which: int = 0
) -> dict[float, dict[int, dict[str, Any] | None]]:
    """Returns, by value of a knob and by seed, the `moment` of the run; ``None`` where it has none."""
    found = {}
    for value in KNOBS[name].values:
        setting = asdict(replace(Setting(), **{name: value}))
        found[value] = {r["seed"]: moment(r, at, which) for r in runs if r["setting"] == setting}
    return found


def values_table(runs: list[dict[str, Any]], at: str) -> str:
    """Returns GC and what goes with it for every value of every knob."""
    rows = []
    for name, knob in KNOBS.items():
        last = levels(runs, name, at, -1)
        for value, of_seed in levels(runs, name, at).items():
            if not of_seed:
                continue
            told = [e for e in of_seed.values() if e is not None]
            row = [f"{knob.title} {value:g}", f"{len(told)} of {len(of_seed)}", number([e["gc"] for e in told])]
            if at != "fixed":
                row.append(number([e["gc"] for e in last[value].values() if e is not None]))
            row.append(number([100 * e["test_accuracy"] for e in told]))
            row.append(number([e["train_loss" if at == "fixed" else "epochs"] for e in told]))
            rows.append(row)
    header = ["GC", "training loss"] if at == "fixed" else ["GC", "GC, last crossing", "epochs"]
    return table(["", "runs", *header[:-1], "test accuracy, %", header[-1]], rows)


def directions_table(runs: list[dict[str, Any]], at: str, which: int = 0) -> str:
    """Returns, per knob, which way GC goes and how sure that is; values that not all seeds reached are left out."""
    from scipy import stats

    rows, p_values = [], []
    for name, knob in KNOBS.items():
        found = levels(runs, name, at, which)
        used = [v for v, of_seed in found.items() if of_seed and None not in of_seed.values()]
        seeds = sorted(set.intersection(*(set(found[v]) for v in used))) if len(used) > 1 else []
        if not seeds:
            continue
        gc = [[(found[v][s] or {})["gc"] for v in used] for s in seeds]
        rho = [float(stats.spearmanr(used, line).statistic) for line in gc]
        agreeing = sum(round(knob.expected * r, 9) == 1 for r in rho)
        p_values.append(page([line[:: knob.expected] for line in gc]))
        ratio = sample([math.log(line[-1] / line[0]) for line in gc])
        low, high = (f"{math.exp(x):.2f}" for x in (ratio.low, ratio.high))
        rows.append(
            [
                f"{knob.title} {used[0]:g} to {used[-1]:g}",
                "up" if knob.expected > 0 else "down",
                f"{math.exp(ratio.mean):.2f} ({low} to {high})",
                f"{mean_std(rho)[0]:+.2f}",
                f"{agreeing} of {len(seeds)}",
            ]
        )
    rows = [[*row, f"{p:.2g}"] for row, p in zip(rows, holm(p_values))]
    header = ["expected", "ratio of GC (95 %)", "Spearman", "monotone as expected", "p"]
    return table(["", *header], rows)


def page(lines: list[list[float]]) -> float:
    """Returns the one-sided p of an increasing trend along each line; of two values, of the sign test."""
    from scipy import stats

    if len(lines) < 2:
        return math.nan
    if len(lines[0]) == 2:
        return float(stats.binomtest(sum(b > a for a, b in lines), len(lines), alternative="greater").pvalue)
    return float(stats.page_trend_test(lines, method="exact").pvalue)


def number(values: list[float]) -> str:
    """Returns mean and deviation to about three digits."""
    if not values:
        return "-"
    mean, std = mean_std(values)
    digits = max(0, 2 - math.floor(math.log10(abs(mean)))) if mean else 2
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}")


def report(result: dict[str, Any]) -> str:
    """Returns every table of the experiment in Markdown."""
    runs = result["runs"]
    parts = []
    for at in (*(f"{loss:g}" for loss in reversed(LOSSES)), "fixed"):
        title = f"after {FIXED_EPOCHS} epochs" if at == "fixed" else f"at training loss {at}"
        parts += [f"### GC {title}", values_table(runs, at), f"### Directions {title}", directions_table(runs, at)]
    parts += [f"### Directions at the last crossing of {LOSS:g}", directions_table(runs, f"{LOSS:g}", -1)]
    late = [r for r in runs if not r["crossings"][f"{LOSS:g}"]]
    if late:
        told = [[str(Task(Setting(**r["setting"]), r["seed"])), *ending(r["end"])] for r in late]
        parts += [f"### Runs that did not reach {LOSS:g}", table(["", "epochs", "training loss", "GC"], told)]
    first = [c[0] for r in runs if (c := r["crossings"][f"{LOSS:g}"])]
    if first:
        ratios = sorted(c["loss_before"] / c["loss_after"] for c in first)
        median, high = ratios[len(ratios) // 2], ratios[-1]
        parts.append(f"The two training losses around {LOSS:g}: median ratio {median:.2f}, at most {high:.2f}.")
    minutes = sum(r["cpu_seconds"] for r in runs) / 60
    parts.append(f"{len(runs)} runs, {minutes:.1f} CPU-minutes.")
    return "\n\n".join(parts)


def ending(end: dict[str, Any]) -> list[str]:
    """Returns the cells that say where a run ended."""
    return ["-" if end.get(k) is None else f"{end[k]:.3g}" for k in ("epochs", "train_loss", "gc")]


# ---------------------------------------------------------------------- command


def main() -> None:
    """Runs what is not there yet, saving after every run, and prints the tables."""
    parser = arguments("what moves geometric complexity", "geometric_complexity", seeds=5)
    parser.add_argument("--train-size", type=int, default=None, help="default: 6000 of mnist, all of digits")
    parser.add_argument("--data", choices=("mnist", "digits"), default="mnist")
    parser.add_argument("--max-epochs", type=int, default=150)
    parser.add_argument("--knobs", nargs="*", choices=list(KNOBS), default=list(KNOBS))
    options = parser.parse_args()
    size = 6000 if options.train_size is None and options.data == "mnist" else options.train_size
    asked = {"data": options.data, "train_size": size, "max_epochs": options.max_epochs}
    result = saved(options.out, {"machine": describe_machine(), **asked, "runs": []})
    if options.report:
        print(report(result))
        return
    if (found := {k: result[k] for k in asked}) != asked:
        parser.error(f"{options.out} is of {found}, asked for {asked}: name another file with --out")
    done = {Task(Setting(**r["setting"]), r["seed"]) for r in result["runs"]}
    tasks = [Task(s, seed) for seed in range(options.seeds) for s in settings(options.knobs)]
    waiting = [t for t in tasks if t not in done]
    complete(result, partial(run, **asked), waiting, options)
    print(report(result))


if __name__ == "__main__":
    main()
