"""``groundstate compare``: every energy over the same seeds, in worker processes, and one report."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from groundstate.cli.console import Meter, Output, error_line, percent
from groundstate.cli.options import SETTINGS, Out, refuse_idle, verb, without

if TYPE_CHECKING:
    from groundstate.training.config import TrainConfig
    from groundstate.training.sweep import Cell, Outcome

PLAN = "compare.json"
DEFAULT_ENERGIES = ("1e-2*nuclear", "2e-1*nuclear@prox", "1e-2*graph", "3e-2*l1@prox", "3*path_energy")
_BASELINE = "none"
_SHARED = [s.field for s in SETTINGS if s.field != "energy"]


@verb(settings=_SHARED)
def compare(
    output: Output,
    given: dict[str, Any],
    *,
    energy: Annotated[
        list[str] | None,
        typer.Option(
            "--energy",
            help=f"An energy to compare with the baseline; may be repeated. Default: {', '.join(DEFAULT_ENERGIES)}.",
            metavar="SPEC",
            rich_help_panel="Energy",
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option("--seeds", help="Seeds per energy: S, S+1, ... Default: 5.", metavar="N", rich_help_panel="Run"),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            help="Worker processes, of --threads each. Default: one a core.",
            metavar="J",
            rich_help_panel="Run",
        ),
    ] = None,
    out: Out = None,
    resume: Annotated[
        Path | None,
        typer.Option("--resume", help="Continue the comparison of this folder.", metavar="DIR", rich_help_panel="Run"),
    ] = None,
) -> None:
    """Train every energy over several seeds, the baseline (none) included, and report.

    The folder (default: runs/DATE-compare-HASH) gets compare.json, a run folder per energy and seed under runs/,
    report.html and tables/*.csv. Runs that are done are kept, whatever ends the comparison.
    """
    from groundstate.errors import UsageError
    from groundstate.training.sweep import run_cells

    if jobs is not None and jobs < 1:
        raise UsageError(f"--jobs must be at least 1, got {jobs}")
    plan, folder = _resumed(resume, out, energy, seeds, given) if resume else _started(out, energy, seeds, given)
    cells = plan.cells()
    began = time.monotonic()
    output.note(f"{len(plan.energies)} energies x {len(plan.seeds)} seeds x {plan.config.epochs} epochs: {folder}")
    for line in without(plan.config, plan.labels):
        output.note(line)
    with output.progress(len(cells) * plan.config.epochs, "epoch") as meter:
        follow = _Follow(meter, len(cells), plan.config.epochs)
        outcomes = run_cells(cells, folder, jobs=jobs, threads=plan.config.threads, report=follow)
    _finish(output, plan, folder, outcomes, time.monotonic() - began)


# ---------------------------------------------------------------------- what to run


@dataclass(frozen=True)
class Plan:
    """What a comparison runs: every energy with every seed, and what it takes of ``config``.

    ``labels`` are the energies as they were typed; ``energies`` name what they mean.
    """

    energies: tuple[str, ...]
    labels: tuple[str, ...]
    seeds: tuple[int, ...]
    config: TrainConfig

    def to_dict(self) -> dict[str, Any]:
        """Returns what ``compare.json`` holds."""
        return {
            "schema": 1,
            "energies": list(self.energies),
            "labels": list(self.labels),
            "seeds": list(self.seeds),
            "config": self.config.to_dict(),
        }

    @property
    def digest(self) -> str:
        """Eight hexadecimal digits that name the plan."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:8]

    def cells(self) -> list[Cell]:
        """Returns the runs, seed by seed, so that a comparison that is cut short has all energies."""
        from groundstate.training.sweep import Cell

        bases = [self.config.for_energy(spec).to_dict() for spec in self.energies]
        return [
            Cell(f"{name}-seed{seed}", base | {"seed": seed})
            for seed in self.seeds
            for base, name in zip(bases, _names(self.energies))
        ]


def _names(energies: Sequence[str]) -> list[str]:
    """Returns a file name per energy; where two are alike, the digest of the spec tells them apart."""
    from groundstate.cli.runs import slug

    plain = [slug(spec) for spec in energies]
    return [
        name if plain.count(name) == 1 else f"{name}-{hashlib.sha256(spec.encode()).hexdigest()[:6]}"
        for spec, name in zip(energies, plain)
    ]


def _plan(energies: Sequence[str], seeds: int, config: TrainConfig, given: Collection[str]) -> Plan:
    from groundstate.energies.registry import parse
    from groundstate.errors import UsageError

    if seeds < 1:
        raise UsageError(f"--seeds must be at least 1, got {seeds}")
    labels: dict[str, str] = {_BASELINE: _BASELINE}
    for typed in energies:
        labels.setdefault(repr(parse(typed)), typed.strip())
    refuse_idle(given, config, labels.values())
    return Plan(tuple(labels), tuple(labels.values()), tuple(range(config.seed, config.seed + seeds)), config)


def _check(plan: Plan) -> None:
    """Loads the data and places every energy on the network, so that what cannot work ends before it begins.

    Raises:
        UsageError: an energy cannot act on the network, or an option does not fit the data.
        DataError: the data are missing or damaged.
    """
    from groundstate.energies.registry import parse
    from groundstate.regularizer import Regularizer
    from groundstate.training import data, models

    c = plan.config
    sizes: dict[str, Any] = {"val_size": c.val_size, "train_size": c.train_size, "label_noise": c.label_noise}
    sets = data.load(c.data, c.data_dir, **sizes, seed=c.seed)
    model = models.build(c.model, sets.inputs, sets.classes, c.seed)
    for spec in plan.energies:
        energy, own = parse(spec), c.for_energy(spec)
        if energy.terms:
            how: dict[str, Any] = {"every": own.every, "gap": own.gap, "select": own.select}
            Regularizer(model, energy, coupling=cast(Any, own.coupling), **how)


def _started(out: Path | None, energy: list[str] | None, seeds: int | None, given: dict[str, Any]) -> tuple[Plan, Path]:
    from groundstate.cli.runs import new_folder
    from groundstate.errors import UsageError
    from groundstate.training.config import TrainConfig
    from groundstate.training.recorder import write_json

    plan = _plan(energy or DEFAULT_ENERGIES, 5 if seeds is None else seeds, TrainConfig.from_dict(given), given)
    folder = out or new_folder("compare", plan.digest)
    if (folder / PLAN).exists():
        raise UsageError(f"{folder} holds a comparison already: continue it with --resume {folder}, or choose another")
    _check(plan)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / PLAN, plan.to_dict())
    return plan, folder


def _resumed(
    folder: Path, out: Path | None, energy: list[str] | None, seeds: int | None, given: dict[str, Any]
) -> tuple[Plan, Path]:
    from groundstate.errors import DataError, UsageError
    from groundstate.report.load import read_json
    from groundstate.training.config import TrainConfig

    if out is not None:
        raise UsageError("--resume names the folder already: leave out --out")
    if not (folder / PLAN).is_file():
        raise UsageError(f"{folder} is not a comparison (no {PLAN}): start one with --out {folder}")
    saved = read_json(folder / PLAN)
    try:
        before = TrainConfig.from_dict(saved["config"])
        specs, labels, numbers = (list(saved[k]) for k in ("energies", "labels", "seeds"))
        plan = Plan(tuple(map(str, specs)), tuple(map(str, labels)), tuple(map(int, numbers)), before)
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{folder / PLAN} is damaged ({error}): restore it, or start a new comparison") from None
    now = TrainConfig.from_dict(before.to_dict() | given)
    asked = _plan(energy or plan.energies, len(plan.seeds) if seeds is None else seeds, now, given)
    pairs = [(before.for_energy(e), now.for_energy(e)) for e in plan.energies]
    changed = list(dict.fromkeys(line for old, new in pairs for line in old.differences(new)))
    if set(asked.energies) != set(plan.energies):
        changed.append(f"energies: {', '.join(plan.energies)} -> {', '.join(asked.energies)}")
    if len(asked.seeds) != len(plan.seeds):
        changed.append(f"seeds: {len(plan.seeds)} -> {len(asked.seeds)}")
    if changed:
        raise UsageError(f"{folder} is another comparison ({'; '.join(changed)}): start a new one for it with --out")
    return Plan(plan.energies, plan.labels, plan.seeds, now), folder


# ---------------------------------------------------------------------- while it runs, and after


class _Follow:
    """Turns events of the cells into progress: a line per run, epochs in the bar."""

    def __init__(self, meter: Meter, cells: int, epochs: int) -> None:
        self.meter, self.cells, self.epochs = meter, cells, epochs
        self.reached: dict[str, int] = {}
        self.accuracy: dict[str, Any] = {}
        self.ended = 0

    def __call__(self, event: dict[str, Any]) -> None:
        name = event["cell"]
        if event["kind"] == "epoch":
            self.reached[name], self.accuracy[name] = event["epoch"], event["val_accuracy"]
        elif event["kind"] == "note":
            self.meter.line(f"{name}: {event['text']}")
        elif event["kind"] == "end":
            self.ended += 1
            self.reached[name] = self.epochs
            self.meter.line(f"[{self.ended:>{len(str(self.cells))}}/{self.cells}] {name}: {self._end(event)}")
        self.meter.update(sum(self.reached.values()), f"{self.ended}/{self.cells} runs")

    def _end(self, event: dict[str, Any]) -> str:
        outcome: Outcome = event["outcome"]
        if outcome.status == "interrupted":
            return "interrupted"
        if outcome.status == "failed":
            return outcome.message
        if outcome.skipped:
            return "done before"
        return f"done, validation accuracy {percent(self.accuracy.get(outcome.cell))}"


def _finish(output: Output, plan: Plan, folder: Path, outcomes: list[Outcome], seconds: float) -> None:
    from groundstate.cli.report import comparison
    from groundstate.errors import Interrupted
    from groundstate.report import build, headline

    unfinished = [o for o in outcomes if o.status == "interrupted"]
    if unfinished:
        raise Interrupted(
            f"interrupted, {len(outcomes) - len(unfinished)} of {len(outcomes)} runs are done, the others are saved: "
            f"continue with `groundstate compare --resume {folder}`"
        )
    failed = [o for o in outcomes if o.status == "failed"]
    page = build([folder], folder)
    output.document(
        "compare",
        {
            "out": folder,
            "report": page,
            "energies": plan.energies,
            "seeds": plan.seeds,
            "config": plan.config.to_dict(),
            "summary": headline([folder]),
            "failures": [{"run": o.cell, "exit_code": o.exit_code, "message": o.message} for o in failed],
            "seconds": seconds,
        },
    )
    output.show(comparison([folder]), f"Report: {page}  ({seconds:.0f} s)")
    for message in dict.fromkeys(o.message for o in failed):
        runs = [o.cell for o in failed if o.message == message]
        error_line(f"error: {', '.join(runs)}: {message}")
    if failed:
        raise typer.Exit(max(o.exit_code for o in failed))
