"""Named tensors, one at a time, from wherever weights are kept.

A source is a module, a state dict, a ``.safetensors`` file, a folder of them (with or without an index JSON), a
``.pt`` file of plain tensors, or a run folder of ``groundstate train``. `open_tensors` lists every tensor without
reading it; each is then read on its own, so that a file of any size needs the memory of its largest tensor. Files are
untrusted: names never become paths, pickles with anything but tensors and plain values are refused
(``weights_only=True``).
"""

from __future__ import annotations

import json
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.torch_version import TorchVersion

from groundstate.blocks import canonical
from groundstate.errors import DataError, UsageError
from groundstate.safetensors_file import header, unique_keys

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
WEIGHT_FILES = ("weights.safetensors", "model.safetensors")
MAX_DEPTH = 20


@dataclass(frozen=True)
class NamedTensor:
    """A tensor that can be read, or the reason why it cannot.

    Attributes:
        name: Canonical name in a model, or the name in the file; untrusted text.
        shape: Its shape, empty for what is not a tensor.
        dtype: Its dtype, e.g. ``"float32"``.
        read: Returns the tensor, detached; ``None`` where ``reason`` or ``alias_of`` says why.
        module: The module that owns it, where a model was given.
        alias_of: The name of the tensor that it shares all its memory with (tied weights).
        reason: Why it is not to be analyzed, where the source already knows.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], Tensor] | None = None
    module: nn.Module | None = None
    alias_of: str | None = None
    reason: str | None = None


@dataclass(frozen=True)
class TensorList:
    """Every tensor of a source, with what is worth knowing about the source.

    Attributes:
        entries: The tensors, in the order of the model (of a file: by name, numbers as numbers).
        model: The module, where it is the source.
        notes: What the reader should know.
        chain: Whether the weights, in this order, are those of a plain chain of layers.
    """

    entries: tuple[NamedTensor, ...]
    model: nn.Module | None = None
    notes: tuple[str, ...] = ()
    chain: bool = False


def open_tensors(source: nn.Module | Mapping[str, Any] | str | Path) -> TensorList:
    """Lists the tensors of a module, a state dict or a path, reading none of a safetensors file.

    Raises:
        UsageError: the source is of another kind, or a file with an unknown suffix.
        DataError: the path does not exist, is damaged, holds no tensor, or holds a pickle with more than tensors.
    """
    if isinstance(source, nn.Module):
        return TensorList(tuple(_of_module(source)), model=source)
    if isinstance(source, Mapping):
        return TensorList(tuple(_of_mapping(source)))
    if not isinstance(source, str | Path):
        raise UsageError(f"expected a module, a state dict or a path, got {type(source).__name__}")
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path} does not exist: give a .safetensors or .pt file, a folder of them, or a run folder")
    if path.is_dir():
        return _of_folder(path)
    if path.suffix == ".safetensors":
        return TensorList(tuple(_natural(_of_safetensors([path]))))
    if path.suffix in PICKLE_SUFFIXES:
        return TensorList(tuple(_of_pickle(path)))
    raise UsageError(
        f"{path} has the suffix {path.suffix or '(none)'!r}: expected .safetensors, {', '.join(PICKLE_SUFFIXES)}, "
        "or a folder"
    )


def dtype_name(dtype: torch.dtype) -> str:
    """Returns ``"float32"`` for ``torch.float32``."""
    return str(dtype).removeprefix("torch.")


def natural_key(name: str) -> list[tuple[int, int, str]]:
    """Sort key that puts ``layer.2`` before ``layer.10``."""
    return [(0, int(p), "") if p.isdecimal() and p.isascii() else (1, 0, p) for p in re.split(r"(\d+)", name)]


def _natural(entries: list[NamedTensor]) -> list[NamedTensor]:
    return sorted(entries, key=lambda e: natural_key(e.name))


def _of_tensor(name: str, tensor: Tensor, module: nn.Module | None = None, reason: str | None = None) -> NamedTensor:
    if nn.parameter.is_lazy(tensor):
        return NamedTensor(name, (), "", None, module, reason="not initialized yet (lazy module: run it once)")
    unreadable = _unreadable(tensor)
    read = tensor.detach if unreadable is None else None
    return NamedTensor(name, tuple(tensor.shape), dtype_name(tensor.dtype), read, module, reason=unreadable or reason)


def _unreadable(tensor: Tensor) -> str | None:
    if tensor.is_meta:
        return "on the meta device: it has no data"
    if type(tensor).__module__.startswith("torch.distributed"):
        return "a distributed shard: gather it with full_tensor() first"
    if tensor.layout is not torch.strided:
        return f"sparse layout ({tensor.layout})"
    return None


def _of_module(model: nn.Module) -> Iterator[NamedTensor]:
    first: dict[int, str] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        owned = [(n, p, None) for n, p in module.named_parameters(recurse=False, remove_duplicate=False)]
        owned += [
            (n, b, "buffer (not trained)") for n, b in module.named_buffers(recurse=False, remove_duplicate=False)
        ]
        for short, tensor, reason in owned:
            name = canonical(f"{prefix}.{short}" if prefix else short)
            known = first.setdefault(id(tensor), name)
            entry = _of_tensor(name, tensor, module, reason)
            if known != name:
                yield NamedTensor(name, entry.shape, entry.dtype, None, module, alias_of=known)
            elif ".parametrizations." in f".{name}":
                yield NamedTensor(name, entry.shape, entry.dtype, entry.read, module, reason="behind a parametrization")
            else:
                yield entry
        if parametrize.is_parametrized(module):
            yield from _parametrized(prefix, module)


def _parametrized(prefix: str, module: nn.Module) -> Iterator[NamedTensor]:
    parametrizations = module.parametrizations
    if not isinstance(parametrizations, nn.ModuleDict):
        return
    for short, chain in parametrizations.items():

        def effective(short: str = short, chain: nn.Module = chain) -> Tensor:
            modes = [(m, m.training) for m in chain.modules()]
            try:
                chain.eval()  # a parametrization with state (spectral_norm) must not move when it is measured
                with torch.no_grad():
                    return getattr(module, short).detach()
            finally:
                for part, training in modes:
                    part.training = training

        tensor = effective()
        name = canonical(f"{prefix}.{short}" if prefix else short)
        yield NamedTensor(name, tuple(tensor.shape), dtype_name(tensor.dtype), effective, module)


def _of_mapping(tree: Mapping[Any, Any]) -> Iterator[NamedTensor]:
    first: dict[tuple[Any, ...], str] = {}
    for name, leaf in _leaves(tree, "", 0):
        if not isinstance(leaf, Tensor):
            yield NamedTensor(name, (), "", reason=f"not a tensor ({type(leaf).__name__})")
            continue
        reason = "state of an optimizer (by name)" if name.lower().startswith("optim") else None
        entry = _of_tensor(canonical(name), leaf, reason=reason)
        key = None if entry.read is None or not leaf.numel() else _memory(leaf)
        known = entry.name if key is None else first.setdefault(key, entry.name)
        if known == entry.name:
            yield entry
        else:
            yield NamedTensor(entry.name, entry.shape, entry.dtype, alias_of=known)


def _memory(t: Tensor) -> tuple[Any, ...]:
    return (t.device, t.data_ptr(), t.dtype, tuple(t.shape), t.stride())


def _leaves(node: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    children: list[tuple[Any, Any]] | None = None
    if isinstance(node, Mapping):
        children = list(node.items())
    elif isinstance(node, list | tuple) and any(isinstance(v, Tensor | Mapping) for v in node):
        children = list(enumerate(node))
    if children is None:
        yield name, node
        return
    if depth >= MAX_DEPTH:
        raise DataError(
            f"the state dict is nested more than {MAX_DEPTH} levels deep at {name!r}: give the weights alone"
        )
    for key, value in children:
        yield from _leaves(value, f"{name}.{key}" if name else str(key), depth + 1)


def _of_safetensors(paths: list[Path]) -> list[NamedTensor]:
    entries: dict[str, NamedTensor] = {}
    home: dict[str, Path] = {}
    for path in paths:
        stored, metadata = header(path)
        for tensor in stored:
            if tensor.name in home:
                raise DataError(
                    f"tensor {tensor.name!r} is in {home[tensor.name].name} and in {path.name}: they are not the parts "
                    "of one model; give one file, or add the index JSON"
                )
            home[tensor.name] = path
            known = tensor.dtype is not None
            entries[tensor.name] = NamedTensor(
                tensor.name,
                tensor.shape,
                dtype_name(tensor.dtype) if tensor.dtype is not None else tensor.code,
                tensor.read if known else None,
                reason=None if known else f"dtype {tensor.code} is not supported",
            )
        for tied, kept in metadata.items():  # `safetensors.torch.save_model` records the names that it left out
            if kept in entries and tied not in entries:
                entries[tied] = NamedTensor(tied, entries[kept].shape, entries[kept].dtype, alias_of=kept)
    if not entries:
        raise DataError(f"{paths[0]} holds no tensor")
    return list(entries.values())


def _of_folder(folder: Path) -> TensorList:
    if (folder / "run.json").is_file():
        checkpoint = newest_checkpoint(folder)
        return TensorList(
            tuple(_natural(_of_safetensors([_weights_file(checkpoint)]))),
            notes=(f"weights of {checkpoint.name}",),
            chain=True,
        )
    if (folder / "MANIFEST.json").is_file():
        return TensorList(tuple(_natural(_of_safetensors([_weights_file(folder)]))))
    files = sorted(p for p in folder.glob("*.safetensors") if p.is_file())
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        names = ", ".join(p.name for p in indices)
        raise UsageError(f"{folder} has more than one index ({names}): put each model into its own folder")
    if indices:
        return _of_index(folder, indices[0], files)
    if not files:
        raise DataError(f"{folder} has no .safetensors file, and is no run folder (run.json): give the file itself")
    return TensorList(tuple(_natural(_of_safetensors(files))))


def _of_index(folder: Path, index: Path, files: list[Path]) -> TensorList:
    try:
        document = json.loads(index.read_text("utf-8"), object_pairs_hook=unique_keys)
        weight_map = document["weight_map"]
        shards = {str(name): Path(folder, _plain(folder, index, file)) for name, file in weight_map.items()}
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError, OSError) as error:
        raise DataError(f"{index} is not an index of safetensors files ({type(error).__name__}: {error})") from None
    used = sorted(set(shards.values()))
    entries = _of_safetensors(used) if used else []
    missing = sorted(set(shards) - {e.name for e in entries})
    if missing or not entries:
        what = f"tensor {missing[0]!r}, which its file does not hold" if missing else "no file"
        raise DataError(f"{index.name} names {what}: download or save the model again")
    left = [f.name for f in files if f not in used]
    notes = (f"not named by {index.name}, left out: {', '.join(left)}",) if left else ()
    return TensorList(tuple(_natural(entries)), notes=notes)


def _plain(folder: Path, index: Path, name: Any) -> str:
    """Checks that an entry of an index is the plain name of a file in the folder, not a way out of it."""
    if not isinstance(name, str) or not re.fullmatch(r"[\w.\- ]+", name) or name.startswith("."):
        raise DataError(f"{index.name} names {name!r}: expected the plain name of a file in {folder}")
    path = folder / name
    if not path.is_file():
        raise DataError(f"{index.name} names {name!r}, which is not in {folder}: download or save the model again")
    root = folder.resolve()
    allowed = [root]
    if root.parent.name == "snapshots":  # a download cache keeps its files in `blobs`, beside `snapshots`
        allowed.append(root.parent.parent / "blobs")
    if path.resolve().parent not in allowed:
        raise DataError(f"{path} is a link out of its folder: put the file itself there")
    return name


def newest_checkpoint(run: Path) -> Path:
    """Returns the newest ``checkpoints/step-N`` of a run folder.

    Raises:
        DataError: the run has no checkpoint.
    """
    found = [p for p in (run / "checkpoints").glob("step-*") if p.is_dir() and re.fullmatch(r"step-\d+", p.name)]
    if not found:
        raise DataError(f"{run} has no checkpoint (checkpoints/step-N): train it first")
    return max(found, key=lambda p: int(p.name.removeprefix("step-")))


def _weights_file(checkpoint: Path) -> Path:
    for name in WEIGHT_FILES:
        if (checkpoint / name).is_file():
            return checkpoint / name
    raise DataError(f"{checkpoint} has none of {', '.join(WEIGHT_FILES)}: it is damaged or of another program")


def _of_pickle(path: Path) -> list[NamedTensor]:
    if TorchVersion(torch.__version__) < TorchVersion("2.10"):
        raise DataError(
            f"reading {path} needs torch >= 2.10 (earlier ones have known holes): convert it to safetensors"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path} is empty: copy or save it again")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:  # whatever a damaged or hostile pickle raises, the user gets one line
        text = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        unsafe = "weights_only" in str(error).lower() or "Unsupported" in text
        why = "holds more than tensors and plain values, which is unsafe to load" if unsafe else "cannot be read"
        raise DataError(
            f"{path} {why} ({text}): save the state dict by safetensors.torch.save_file and give that file"
        ) from None
    entries = list(_of_mapping(tree if isinstance(tree, Mapping) else {"tensor": tree}))
    if all(not e.dtype for e in entries):
        raise DataError(f"{path} holds no tensor: expected a state dict")
    return entries
