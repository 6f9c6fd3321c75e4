"""A checkpoint is old or new, never another thing, and no changed bit of it goes unseen."""

from __future__ import annotations

import errno
import json
import math
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from groundstate.errors import DataError, ResourceError, UsageError
from groundstate.training import checkpoint
from groundstate.training.checkpoint import load_latest, save


def content(seed: int) -> tuple[dict[str, dict[str, Tensor]], dict[str, Any]]:
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(5, 3, generator=g)
    tensors = {
        "weights": {"0.weight": w, "0.bias": torch.randn(5, generator=g)},
        "optimizer": {"0/momentum": w.T, "0/step": torch.tensor(float(seed))},
        "random": {"torch": torch.get_rng_state()},
    }
    return tensors, {"seed": seed, "loss": 0.5, "name": "a", "list": [1, None, True], "deep": {"x": -2.5}}


def same(a: dict[str, dict[str, Tensor]], b: dict[str, dict[str, Tensor]]) -> bool:
    return {k: set(v) for k, v in a.items()} == {k: set(v) for k, v in b.items()} and all(
        torch.equal(t, b[k][n]) and t.dtype == b[k][n].dtype for k, v in a.items() for n, t in v.items()
    )


def test_everything_comes_back(tmp_path: Path) -> None:
    tensors, state = content(1)
    assert load_latest(tmp_path / "none") is None
    path = save(tmp_path, 123, tensors, state)
    found = load_latest(tmp_path)
    assert found is not None
    assert path.name == "step-00000123"
    assert (found.path, found.step, found.state, found.notes) == (path, 123, state, [])
    assert same(found.tensors, tensors)
    assert set(os.listdir(path)) == {"MANIFEST.json", "state.json"} | {f"{k}.safetensors" for k in tensors}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.bool])
def test_dtypes_shapes_and_shared_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    w = torch.randn(4, 4, generator=torch.Generator().manual_seed(3)).to(dtype)
    tensors = {"weights": {"a": w, "tied": w, "row": w[1], "t": w.T, "empty": w[:0], "scalar": w[0, 0]}}
    save(tmp_path, 0, tensors, {})
    found = load_latest(tmp_path)
    assert found is not None
    assert same(found.tensors, tensors)


def test_non_finite_numbers_are_valid_json_and_come_back(tmp_path: Path) -> None:
    path = save(tmp_path, 1, {}, {"a": math.nan, "b": [math.inf, -math.inf], "c": {"d": math.nan}})

    def refuse(name: str) -> float:
        raise AssertionError(f"{name} is not JSON")

    json.loads((path / "state.json").read_text(), parse_constant=refuse)
    found = load_latest(tmp_path)
    assert found is not None
    assert math.isnan(found.state["a"])
    assert math.isnan(found.state["c"]["d"])
    assert found.state["b"] == [math.inf, -math.inf]


def test_values_that_cannot_be_stored_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    bad: list[tuple[dict[str, Any], dict[Any, Any]]] = [
        ({}, {"t": torch.zeros(1)}),
        ({}, {1: 2}),
        ({}, {"__float__": "nan"}),
        ({"../x": {}}, {}),
    ]
    for tensors, state in bad:
        with pytest.raises(UsageError):
            save(tmp_path, 1, tensors, state)
    with pytest.raises(UsageError, match="keep"):
        save(tmp_path, 1, {}, {}, keep=1)
    assert list(tmp_path.iterdir()) == []


def test_tensor_names_are_no_paths(tmp_path: Path) -> None:
    save(tmp_path / "c", 1, {"weights": {"../../x": torch.ones(1)}}, {})
    assert [p.name for p in tmp_path.iterdir()] == ["c"]
    found = load_latest(tmp_path / "c")
    assert found is not None
    assert set(found.tensors["weights"]) == {"../../x"}


def test_old_checkpoints_are_pruned(tmp_path: Path) -> None:
    for step in range(6):
        save(tmp_path, step, *content(step), keep=3)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{s:08d}" for s in (3, 4, 5)]


def test_pruning_never_counts_a_damaged_checkpoint(tmp_path: Path) -> None:
    for step in (1, 2):
        save(tmp_path, step, *content(step))
    (tmp_path / "step-00000002" / "state.json").write_text("{}")
    save(tmp_path, 3, *content(3))
    assert (tmp_path / "step-00000001").is_dir()  # the second whole one
    save(tmp_path, 4, *content(4))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_saving_an_earlier_step_makes_it_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        save(tmp_path, step, *content(step), keep=5)
    save(tmp_path, 2, *content(9), keep=5)
    found = load_latest(tmp_path)
    assert found is not None
    assert (found.step, found.state["seed"]) == (2, 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000002"]


def test_modes_follow_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        path = save(tmp_path, 1, *content(1))
    finally:
        os.umask(before)
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {0o640}
    assert stat.S_IMODE(path.stat().st_mode) == 0o750


# ---------------------------------------------------------------------- damage


def test_every_one_of_200_random_corruptions_is_seen(tmp_path: Path) -> None:
    rng = random.Random(20)
    good, new = content(1), content(2)
    save(tmp_path, 1, *good)
    path = save(tmp_path, 2, *new)
    names = sorted(os.listdir(path))
    for case in range(200):
        victim = path / names[case % len(names)]
        raw = victim.read_bytes()
        if rng.random() < 0.7:
            changed = bytearray(raw)
            changed[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        else:
            changed = raw[: rng.randrange(len(raw))]
        victim.write_bytes(changed)
        found = load_latest(tmp_path)
        assert found is not None
        assert found.step == 1, f"case {case}: a change of {victim.name} went unseen"
        assert found.state == good[1]
        assert same(found.tensors, good[0])
        assert len(found.notes) == 1
        assert str(path) in found.notes[0]
        victim.write_bytes(raw)
    found = load_latest(tmp_path)
    assert found is not None
    assert (found.step, found.notes) == (2, [])


def _extra(path: Path) -> None:
    (path / "more").write_text("x")


def _missing(path: Path) -> None:
    (path / "weights.safetensors").unlink()


def _no_manifest(path: Path) -> None:
    (path / "MANIFEST.json").unlink()


def _other_step(path: Path) -> None:
    shutil.rmtree(path)
    shutil.copytree(path.with_name("step-00000001"), path)


def _link(path: Path) -> None:
    aside = path.parent / "aside"
    (path / "state.json").rename(aside)
    (path / "state.json").symlink_to(aside)


def _swapped(path: Path) -> None:
    shutil.copy(path.with_name("step-00000001") / "weights.safetensors", path / "weights.safetensors")


def _respelled(path: Path) -> None:
    manifest = path / "MANIFEST.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text())))


def _twice(path: Path) -> None:
    manifest = path / "MANIFEST.json"
    manifest.write_text(manifest.read_text().replace('"schema": 1,', '"schema": 1,\n "schema": 1,'))


def _plain_file(path: Path) -> None:
    shutil.rmtree(path)
    path.write_text("")


@pytest.mark.parametrize(
    "damage", [_extra, _missing, _no_manifest, _other_step, _link, _swapped, _respelled, _twice, _plain_file]
)
def test_other_damage_is_seen(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    save(tmp_path, 1, *content(1))
    damage(save(tmp_path, 2, *content(2)))
    found = load_latest(tmp_path)
    assert found is not None
    assert (found.step, len(found.notes)) == (1, 1)


def test_all_damaged_is_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    for step in (1, 2):
        _missing(save(tmp_path, step, *content(step)))
    with pytest.raises(DataError, match=r"step-00000002.*step-00000001"):
        load_latest(tmp_path)


# ---------------------------------------------------------------------- crashes


class Crash(BaseException):
    """The machine stops here."""


class CrashingDisk:
    """Lets ``limit`` operations pass; the next one is half done (a write) or not done, and none follows."""

    OPERATIONS = ("open", "write", "fsync", "rename", "mkdir", "unlink", "rmdir")

    def __init__(self, patch: pytest.MonkeyPatch, limit: int) -> None:
        self.limit, self.count = limit, 0
        for name in self.OPERATIONS:
            patch.setattr(os, name, self._wrap(name, getattr(os, name)))

    def _wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            if self.count == self.limit and name == "write":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            if self.count >= self.limit:
                raise Crash
            return real(*args, **kwargs)

        return operation


@pytest.mark.parametrize("step", [3, 2], ids=["next step", "same step"])
@pytest.mark.parametrize("before", [0, 2])
def test_a_crash_at_any_operation_leaves_the_old_or_the_new(tmp_path: Path, step: int, before: int) -> None:
    old, new = content(2), content(9)
    crashed, seen = 0, set()
    for limit in range(1, 500):
        folder = tmp_path / str(limit)
        for k in range(before):
            save(folder, k + 1, *content(k + 1))
        with pytest.MonkeyPatch.context() as patch:
            disk = CrashingDisk(patch, limit)
            try:
                save(folder, step, *new)
            except Crash:
                crashed += 1
        found = load_latest(folder)
        if found is None:
            assert before == 0
        else:
            assert found.notes == []
            tensors, state = new if found.state["seed"] == 9 else old
            assert found.state == state
            assert same(found.tensors, tensors)
        seen.add(found and found.state["seed"])
        save(folder, 4, *new)  # what the crash left does not stand in the way
        assert all("." not in p.name for p in folder.iterdir())
        if disk.count < limit:
            break
    else:
        pytest.fail("the save never came to its end")
    assert crashed > 20  # four or five files, each opened, written and fsynced, and the folders
    assert seen == ({None, 9} if before == 0 else {2, 9})


# ---------------------------------------------------------------------- no space


@pytest.mark.parametrize("operation", ["open", "write", "fsync", "rename", "mkdir"])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_keeps_the_old_checkpoint(tmp_path: Path, operation: str, code: int) -> None:
    folder = tmp_path / "c"
    save(folder, 1, *content(1))
    calls = 0

    def full(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        raise OSError(code, os.strerror(code))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, operation, full)
        if operation == "open":  # at the first file only: removing what was written aside opens too
            patch.undo()
            patch.setattr(checkpoint, "_write", full)
        with pytest.raises(ResourceError, match="older checkpoints are kept: free some space"):
            save(folder, 2, *content(2))
    assert calls >= 1
    assert [p.name for p in folder.iterdir()] == ["step-00000001"]
    found = load_latest(folder)
    assert found is not None
    assert found.step == 1


def test_space_is_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(ResourceError, match="1000 bytes free"):
        save(tmp_path, 1, *content(1))
    assert list(tmp_path.iterdir()) == []
