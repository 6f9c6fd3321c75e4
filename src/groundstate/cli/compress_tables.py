"""The tables of ``groundstate compress``: the layers, and the network before and after."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from groundstate.cli.console import figure, percent, table

if TYPE_CHECKING:
    from groundstate.compress import Compressed, LayerRow
    from groundstate.training.data import Dataset


def of_layers(rows: list[LayerRow]) -> Any:
    """Returns the table of layers; errors of outputs only where they were measured."""
    measured = any(r.output_error is not None for r in rows)
    cells = [
        (
            r.name,
            "x".join(map(str, r.shape)),
            figure(r.rank) if r.factored else "dense",
            f"{r.parameters_before:,}",
            f"{r.parameters_after:,}",
            f"{100 * r.relative_error:.2f} %",
            *((percent(r.output_error), percent(r.network_error)) if measured else ()),
            r.reason,
        )
        for r in rows
    ]
    errors = ("of its output", "of the logits, alone") if measured else ()
    columns = ("layer", "shape", "rank", "parameters", "factored", "error", *errors, "why dense")
    return table(columns, cells, left=2)


def of_randomized(rows: list[LayerRow]) -> list[str]:
    """Returns a line for each layer with factors of a randomized SVD: how good they are known to be."""
    lines: list[str] = []
    for row in rows:
        found = row.randomized
        if found is None:
            continue
        line = (
            f"{row.name}: {row.method.replace('svd', 'SVD')}, spectral error at most {100 * found.spectral:.3g} % "
            f"(fails with probability {found.failure:.0e})"
        )
        if found.from_best is not None:
            line += f", at most {found.from_best:.3g} times the smallest possible"
        if found.best_frobenius is not None:
            line += (
                f"; Frobenius error {100 * row.relative_error:.4g} %, "
                f"the smallest possible is {100 * found.best_frobenius:.4g} %"
            )
        lines.append(line)
    return lines


def of_totals(made: Compressed, facts: dict[str, Any], sets: Dataset) -> Any:
    """Returns the table of sizes, times and accuracies."""
    totals, test, tune = made.totals, facts["test_accuracy"], made.fine_tune
    before, after = (totals[f"parameters_{k}"] for k in ("before", "after"))
    rows = [
        ("parameters", f"{before:,.0f}", f"{after:,.0f}", f"{100 * totals['ratio']:.1f} %"),
        ("bytes", f"{totals['bytes_before']:,.0f}", f"{totals['bytes_after']:,.0f}", ""),
        ("forward pass, 256 samples", *(f"{totals[f'latency_ms_{k}']:.3f} ms" for k in ("before", "after")), ""),
    ]
    accuracies = [
        ("validation accuracy", totals["accuracy_before"], totals["accuracy_after"]),
        ("test accuracy", test["before"], test["after"]),
    ]
    if tune is not None:
        accuracies += [
            ("validation, before the fine-tune", totals["accuracy_before"], tune["accuracy_before"]),
            ("test, before the fine-tune", test["before"], test["before_fine_tune"]),
        ]
    for name, x, y in accuracies:
        change = "" if x is None or y is None else f"{100 * (y - x):+.2f} points"
        rows.append((name, percent(x), percent(y), change))
    as_cut = "" if tune is None else ", as cut"
    if "output_change" in totals:
        rows.append((f"logits, validation{as_cut}", "", "", percent(totals["output_change"])))
        rows.append((f"logits, test{as_cut}", "", "", percent(facts.get("test_output_change"))))
    return table(("", "before", "after", "change"), rows, title=f"On {sets.name}")


def of_fine_tune(made: Compressed) -> list[str]:
    """Returns a line that says how the factors were trained, if they were."""
    tune = made.fine_tune
    if tune is None:
        return []
    energy = "the loss alone" if tune["energy"] == "none" else f"the loss + {tune['energy']}"
    return [f"Fine-tune: {tune['epochs']} epochs at learning rate {tune['lr']:g}, minimizing {energy}"]
