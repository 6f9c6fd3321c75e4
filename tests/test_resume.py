"""A run that was stopped anywhere, in whatever way, ends in the same bytes as one that was not."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from groundstate.errors import DataError, GroundstateError, Interrupted
from groundstate.training import checkpoint, loop
from groundstate.training.config import TrainConfig
from groundstate.training.loop import Run, train
from groundstate.training.recorder import read_metrics

# 4 steps an epoch, the last one short; a checkpoint at 3, 6 and at the ends of epochs
TINY: dict[str, Any] = {
    "train_size": 100,
    "batch_size": 32,
    "epochs": 2,
    "checkpoint_steps": 3,
    "monitor": "nuclear + path_energy",
    "seed": 3,
}
COUPLINGS: dict[str, dict[str, Any]] = {
    "none": {},
    "grad": {"energy": "1e-2*nuclear + 1e-3*graph + 1e-2*path_energy", "every": 2},
    "prox": {"energy": "1e-2*nuclear + 1e-2*path_energy@grad", "coupling": "prox", "final_prox": 2.0},
    "loss": {"energy": "1e-2*schatten(p=0.5) + 1e-3*graph", "coupling": "loss", "accumulate": 3},
    "monitor": {"energy": "nuclear + path_energy", "coupling": "monitor", "schedule": "cosine"},
    "adamw": {"energy": "1e-3*nuclear", "optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1, "clip": 0.5},
}


def settings(name: str, **more: Any) -> TrainConfig:
    return TrainConfig(**TINY | COUPLINGS[name] | more)


def end_of(out: Path) -> dict[str, Any]:
    """Everything that must not depend on how often a run was stopped: all bytes of the last state, all records."""
    found = checkpoint.load_latest(out / "checkpoints")
    assert found is not None
    assert found.notes == []
    records = [r | {"seconds": 0} for r in read_metrics(out / "metrics.jsonl")]
    summary = json.loads((out / "summary.json").read_text())
    return {
        "files": {p.name: p.read_bytes() for p in sorted(found.path.glob("*.safetensors"))},
        "records": records,
        "summary": {k: v for k, v in summary.items() if k not in ("seconds", "step_ms")},
    }


class Killed(BaseException):
    """The process ends here."""


def killed_after(steps: int, config: TrainConfig, out: Path) -> None:
    """Runs, or resumes, and stops dead before anything is saved or recorded after ``steps`` further steps."""
    made = [0]
    real = Run._between_steps

    def between(self: Run) -> None:
        made[0] += 1
        if made[0] == steps:
            raise Killed
        real(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "_between_steps", between)
        with pytest.raises(Killed):
            train(config, out, resume=(out / "run.json").exists())


@pytest.mark.parametrize("name", COUPLINGS)
def test_killed_after_any_step_it_ends_in_the_same_bytes(tmp_path: Path, name: str) -> None:
    config = settings(name)
    train(config, tmp_path / "whole")
    whole = end_of(tmp_path / "whole")
    assert "weights.safetensors" in whole["files"]
    assert "optimizer.safetensors" in whole["files"]
    for step in range(1, 9):
        out = tmp_path / str(step)
        killed_after(step, config, out)
        train(config, out, resume=True)
        assert end_of(out) == whole


def test_killed_again_and_again(tmp_path: Path) -> None:
    config = settings("grad")
    train(config, tmp_path / "whole")
    out = tmp_path / "run"
    for steps in (5, 1, 3, 2, 1):
        killed_after(steps, config, out)
    train(config, out, resume=True)
    assert end_of(out) == end_of(tmp_path / "whole")


def test_killed_before_its_first_checkpoint_it_starts_afresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = settings("prox"), tmp_path / "run"
    train(config, tmp_path / "whole")

    def dies(self: Run) -> None:
        raise Killed

    for method in ("_record_epoch", "save"):
        with monkeypatch.context() as patch:
            patch.setattr(Run, method, lambda self, *args: dies(self))
            with pytest.raises(Killed):
                train(config, out, resume=(out / "run.json").exists())
    train(config, out, resume=True)
    assert end_of(out) == end_of(tmp_path / "whole")


def test_killed_after_going_back_it_does_not_go_back_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("none", nonfinite="backoff", epochs=3)
    real = Run._step

    def step(self: Run, index: Any) -> None:
        if self.at.step == 7 and self.at.lr_scale == 1.0:
            raise loop.NonFiniteError("the data loss is nan")
        real(self, index)

    monkeypatch.setattr(Run, "_step", step)
    train(config, tmp_path / "whole", progress=lambda event: None)
    whole = end_of(tmp_path / "whole")
    assert [r["lr"] for r in whole["records"] if r["kind"] == "epoch"] == [0.1, 0.1, 0.05, 0.05]
    for steps in (7, 8, 9):
        out = tmp_path / str(steps)
        killed_after_quietly(steps, config, out)
        train(config, out, resume=True, progress=lambda event: None)
        assert end_of(out) == whole


def killed_after_quietly(steps: int, config: TrainConfig, out: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Run, "note", lambda self, text: None)
        killed_after(steps, config, out)


# ---------------------------------------------------------------------- damaged checkpoints


def test_a_damaged_checkpoint_costs_only_time(tmp_path: Path) -> None:
    config, out = settings("grad"), tmp_path / "run"
    train(config, tmp_path / "whole")
    killed_after(7, config, out)
    newest = out / "checkpoints" / "step-00000006"
    raw = bytearray((newest / "weights.safetensors").read_bytes())
    raw[len(raw) // 2] ^= 1
    (newest / "weights.safetensors").write_bytes(raw)
    notes: list[str] = []
    train(config, out, resume=True, progress=lambda e: notes.append(e["text"]) if e["kind"] == "note" else None)
    assert len(notes) == 1
    assert f"checkpoint {newest} is damaged and was skipped: weights.safetensors" in notes[0]
    assert end_of(out) == end_of(tmp_path / "whole")


def test_when_every_checkpoint_is_damaged_nothing_is_loaded(tmp_path: Path) -> None:
    config, out = settings("none"), tmp_path / "run"
    killed_after(7, config, out)
    for path in (out / "checkpoints").glob("*/state.json"):
        path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"no checkpoint in .* can be used") as error:
        train(config, out, resume=True)
    assert error.value.exit_code == 3


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    config = settings("none")
    for name, c in (("run", config), ("other", settings("none", lr=0.3))):
        killed_after(7, c, tmp_path / name)
    path = tmp_path / "run" / "checkpoints" / "step-00000006"
    for file in path.iterdir():
        file.write_bytes((tmp_path / "other" / "checkpoints" / path.name / file.name).read_bytes())
    with pytest.raises(loop.UsageError, match=r"is of another configuration \(lr: 0.3 -> 0.1\)"):
        train(config, tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "lines",
    [
        slice(0, 0),
        slice(1, None),  # without the spectra
        slice(0, -1),  # without the last epoch, whose checkpoint is there
    ],
)
def test_metrics_that_lack_an_epoch_are_not_taken_for_whole(tmp_path: Path, lines: slice) -> None:
    config, out = settings("none"), tmp_path / "run"
    killed_after(6, config, out)
    metrics = out / "metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[lines]))
    with pytest.raises(DataError, match="has not each epoch from 0 to 1 once"):
        train(config, out, resume=True)


def test_random_damage_ends_in_a_whole_run_or_in_one_line(tmp_path: Path) -> None:
    rng = random.Random(5)
    config = settings("grad")
    train(config, tmp_path / "whole")
    errors: list[str] = []
    for number in range(60):
        out = tmp_path / str(number)
        shutil.copytree(tmp_path / "whole", out)
        (out / "summary.json").unlink()
        if number % 2:
            shutil.rmtree(out / "checkpoints" / "step-00000008")
        victim = rng.choice([p for p in sorted(out.rglob("*")) if p.is_file()])
        raw = bytearray(victim.read_bytes())
        at = rng.randrange(len(raw))
        raw[at : at + 1] = rng.choice([b"", b"\x00", bytes([raw[at] ^ 1 << rng.randrange(8)]), rng.randbytes(30)])
        victim.write_bytes(rng.choice([raw, raw, raw[:at], b"{}", b"null"]))
        try:
            train(config, out, resume=True, progress=lambda event: None)
        except GroundstateError as error:
            errors.append(str(error))
        else:
            assert end_of(out)["files"] == end_of(tmp_path / "whole")["files"]
    assert len(errors) > 10
    assert all(len(e.splitlines()) == 1 for e in errors)


def test_another_number_of_threads_is_said(tmp_path: Path) -> None:
    killed_after(5, settings("none"), tmp_path / "run")
    with pytest.warns(UserWarning, match="the run used 1 threads, now 2"):
        train(settings("none", threads=2), tmp_path / "run", resume=True)


# ---------------------------------------------------------------------- signals


def test_a_signal_after_any_step_saves_and_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("grad", checkpoint_steps=None)
    train(config, tmp_path / "whole")
    real = Run._step
    for step in range(1, 9):
        out = tmp_path / str(step)

        def stepping(self: Run, index: Any, last: int = step) -> None:
            real(self, index)
            if self.at.step == last:
                signal.raise_signal(signal.SIGTERM if last % 2 else signal.SIGINT)

        with monkeypatch.context() as patch:
            patch.setattr(Run, "_step", stepping)
            if step < 8:
                with pytest.raises(Interrupted, match=f"interrupted at step {step} of 8, saved") as error:
                    train(config, out)
                assert error.value.exit_code == 75
            else:  # nothing is left to interrupt
                train(config, out)
        train(config, out, resume=True)
        assert end_of(out) == end_of(tmp_path / "whole")
        assert not (out / "run.lock").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def test_sigterm_ends_the_command_with_75_and_it_can_be_resumed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [sys.executable, "-m", "groundstate", "train", "--epochs", "300", "--train-size", "100", "--quiet"]
    process = subprocess.Popen([*command, "--out", str(out)], env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + 60
        while not (out / "checkpoints" / "step-00000003").exists():
            assert process.poll() is None, process.communicate()[1]
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 75, errors
    assert errors.startswith("error: interrupted at step ")
    assert len(errors.splitlines()) == 1
    assert not (out / "summary.json").exists()
    found = checkpoint.load_latest(out / "checkpoints")
    assert found is not None
    assert f"interrupted at step {found.step} of 300, saved: continue with --resume {out}" in errors
    config = TrainConfig.from_dict(found.state["config"])
    train(config, tmp_path / "whole")
    train(config, out, resume=True)
    assert end_of(out) == end_of(tmp_path / "whole")


IMPATIENT = """
import os, signal, sys
from pathlib import Path
from groundstate.training.config import TrainConfig
from groundstate.training.loop import train

def twice(event):
    if event["kind"] == "epoch" and event["epoch"] == 2:
        os.kill(os.getpid(), {first})
        os.kill(os.getpid(), {second})
        os.kill(os.getpid(), {second})

train(TrainConfig(train_size=100, epochs=5), Path(sys.argv[1]), progress=twice)
"""


@pytest.mark.parametrize(("second", "code"), [("signal.SIGTERM", 143), ("signal.SIGINT", 130)])
def test_a_second_signal_ends_at_once(tmp_path: Path, second: str, code: int) -> None:
    script = IMPATIENT.format(first="signal.SIGTERM", second=second)
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path / "run")], env=ENVIRONMENT, timeout=60)
    assert done.returncode == code
    out = tmp_path / "run"
    config = TrainConfig(train_size=100, epochs=5)
    train(config, out, resume=True)  # its lock is that of a dead process
    train(config, tmp_path / "whole")
    assert end_of(out) == end_of(tmp_path / "whole")


# ---------------------------------------------------------------------- kill -9


def kill_and_resume(folder: Path, kills: int, seed: int) -> int:
    """Kills real processes at random moments; returns how many were killed before they had ended.

    Runs take turns through the couplings. A server process has everything loaded and forks the runs, so that a kill
    falls into a run and not into the loading of torch.
    """
    rng = random.Random(seed)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["groundstate.training.loop", "sklearn.datasets", "sklearn.model_selection"])
    wholes: dict[str, tuple[dict[str, Any], float]] = {}
    stopped = 0
    for number in range(kills):
        name = list(COUPLINGS)[number % len(COUPLINGS)]
        config = settings(name, epochs=8, checkpoint_steps=2)
        if name not in wholes:
            for attempt in ("timed",) if wholes else ("first", "timed"):  # the first one also starts the server
                whole = folder / name / attempt
                began = time.monotonic()
                process = context.Process(target=train, args=(config, whole))
                process.start()
                process.join()
                assert process.exitcode == 0
                wholes[name] = end_of(whole), time.monotonic() - began
        expected, seconds = wholes[name]
        out = folder / name / f"run-{number}"
        process = context.Process(target=train, args=(config, out))
        process.start()
        time.sleep(rng.uniform(0.0, seconds))
        process.kill()
        process.join()
        stopped += process.exitcode == -signal.SIGKILL
        train(config, out, resume=(out / "run.json").exists())
        assert end_of(out) == expected, f"{name}, kill {number}"
    return stopped


def test_kill_9_at_4_random_moments(tmp_path: Path) -> None:
    kill_and_resume(tmp_path, 4, seed=20)


@pytest.mark.slow
def test_kill_9_at_50_random_moments(tmp_path: Path) -> None:
    # the moments are spread over the time that a whole run takes; on a busy machine some come too early or too late
    assert kill_and_resume(tmp_path, 50, seed=21) >= 25
