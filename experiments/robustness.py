"""Is the data-dependent operator norm (D-SNR) as good as adversarial training, at a fraction of its cost?

    python experiments/robustness.py [--seeds 5] [--workers 1]
    python experiments/robustness.py --report

MNIST in [0, 1], a network of two hidden layers of 128 ReLU units, SGD with momentum and a learning rate that falls to
zero, the same for all. Trained on is the loss at the images that projected gradient ascent finds in an l2 ball ("fast
gradient": one gradient, no ascent), or the loss at the images plus a penalty: the squared operator norm of the Jacobian
at each image (D-SNR; with epsilon > 0 that of the change at this length), its squared Frobenius norm (Dirichlet), or
the squared spectral norms of the weights (global; one power iteration a step). Two mixtures tell what matters:
``transfer``, the loss at the images where the logits change most, and ``pairing``, as penalty the squared change of the
logits along the gradient of the loss.

Strengths are scanned with seed 0 on validation images. Of each row of `ROWS` the strength is kept whose clean accuracy
is nearest to that of adversarial training ("matched"), and the one that is most robust at `RADIUS` ("best"); these are
trained again with other seeds and tested. Accuracy under attack is an upper bound on robust accuracy.

References: K. Roth, Y. Kilcher, T. Hofmann, "Adversarial training is a form of data-dependent operator norm
regularization" (2020); Y. Yoshida, T. Miyato, "Spectral norm regularization for improving the generalizability of deep
learning" (2017); A. Madry et al., "Towards deep learning models resistant to adversarial attacks" (2018).
"""

from __future__ import annotations

import importlib
import itertools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ROOT, arguments, complete, describe_machine, load, mean_std, mlp, save_json, saved, table
from torch import Tensor, nn
from torch.func import jacrev, vmap
from torch.nn import functional

import groundstate as gs
from groundstate.attack import ProjectedAscent, alignment_curve, robust_accuracy
from groundstate.energies import DataDependentOperatorNorm, Dirichlet
from groundstate.energies.base import Term
from groundstate.training.data import MNIST_MEAN, MNIST_STD
from groundstate.training.evaluation import accuracy_and_loss
from groundstate.training.order import batch_order, keyed

WIDTHS, BATCH, RATE, MOMENTUM = (784, 128, 128, 10), 128, 0.05, 0.9
RADIUS = 1.5
RADII = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0)
LINEAR_RADII, BOX_RADII = (0.1, 0.5, 1.5, 3.0), (0.05, 0.1, 0.15)  # the latter of l-inf
VALIDATION, TEST, JACOBIANS, STRONG = 1000, 2000, 250, 500  # images
ROUNDS = 100  # of the timing


@dataclass(frozen=True)
class Setting:
    """How to train: none, adversarial, transfer, pairing, dsnr, dirichlet or global."""

    method: str = "none"
    strength: float = 0.0  # of the penalty, which has no factor 1/2
    epsilon: float = 0.0  # radius of the ball, or of D-SNR
    steps: int = 0  # of the ascent (0: the gradient at the image itself), or power iterations
    samples: int | None = None  # of the batch, for the penalty; None: all
    epochs: float = 5.0  # may be a fraction

    def penalty(self) -> Term | None:
        """Returns the energy of the function, if there is one."""
        if self.method == "dirichlet":
            return self.strength * Dirichlet(samples=self.samples)
        if self.method == "dsnr":
            norm = DataDependentOperatorNorm(iterations=self.steps, epsilon=self.epsilon, samples=self.samples)
            return self.strength * norm
        return None


def _of(setting: Setting, *strengths: float) -> tuple[Setting, ...]:
    return tuple(replace(setting, strength=s) for s in strengths)


PGD = Setting("adversarial", epsilon=RADIUS, steps=10)
SNR = Setting("dsnr", steps=3, samples=32)
FINITE = replace(SNR, epsilon=RADIUS)
ROWS: dict[str, tuple[Setting, ...]] = {
    "none": (Setting(),),
    "PGD-10": (PGD, replace(PGD, epsilon=1.0)),
    "PGD-10, 1.25 epochs": (replace(PGD, epochs=1.25),),
    "PGD-2": (replace(PGD, steps=2),),
    "fast gradient": (replace(PGD, steps=0),),
    "D-SNR": _of(SNR, 0.01, 0.03, 0.1, 0.3, 0.8, 2.0),
    "D-SNR, epsilon 1.5": _of(FINITE, 0.03, 0.1, 0.2, 0.4, 0.8, 1.6),
    "Dirichlet": _of(Setting("dirichlet", samples=16), 0.005, 0.01, 0.03, 0.1, 0.3),
    "global": _of(Setting("global"), 0.003, 0.01, 0.03, 0.1),
    "fast gradient, 20 epochs": (replace(PGD, steps=0, epochs=20.0),),
    "D-SNR, epsilon 1.5, 20 epochs": _of(replace(FINITE, epochs=20.0), 0.1, 0.4),
    "D-SNR, all images, 1 iteration": _of(replace(SNR, steps=1, samples=None), 0.03, 0.3),
    "D-SNR, epsilon 1.5, all images": _of(replace(FINITE, samples=None), 0.1, 0.4),
    "transfer": (replace(PGD, method="transfer", steps=3),),
    "pairing": _of(replace(PGD, method="pairing", steps=0), 0.1, 0.4),
    "PGD-10, 20 epochs": (replace(PGD, epochs=20.0),),
}
FINAL = list(ROWS)[:11]
"""Rows that are trained again and tested; the others are only scanned."""


class Task(NamedTuple):
    """One run; seed 0 is that of the scan."""

    setting: Setting
    seed: int

    def __str__(self) -> str:
        s = self.setting
        return f"{s.method}, strength {s.strength:g}, epsilon {s.epsilon:g}, {s.epochs:g} epochs, seed {self.seed}"


# ---------------------------------------------------------------------- training


class Training:
    """One network in training; equal seeds share initial weights and order."""

    def __init__(self, task: Task, steps: int) -> None:
        s = self.setting = task.setting
        self.model = mlp(WIDTHS, task.seed)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=MOMENTUM)
        self.decay = torch.optim.lr_scheduler.LinearLR(self.optimizer, 1.0, 0.0, total_iters=steps)
        energy = s.penalty()
        self.regularizer = gs.Regularizer(self.model, energy, seed=task.seed).attach(self.optimizer) if energy else None
        self.generator = torch.Generator().manual_seed(keyed(task.seed, "attack"))
        self.weights = [p for p in self.model.parameters() if p.ndim == 2]
        self.left = [torch.randn(len(w), generator=self.generator) for w in self.weights]

    def step(self, x: Tensor, y: Tensor) -> None:
        """Makes one step of SGD."""
        s = self.setting
        moved = x + self.perturbation(x, y) if s.method in ("adversarial", "transfer", "pairing") else x
        logits = self.model(x if s.method == "pairing" else moved)
        loss = functional.cross_entropy(logits, y)
        if s.method == "pairing":
            loss = loss + s.strength * (self.model(moved) - logits).square().sum(1).mean() / s.epsilon**2
        if self.regularizer is not None:
            loss = loss + self.regularizer.loss(x, y)
        if s.method == "global":
            loss = loss + s.strength * self.spectral_norms()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.decay.step()

    def perturbation(self, x: Tensor, y: Tensor) -> Tensor:
        """Returns what is added to the images."""
        s = self.setting
        if s.steps > 0:
            attack = ProjectedAscent(s.epsilon, steps=s.steps)
            attack = replace(attack, objective="logits") if s.method == "transfer" else attack
            return attack.perturb(self.model, x, y, self.generator)
        x = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(functional.cross_entropy(self.model(x), y, reduction="sum"), x)
        return s.epsilon * functional.normalize(g, dim=1, eps=1e-30)

    def spectral_norms(self) -> Tensor:
        """Returns the sum of the squared spectral norms after one power iteration from where the last one ended."""
        total = torch.zeros(())
        for w, u in zip(self.weights, self.left, strict=True):
            with torch.no_grad():
                v = functional.normalize(u @ w, dim=0)
                u.copy_(functional.normalize(w @ v, dim=0))
            total = total + (u @ w @ v).square()
        return total


@lru_cache(maxsize=1)
def images() -> dict[str, tuple[Tensor, Tensor]]:
    """Returns pixels in [0, 1] and labels of ``train``, ``validation`` and, in a fixed random order, ``test``."""
    d = load("mnist")
    order = torch.randperm(len(d.test_x), generator=torch.Generator().manual_seed(0))
    test = d.test_x[order], d.test_y[order]
    splits = {"train": (d.train_x, d.train_y), "validation": (d.val_x, d.val_y), "test": test}
    # rounding may leave [0, 1]
    return {k: ((x * MNIST_STD + MNIST_MEAN).clamp(0, 1), y) for k, (x, y) in splits.items()}


def run(task: Task) -> dict[str, Any]:
    """Trains one network and measures it: on validation images (seed 0), or test images."""
    x, y = images()["train"]
    per_epoch = math.ceil(len(x) / BATCH)
    steps = round(per_epoch * task.setting.epochs)
    training = Training(task, steps)
    start = time.process_time()
    for epoch in range(math.ceil(task.setting.epochs)):
        order = batch_order(len(x), task.seed, epoch)
        for index in order.split(BATCH)[: steps - epoch * per_epoch]:
            training.step(x[index], y[index])
    trained = time.process_time()
    entry = {"setting": asdict(task.setting), "seed": task.seed, "train_seconds": round(trained - start, 2)}
    entry |= tested(training.model, task.seed) if task.seed else validated(training.model)
    return {**entry, "measure_seconds": round(time.process_time() - trained, 2)}


def validated(model: nn.Module) -> dict[str, Any]:
    """Returns clean accuracy on all validation images, and accuracy under PGD-20 on some."""
    x, y = images()["validation"]
    attack, generator = ProjectedAscent(RADIUS, steps=20), torch.Generator().manual_seed(0)
    (robust,) = robust_accuracy(model, x[:VALIDATION], y[:VALIDATION], [RADIUS], generator, attack=attack)
    return {"clean": accuracy_and_loss(model, x, y)[0], "robust": robust}


def tested(model: nn.Module, seed: int) -> dict[str, Any]:
    """Returns accuracy on test images under several attacks, and how linear the network is around them."""
    x, y = images()["test"]
    clean, _ = accuracy_and_loss(model, x, y)
    x, y = x[:TEST], y[:TEST]
    generator = torch.Generator().manual_seed(keyed(seed, "test"))
    attack = ProjectedAscent(RADIUS, steps=20, restarts=2)
    found: dict[str, Any] = {"clean": clean, "robust": robust_accuracy(model, x, y, RADII, generator, attack=attack)}
    boxed = replace(attack, bounds=(0, 1), restarts=1)
    (found["valid_images"],) = robust_accuracy(model, x, y, [RADIUS], generator, attack=boxed)
    found["linf"] = robust_accuracy(model, x, y, BOX_RADII, generator, attack=replace(boxed, norm="linf"))
    if seed == 1:
        few, strong = (x[:STRONG], y[:STRONG]), replace(attack, steps=100, restarts=5)
        found["usual_on_few"] = robust_accuracy(model, *few, [RADIUS], generator, attack=attack)[0]
        found["strong_on_few"] = robust_accuracy(model, *few, [RADIUS], generator, attack=strong)[0]
    return found | linearity(model, x, y, generator)


@torch.no_grad()
def linearity(model: nn.Module, x: Tensor, y: Tensor, generator: torch.Generator) -> dict[str, Any]:
    """Returns what the Jacobians at the images say, and how far from the images that is true.

    Returns:
        ``linear``: accuracy at each of `RADII` if the network were linear around every image, exactly. On some images:
        ``norm``: root mean square of the operator norm; ``alignment``: cosine of perturbations with the top right
        singular vector, by objective; ``deviation``: ||f(x + d) - f(x) - J d|| / ||f(x + d) - f(x)|| for the d of the
        attack, the mean over images; the last two at each of `LINEAR_RADII`.
    """
    z, j = model(x), vmap(jacrev(model), chunk_size=JACOBIANS)(x)
    rows = torch.arange(len(x))
    lead, slope = z[rows, y][:, None] - z, j[rows, y][:, None] - j
    radius = (lead / slope.norm(dim=2)).nan_to_num(nan=math.inf).amin(1)
    x, y, z, j = (part[:JACOBIANS] for part in (x, y, z, j))
    _, s, vh = torch.linalg.svd(j, full_matrices=False)
    attack = ProjectedAscent(RADIUS, steps=20)
    curves = alignment_curve(model, x, y, vh[:, 0], LINEAR_RADII, generator, attack=attack)
    deviation = []
    for epsilon in LINEAR_RADII:
        delta = replace(attack, epsilon=epsilon).perturb(model, x, y, generator)
        change = model(x + delta) - z
        rest = change - torch.einsum("bcn,bn->bc", j, delta)
        deviation.append(float((rest.norm(dim=1) / change.norm(dim=1).clamp_min(1e-30)).mean()))
    return {
        "linear": [float((radius > epsilon).double().mean()) for epsilon in RADII],
        "norm": float(s[:, 0].square().mean().sqrt()),
        "alignment": curves,
        "deviation": deviation,
    }


def costs() -> dict[str, Any]:
    """Times one training step of the first setting of each row of `ROWS` in turns, on one batch."""
    sys.path.append(str(ROOT / "benchmarks"))
    compare = importlib.import_module("runner").compare
    batch = [part[:BATCH] for part in images()["train"]]
    settings = {name: s[0] for name, s in ROWS.items() if "epochs" not in name}
    return compare({k: partial(Training(Task(s, 0), 10**9).step, *batch) for k, s in settings.items()}, rounds=ROUNDS)


# ---------------------------------------------------------------------- what is kept, tables, figure


def of_seeds(runs: list[dict[str, Any]], setting: Setting, scan: bool = False) -> list[dict[str, Any]]:
    """Returns the runs of a setting: that of the scan, or all others by seed."""
    found = [r for r in runs if (r["seed"] == 0) == scan and Setting(**r["setting"]) == setting]
    return sorted(found, key=lambda r: r["seed"])


def chosen(runs: list[dict[str, Any]]) -> dict[tuple[str, str], Setting]:
    """Returns what the scan keeps, by row and why: ``matched`` or ``best``; the first where there are no strengths."""
    clean, robust = (lambda s, k=k: of_seeds(runs, s, True)[0][k] for k in ("clean", "robust"))
    found: dict[tuple[str, str], Setting] = {}
    for name in FINAL:
        if ROWS[name][0].strength > 0:
            best = max(ROWS[name], key=robust)
            matched = min(ROWS[name], key=lambda s: abs(clean(s) - clean(PGD)))
            found |= {(name, "matched"): matched} | ({(name, "best"): best} if best != matched else {})
        else:
            found[name, ""] = ROWS[name][0]
    return found


def scan_table(runs: list[dict[str, Any]]) -> str:
    """Returns the runs of the scan."""
    rows = []
    for name, s, (r,) in ((k, s, of_seeds(runs, s, True)) for k in ROWS for s in ROWS[k]):
        shares = [f"{100 * r[k]:.1f}" for k in ("clean", "robust")]
        rows.append([name, f"{s.strength:g}", f"{s.epsilon:g}", *shares, f"{r['train_seconds']:.0f}"])
    return table(["", "strength", "epsilon", "clean, %", f"at {RADIUS:g}, %", "CPU seconds"], rows)


def final_table(runs: list[dict[str, Any]], columns: dict[str, Callable[[dict[str, Any]], float]]) -> str:
    """Returns a line for each setting that was kept, each column as mean and deviation over the seeds."""
    rows = []
    for (name, why), setting in chosen(runs).items():
        cells = [mean_std([column(r) for r in of_seeds(runs, setting)]) for column in columns.values()]
        title = name + (f", {why} ({setting.strength:g})" if why else "")
        rows.append([title, *(f"{m:.{d}f} ± {s:.{d}f}" for m, s in cells for d in [1 if abs(m) > 5 else 2])])
    return table(["", *columns], rows).replace(" ± nan", "")


def report(result: dict[str, Any]) -> str:
    """Returns every table of the experiment in Markdown."""
    runs = result["runs"]
    reference = {r["seed"]: r["robust"] for r in of_seeds(runs, PGD)}
    at, near = RADII.index(RADIUS), LINEAR_RADII.index(RADIUS)
    accuracy: dict[str, Callable[[dict[str, Any]], float]] = {
        "clean": lambda r: 100 * r["clean"],
        **{f"{e:g}": lambda r, i=i: 100 * r["robust"][i] for i, e in enumerate(RADII) if e > 0},
        f"{RADIUS:g}, less PGD-10": lambda r: 100 * (r["robust"][at] - reference[r["seed"]][at]),
        "CPU seconds": lambda r: r["train_seconds"],
    }
    side: dict[str, Callable[[dict[str, Any]], float]] = {
        "valid images": lambda r: 100 * r["valid_images"],
        **{f"linf {e:g}": lambda r, i=i: 100 * r["linf"][i] for i, e in enumerate(BOX_RADII)},
        "norm": lambda r: r["norm"],
        "if linear": lambda r: 100 * r["linear"][at],
        "deviation": lambda r: r["deviation"][near],
    }
    for k, i in itertools.product(("cross_entropy", "logits"), (0, near)):
        side[f"cos {k} {LINEAR_RADII[i]:g}"] = lambda r, k=k, i=i: r["alignment"][k][i]
    strong = {k: lambda r, k=k: 100 * r[f"{k}_on_few"] for k in ("usual", "strong")}
    times = result.get("costs", {}).get("milliseconds", {})
    cost = [[k, *(f"{t[m] / times['none'][m]:.2f}" for m in ("median", "min"))] for k, t in times.items()]
    parts = {
        "Scan, seed 0, validation images": scan_table(runs),
        "Accuracy on test images, %": final_table(runs, accuracy),
        "Other attacks, and linearity": final_table(runs, side),
        "A stronger attack, seed 1": final_table([r for r in runs if r["seed"] < 2], strong),
        "Cost of a step, in plain steps": table(["", "medians", "minima"], cost),
    }
    minutes = sum(r["train_seconds"] + r["measure_seconds"] for r in runs) / 60
    parts[f"{len(runs)} runs, {minutes:.1f} CPU-minutes"] = ""
    return "\n\n".join(f"### {title}\n\n{text}" for title, text in parts.items())


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Draws clean against robust accuracy of the scan, and the curves of the matched strengths."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    kept = chosen(runs)
    with rc_context({"svg.hashsalt": "groundstate", "font.size": 9, "axes.grid": True, "grid.alpha": 0.3}):
        figure = Figure(figsize=(11, 4), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name in FINAL:
            color = f"C{FINAL.index(name.removesuffix(', 20 epochs'))}"
            line = "--" if name.endswith("20 epochs") else "-"
            look: dict[str, Any] = {"color": color, "marker": ".", "linewidth": 1, "label": name, "linestyle": line}
            scan = [of_seeds(runs, s, True)[0] for s in ROWS[name]]
            left.plot(*zip(*sorted((100 * r["clean"], 100 * r["robust"]) for r in scan)), **look)
            final = of_seeds(runs, kept.get((name, "")) or kept[name, "matched"])
            right.plot(RADII, [100 * sum(s) / len(s) for s in zip(*(r["robust"] for r in final))], **look)
        left.set(xlabel="clean accuracy, %", ylabel=f"under PGD-20 at {RADIUS:g}, %", title="all strengths, validation")
        right.set(xlabel="radius (l2)", ylabel="accuracy under PGD-20, %", title="matched clean accuracy, test")
        figure.legend(*left.get_legend_handles_labels(), loc="outside right center", fontsize=8)
        figure.savefig(path, metadata={"Date": None})


def main() -> None:
    """Runs what is not there yet, saving after every run, so that a killed experiment goes on; prints the tables."""
    parser = arguments("robust accuracy: penalties against adversarial training", "robustness", seeds=5)
    options = parser.parse_args()
    result = saved(options.out, {"machine": describe_machine(), "runs": []})

    def finish(tasks: list[Task]) -> None:
        done = {Task(Setting(**r["setting"]), r["seed"]) for r in result["runs"]}
        complete(result, run, [t for t in tasks if t not in done], options)

    if not options.report:
        finish([Task(s, 0) for settings in ROWS.values() for s in settings])
        kept = dict.fromkeys(chosen(result["runs"]).values())
        finish([Task(s, seed) for seed in range(1, options.seeds + 1) for s in kept])
        if "costs" not in result:
            save_json(options.out, result := {**result, "costs": costs()})
    draw(result["runs"], ROOT / "docs" / "robustness.svg")
    print(report(result))


if __name__ == "__main__":
    main()
