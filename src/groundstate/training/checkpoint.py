"""Checkpoints: a folder that appears whole or not at all, and that tells when a single bit of it has changed.

``step-00000123/`` holds one safetensors file per group of tensors, ``state.json`` for everything else, and
``MANIFEST.json`` with size and sha256 of each file and of itself. It is written aside, fsynced, and renamed; at any
instant the newest readable checkpoint is the old or the new one. Loading verifies every byte and falls back, saying so,
to the newest checkpoint that is whole.

Reference: T. S. Pillai et al., All file systems are not created equal: on the complexity of crafting crash-consistent
applications, OSDI 2014.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundstate.errors import DataError, ResourceError, UsageError
from groundstate.safetensors_file import header, unique_keys

MANIFEST, STATE = "MANIFEST.json", "state.json"
SCHEMA = 1

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_FLOAT = "__float__"


@dataclass(frozen=True)
class Checkpoint:
    """A verified checkpoint.

    Attributes:
        path: Its folder.
        step: The step it was saved at.
        tensors: Group name -> tensor name -> tensor, on the CPU.
        state: The plain values.
        notes: What newer checkpoints were skipped, and why; empty in the ordinary case.
    """

    path: Path
    step: int
    tensors: dict[str, dict[str, Tensor]]
    state: dict[str, Any]
    notes: list[str] = field(default_factory=list)


def save(
    folder: Path, step: int, tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any], keep: int = 2
) -> Path:
    """Writes ``folder/step-N`` and makes it the newest checkpoint.

    The cost is one copy of the tensors in memory, one write, and one read of ``keep`` checkpoints to verify them before
    anything older is removed. Checkpoints of later steps (damaged, or of a course that was given up) are removed too.

    Args:
        folder: The folder of all checkpoints of a run.
        step: The step; a checkpoint of the same step is replaced.
        tensors: Group name -> tensor name -> tensor; each group becomes one file. Tensors may share memory or be
            views: each is written in full.
        state: Plain JSON values; floats may be NaN or infinite.
        keep: How many whole checkpoints to keep, at least 2.

    Returns:
        The folder of the checkpoint.

    Raises:
        UsageError: a group name or a value cannot be stored, or ``keep`` or ``step`` is out of range.
        ResourceError: the disk is full or cannot be written; older checkpoints are as they were.
    """
    folder = Path(folder)
    if step < 0 or keep < 2:
        raise UsageError(f"a checkpoint needs step >= 0 and keep >= 2, got step={step}, keep={keep}")
    files = _serialize(tensors, state)
    files[MANIFEST] = _manifest(step, files)
    final = folder / f"step-{step:08d}"
    aside = folder / f"{final.name}.tmp"
    replaced = folder / f"{final.name}.old"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        _check_space(folder, sum(map(len, files.values())))
        os.mkdir(aside)
        for name, content in files.items():
            _write(aside / name, content)
        _fsync_folder(aside)
        if final.exists():
            if replaced.exists():
                shutil.rmtree(replaced)
            os.rename(final, replaced)
        os.rename(aside, final)
        _fsync_folder(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise _resource_error(final, error) from error
    try:
        _prune(folder, step, keep)
    except OSError as error:
        raise _resource_error(final, error) from error
    return final


def load_latest(folder: Path) -> Checkpoint | None:
    """Loads the newest checkpoint that is whole.

    Returns:
        The checkpoint, with notes on newer ones that were skipped; ``None`` where there is no checkpoint at all.

    Raises:
        DataError: there are checkpoints and every one is damaged.
    """
    notes: list[str] = []
    for path in _candidates(Path(folder)):
        try:
            step, tensors, state = _read(path)
        except _Damaged as error:
            notes.append(f"checkpoint {path} is damaged and was skipped: {error}")
            continue
        return Checkpoint(path, step, tensors, state, notes)
    if notes:
        raise DataError(f"no checkpoint in {folder} can be used ({'; '.join(notes)}): start a new run")
    return None


# ---------------------------------------------------------------------- what is written


def _serialize(tensors: Mapping[str, Mapping[str, Tensor]], state: Mapping[str, Any]) -> dict[str, bytes]:
    from safetensors.torch import save as to_bytes

    files: dict[str, bytes] = {}
    for group, named in tensors.items():
        if not re.fullmatch(r"[a-z][a-z0-9_]*", group):
            raise UsageError(f"a group of tensors is named with a-z, 0-9 and _, got {group!r}")
        own = {k: v.detach().cpu().clone(memory_format=torch.contiguous_format) for k, v in named.items()}
        files[f"{group}.safetensors"] = to_bytes(own)
    files[STATE] = (json.dumps(_encode(state), indent=1, allow_nan=False) + "\n").encode()
    return files


def _manifest(step: int, files: Mapping[str, bytes]) -> bytes:
    entries = {k: {"bytes": len(v), "sha256": hashlib.sha256(v).hexdigest()} for k, v in sorted(files.items())}
    body: dict[str, Any] = {"schema": SCHEMA, "step": step, "files": entries}
    return _canonical(body | {"sha256": hashlib.sha256(_canonical(body)).hexdigest()})


def _canonical(document: Any) -> bytes:
    return (json.dumps(document, indent=1, sort_keys=True, allow_nan=False) + "\n").encode()


def _encode(value: Any) -> Any:
    if isinstance(value, Mapping):
        if _FLOAT in value or not all(isinstance(k, str) for k in value):
            raise UsageError(f"keys of a checkpoint's state are text other than {_FLOAT!r}, got {list(value)!r}")
        return {k: _encode(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_encode(v) for v in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {_FLOAT: str(float(value))}
    if value is None or isinstance(value, str | int):
        return value
    raise UsageError(
        f"a checkpoint's state holds plain JSON values, got {type(value).__name__}: put tensors in a group"
    )


def _decode_pairs(pairs: list[tuple[str, Any]]) -> Any:
    found = unique_keys(pairs)
    return float(found[_FLOAT]) if _FLOAT in found else found


# ---------------------------------------------------------------------- how it is written


def _write(path: Path, content: bytes) -> None:
    # the mode follows the umask; safetensors' own writer leaves files that only their owner can read
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(descriptor, view) :]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_space(folder: Path, size: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < 2 * size:
        raise ResourceError(
            f"{folder} has {free} bytes free, a checkpoint needs {2 * size} (twice its size): free some space"
        )


def _resource_error(path: Path, error: OSError) -> ResourceError:
    todo = "free some space" if error.errno in _FULL else "check the disk and its permissions"
    return ResourceError(f"cannot write {path} ({error.strerror or error}), older checkpoints are kept: {todo}")


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob("step-*.tmp"):
        shutil.rmtree(path)
    for path in folder.glob("step-*.old"):
        if not path.with_suffix("").exists():  # stopped before its successor took its place
            os.rename(path, path.with_suffix(""))


def _candidates(folder: Path) -> list[Path]:
    """Returns finished checkpoints, newest first; one that was being replaced (``.old``) follows its successor."""
    found: list[tuple[int, bool, Path]] = []
    for path in folder.iterdir() if folder.is_dir() else ():
        if match := re.fullmatch(r"step-(\d+)(\.old)?", path.name):
            found.append((int(match[1]), match[2] is None, path))
    return [path for *_, path in sorted(found, reverse=True)]


def _prune(folder: Path, step: int, keep: int) -> None:
    current = folder / f"step-{step:08d}"
    whole: set[int] = set()
    unwanted: list[Path] = []
    for path in _candidates(folder):
        number = int(path.name.removesuffix(".old").removeprefix("step-"))
        if number > step or number in whole or len(whole) >= keep:
            unwanted.append(path)
        elif _is_whole(path):
            whole.add(number)
        elif path == current:
            raise OSError(errno.EIO, "what was written does not read back")
    for path in unwanted:
        # renamed first: half of a removal must not look like a damaged checkpoint
        aside = path.with_name(f"{path.name}.removed.tmp")
        os.rename(path, aside)
        shutil.rmtree(aside)


# ---------------------------------------------------------------------- how it is verified


class _Damaged(Exception):
    """Why a checkpoint cannot be used."""


def _is_whole(path: Path) -> bool:
    try:
        _verified_files(path)
    except _Damaged:
        return False
    return True


def _verified_files(path: Path) -> tuple[int, dict[str, bytes]]:
    """Returns the step and the bytes of every file, after checking them against the manifest."""
    try:
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise _Damaged("it is not a folder")
        names = set(os.listdir(path))
        if MANIFEST not in names:
            raise _Damaged(f"{MANIFEST} is missing")
        step, entries = _read_manifest(_bytes_of(path / MANIFEST))
        if path.name.removesuffix(".old") != f"step-{step:08d}":
            raise _Damaged(f"{MANIFEST} is that of step {step}")
        if odd := (names - {MANIFEST}) ^ set(entries):
            raise _Damaged(f"missing or not in {MANIFEST}: {', '.join(sorted(odd))}")
        files: dict[str, bytes] = {}
        for name, entry in entries.items():
            size = (path / name).lstat().st_size
            if size != entry["bytes"]:
                raise _Damaged(f"{name} has {size} bytes instead of {entry['bytes']}")
            files[name] = _bytes_of(path / name)
            if hashlib.sha256(files[name]).hexdigest() != entry["sha256"]:
                raise _Damaged(f"{name} does not have the sha256 of {MANIFEST}")
    except OSError as error:
        raise _Damaged(f"it cannot be read ({error.strerror or error})") from None
    return step, files


def _bytes_of(path: Path) -> bytes:
    if not stat.S_ISREG(path.lstat().st_mode):
        raise _Damaged(f"{path.name} is not a plain file")
    return path.read_bytes()


def _read_manifest(raw: bytes) -> tuple[int, dict[str, Any]]:
    try:
        document = json.loads(raw, object_pairs_hook=unique_keys)
        digest = document.pop("sha256")
        if hashlib.sha256(_canonical(document)).hexdigest() != digest:
            raise ValueError("it does not have its own sha256")
        if _canonical(document | {"sha256": digest}) != raw:
            raise ValueError("its spelling was changed")
        if document["schema"] != SCHEMA:
            raise ValueError(f"its schema is {document['schema']}, this version reads {SCHEMA}")
        step, entries = document["step"], document["files"]
        if type(step) is not int or not all({"bytes", "sha256"} <= set(e) for e in entries.values()):
            raise ValueError("it lacks step or files")
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise _Damaged(f"{MANIFEST} is not valid ({error})") from None
    return step, entries


def _read(path: Path) -> tuple[int, dict[str, dict[str, Tensor]], dict[str, Any]]:
    from safetensors import SafetensorError
    from safetensors.torch import load as from_bytes

    step, files = _verified_files(path)
    tensors: dict[str, dict[str, Tensor]] = {}
    try:
        state = json.loads(files.pop(STATE), object_pairs_hook=_decode_pairs)
        for name in [n for n in files if n.endswith(".safetensors")]:
            header(path / name)
            tensors[name.removesuffix(".safetensors")] = from_bytes(files.pop(name))
    except (OSError, ValueError, KeyError, RecursionError, SafetensorError, DataError) as error:
        raise _Damaged(f"its content cannot be read ({error})") from None
    return step, tensors, state
