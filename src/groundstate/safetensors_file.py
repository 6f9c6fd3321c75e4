"""Reads a ``.safetensors`` file one tensor at a time, trusting nothing that it says.

The format is an 8-byte little-endian length, a JSON header ``{name: {dtype, shape, data_offsets}}``, and the bytes of
the tensors one after the other. Ordinary reads by offset keep one tensor in memory; a memory map would keep every
page that was touched. Checked before anything is read: the header is at most 100 MB, no key comes twice, dtype, shape
and offsets agree, the tensors fill the file without hole, overlap, or missing byte.

Reference: the format description of https://github.com/huggingface/safetensors.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from groundstate.errors import DataError

MAX_HEADER = 100_000_000
MAX_DIMENSIONS = 64
DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in its file.

    Attributes:
        name: Its name in the header; never used as a path.
        dtype: Its dtype, or ``None`` where torch has none for it.
        code: The dtype as the file spells it.
        shape: Its shape.
        start: Offset of its first byte from the start of the file.
        nbytes: Its length in bytes.
        path: The file.
    """

    name: str
    dtype: torch.dtype | None
    code: str
    shape: tuple[int, ...]
    start: int
    nbytes: int
    path: Path

    def read(self) -> Tensor:
        """Reads this tensor, and only it, into memory of its own.

        Raises:
            DataError: its dtype is unknown, or the file has become shorter since its header was read.
        """
        if self.dtype is None:
            raise DataError(f"{self.path}: tensor {self.name!r} has the dtype {self.code}, which torch does not have")
        raw = torch.empty(self.nbytes, dtype=torch.uint8)
        view = memoryview(raw.numpy())  # pyright: ignore[reportArgumentType]
        done = 0
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            while done < self.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise DataError(f"{self.path}: the file ended inside tensor {self.name!r}; copy it again")
                done += count
        return raw.view(self.dtype).reshape(self.shape)


def unique_keys(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Builds a dictionary for ``json.loads(object_pairs_hook=...)``; a key that comes twice is a ``ValueError``."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} comes twice")
        found[key] = value
    return found


def header(path: Path) -> tuple[list[StoredTensor], dict[str, str]]:
    """Reads and checks the header of a file.

    Returns:
        The tensors in the order of the file, and its ``__metadata__``.

    Raises:
        DataError: the file is empty, truncated, longer than its header says, or its header is inconsistent.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            what = "is empty" if not prefix else f"has {len(prefix)} bytes"
            raise DataError(f"{path} {what}: expected a safetensors file; copy or save it again")
        length = int.from_bytes(prefix, "little")
        if length > MAX_HEADER or 8 + length > size:
            raise DataError(
                f"{path} is not a safetensors file, or is cut short: its header would have {length} bytes "
                f"(at most {min(MAX_HEADER, max(size - 8, 0))} are possible)"
            )
        raw = file.read(length)
    try:
        entries = json.loads(raw.decode("utf-8"), object_pairs_hook=unique_keys)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: the safetensors header cannot be read ({error})") from None
    if not isinstance(entries, dict):
        raise DataError(f"{path}: the safetensors header is not a JSON object")
    metadata = entries.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise DataError(f"{path}: __metadata__ of the safetensors header must map text to text")
    tensors = sorted((_entry(path, n, e, 8 + length) for n, e in entries.items()), key=lambda t: (t.start, t.nbytes))
    _check_layout(path, tensors, 8 + length, size)
    return tensors, metadata


def _entry(path: Path, name: str, entry: Any, base: int) -> StoredTensor:
    def wrong(what: str) -> DataError:
        return DataError(f"{path}: tensor {name!r} has {what}; save the file again")

    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise wrong("an entry that is not {dtype, shape, data_offsets}")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str):
        raise wrong(f"a dtype that is not text ({code!r})")
    if not _counts(shape) or len(shape) > MAX_DIMENSIONS:
        raise wrong("a shape that is not a short list of counts")
    if not _counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise wrong("offsets that are not [begin, end]")
    dtype = DTYPES.get(code)
    nbytes = offsets[1] - offsets[0]
    if dtype is not None and math.prod(shape) * dtype.itemsize != nbytes:
        raise wrong(f"{nbytes} bytes, but {code} of shape {tuple(shape)} takes {math.prod(shape) * dtype.itemsize}")
    return StoredTensor(name, dtype, code, tuple(shape), base + offsets[0], nbytes, path)


def _counts(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(v, int) and not isinstance(v, bool) and v >= 0 for v in value)


def _check_layout(path: Path, tensors: list[StoredTensor], base: int, size: int) -> None:
    end = base
    for tensor in tensors:
        if tensor.start != end:
            what = "overlaps the one before it" if tensor.start < end else "leaves a hole before it"
            raise DataError(f"{path}: tensor {tensor.name!r} {what}; save the file again")
        end += tensor.nbytes
    if end != size:
        what = f"{end - size} bytes shorter" if size < end else f"{size - end} bytes longer"
        raise DataError(f"{path} is {what} than its header says: it is cut short or damaged; copy it again")
