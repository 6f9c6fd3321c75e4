"""Which parameters an energy of weights sees, and as which matrix.

A *block* is one weight seen as a matrix: a linear weight ``(out, in)`` as it is, a convolution
``(out, in/groups, *kernel)`` as ``(out, in/groups * prod(kernel))``, a transposed convolution
``(in, out/groups, *kernel)`` likewise, its axes put in order. So every row is a neuron, with the weights that lead to
it. Biases, normalizations and embeddings are not blocks. Tied weights are one block.

Energies of neurons see the rows of each group of a grouped convolution by themselves (view ``neurons``): neurons of
different groups look at different inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from groundstate.errors import UsageError

View = Literal["matrix", "neurons"]

_WRAPPERS = re.compile(r"(^|(?<=\.))(module|_orig_mod|_checkpoint_wrapped_module)\.")
_NORMALIZATION = re.compile(
    r"(^|[._])(norm|ln|bn|layernorm|batchnorm|rmsnorm|ln_?\d*|bn_?\d*|ln_f|norm_?\d*)([._]|$)", re.I
)
_EMBEDDING = re.compile(r"(^|[._])(embed\w*|emb|wte|wpe|lookup|\w*_embeddings?|position\w*)([._]|$)", re.I)


@dataclass(frozen=True)
class Block:
    """One weight that an energy sees.

    Attributes:
        name: Canonical name, without the prefixes of DDP, ``torch.compile`` and activation checkpointing.
        parameter: The parameter itself, of any number of dimensions from 2.
        module: The module that owns it, where known; it tells transposed and grouped convolutions.
    """

    name: str
    parameter: nn.Parameter
    module: nn.Module | None = None

    @property
    def matrix(self) -> Tensor:
        """The weight as a matrix ``(out, in)``, detached, sharing memory where the layout allows."""
        return as_matrix(self.parameter.detach(), self.module)

    def seen(self, view: View) -> Tensor:
        """Returns the weight as an energy with this view sees it: ``matrix``, or ``neurons``, ``(groups, out, in)``."""
        return self.matrix if view == "matrix" else by_neurons(self.matrix, self.module)

    def like(self, gradient: Tensor) -> Tensor:
        """Returns a gradient (of either view) in the shape, dtype and memory format of the parameter."""
        return like_parameter(gradient, self.parameter, self.module)


def canonical(name: str) -> str:
    """Strips wrapper prefixes: ``module._orig_mod.fc.weight`` is ``fc.weight``."""
    return _WRAPPERS.sub("", name)


def as_matrix(w: Tensor, module: nn.Module | None = None) -> Tensor:
    """Returns ``(out, in)`` for a linear weight and ``(out, in * prod(kernel))`` for a convolution of any layout."""
    if isinstance(module, nn.modules.conv._ConvTransposeNd):
        split = w.unflatten(0, (module.groups, -1))  # (groups, in, out, *kernel), in and out of one group
        return split.transpose(1, 2).flatten(0, 1).flatten(1)
    return w if w.ndim == 2 else w.reshape(w.shape[0], -1)


def by_neurons(matrix: Tensor, module: nn.Module | None = None) -> Tensor:
    """Returns the rows of each group of a convolution apart, ``(groups, out / groups, in)``; else the matrix."""
    groups = module.groups if isinstance(module, nn.modules.conv._ConvNd) else 1
    return matrix if groups == 1 else matrix.unflatten(-2, (groups, -1))


def skip_reason(name: str, tensor: Tensor, module: nn.Module | None = None) -> str | None:
    """Returns why a tensor is not a block, or ``None`` where it is one.

    Args:
        name: Its name in the model or the file.
        tensor: The tensor (may be on the meta device).
        module: The module that owns it, where known; without it the decision rests on name and shape.
    """
    if tensor.is_complex() or not tensor.is_floating_point():
        return f"not real floating point ({str(tensor.dtype).removeprefix('torch.')})"
    if tensor.ndim < 2:
        return "bias, scale or scalar (fewer than 2 dimensions)"
    if module is not None:
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            return "embedding"
        if isinstance(module, nn.modules.batchnorm._NormBase | nn.LayerNorm | nn.GroupNorm):
            return "normalization"
    else:
        if _EMBEDDING.search(name):
            return "embedding (by name)"
        if _NORMALIZATION.search(name):
            return "normalization (by name)"
    if tensor.ndim > 5:
        return f"{tensor.ndim} dimensions: neither a linear nor a convolution weight"
    return None


def parameters_by_name(model: nn.Module) -> dict[str, tuple[nn.Parameter, nn.Module]]:
    """Returns every parameter once (tied ones under their first name) with the module that owns it."""
    owners: dict[int, tuple[str, nn.Parameter, nn.Module]] = {}
    for prefix, module in model.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            full = canonical(f"{prefix}.{short}" if prefix else short)
            owners.setdefault(id(parameter), (full, parameter, module))
    return {name: (parameter, module) for name, parameter, module in owners.values()}


def select(model: nn.Module, pattern: str | None = None) -> list[Block]:
    """Returns the blocks of a model, in its own order.

    Args:
        model: Any module.
        pattern: Comma-separated shell patterns on canonical names (``"*.weight,encoder.*"``; a leading ``!`` takes
            away). Default: every block.

    Raises:
        UsageError: nothing is selected; the parameters are printed with the reason each was left out.
    """
    found: list[Block] = []
    table: list[str] = []
    for name, (parameter, module) in parameters_by_name(model).items():
        reason = skip_reason(name, parameter, module)
        if reason is None and not matches(name, pattern):
            reason = f"not matched by {pattern!r}"
        if reason is None:
            found.append(Block(name, parameter, module))
        table.append(f"{name} {tuple(parameter.shape)}: {reason or 'selected'}")
    if not found:
        listing = "; ".join(table) or "the model has no parameters"
        raise UsageError(f"no weight is selected (select={pattern!r}). Parameters: {listing}")
    return found


def last_linear(model: nn.Module) -> str | None:
    """Returns the name of the weight of the last linear layer, if no other weight comes after it: the classifier."""
    found = [n for n, (p, m) in parameters_by_name(model).items() if skip_reason(n, p, m) is None]
    owners = parameters_by_name(model)
    return found[-1] if len(found) > 1 and isinstance(owners[found[-1]][1], nn.Linear) else None


def matches(name: str, pattern: str | None) -> bool:
    """Whether a name is selected by comma-separated shell patterns, those with a leading ``!`` taking away."""
    if pattern is None:
        return True
    parts = [p.strip() for p in pattern.split(",") if p.strip()]
    keep = [p for p in parts if not p.startswith("!")] or ["*"]
    drop = [p[1:] for p in parts if p.startswith("!")]
    return any(fnmatchcase(name, p) for p in keep) and not any(fnmatchcase(name, p) for p in drop)


def like_parameter(gradient: Tensor, parameter: Tensor, module: nn.Module | None = None) -> Tensor:
    """Returns a gradient, as a matrix or in its own shape, in the shape, dtype and format of its parameter."""
    if parameter.ndim == 2 and gradient.shape == parameter.shape and gradient.dtype == parameter.dtype:
        return gradient
    if isinstance(module, nn.modules.conv._ConvTransposeNd) and gradient.shape != parameter.shape:
        inner = parameter.shape[0] // module.groups
        split = gradient.reshape(module.groups, -1, inner, *parameter.shape[2:])
        gradient = split.transpose(1, 2)
    shaped = gradient.reshape(parameter.shape).to(parameter.dtype)
    if (
        parameter.ndim == 4
        and parameter.is_contiguous(memory_format=torch.channels_last)
        and not parameter.is_contiguous()
    ):
        shaped = shaped.contiguous(memory_format=torch.channels_last)
    return shaped
