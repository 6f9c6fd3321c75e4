"""One self-contained HTML page from a study: numbers first, then the figures, then where all of it comes from."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from groundstate.report import function, summary
from groundstate.report.figures import all_pictures
from groundstate.report.figures_function import function_pictures
from groundstate.report.load import Study
from groundstate.report.style import looks
from groundstate.report.tables import csv_tables
from groundstate.report.text import TIMES, plain, show


def render(study: Study) -> str:
    """Returns the page; every text from the runs is escaped, and no resource outside the page is named."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("groundstate.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    found = summary.rows(study)
    cut = summary.tolerance(study)
    pictures = [(p, Markup(p.svg)) for p in all_pictures(study)]
    return environment.get_template("report.html.j2").render(
        title=study.title or "runs",
        rows=[
            {
                "cells": summary.cells(row, study.expected_seeds),
                "color": look.css,
                "reference": row.group.is_reference,
                "sentence": summary.sentence(row, cut),
                "energies": [(show(s.mean), _times(ratio)) for s, ratio in row.energies.values()],
            }
            for row, look in zip(found, looks(study))
        ],
        energy_names=[plain(n).split("_") for n in (found[0].energies if found else ())],
        tolerance=None if math.isnan(cut) else f"{cut:g}",
        reference=study.reference.label if study.reference else None,
        corrected=len(found) > 2,
        few=any(len(r.group.runs) < 5 for r in found),
        pictures=pictures,
        function=_function(study),
        function_pictures=[(p, Markup(p.svg)) for p in function_pictures(study)],
        files=list(csv_tables(study)),
        problems=study.problems,
        runs=_runs(study),
        provenance=_provenance(study),
        settings=[(plain(k), _text(v)) for k, v in study.settings.items() if k != "seed"],
    )


def _function(study: Study) -> dict[str, Any] | None:
    """Returns what the section on the function shows, or None where no run has any of it."""
    if not function.has_function(study):
        return None
    return {
        "samples": " or ".join(map(str, function.samples(study))) or "some",
        "panels": function.panels(study),
        "notes": function.notes(study),
    }


def _times(ratio: float) -> str:
    return f"{show(ratio)}{TIMES}" if math.isfinite(ratio) else "n/a"


def _text(value: object) -> str:
    return plain(value if isinstance(value, str) else json.dumps(value, default=str))


def _runs(study: Study) -> list[dict[str, str]]:
    """Returns every run that is done as a line of text cells."""
    lines = []
    for group in study.groups:
        for run in group.runs:
            lines.append(
                {
                    "energy": group.label,
                    "seed": str(run.seed),
                    "test": _percent(run.value("test_accuracy")),
                    "val": _percent(run.value("val_accuracy")),
                    "loss": show(run.value("train_loss")),
                    "path": show(run.value("path", "path_energy")),
                    "straightness": show(run.value("path", "straightness")),
                    "step": show(run.value("step_ms", "median")),
                    "seconds": show(run.value("seconds")),
                }
            )
    return lines


def _percent(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{100 * value:.2f}"


def _provenance(study: Study) -> list[tuple[str, list[str]]]:
    """Returns (what, the different values found in the runs)."""
    seen: dict[str, dict[str, None]] = {}
    for manifest in study.manifests:
        for key in ("versions", "git", "threads", "data_sha256", "platform", "cpu", "command"):
            if manifest.get(key) is not None:
                seen.setdefault(key, {})[_flat_text(key, manifest[key])] = None
    names = {"data_sha256": "data (sha256)", "git": "git revision", "command": "command"}
    found = [(names.get(k, k), list(v)) for k, v in seen.items()]
    created = sorted(plain(m["created"]) for m in study.manifests if m.get("created"))
    if created:
        found.append(("created", [created[0] if created[0] == created[-1] else f"{created[0]} to {created[-1]}"]))
    seeds = sorted({run.seed for g in study.groups for run in g.runs})
    found.append(("seeds", [", ".join(map(str, seeds)) or "none"]))
    return found


def _flat_text(key: str, value: object) -> str:
    if key == "command" and isinstance(value, list):
        import shlex

        return plain(shlex.join(str(v) for v in value), 1000)
    if isinstance(value, Mapping):
        return ", ".join(plain(f"{k} {_inner(v)}") for k, v in value.items())
    return _text(value)


def _inner(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)
