"""The record of a run survives what kills the run, and has one writer."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import random
import socket
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from groundstate.errors import DataError, ResourceError, UsageError
from groundstate.training.recorder import LOCK, Recorder, lock, read_metrics, write_json

METRICS = "metrics.jsonl"


def test_start_says_what_the_run_is(tmp_path: Path) -> None:
    Recorder(tmp_path).start({"config": {"lr": 0.1}, "threads": 3, "data_sha256": {"digits": "00"}})
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["schema"] == 1
    assert (run["config"], run["threads"], run["data_sha256"]) == ({"lr": 0.1}, 3, {"digits": "00"})
    assert run["versions"]["torch"] == str(torch.__version__)
    assert set(run["versions"]) == {"groundstate", "torch", "numpy", "python"}
    assert run["command"] == sys.argv
    assert run["created"].endswith("+00:00")
    assert [p.name for p in tmp_path.iterdir()] == ["run.json"]


def test_start_refuses_the_metrics_of_another_run(tmp_path: Path) -> None:
    Recorder(tmp_path).append({"step": 1})
    with pytest.raises(UsageError, match=METRICS):
        Recorder(tmp_path).start({})


def test_git_revision_and_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(["git", *identity, *arguments], capture_output=True, text=True, check=True).stdout.strip()

    def recorded(folder: Path) -> Any:
        folder.mkdir()
        Recorder(folder).start({})
        return json.loads((folder / "run.json").read_text())["git"]

    outside = tmp_path / "outside"
    outside.mkdir()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    monkeypatch.chdir(outside)
    assert recorded(tmp_path / "a") is None
    repository = tmp_path / "repository"
    repository.mkdir()
    monkeypatch.chdir(repository)
    try:
        git("init", "-q")
    except FileNotFoundError:
        pytest.skip("git is not installed")
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert recorded(tmp_path / "b") == {"hash": git("rev-parse", "HEAD"), "dirty": False}
    (repository / "new").touch()
    assert recorded(tmp_path / "c")["dirty"] is True
    monkeypatch.setenv("PATH", str(outside))
    assert recorded(tmp_path / "d") is None


# ---------------------------------------------------------------------- metrics


def test_records_come_back_in_order(tmp_path: Path) -> None:
    records = [{"kind": "epoch", "step": i, "x": [0.1 * i, None, "a\nb", True]} for i in range(5)]
    for record in records:
        Recorder(tmp_path).append(record)
    assert read_metrics(tmp_path / METRICS) == records


def test_a_record_is_one_write_of_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[bytes] = []
    real = os.write

    def write(descriptor: int, content: bytes) -> int:
        written.append(content)
        return real(descriptor, content)

    monkeypatch.setattr(os, "write", write)
    Recorder(tmp_path).append({"text": "x" * 100_000 + "\n"})
    assert len(written) == 1
    assert written[0].count(b"\n") == 1


def test_non_finite_numbers_are_text(tmp_path: Path) -> None:
    Recorder(tmp_path).append({"a": math.nan, "b": [math.inf], "c": {"d": -math.inf}})
    assert read_metrics(tmp_path / METRICS) == [{"a": "nan", "b": ["inf"], "c": {"d": "-inf"}}]
    write_json(tmp_path / "x.json", {"a": math.nan, "p": tmp_path, "t": (1, 2)})
    assert json.loads((tmp_path / "x.json").read_text()) == {"a": "nan", "p": str(tmp_path), "t": [1, 2]}


@pytest.mark.parametrize("bad", [{"a": torch.zeros(1)}, {1: 2}, {"a": {1, 2}}])
def test_what_is_not_json_is_refused(tmp_path: Path, bad: dict[Any, Any]) -> None:
    with pytest.raises(UsageError):
        Recorder(tmp_path).append(bad)
    with pytest.raises(UsageError):
        write_json(tmp_path / "x.json", bad)
    assert list(tmp_path.iterdir()) == []


def test_every_cut_of_the_file_loses_only_the_line_that_was_cut(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    records = [{"step": i, "x": "y" * i} for i in range(4)]
    for record in records:
        Recorder(tmp_path).append(record)
    whole = path.read_bytes()
    for length in range(len(whole) + 1):
        path.write_bytes(whole[:length])
        count = whole[:length].count(b"\n")
        assert read_metrics(path) == records[:count]
        Recorder(tmp_path).append({"step": 9})
        assert read_metrics(path) == [*records[:count], {"step": 9}]


def test_a_long_incomplete_line_is_removed(tmp_path: Path) -> None:
    path = tmp_path / METRICS
    path.write_text('{"step": 1}\n{"x": "' + "y" * 20_000)
    Recorder(tmp_path).append({"step": 2})
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]


@pytest.mark.parametrize("line", ['{"a": ', "", "[1]", "7", '{"a": NaN}', '{"a": 1, "a": 2}', '{"a": "\udcff"}'])
def test_a_broken_middle_line_is_named_by_its_number(tmp_path: Path, line: str) -> None:
    path = tmp_path / METRICS
    path.write_bytes(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=r"line 2 of .*metrics\.jsonl"):
        read_metrics(path)


def test_missing_metrics(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot read"):
        read_metrics(tmp_path / METRICS)


def test_truncation_drops_what_lies_beyond_the_step(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.truncate_after(5)  # nothing there yet
    records = [{"kind": "start"}, *({"step": i, "x": math.inf} for i in range(6))]
    for record in records:
        recorder.append(record)
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 2, "cut')
    recorder.truncate_after(3)
    assert read_metrics(tmp_path / METRICS) == [{"kind": "start"}, *({"step": i, "x": "inf"} for i in range(4))]
    recorder.truncate_after(-1)
    assert (tmp_path / METRICS).read_bytes() == b""


def test_a_full_disk_leaves_the_metrics_as_they_were(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    recorder.append({"step": 1})
    before = (tmp_path / METRICS).read_bytes()
    real = os.write

    def half(descriptor: int, content: bytes) -> int:
        return real(descriptor, content[: len(content) // 2])

    def full(descriptor: int, content: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    for write in (half, full):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "write", write)
            with pytest.raises(ResourceError, match=METRICS):
                recorder.append({"step": 2})
        assert (tmp_path / METRICS).read_bytes() == before


# ---------------------------------------------------------------------- documents


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_document_is_old_or_new(tmp_path: Path, operation: str) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, operation, full)
        with pytest.raises(ResourceError, match=r"x\.json"):
            write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        Recorder(tmp_path).start({})
        Recorder(tmp_path).append({})
        Recorder(tmp_path).finish({"status": "done"})
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in tmp_path.iterdir()}
    assert modes == dict.fromkeys(("run.json", METRICS, "summary.json"), 0o640)


# ---------------------------------------------------------------------- lock


def leave_lock(folder: Path, **changes: Any) -> str:
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": "0"} | changes
    (folder / LOCK).write_text(json.dumps(owner))
    return str(owner["pid"])


def gone_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_lock_is_held_and_released(tmp_path: Path) -> None:
    for _ in range(2):
        with lock(tmp_path):
            owner = json.loads((tmp_path / LOCK).read_text())
            assert (owner["pid"], owner["host"]) == (os.getpid(), socket.gethostname())
            with pytest.raises(UsageError, match=str(os.getpid())), lock(tmp_path):
                pass
            assert (tmp_path / LOCK).exists()
        assert list(tmp_path.iterdir()) == []
    with pytest.raises(RuntimeError), lock(tmp_path):
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def test_a_living_process_keeps_its_lock(tmp_path: Path) -> None:
    code = "import sys; from pathlib import Path; from groundstate.training.recorder import lock\n"
    code += "with lock(Path(sys.argv[1])): print('locked', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "locked\n"
    with pytest.raises(UsageError, match=f"process {other.pid} on {socket.gethostname()}"), lock(tmp_path):
        pass
    other.kill()
    other.wait()
    other.stdin.close()
    other.stdout.close()
    assert (tmp_path / LOCK).exists()
    with lock(tmp_path):  # its holder was killed
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["gone", "own pid", "empty", "garbage", "no pid"])
def test_a_stale_lock_is_taken_over(tmp_path: Path, kind: str) -> None:
    if kind == "gone":
        leave_lock(tmp_path, pid=gone_pid())
    elif kind == "own pid":  # of an earlier process that had the same number, as in containers
        leave_lock(tmp_path)
    else:
        (tmp_path / LOCK).write_text({"empty": "", "garbage": "{", "no pid": "[]"}[kind])
    with lock(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["pid"] == os.getpid()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to tell when a process started")
def test_a_reused_pid_does_not_keep_a_lock(tmp_path: Path) -> None:
    leave_lock(tmp_path, pid=os.getppid())
    with lock(tmp_path):
        pass


def test_a_lock_of_another_host_is_respected(tmp_path: Path) -> None:
    pid = leave_lock(tmp_path, host="elsewhere", pid=gone_pid())
    with pytest.raises(UsageError, match=f"process {pid} on elsewhere.*remove"), lock(tmp_path):
        pass
    assert (tmp_path / LOCK).exists()


def _compete(folder: Path, start: Any, results: Any) -> None:
    start.wait()
    rng = random.Random(os.getpid())
    held = 0
    for _ in range(200):
        try:
            with lock(folder):
                descriptor = os.open(folder / "inside", os.O_CREAT | os.O_EXCL)  # fails where two are inside
                os.close(descriptor)
                held += 1
                if rng.random() < 0.5:
                    os.sched_yield()
                (folder / "inside").unlink()
        except UsageError:
            pass
        except FileExistsError:
            results.put(-1)
            return
    results.put(held)


def test_of_several_processes_one_takes_over(tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    leave_lock(tmp_path, pid=gone_pid())
    start, results = context.Event(), context.Queue()
    processes = [context.Process(target=_compete, args=(tmp_path, start, results)) for _ in range(3)]
    for process in processes:
        process.start()
    start.set()
    held = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert min(held) >= 0
    assert sum(held) > 0
    assert list(tmp_path.iterdir()) == []
