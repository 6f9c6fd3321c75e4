"""The numbers at the head of a report: one row per energy, compared with the reference seed by seed."""

from __future__ import annotations

import math
from dataclasses import dataclass

from groundstate.report import statistics
from groundstate.report.load import Group, Study, compression_points
from groundstate.report.statistics import Paired, Sample
from groundstate.report.text import TIMES, p_value, show

HEADLINE_TOLERANCE = 0.05


@dataclass(frozen=True)
class Row:
    """What one energy did.

    Attributes:
        group: the runs behind the numbers.
        accuracy: test accuracy as a fraction.
        comparison: paired comparison of the test accuracy with the reference (None for the reference itself).
        verdict: what the comparison allows to say.
        size: factorized parameters at ``tolerance`` as a fraction of the dense ones.
        rank: sum of the ranks of all layers at ``tolerance``.
        accuracy_compressed: test accuracy at ``tolerance``.
        step_ms: median time of a training step in milliseconds.
        step_ratio: ``step_ms`` over that of the reference.
        energies: energies after training, without strengths, as (sample, ratio of means to the reference). Those of
            the function are measured on the test split in every run, where the runs have that.
    """

    group: Group
    accuracy: Sample
    comparison: Paired | None
    verdict: str
    size: Sample
    rank: Sample
    accuracy_compressed: Sample
    step_ms: float
    step_ratio: float
    energies: dict[str, tuple[Sample, float]]


def tolerance(study: Study) -> float:
    """Returns the tolerance of the head table: 0.05, or the nearest that the runs have (NaN for none)."""
    have = {t for g in study.groups for t in compression_points(g)}
    return min(have, key=lambda t: (abs(t - HEADLINE_TOLERANCE), t), default=math.nan)


def rows(study: Study) -> list[Row]:
    """Returns one row per group, the reference first; Holm's correction runs over all comparisons of the table."""
    reference = study.reference
    if reference is None:
        return []
    others = [g for g in study.groups if not g.is_reference]
    base = reference.by_seed("test_accuracy")
    compared = statistics.adjust([statistics.paired(g.by_seed("test_accuracy"), base) for g in others])
    by_label = {g.label: c for g, c in zip(others, compared)}
    cut = tolerance(study)
    names = _energies(study)
    base_ms = _median(reference)
    base_energies = {n: statistics.sample(list(reference.by_seed(*path).values())) for n, path in names.items()}
    found = []
    for group in study.groups:
        comparison = by_label.get(group.label)
        points = compression_points(group).get(cut, [])
        finals = {n: statistics.sample(list(group.by_seed(*path).values())) for n, path in names.items()}
        ms = _median(group)
        found.append(
            Row(
                group=group,
                accuracy=statistics.sample(list(group.by_seed("test_accuracy").values())),
                comparison=comparison,
                verdict="reference" if comparison is None else statistics.verdict(comparison),
                size=statistics.sample([p[1] for p in points]),
                rank=statistics.sample([p[2] for p in points]),
                accuracy_compressed=statistics.sample([p[3] for p in points]),
                step_ms=ms,
                step_ratio=_ratio(ms, base_ms),
                energies={n: (s, _ratio(s.mean, base_energies[n].mean)) for n, s in finals.items()},
            )
        )
    return found


def _energies(study: Study) -> dict[str, tuple[str, ...]]:
    """Returns where each energy is in a summary: those that were monitored, and those of the function in use."""
    of_function = study.keys("function", "energies")
    names = {name: ("energies", name) for name in study.keys("energies")}
    used = [n for n in of_function if n in names or any(n in group.energy for group in study.groups)]
    return names | {n: ("function", "energies", n, "value") for n in used}


def _median(group: Group) -> float:
    values = [v for v in group.by_seed("step_ms", "median").values() if math.isfinite(v)]
    return sorted(values)[len(values) // 2] if len(values) % 2 else _mean_of_middle(values)


def _mean_of_middle(values: list[float]) -> float:
    if not values:
        return math.nan
    middle = sorted(values)[len(values) // 2 - 1 : len(values) // 2 + 1]
    return sum(middle) / 2


def _ratio(value: float, base: float) -> float:
    return value / base if base else math.nan


def percent(found: Sample, signed: bool = False) -> str:
    """Returns a mean in percent with the half width of its interval.

    >>> percent(statistics.sample([0.9, 0.92, 0.94]))
    '92.00 ± 4.97'
    >>> percent(statistics.sample([0.9]))
    '90.00'
    """
    if found.n == 0 or math.isnan(found.mean):
        return "n/a"
    mean = _signed(100 * found.mean) if signed else f"{100 * found.mean:.2f}"
    return mean if math.isnan(found.half_width) else f"{mean} ± {100 * found.half_width:.2f}"


def cells(row: Row, expected: int | None) -> dict[str, str]:
    """Returns the head table's cells of a row as text, by column."""
    c = row.comparison
    n = len(row.group.runs)
    return {
        "energy": row.group.label,
        "seeds": str(n) if expected is None or expected == n else f"{n} of {expected}",
        "accuracy": percent(row.accuracy),
        "difference": "" if c is None else percent(c.difference, signed=True),
        "p_t": "" if c is None else p_value(c.p_t_adjusted),
        "p_w": "" if c is None else p_value(c.p_wilcoxon_adjusted),
        "effect": "" if c is None else _signed(c.effect),
        "verdict": row.verdict,
        "size": "n/a" if math.isnan(row.size.mean) else f"{100 * row.size.mean:.0f} %",
        "rank": show(row.rank.mean),
        "accuracy_compressed": percent(row.accuracy_compressed),
        "step": f"{show(row.step_ms)} ms" if math.isfinite(row.step_ms) else "n/a",
        "ratio": f"{row.step_ratio:.2f}{TIMES}" if math.isfinite(row.step_ratio) else "n/a",
    }


def _signed(value: float) -> str:
    if math.isnan(value):
        return "n/a"
    return "0.00" if abs(value) < 0.005 else f"{value:+.2f}"


def sentence(row: Row, cut: float) -> str:
    """Says in one sentence what an energy did to accuracy, to the energies, to the size, and at what cost."""
    c = row.comparison
    if c is None:
        return ""
    d = c.difference
    parts = []
    if d.n:
        interval = "" if math.isnan(d.low) else f" [{_signed(100 * d.low)}, {_signed(100 * d.high)}]"
        parts.append(f"test accuracy {_signed(100 * d.mean)} points{interval}, {row.verdict}")
    name = _minimized(row)
    if name is not None:
        parts.append(f"{name} energy {show(row.energies[name][1])}{TIMES} the reference's")
    if math.isfinite(row.size.mean):
        parts.append(f"{100 * row.size.mean:.0f} % of the dense parameters at tolerance {cut:g}")
    if math.isfinite(row.step_ratio):
        parts.append(f"a step takes {row.step_ratio:.2f}{TIMES} the time")
    return "; ".join(parts) + "."


def _minimized(row: Row) -> str | None:
    """Returns the measured energy that the run minimized, or else the one that changed most."""
    known = {n: r for n, (_, r) in row.energies.items() if math.isfinite(r) and r > 0}
    own = [n for n in known if n in row.group.energy]
    return max(own, key=len) if own else max(known, key=lambda n: abs(math.log(known[n])), default=None)
