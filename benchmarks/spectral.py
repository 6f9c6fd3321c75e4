"""Spectral energies: what their ways cost, section by section.

    python benchmarks/spectral.py [--section exact] [--cases 128x128 'trained 1e-3'] [--rounds 100] [--threads 1]

"exact": value and gradient of the nuclear norm in float32 by `polar`, against ``torch.linalg.svdvals(w).sum()`` and its
backward pass ("naive") and against the SVD alone. "error" is the distance of the gradient from that of a float64 SVD,
relative to its norm, "route" what `polar` took. Spectra: "initial", the initialization of ``nn.Linear``; "exponential",
from 1 to 1e-3; "power", i^-0.7; "heavy tail", a fifth about 1 and the rest below 1e-2; "low rank", the initialization
with the smallest 30 per cent zero. "trained" weights are those of the MLP 784-128-128-10 after three epochs of MNIST
(SGD 0.1, momentum 0.9, batch 128) with the layerwise nuclear norm of that strength (data as for `groundstate train`;
left out with a note where there are none), and "step" is one of its training steps with and without the exact energy.
Targets: 3 times naive for aspect ratios from 4, 1.5 times for square weights, a step 1.6 times a plain one, error 1e-3.

``--cases`` keeps the rows whose name contains one of the texts. Results of sections that did not run are kept.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from runner import RESULTS, compare, save
from torch import Tensor, nn

from groundstate.energies.spectral import Nuclear
from groundstate.errors import GroundstateError
from groundstate.norms import polar as module
from groundstate.norms.polar import polar
from groundstate.norms.spectral import tolerance
from groundstate.training import data, models

SHAPES = ((128, 128), (256, 256), (512, 512), (1024, 1024))
SHAPES += ((784, 128), (128, 784), (784, 28), (10, 128), (3072, 768), (768, 3072), (4096, 1024))
SPECTRA = ("initial", "exponential", "power", "heavy tail", "low rank")
STRENGTHS = ("0", "3e-4", "1e-3")
ROUTES = ("inverse_root", "split_polar", "double_polar", "svd_polar")


def matrix(rows: int, columns: int, spectrum: str) -> Tensor:
    """Returns a float32 weight."""
    generator = torch.Generator().manual_seed(0)
    w = (2 * torch.rand(rows, columns, generator=generator, dtype=torch.float64) - 1) / math.sqrt(columns)
    if spectrum == "initial":
        return w.float()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    n = len(s)
    index = torch.arange(1, n + 1, dtype=torch.float64)
    small = 1e-2 * torch.rand(n, generator=generator, dtype=torch.float64) / index
    spectra = {
        "exponential": torch.logspace(0, -3, n, dtype=torch.float64),
        "power": index**-0.7,
        "heavy tail": torch.where(index < 0.2 * n, s / s[0], small),
        "low rank": s * (index < 0.7 * n),
    }
    return (u * spectra[spectrum] @ vh).float()


@contextmanager
def watched() -> Iterator[list[str]]:
    """Collects the names of the routes that `polar` takes."""
    names: list[str] = []
    before = {name: getattr(module, name) for name in ROUTES}

    def spy(name: str) -> Callable[..., Any]:
        return lambda *a, **k: (names.append(name), before[name](*a, **k))[1]

    try:
        for name in ROUTES:
            setattr(module, name, spy(name))
        yield names
    finally:
        for name, route in before.items():
            setattr(module, name, route)


def finished(call: Callable[[], object]) -> Callable[[], object]:
    """Returns a function that waits for the device."""
    return lambda: (call(), torch.cuda.synchronize())


def weight(w: Tensor, rounds: int, threads: int) -> dict[str, Any]:
    """Times one weight and measures the error of the gradient."""
    leaf = w.clone().requires_grad_()
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    exact = (u * (s > tolerance(w) * s[0])) @ vh

    def naive() -> Tensor:
        return torch.autograd.grad(torch.linalg.svdvals(leaf).sum(), leaf)[0]

    with watched() as taken:
        q, value = polar(w)
    rounds = max(4, min(rounds, int(rounds * 2e7 / (w.numel() * min(w.shape)))))
    functions = {"naive": naive, "polar": lambda: polar(w), "svd": lambda: polar(w, "svd")}
    functions = {name: finished(call) for name, call in functions.items()} if w.is_cuda else functions
    result = compare(functions, rounds, threads, warmup=1)
    median = {name: t["median"] for name, t in result["milliseconds"].items()}
    return {
        "naive_per_polar": median["naive"] / median["polar"],
        "svd_per_polar": median["svd"] / median["polar"],
        "error": float((q.double() - exact).norm() / exact.norm()),
        "naive_error": float((naive().double() - exact).norm() / exact.norm()),
        "value_error": abs(float(value) / float(s.sum()) - 1),
        "route": " then ".join(taken),
        **result,
    }


class Training:
    """The MLP in training, with the layerwise nuclear norm of a strength."""

    def __init__(self, strength: float, x: Tensor, y: Tensor) -> None:
        self.strength, self.x, self.y = strength, x, y
        self.model = models.build("mlp:784-128-128-10", 784, 10, seed=0)
        self.weights = [p for p in self.model.parameters() if p.ndim == 2]
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.1, momentum=0.9)
        self.energy = Nuclear()

    def step(self, batch: Tensor, strength: float, naive: bool = False) -> None:
        self.optimizer.zero_grad()
        loss = nn.functional.cross_entropy(self.model(self.x[batch]), self.y[batch])
        if naive:
            loss = loss + strength * torch.stack([torch.linalg.svdvals(w).sum() for w in self.weights]).sum()
        loss.backward()
        for w in self.weights if strength and not naive else ():
            assert w.grad is not None
            w.grad.add_(self.energy.value_and_grad(w)[1], alpha=strength)
        self.optimizer.step()

    def train(self, epochs: int) -> None:
        generator = torch.Generator().manual_seed(0)
        for _ in range(epochs):
            for batch in torch.randperm(len(self.y), generator=generator)[: len(self.y) // 128 * 128].view(-1, 128):
                self.step(batch, self.strength)

    def costs(self, rounds: int, threads: int) -> dict[str, Any]:
        batch = torch.arange(128)
        self.optimizer.param_groups[0]["lr"] = 0.0  # the weights stay what they are
        functions: dict[str, Callable[[], object]] = {
            "plain": lambda: self.step(batch, 0.0),
            "exact": lambda: self.step(batch, 1e-4),
            "naive": lambda: self.step(batch, 1e-4, naive=True),
        }
        result = compare(functions, rounds, threads)
        median = {name: t["median"] for name, t in result["milliseconds"].items()}
        ratios = {f"{name}_per_plain": median[name] / median["plain"] for name in ("exact", "naive")}
        return {**ratios, **result}


def exact(wanted: Callable[[str], bool], rounds: int, threads: int, device: str) -> dict[str, Any]:
    """The rows of the section "exact"."""
    rows: dict[str, Any] = {}
    for m, n in SHAPES:
        for spectrum in SPECTRA:
            if wanted(name := f"{m}x{n} {spectrum}"):
                rows[name] = weight(matrix(m, n, spectrum).to(device), rounds, threads)
    labels = {
        s: [f"trained {s} {shape}" for shape in ("128x784", "128x128", "10x128")] for s in ("initial", *STRENGTHS)
    }
    if device != "cpu":
        return rows  # the rows of trained weights are of the MLP on the CPU
    if not any(wanted(name) for s, names in labels.items() for name in [*names, f"step {s}"]):
        return rows
    try:
        found = data.load("mnist")
    except GroundstateError as error:
        print(f"no rows of trained weights: {error}")
        return rows
    for strength, names in labels.items():
        if not any(map(wanted, [*names, f"step {strength}"])):
            continue
        run = Training(0.0 if strength == "initial" else float(strength), found.train_x, found.train_y)
        run.train(0 if strength == "initial" else 3)
        for name, w in zip(names, run.weights):
            if strength != "initial" and wanted(name):
                rows[name] = weight(w.detach().clone(), rounds, threads)
        if wanted(f"step {strength}"):
            rows[f"step {strength}"] = run.costs(rounds, threads)
    return rows


SECTIONS: dict[str, Callable[[Callable[[str], bool], int, int, str], dict[str, Any]]] = {"exact": exact}


def main() -> None:
    """Measures the sections and saves the result."""
    parser = argparse.ArgumentParser(description="cost of spectral energies")
    parser.add_argument("--section", nargs="*", choices=list(SECTIONS), default=list(SECTIONS))
    parser.add_argument("--cases", nargs="*", default=[""], help="texts, one of which the name of a row contains")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    file = "spectral" if options.device == "cpu" else f"spectral_{options.device}"
    path = RESULTS / f"{file}.json"
    results: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    results.pop("machine", None)
    for name in options.section:
        found = SECTIONS[name](
            lambda row: any(text in row for text in options.cases), options.rounds, options.threads, options.device
        )
        results[name] = found if options.cases == [""] else {**results.get(name, {}), **found}
    save(file, results)


if __name__ == "__main__":
    main()
