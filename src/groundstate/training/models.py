"""Multilayer perceptrons from a short spec: ``mlp:784-28-10`` is Linear(784, 28), ReLU, Linear(28, 10)."""

from __future__ import annotations

import re
from itertools import pairwise

import torch
from torch import nn

from groundstate.errors import UsageError

_HIDDEN = {784: 28}
_HIDDEN_ELSEWHERE = 32


def resolve(spec: str, inputs: int, classes: int) -> str:
    """Returns the explicit spec that ``spec`` stands for.

    Args:
        spec: ``"auto"`` (one hidden layer: 28 units for 784 inputs, 32 otherwise) or ``"mlp:IN-...-OUT"``.
        inputs: Features per sample.
        classes: Number of classes.

    Raises:
        UsageError: the spec cannot be read, or its ends are not ``inputs`` and ``classes``.

    >>> resolve("auto", 64, 10)
    'mlp:64-32-10'
    """
    if spec == "auto":
        return f"mlp:{inputs}-{_HIDDEN.get(inputs, _HIDDEN_ELSEWHERE)}-{classes}"
    sizes = _sizes(spec)
    if sizes[0] != inputs or sizes[-1] != classes:
        raise UsageError(
            f"model {spec!r} goes from {sizes[0]} to {sizes[-1]}, the data have {inputs} inputs and {classes} classes: "
            f"write mlp:{inputs}-...-{classes}"
        )
    return "mlp:" + "-".join(map(str, sizes))


def build(spec: str, inputs: int, classes: int, seed: int) -> nn.Sequential:
    """Builds the network of a spec, with torch's default initialization drawn from ``seed`` alone.

    The global random state is left as it was.

    Args:
        spec: See `resolve`.
        inputs: Features per sample.
        classes: Number of classes.
        seed: Key of the initial weights.

    Returns:
        Linear layers with a ReLU between each two.

    Raises:
        UsageError: see `resolve`.

    >>> [tuple(p.shape) for p in build("mlp:4-3-2", 4, 2, seed=0).parameters()]
    [(3, 4), (3,), (2, 3), (2,)]
    """
    sizes = _sizes(resolve(spec, inputs, classes))
    parts: list[nn.Module] = []
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for fan_in, fan_out in pairwise(sizes):
            parts += [nn.Linear(fan_in, fan_out), nn.ReLU()]
    return nn.Sequential(*parts[:-1])


def _sizes(spec: str) -> list[int]:
    if not re.fullmatch(r"mlp:[1-9][0-9]{0,6}(-[1-9][0-9]{0,6})+", spec):
        raise UsageError(f"a model is 'auto' or layer sizes such as mlp:784-28-10, got {spec!r}")
    return [int(n) for n in spec.removeprefix("mlp:").split("-")]
