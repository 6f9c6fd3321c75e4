"""Reads run folders into one study: groups of runs that differ only in their seed, and everything that is amiss.

A run folder holds ``run.json``, ``metrics.jsonl`` and, once done, ``summary.json``. A compare folder holds
``compare.json`` and one run folder per cell under ``runs/``. Nothing found wrong stops the report: runs that are
missing, unfinished or damaged become `Problem`s with their names, and take no part in the numbers.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from groundstate.errors import DataError, UsageError
from groundstate.report.text import number, plain

# settings that may differ between two runs of one group: they change where or how safely a run is done, not its result
_NOT_A_SETTING = {"seed", "data_dir", "checkpoint_every", "keep", "monitor", "threads", "resume"}


@dataclass(frozen=True)
class Problem:
    """Something that a reader of the report must know.

    Attributes:
        where: the run or file.
        what: what is amiss.
    """

    where: str
    what: str


@dataclass(frozen=True)
class Run:
    """One run folder.

    Attributes:
        name: folder name.
        config: the configuration of the run.
        manifest: the whole ``run.json``.
        epochs: the epoch lines of ``metrics.jsonl`` in ascending order, one per epoch.
        summary: ``summary.json``, empty for a run that is not done.
        idle: settings that its energy does not take, so that they may differ from those of other runs.
    """

    name: str
    config: Mapping[str, Any]
    manifest: Mapping[str, Any]
    epochs: tuple[Mapping[str, Any], ...]
    summary: Mapping[str, Any]
    idle: frozenset[str] = frozenset()

    @property
    def seed(self) -> int:
        """The seed, which pairs runs of different energies."""
        return int(self.config.get("seed", 0))

    @property
    def status(self) -> str:
        """``done``, or what the summary says, or ``unfinished`` where there is none."""
        return plain(self.summary.get("status", "unfinished"))

    def value(self, *keys: str) -> float:
        """Returns a number of the summary by its path of keys, NaN where it is missing."""
        node: Any = self.summary
        for key in keys:
            node = node.get(key) if isinstance(node, Mapping) else None
        return number(node)


@dataclass(frozen=True)
class Group:
    """Runs that are done and differ only in their seed.

    Attributes:
        label: how tables and figures call it: its energy, and other settings where these differ between groups.
        runs: the runs in ascending order of seed.
        is_reference: true for the group that the others are compared with.
    """

    label: str
    energy: str
    runs: tuple[Run, ...]
    is_reference: bool = False

    def by_seed(self, *keys: str) -> dict[int, float]:
        """Returns a number of the summary for every seed."""
        return {run.seed: run.value(*keys) for run in self.runs}


@dataclass(frozen=True)
class Study:
    """All that the report shows.

    Attributes:
        groups: the reference first, then in the order given.
        problems: what is amiss, by name.
        settings: the settings that all runs share which take them.
        title: one line on data, model and epochs.
        expected_seeds: seeds per group that were asked for, where a ``compare.json`` says so.
    """

    groups: tuple[Group, ...]
    problems: tuple[Problem, ...]
    settings: Mapping[str, Any]
    title: str
    expected_seeds: int | None = None
    manifests: tuple[Mapping[str, Any], ...] = field(default=())

    @property
    def reference(self) -> Group | None:
        """The group that the others are compared with, if any run is done."""
        return next((g for g in self.groups if g.is_reference), None)

    def keys(self, *path: str) -> list[str]:
        """Returns the keys found under a path of the summaries, in order of first appearance."""
        found: dict[str, None] = {}
        for group in self.groups:
            for run in group.runs:
                node: Any = run.summary
                for key in path:
                    node = node.get(key) if isinstance(node, Mapping) else None
                if isinstance(node, Mapping):
                    found.update(dict.fromkeys(node))
        return list(found)


def load(paths: Iterable[Path]) -> Study:
    """Reads run folders and compare folders.

    Raises:
        UsageError: no path is given, or a path is neither a run folder nor a compare folder.
    """
    problems: list[Problem] = []
    runs: list[Run] = []
    labels: dict[str, str] = {}
    cells: list[tuple[str, int]] = []
    found = False
    for path in (Path(p) for p in paths):
        found = True
        for folder in _folders(path, labels, cells, problems):
            run = _run(folder, problems)
            if run is not None:
                runs.append(run)
    if not found:
        raise UsageError(
            "no run to report: give one or more run folders, or the folder that `groundstate compare` wrote"
        )
    return _study(runs, labels, cells, problems)


def _folders(path: Path, labels: dict[str, str], cells: list[tuple[str, int]], problems: list[Problem]) -> list[Path]:
    if (path / "compare.json").is_file():
        try:
            plan = read_json(path / "compare.json")
        except DataError as error:
            problems.append(Problem(plain(path.name), str(error)))
            plan = {}
        specs = [str(e) for e in _list(plan.get("energies"))]
        named = [str(label) for label in _list(plan.get("labels"))]
        labels.update(zip(specs, named if len(named) == len(specs) else specs))
        cells += [(spec, seed) for spec in specs for seed in _list(plan.get("seeds")) if isinstance(seed, int)]
        inner = path / "runs"
        return sorted(p for p in inner.iterdir() if p.is_dir()) if inner.is_dir() else []
    if (path / "run.json").is_file() or (path / "metrics.jsonl").is_file():
        return [path]
    inside = sorted(p.parent for p in path.glob("*/run.json")) if path.is_dir() else []
    if inside:
        return inside
    raise UsageError(
        f"{path} is neither a run folder (run.json), nor a folder of them, nor a compare folder (compare.json): "
        "give what `groundstate train` or `groundstate compare` wrote"
    )


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; duplicated keys, which readers would resolve differently, are an error.

    Raises:
        DataError: the file is missing, not JSON, not an object, or has a duplicated key.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len({k for k, _ in pairs}) < len(pairs):
            raise ValueError("a duplicated key")
        return dict(pairs)

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"cannot read {path.name}: {plain(reason)}") from None
    if not isinstance(value, dict):
        raise DataError(f"cannot read {path.name}: expected a JSON object, got {type(value).__name__}")
    return value


def _run(folder: Path, problems: list[Problem]) -> Run | None:
    name = plain(folder.name)
    try:
        manifest = read_json(folder / "run.json")
    except DataError as error:
        problems.append(Problem(name, str(error)))
        return None
    config = manifest.get("config")
    if not isinstance(config, dict) or not isinstance(config.get("seed", 0), int):
        problems.append(Problem(name, "run.json has no configuration"))
        return None
    epochs = _epochs(folder / "metrics.jsonl", name, problems)
    summary: dict[str, Any] = {}
    if (folder / "summary.json").is_file():
        try:
            summary = read_json(folder / "summary.json")
        except DataError as error:
            problems.append(Problem(name, str(error)))
    run = Run(name, config, manifest, epochs, summary)
    if run.status != "done":
        last = f"epoch {epochs[-1].get('epoch')}" if epochs else "no epoch"
        reason = summary.get("error") or summary.get("reason") or summary.get("message")
        why = f": {plain(reason)}" if reason else ""
        problems.append(Problem(name, f"{run.status}{why} (got to {last} of {config.get('epochs', '?')}); left out"))
    return run


def _epochs(path: Path, name: str, problems: list[Problem]) -> tuple[Mapping[str, Any], ...]:
    """Reads the epoch lines: an incomplete last line is dropped, a broken one before it is reported by its number."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        problems.append(Problem(name, "no metrics.jsonl: it has no curves"))
        return ()
    lines = text.split("\n")
    found: dict[int, Mapping[str, Any]] = {}
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError:
            if i < len(lines):  # the last line has no newline yet where a run was killed while writing it
                problems.append(Problem(name, f"line {i} of metrics.jsonl is broken and left out"))
            continue
        if isinstance(entry, dict) and entry.get("kind") == "epoch" and isinstance(entry.get("epoch"), int):
            found[entry["epoch"]] = entry  # after a resume the later line of an epoch counts
    return tuple(found[e] for e in sorted(found))


def _study(runs: list[Run], labels: Mapping[str, str], cells: list[tuple[str, int]], problems: list[Problem]) -> Study:
    have = {(_energy(r), r.seed) for r in runs}
    for spec, seed in dict.fromkeys(cells):
        if (spec, seed) not in have:
            problems.append(Problem(f"{plain(labels.get(spec, spec))}, seed {seed}", "not started: no run folder"))
    varying = _varying(runs)
    if varying - {"energy"} - _NOT_A_SETTING:
        runs = [replace(r, idle=_idle(r)) for r in runs]
        varying = _varying(runs)
    grouped: dict[str, list[Run]] = {}
    for run in runs:
        grouped.setdefault(_label(run, labels, varying), []).append(run)
    order = {spec: i for i, (spec, _) in enumerate(cells)}
    groups: list[Group] = []
    for label, members in sorted(grouped.items(), key=lambda item: order.get(_energy(item[1][0]), len(cells))):
        done: dict[int, Run] = {}
        for run in members:
            if run.status != "done":
                continue
            if run.seed in done:
                problems.append(Problem(run.name, f"a second run of {label}, seed {run.seed}; left out"))
            else:
                done[run.seed] = run
        if done:
            groups.append(Group(label, _energy(members[0]), tuple(done[s] for s in sorted(done))))
    groups = _with_reference(groups)
    takers = {k: [r for r in runs if k not in r.idle] for k in (runs[0].config if runs else ()) if k not in varying}
    shared = {k: found[0].config.get(k) for k, found in takers.items() if found}
    for key in sorted(varying - {"energy"} - _NOT_A_SETTING):
        problems.append(Problem("settings", f"the runs differ in {key!r}, not only in their energy and seed"))
    problems += _mixed(runs)
    seeds = len({s for _, s in cells}) or None
    return Study(tuple(groups), tuple(problems), shared, _title(shared), seeds, tuple(r.manifest for r in runs))


def _with_reference(groups: list[Group]) -> list[Group]:
    """Puts the reference first: the group without an energy, else the first one."""
    if not groups:
        return groups
    first = next((g for g in groups if g.energy.strip() in ("", "none")), groups[0])
    return [Group(first.label, first.energy, first.runs, True)] + [g for g in groups if g is not first]


def _varying(runs: list[Run]) -> set[str]:
    keys = {k for r in runs for k in r.config}
    found = {
        k: {json.dumps(r.config.get(k), sort_keys=True, default=str) for r in runs if k not in r.idle} for k in keys
    }
    return {k for k, values in found.items() if len(values) > 1}


def _idle(run: Run) -> frozenset[str]:
    """Returns the settings that the energy of a run does not take; none where that energy is not known here."""
    from groundstate.energies.registry import parse
    from groundstate.idle import OF_ENERGY, taken

    try:
        return OF_ENERGY - taken(parse(_energy(run)), run.config.get("coupling", "grad"))
    except UsageError:
        return frozenset()


def _energy(run: Run) -> str:
    return str(run.config.get("energy", "none"))


def _label(run: Run, labels: Mapping[str, str], varying: set[str]) -> str:
    energy = _energy(run)
    others = sorted(varying - {"energy"} - _NOT_A_SETTING - run.idle)
    extra = ", ".join(f"{k}={run.config.get(k)}" for k in others)
    return plain(labels.get(energy, energy) + (f" ({extra})" if extra else ""))


def _mixed(runs: list[Run]) -> list[Problem]:
    """Reports what makes runs hard to compare: other data, another thread count, other versions."""
    found = []
    for key, name in (("data_sha256", "data"), ("threads", "number of threads"), ("versions", "versions")):
        if len({json.dumps(r.manifest.get(key), sort_keys=True, default=str) for r in runs}) > 1:
            found.append(Problem("provenance", f"the runs do not all have the same {name}"))
    return found


def _title(settings: Mapping[str, Any]) -> str:
    parts = [plain(settings[k]) for k in ("data", "model") if settings.get(k)]
    if settings.get("epochs"):
        parts.append(f"{plain(settings['epochs'])} epochs")
    if settings.get("optimizer"):
        rate = f", learning rate {settings['lr']}" if "lr" in settings else ""
        parts.append(plain(f"{settings['optimizer']}{rate}"))
    return " · ".join(parts)


def curve(run: Run, *keys: str) -> dict[int, float]:
    """Returns a number of the epoch lines by epoch, without epochs that do not have it."""
    found: dict[int, float] = {}
    for entry in run.epochs:
        node: Any = entry
        for key in keys:
            node = node.get(key) if isinstance(node, Mapping) else None
        value = number(node)
        if not math.isnan(value):
            found[int(entry["epoch"])] = value
    return found


def compression_points(group: Group) -> dict[float, list[tuple[int, float, float, float]]]:
    """Returns (seed, size as a fraction of dense, sum of ranks, test accuracy) of every seed by tolerance."""
    points: dict[float, list[tuple[int, float, float, float]]] = {}
    for run in group.runs:
        for entry in run.summary.get("compression") or []:
            cut, accuracy = number(entry.get("tolerance")), number(entry.get("test_accuracy"))
            size = number(entry.get("ratio"))
            if math.isnan(size):
                size = number(entry.get("parameters")) / (run.value("parameters") or math.nan)
            ranks = float(sum(number(r) for r in (entry.get("ranks") or {}).values()))
            if math.isfinite(cut) and math.isfinite(size):
                points.setdefault(cut, []).append((run.seed, size, ranks, accuracy))
    return dict(sorted(points.items()))
