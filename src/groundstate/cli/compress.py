"""``groundstate compress``: low-rank factors for the network of a run, with size, speed and accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from groundstate.cli.console import Output, figure, percent, table
from groundstate.cli.options import DataDir, verb

if TYPE_CHECKING:
    from torch import nn

    from groundstate.compress import Compressed
    from groundstate.training.data import Dataset

_RULES = ("tolerance", "cut", "energy", "rank")
_RULE = "Rule (exactly one)"


@verb()
def compress(
    output: Output,
    given: dict[str, Any],
    *,
    run: Annotated[Path, typer.Argument(help="A run folder.", metavar="RUN")],
    tolerance: Annotated[
        float | None,
        typer.Option(
            "--tolerance",
            help="The smallest network that loses at most this many points of validation accuracy, e.g. 0.5.",
            metavar="POINTS",
            rich_help_panel=_RULE,
        ),
    ] = None,
    cut: Annotated[
        float | None,
        typer.Option(
            "--cut",
            help="Drop singular values below this share of the largest.",
            metavar="SHARE",
            rich_help_panel=_RULE,
        ),
    ] = None,
    energy: Annotated[
        float | None,
        typer.Option(
            "--energy",
            help="Keep this share of each squared Frobenius norm, e.g. 0.99.",
            metavar="SHARE",
            rich_help_panel=_RULE,
        ),
    ] = None,
    rank: Annotated[
        int | None,
        typer.Option("--rank", help="Keep this many singular values.", metavar="R", rich_help_panel=_RULE),
    ] = None,
    data_dir: DataDir = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="New folder for the network. Default: RUN/compressed-RULE.", metavar="DIR"),
    ] = None,
) -> None:
    """Factor the layers of a trained network where that makes them smaller.

    Writes the factorized network to a new folder and prints size, speed and accuracy before and after. Ends with exit
    code 1 where nothing gets smaller.
    """
    from groundstate.cli.runs import load_run
    from groundstate.compress import compress as factor
    from groundstate.errors import ThresholdError, UsageError
    from groundstate.training.evaluation import accuracy_and_loss

    values = dict(zip(_RULES, (tolerance, cut, energy, rank)))
    chosen = [(k, v) for k, v in values.items() if v is not None]
    if len(chosen) != 1:
        named = ", ".join(f"--{k}" for k, _ in chosen) or "none"
        raise UsageError(f"give exactly one of --tolerance, --cut, --energy and --rank; got {named}")
    rule, value = chosen[0]
    folder = out or run / f"compressed-{rule}-{value:g}"
    if folder.exists():
        raise UsageError(f"{folder} exists: give the name of a new folder with --out")
    model, sets, notes = load_run(run, data_dir=data_dir)
    for note in notes:
        output.note(f"warning: {note}")

    def validation(m: nn.Module) -> float:
        return accuracy_and_loss(m, sets.val_x, sets.val_y)[0] or 0.0

    share = cut if tolerance is None else _within(model, tolerance, validation)
    made = factor(
        model,
        tolerance=share,
        energy=energy,
        rank=rank,
        evaluate=validation,
        example=sets.val_x[:256],
    )
    if not any(r.factored for r in made.rows):
        reasons = "; ".join(f"{r.name}: {r.reason}" for r in made.rows if r.reason)
        raise ThresholdError(f"nothing gets smaller, so nothing was written ({reasons})")
    test = {key: accuracy_and_loss(m, sets.test_x, sets.test_y)[0] for key, m in _models(model, made).items()}
    made.save(folder)
    output.document(
        "compress",
        {"run": run, "out": folder, "rule": {rule: value}, **made.to_dict(), "test_accuracy": test, "schema": 1},
    )
    output.show(*_tables(made, test, sets), f"Factorized network: {folder}")


def _models(model: nn.Module, made: Compressed) -> dict[str, nn.Module]:
    return {"before": model, "after": made.model}


def _within(model: nn.Module, points: float, accuracy: Callable[[nn.Module], float]) -> float:
    from groundstate.errors import ThresholdError, UsageError
    from groundstate.training.smallest import smallest_within

    if not 0 <= points <= 100:
        raise UsageError(f"--tolerance is in points of accuracy, from 0 to 100, got {points:g}")
    share = smallest_within(model, points / 100, accuracy)
    if share is None:
        raise ThresholdError(
            f"no smaller network keeps the validation accuracy within {points:g} points of {percent(accuracy(model))}: "
            "nothing was written; allow more points, or train with a nuclear energy"
        )
    return share


def _tables(made: Compressed, test: dict[str, float | None], sets: Dataset) -> list[Any]:
    totals = made.totals
    layers = [
        (
            r.name,
            "x".join(map(str, r.shape)),
            figure(r.rank) if r.factored else "dense",
            f"{r.parameters_before:,}",
            f"{r.parameters_after:,}",
            f"{100 * r.relative_error:.2f} %",
            r.reason,
        )
        for r in made.rows
    ]
    before, after = (totals[f"parameters_{k}"] for k in ("before", "after"))
    rows = [
        ("parameters", f"{before:,.0f}", f"{after:,.0f}", f"{100 * totals['ratio']:.1f} %"),
        ("bytes", f"{totals['bytes_before']:,.0f}", f"{totals['bytes_after']:,.0f}", ""),
        ("forward pass, 256 samples", *(f"{totals[f'latency_ms_{k}']:.3f} ms" for k in ("before", "after")), ""),
    ]
    for name, x, y in (
        ("validation accuracy", totals["accuracy_before"], totals["accuracy_after"]),
        ("test accuracy", test["before"], test["after"]),
    ):
        change = "" if x is None or y is None else f"{100 * (y - x):+.2f} points"
        rows.append((name, percent(x), percent(y), change))
    return [
        table(("layer", "shape", "rank", "parameters", "factored", "error", "why dense"), layers, left=2),
        table(("", "before", "after", "change"), rows, title=f"On {sets.name}"),
    ]
