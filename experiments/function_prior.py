"""What a prior on the function does to calibration and to outliers: strength against calibration error and AUROC.

    python experiments/function_prior.py [--seeds 5] [--workers 1]
    python experiments/function_prior.py --cost
    python experiments/function_prior.py --report

MNIST, networks of two hidden layers of 128 ReLU units, 10 epochs of SGD with momentum 0.9, batch 128, learning rate
0.05 falling to a twentieth by a cosine, no weight decay. The context points of the prior are training images, shifted,
flipped and in other light; none is noise, inverted, permuted or rotated, which are the families of outliers that the
network is judged on. Outliers are told by the entropy of the prediction. The temperature is fitted to the validation
data. A strength is chosen on the validation data alone, by either of two rules: the least negative log-likelihood, or
the largest strength whose calibration error is at most 2 %. A killed experiment goes on where it was when
started again.

Reference: T. G. J. Rudner, S. Kapoor, S. Qiu, A. G. Wilson, "Function-Space Regularization in Neural Networks: A
Probabilistic Perspective" (2023), arXiv 2312.17162.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from common import ROOT, arguments, complete, describe_machine, load, mean_std, mlp, save_json, saved, table
from torch import Tensor, nn
from torch.nn import functional

import groundstate as gs
from groundstate.energies import FunctionEnergy, FunctionSpacePrior
from groundstate.outliers import FAMILIES, families
from groundstate.scores import auroc, calibration, fit_temperature, predictive_entropy, selective_accuracy
from groundstate.training.order import batch_order, keyed

EPOCHS, BATCH, RATE = 10, 128, 0.05
STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
ALLOWED = 0.02  # calibration error on the validation data, of the second rule
SMALL = 10_000
JOINT = FunctionSpacePrior(points="joint", context_size=None)
FIGURE = ROOT / "docs" / "function_prior.svg"


class Task(NamedTuple):
    """One run: ``kind`` is a key of `KINDS`, ``size`` the number of training images."""

    kind: str
    strength: float
    every: int
    size: int
    seed: int

    def __str__(self) -> str:
        return f"{self.kind} {self.strength:g} every={self.every}, {self.size} images, seed {self.seed}"


def paper(size: int) -> FunctionSpacePrior:
    """Returns the energy that makes mean cross-entropy + energy the loss of the paper, its weight prior included."""
    return FunctionSpacePrior(v=0.1, points="joint", context_size=None, scaling="paper", train_size=size)


KINDS: dict[str, Callable[[int], FunctionEnergy | None]] = {
    "none": lambda _: None,
    "context": lambda _: FunctionSpacePrior(),
    "no features": lambda _: FunctionSpacePrior(c=0.0),
    "joint": lambda _: JOINT,
    "paper": paper,
}


def tasks(seeds: int, full: int) -> list[Task]:
    """Returns all runs, the first seed of everything first; ``full``: all training images."""
    found = []
    for seed in range(seeds):
        found.append(Task("none", 0.0, 1, SMALL, seed))
        found += [Task("context", s, 1, SMALL, seed) for s in STRENGTHS]
        found += [Task("joint", s, 1, SMALL, seed) for s in STRENGTHS[:-1]]
        found += [Task("no features", s, 1, SMALL, seed) for s in (0.03, 0.1)]
        found += [Task("context", 0.03, 4, SMALL, seed), Task("paper", 1.0, 1, SMALL, seed)]
        found.append(Task("none", 0.0, 1, full, seed))
        found += [Task("context", s, 1, full, seed) for s in STRENGTHS[1:4]]
        found.append(Task("paper", 1.0, 1, full, seed))
    return found


def run(task: Task) -> dict[str, Any]:
    """Trains one network and judges it."""
    start = time.process_time()
    split = load("mnist", task.size, task.seed)
    model = mlp((split.inputs, 128, 128, split.classes), task.seed)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    energy = KINDS[task.kind](task.size)
    regularizer = None
    if energy is not None:
        regularizer = gs.Regularizer(model, task.strength * energy, seed=task.seed, every=task.every)
        regularizer.attach(optimizer)
    steps = EPOCHS * math.ceil(task.size / BATCH)
    falling = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, eta_min=RATE / 20)
    for epoch in range(EPOCHS):
        for index in batch_order(task.size, task.seed, epoch).split(BATCH):
            x, y = split.train_x[index], split.train_y[index]
            loss = functional.cross_entropy(model(x), y)
            if regularizer is not None:
                loss = loss + regularizer.loss(x, y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
    figures = judged(model, split.val_x, split.val_y, split.test_x, split.test_y, task.seed)
    return {**task._asdict(), **figures, "cpu_seconds": round(time.process_time() - start, 2)}


@torch.no_grad()
def judged(
    model: nn.Module, val_x: Tensor, val_y: Tensor, test_x: Tensor, test_y: Tensor, seed: int
) -> dict[str, dict[str, float | None]]:
    """Returns figures of both splits, and AUROC by family of outliers, at temperature 1 and at the fitted one."""
    val, logits = model(val_x), model(test_x)
    temperature = fit_temperature(val, val_y)
    entropy = predictive_entropy(logits)
    test: dict[str, float | None] = {**calibration(logits, test_y, temperature=temperature)}
    test["nll_scaled"] = calibration(logits / temperature, test_y, temperature=1.0)["nll"]
    test["selective"] = selective_accuracy(entropy, logits.argmax(1) == test_y)[1]
    plain, scaled = {}, {}
    for name, x in families(test_x, torch.Generator().manual_seed(keyed(seed, "outliers"))).items():
        away = model(x)
        plain[name] = auroc(entropy, predictive_entropy(away))
        scaled[name] = auroc(predictive_entropy(logits / temperature), predictive_entropy(away / temperature))
    return {"val": {**calibration(val, val_y, temperature=temperature)}, "test": test, "auroc": plain, "scaled": scaled}


# ---------------------------------------------------------------------- cost


def cost(rounds: int = 100, repeats: int = 5) -> dict[str, float]:
    """Returns the time of a step with the energy over that of a plain one, the median over repeats of medians.

    It is processor time of one thread, so that what else runs on the machine counts little; four steps at a turn.
    """
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn((BATCH, 784), generator=generator), torch.randint(0, 10, (BATCH,), generator=generator)

    def step(energy: FunctionEnergy | None, every: int = 1) -> Callable[[], None]:
        model = mlp((784, 128, 128, 10), 0)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        regularizer = None
        if energy is not None:
            regularizer = gs.Regularizer(model, 0.03 * energy, every=every).attach(optimizer)

        def block() -> None:
            for _ in range(4):
                loss = functional.cross_entropy(model(x), y)
                if regularizer is not None:
                    loss = loss + regularizer.loss(x, y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()

        return block

    steps = {
        "plain": step(None),
        "context": step(FunctionSpacePrior()),
        "context, every=4": step(FunctionSpacePrior(), every=4),
        "no features": step(FunctionSpacePrior(c=0.0)),
        "context_size=128": step(FunctionSpacePrior(context_size=None)),
        "joint": step(JOINT),
        "paper": step(paper(60_000)),
    }
    found: dict[str, list[float]] = {name: [] for name in steps}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for _ in range(repeats):
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(rounds):
            for name, block in steps.items():
                start = time.thread_time()
                block()
                seconds[name].append(time.thread_time() - start)
        for name, taken in seconds.items():
            found[name].append(statistics.median(taken) / statistics.median(seconds["plain"]))
    torch.set_num_threads(before)
    return {name: statistics.median(ratios) for name, ratios in found.items()}


# ---------------------------------------------------------------------- tables


class Row(NamedTuple):
    """The runs of one setting, all seeds."""

    name: str
    strength: float
    runs: list[dict[str, Any]]

    def percent(self, part: str, key: str) -> list[float]:
        return [100 * r[part][key] for r in self.runs]

    def mean(self, part: str, key: str) -> float:
        return mean_std([r[part][key] for r in self.runs])[0]


def rows(result: dict[str, Any], size: int) -> list[Row]:
    """Returns the settings at one size in the order of the first seed."""
    found: dict[tuple[str, float, int], list[dict[str, Any]]] = {}
    for r in result["runs"]:
        if r["size"] == size:
            found.setdefault((r["kind"], r["strength"], r["every"]), []).append(r)
    return [
        Row(f"{kind}, every={every}" if every > 1 else kind, strength, runs)
        for (kind, strength, every), runs in found.items()
    ]


def chosen(settings: Sequence[Row], kind: str) -> dict[str, Row | None]:
    """Returns what the two rules choose among the strengths of a kind; none of them sees test data or outliers."""
    own = [r for r in settings if r.name == kind]
    calibrated = [r for r in own if r.mean("val", "ece") <= ALLOWED]
    return {
        "least validation NLL": min(own, key=lambda r: r.mean("val", "nll"), default=None),
        "largest strength of validation ECE <= 2 %": max(calibrated, key=lambda r: r.strength, default=None),
    }


def number(values: Sequence[float], digits: int = 2) -> str:
    """Returns mean and deviation."""
    mean, std = mean_std(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}")


def calibration_table(settings: Sequence[Row]) -> str:
    """Returns accuracy and calibration of every setting."""
    lines = [
        [
            f"{r.name} {r.strength:g}" if r.strength else r.name,
            number(r.percent("test", "accuracy")),
            number([run["test"]["nll"] for run in r.runs], 3),
            number(r.percent("val", "ece")),
            number(r.percent("test", "ece")),
            number(r.percent("test", "ece_scaled")),
            number(r.percent("test", "selective")),
        ]
        for r in settings
    ]
    return table(["", "accuracy", "NLL", "ECE, validation", "ECE", "ECE, scaled", "selective accuracy"], lines)


def outlier_table(settings: Sequence[Row]) -> str:
    """Returns AUROC by family of every setting; of the plain networks also at the fitted temperature."""
    lines = []
    for r in settings:
        name = f"{r.name} {r.strength:g}" if r.strength else r.name
        lines.append([name, *(number(r.percent("auroc", f)) for f in FAMILIES)])
        if r.name == "none":
            lines.append(["none, scaled", *(number(r.percent("scaled", f)) for f in FAMILIES)])
    return table(["AUROC", *FAMILIES], lines)


def choice_table(settings: Sequence[Row]) -> str:
    """Returns what the rules choose, and how it does on the test data and on noise."""
    lines = []
    for kind in ("context", "joint"):
        for rule, r in chosen(settings, kind).items():
            if r is not None:
                ece, uniform = r.percent("test", "ece"), r.percent("auroc", "uniform")
                met = sum(e <= 2 and u >= 99 for e, u in zip(ece, uniform))
                last = [f"{min(uniform):.2f}", f"{met} of {len(r.runs)}"]
                lines.append(
                    [f"{kind}: {rule}", f"{r.strength:g}", number(ece), f"{max(ece):.2f}", number(uniform), *last]
                )
    header = ["strength", "ECE", "largest ECE", "AUROC, uniform", "least AUROC", "seeds within the target"]
    return table(["", *header], lines)


def report(result: dict[str, Any]) -> str:
    """Returns every table of the experiment in Markdown."""
    parts = []
    for size in sorted({r["size"] for r in result["runs"]}):
        settings = rows(result, size)
        parts += [f"### {size} training images", calibration_table(settings), outlier_table(settings)]
        parts.append(choice_table(settings))
    if result.get("cost"):
        lines = [[name, f"{ratio:.2f}"] for name, ratio in result["cost"].items()]
        parts += ["### Time of a step", table(["", "plain steps"], lines)]
    minutes = sum(r["cpu_seconds"] for r in result["runs"]) / 60
    return "\n\n".join([*parts, f"{len(result['runs'])} runs, {minutes:.1f} CPU-minutes."])


def draw(result: dict[str, Any]) -> None:
    """Draws strength against calibration error and against AUROC, at the small size."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "function_prior"
    from matplotlib import pyplot

    settings = rows(result, SMALL)
    figure, axes = pyplot.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    shown = (("test", "ece", "ECE, %"), ("auroc", "uniform", "AUROC, uniform noise, %"))
    panels = (*shown, ("auroc", "inverted", "AUROC, inverted, %"))
    for axis, (part, key, title) in zip(axes, panels):
        for kind, color in (("context", "C0"), ("joint", "C1")):
            own = [r for r in settings if r.name == kind]
            means = [100 * r.mean(part, key) for r in own]
            deviations = [mean_std(r.percent(part, key))[1] for r in own]
            axis.errorbar([r.strength for r in own], means, deviations, marker="o", color=color, label=kind, capsize=2)
        for r in settings:
            if r.name == "none":
                axis.axhline(100 * r.mean(part, key), color="gray", linestyle="--", label="without")
        if key != "inverted":
            axis.axhline(2 if key == "ece" else 99, color="black", linewidth=0.8, linestyle=":", label="target")
        axis.set(xscale="log", xlabel="strength", title=title)
    axes[0].set_yscale("log")
    axes[0].legend(frameon=False)
    figure.savefig(FIGURE, metadata={"Date": None})


# ---------------------------------------------------------------------- command


def main() -> None:
    """Runs what is not there yet, saving after every run, and prints the tables."""
    parser = arguments("what a prior on the function does to calibration and to outliers", "function_prior", seeds=5)
    parser.add_argument("--cost", action="store_true", help="time the steps only")
    options = parser.parse_args()
    result = saved(options.out, {"machine": describe_machine(), "runs": []})
    if options.cost:
        result["cost"] = cost()
        save_json(options.out, result)
    elif not options.report:
        done = {Task(*(r[name] for name in Task._fields)) for r in result["runs"]}
        waiting = [t for t in tasks(options.seeds, len(load("mnist").train_x)) if t not in done]
        complete(result, run, waiting, options)
    if result["runs"]:
        draw(result)
    print(report(result))


if __name__ == "__main__":
    main()
