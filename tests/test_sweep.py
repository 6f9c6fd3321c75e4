"""The pool of a sweep: every cell ends once, whatever happens to its worker; signals; two sweeps in one folder."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from groundstate.errors import UsageError
from groundstate.training.sweep import Cell, Work, is_done, run_cells

# What the workers run: it needs no torch, and does what the configuration of its cell says.
WORK = """
import builtins, json, os, signal, time
from pathlib import Path
from groundstate import errors
from groundstate.training.signals import StopRequest

def work(config, folder, report):
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder.parent.parent / "log", "a") as log:
        log.write(folder.name + "\\n")
    tries = len(list(folder.glob("try-*")))
    (folder / f"try-{tries}").touch()
    if tries < config.get("killed", 0):
        os.kill(os.getpid(), signal.SIGKILL)
    if "raises" in config:
        raise (getattr(errors, config["raises"], None) or getattr(builtins, config["raises"]))("as the cell asked")
    with StopRequest() as stop:
        report({"kind": "epoch", "epoch": 1})
        until = time.monotonic() + config.get("seconds", 0)
        while time.monotonic() < until:
            if stop.requested:
                raise errors.Interrupted("saved")
            time.sleep(0.01)
    (folder / "summary.json").write_text(json.dumps({"status": "done"}))
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Work:
    """A function that a fresh process can import: its path is passed on to the workers."""
    place = tmp_path / "modules"
    place.mkdir()
    (place / "work_of_cells.py").write_text(WORK)
    monkeypatch.syspath_prepend(str(place))
    monkeypatch.delitem(sys.modules, "work_of_cells", raising=False)
    return importlib.import_module("work_of_cells").work


def test_failures_have_their_exit_codes_and_leave_the_others_alone(tmp_path: Path, work: Work) -> None:
    raised = {"UsageError": 2, "DataError": 3, "NonFiniteError": 4, "MemoryError": 5, "OSError": 5, "ValueError": 70}
    cells = [Cell(name, {"raises": name}) for name in raised] + [Cell(f"good-{i}", {}) for i in range(3)]
    events: list[dict[str, Any]] = []
    outcomes = run_cells(cells, tmp_path, jobs=2, work=work, report=events.append)
    assert [o.cell for o in outcomes] == [c.name for c in cells]
    assert {o.cell: o.exit_code for o in outcomes if o.status == "failed"} == raised
    assert all("as the cell asked" in o.message and "Traceback" in o.details for o in outcomes if o.status == "failed")
    assert [o.status for o in outcomes[-3:]] == ["done"] * 3
    assert Counter(e["cell"] for e in events if e["kind"] == "end") == Counter(c.name for c in cells)
    again = run_cells(cells[-3:], tmp_path, jobs=2, work=work)
    assert all(o.skipped for o in again)
    assert Counter((tmp_path / "log").read_text().split())["good-0"] == 1


def test_a_killed_worker_is_replaced_and_its_cell_tried_once_more(tmp_path: Path, work: Work) -> None:
    cells = [Cell("once", {"killed": 1}), Cell("always", {"killed": 9}), Cell("good", {})]
    outcomes = {o.cell: o for o in run_cells(cells, tmp_path, jobs=1, work=work)}
    assert outcomes["once"].status == outcomes["good"].status == "done"
    assert outcomes["always"].exit_code == 5
    assert "SIGKILL 2 times" in outcomes["always"].message
    assert Counter((tmp_path / "log").read_text().split()) == {"once": 2, "always": 2, "good": 1}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_workers_once_and_the_sweep_goes_on_later(
    tmp_path: Path, work: Work, number: signal.Signals
) -> None:
    cells = [Cell("long", {"seconds": 60}), Cell("waiting", {})]
    before = signal.getsignal(number)

    def interrupt(event: dict[str, Any]) -> None:
        if event["kind"] == "epoch":
            os.kill(os.getpid(), number)

    outcomes = run_cells(cells, tmp_path, jobs=1, work=work, report=interrupt)
    assert [(o.status, o.exit_code) for o in outcomes] == [("interrupted", 75)] * 2
    assert outcomes[0].message == "saved"  # it was asked once: a second signal would have ended it at once
    assert signal.getsignal(number) is before
    assert not is_done(tmp_path / "runs" / "long")
    cells[0] = Cell("long", {})
    assert [o.status for o in run_cells(cells, tmp_path, jobs=1, work=work)] == ["done", "done"]


def test_two_sweeps_in_one_folder_do_every_cell_once(tmp_path: Path, work: Work) -> None:
    cells = [Cell(f"cell-{i}", {"seconds": 0.05}) for i in range(12)]
    found: list[list[str]] = []
    other = threading.Thread(
        target=lambda: found.append([o.status for o in run_cells(cells, tmp_path, jobs=1, work=work)])
    )
    other.start()
    found.append([o.status for o in run_cells(cells, tmp_path, jobs=1, work=work)])
    other.join()
    assert found == [["done"] * 12] * 2
    assert Counter((tmp_path / "log").read_text().split()) == {c.name: 1 for c in cells}


def test_a_plan_that_cannot_run_is_refused(tmp_path: Path, work: Work) -> None:
    with pytest.raises(UsageError, match="jobs"):
        run_cells([Cell("a", {})], tmp_path, jobs=0, work=work)
    with pytest.raises(UsageError, match="same name"):
        run_cells([Cell("a", {}), Cell("a", {})], tmp_path, work=work)
    assert run_cells([], tmp_path, work=work) == []


def test_a_damaged_summary_is_not_done(tmp_path: Path) -> None:
    for text in ("", "[]", '{"status": "failed"}', "\xff"):
        (tmp_path / "summary.json").write_text(text, encoding="latin-1")
        assert not is_done(tmp_path)
