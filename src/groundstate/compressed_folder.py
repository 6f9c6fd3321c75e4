"""A factorized model on disk: ``model.safetensors`` beside ``compressed.json``.

The description holds the rank of each factored layer, and, for a model made of ``nn.Sequential`` and common modules of
torch, the whole architecture, so that one call rebuilds it without the code it came from; any other model is rebuilt
from its dense form, which the caller gives. No pickle is written or read; names in the files choose from a fixed list
of modules, and memory is taken only after every shape has been compared with the file.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections import OrderedDict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from groundstate.blocks import canonical
from groundstate.compress_factors import DENSE, Factorized, build_factors, dense_layer, replace_layers
from groundstate.errors import DataError, ResourceError, UsageError
from groundstate.safetensors_file import StoredTensor, header, unique_keys

if TYPE_CHECKING:
    from groundstate.compress import Compressed

WEIGHTS, DESCRIPTION = "model.safetensors", "compressed.json"

_BIAS = "bias"
_CONV = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "padding_mode", _BIAS)
_BATCH_NORM = ("num_features", "eps", "momentum", "affine", "track_running_stats")
_MAX_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode")
_AVG_POOL = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
_OPTIONS: dict[Any, tuple[str, ...]] = {
    nn.Linear: ("in_features", "out_features", _BIAS),
    **dict.fromkeys((nn.Conv1d, nn.Conv2d, nn.Conv3d), _CONV),
    **dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), _BATCH_NORM),
    **dict.fromkeys((nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d), _MAX_POOL),
    **dict.fromkeys((nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d), _AVG_POOL),
    **dict.fromkeys((nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d), ("output_size",)),
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), ("p", "inplace")),
    **dict.fromkeys((nn.ReLU, nn.SiLU, nn.Mish, nn.Hardswish), ("inplace",)),
    **dict.fromkeys((nn.Tanh, nn.Sigmoid, nn.Identity), ()),
    nn.GELU: ("approximate",),
    nn.LeakyReLU: ("negative_slope", "inplace"),
    nn.ELU: ("alpha", "inplace"),
    nn.Softmax: ("dim",),
    nn.Flatten: ("start_dim", "end_dim"),
    nn.LayerNorm: ("normalized_shape", "eps", "elementwise_affine", _BIAS),
    nn.GroupNorm: ("num_groups", "num_channels", "eps", "affine"),
}
_PLAIN = {kind.__name__: (kind, options) for kind, options in _OPTIONS.items()}
"""Modules that are fully given by options of their constructor that are attributes too."""
_DTYPES = {str(d).removeprefix("torch."): d for d in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}


def save(compressed: Compressed, folder: str | Path) -> Path:
    """Writes a compressed model into a new folder, which appears whole or not at all.

    Raises:
        UsageError: the folder exists.
        ResourceError: the disk is full or cannot be written.
    """
    from safetensors.torch import save_model

    folder = Path(folder)
    if folder.exists():
        raise UsageError(f"{folder} exists: give the name of a new folder")
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        aside.mkdir(parents=True)
        save_model(compressed.model, str(aside / WEIGHTS))
        umask = os.umask(0)
        os.umask(umask)
        (aside / WEIGHTS).chmod(0o666 & ~umask)  # the writer leaves it readable by its owner alone
        document = compressed.to_dict() | {
            "layers": {canonical(n): m.rank for n, m in compressed.model.named_modules() if isinstance(m, Factorized)},
            "architecture": _architecture(compressed.model),
            "sha256": _sha256(aside / WEIGHTS),
        }
        (aside / DESCRIPTION).write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", "utf-8")
        aside.rename(folder)
    except OSError as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise ResourceError(
            f"cannot write {folder} ({error.strerror or error}): free some space or choose another"
        ) from None
    return folder


def load_compressed(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Rebuilds a compressed model.

    Args:
        folder: What `Compressed.save` wrote.
        model: The dense model (its values play no part, it is not changed); needed unless the model is made of
            ``nn.Sequential`` and common modules of torch, each used once.

    Returns:
        The model on the CPU, in eval mode; with ``model`` on its device and in its mode.

    Raises:
        DataError: the folder is missing or damaged, or does not fit the model: the tensor is named.
        UsageError: the dense model is needed and was not given.
    """
    from safetensors.torch import load_model

    folder = Path(folder)
    layers, architecture, stored = _read(folder)
    if model is None and architecture is None:
        raise UsageError(f"{folder} is not a plain sequence of layers: give the dense model, load_compressed(f, model)")
    try:
        rebuilt = _build(architecture) if model is None else copy.deepcopy(model)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise DataError(f"{folder / DESCRIPTION} does not describe a sequence of layers ({error!r})") from None
    rebuilt = _with_factors(rebuilt, layers, folder)
    _check_tensors(rebuilt, stored, folder)
    if model is None:
        rebuilt = rebuilt.to_empty(device="cpu").eval()
    try:
        load_model(rebuilt, str(folder / WEIGHTS), strict=True)
    except RuntimeError as error:
        raise DataError(f"{folder} does not fit the model ({str(error).splitlines()[-1].strip()})") from None
    return rebuilt


def _read(folder: Path) -> tuple[dict[str, int], Any, list[StoredTensor]]:
    """Returns the ranks, the architecture and the header of the weights of a folder that is whole."""
    try:
        document = json.loads((folder / DESCRIPTION).read_text("utf-8"), object_pairs_hook=unique_keys)
        layers, architecture, digest = (document[k] for k in ("layers", "architecture", "sha256"))
        if not isinstance(layers, dict) or not all(type(r) is int and r > 0 for r in layers.values()):
            raise ValueError("ranks must be positive whole numbers")
        if _sha256(folder / WEIGHTS) != digest:
            raise ValueError(f"{WEIGHTS} does not have the recorded sha256")
        return layers, architecture, header(folder / WEIGHTS)[0]
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is not a whole compressed model ({error}): compress the model again") from None


def _check_tensors(model: nn.Module, stored: list[StoredTensor], folder: Path) -> None:
    """Refuses tensors that the model does not have, or has in another shape or dtype, before memory is taken."""
    state = model.state_dict()
    for tensor in stored:
        mine = state.get(tensor.name)
        if mine is None:
            raise DataError(f"{folder} does not fit the model: it has no tensor {tensor.name!r}")
        if tuple(mine.shape) != tensor.shape or mine.dtype != tensor.dtype:
            raise DataError(
                f"{folder} does not fit the model: {tensor.name!r} is {tensor.dtype} {tensor.shape} in the file and "
                f"{mine.dtype} {tuple(mine.shape)} in the model"
            )
    names: dict[int, list[str]] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        names.setdefault(id(tensor), []).append(name)
    found = {t.name for t in stored}
    for shared in names.values():  # of tensors that are one the file holds one
        if not found.intersection(shared):
            raise DataError(f"{folder} does not fit the model: {WEIGHTS} has no tensor {shared[0]!r}")


def _with_factors(model: nn.Module, layers: dict[str, int], folder: Path) -> nn.Module:
    modules = {canonical(n): m for n, m in model.named_modules(remove_duplicate=False)}
    replaced: dict[int, Factorized] = {}
    shared: dict[int, tuple[nn.Parameter, nn.Parameter]] = {}
    for name, rank in layers.items():
        module = modules.get(name)
        if module is None or type(module) not in DENSE:
            raise DataError(f"{folder} has factors for {name!r}, which is no linear or convolution layer of the model")
        weight: Any = module.weight
        m, n = weight.shape[0], weight[0].numel()
        if rank * (m + n) >= m * n:
            raise DataError(
                f"{folder} has rank {rank} for {name!r} of shape {tuple(weight.shape)}: not a smaller layer"
            )
        if id(weight) not in shared:
            a = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]), requires_grad=weight.requires_grad)
            b = nn.Parameter(weight.new_empty(m, rank, *([1] * (weight.ndim - 2))), requires_grad=weight.requires_grad)
            shared[id(weight)] = (a, b)
        replaced[id(module)] = build_factors(module, *shared[id(weight)])
    return replace_layers(model, replaced)


def _describe(module: nn.Module) -> dict[str, Any] | None:
    """Describes a sequence, a factored layer (as the dense one) or a plain module; ``None`` for anything else."""
    if type(module) is nn.Sequential:
        parts = {name: _describe(part) for name, part in module.named_children()}
        return None if None in parts.values() else {"type": "Sequential", "parts": parts}
    dense = dense_layer(module) if isinstance(module, Factorized) else module
    kind = type(dense).__name__
    if _PLAIN.get(kind, (None,))[0] is not type(dense):
        return None
    options = {name: getattr(dense, name) for name in _PLAIN[kind][1]}
    if _BIAS in options:
        options[_BIAS] = options[_BIAS] is not None
    described: dict[str, Any] = {"type": kind, "options": options}
    dtypes = {t.dtype for t in dense.state_dict().values() if t.is_floating_point()}
    if dtypes:
        described["dtype"] = str(dtypes.pop()).removeprefix("torch.")
    if dtypes or not all(map(_plain, options.values())) or described.get("dtype", "float32") not in _DTYPES:
        return None
    built = _build(described)  # what the constructor does not take, such as a divisor, must be as it always is
    return (
        described
        if _settings(built) == _settings(dense) and list(built.state_dict()) == [*dense.state_dict()]
        else None
    )


def _plain(value: Any) -> bool:
    return isinstance(value, int | float | str | None) or (isinstance(value, tuple) and all(map(_plain, value)))


def _settings(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in vars(module).items() if not k.startswith("_") and k != "training"}


def _architecture(model: nn.Module) -> dict[str, Any] | None:
    """Describes a model of plain modules in sequence, without shared modules or weights; ``None`` for any other."""
    for named in (model.named_modules, model.named_parameters):
        if len(list(named())) != len(list(named(remove_duplicate=False))):
            return None
    hooked = any(m._forward_hooks or m._forward_pre_hooks or parametrize.is_parametrized(m) for m in model.modules())
    return None if hooked else _describe(model)


def _build(described: Any) -> nn.Module:
    """Builds what `_describe` described, on the meta device; an error where it did not come from there."""
    kind = described["type"]
    if kind == "Sequential":
        return nn.Sequential(OrderedDict((name, _build(part)) for name, part in described["parts"].items()))
    constructor, names = _PLAIN[kind]
    options = {k: tuple(v) if isinstance(v, list) else v for k, v in described["options"].items()}
    if set(options) != set(names):
        raise ValueError(f"{kind} needs {', '.join(names) or 'no options'}")
    with torch.device("meta"):
        built = constructor(**options)
    return built.to(_DTYPES[described["dtype"]]) if "dtype" in described else built


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
