"""Does a network notice that the gradient of its energy is kept, tracked, or replaced by a rare proximal map?

The nuclear norms of all weights of 784-128-128-10 are penalized on MNIST, and only the way the penalty acts differs:

* ``exact``: the polar factor of every weight at every step;
* ``kept``: a polar factor serves until the norm is 1 % or 5 % above the bound that it gives (`groundstate.amortized`);
* ``tracked``: a polar factor follows its weight by matrix products, at every fifth step (`tracked_polar`);
* ``prox``: singular values are thresholded at every tenth step, by as much as ten steps need.

With momentum m a gradient moves a weight by lr / (1 - m) in total, a proximal map by its threshold, once; so ``prox``
has the strength mu / (1 - m). The learning rate falls to zero linearly. What a network can do without is judged in
three ways: after one last prox, of threshold mu and of 10 mu, and with singular values below 5 % of the largest cut
off. The costs are measured apart, in turns. A killed experiment goes on where it was when started again.

Reference: J.-F. Cai, E. Candes, Z. Shen, "A singular value thresholding algorithm for matrix completion" (2010).
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from common import arguments, complete, describe_machine, load, mean_std, mlp, save_json, saved, table
from torch import Tensor, nn
from torch.nn import functional
from tracked_polar import OLDEST, Tracked

import groundstate as gs
from groundstate.energies import Nuclear
from groundstate.report.statistics import Paired, adjust, paired
from groundstate.training.order import batch_order

WIDTHS, EPOCHS, BATCH, RATE, MOMENTUM = (784, 128, 128, 10), 6, 128, 0.1, 0.9
STRENGTHS = (3e-4, 1e-3, 2e-3)
EVERY = 10
FINAL = (1.0, 10.0)  # what the last prox thresholds by, times the strength
TRUNCATED = 0.05  # of the largest singular value
ZERO = 1e-6
NONE, EXACT = "none", "exact"


class Task(NamedTuple):
    """One run."""

    method: str
    strength: float
    seed: int

    def __str__(self) -> str:
        return f"{self.method}, {self.strength:g}, seed {self.seed}"


class Acting(Protocol):
    """What adds an energy to the steps of an optimizer."""

    def counts(self) -> tuple[int, float]:
        """Returns the decompositions made so far, and the widest certified gap seen (NaN: not watched)."""
        ...


class Exact:
    """A decomposition of each weight at every ``every``-th step, for a gradient or a proximal map."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, strength: float, every: int = 1) -> None:
        term = strength * Nuclear()
        self.reg = gs.Regularizer(model, term, coupling="prox" if every > 1 else "grad", every=every).attach(optimizer)

    def counts(self) -> tuple[int, float]:
        return len(self.reg.blocks) * math.ceil(self.reg.step_count / self.reg.every), math.nan


class Kept:
    """Gradients kept until a share ``gap`` of the energy opens."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, strength: float, gap: float) -> None:
        self.reg = gs.Regularizer(model, strength * Nuclear(), gap=gap).attach(optimizer)

    def counts(self) -> tuple[int, float]:
        wear = [w for found in self.reg.wear().values() for w in found]
        return sum(w.refreshes for w in wear), max(w.widest for w in wear)


class Followed:
    """Polar factors tracked by matrix products, moved at every ``every``-th step."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, strength: float, every: int) -> None:
        self.pairs = [(p, Tracked(OLDEST)) for p in model.parameters() if p.ndim == 2]
        self.strength, self.every, self.step = strength, every, 0
        optimizer.register_step_pre_hook(self._act)

    def counts(self) -> tuple[int, float]:
        return sum(t.decompositions for _, t in self.pairs), math.nan

    @torch.no_grad()
    def _act(self, optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        for parameter, tracked in self.pairs:
            if self.step % self.every == 0:
                tracked.move(parameter)
            if parameter.grad is not None:
                parameter.grad.add_(tracked.q, alpha=self.strength)
        self.step += 1


Maker = Callable[[nn.Module, torch.optim.Optimizer, float], Acting]
METHODS: dict[str, Maker] = {
    EXACT: Exact,
    "kept, gap 1 %": lambda model, optimizer, mu: Kept(model, optimizer, mu, 0.01),
    "kept, gap 5 %": lambda model, optimizer, mu: Kept(model, optimizer, mu, 0.05),
    "tracked every 5": lambda model, optimizer, mu: Followed(model, optimizer, mu, 5),
    "prox every 10": lambda model, optimizer, mu: Exact(model, optimizer, mu / (1 - MOMENTUM), EVERY),
}


class Training:
    """A network in training, with one way for the penalty to act."""

    def __init__(self, method: str, strength: float, seed: int, steps: int) -> None:
        self.model = mlp(WIDTHS, seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=MOMENTUM)
        self.acting = None if method == NONE else METHODS[method](self.model, self.optimizer, strength)
        self.falling = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, steps)

    def step(self, x: Tensor, y: Tensor) -> None:
        loss = functional.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.falling.step()


def tasks(seeds: int) -> list[Task]:
    """Returns all runs, the first seed of everything first."""
    found = []
    for seed in range(seeds):
        found.append(Task(NONE, 0.0, seed))
        found += [Task(method, mu, seed) for mu in STRENGTHS for method in METHODS]
    return found


def run(task: Task) -> dict[str, Any]:
    """Trains one network, and judges it as it is, after a last prox, and with small singular values cut off."""
    start = time.process_time()
    split = load("mnist")
    training = Training(task.method, task.strength, task.seed, EPOCHS * math.ceil(len(split.train_x) / BATCH))
    for epoch in range(EPOCHS):
        for index in batch_order(len(split.train_x), task.seed, epoch).split(BATCH):
            training.step(split.train_x[index], split.train_y[index])
    made, widest = training.acting.counts() if training.acting else (0, math.nan)
    found: dict[str, Any] = {"decompositions": made, "widest_gap": widest, "before": judged(training.model, ZERO)}
    for times in FINAL:
        model = copy.deepcopy(training.model)
        gs.Regularizer(model, task.strength * Nuclear()).apply_prox(times)
        found[f"prox {times:g}"] = judged(model, ZERO)
    truncate(training.model, TRUNCATED)
    found["truncated"] = judged(training.model, ZERO)
    return {**task._asdict(), **found, "cpu_seconds": round(time.process_time() - start, 2)}


@torch.no_grad()
def judged(model: nn.Module, zero: float) -> dict[str, Any]:
    """Returns accuracy, the sum of the nuclear norms, the ranks, and the share of the parameters of the weights left.

    A singular value below ``zero`` times the largest counts as zero; a weight becomes two factors where that is less.
    """
    split = load("mnist")
    spectra = [torch.linalg.svdvals(w.double()) for w in weights(model)]
    ranks = [int((s > zero * s[0]).sum()) for s in spectra]
    left = [min(w.numel(), r * sum(w.shape)) for w, r in zip(weights(model), ranks, strict=True)]
    return {
        "accuracy": float((model(split.test_x).argmax(1) == split.test_y).double().mean()),
        "norm": sum(float(s.sum()) for s in spectra),
        "ranks": ranks,
        "parameters": sum(left) / sum(w.numel() for w in weights(model)),
    }


def weights(model: nn.Module) -> list[Tensor]:
    """Returns the matrices of a network."""
    return [p.detach() for p in model.parameters() if p.ndim == 2]


def truncate(model: nn.Module, share: float) -> None:
    """Leaves the singular values of each weight above a share of its largest."""
    for w in weights(model):
        u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
        w.copy_((u * (s * (s > share * s[0]))) @ vh)


# ---------------------------------------------------------------------- cost


def cost(strength: float, epochs: int, seed: int = 0, turn: int = 16) -> dict[str, list[float]]:
    """Returns the time of the energy in a step over that of a plain step, by part of the training (sixths).

    All methods train beside one another, 16 steps at a turn, on the same batches. It is processor time of one thread.
    """
    split = load("mnist")
    per_epoch = math.ceil(len(split.train_x) / BATCH)
    steps = epochs * per_epoch
    batches = [b for e in range(epochs) for b in batch_order(len(split.train_x), seed, e).split(BATCH)]
    trainings = {name: Training(name, strength, seed, steps) for name in (NONE, *METHODS)}
    seconds = {name: [0.0] * EPOCHS for name in trainings}
    for first in range(0, steps, turn):
        drawn = [(split.train_x[b], split.train_y[b]) for b in batches[first : first + turn]]
        for name, training in trainings.items():
            start = time.thread_time()
            for x, y in drawn:
                training.step(x, y)
            seconds[name][first * EPOCHS // steps] += time.thread_time() - start
    return {
        name: [taken / plain - 1 for taken, plain in zip(of, seconds[NONE], strict=True)]
        for name, of in seconds.items()
        if name != NONE
    } | {"seconds of a plain step": [sum(seconds[NONE]) / steps]}


# ---------------------------------------------------------------------- tables

Runs = list[dict[str, Any]]
PARTS = (*(f"prox {times:g}" for times in FINAL), "truncated")


def pick(runs: Runs, method: str, strength: float, part: str, key: str = "") -> dict[int, Any]:
    """Returns one figure by seed."""
    chosen = {r["seed"]: r[part] for r in runs if (r["method"], r["strength"]) == (method, strength)}
    return {seed: of[key] for seed, of in chosen.items()} if key else chosen


def number(values: dict[int, float], digits: int, factor: float = 1.0) -> str:
    """Returns mean and standard deviation."""
    mean, std = mean_std([factor * v for v in values.values()])
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}")


def cell(comparison: Paired, factor: float, digits: int = 2) -> str:
    """Returns a mean difference with half its 95 % interval, a star where Holm's p is below 0.05."""
    d, star = comparison.difference, "\\*" if comparison.p_t_adjusted < 0.05 else ""
    return f"{factor * d.mean:+.{digits}f} ± {factor * d.half_width:.{digits}f}{star}" if d.n else "-"


def layers(found: dict[int, list[int]]) -> str:
    """Returns the mean ranks of the layers."""
    return ", ".join(f"{mean_std(of)[0]:.0f}" for of in zip(*found.values(), strict=True))


def method_table(runs: Runs, strength: float) -> str:
    """Returns every figure of each method at one strength: as trained, and after each way to make weights smaller."""
    lines = []
    for method in (NONE, *METHODS):
        get = partial(pick, runs, method, 0.0 if method == NONE else strength)
        if not get("seed"):
            continue
        before = [number(get("before", "accuracy"), 2, 100), number(get("before", "norm"), 1)]
        line = [method, str(len(get("seed"))), number(get("decompositions"), 0), *before]
        for part in PARTS:
            line += [number(get(part, "accuracy"), 2, 100), layers(get(part, "ranks"))]
            line.append(number(get(part, "parameters"), 2))
        lines.append(line)
    names = ["prox of mu", "prox of 10 mu", "cut at 5 %"]
    header = [f"{name}: {what}" for name in names for what in ("accuracy", "ranks", "parameters")]
    return table(["", "runs", "decompositions", "accuracy", "norms", *header], lines)


def difference_table(runs: Runs) -> str:
    """Returns the paired differences to the exact gradient at equal strength; Holm per column and strength."""
    columns = [("before", "accuracy", 100.0), ("before", "norm", 1.0)]
    columns += [(part, key, 100.0) for part in PARTS for key in ("accuracy", "parameters")]
    others, lines = [m for m in METHODS if m != EXACT], []
    for mu in STRENGTHS:
        cells = {m: [f"{m}, {mu:g}"] for m in others}
        for part, key, factor in columns:
            exact = pick(runs, EXACT, mu, part, key)
            compared = adjust([paired(pick(runs, m, mu, part, key), exact) for m in others])
            for method, pair in zip(others, compared, strict=True):
                cells[method].append(cell(pair, factor))
        lines += cells.values()
    names = [f"{name}: {what}, %" for name in ("mu", "10 mu", "5 %") for what in ("accuracy", "parameters")]
    return table(["less exact", "accuracy, %", "norms", *names], lines)


def cost_table(costs: dict[str, dict[str, list[float]]]) -> str:
    """Returns the time of the energy in plain steps: mean over training, and by sixths of it."""
    lines = []
    for mu, found in costs.items():
        for method, parts in found.items():
            if method in METHODS:
                lines.append([f"{method}, {mu}", f"{mean_std(parts)[0]:.3f}", *(f"{p:.3f}" for p in parts)])
    return table(["energy / plain step", "mean", *(f"{k}/{EPOCHS}" for k in range(1, EPOCHS + 1))], lines)


def report(result: dict[str, Any]) -> str:
    """Returns every table of the experiment in Markdown."""
    runs, parts = result["runs"], []
    for mu in STRENGTHS:
        parts += [f"### Strength {mu:g}", method_table(runs, mu)]
    parts += ["### Paired differences to the exact gradient", difference_table(runs)]
    if result.get("cost"):
        parts += ["### Time", cost_table(result["cost"])]
    minutes = sum(r["cpu_seconds"] for r in runs) / 60
    return "\n\n".join([*parts, f"{len(runs)} runs, {minutes:.1f} CPU-minutes."])


# ---------------------------------------------------------------------- command


def main() -> None:
    """Runs what is not there yet, saving after every run, and prints the tables."""
    parser = arguments("does training notice that gradients of an energy are kept", "amortized", seeds=5)
    parser.add_argument("--cost", action="store_true", help="time the steps only, which takes 2 minutes")
    parser.add_argument("--cost-epochs", type=int, default=2, help="epochs of the trainings that are timed")
    options = parser.parse_args()
    result = saved(options.out, {"machine": describe_machine(), "runs": []})
    if options.cost:
        torch.set_num_threads(1)
        result["cost"] = {f"{mu:g}": cost(mu, options.cost_epochs) for mu in STRENGTHS}
        save_json(options.out, result)
    elif not options.report:
        done = {Task(*(r[name] for name in Task._fields)) for r in result["runs"]}
        complete(result, run, [t for t in tasks(options.seeds) if t not in done], options)
    print(report(result))


if __name__ == "__main__":
    main()
