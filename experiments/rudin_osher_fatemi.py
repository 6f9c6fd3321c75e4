"""The Jacobian nuclear norm on a problem with a known answer: denoising an indicator by total variation.

    python experiments/rudin_osher_fatemi.py [--seeds 5] [--steps 3000] [--workers 1]
    python experiments/rudin_osher_fatemi.py --report

A network f from a box to the numbers minimizes

    1/2 E (f(x) - tau(x))^2 + eta E |grad f(x)|,    x uniform in the box, tau the indicator of the unit ball

where |grad f| is the nuclear norm of the 1 x n Jacobian. Without conditions at the border of the box the minimizer is
1 - eta Per / |B| in the ball and eta Per / (|box| - |B|) outside, Per the area of the sphere. The penalty is trained
exactly, by the factorized bound over the middle of the network with finite differences or VJPs, or not at all; warm-up:
its strength grows from 0 to eta over the first half of the steps. A killed experiment goes on where it was.

References: L. Rudin, S. Osher, E. Fatemi, "Nonlinear total variation based noise removal algorithms" (1992); Y. Meyer,
"Oscillating patterns in image processing" (2001); C. Scarvelis, J. Solomon, "Nuclear norm regularization for deep
learning" (2024).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from common import arguments, complete, describe_machine, mean_std, saved, table
from torch import Tensor, nn

import groundstate as gs
from groundstate.energies.jacobian_nuclear import JacobianNuclear
from groundstate.training.order import keyed

SIDE = 4.0  # the box is [-2, 2]^d
CUT = "middle"
FD = JacobianNuclear(method="factorized", cut=CUT, estimator="fd", samples=None)
WARM = "factorized, fd, warm-up"
ENERGIES = {
    "exact": JacobianNuclear(method="exact", samples=None),
    "factorized, fd": FD,
    WARM: FD,
    "factorized, vjp": JacobianNuclear(method="factorized", cut=CUT, estimator="vjp", samples=None),
    "none": None,
}


class Problem(NamedTuple):
    """Dimension and strength, with the batch that they are trained with."""

    dimension: int
    eta: float
    batch: int

    @property
    def ball(self) -> float:
        """The volume of the unit ball."""
        return math.pi ** (self.dimension / 2) / math.gamma(self.dimension / 2 + 1)

    @property
    def inside(self) -> float:
        """The minimizer in the ball: the area of the sphere is d times the volume of the ball."""
        return 1 - self.eta * self.dimension

    @property
    def outside(self) -> float:
        """The minimizer outside of the ball."""
        return self.eta * self.dimension * self.ball / (SIDE**self.dimension - self.ball)

    @property
    def least(self) -> float:
        """The objective of the minimizer."""
        share = self.ball / SIDE**self.dimension
        fit = share * (1 - self.inside) ** 2 + (1 - share) * self.outside**2
        return fit / 2 + self.eta * self.dimension * share * (self.inside - self.outside)


PROBLEMS = (Problem(2, 0.1, 1024), Problem(5, 0.05, 4096))
LONGER = 4


class Task(NamedTuple):
    """One run."""

    problem: Problem
    method: str
    seed: int
    steps: int

    def __str__(self) -> str:
        return f"d={self.problem.dimension}, {self.method}, seed {self.seed}, {self.steps} steps"


class Fourier(nn.Module):
    """Sines and cosines of random frequencies, and the point itself."""

    frequencies: Tensor

    def __init__(self, dimension: int, frequencies: int, generator: torch.Generator) -> None:
        super().__init__()
        drawn = torch.randn(dimension, frequencies, generator=generator)
        self.register_buffer("frequencies", drawn * math.pi / dimension**0.5)

    def forward(self, x: Tensor) -> Tensor:
        phase = x @ self.frequencies
        return torch.cat([phase.sin(), phase.cos(), x], 1)


def network(dimension: int, seed: int, frequencies: int = 64, width: int = 64) -> nn.Sequential:
    """Returns Fourier features and four linear layers with ELU, cut between the second and the third."""
    generator = torch.Generator().manual_seed(keyed(seed, "network"))
    sizes = (2 * frequencies + dimension, width, width, width, 1)
    layers = [nn.Linear(n, m) for n, m in pairwise(sizes)]
    for layer in layers:
        bound = layer.in_features**-0.5
        for parameter in layer.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)
    model = nn.Sequential()
    for name, module in (
        ("features", Fourier(dimension, frequencies, generator)),
        ("first", layers[0]),
        ("elu", nn.ELU()),
        (CUT, layers[1]),
        ("third", layers[2]),
        ("elu_after", nn.ELU()),
        ("last", layers[3]),
    ):
        model.add_module(name, module)
    return model


def points(problem: Problem, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Returns points uniform in the box ``(count, d)`` and the indicator of the ball there ``(count,)``."""
    x = SIDE * (torch.rand(count, problem.dimension, generator=generator) - 0.5)
    return x, (x.square().sum(1) < 1).float()


def run(task: Task) -> dict[str, Any]:
    """Trains one network and measures it; equal seeds share initial weights and batches."""
    start = time.process_time()
    problem = task.problem
    model = network(problem.dimension, task.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    rate = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, task.steps)
    energy = ENERGIES[task.method]
    regularizer = None
    if energy is not None:
        grow = f"warmup:{task.steps // 2}" if task.method == WARM else None
        regularizer = gs.Regularizer(model, problem.eta * energy, schedule=grow, seed=task.seed).attach(optimizer)
    drawn = torch.Generator().manual_seed(keyed(task.seed, "points"))
    for _ in range(task.steps):
        x, tau = points(problem, problem.batch, drawn)
        loss = (model(x)[:, 0] - tau).square().mean() / 2
        if regularizer is not None:
            loss = loss + regularizer.loss(x)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    seconds = time.process_time() - start
    return {
        **task._asdict(),
        "problem": problem._asdict(),
        **measure(model, problem),
        "cpu_seconds": round(seconds, 1),
    }


def measure(model: nn.Module, problem: Problem, count: int = 1 << 17) -> dict[str, float]:
    """Returns means, distance to the minimizer and objective on the same points for every network.

    The means inside and outside are on as many points each; the objective weights them by volume.
    """
    generator = torch.Generator().manual_seed(keyed("measure", problem.dimension))
    halves = list(parted(problem, count // 2, generator))
    share = problem.ball / SIDE**problem.dimension
    found: dict[str, float] = {"mae": 0.0, "objective": 0.0, "bound": 0.0, "total_variation": 0.0}
    bound = JacobianNuclear(method="factorized", cut=CUT, estimator="vjp")
    for x, tau, weight, name in zip(*zip(*halves), (share, 1 - share), ("inside", "outside")):
        with torch.no_grad():
            f = model(x)[:, 0]
        wanted = problem.inside if name == "inside" else problem.outside
        probe = torch.Generator().manual_seed(0)
        variation = JacobianNuclear(method="exact").estimate(model, x, probe=probe).value
        found[name] = float(f.mean())
        found[f"mae_{name}"] = float((f - wanted).abs().mean())
        found["mae"] += weight * found[f"mae_{name}"]
        found["total_variation"] += weight * variation
        found["bound"] += weight * bound.estimate(model, x, probe=probe).value
        found["objective"] += weight * (float((f - tau).square().mean()) / 2 + problem.eta * variation)
    return found


def parted(problem: Problem, count: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
    """Yields ``count`` points in the ball and ``count`` points in the rest of the box, with the indicator."""
    direction = torch.randn(count, problem.dimension, generator=generator)
    radius = torch.rand(count, 1, generator=generator) ** (1 / problem.dimension)
    yield direction / direction.norm(dim=1, keepdim=True) * radius, torch.ones(count)
    x, tau = points(problem, 4 * count, generator)
    yield x[tau == 0][:count], torch.zeros(count)


# ---------------------------------------------------------------------- tables


def report(result: dict[str, Any]) -> str:
    """Returns a table for each problem, in Markdown."""
    parts = []
    for problem, steps in ((p, s) for p in PROBLEMS for s in (result["steps"], LONGER * result["steps"])):
        runs = [r for r in result["runs"] if (r["problem"], r["steps"]) == (problem._asdict(), steps)]
        if not runs:
            continue
        wanted = [f"{problem.inside:.4f}", f"{problem.outside:.5f}", "0", f"{problem.least:.6f}", "", "", ""]
        rows = [["closed form", "", *wanted]]
        for method in ENERGIES:
            of_method = [r for r in runs if r["method"] == method]
            if of_method:
                columns = [[r[k] for r in of_method] for k in ("inside", "outside", "mae", "objective")]
                loose = [r["bound"] / r["total_variation"] for r in of_method]
                cells = [number(c, 4) for c in columns]
                worst = f"{max(columns[2]):.4f}"
                seconds = number([r["cpu_seconds"] for r in of_method], 0)
                rows.append([method, str(len(of_method)), *cells, worst, number(loose, 2), seconds])
        parts += [
            f"### d = {problem.dimension}, eta = {problem.eta:g}, batch {problem.batch}, {steps} steps",
            table(["", "runs", "inside", "outside", "MAE", "objective", "worst MAE", "bound / TV", "CPU-s"], rows),
        ]
    return "\n\n".join(parts)


def number(values: list[float], digits: int) -> str:
    """Returns mean and deviation."""
    mean, std = mean_std(values)
    return f"{mean:.{digits}f}" + ("" if math.isnan(std) else f" ± {std:.{digits}f}")


# ---------------------------------------------------------------------- command


def main() -> None:
    """Runs what is not there yet, saving after every run, and prints the tables."""
    parser = arguments(
        "the Jacobian nuclear norm against a closed form; d = 5 has one seed", "rudin_osher_fatemi", seeds=5
    )
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--dimensions", type=int, nargs="*", choices=[p.dimension for p in PROBLEMS], default=[2, 5])
    longer = {"nargs": "*", "choices": list(ENERGIES), "default": ["exact", "factorized, fd"]}
    parser.add_argument("--longer", **longer, help="trained 4 times as long, d = 2, seed 0")
    options = parser.parse_args()
    result = saved(options.out, {"machine": describe_machine(), "steps": options.steps, "runs": []})
    if options.report:
        print(report(result))
        return
    if result["steps"] != options.steps:
        parser.error(f"{options.out} is of {result['steps']} steps: name another file with --out")
    done = {Task(Problem(**r["problem"]), r["method"], r["seed"], r["steps"]) for r in result["runs"]}
    asked = [
        Task(problem, method, seed, options.steps)
        for problem in PROBLEMS
        if problem.dimension in options.dimensions
        for seed in range(options.seeds if problem.dimension == 2 else 1)
        for method in ENERGIES
    ]
    asked += [Task(PROBLEMS[0], method, 0, LONGER * options.steps) for method in options.longer]
    complete(result, run, [t for t in asked if t not in done], options)
    print(report(result))


if __name__ == "__main__":
    main()
