"""What spectral energies cost in training: exact at every step, and with gradients kept until a gap opens.

Three networks learn the labels of a fixed random teacher, each plainly, with the exact gradient of the energy at every
step, and with kept gradients, in turns: of 16 steps where they are short, so that each finds its own data in the
caches, as a training alone would. The cost of a step is the mean over all of them, so that it has its share of the
decompositions. The gap is that of `groundstate.amortized`; "widest seen" is of one weight by itself.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from runner import RESULTS, save
from spectral_conv import resnet18
from torch import Tensor, nn
from torch.nn import functional

import groundstate as gs

EXACT, CLOSE, WIDE = "exact", "gap 1 %", "gap 5 %"


def mlp(seed: int = 0) -> nn.Module:
    """784-128-128-10."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(784, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)
    )  # fmt: skip


class Transformer(nn.Module):
    """A vision transformer's trunk: width 192, depth 6, 24 weight matrices, 65 tokens."""

    def __init__(self, width: int = 192, depth: int = 6) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.trunk = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(width, 3, 4 * width, dropout=0.0, batch_first=True, norm_first=True),
            depth,
            enable_nested_tensor=False,
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.trunk(x).mean(1))


class Course:
    """One network in training."""

    def __init__(
        self, build: Callable[[], nn.Module], batch: Callable[[int], tuple[Tensor, Tensor]], spec: str | None,
        gap: float | None = None, rate: float = 0.1,
    ) -> None:  # fmt: skip
        self.model, self.batch, self.count = build(), batch, 0
        self.optimizer = torch.optim.SGD(self.model.parameters(), rate, momentum=0.9)
        self.regularizer = None
        if spec is not None:
            self.regularizer = gs.Regularizer(self.model, spec, gap=gap).attach(self.optimizer)

    def step(self) -> float:
        """Makes one step and returns its seconds."""
        x, y = self.batch(self.count)
        self.count += 1
        start = time.perf_counter()
        loss = functional.cross_entropy(self.model(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return time.perf_counter() - start


def teacher(shape: tuple[int, ...], batch: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Returns batches of Gaussian inputs with the labels of a random network, by number."""
    inputs = torch.Size(shape).numel()
    hidden = torch.randn(64, inputs, generator=torch.Generator().manual_seed(1)) / inputs**0.5
    read = torch.randn(10, 64, generator=torch.Generator().manual_seed(2))

    def make(number: int) -> tuple[Tensor, Tensor]:
        x = torch.randn(batch, *shape, generator=torch.Generator().manual_seed(number))
        return x, (read @ (hidden @ x.flatten(1).mT).relu()).argmax(0)

    return make


def cost(
    build: Callable[[], nn.Module], batch: Callable[[int], tuple[Tensor, Tensor]], spec: str, rate: float,
    warmup: int, steps: int,
) -> dict[str, Any]:  # fmt: skip
    """Returns the cost of the energy in plain steps, and what its kept gradients did."""
    courses = {"plain": Course(build, batch, None, rate=rate), EXACT: Course(build, batch, spec, rate=rate)}
    courses |= {name: Course(build, batch, spec, gap, rate) for name, gap in ((CLOSE, 0.01), (WIDE, 0.05))}
    for _ in range(warmup):
        for course in courses.values():
            course.step()
    before = {name: renewals(course) for name, course in courses.items()}
    seconds: dict[str, list[float]] = {name: [] for name in courses}
    turn = max(1, steps // 60)
    for first in range(0, steps, turn):
        for name, course in courses.items():
            seconds[name] += [course.step() for _ in range(min(turn, steps - first))]
    plain = trimmed(seconds["plain"])
    found: dict[str, Any] = {"plain_ms": 1e3 * plain, "warmup": warmup, "steps": steps}
    for name in (EXACT, CLOSE, WIDE):
        found[f"{name}: of a step"] = trimmed(seconds[name]) / plain - 1
        found[f"{name}: median of a step"] = statistics.median(seconds[name]) / statistics.median(seconds["plain"]) - 1
    for name in (CLOSE, WIDE):
        made, units = renewals(courses[name]), units_of(courses[name])
        found[f"{name}: steps per decomposition"] = steps * units / max(made - before[name], 1)
        found[f"{name}: widest seen"] = max(line.widest for line in wear(courses[name]))
    return found


def nothing_due(steps: int = 1500) -> dict[str, float]:
    """Returns what a step costs over a plain one at which no energy acts, of the MLP, in plain steps."""
    batch = teacher((784,), 128)
    plain, idle = Course(mlp, batch, None), Course(mlp, batch, None)
    idle.regularizer = gs.Regularizer(idle.model, "1e-4*nuclear", every=10**9).attach(idle.optimizer)
    taken: dict[str, list[float]] = {"plain": [], "idle": []}
    for _ in range(steps):
        taken["plain"].append(plain.step())
        taken["idle"].append(idle.step())
    return {"of a step": statistics.median(taken["idle"][1:]) / statistics.median(taken["plain"][1:]) - 1}


def wear(course: Course) -> list[Any]:
    return [] if course.regularizer is None else [line for of in course.regularizer.wear().values() for line in of]


def renewals(course: Course) -> int:
    return sum(line.refreshes for line in wear(course))


def units_of(course: Course) -> int:
    return len(wear(course))


def trimmed(seconds: list[float]) -> float:
    """Returns the mean without the slowest hundredth: moments in which the machine did something else."""
    ordered = sorted(seconds)
    return statistics.fmean(ordered[: max(1, round(0.99 * len(ordered)))])


def images(batch: int) -> Callable[[int], tuple[Tensor, Tensor]]:
    """Returns batches of random images, 3 x 32 x 32, with the labels of a teacher."""
    return teacher((3, 32, 32), batch)


CASES: dict[str, Callable[[], dict[str, Any]]] = {
    "nothing due": nothing_due,
    "MLP nuclear": lambda: cost(mlp, teacher((784,), 128), "1e-4*nuclear", 0.1, 400, 1000),
    "MLP nuclear, strong": lambda: cost(mlp, teacher((784,), 128), "1e-3*nuclear", 0.1, 400, 1000),
    "MLP graph": lambda: cost(mlp, teacher((784,), 128), "1e-4*graph", 0.1, 400, 1000),
    "transformer nuclear": lambda: cost(Transformer, teacher((65, 192), 32), "1e-5*nuclear", 0.002, 40, 100),
    "ResNet-18 nuclear": lambda: cost(resnet18, images(128), "1e-5*nuclear", 0.01, 2, 8),
}


def main() -> None:
    """Measures the cases asked for; the results of the others are kept."""
    parser = argparse.ArgumentParser(description="cost of kept gradients in training")
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    path = RESULTS / "spectral_amortized.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results.pop("machine", None)
    for name in options.cases:
        results[name] = CASES[name]()
        save("spectral_amortized", results)


if __name__ == "__main__":
    main()
