"""Every number of a report as CSV files, and its head as a table for the terminal."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from groundstate.report import function, summary
from groundstate.report.load import Study, compression_points
from groundstate.report.text import csv_cell, number

if TYPE_CHECKING:
    from rich.table import Table

Rows = list[Sequence[object]]


_SUMMARY_COLUMNS = (
    *("energy", "reference", "seeds", "seeds_expected"),
    *("test_accuracy_mean", "test_accuracy_std", "test_accuracy_low", "test_accuracy_high"),
    *("pairs", "difference_mean", "difference_low", "difference_high"),
    *("p_paired_t", "p_paired_t_holm", "p_wilcoxon", "p_wilcoxon_holm", "effect_dz", "verdict"),
    *("tolerance", "size_ratio", "rank_sum", "test_accuracy_compressed", "step_ms", "step_ratio"),
)


def csv_tables(study: Study) -> dict[str, Rows]:
    """Returns every table by file name without ``.csv``; the first row of each is its header.

    The tables of the function are there only where a run has numbers for them.
    """
    return {
        "summary": _summary(study),
        "energies": _energies(study),
        "runs": _runs(study),
        "curves": _curves(study),
        "spectra": _spectra(study),
        "compression": _compression(study),
        **function.csv_tables(study),
        "problems": [("where", "what"), *((p.where, p.what) for p in study.problems)],
    }


def write_csv(tables: dict[str, Rows], folder: Path) -> list[Path]:
    """Writes the tables into ``folder`` (text neutralized for spreadsheets) and returns the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, lines in tables.items():
        stream = io.StringIO(newline="")
        csv.writer(stream, lineterminator="\n").writerows([csv_cell(c) for c in line] for line in lines)
        paths.append(write_text(folder / f"{name}.csv", stream.getvalue()))
    return paths


def write_text(path: Path, text: str) -> Path:
    """Writes a file as a whole: whoever opens it sees the old or the new one."""
    aside = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        aside.write_text(text, encoding="utf-8")
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)
    return path


def terminal(study: Study) -> Table:
    """Returns the head table for rich; labels are escaped, so that they cannot carry markup."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    cut = summary.tolerance(study)
    table = Table(title=escape(study.title) or None, box=box.SIMPLE_HEAD, title_justify="left")
    size = "size" if math.isnan(cut) else f"size at {cut:g}"
    columns = {
        "energy": "energy",
        "seeds": "seeds",
        "accuracy": "test accuracy %",
        "difference": "difference, points",
        "p_t": "p (t)",
        "p_w": "p (Wilcoxon)",
        "verdict": "verdict",
        "size": size,
        "ratio": "step",
    }
    for key, title in columns.items():
        table.add_column(title, justify="left" if key in ("energy", "verdict") else "right", overflow="fold")
    for row in summary.rows(study):
        cells = summary.cells(row, study.expected_seeds)
        table.add_row(*(escape(cells[key]) for key in columns))
    if study.problems:
        n = len(study.problems)
        table.caption = f"{n} remark{'s' if n > 1 else ''}: see the report"
    return table


def _summary(study: Study) -> Rows:
    cut = summary.tolerance(study)
    lines: Rows = [_SUMMARY_COLUMNS]
    for row in summary.rows(study):
        c, a = row.comparison, row.accuracy
        compared: Sequence[object] = [""] * 9
        if c is not None:
            d = c.difference
            compared = [
                d.n,
                d.mean,
                d.low,
                d.high,
                c.p_t,
                c.p_t_adjusted,
                c.p_wilcoxon,
                c.p_wilcoxon_adjusted,
                c.effect,
            ]
        first = [row.group.label, int(row.group.is_reference), len(row.group.runs), study.expected_seeds]
        cost = [row.step_ms, row.step_ratio]
        compact = [cut, row.size.mean, row.rank.mean, row.accuracy_compressed.mean]
        lines.append([*first, a.mean, a.std, a.low, a.high, *compared, row.verdict, *compact, *cost])
    return lines


def _energies(study: Study) -> Rows:
    lines: Rows = [("energy", "measured", "seeds", "mean", "std", "low", "high", "ratio_to_reference")]
    for row in summary.rows(study):
        for name, (s, ratio) in row.energies.items():
            lines.append((row.group.label, name, s.n, s.mean, s.std, s.low, s.high, ratio))
    return lines


def _runs(study: Study) -> Rows:
    plain_keys = (
        "test_accuracy",
        "test_loss",
        "val_accuracy",
        "val_loss",
        "train_loss",
        "parameters",
        "epochs",
        "steps",
    )
    names, path_keys, layers = study.keys("energies"), study.keys("path"), study.keys("ranks")
    header = ["energy", "seed", "run", *plain_keys, "step_ms", "seconds"]
    header += [f"final_{n}" for n in names] + [f"path_{k}" for k in path_keys] + [f"rank_{x}" for x in layers]
    kept = study.keys("kept")
    header += [f"decompositions_{k}" for k in kept]
    lines: Rows = [header]
    for group in study.groups:
        for run in group.runs:
            line: list[object] = [group.label, run.seed, run.name]
            line += [run.value(k) for k in plain_keys] + [run.value("step_ms", "median"), run.value("seconds")]
            line += [run.value("energies", n) for n in names] + [run.value("path", k) for k in path_keys]
            line += [run.value("ranks", x) for x in layers]
            lines.append(line + [run.value("kept", k, "decompositions") for k in kept])
    return lines


def _flat(entry: Any, prefix: str = "") -> Iterator[tuple[str, float]]:
    for key, value in entry.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}_")
        elif key not in ("kind", "epoch"):
            yield prefix + str(key), number(value)


def _curves(study: Study) -> Rows:
    flat = [
        (group.label, run.seed, entry["epoch"], dict(_flat(entry)))
        for group in study.groups
        for run in group.runs
        for entry in run.epochs
    ]
    columns = list(dict.fromkeys(key for *_, values in flat for key in values))
    lines: Rows = [("energy", "seed", "epoch", *columns)]
    lines += [(*first, *(values.get(c) for c in columns)) for *first, values in flat]
    return lines


def _spectra(study: Study) -> Rows:
    lines: Rows = [("energy", "seed", "layer", "when", "index", "singular_value")]
    for group in study.groups:
        for run in group.runs:
            for kind, when in (("spectra_initial", "before"), ("spectra", "after")):
                for layer, values in (run.summary.get(kind) or {}).items():
                    lines += [(group.label, run.seed, layer, when, i, number(v)) for i, v in enumerate(values, start=1)]
    return lines


def _compression(study: Study) -> Rows:
    lines: Rows = [("energy", "seed", "tolerance", "size_ratio", "rank_sum", "test_accuracy")]
    for group in study.groups:
        for cut, points in compression_points(group).items():
            lines += [(group.label, seed, cut, size, rank, accuracy) for seed, size, rank, accuracy in points]
    return lines
