"""What the experiments share: data, networks, where results go, tables, and running many small trainings.

Every experiment is a script, ``python experiments/NAME.py``; it writes ``docs/results/NAME.json`` with one entry per
run, and prints its tables from that file with ``--report``.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from groundstate.training import data, models

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "docs" / "results"

Task = TypeVar("Task")
Result = TypeVar("Result")


@lru_cache(maxsize=2)
def load(name: str, train_size: int | None = None, seed: int = 0, label_noise: float = 0.0) -> data.Dataset:
    """Returns ``digits`` or ``mnist``, normalized, with the library's fixed splits; the last two asked for are kept.

    Args:
        name: See `groundstate.training.data.load`, which also says where MNIST is looked for.
        train_size: Training samples kept, chosen by ``seed``; default: all.
        seed: Key of the training samples and of the wrong labels.
        label_noise: Share of wrong training labels.
    """
    return data.load(name, train_size=train_size, seed=seed, label_noise=label_noise)


def mlp(widths: Sequence[int], seed: int, scale: float = 1.0) -> nn.Sequential:
    """Returns linear layers with a ReLU between each two, torch's initial weights (not biases) times ``scale``."""
    model = models.build("mlp:" + "-".join(map(str, widths)), widths[0], widths[-1], seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(scale)
    return model


def describe_machine() -> dict[str, Any]:
    """Returns what the benchmarks say of the machine (they are scripts too, no package)."""
    spec = importlib.util.spec_from_file_location("runner", ROOT / "benchmarks" / "runner.py")
    if spec is None or spec.loader is None:
        raise ImportError("benchmarks/runner.py is missing: run the experiments in a checkout")
    runner = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(runner)
    return runner.describe_machine()


def save_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes ``result`` aside and renames it, so that a killed experiment leaves a whole file; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".{os.getpid()}.tmp")
    aside.write_text(json.dumps(_finite(result), indent=1, allow_nan=False) + "\n")
    aside.replace(path)


def _finite(node: Any) -> Any:
    if isinstance(node, Mapping):
        return {k: _finite(v) for k, v in node.items()}
    if isinstance(node, list | tuple):
        return [_finite(v) for v in node]
    return None if isinstance(node, float) and not math.isfinite(node) else node


def arguments(description: str, name: str, seeds: int | None = None) -> argparse.ArgumentParser:
    """Returns the options ``--out``, ``--report`` and, with ``seeds``, ``--seeds`` and ``--workers``."""
    parser = argparse.ArgumentParser(description=description)
    if seeds is not None:
        parser.add_argument("--seeds", type=int, default=seeds)
        parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--report", action="store_true", help="print the tables of the file, draw, run nothing")
    return parser


def saved(path: Path, fresh: dict[str, Any]) -> dict[str, Any]:
    """Returns what `save_json` wrote, or ``fresh`` where there is no such file."""
    return json.loads(path.read_text()) if path.exists() else fresh


def complete(
    result: dict[str, Any], function: Callable[[Task], Any], waiting: Sequence[Task], options: argparse.Namespace
) -> None:
    """Adds a run to ``result["runs"]`` for each task that waits, saving after each; ``options`` as of `arguments`."""
    for _, entry in parallel(function, waiting, options.workers):
        result["runs"].append(entry)
        save_json(options.out, result)


def mean_std(values: Sequence[float]) -> tuple[float, float]:
    """Returns mean and standard deviation (``n - 1``; NaN for fewer than two values).

    >>> mean_std([1.0, 2.0, 3.0])
    (2.0, 1.0)
    """
    mean = statistics.fmean(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else math.nan


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table: the first column to the left, the others to the right.

    >>> print(table(["a", "b"], [["x", "1"]]))
    | a | b |
    | --- | ---: |
    | x | 1 |
    """
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(line) + " |" for line in (header, rule, *rows))


def parallel(
    function: Callable[[Task], Result], tasks: Sequence[Task], workers: int = 1
) -> Iterator[tuple[Task, Result]]:
    """Yields ``(task, function(task))`` as tasks end, torch on one thread each, and prints a line per task.

    Args:
        function: Defined at the top of a module, as are the types of its argument and result: they are pickled.
        tasks: Shown in the progress lines by ``str``.
        workers: Processes, started anew; 1: no other process.
    """
    start = time.perf_counter()
    jobs = [(function, task) for task in tasks]

    def tell(k: int, task: Task) -> None:
        taken = time.perf_counter() - start
        left = taken / k * (len(tasks) - k)
        print(f"[{k}/{len(tasks)}] {taken / 60:.1f} min, {left / 60:.1f} left: {task}", flush=True)

    if workers == 1:
        before = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            for k, (task, result) in enumerate(map(_call, jobs), 1):
                tell(k, task)
                yield task, result
        finally:
            torch.set_num_threads(before)
        return
    with multiprocessing.get_context("spawn").Pool(workers, torch.set_num_threads, (1,)) as pool:
        for k, (task, result) in enumerate(pool.imap_unordered(_call, jobs), 1):
            tell(k, task)
            yield task, result


def _call(job: tuple[Callable[[Task], Result], Task]) -> tuple[Task, Result]:
    function, task = job
    return task, function(task)
