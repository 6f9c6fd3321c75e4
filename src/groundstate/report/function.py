"""What the networks of a study do to their inputs: the ``function`` part of the summaries, as numbers to show.

Runs from before this part existed, or whose networks it does not apply to, take no part; where no run has it, nothing
is shown of it. As it comes from files, every value may be missing or of another kind.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from groundstate.report import statistics
from groundstate.report.load import Group, Run, Study
from groundstate.report.text import number, plain, plus_minus

Rows = list[Sequence[object]]


@dataclass(frozen=True)
class Column:
    """A column of a table of the function.

    Attributes:
        title: its head.
        path: where the number is below ``function`` in a summary.
        over: the head above it, shared by neighbors.
        factor: 100 for a percentage.
    """

    title: str
    path: tuple[str, ...]
    over: str
    factor: float = 1.0


_OF_J, _PREDICTED, _OUTLIERS = "the Jacobian J of the logits", "predicted probabilities", "AUROC of the entropy, %"
_JACOBIAN = (
    Column("Dirichlet energy", ("energies", "dirichlet", "value"), _OF_J),
    Column("nuclear norm", ("energies", "jacobian_nuclear", "value"), _OF_J),
    Column("spectral norm", ("energies", "jacobian_spectral", "value"), _OF_J),
    Column("stable rank", ("spectrum", "stable_rank"), _OF_J),
    Column("effective rank", ("spectrum", "effective_rank"), _OF_J),
    Column("s₂ / s₁", ("spectrum", "second"), _OF_J),
)
_PROBABILITIES = (
    Column("negative log-likelihood", ("calibration", "nll"), _PREDICTED),
    Column("ECE, %", ("calibration", "ece"), _PREDICTED, 100.0),
    Column("ECE scaled, %", ("calibration", "ece_scaled"), _PREDICTED, 100.0),
)
_RATIOS = ("product", "half_sum")


@dataclass(frozen=True)
class Panel:
    """One table: its heads, those above them with the number of columns of each, and the cells of every group."""

    over: tuple[tuple[str, int], ...]
    columns: tuple[str, ...]
    cells: list[list[str]]


def has_function(study: Study) -> bool:
    """Says whether any run has numbers of the function."""
    return bool(study.keys("function"))


def panels(study: Study) -> list[Panel]:
    """Returns the tables of the Jacobian and of the probabilities, mean ± standard deviation over seeds."""
    families = [Column(plain(f), ("outliers", f), _OUTLIERS, 100.0) for f in study.keys("function", "outliers")]
    made = []
    for columns in (_JACOBIAN, (*_PROBABILITIES, *families)):
        values = [[_over_seeds(group, column) for column in columns] for group in study.groups]
        kept = [i for i in range(len(columns)) if any(row[i].n for row in values)]
        if kept:
            cells = [[plus_minus(row[i].mean, row[i].std) for i in kept] for row in values]
            over = Counter(columns[i].over for i in kept)
            made.append(Panel(tuple(over.items()), tuple(columns[i].title for i in kept), cells))
    return made


def _over_seeds(group: Group, column: Column) -> statistics.Sample:
    values = group.by_seed("function", *column.path).values()
    return statistics.sample([column.factor * v for v in values])


def samples(study: Study) -> list[int]:
    """Returns on how many samples the numbers rest."""
    counts = {run.value("function", "samples") for group in study.groups for run in group.runs}
    return sorted(int(c) for c in counts if math.isfinite(c))


def notes(study: Study) -> list[str]:
    """Returns what the runs say is absent, each once."""
    found: dict[str, None] = {}
    for run in _runs(study):
        given = _node(run, "notes")
        found.update(dict.fromkeys(plain(n) for n in given) if isinstance(given, list) else {})
    return list(found)


# ---------------------------------------------------------------------- curves and cuts, for figures


def curve(study: Study, part: Sequence[str], key: str) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns the radii of a curve and its values by group, each (seeds, radii), without seeds that have others.

    Args:
        study: the study.
        part: where the lists are, e.g. ``("robustness", "l2")``.
        key: which list.
    """
    shares = next((s for run in _runs(study) if len(s := _numbers(run, *part, "share"))), np.zeros(0))
    radii: list[np.ndarray] = []
    stacks: list[np.ndarray] = []
    for group in study.groups:
        found = []
        for run in group.runs:
            values, epsilon = _numbers(run, *part, key), _numbers(run, *part, "epsilon")
            fits = len(values) == len(epsilon) == len(shares) and np.array_equal(_numbers(run, *part, "share"), shares)
            if len(shares) and fits and np.isfinite([values, epsilon]).all():
                found.append(values)
                radii.append(epsilon)
        stacks.append(np.array(found).reshape(len(found), len(shares)))
    return np.mean(radii, axis=0) if radii else np.zeros(0), stacks


@dataclass(frozen=True)
class CutRow:
    """One cut: its label, and by bound how many times too large it is, as a list of seeds for every group."""

    label: str
    times: dict[str, list[list[float]]]


def cuts(study: Study) -> list[CutRow]:
    """Returns the cuts of the networks in the order of the forward pass."""
    known: dict[tuple[str, str], None] = {}
    for run in _runs(study):
        known.update(dict.fromkeys((str(c.get("name")), str(c.get("kind"))) for c in _cuts(run)))
    rows = []
    for name, kind in known:
        times: dict[str, list[list[float]]] = {ratio: [] for ratio in _RATIOS}
        for group in study.groups:
            mine = [
                c for run in group.runs for c in _cuts(run) if (str(c.get("name")), str(c.get("kind"))) == (name, kind)
            ]
            for ratio in _RATIOS:
                values = [number(c.get(f"{ratio}/nuclear")) for c in mine]
                times[ratio].append([v for v in values if math.isfinite(v)])
        if any(seeds for groups in times.values() for seeds in groups):
            rows.append(CutRow(f"after {plain(name, 24)} ({plain(kind, 16)})", times))
    return rows


# ---------------------------------------------------------------------- every number, for CSV files


def csv_tables(study: Study) -> dict[str, Rows]:
    """Returns the tables function, robustness, alignment and cuts; one without a number is absent."""
    made: dict[str, Rows] = {
        "function": [("energy", "seed", "part", "figure", "value", "standard_error")],
        "robustness": [("energy", "seed", "norm", "share", "radius", "accuracy")],
        "alignment": [("energy", "seed", "share", "radius", "theorem", "logits", "cross_entropy")],
        "cuts": [("energy", "seed", "cut", "layer", "width", *_CUT_FIGURES)],
    }
    for group in study.groups:
        for run in group.runs:
            start = (group.label, run.seed)
            made["function"] += [(*start, *line) for line in _figures(run)]
            for norm in _mapping(run, "robustness"):
                lists = [_numbers(run, "robustness", norm, key) for key in ("share", "epsilon", "accuracy")]
                made["robustness"] += [(*start, norm, *map(float, line)) for line in zip(*lists)]
            keys = ("share", "epsilon", "theorem", "logits", "cross_entropy")
            lists = [_numbers(run, "alignment", key) for key in keys]
            made["alignment"] += [(*start, *map(float, line)) for line in zip(*lists)]
            for cut in _cuts(run):
                what = (str(cut.get("name")), str(cut.get("kind")), number(cut.get("width")))
                made["cuts"].append((*start, *what, *(number(cut.get(key)) for key in _CUT_FIGURES)))
    return {name: rows for name, rows in made.items() if len(rows) > 1}


_CUT_FIGURES = (
    *("nuclear", "product", "half_sum", "frobenius_g", "frobenius_h", "product/nuclear", "half_sum/nuclear"),
    "draws",
)


def _figures(run: Run) -> Iterator[tuple[str, str, float, float]]:
    for spec in _mapping(run, "energies"):
        path = ("function", "energies", spec)
        yield "energies", spec, run.value(*path, "value"), run.value(*path, "standard_error")
    for part in ("spectrum", "calibration", "outliers"):
        for name in _mapping(run, part):
            yield part, name, run.value("function", part, name), math.nan


# ---------------------------------------------------------------------- reading


def _runs(study: Study) -> Iterator[Run]:
    return (run for group in study.groups for run in group.runs)


def _node(run: Run, *keys: str) -> Any:
    node: Any = run.summary.get("function")
    for key in keys:
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _mapping(run: Run, key: str) -> Mapping[str, Any]:
    node = _node(run, key)
    return node if isinstance(node, Mapping) else {}


def _numbers(run: Run, *keys: str) -> np.ndarray:
    node = _node(run, *keys)
    return np.array([number(v) for v in node] if isinstance(node, list) else [], dtype=float)


def _cuts(run: Run) -> list[Mapping[str, Any]]:
    node = _node(run, "cuts")
    return [c for c in node if isinstance(c, Mapping)] if isinstance(node, list) else []
