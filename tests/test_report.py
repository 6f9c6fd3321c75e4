"""The report reads run folders only: synthetic folders with known numbers, damaged ones, and hostile text."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from groundstate import report
from groundstate.errors import DataError, ResourceError, UsageError
from groundstate.report import function, summary
from groundstate.report.figures_function import function_pictures
from groundstate.report.load import load, read_json
from groundstate.report.page import render
from groundstate.report.tables import csv_tables, write_csv
from groundstate.report.text import csv_cell, figure_label, number, plain, plus_minus, show

LAYERS = {"0.weight": (32, 64), "2.weight": (10, 32)}
SPECS = ("none", "0.001*nuclear", "0.01*nuclear", "0.001*l1", "0.001*graph")


def write_run(
    folder: Path, energy: str, seed: int, strength: float, rng: np.random.Generator, epochs: int = 10
) -> Path:
    """Writes a run folder whose numbers look like training: stronger energies shrink the spectra and the path."""
    folder.mkdir(parents=True)
    config = {"energy": energy, "seed": seed, "epochs": epochs, "data": "digits", "model": "mlp:64-32-10"}
    config |= {"optimizer": "sgd", "lr": 0.1, "coupling": "grad", "threads": 1}
    manifest = {"schema": 1, "config": config, "versions": {"torch": "2.13.0", "python": "3.11.4"}, "threads": 1}
    manifest |= {"data_sha256": {"digits": "ab" * 32}, "command": ["groundstate", "train", "--energy", energy]}
    write_json(folder / "run.json", manifest | {"created": f"2025-01-0{seed + 1}T00:00:00Z", "git": None})
    initial = {k: spectrum(shape, 0.0, rng) for k, shape in LAYERS.items()}
    final = {k: spectrum(shape, strength, rng) for k, shape in LAYERS.items()}
    lines, total, length = [], 0.0, 0.0
    for epoch in range(epochs + 1):
        x = epoch / epochs
        speed = (1.4 - 0.7 * strength) * math.exp(-2 * x) + 0.02 * rng.random()
        total, length = total + 12 * speed**2, length + 3 * speed
        displacement = 0.4 * length * (1 - 0.3 * x)
        path = {"path_energy": 20 * total, "length": length, "displacement": displacement, "steps": 12 * epoch}
        path |= {"straightness": displacement**2 / (40 * total), "tortuosity_squared": (displacement / length) ** 2}
        path |= {"speed_uniformity": length**2 / (40 * total)}
        nuclear = (1 - x) * 40 + x * sum(map(sum, final.values()))
        loss = 2.3 * math.exp(-4 * x) + 0.02 + 0.05 * strength + 0.01 * rng.random()
        entry: dict[str, Any] = {"kind": "epoch", "epoch": epoch, "step": 12 * epoch, "lr": 0.1, "seconds": 0.1 * epoch}
        entry |= {"train_loss": loss if epoch else None, "train_accuracy": 1 - loss / 3 if epoch else None}
        entry |= {"val_loss": loss + 0.1, "val_accuracy": 0.97 - 0.3 * loss, "path": path}
        entry["energies"] = {"nuclear": nuclear, "squared_frobenius": nuclear**1.2, "graph": 1.8 * nuclear}
        lines.append(json.dumps(entry))
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    accuracy = round((0.96 + 0.01 * strength) * 360 + 3 * rng.standard_normal()) / 360
    last = json.loads(lines[-1])
    done = {"schema": 1, "status": "done", "epochs": epochs, "steps": 12 * epochs, "test_accuracy": accuracy}
    done |= {"test_loss": 0.12, "val_accuracy": 0.96, "val_loss": 0.13, "train_loss": last["train_loss"]}
    done |= {"energies": last["energies"], "path": last["path"], "spectra_initial": initial, "spectra": final}
    done |= {"ranks": {k: len(v) for k, v in final.items()}, "parameters": 2368, "seconds": 1.5}
    done |= {
        "step_ms": {"median": 0.4 + 0.3 * strength + 0.02 * rng.random()},
        "compression": truncations(final, accuracy),
    }
    write_json(folder / "summary.json", done)
    return folder


def spectrum(shape: tuple[int, int], strength: float, rng: np.random.Generator) -> list[float]:
    r = min(shape)
    values = 2.0 * np.exp(-(0.5 + 4 * strength) * np.arange(r) / 8) * (1 + 0.1 * rng.random(r))
    return sorted(values.tolist(), reverse=True)


def truncations(spectra: dict[str, list[float]], accuracy: float) -> list[dict[str, Any]]:
    found = []
    for tolerance in (0, 0.01, 0.02, 0.05, 0.1, 0.2):
        ranks = {k: sum(v >= tolerance * s[0] for v in s) for k, s in spectra.items()}
        parameters = sum(min(m * n, ranks[k] * (m + n)) for k, (m, n) in LAYERS.items())
        entry = {"tolerance": tolerance, "parameters": parameters, "ratio": parameters / 2368, "ranks": ranks}
        found.append(entry | {"test_accuracy": accuracy - 0.4 * tolerance**2})
    return found


def function_of(strength: float, rng: np.random.Generator) -> dict[str, Any]:
    """Returns the ``function`` part of a summary: stronger energies make the network flatter and more robust."""
    flat = math.exp(-strength) * (1 + 0.02 * rng.random())
    energies = {"dirichlet": 180 * flat**2, "jacobian_nuclear": 34 * flat, "jacobian_spectral": 8 * flat}
    estimates = {
        k: {"value": v, "standard_error": v / 50, "samples": 360, "how": "", "details": {}} for k, v in energies.items()
    }
    shares = [0.0, 0.02, 0.1, 0.3]
    curves = {
        norm: {
            "share": shares,
            "epsilon": [size * s for s in shares],
            "accuracy": [0.96 - (1.5 - 0.5 * strength) * s + 0.01 * rng.random() for s in shares],
        }
        for norm, size in (("l2", 5.7), ("linf", 1.0))
    }
    aligned = {"share": [0.001, *shares[1:]], "epsilon": [5.7 * s for s in (0.001, *shares[1:])]}
    aligned |= {key: [level - 0.1 * s for s in aligned["share"]] for key, level in LEVELS.items()}
    cut = {"nuclear": 34 * flat, "frobenius_g": 6.4, "frobenius_h": 6.5, "product": 42.0, "half_sum": 43.0}
    cut |= {"product/nuclear": 1.25 + 0.01 * rng.random(), "half_sum/nuclear": 1.3 + strength / 10}
    wide = {"name": "2", "kind": "Linear", "width": 9000, "half_sum": 50.0, "nuclear": 34.0, "half_sum/nuclear": 1.5}
    return {
        "samples": 360,
        "energies": estimates,
        "spectrum": {
            "s_1": 8 * flat,
            "s_r": 0.2,
            "rank": 10.0,
            "stable_rank": 2.9,
            "effective_rank": 6.5,
            "second": 0.8,
        },
        "cuts": [{"name": "0", "kind": "Linear", "width": 32} | cut, wide | {"draws": 8}],
        "robustness": curves,
        "alignment": aligned,
        "calibration": {
            "nll": 0.2,
            "ece": 0.03,
            "ece_scaled": 0.02,
            "temperature": 1.2,
            "brier": 0.05,
            "accuracy": 0.95,
        },
        "outliers": {"uniform": 0.97, "rotated": 0.7 + 0.1 * strength},
        "notes": ["alignment: left out: an example"] if strength == 0 else [],
    }


LEVELS = {"theorem": 0.99, "logits": 0.8, "cross_entropy": 0.45}


def add_function(out: Path, only: tuple[int, ...] | None = None) -> Path:
    """Adds the part to the runs of a comparison (of the given cells alone)."""
    rng = np.random.default_rng(11)
    for folder in sorted((out / "runs").iterdir()):
        cell = int(folder.name[4])
        if only is None or cell in only:
            done = read_json(folder / "summary.json")
            write_json(folder / "summary.json", done | {"function": function_of(cell / 4, rng)})
    return out


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value))


def write_compare(out: Path, specs: tuple[str, ...] = SPECS, seeds: int = 5, epochs: int = 10) -> Path:
    rng = np.random.default_rng(7)
    out.mkdir(parents=True, exist_ok=True)
    for i, spec in enumerate(specs):
        for seed in range(seeds):
            write_run(out / "runs" / f"cell{i}-seed{seed}", spec, seed, i / 4, rng, epochs)
    plan = {"schema": 1, "energies": list(specs), "labels": list(specs), "seeds": list(range(seeds)), "config": {}}
    write_json(out / "compare.json", plan)
    return out


class Page(HTMLParser):
    """Collects the tags, ids and outside references of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.links: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for key, value in attrs:
            if key == "id":
                self.ids.append(str(value))
            if key in ("src", "href", "xlink:href"):
                self.links.append(str(value))
            assert not key.startswith("on"), (tag, key)


@pytest.fixture(scope="module")
def compare(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_compare(tmp_path_factory.mktemp("study") / "out")


@pytest.fixture(scope="module")
def html(compare: Path) -> str:
    return report.build([compare], compare).read_text(encoding="utf-8")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_page_is_self_contained_and_small(html: str) -> None:
    page = Page(html)
    assert len(html.encode()) < 1_000_000
    assert page.tags.count("svg") == 7
    assert not {"script", "link", "iframe", "object", "img"} & set(page.tags)
    assert page.links
    assert all(link.startswith("#") for link in page.links)
    assert "url(http" not in html
    assert "@import" not in html
    assert not re.search(r"\bnan\b", html, flags=re.IGNORECASE)


def test_ids_are_unique_and_references_resolve(html: str) -> None:
    page = Page(html)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]*)\)", html)) <= set(page.ids)


def test_every_figure_is_well_formed_xml_without_scripts(html: str) -> None:
    for text in re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL):
        tags = {str(e.tag).rpartition("}")[2] for e in ElementTree.fromstring(text).iter()}
        assert tags <= {"svg", "defs", "style", "g", "path", "use", "text", "tspan", "clipPath", "rect", "title"}


def test_same_runs_give_the_same_bytes(compare: Path, html: str, tmp_path: Path) -> None:
    assert report.build([compare], tmp_path).read_text(encoding="utf-8") == html


def test_csv_holds_the_numbers_of_the_runs(compare: Path, html: str) -> None:
    head = rows_of(compare / "tables" / "summary.csv")
    assert [r["energy"] for r in head] == list(SPECS)
    for i, row in enumerate(head):
        values = [read_json(compare / "runs" / f"cell{i}-seed{k}" / "summary.json")["test_accuracy"] for k in range(5)]
        assert math.isclose(float(row["test_accuracy_mean"]), float(np.mean(values)), rel_tol=1e-14)  # a sum of five
    assert len(rows_of(compare / "tables" / "runs.csv")) == 25
    assert len(rows_of(compare / "tables" / "curves.csv")) == 25 * 11
    assert len(rows_of(compare / "tables" / "spectra.csv")) == 25 * 2 * (32 + 10)
    assert len(rows_of(compare / "tables" / "compression.csv")) == 25 * 6
    energies = rows_of(compare / "tables" / "energies.csv")
    assert {r["measured"] for r in energies} == {"nuclear", "squared_frobenius", "graph"}
    assert "0.01*nuclear" in html


def test_differences_are_paired_by_seed(compare: Path) -> None:
    row = summary.rows(load([compare]))[2]
    assert row.comparison is not None
    by = [
        [read_json(compare / "runs" / f"cell{i}-seed{k}" / "summary.json")["test_accuracy"] for k in range(5)]
        for i in (2, 0)
    ]
    from scipy.stats import ttest_rel

    assert math.isclose(row.comparison.p_t, float(ttest_rel(by[0], by[1]).pvalue), rel_tol=1e-6)  # snapped at 1e-12
    assert row.comparison.p_t_adjusted >= row.comparison.p_t


def test_reference_is_first_wherever_it_was_given(tmp_path: Path) -> None:
    out = write_compare(tmp_path / "out", ("0.001*nuclear", "none"), seeds=2)
    study = load([out])
    assert [g.label for g in study.groups] == ["none", "0.001*nuclear"]
    assert study.reference is not None
    assert study.reference.label == "none"


def test_one_seed_and_single_runs(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    runs = [write_run(tmp_path / f"r{i}", spec, 3, i / 2, rng) for i, spec in enumerate(SPECS[:2])]
    html = report.build(runs, tmp_path / "report").read_text(encoding="utf-8")
    assert "no verdict (1 of 5 pairs)" in html
    row = rows_of(tmp_path / "report" / "tables" / "summary.csv")[1]
    assert row["pairs"] == "1"
    assert row["test_accuracy_std"] == row["p_paired_t"] == row["difference_low"] == ""
    assert report.build(runs[:1], tmp_path / "single").is_file()


def test_identical_runs_raise_no_warning(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    for spec in ("none", "1e-9*nuclear"):
        for seed in range(5):
            folder = write_run(tmp_path / "out" / f"{spec[:4]}-{seed}", spec, seed, 0.0, rng)
            done = read_json(folder / "summary.json") | {"test_accuracy": 0.95}
            write_json(folder / "summary.json", done)
    html = report.build(sorted((tmp_path / "out").iterdir()), tmp_path / "r").read_text(encoding="utf-8")
    assert "identical" in html
    assert ">0.00 ± 0.00<" in html


def test_unfinished_damaged_and_missing_runs_are_listed_by_name(tmp_path: Path) -> None:
    out = write_compare(tmp_path / "out", SPECS[:2], seeds=5)
    runs = out / "runs"
    (runs / "cell0-seed1" / "summary.json").unlink()
    stopped = read_json(runs / "cell1-seed2" / "summary.json") | {"status": "failed", "reason": "the loss became NaN"}
    write_json(runs / "cell1-seed2" / "summary.json", stopped)
    (runs / "cell1-seed3" / "run.json").write_text('{"config": {')
    (runs / "cell1-seed4" / "run.json").write_text('{"config": {}, "config": {}}')
    for file in (runs / "cell0-seed4").iterdir():
        file.unlink()
    (runs / "cell0-seed4").rmdir()
    metrics = (runs / "cell0-seed0" / "metrics.jsonl").read_text().splitlines()
    metrics[3] = metrics[3][:40]
    (runs / "cell0-seed0" / "metrics.jsonl").write_text("\n".join(metrics) + '\n{"kind": "epo')
    html = report.build([out], tmp_path / "r").read_text(encoding="utf-8")
    listed = {(r["where"], r["what"]) for r in rows_of(tmp_path / "r" / "tables" / "problems.csv")}
    text = "\n".join(f"{where}: {what}" for where, what in sorted(listed))
    assert "cell0-seed1: unfinished (got to epoch 10 of 10)" in text
    assert "cell1-seed2: failed: the loss became NaN" in text
    assert "cell1-seed3: cannot read run.json" in text
    assert "cell1-seed4: cannot read run.json: a duplicated key" in text
    assert "none, seed 4: not started" in text
    assert "cell0-seed0: line 4 of metrics.jsonl is broken" in text
    assert text.count("metrics.jsonl") == 1  # the incomplete last line is what a killed run leaves: dropped silently
    for where, _ in listed:
        assert where in html
    assert ">3 of 5<" in html


def test_no_run_done_still_gives_a_page(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "none", 0, 0.0, np.random.default_rng(3))
    (folder / "summary.json").unlink()
    html = report.build([folder], tmp_path / "r").read_text(encoding="utf-8")
    assert "No run is done yet" in html
    assert "unfinished" in html


def test_runs_that_differ_in_more_than_energy_say_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)
    runs = [write_run(tmp_path / f"r{i}", "none", i, 0.0, rng) for i in range(2)]
    manifest = read_json(runs[1] / "run.json")
    manifest["config"] |= {"lr": 0.5}
    write_json(runs[1] / "run.json", manifest | {"threads": 4})
    study = load(runs)
    assert {g.label for g in study.groups} == {"none (lr=0.1)", "none (lr=0.5)"}
    said = " ".join(p.what for p in study.problems)
    assert "'lr'" in said
    assert "number of threads" in said


def test_resumed_epochs_count_once_and_the_later_line_wins(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "none", 0, 0.0, np.random.default_rng(5), epochs=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "epoch", "epoch": 2, "val_loss": 9.5}) + "\n")
    (run,) = load([folder]).groups[0].runs
    assert [e["epoch"] for e in run.epochs] == [0, 1, 2, 3]
    assert run.epochs[2]["val_loss"] == 9.5


def test_settings_that_an_energy_does_not_take_are_no_difference(tmp_path: Path) -> None:
    """The order is that of the comparison; an energy that is not known here is taken to take all."""
    rng = np.random.default_rng(15)
    given = {"0.001*nuclear": (4, "prox"), "path_energy": (1, "grad"), "none": (1, "grad"), "graph": (4, "grad")}
    for energy, (every, coupling) in given.items():
        at = write_run(tmp_path / "runs" / energy.replace("*", "-"), energy, 0, 0.0, rng, epochs=1) / "run.json"
        manifest = read_json(at)
        manifest["config"] |= {"every": every, "coupling": coupling}
        write_json(at, manifest)
    write_json(tmp_path / "compare.json", {"energies": ["none", *(e for e in given if e != "none")], "seeds": [0]})
    study = load([tmp_path])
    named = ["none", "0.001*nuclear (coupling=prox)", "path_energy (coupling=grad)", "graph (coupling=grad)"]
    assert [g.label for g in study.groups] == named
    assert [p.what for p in study.problems] == ["the runs differ in 'coupling', not only in their energy and seed"]
    assert study.settings["every"] == 4
    unknown = write_run(tmp_path / "runs" / "own", "energy_of_my_own", 0, 0.0, rng, epochs=1) / "run.json"
    write_json(unknown, {**read_json(unknown), "config": read_json(unknown)["config"] | {"every": 2}})
    assert [p.what for p in load([tmp_path]).problems if "every" in p.what]


def test_hostile_text_is_neutralized_everywhere(tmp_path: Path) -> None:
    rng = np.random.default_rng(6)
    evil = '=<script>alert("$x$")</script>\x1b[31m[red]\u202e_'
    runs = [write_run(tmp_path / f"r{i}", e, 0, 0.0, rng) for i, e in enumerate(("none", evil, "_hidden$\\foo$"))]
    done = read_json(runs[1] / "summary.json")
    layer = '"><svg onload=alert(1)>$\\frac$'
    done["spectra"] = {layer: [3.0, 1.0, 0.0]}
    done["energies"] = {'<img src="http://x/y">': 2.0}
    write_json(runs[1] / "summary.json", done)
    manifest = read_json(runs[1] / "run.json")
    write_json(
        runs[1] / "run.json", manifest | {"versions": {"<b onclick=x>": "<script>"}, "command": ["</code><script>"]}
    )
    html = report.build(runs, tmp_path / "r").read_text(encoding="utf-8")
    page = Page(html)
    assert not {"script", "img"} & set(page.tags)
    assert "\x1b" not in html
    assert "\u202e" not in html
    assert "_hidden$\\foo$" in html
    head = rows_of(tmp_path / "r" / "tables" / "summary.csv")
    assert head[1]["energy"].startswith("'=<script>")
    from rich.console import Console

    console = Console(width=200, force_terminal=True, color_system="truecolor", file=open(os.devnull, "w"))  # noqa: SIM115
    with console.capture() as capture:
        console.print(report.terminal_table(runs))
    console.file.close()
    assert "[red]" in capture.get()
    assert "\x1b[31m[red]" not in capture.get()


def test_terminal_table_shows_one_line_per_energy(compare: Path) -> None:
    from rich.console import Console

    console = Console(width=160, no_color=True)
    with console.capture() as capture:
        console.print(report.terminal_table([compare]))
    text = capture.get()
    for spec in SPECS:
        assert spec in text
    assert "reference" in text
    assert "±" in text


def test_headline_is_plain_json(compare: Path) -> None:
    lines = report.headline([compare])
    assert json.loads(json.dumps(lines, allow_nan=False)) == lines
    assert [line["energy"] for line in lines] == list(SPECS)
    assert lines[0]["p_paired_t"] is None
    assert lines[1]["pairs"] == 5


def test_a_folder_of_runs_is_read_too(compare: Path) -> None:
    assert load([compare / "runs"]).groups[0].label == "none"
    assert {len(g.runs) for g in load([compare / "runs"]).groups} == {5}


@pytest.mark.parametrize(
    "plan", ["{", "[]", '{"energies": 3, "labels": "x", "seeds": ["a"]}', '{"energies": ["none"]}']
)
def test_a_damaged_plan_does_not_hide_the_runs(plan: str, tmp_path: Path) -> None:
    write_compare(tmp_path / "out", SPECS[:1], seeds=2)
    (tmp_path / "out" / "compare.json").write_text(plan)
    assert len(load([tmp_path / "out"]).groups[0].runs) == 2


def test_nothing_to_report_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no run to report"):
        report.build([], tmp_path)
    with pytest.raises(UsageError, match="neither a run folder"):
        report.build([tmp_path], tmp_path)


def test_unwritable_folder_is_a_resource_error(compare: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ResourceError, match="cannot write the report"):
        report.build([compare], tmp_path / "file")


def test_values_that_are_not_numbers_do_not_stop_the_report(tmp_path: Path) -> None:
    rng = np.random.default_rng(8)
    folder = write_run(tmp_path / "run", "none", 0, 0.0, rng)
    done = read_json(folder / "summary.json")
    done |= {"test_accuracy": "nan", "step_ms": None, "compression": None, "spectra": {"0.weight": []}, "path": {}}
    done["energies"]["nuclear"] = "inf"
    write_json(folder / "summary.json", done)
    other = write_run(tmp_path / "other", "0.001*nuclear", 0, 0.5, rng)
    assert "n/a" in report.build([folder, other], tmp_path / "r").read_text(encoding="utf-8")


def test_summary_alone_without_curves(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "none", 0, 0.0, np.random.default_rng(9))
    (folder / "metrics.jsonl").unlink()
    study = load([folder])
    assert Page(render(study)).tags.count("svg") == 4  # outcome, compression, spectra, cost
    assert len(csv_tables(study)["curves"]) == 1


# The function


@pytest.fixture(scope="module")
def with_function(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_function(write_compare(tmp_path_factory.mktemp("function") / "out", SPECS[:3], seeds=3))


def test_the_section_on_the_function(with_function: Path, tmp_path: Path) -> None:
    html = report.build([with_function], tmp_path).read_text(encoding="utf-8")
    page = Page(html)
    assert page.tags.count("svg") == 10
    assert {"function", "robustness", "alignment", "cuts"} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert {link[1:] for link in page.links} | set(re.findall(r"url\(#([^)]*)\)", html)) <= set(page.ids)
    assert "to 360 samples of the test split" in html
    assert "alignment: left out: an example" in html
    values = [read_json(with_function / "runs" / f"cell0-seed{k}" / "summary.json") for k in range(3)]
    dirichlet = [v["function"]["energies"]["dirichlet"]["value"] for v in values]
    assert f"<td>{plus_minus(float(np.mean(dirichlet)), float(np.std(dirichlet, ddof=1)))}</td>" in html
    assert ">97.0 \u00b1 0<" in html  # AUROC in percent, the same for all seeds
    for name in ("function", "robustness", "alignment", "cuts"):
        assert name in html.rpartition("tables/*.csv")[2][:200]
    assert report.build([with_function], tmp_path / "again").read_text(encoding="utf-8") == html


def test_tables_of_the_function_hold_the_numbers_of_the_runs(with_function: Path, tmp_path: Path) -> None:
    write_csv(csv_tables(load([with_function])), tmp_path)
    tables = {name: rows_of(tmp_path / f"{name}.csv") for name in ("function", "robustness", "cuts")}
    run = read_json(with_function / "runs" / "cell1-seed2" / "summary.json")["function"]
    mine = {k: [r for r in t if (r["energy"], r["seed"]) == (SPECS[1], "2")] for k, t in tables.items()}
    by_figure = {(r["part"], r["figure"]): r for r in mine["function"]}
    assert float(by_figure["energies", "dirichlet"]["value"]) == run["energies"]["dirichlet"]["value"]
    assert float(by_figure["energies", "dirichlet"]["standard_error"]) == run["energies"]["dirichlet"]["standard_error"]
    assert by_figure["calibration", "ece"]["standard_error"] == ""
    assert [float(r["accuracy"]) for r in mine["robustness"] if r["norm"] == "linf"] == run["robustness"]["linf"][
        "accuracy"
    ]
    assert [r["product/nuclear"] for r in mine["cuts"]] == [str(run["cuts"][0]["product/nuclear"]), ""]
    assert [r["draws"] for r in mine["cuts"]] == ["", "8.0"]


def test_energies_of_the_function_are_compared_in_every_run(tmp_path: Path) -> None:
    out = add_function(write_compare(tmp_path / "out", ("none", "0.001*dirichlet"), seeds=2))
    for folder in (out / "runs").glob("cell1-*"):  # training records what it minimizes, the reference does not
        done = read_json(folder / "summary.json")
        done["energies"]["dirichlet"] = 1e9
        write_json(folder / "summary.json", done)
    reference, row = summary.rows(load([out]))
    assert reference.energies["dirichlet"][0].n == 2
    # the strength of cell 1 is 1/4, and the Dirichlet energy a square: exp(-1/2), up to 4 % of noise
    assert row.energies["dirichlet"][1] == pytest.approx(math.exp(-0.5), rel=0.05)
    assert "jacobian_nuclear" not in row.energies
    assert "dirichlet energy 0.6" in summary.sentence(row, 0.05)


def test_runs_without_the_function_take_no_part(with_function: Path, compare: Path, html: str, tmp_path: Path) -> None:
    assert not {"function", "robustness", "alignment", "cuts"} & set(Page(html).ids)
    assert not {"function", "robustness", "alignment", "cuts"} & set(csv_tables(load([compare])))
    out = add_function(write_compare(tmp_path / "out", SPECS[:2], seeds=2), only=(1,))
    study = load([out])
    assert Page(render(study)).tags.count("svg") == 10
    first, second = function.panels(study)
    assert first.cells[0] == ["n/a"] * len(first.columns)
    assert "n/a" not in first.cells[1] + second.cells[1]
    assert {row[0] for row in csv_tables(study)["cuts"][1:]} == {SPECS[1]}


EVIL = '"><script>x</script>$a$\x1b[31m'


@pytest.mark.parametrize(
    "broken",
    [
        3,
        [],
        {"energies": [1], "spectrum": "x", "cuts": {"a": 1}, "robustness": [2], "alignment": 7, "outliers": None},
        {"cuts": [None, 3, {}, {"name": 1, "product/nuclear": "inf"}], "notes": "text", "samples": "many"},
        {"robustness": {EVIL: {"share": [0, 1], "epsilon": [0, None], "accuracy": [1, 1]}}, "outliers": {EVIL: {}}},
        {"robustness": {"l2": {"share": [0.0, 0.02], "epsilon": [0.0, 9.0], "accuracy": [1.0]}}},
        {"energies": {EVIL: {"value": 3.0}}, "outliers": {EVIL: 0.5}, "notes": [EVIL], "samples": 5},
        {"cuts": [{"name": EVIL, "kind": EVIL, "half_sum/nuclear": 2.0}], "calibration": {"nll": "nan", "ece": None}},
    ],
)
def test_a_damaged_function_part_does_not_stop_the_report(broken: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(12)
    folders = [write_run(tmp_path / f"cell{i}", spec, 0, 0.0, rng, epochs=1) for i, spec in enumerate(SPECS[:2])]
    for folder, part in zip(folders, (broken, function_of(0.5, rng))):
        write_json(folder / "summary.json", read_json(folder / "summary.json") | {"function": part})
    study = load(folders)
    pictures = function_pictures(study)
    assert {"robustness", "alignment", "cuts"} == {p.key for p in pictures}
    for p in pictures:
        assert "script" not in {str(e.tag).rpartition("}")[2] for e in ElementTree.fromstring(p.svg).iter()}
    texts = [*function.notes(study), *(c for panel in function.panels(study) for c in panel.columns)]
    assert not any("\x1b" in text for text in texts)
    assert all(len(panel.cells) == 2 for panel in function.panels(study))
    assert {"function", "robustness", "alignment", "cuts"} == set(function.csv_tables(study))


def test_hostile_text_of_the_function_is_neutralized(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", "none", 0, 0.0, np.random.default_rng(13), epochs=1)
    part = function_of(0.0, np.random.default_rng(14)) | {"notes": [EVIL], "outliers": {EVIL: 0.5}}
    part["cuts"][0] |= {"name": EVIL, "kind": EVIL}
    part["robustness"][EVIL] = part["robustness"]["l2"]
    write_json(folder / "summary.json", read_json(folder / "summary.json") | {"function": part})
    html = report.build([folder], tmp_path / "r").read_text(encoding="utf-8")
    assert "script" not in Page(html).tags
    assert "\x1b" not in html


def test_importing_the_report_loads_nothing_heavy() -> None:
    heavy = {"matplotlib", "jinja2", "rich", "scipy", "torch"}
    code = f"import sys, groundstate.report; print(sorted({heavy} & set(sys.modules)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


def test_text_helpers(tmp_path: Path) -> None:
    assert plain("a\u0000b\u200bc") == "abc"
    assert csv_cell("@x") == "'@x"
    assert figure_label("__") == " __"
    assert math.isnan(number({"a": 1}))
    assert math.isnan(number(True))
    assert show(999.6) == "1,000"
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(DataError, match="expected a JSON object"):
        read_json(tmp_path / "list.json")
