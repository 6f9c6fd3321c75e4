"""``groundstate measure``: the energies and ranks of every tensor of a file, a folder or a run; with data also what the
network does to them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from groundstate.cli.console import Output
from groundstate.cli.measure_tables import of_function, of_weights
from groundstate.cli.options import DataDir, verb

if TYPE_CHECKING:
    from torch import Tensor, nn

    from groundstate.measure import Table

_SHOWN = ("nuclear", "squared_frobenius")  # of all energies, those with a column in the terminal; the rest by --csv


@verb()
def measure(
    output: Output,
    given: dict[str, Any],
    *,
    source: Annotated[
        Path, typer.Argument(help="A .safetensors or .pt file, a folder of them, or a run folder.", metavar="SOURCE")
    ],
    energy: Annotated[
        list[str] | None,
        typer.Option(
            "--energy",
            help="Energies; may be repeated. Default: all. Energies of the function, such as dirichlet, need --data; "
            "where some are named, nothing else is measured of the function.",
            metavar="SPEC",
        ),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Add what the network of a RUN does to the validation split: accuracy, Jacobian, robustness, "
            "calibration, outliers.",
            metavar="digits|mnist",
        ),
    ] = None,
    data_dir: DataDir = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the table as CSV.", metavar="FILE")] = None,
    fail_above: Annotated[
        list[str] | None,
        typer.Option(
            "--fail-above", help="Exit 1 if an energy exceeds this, e.g. nuclear=100.", metavar="ENERGY=LIMIT"
        ),
    ] = None,
) -> None:
    """Measure weights, and with --data the function: every tensor is listed, with the reason where it is skipped."""
    from groundstate.errors import UsageError
    from groundstate.measure import measure as run

    limits = dict(_limit(text) for text in fail_above or [])
    model, batch = _with_data(source, data, data_dir, output) if data is not None else (None, None)
    if data is None and data_dir is not None:
        raise UsageError("--data-dir needs --data: say which data set, digits or mnist")
    with output.progress(1, "tensor") as meter:

        def progress(done: int, total: int, name: str) -> None:
            meter.update(done, name, total)

        wanted = list(energy) if energy and energy != ["all"] else "all"
        found = run(model if model is not None else source, wanted, batch, progress)
    if csv is not None:
        from groundstate.report.tables import write_text

        write_text(csv, found.to_csv())
    failed = _failed(found, limits)
    body = {"source": source, **{k: v for k, v in found.to_dict().items() if k != "schema"}, "failed": failed}
    output.document("measure", body)
    output.show(*of_weights(found, _SHOWN if wanted == "all" else None))
    if found.function is not None:
        output.show(*of_function(found.function))
    for note in (*found.notes, *(found.function.notes if found.function is not None else ())):
        output.note(f"note: {note}")
    _judge(found, failed)


def _with_data(
    source: Path, data: str, data_dir: str | None, output: Output
) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    from groundstate.cli.runs import load_run

    model, sets, notes = load_run(source, data, data_dir)
    for note in notes:
        output.note(f"warning: {note}")
    return model, (sets.val_x, sets.val_y)


def _limit(text: str) -> tuple[str, float]:
    from groundstate.energies.registry import parse
    from groundstate.errors import UsageError

    spec, _, number = text.rpartition("=")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not spec or math.isnan(limit):
        raise UsageError(f"--fail-above takes ENERGY=LIMIT, e.g. nuclear=100, got {text!r}")
    terms = parse(spec).terms
    if len(terms) != 1:
        raise UsageError(f"--fail-above takes one energy and its limit, e.g. nuclear=100, got {text!r}")
    return repr(terms[0].energy), limit


def _failed(found: Table, limits: dict[str, float]) -> list[str]:
    from groundstate.errors import UsageError

    of_function = {} if found.function is None else {k: e.value for k, e in found.function.energies.items()}
    measured = found.totals | of_function
    failed = []
    for key, limit in limits.items():
        if key not in measured:
            raise UsageError(f"--fail-above {key}: it was not measured; {_absent(found, key) or _remedy(key)}")
        if not measured[key] <= limit:
            failed.append(f"{key} is {measured[key]:.6g}, above {limit:g}")
    return failed


def _absent(found: Table, key: str) -> str:
    """Returns the note that says why an energy has no value; empty: it was not asked for."""
    notes = [*found.notes, *(found.function.notes if found.function is not None else ())]
    return next((n for n in notes if f", {key}, " in f", {n.partition(': ')[0]}, "), "")


def _remedy(key: str) -> str:
    from groundstate.energies.base import FunctionEnergy
    from groundstate.energies.registry import parse

    data = " --data digits (or mnist)" if isinstance(parse(key).terms[0].energy, FunctionEnergy) else ""
    return f"add --energy {key!r}{data}"


def _judge(found: Table, failed: list[str]) -> None:
    from groundstate.errors import NonFiniteError, ThresholdError

    if found.non_finite:
        raise NonFiniteError(
            f"not finite: {', '.join(found.non_finite)}; the totals leave them out. Use an earlier checkpoint"
        )
    if failed:
        raise ThresholdError("; ".join(failed))
