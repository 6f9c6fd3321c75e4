"""The routes to the polar factor against ``torch.linalg.svdvals(w).sum()`` and its backward pass.

    python benchmarks/spectral.py [--rounds 100] [--threads 1]

float32. "naive_per_auto" is how many times faster `polar(w)` gives value and gradient, "error" how far the gradient is
from a float64 SVD, relative to its norm, "estimate" what the route says about it. Spectra: "initial", the
initialization of ``nn.Linear``; "decaying", from 1 to 1e-3; "power", i^-0.7; "trained", the initialization with 30 per
cent of the singular values zero, as training with the penalty leaves them. The last case is one step of the MLP
784-128-128-10 with and without the layerwise nuclear norm.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from runner import compare, save
from torch import Tensor, nn

from groundstate.energies.spectral import Nuclear
from groundstate.norms.polar import Route, polar, polar_with_error
from groundstate.norms.spectral import tolerance

SQUARE, TALL = (128, 256, 512, 1024), ((784, 28), (784, 128), (768, 3072), (3072, 768), (4096, 1024))
ROUTES: tuple[Route, ...] = ("svd", "gram", "qdwh", "express")


def matrix(rows: int, columns: int, spectrum: str) -> Tensor:
    """Returns a float32 weight."""
    generator = torch.Generator().manual_seed(0)
    w = (2 * torch.rand(rows, columns, generator=generator, dtype=torch.float64) - 1) / math.sqrt(columns)
    if spectrum == "initial":
        return w.float()
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    index = torch.arange(1, len(s) + 1, dtype=torch.float64)
    spectra = {
        "decaying": torch.logspace(0, -3, len(s), dtype=torch.float64),
        "power": index**-0.7,
        "trained": s * (index < 0.7 * len(s)),
    }
    return (u * spectra[spectrum] @ vh).float()


def case(w: Tensor, rounds: int, threads: int) -> dict[str, Any]:
    """Times one weight by every route, and measures errors."""
    leaf = w.clone().requires_grad_()
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    exact = (u * (s > tolerance(w) * s[0])) @ vh

    def naive() -> Tensor:
        return torch.autograd.grad(torch.linalg.svdvals(leaf).sum(), leaf)[0]

    def by(route: Route) -> Callable[[], object]:
        return lambda: polar(w, route)

    every: dict[str, int] = {route: 4 for route in ROUTES}  # noqa: C420  (fromkeys keeps the type of the keys)
    result = compare({"naive": naive, "auto": by("auto"), **{r: by(r) for r in ROUTES}}, rounds, threads, 1, every)
    q, value, estimate = polar_with_error(w)
    median = {name: t["median"] for name, t in result["milliseconds"].items()}
    return {
        "naive_per_auto": median["naive"] / median["auto"],
        **{f"naive_per_{route}": median["naive"] / median[route] for route in ROUTES},
        "error": float((q.double() - exact).norm() / exact.norm()),
        "estimate": float(estimate),
        "value_error": abs(float(value) / float(s.sum()) - 1),
        **result,
    }


def layerwise(rounds: int, threads: int) -> dict[str, Any]:
    """Times a training step of the MLP without, with the exact, and with the naive layerwise nuclear norm."""
    generator = torch.Generator().manual_seed(0)
    sizes = (784, 128, 128, 10)
    model = nn.Sequential(*(m for a, b in pairwise(sizes) for m in (nn.Linear(a, b), nn.ReLU())))[:-1]
    for p in model.parameters():
        nn.init.uniform_(p, -1 / math.sqrt(p.shape[-1]), 1 / math.sqrt(p.shape[-1]), generator=generator)
    x = torch.randn(128, 784, generator=generator)
    y = torch.randint(10, (128,), generator=generator)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    weights = [p for p in model.parameters() if p.ndim == 2]
    energy = Nuclear()

    def step(penalty: str) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            if penalty == "naive":
                loss = loss + 1e-4 * torch.stack([torch.linalg.svdvals(w).sum() for w in weights]).sum()
            loss.backward()
            if penalty == "exact":
                for w in weights:
                    assert w.grad is not None
                    w.grad.add_(energy.value_and_grad(w)[1], alpha=1e-4)
            optimizer.step()

        return run

    result = compare({name: step(name) for name in ("plain", "exact", "naive")}, rounds, threads)
    median = {name: t["median"] for name, t in result["milliseconds"].items()}
    return {
        "exact_per_plain": median["exact"] / median["plain"],
        "naive_per_plain": median["naive"] / median["plain"],
    } | result


def main() -> None:
    """Measures every shape and spectrum and saves the result."""
    parser = argparse.ArgumentParser(description="routes to the polar factor")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for rows, columns in (*((n, n) for n in SQUARE), *TALL):
        for spectrum in ("initial", "decaying", "power", "trained"):
            cost = rows * columns * min(rows, columns)
            rounds = max(4, min(options.rounds, int(options.rounds * 2e7 / cost)))
            results[f"{rows}x{columns} {spectrum}"] = case(matrix(rows, columns, spectrum), rounds, options.threads)
    results["step of 784-128-128-10"] = layerwise(options.rounds, options.threads)
    save("spectral", results)


if __name__ == "__main__":
    main()
