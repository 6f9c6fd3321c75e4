"""``groundstate measure``: the energies and ranks of every tensor of a file, a folder or a run."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from groundstate.cli.console import Output, figure, percent, table
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
        list[str] | None, typer.Option("--energy", help="Energies; may be repeated. Default: all.", metavar="SPEC")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Add loss and accuracy on the validation split (of a RUN).", metavar="digits|mnist"
        ),
    ] = None,
    data_dir: DataDir = None,
    csv: Annotated[Path | None, typer.Option("--csv", help="Write the table as CSV.", metavar="FILE")] = None,
    fail_above: Annotated[
        list[str] | None,
        typer.Option("--fail-above", help="Exit 1 if a total exceeds this, e.g. nuclear=100.", metavar="ENERGY=LIMIT"),
    ] = None,
) -> None:
    """Measure weights: every tensor is listed, with the reason where it is skipped."""
    from groundstate.errors import UsageError
    from groundstate.measure import measure as run

    limits = dict(_limit(text) for text in fail_above or [])
    model, batch = _with_data(source, data, data_dir, output) if data is not None else (None, None)
    if data is None and data_dir is not None:
        raise UsageError("--data-dir needs --data: say which data set, digits or mnist")
    with output.progress(1, "tensor") as meter:

        def progress(done: int, total: int, name: str) -> None:
            meter.update(done, name, total)

        found = run(model if model is not None else source, list(energy) if energy else "all", batch, progress)
    if csv is not None:
        from groundstate.report.tables import write_text

        write_text(csv, found.to_csv())
    failed = _failed(found, limits)
    body = {"source": source, **{k: v for k, v in found.to_dict().items() if k != "schema"}, "failed": failed}
    output.document("measure", body)
    output.show(*_tables(found, None if energy else _SHOWN))
    for note in found.notes:
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

    failed = []
    for key, limit in limits.items():
        if key not in found.totals:
            raise UsageError(f"--fail-above {key}: it was not measured; add --energy {key!r}")
        if not found.totals[key] <= limit:
            failed.append(f"{key} is {found.totals[key]:.6g}, above {limit:g}")
    return failed


def _judge(found: Table, failed: list[str]) -> None:
    from groundstate.errors import NonFiniteError, ThresholdError

    if found.non_finite:
        raise NonFiniteError(
            f"not finite: {', '.join(found.non_finite)}; the totals leave them out. Use an earlier checkpoint"
        )
    if failed:
        raise ThresholdError("; ".join(failed))


def _tables(found: Table, shown: tuple[str, ...] | None) -> list[Any]:
    energies = list(found.totals)
    per_row = list(dict.fromkeys(k for r in found.rows for k in r.values if shown is None or k in shown))
    columns = ("tensor", "shape", "dtype", "status", "rank", "effective rank", "sigma max", *per_row)
    rows = []
    for r in found.rows:
        status = r.status if not r.reason else f"{r.status}: {r.reason}"
        shape = "x".join(map(str, r.shape)) or "-"
        figures = [figure(v) for v in (r.rank, r.effective_rank, r.sigma_max)]
        rows.append((r.name, shape, r.dtype, status, *figures, *[figure(r.values.get(e)) for e in per_row]))
    counts = found.summary()
    parts: list[Any] = [
        table(columns, rows, left=4),
        table(("total", "value"), [(e, figure(found.totals[e])) for e in energies]),
        f"{counts['tensors']} tensors, {found.parameters:,} parameters: "
        + ", ".join(f"{n} {status}" for status, n in counts.items() if n and status != "tensors"),
    ]
    if found.evaluation:
        accuracy, loss = percent(found.evaluation["accuracy"]), figure(found.evaluation["loss"])
        parts.append(f"validation accuracy {accuracy}, loss {loss}")
    return parts
