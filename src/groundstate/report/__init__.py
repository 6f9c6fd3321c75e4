"""Reports: run folders in, one self-contained HTML page, CSV tables and a terminal table out.

Nothing here trains or loads a model: all numbers come from the JSON files of the run folders, so a report can be made
again anywhere, and for runs that came from different machines.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

__all__ = ["build", "headline", "terminal_table"]


def build(runs: Iterable[Path], out: Path) -> Path:
    """Writes ``out/report.html`` and ``out/tables/*.csv``.

    Args:
        runs: run folders, or folders written by ``compare``.
        out: folder of the report; made if need be.

    Returns:
        The path of the page.

    Raises:
        UsageError: a path is no run folder, or there is none.
        ResourceError: the report cannot be written.
    """
    from groundstate.errors import ResourceError
    from groundstate.report.load import load
    from groundstate.report.page import render
    from groundstate.report.tables import csv_tables, write_csv, write_text

    study = load(runs)
    page = render(study)
    try:
        write_csv(csv_tables(study), Path(out) / "tables")
        return write_text(Path(out) / "report.html", page)
    except OSError as error:
        raise ResourceError(f"cannot write the report to {out}: {error.strerror}; give another folder") from None


def terminal_table(runs: Iterable[Path]) -> Table:
    """Returns the head of the report as a rich table, to be printed by the caller.

    Raises:
        UsageError: a path is no run folder, or there is none.
    """
    from groundstate.report.load import load
    from groundstate.report.tables import terminal

    return terminal(load(runs))


def headline(runs: Iterable[Path]) -> list[dict[str, object]]:
    """Returns the head of the report as plain JSON values: one object per energy, ``None`` where there is no number.

    Raises:
        UsageError: a path is no run folder, or there is none.
    """
    import math

    from groundstate.report.load import load
    from groundstate.report.tables import csv_tables

    header, *lines = csv_tables(load(runs))["summary"]

    def value(cell: object) -> object:
        return None if cell == "" or (isinstance(cell, float) and not math.isfinite(cell)) else cell

    return [{str(key): value(cell) for key, cell in zip(header, line)} for line in lines]
