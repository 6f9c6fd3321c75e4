"""A factorized model on disk: ``model.safetensors`` beside ``compressed.json``.

The description holds the rank of each factored layer, and, for a plain ``nn.Sequential`` of linear layers and
activations, the whole architecture; any other model is rebuilt from its dense form, which the caller gives. No pickle
is written or read.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from groundstate.blocks import canonical
from groundstate.compress import DENSE, Factorized, build_factors, replace_layers
from groundstate.errors import DataError, ResourceError, UsageError
from groundstate.safetensors_file import header, unique_keys

if TYPE_CHECKING:
    from groundstate.compress import Compressed

WEIGHTS, DESCRIPTION = "model.safetensors", "compressed.json"
_PLAIN = {
    c.__name__: c for c in (nn.ReLU, nn.Tanh, nn.Sigmoid, nn.GELU, nn.SiLU, nn.LeakyReLU, nn.Identity, nn.Flatten)
}


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


def load(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """Rebuilds a compressed model.

    Args:
        folder: What `Compressed.save` wrote.
        model: The dense model (its values play no part, it is not changed); needed unless the model is an
            ``nn.Sequential`` of linear layers and plain activations.

    Raises:
        DataError: the folder is missing or damaged, or does not fit the model.
        UsageError: the dense model is needed and was not given.
    """
    from safetensors.torch import load_model

    folder = Path(folder)
    try:
        document = json.loads((folder / DESCRIPTION).read_text("utf-8"), object_pairs_hook=unique_keys)
        layers, architecture, digest = (document[k] for k in ("layers", "architecture", "sha256"))
        if not isinstance(layers, dict) or not all(type(r) is int and r > 0 for r in layers.values()):
            raise ValueError("ranks must be positive whole numbers")
        if _sha256(folder / WEIGHTS) != digest:
            raise ValueError(f"{WEIGHTS} does not have the recorded sha256")
        header(folder / WEIGHTS)
    except (OSError, ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"{folder} is not a whole compressed model ({error}): compress the model again") from None
    if model is None and architecture is None:
        raise UsageError(f"{folder} is not a plain sequence of layers: give the dense model, load(folder, model)")
    rebuilt = _sequential(architecture, folder) if model is None else copy.deepcopy(model)
    rebuilt = _with_factors(rebuilt, layers, folder)
    if model is None:
        needed = sum(p.numel() * p.element_size() for p in rebuilt.parameters())
        if needed > (folder / WEIGHTS).stat().st_size:
            raise DataError(f"{folder} describes {needed} bytes of weights, more than {WEIGHTS} has: compress it again")
        rebuilt = rebuilt.to_empty(device="cpu")
    try:
        load_model(rebuilt, str(folder / WEIGHTS), strict=True)
    except RuntimeError as error:
        raise DataError(f"{folder} does not fit the model ({str(error).splitlines()[-1].strip()})") from None
    return rebuilt


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


def _architecture(model: nn.Module) -> list[dict[str, Any]] | None:
    """Describes an ``nn.Sequential`` of linear layers and default activations; ``None`` for anything else."""
    if type(model) is not nn.Sequential or len(list(model.parameters())) != len(model.state_dict()):
        return None
    parts: list[dict[str, Any]] = []
    for part in model:
        if type(part) is nn.Linear or (isinstance(part, Factorized) and type(part[0]) is nn.Linear):
            w: Any = part.weight
            dtype = str(w.dtype).removeprefix("torch.")
            parts.append(
                {"type": "Linear", "in": w.shape[1], "out": w.shape[0], "bias": part.bias is not None, "dtype": dtype}
            )
        elif type(part) in _PLAIN.values() and repr(part) == repr(type(part)()):
            parts.append({"type": type(part).__name__})
        else:
            return None
    return parts


def _sequential(architecture: Any, folder: Path) -> nn.Sequential:
    parts: list[nn.Module] = []
    try:
        for part in architecture:
            if part["type"] == "Linear":
                dtype = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16}.get(
                    part["dtype"], torch.bfloat16
                )
                size: tuple[int, int] = (int(part["in"]), int(part["out"]))
                parts.append(nn.Linear(*size, bias=bool(part["bias"]), device="meta", dtype=dtype))
            else:
                parts.append(_PLAIN[part["type"]]())
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{folder / DESCRIPTION} does not describe a sequence of layers ({error!r})") from None
    return nn.Sequential(*parts)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
