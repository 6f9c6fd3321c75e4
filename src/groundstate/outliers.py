"""Inputs that are far from the data in a known way, to ask a network how sure it is of them; no download needed.

Families: ``uniform`` noise over the range of the data, ``gaussian`` noise with its mean and deviation, ``inverted``
(low + high - x), ``permuted`` (the features of every sample in one random order) and, for square images, ``rotated``
by 90 degrees. What a network was shown in training as context must not be among the families it is judged on.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from groundstate.errors import UsageError

FAMILIES = ("uniform", "gaussian", "inverted", "permuted", "rotated")


def families(x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns as many outliers as there are samples, by family.

    Args:
        x: Inputs, ``(B, ...)``; ``rotated`` where they are square images or a square number of features.
        generator: Source of the noise and of the permutation, on the CPU.

    Raises:
        UsageError: no sample, or integers.

    >>> x = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    >>> found = families(x, torch.Generator().manual_seed(0))
    >>> found["inverted"].tolist(), found["rotated"].tolist()
    ([[3.0, 2.0, 1.0, 0.0]], [[1.0, 3.0, 0.0, 2.0]])
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or not len(x):
        raise UsageError("outliers are made from real inputs (batch, ...), at least one")
    low, high = float(x.min()), float(x.max())
    mean, deviation = float(x.mean()), float(x.std())

    def noise(draw: Tensor) -> Tensor:
        return draw.to(x.device, x.dtype)

    order = torch.randperm(x[0].numel(), generator=generator).to(x.device)
    found = {
        "uniform": low + (high - low) * noise(torch.rand(x.shape, generator=generator)),
        "gaussian": mean + deviation * noise(torch.randn(x.shape, generator=generator)),
        "inverted": low + high - x,
        "permuted": x.flatten(1)[:, order].view_as(x),
    }
    side = math.isqrt(x.shape[-1])
    if x.ndim == 4 and x.shape[-1] == x.shape[-2]:
        found["rotated"] = x.rot90(1, (-2, -1))
    elif x.ndim == 2 and side * side == x.shape[1] and side > 1:
        found["rotated"] = x.view(-1, side, side).rot90(1, (-2, -1)).flatten(1)
    return found
