"""Times several callables against one another and writes the result as JSON and as a plain table.

Everything is timed in one process, in turns: every round calls each function once, so that a slow moment of the machine
hits all of them, and the ratio of two medians is meaningful where single times are not.

    result = compare({"step": step, "energy": energy}, rounds=200, threads=1)
    save("graph_energy", {"784-28-10": result})
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def describe_machine() -> dict[str, Any]:
    """Returns what a reader needs to judge a time: processor, cores, load, versions, BLAS threads."""
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": [round(x, 2) for x in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def compare(
    functions: Mapping[str, Callable[[], object]],
    rounds: int = 100,
    threads: int = 1,
    warmup: int = 3,
    every: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Times functions in turns.

    Args:
        functions: What to time, by name; each is called without arguments.
        rounds: How often each is called.
        threads: Threads torch may use, restored afterwards.
        warmup: Calls of each before the first measurement.
        every: Slow functions may run in every k-th round only: ``{"dense": 20}``.

    Returns:
        ``{"threads", "rounds", "milliseconds": {name: {"median", "min", "p90", "calls"}}}``.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    try:
        for function in functions.values():
            for _ in range(warmup):
                function()
        for k in range(rounds):
            for name, function in functions.items():
                if k % (every or {}).get(name, 1):
                    continue
                start = time.perf_counter()
                function()
                seconds[name].append(time.perf_counter() - start)
    finally:
        torch.set_num_threads(before)
    return {
        "threads": threads,
        "rounds": rounds,
        "milliseconds": {name: _summary(taken) for name, taken in seconds.items()},
    }


def save(name: str, result: Mapping[str, Any]) -> Path:
    """Writes ``benchmarks/results/<name>.json``, the machine's description added, and prints `table`."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps({"machine": describe_machine(), **result}, indent=1) + "\n")
    print(table(result))
    print(f"written: {path.relative_to(RESULTS.parent.parent)}")
    return path


def table(result: Mapping[str, Any]) -> str:
    """Returns every number of a nested result, one line a case: the dotted path of the case, then ``key=value``."""
    lines: list[str] = []
    _collect(result, "", lines)
    return "\n".join(lines)


def _collect(node: Mapping[str, Any], path: str, lines: list[str]) -> None:
    leaves = {k: v for k, v in node.items() if not isinstance(v, Mapping)}
    if leaves:
        shown = "  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in leaves.items())
        lines.append(f"{path or '.':<60} {shown}")
    for key, child in node.items():
        if isinstance(child, Mapping):
            _collect(child, f"{path}/{key}" if path else str(key), lines)


def _summary(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median": 1e3 * statistics.median(ordered),
        "min": 1e3 * ordered[0],
        "p90": 1e3 * ordered[min(len(ordered) - 1, int(0.9 * len(ordered)))],
        "calls": len(ordered),
    }


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or "unknown"
