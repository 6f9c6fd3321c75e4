"""The figures of the spectral benchmarks in one table: what was aimed at, and what the kept results say.

    python benchmarks/spectral_summary.py

Reads `spectral`, `spectral_amortized`, `spectral_conv`, `spectral_prox` and `graph_energy` of the folder of results and
prints a table in Markdown. A row whose benchmark has not run says so. "step" is a plain training step of the same
network, "naive" is ``torch.linalg.svdvals(w).sum()`` and its backward pass.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from runner import RESULTS

Results = dict[str, Any]
TALL = ("784x128", "128x784", "3072x768", "768x3072", "4096x1024")
SQUARE = ("128x128", "256x256", "512x512", "1024x1024")
SPECTRA = ("initial", "exponential", "power", "heavy tail", "low rank")


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        what: What was measured.
        aim: The figure aimed at.
        least: Whether it is the least that will do; the most otherwise.
        figures: Reads the results, by their names.
        unit: What follows a figure.
    """

    what: str
    aim: float
    least: bool
    figures: Callable[[Results], Iterable[float]]
    unit: str


def rows() -> list[Row]:
    """Returns the rows, the exact energies first."""
    found: list[Row] = []
    for spectrum in SPECTRA:
        for kind, shapes, aim in (("aspect ratio 4 to 6", TALL, 3.0), ("square", SQUARE, 1.5)):
            names = [f"{shape} {spectrum}" for shape in shapes]
            found.append(Row(f"nuclear, {kind} ({', '.join(shapes)}), {spectrum}", aim, True, _speed(names), "x"))
    for strength in ("0", "3e-4", "1e-3"):
        names = [f"trained {strength} {shape}" for shape in ("128x784", "128x128", "10x128")]
        found.append(Row(f"nuclear, trained with {strength} (128x784, 128x128, 10x128)", 1.5, True, _speed(names), "x"))
    for case, exact, kept in (
        ("MLP nuclear", 1.6, 0.12),
        ("MLP nuclear, strong", 1.6, 0.12),
        ("transformer nuclear", 0.17, 0.03),
        ("ResNet-18 nuclear", 0.06, 0.03),
        ("MLP graph", 1.0, 0.12),
    ):
        found.append(Row(f"{case}, exact", exact, False, _step(case, "exact"), "of a step"))
        found.append(Row(f"{case}, gap 1 %", kept, False, _step(case, "gap 1 %"), "of a step"))
    deep, conv = "64-[128]x12-10", ("resnet18", "per_step", "energy")
    return [
        *found,
        Row("gap, nothing due", 0.03, False, _at("spectral_amortized", "nothing due", "of a step"), "of a step"),
        Row(f"graph of {deep}, against eigvalsh", 8.0, True, _at("graph_energy", deep, "dense_per_energy"), "x"),
        Row("conv_nuclear, ResNet-18 at 32x32", 0.1, False, _at("spectral_conv", *conv), "of a step"),
        Row("prox, 512x512, n/16 and n/8 survive", 3.0, True, _prox("512x512"), "x"),
        Row("prox, 1024x1024, n/16 and n/8 survive", 3.0, True, _prox("1024x1024"), "x"),
    ]  # fmt: skip


def _at(file: str, *path: str) -> Callable[[Results], Iterable[float]]:
    def figures(results: Results) -> Iterable[float]:
        node = results[file]
        for key in path:
            node = node[key]
        return [node]

    return figures


def _speed(names: list[str]) -> Callable[[Results], Iterable[float]]:
    return lambda results: [results["spectral"]["exact"][name]["naive_per_polar"] for name in names]


def _step(case: str, way: str) -> Callable[[Results], Iterable[float]]:
    return _at("spectral_amortized", case, f"{way}: of a step")


def _prox(shape: str) -> Callable[[Results], Iterable[float]]:
    names = [f"{shape} {kind} n/{share}" for kind in ("initial", "decaying", "carried") for share in (16, 8)]
    return lambda results: [results["spectral_prox"][name]["svd_per_prox"] for name in names]


def table(results: Results) -> str:
    """Returns the table in Markdown."""
    lines = ["| what | aim | measured |", "|---|---:|---|"]
    for row in rows():
        try:
            figures = list(row.figures(results))
        except KeyError as missing:
            found = f"not run: {missing.args[0]}"
        else:
            reached = sum(f >= row.aim if row.least else f <= row.aim for f in figures)
            found = ", ".join(f"{f:.2g}" if f < 0.1 else f"{f:.2f}" for f in figures)
            missed = len(figures) - reached
            found += f" {row.unit}" + (f" ({missed} of {len(figures)} missed)" if missed else "")
        lines.append(f"| {row.what} | {'>=' if row.least else '<='} {row.aim:g} | {found} |")
    return "\n".join(lines)


if __name__ == "__main__":
    files = ("spectral", "spectral_amortized", "spectral_conv", "spectral_prox", "graph_energy")
    paths = {name: RESULTS / f"{name}.json" for name in files}
    print(table({name: json.loads(path.read_text()) for name, path in paths.items() if path.exists()}))
