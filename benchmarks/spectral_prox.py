"""What the proximal map of the nuclear norm costs, against the same by a full SVD.

    python benchmarks/spectral_prox.py [--rounds 12]

float32, one thread for torch and for the BLAS of scipy. "svd" is ``singular_value_threshold(w, t, "svd")``, "prox" the
same by the route that is taken by default. "initial" has the spectrum of Gaussian weights, without a gap anywhere;
"decaying" falls from 1 to 1e-3, as training with the penalty makes it. The threshold lies halfway between two singular
values, so that a sixteenth to all of them survive; below the smallest, where all do, it is half of that.

"carried" is a step of training at low rank: n/16 or n/8 singular values between 1 and 0.3, noise a thousandth of that
and a threshold that the noise stays below, which a float32 Gram matrix does not resolve; the subspace is that of the
matrix before the step. Errors are relative to a float64 SVD, "difference" is between the two routes.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from runner import compare, save
from threadpoolctl import threadpool_limits
from torch import Tensor

from groundstate.norms.thresholding import singular_value_threshold, threshold_with_subspace

SHAPES = ((512, 512), (1024, 1024), (784, 128), (4096, 1024))
SHARES = (16, 8, 4, 2, 1)


def decomposed(rows: int, columns: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the float64 SVD of a Gaussian matrix with entries of variance 1 / rows."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(rows, columns, generator=generator, dtype=torch.float64) / rows**0.5
    return torch.linalg.svd(w, full_matrices=False)


def reference(w: Tensor, t: float) -> Tensor:
    """Returns the thresholded matrix by a float64 SVD."""
    u, s, vh = torch.linalg.svd(w.double(), full_matrices=False)
    return (u * (s - t).clamp_min(0)) @ vh


def case(w: Tensor, t: float, rounds: int, subspace: Tensor | None = None) -> dict[str, Any]:
    """Times one thresholding by both routes and compares the results."""
    exact = reference(w, t)
    by_svd, by_prox = singular_value_threshold(w, t, "svd"), singular_value_threshold(w, t, subspace=subspace)
    result = compare(
        {
            "svd": lambda: singular_value_threshold(w, t, "svd"),
            "prox": lambda: singular_value_threshold(w, t, subspace=subspace),
        },
        rounds=rounds,
        warmup=1,
    )
    median = {name: times["median"] for name, times in result["milliseconds"].items()}
    least = {name: times["min"] for name, times in result["milliseconds"].items()}
    return {
        "surviving": int((torch.linalg.svdvals(w.double()) > t).sum()),
        "svd_per_prox": median["svd"] / median["prox"],
        "svd_per_prox_of_minima": least["svd"] / least["prox"],
        "difference": float((by_prox - by_svd).norm() / by_svd.norm()),
        "error": float((by_prox - exact).norm() / exact.norm()),
        "svd_error": float((by_svd - exact).norm() / exact.norm()),
        **result,
    }


def carried(n: int, share: int, rounds: int) -> dict[str, Any]:
    """Times a step of training at low rank."""
    u, _, vh = decomposed(n, n)
    r = n // share
    s = torch.cat([torch.linspace(1, 0.3, r), torch.linspace(3e-4, 0, n - r)]).double()
    before = u * s @ vh
    moved = before + 1e-5 / n**0.5 * torch.randn(n, n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    t = 5e-4
    _, subspace = threshold_with_subspace(before.float(), t)
    return case(moved.float(), t, rounds, subspace)


def prox_cases(rounds: int) -> dict[str, Any]:
    """Returns every case by name: shape, spectrum and the share of singular values that survive."""
    results: dict[str, Any] = {}
    with threadpool_limits(1, user_api="blas"):
        for rows, columns in SHAPES:
            u, gaussian, vh = decomposed(rows, columns)
            few = max(3, rounds if rows * columns < 500_000 else rounds // 3)
            for name, s in (("initial", gaussian), ("decaying", torch.logspace(0, -3, columns, dtype=torch.float64))):
                w = (u * s @ vh).float()
                below = torch.cat([s[1:], torch.zeros(1, dtype=s.dtype)])
                for share in SHARES:
                    t = float((s + below)[columns // share - 1]) / 2
                    results[f"{rows}x{columns} {name} n/{share}"] = case(w, t, few)
        for n in (512, 1024):
            for share in (16, 8):
                results[f"{n}x{n} carried n/{share}"] = carried(n, share, max(3, rounds // 2))
    return results


def main() -> None:
    """Measures every case and saves the result."""
    parser = argparse.ArgumentParser(description="cost of singular value thresholding")
    parser.add_argument("--rounds", type=int, default=12)
    save("spectral_prox", prox_cases(parser.parse_args().rounds))


if __name__ == "__main__":
    main()
