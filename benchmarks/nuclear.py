"""What value and gradient of the nuclear norm cost, against autograd through the singular values.

    python benchmarks/nuclear.py [--rounds 100]

float32, one thread. "naive" is ``torch.linalg.svdvals(w).sum()`` and its backward pass, "energy" is
``Nuclear().value_and_grad(w)``, "svd" the same by the SVD alone, "prox" one singular value thresholding. Weights are
``(out, in)`` as torch stores them, and the transposes of the layers; "initial" is the initialization of ``nn.Linear``,
"decaying" a spectrum from 1 to 1e-3, as training with the penalty makes them. Errors are relative to a float64 SVD.
"""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from runner import compare, save
from torch import Tensor

from groundstate.energies.spectral import Nuclear
from groundstate.norms.polar import polar

SHAPES = ((128, 784), (784, 128), (28, 784), (784, 28), (128, 128), (512, 512))


def matrix(rows: int, columns: int, spectrum: str) -> Tensor:
    """Returns a float32 weight."""
    generator = torch.Generator().manual_seed(0)
    w = (2 * torch.rand(rows, columns, generator=generator, dtype=torch.float64) - 1) / math.sqrt(columns)
    if spectrum == "decaying":
        u, _, vh = torch.linalg.svd(w, full_matrices=False)
        w = u * torch.logspace(0, -3, min(rows, columns), dtype=torch.float64) @ vh
    return w.float()


def case(w: Tensor, rounds: int) -> dict[str, Any]:
    """Times one weight and measures the error of the gradient and of the value."""
    leaf = w.clone().requires_grad_()
    energy = Nuclear()

    def naive() -> Tensor:
        return torch.autograd.grad(torch.linalg.svdvals(leaf).sum(), leaf)[0]

    exact, exact_value = polar(w.double(), "svd")
    value, gradient = energy.value_and_grad(w)
    result = compare(
        {
            "naive": naive,
            "energy": lambda: energy.value_and_grad(w),
            "svd": lambda: polar(w, "svd"),
            "prox": lambda: energy.prox(w, 1e-3),
        },
        rounds=rounds,
    )
    median = {name: t["median"] for name, t in result["milliseconds"].items()}
    return {
        "naive_per_energy": median["naive"] / median["energy"],
        "gradient_error": float((gradient.double() - exact).norm() / exact.norm()),
        "naive_gradient_error": float((naive().double() - exact).norm() / exact.norm()),
        "value_error": abs(float(value) / float(exact_value) - 1),
        **result,
    }


def main() -> None:
    """Measures every shape and spectrum and saves the result."""
    parser = argparse.ArgumentParser(description="cost of the nuclear norm")
    parser.add_argument("--rounds", type=int, default=100)
    options = parser.parse_args()
    results: dict[str, Any] = {}
    for spectrum in ("initial", "decaying"):
        for rows, columns in SHAPES:
            w = matrix(rows, columns, spectrum)
            rounds = options.rounds if w.numel() < 200_000 else max(10, options.rounds // 5)
            results[f"{rows}x{columns} {spectrum}"] = case(w, rounds)
    save("nuclear", results)


if __name__ == "__main__":
    main()
