"""``groundstate compress``: low-rank factors for the network of a run, with size, speed and accuracy."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from groundstate.cli.console import Output, figure, percent, table
from groundstate.cli.options import DataDir, verb

if TYPE_CHECKING:
    from torch import nn

    from groundstate.compress import Compressed, LayerRow
    from groundstate.training.config import TrainConfig
    from groundstate.training.data import Dataset

_RULES = ("tolerance", "cut", "energy", "rank", "output_tolerance")
_RULE, _TUNE = "Rule (exactly one)", "Fine-tune"


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
    output_tolerance: Annotated[
        float | None,
        typer.Option(
            "--output-tolerance",
            help="Let the logits of the validation inputs change by at most this share of their norm, e.g. 0.01.",
            metavar="SHARE",
            rich_help_panel=_RULE,
        ),
    ] = None,
    weights_only: Annotated[
        bool,
        typer.Option("--weights-only", help="With --output-tolerance: SVD of the weights, not of what they give."),
    ] = False,
    fine_tune: Annotated[
        int | None,
        typer.Option(
            "--fine-tune", help="Then train the factors for so many epochs.", metavar="EPOCHS", rich_help_panel=_TUNE
        ),
    ] = None,
    fine_tune_lr: Annotated[
        float | None,
        typer.Option(
            "--fine-tune-lr", help="Its learning rate (Adam). Default: 0.001.", metavar="RATE", rich_help_panel=_TUNE
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Data set: digits or mnist. Default: that of the run.", metavar="NAME"),
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
    from groundstate.cli.runs import load_run, read_config
    from groundstate.errors import ThresholdError, UsageError

    rule, value = _one_rule(dict(zip(_RULES, (tolerance, cut, energy, rank, output_tolerance))))
    if weights_only and output_tolerance is None:
        raise UsageError("--weights-only goes with --output-tolerance; the other rules cut weights anyway")
    if fine_tune_lr is not None and fine_tune is None:
        raise UsageError("--fine-tune-lr goes with --fine-tune EPOCHS")
    ending = "-weights-only" * weights_only + (f"-tuned-{fine_tune}" if fine_tune is not None else "")
    folder = out or run / f"compressed-{rule.replace('_', '-')}-{value:g}{ending}"
    if folder.exists():
        raise UsageError(f"{folder} exists: give the name of a new folder with --out")
    model, sets, notes = load_run(run, data=data, data_dir=data_dir)
    for note in notes:
        output.note(f"warning: {note}")
    config = read_config(run)
    with _threads(config.threads):
        made = _made(model, sets, rule, value, not weights_only)
        if not any(r.factored for r in made.rows):
            reasons = "; ".join(f"{r.name}: {r.reason}" for r in made.rows if r.reason)
            raise ThresholdError(f"nothing gets smaller, so nothing was written ({reasons})")
        facts = _facts(model, made, sets)
        if fine_tune is not None:
            made = _tuned(made, sets, config, fine_tune, fine_tune_lr)
            facts["test_accuracy"] = facts["test_accuracy"] | {"before_fine_tune": facts["test_accuracy"]["after"]}
            facts["test_accuracy"]["after"] = _accuracy(made.model, sets, "test")
    made.save(folder)
    output.document(
        "compress",
        {"run": run, "out": folder, "rule": {rule: value}, **made.to_dict(), **facts, "schema": 1},
    )
    output.show(
        _layers(made.rows), *_randomized(made.rows), _totals(made, facts, sets), f"Factorized network: {folder}"
    )


def _one_rule(values: dict[str, Any]) -> tuple[str, float]:
    from groundstate.errors import UsageError

    chosen = [(k, v) for k, v in values.items() if v is not None]
    if len(chosen) != 1:
        *most, last = (f"--{k.replace('_', '-')}" for k in values)
        named = ", ".join(f"--{k.replace('_', '-')}" for k, _ in chosen) or "none"
        raise UsageError(f"give exactly one of {', '.join(most)} and {last}; got {named}")
    return chosen[0]


@contextmanager
def _threads(count: int) -> Iterator[None]:
    """The threads of the run: another number may give other last bits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _accuracy(model: nn.Module, sets: Dataset, split: str) -> float | None:
    from groundstate.training.evaluation import accuracy_and_loss

    return accuracy_and_loss(model, getattr(sets, f"{split}_x"), getattr(sets, f"{split}_y"))[0]


def _made(model: nn.Module, sets: Dataset, rule: str, value: Any, data_aware: bool) -> Compressed:
    """Compresses by one rule of the command line."""
    from groundstate.compress import compress as factor

    def validation(m: nn.Module) -> float:
        return _accuracy(m, sets, "val") or 0.0

    if rule == "tolerance":
        value = _within(model, value, validation)
    options: dict[str, Any] = {"tolerance" if rule == "cut" else rule: value}
    if rule == "output_tolerance":
        options |= {"data": sets.val_x, "data_aware": data_aware}
    return factor(model, **options, evaluate=validation, example=sets.val_x[:256])


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


def _facts(model: nn.Module, made: Compressed, sets: Dataset) -> dict[str, Any]:
    """Returns what the test split, which chose nothing, says of the network as it was cut."""
    from groundstate.compress_output import output_change

    test = {key: _accuracy(m, sets, "test") for key, m in (("before", model), ("after", made.model))}
    facts: dict[str, Any] = {"test_accuracy": test}
    if "output_change" in made.totals and len(sets.test_x):
        facts["test_output_change"] = output_change(model, made.model, sets.test_x)
    return facts


def _tuned(made: Compressed, sets: Dataset, config: TrainConfig, epochs: int, lr: float | None) -> Compressed:
    from groundstate.compress_tune import LR, tuned

    rate = LR if lr is None else lr
    train, held_out = (sets.train_x, sets.train_y), (sets.val_x, sets.val_y)
    return tuned(made, train, held_out, epochs, rate, seed=config.seed, batch_size=config.batch_size)


# ---------------------------------------------------------------------- tables


def _layers(rows: list[LayerRow]) -> Any:
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


def _randomized(rows: list[LayerRow]) -> list[str]:
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


def _totals(made: Compressed, facts: dict[str, Any], sets: Dataset) -> Any:
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
