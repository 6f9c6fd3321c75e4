"""``groundstate report``: one HTML page, CSV tables and a terminal table from run folders."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from groundstate.cli.console import Output, width
from groundstate.cli.options import Out, verb

if TYPE_CHECKING:
    from rich.table import Table

_WIDE, _NARROW = 120, 90  # columns of a terminal that the whole table needs, and the one without the second test
_SHORT = {"test accuracy %": "accuracy %", "difference, points": "difference"}


@verb()
def report(
    output: Output,
    given: dict[str, Any],
    *,
    runs: Annotated[list[Path], typer.Argument(help="Run folders, or the folder of a comparison.", metavar="RUN...")],
    out: Out = None,
) -> None:
    """Write report.html and tables/*.csv from run folders.

    Default folder: that of the runs, if one is given, else report.
    """
    from groundstate.report import build, headline

    page = build(runs, out or (runs[0] if len(runs) == 1 else Path("report")))
    output.document("report", {"report": page, "summary": headline(runs)})
    output.show(comparison(runs), f"Report: {page}")


def comparison(runs: Sequence[Path]) -> Table:
    """Returns the head of the report; on a narrow terminal with fewer columns, so that its cells stay whole."""
    from groundstate.report import terminal_table

    made, room = terminal_table(runs), width()
    if room < _WIDE:
        left_out = ("p (Wilcoxon)",) if room >= _NARROW else ("p (Wilcoxon)", "seeds")
        made.columns[:] = [c for c in made.columns if c.header not in left_out]
        made.padding, made.pad_edge = (0, 1, 0, 0), False
        for column in made.columns:
            column.header = _SHORT.get(str(column.header), column.header)
            column.min_width = len("reference") if column.header == "verdict" else None
            column.no_wrap = column.header != "verdict" and not str(column.header).startswith("size")
    return made
