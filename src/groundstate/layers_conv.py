"""The kernels of a chain of convolutions, in the order of the forward pass.

Idea: between convolutions of stride 1 all pixels are alike, so one graph per frequency describes the whole network
(`groundstate.norms.graph_conv`). Strides and pooling join frequencies, groups and linear layers are no such graph: what
is not an ``nn.Sequential`` of convolutions and of operations that add no edges is refused by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NoReturn

from torch import nn

from groundstate.blocks import canonical
from groundstate.errors import UsageError
from groundstate.layers import EDGELESS, unwrapped

_KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARDS = tuple(kind.forward for kind in _KINDS)
_ADVICE = "use a sum of layer energies, e.g. conv_nuclear"


def has_convolution(model: nn.Module) -> bool:
    """Whether any module of a model is a convolution, transposed or not."""
    return any(isinstance(m, nn.modules.conv._ConvNd) for m in model.modules())


def convolution_chain(model: nn.Module) -> tuple[list[tuple[str, nn.Parameter]], list[tuple[int, ...]]]:
    """Returns the kernels of a chain of convolutions, by canonical name, and their dilations.

    Args:
        model: ``nn.Sequential`` (nested or not) of convolutions of stride 1 without groups, elementwise activations,
            dropout and identities; wrappers of ``DistributedDataParallel`` and ``torch.compile`` are looked through.

    Returns:
        ``[("0.weight", K_1), ...]`` with K_l of shape ``(d_l, d_{l-1}, *k)``, and one dilation per axis for each.

    Raises:
        UsageError: the model is not such a chain; says which module, and why.

    >>> named, dilations = convolution_chain(nn.Sequential(nn.Conv1d(1, 4, 3), nn.ReLU(), nn.Conv1d(4, 2, 3)))
    >>> [name for name, _ in named], dilations
    (['0.weight', '2.weight'], [(1,), (1,)])
    """
    found: list[tuple[str, nn.Parameter]] = []
    dilations: list[tuple[int, ...]] = []
    owners: dict[int, str] = {}
    for name, module in _steps("", unwrapped(model)):
        where = f"{canonical(name)!r} ({type(module).__name__})" if name else type(module).__name__
        if not isinstance(module, _KINDS):
            _check_edgeless(where, module)
            continue
        weight = _kernel(where, module)
        if id(weight) in owners:
            _refuse(f"{where} shares its weight with {owners[id(weight)]}: its edges would stand in the graph twice")
        if found and found[-1][1].shape[0] != weight.shape[1]:
            _refuse(f"{where} takes {weight.shape[1]} channels but {found[-1][0]!r} before it gives others")
        owners[id(weight)] = where
        found.append((canonical(f"{name}.weight" if name else "weight"), weight))
        dilations.append(tuple(int(d) for d in module.dilation))
    if not found:
        _refuse(f"{type(model).__name__} has no convolution")
    return found, dilations


def _steps(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module that acts, in order, with its dotted name; a module that stands in two places comes twice."""
    if not isinstance(module, nn.Sequential) or type(module).forward is not nn.Sequential.forward:
        yield name, module
        return
    for short, child in module._modules.items():
        if child is not None:
            yield from _steps(f"{name}.{short}" if name else short, unwrapped(child))


def _check_edgeless(where: str, module: nn.Module) -> None:
    if isinstance(module, nn.Flatten) or not isinstance(module, (*EDGELESS, nn.modules.dropout._DropoutNd)):
        _refuse(f"{where} is neither a convolution nor elementwise")


def _kernel(where: str, module: nn.modules.conv._ConvNd) -> nn.Parameter:
    weight = module._parameters.get("weight")
    if weight is None:
        _refuse(f"{where} has a parametrized weight (weight_norm, spectral_norm, ...): it is not a parameter")
    if isinstance(weight, nn.parameter.UninitializedParameter):
        _refuse(f"{where} is lazy and not yet initialized: run one batch through the model first")
    if type(module).forward not in _FORWARDS:
        _refuse(f"{where} has a forward pass of its own")
    if any(s != 1 for s in module.stride):
        _refuse(f"{where} has stride {tuple(module.stride)}, which joins frequencies")
    if module.groups != 1:
        _refuse(f"{where} has {module.groups} groups")
    return weight


def _refuse(why: str) -> NoReturn:
    raise UsageError(f"the graph of the convolutions cannot be read: {why}; {_ADVICE}")
