"""The record of a run: ``run.json`` says what it is, ``metrics.jsonl`` what happened, ``summary.json`` how it ended.

Metrics are appended line by line, each with one write, so that a killed run loses at most its last, incomplete line.
JSON documents appear whole or not at all. JSON has no NaN and no infinity: they are written as the text ``"nan"``,
``"inf"`` and ``"-inf"``. A lock lets one process at a time write into a run folder.
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

import groundstate
from groundstate.errors import DataError, ResourceError, UsageError
from groundstate.safetensors_file import unique_keys

RUN, METRICS, SUMMARY, LOCK = "run.json", "metrics.jsonl", "summary.json", "run.lock"

_EPOCH_KEYS = {"step", "val_accuracy", "val_loss", "train_loss", "train_accuracy", "energies", "path"}
_held: set[Path] = set()


class Recorder:
    """Writes the record of one run.

    Args:
        folder: The run folder; it must exist when something is written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def start(self, run: Mapping[str, Any]) -> None:
        """Writes ``run.json``: ``run``, and where it lacks them the versions, machine, git revision and command.

        Raises:
            UsageError: the folder has metrics of another run.
            ResourceError: the file cannot be written.
        """
        metrics = self.folder / METRICS
        if metrics.exists() and metrics.stat().st_size:
            raise UsageError(f"{metrics} is there already, without its run: choose another folder, or remove it")
        write_json(self.folder / RUN, {"schema": 1, **provenance(), **run})

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds one line to ``metrics.jsonl``; an incomplete line of a killed run is removed first.

        The line is on the disk when this returns: a checkpoint that is saved later never knows more than the metrics.

        Raises:
            ResourceError: the line cannot be written; the file is as it was.
        """
        path = self.folder / METRICS
        line = (json.dumps(plain_json(record), allow_nan=False) + "\n").encode()
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
            try:
                end = _end_of_last_line(descriptor)
                if os.write(descriptor, line) != len(line):
                    os.ftruncate(descriptor, end)
                    raise ResourceError(f"cannot write {path} (no space): free some space")
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise _resource_error(path, error) from error

    def truncate_after(self, step: int) -> None:
        """Drops the records beyond ``step`` from ``metrics.jsonl``, atomically; a resumed run writes them anew.

        Raises:
            DataError: a line before the last is broken, or says no step.
            ResourceError: the file cannot be written.
        """
        path = self.folder / METRICS
        if not path.exists():
            return
        records = read_metrics(path)
        for number, record in enumerate(records, start=1):
            if type(record.get("step", 0)) is not int:
                raise DataError(f"line {number} of {path} is broken (its step is {record['step']!r}): remove the line")
        kept = [r for r in records if r.get("step", 0) <= step]
        _replace(path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in kept))

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Writes ``summary.json``, atomically."""
        write_json(self.folder / SUMMARY, summary)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads ``metrics.jsonl``; an incomplete last line, left by a killed run, is dropped.

    Raises:
        DataError: the file is missing, or a line before the end is broken; its number is named.
    """
    try:
        lines = Path(path).read_bytes().split(b"\n")
    except OSError as error:
        raise DataError(f"cannot read {path} ({error.strerror or error})") from None
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines[:-1], start=1):
        try:
            record = json.loads(line.decode(), object_pairs_hook=unique_keys, parse_constant=_no_constant)
            if not isinstance(record, dict):
                raise ValueError("it is not an object")
        except (ValueError, RecursionError) as error:
            raise DataError(f"line {number} of {path} is broken ({error}): remove the line") from None
        records.append(record)
    return records


def read_epochs(path: Path, last: int) -> list[dict[str, Any]]:
    """Reads ``metrics.jsonl`` of a run that has come to the end of epoch ``last``.

    Raises:
        DataError: see `read_metrics`; or the spectra at the start, or an epoch from 0 to ``last``, are not there once.
    """
    records = read_metrics(path)
    epochs = [r.get("epoch") for r in records if r.get("kind") == "epoch" and r.keys() >= _EPOCH_KEYS]
    spectra = [r["spectra"] for r in records if r.get("kind") == "spectra" and isinstance(r.get("spectra"), dict)]
    if epochs != list(range(last + 1)) or len(spectra) != 1:
        raise DataError(f"{path} has not each epoch from 0 to {last} once: restore it, or start a new run")
    return records


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON document that appears whole or not at all, with the mode of the umask.

    Raises:
        UsageError: ``value`` is not made of plain JSON values.
        ResourceError: it cannot be written; what was there is as it was.
    """
    _replace(Path(path), json.dumps(plain_json(value), indent=1, allow_nan=False) + "\n")


def plain_json(value: Any) -> Any:
    """Returns ``value`` with tuples as lists, paths as text, and non-finite floats as text.

    >>> plain_json({"a": (1.0, float("inf"))})
    {'a': [1.0, 'inf']}
    """
    if isinstance(value, Mapping):
        if not all(isinstance(k, str) for k in value):
            raise UsageError(f"keys of a JSON object are text, got {list(value)!r}")
        return {k: plain_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain_json(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, Path):
        return str(value)
    if value is None or isinstance(value, str | int):
        return value
    raise UsageError(f"a record holds plain JSON values, got {type(value).__name__}")


def provenance() -> dict[str, Any]:
    """Returns what a result depends on besides its configuration."""
    return {
        "versions": {
            "groundstate": groundstate.__version__,
            "torch": str(torch.__version__),
            "numpy": np.__version__,
            "python": platform.python_version(),
        },
        "platform": platform.platform(),
        "git": _git(),
        "threads": torch.get_num_threads(),
        "command": list(sys.argv),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _git() -> dict[str, Any] | None:
    """Returns the revision of the repository of the current folder, and whether it has uncommitted changes."""

    def git(*arguments: str) -> str:
        command = ["git", "--no-optional-locks", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()

    try:
        return {"hash": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None


# ---------------------------------------------------------------------- the lock


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Holds a run folder for this process; a lock that a dead process of this host has left is taken over.

    Raises:
        UsageError: another process holds the folder; its pid and host are named.
        ResourceError: the lock cannot be written.
    """
    path = Path(folder).resolve() / LOCK
    mine = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())})
    for _ in range(100):
        if _claim(path, mine):
            break
        _remove_stale(path)
    else:
        raise UsageError(f"{path} is being taken over by others: try again")
    _held.add(path)
    try:
        yield
    finally:
        _held.discard(path)
        with suppress(OSError):
            if path.read_text() == mine:
                path.unlink()


def _claim(path: Path, mine: str) -> bool:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    except FileExistsError:
        return False
    except OSError as error:
        raise _resource_error(path, error) from error
    try:
        os.write(descriptor, mine.encode())
    except OSError as error:
        path.unlink()
        raise _resource_error(path, error) from error
    finally:
        os.close(descriptor)
    return True


def _remove_stale(path: Path) -> None:
    """Removes a lock whose holder is gone; of several processes that see the same stale lock, one removes it."""
    seen = _holder(path)
    if seen is None:
        return
    text, owner = seen
    if _alive(path, owner):
        pid, host = owner.get("pid"), owner.get("host")
        raise UsageError(
            f"{path.parent} is in use by process {pid} on {host}: wait for it, or, if there is no such process, "
            f"remove {path}"
        )
    try:
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            fcntl.flock(folder, fcntl.LOCK_EX)  # one at a time looks again and removes; closing releases it
            if path.read_text(errors="replace") == text:
                path.unlink()
        finally:
            os.close(folder)
    except FileNotFoundError:
        return
    except OSError as error:
        raise _resource_error(path, error) from error


def _holder(path: Path) -> tuple[str, dict[str, Any]] | None:
    """Returns the text of a lock and what it says; ``None`` if it is gone. An unreadable one belongs to nobody."""
    text = ""
    for _ in range(20):  # its holder may be about to write it
        try:
            text = path.read_text(errors="replace")
            owner = json.loads(text)
            if isinstance(owner, dict) and type(owner.get("pid")) is int:
                return text, owner
        except FileNotFoundError:
            return None
        except OSError as error:
            raise _resource_error(path, error) from error
        except ValueError:
            pass
        time.sleep(0.02)
    return text, {}


def _alive(path: Path, owner: Mapping[str, Any]) -> bool:
    if not owner:
        return False
    pid = owner["pid"]
    if owner.get("host") != socket.gethostname():
        return True  # it cannot be seen from here
    if pid == os.getpid():
        return path in _held
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:
        pass  # it is there, and belongs to another user
    return owner.get("started") == _started(pid)


def _started(pid: int) -> str:
    """Returns when a process started, in ticks since boot, so that a reused pid is told apart; empty if unknown."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return ""
    return stat.rpartition(")")[2].split()[19]


# ---------------------------------------------------------------------- files


def _replace(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise _resource_error(path, error) from error


def _end_of_last_line(descriptor: int) -> int:
    """Cuts off what follows the last newline of a file; returns its size."""
    size = os.fstat(descriptor).st_size
    end, block = size, 4096
    while end > 0:
        start = max(0, end - block)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end != size:
        os.ftruncate(descriptor, end)
    return end


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _resource_error(path: Path, error: OSError) -> ResourceError:
    return ResourceError(f"cannot write {path} ({error.strerror or error}): free some space, or check its permissions")
