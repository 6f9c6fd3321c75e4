"""Many runs in a pool of worker processes: each cell of a sweep is a run folder, and ends exactly once.

A worker is a fresh process (spawn) that runs one cell after the other, so that torch is loaded once a worker. A cell
is claimed by a lock file that is created with O_EXCL; several sweeps may share one folder. A cell that is done is
skipped, one that was interrupted goes on from its checkpoint, one whose worker was killed is tried once more. SIGINT
and SIGTERM reach each busy worker as one SIGTERM: it finishes its step, saves, and ends.

This module loads no torch: the parent only hands out work.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import time
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from multiprocessing import connection, get_context
from pathlib import Path
from types import FrameType
from typing import Any, Literal

from groundstate.errors import GroundstateError, Interrupted, UsageError

Report = Callable[[dict[str, Any]], None]
Work = Callable[[dict[str, Any], Path, Report], None]
Status = Literal["done", "failed", "interrupted"]

RUNS, CLAIMS, SUMMARY = "runs", ".claims", "summary.json"
_BUSY_WAIT = 1.0  # seconds until a cell that another sweep holds is looked at again
_STEP_EVERY = 0.5  # seconds between two reports of steps
_POLL = 0.2


@dataclass(frozen=True)
class Cell:
    """One run of a sweep.

    Attributes:
        name: Name of its folder.
        config: Fields of its `TrainConfig`.
    """

    name: str
    config: Mapping[str, Any]


@dataclass(frozen=True)
class Outcome:
    """How a cell ended.

    Attributes:
        cell: Its name.
        status: ``done``; ``failed``; ``interrupted``: saved, or not begun.
        exit_code: As of `groundstate.errors`; 70 for an error that is not ours.
        message: One line, empty where it is done.
        details: The traceback of a failure.
        skipped: Whether it was done before this sweep.
    """

    cell: str
    status: Status
    exit_code: int = 0
    message: str = ""
    details: str = ""
    skipped: bool = False


def train_cell(config: dict[str, Any], folder: Path, report: Report) -> None:
    """Trains the run of a cell, from its checkpoint if it was begun before."""
    from groundstate.training.config import TrainConfig
    from groundstate.training.loop import train
    from groundstate.training.recorder import RUN

    train(TrainConfig.from_dict(config), folder, resume=(folder / RUN).exists(), progress=report)


def is_done(folder: Path) -> bool:
    """Whether a run folder has the summary of a run that is done."""
    try:
        return json.loads((folder / SUMMARY).read_text("utf-8")).get("status") == "done"
    except (OSError, ValueError, AttributeError):
        return False


def cores() -> int:
    """Returns how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def run_cells(
    cells: Iterable[Cell],
    folder: Path,
    *,
    jobs: int | None = None,
    threads: int = 1,
    work: Work = train_cell,
    report: Report | None = None,
    retries: int = 1,
) -> list[Outcome]:
    """Runs every cell in ``folder/runs/<name>``; failures of one cell leave the others alone.

    Args:
        cells: What to run, in this order.
        folder: The folder of the sweep.
        jobs: Worker processes; default: one a core.
        threads: Threads of the numerical libraries of a worker.
        work: What a worker does with ``(config, run folder, report)``; it must be importable, and leave a
            ``summary.json`` with status ``done``.
        report: Called in this process with what the cells report, and with ``{"kind": "end", "outcome": ...}``; every
            event has ``cell``.
        retries: How often a cell is tried again whose worker died.

    Returns:
        One outcome per cell, in the order of the cells.

    Raises:
        UsageError: ``jobs`` is not positive, or two cells have one name.
    """
    cells = list(cells)
    if jobs is not None and jobs < 1:
        raise UsageError(f"jobs must be at least 1, got {jobs}")
    if len({c.name for c in cells}) < len(cells):
        raise UsageError("two cells of a sweep have the same name: give each a name of its own")
    pool = _Pool(cells, Path(folder), work, threads, report or (lambda event: None), retries)
    with _forwarded_signals(pool):
        try:
            pool.run(min(jobs or cores(), len(cells)))
        finally:
            pool.close()
    return [pool.outcomes[c.name] for c in cells]


# ---------------------------------------------------------------------- this process


@dataclass(frozen=True)
class _Waiting:
    cell: Cell
    tries: int = 0
    not_before: float = 0.0


@dataclass
class _Worker:
    process: Any
    pipe: connection.Connection
    job: _Waiting | None = None
    told: bool = field(default=False)


class _Pool:
    """Hands cells to workers, one at a time each."""

    def __init__(self, cells: list[Cell], folder: Path, work: Work, threads: int, report: Report, retries: int) -> None:
        self.folder, self.work, self.threads, self.report, self.retries = folder / RUNS, work, threads, report, retries
        self.outcomes: dict[str, Outcome] = {}
        self.workers: list[_Worker] = []
        self.waiting: deque[_Waiting] = deque()
        self.stopping = False
        for cell in cells:
            if is_done(self.folder / cell.name):
                self._end(Outcome(cell.name, "done", skipped=True))
            else:
                self.waiting.append(_Waiting(cell))

    def run(self, jobs: int) -> None:
        """Works until every cell has an outcome."""
        while self.waiting or any(w.job for w in self.workers):
            if self.stopping:
                self._stop()
            else:
                self._hand_out(jobs)
            for ready in connection.wait([w.pipe for w in self.workers], timeout=_POLL):
                self._hear(next(w for w in self.workers if w.pipe is ready))

    def close(self) -> None:
        """Ends the workers: idle ones leave by themselves."""
        for worker in self.workers:
            with suppress(OSError):
                worker.pipe.send(None)
            worker.pipe.close()
        for worker in self.workers:
            worker.process.join(0.0 if worker.job else 5.0)
            if worker.process.is_alive():
                worker.process.kill()
                worker.process.join()

    def _hand_out(self, jobs: int) -> None:
        now = time.monotonic()
        free = [w for w in self.workers if w.job is None]
        for _ in range(len(self.waiting)):
            if not free and len(self.workers) >= jobs:
                return
            job = self.waiting.popleft()
            if job.not_before > now:
                self.waiting.append(job)
            elif is_done(self.folder / job.cell.name):
                self._end(Outcome(job.cell.name, "done", skipped=True))
            else:
                worker = free.pop() if free else self._start()
                worker.job = job
                with suppress(OSError):  # a worker that has died is heard of by its pipe
                    worker.pipe.send((dict(job.cell.config), self.folder / job.cell.name))

    def _start(self) -> _Worker:
        context = get_context("spawn")
        here, there = context.Pipe()
        process = context.Process(target=_serve, args=(there, self.work, self.threads), daemon=True)
        process.start()
        there.close()
        worker = _Worker(process, here)
        self.workers.append(worker)
        return worker

    def _hear(self, worker: _Worker) -> None:
        try:
            event = worker.pipe.recv()
        except (EOFError, OSError):
            self._died(worker)
            return
        job = worker.job
        if job is None:
            return
        name = job.cell.name
        if event["kind"] != "end":
            self.report(event | {"cell": name})
            return
        worker.job = None
        if event["status"] == "busy":
            self.waiting.append(_Waiting(job.cell, job.tries, time.monotonic() + _BUSY_WAIT))
        elif event["status"] == "interrupted" and not self.stopping and job.tries < self.retries:
            self.waiting.append(_Waiting(job.cell, job.tries + 1))  # somebody else's signal
        else:
            self._end(Outcome(name, event["status"], event["exit_code"], event["message"], event["details"]))

    def _died(self, worker: _Worker) -> None:
        worker.process.join()
        worker.pipe.close()
        self.workers.remove(worker)
        job, code = worker.job, worker.process.exitcode
        if job is None:
            return
        how = f"was killed by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        if is_done(self.folder / job.cell.name):
            self._end(Outcome(job.cell.name, "done"))
        elif self.stopping:
            self._end(_not_begun(job.cell))
        elif job.tries < self.retries:
            self.report({"kind": "note", "cell": job.cell.name, "text": f"its worker {how}: trying again"})
            self.waiting.append(_Waiting(job.cell, job.tries + 1))
        else:
            message = f"its worker {how} {job.tries + 1} times (out of memory?): fewer --jobs, then --resume"
            self._end(Outcome(job.cell.name, "failed", 5, message))

    def _stop(self) -> None:
        while self.waiting:
            self._end(_not_begun(self.waiting.popleft().cell))
        for worker in self.workers:
            if worker.job is not None and not worker.told:
                worker.told = True
                with suppress(OSError):
                    os.kill(worker.process.pid, signal.SIGTERM)

    def _end(self, outcome: Outcome) -> None:
        self.outcomes[outcome.cell] = outcome
        self.report({"kind": "end", "cell": outcome.cell, "outcome": outcome})


def _not_begun(cell: Cell) -> Outcome:
    return Outcome(cell.name, "interrupted", Interrupted.exit_code, "interrupted before it was done")


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


@contextmanager
def _forwarded_signals(pool: _Pool) -> Iterator[None]:
    """The first SIGINT or SIGTERM stops the pool in order, the second one at once."""

    def handle(number: int, frame: FrameType | None) -> None:
        if pool.stopping:
            for worker in pool.workers:
                worker.process.kill()
            os._exit(128 + number)
        pool.stopping = True

    before = {}
    if threading.current_thread() is threading.main_thread():
        before = {n: signal.signal(n, handle) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ---------------------------------------------------------------------- a worker


def _serve(pipe: connection.Connection, work: Work, threads: int) -> None:
    """Runs the cells that come through the pipe until it says ``None`` or breaks."""
    os.setpgrp()  # Ctrl-C reaches the parent, which passes on one signal, not two
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
        os.environ[name] = str(threads)
    send = _Sender(pipe)
    warnings.showwarning = lambda message, *_, **__: send({"kind": "note", "text": f"warning: {message}"})
    while True:
        try:
            task = pipe.recv()
        except (EOFError, OSError):
            return
        if task is None:
            return
        config, folder = task
        status, exit_code, message, details = _attempt(config, folder, work, send)
        end = {"kind": "end", "status": status, "exit_code": exit_code, "message": message, "details": details}
        with suppress(OSError):
            pipe.send(end)


class _Sender:
    """Sends events to the parent; where the parent has gone, asks this process to save and end."""

    def __init__(self, pipe: connection.Connection) -> None:
        self.pipe, self.last = pipe, 0.0

    def __call__(self, event: dict[str, Any]) -> None:
        now = time.monotonic()
        if event.get("kind") == "step" and now - self.last < _STEP_EVERY:
            return
        self.last = now
        try:
            self.pipe.send(event)
        except OSError:
            signal.raise_signal(signal.SIGTERM)


def _attempt(config: dict[str, Any], folder: Path, work: Work, send: Report) -> tuple[str, int, str, str]:
    """Returns status, exit code, message and traceback."""
    from groundstate.training.recorder import lock

    try:
        claim = folder.parent.parent / CLAIMS / folder.name
        claim.mkdir(parents=True, exist_ok=True)
        with ExitStack() as held:
            try:
                held.enter_context(lock(claim))
            except UsageError:
                return "busy", 0, "", ""
            if not is_done(folder):
                work(config, folder, send)
        return "done", 0, "", ""
    except GroundstateError as error:
        status = "interrupted" if isinstance(error, Interrupted) else "failed"
        return status, error.exit_code, str(error), traceback.format_exc()
    except (MemoryError, OSError) as error:
        return "failed", 5, f"{type(error).__name__}: {error}", traceback.format_exc()
    except Exception as error:
        return "failed", 70, f"unexpected {type(error).__name__}: {error}", traceback.format_exc()
