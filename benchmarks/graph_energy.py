"""What value and gradient of the graph energy cost: against the dense form and against a training step.

    python benchmarks/graph_energy.py [--rounds 200] [--steps 400]

Networks 784-128-128-10 and 784-28-10 in float32 on one thread, at initialization, after plain training (SGD 0.1,
momentum 0.9, batch 128) and after training with 1e-3*graph; on MNIST (as for `groundstate train`),
on random images otherwise. "dense" is one autograd call through ``eigvalsh`` of the adjacency,
"step" one training step. Targets at 784-128-128-10: at least 40 times faster than dense, at most one step.

Deep networks, at initialization, by partial fractions: 64-[128]x12-10 at least 8 times faster than dense, and deeper
ones, where "eigh" is the eigendecomposition of the Gram that partial fractions replace. Residual networks, 64-128
embedded and 3 blocks of 128-128-128: "dense" again, with an identity edge over two layers (no two-coloring) and over
one (bipartite).

The floor is the time of the matrix products alone, at the measured rate of the largest of them: forming the Gram's
lower half and multiplying by its inverse root, n_l^2 d (1 + 2) flops for each layer of d x n_l.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch
from runner import compare, save
from torch import Tensor, nn
from torch.nn import functional as F

from groundstate.errors import GroundstateError
from groundstate.norms import dag, graph
from groundstate.norms.staircase import staircase
from groundstate.training import data


def images(count: int = 12800) -> tuple[Tensor, Tensor, str]:
    """Returns flat images, labels and where they come from."""
    try:
        found = data.load("mnist")
    except GroundstateError:
        generator = torch.Generator().manual_seed(0)
        labels = torch.randint(0, 10, (count,), generator=generator)
        centers = torch.randn(10, 784, generator=generator)
        return centers[labels] + torch.randn(count, 784, generator=generator), labels, "random"
    return found.train_x[:count], found.train_y[:count], "mnist"


def network(sizes: tuple[int, ...]) -> nn.Sequential:
    """Linear layers with ReLU between them, default initialization."""
    modules: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        modules += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*modules[:-1])


def weights(model: nn.Sequential) -> list[Tensor]:
    return [m.weight.detach() for m in model if isinstance(m, nn.Linear)]


def training_step(model: nn.Sequential, x: Tensor, y: Tensor, mu: float = 0.0) -> Callable[[], None]:
    """Returns a function that makes one SGD step on the next batch of 128, with mu times the graph energy."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    position = 0

    def step() -> None:
        nonlocal position
        batch = slice(position, position + 128)
        position = (position + 128) % (x.shape[0] - 127)
        optimizer.zero_grad()
        F.cross_entropy(model(x[batch]), y[batch]).backward()
        if mu:
            linear = [m.weight for m in model if isinstance(m, nn.Linear)]
            for w, g in zip(linear, graph.energy_and_grad(linear)[1]):
                w.grad = mu * g if w.grad is None else w.grad.add_(g, alpha=mu)
        optimizer.step()

    return step


def relative_error(layers: list[Tensor], absolute: bool) -> float:
    """Relative gradient error of float32 against the same weights in float64."""
    single = graph.energy_and_grad(layers, absolute)[1]
    exact = graph.energy_and_grad([w.double() for w in layers], absolute)[1]
    difference = sum(float((a - b).square().sum()) for a, b in zip(single, exact))
    return (difference / sum(float(b.square().sum()) for b in exact)) ** 0.5


def case(sizes: tuple[int, ...], layers: list[Tensor], step: Callable[[], None], rounds: int) -> dict[str, Any]:
    """Times one network at its present weights; the step trains a network of its own."""
    a = graph.adjacency(layers).requires_grad_()

    def dense() -> None:
        torch.autograd.grad(torch.linalg.eigvalsh(a).abs().sum(), a)

    plan = staircase(sizes)
    gram = plan.gram(layers)
    root = plan.split(torch.eye(gram.shape[0]))
    wide = max(layers, key=torch.Tensor.numel)
    result = compare(
        {
            "step": step,
            "energy": lambda: graph.energy_and_grad(layers),
            "absolute": lambda: graph.energy_and_grad(layers, absolute=True),
            "dense": dense,
            "eigh": lambda: torch.linalg.eigh(gram),
            "gram": lambda: plan.gram(layers),
            "multiply": lambda: plan.gradients(layers, *root),
            "largest product": lambda: wide @ wide.mT,
        },
        rounds=rounds,
        every={"dense": max(1, rounds // 10)},
    )
    median = {name: t["median"] for name, t in result["milliseconds"].items()}
    rate = 2 * wide.shape[0] ** 2 * wide.shape[1] / median["largest product"]  # flops a millisecond
    floor = sum(3 * w.numel() * min(w.shape) for w in layers) / rate
    sigma = torch.linalg.svdvals(graph.biadjacency(layers).double())
    return {
        "energy_per_step": median["energy"] / median["step"],
        "absolute_per_step": median["absolute"] / median["step"],
        "dense_per_energy": median["dense"] / median["energy"],
        "energy_per_floor": median["energy"] / floor,
        "floor_ms": floor,
        "condition": float(sigma[0] / sigma[-1]),
        "gradient_error": relative_error(layers, False),
        "absolute_gradient_error": relative_error(layers, True),
        **result,
    }


def against_dense(functions: Mapping[str, Callable[[], object]], adjacency: Tensor, rounds: int) -> dict[str, Any]:
    """Times functions and autograd through the eigenvalues of the dense adjacency; the first is compared with that."""
    a = adjacency.detach().requires_grad_()

    def dense() -> None:
        torch.autograd.grad(torch.linalg.eigvalsh(a).abs().sum(), a)

    result = compare({**functions, "dense": dense}, rounds=max(3, rounds // 20), warmup=1)
    median = {name: t["median"] for name, t in result["milliseconds"].items()}
    return {"dense_per_energy": median["dense"] / median[next(iter(functions))], **result}


def deep(sizes: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Times one deep network at initialization."""
    layers = weights(network(sizes))
    double = [w.double() for w in layers]
    gram = staircase(sizes).gram(layers)
    functions = {
        "energy": lambda: graph.energy_and_grad(layers),
        "with spectrum": lambda: graph.energy_grad_and_spectrum(layers),
        "absolute": lambda: graph.energy_and_grad(layers, absolute=True),
        "float64": lambda: graph.energy_and_grad(double),
        "eigh": lambda: torch.linalg.eigh(gram),
        "eigh float64": lambda: torch.linalg.eigh(gram.double()),
    }
    return {
        "depth": staircase(sizes).depth,
        "gradient_error": relative_error(layers, False),
        **against_dense(functions, graph.adjacency(layers), rounds),
    }


def residual(over: int, rounds: int) -> dict[str, Any]:
    """Times a network whose identity edges go over one weight layer or two."""
    groups = (64, *[128] * 7, 10)
    edges = tuple(pairwise(range(len(groups))))
    wiring = dag.Wiring(groups, edges, tuple((t, t + over) for t in range(1, 7, over)))
    layers = weights(network(groups))
    functions = {"energy": lambda: dag.energy_and_grad(wiring, layers)}
    return against_dense(functions, dag.adjacency(wiring, layers), rounds)


def cases(rounds: int, steps: int = 400) -> dict[str, Any]:
    """Returns the times of every case, with networks trained for so many steps."""
    x, y, source = images()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    results: dict[str, Any] = {"data": source, "training_steps": steps}
    for sizes in ((784, 128, 128, 10), (784, 28, 10)):
        for state, mu in (("initial", 0.0), ("trained", 0.0), ("trained with 1e-3*graph", 1e-3)):
            model = network(sizes)
            advance = training_step(model, x, y, mu)
            for _ in range(0 if state == "initial" else steps):
                advance()
            layers = [w.clone() for w in weights(model)]
            results[f"{'-'.join(map(str, sizes))} {state}"] = case(
                sizes, layers, training_step(network(sizes), x, y), rounds
            )
    results["64-[128]x12-10"] = deep((64, *[128] * 12, 10), rounds)
    results["64-[64]x24-10"] = deep((64, *[64] * 24, 10), rounds)
    results["residual over two layers"] = residual(2, rounds)
    results["residual over one layer"] = residual(1, rounds)
    return results


def main() -> None:
    """Measures every case and saves the result."""
    parser = argparse.ArgumentParser(description="cost of the graph energy")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--steps", type=int, default=400)
    options = parser.parse_args()
    save("graph_energy", cases(options.rounds, options.steps))


if __name__ == "__main__":
    main()
