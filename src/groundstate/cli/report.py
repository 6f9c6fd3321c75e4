"""``groundstate report``: one HTML page, CSV tables and a terminal table from run folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from groundstate.cli.console import Output
from groundstate.cli.options import Out, verb


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
    from groundstate.report import build, headline, terminal_table

    page = build(runs, out or (runs[0] if len(runs) == 1 else Path("report")))
    output.document("report", {"report": page, "summary": headline(runs)})
    output.show(terminal_table(runs), f"Report: {page}")
