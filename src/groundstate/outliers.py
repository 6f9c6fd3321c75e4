"""Inputs that are far from the data in a known way, to ask a network how sure it is of them; no download needed.

Families, of as many outliers as there are samples x (low, high, mean and deviation over all entries of all samples):

* ``uniform``: noise, uniform in [low, high];
* ``gaussian``: noise with the mean and deviation of the data;
* ``inverted``: low + high - x;
* ``permuted``: the features of x, in one random order for all samples;
* ``rotated``: x turned by 90 degrees, where the samples are square images (or rows of a square number of features).

The first two have no trace of the data, the others keep part of it: permuting keeps the values, inverting the edges,
turning all but the upright. A network turned by symmetry (a digit 0) has no reason to tell them.

What a network was shown in training as context must not be among the families it is judged on: uniform noise as context
says nothing of uniform noise as outlier.

Reference: families of this kind in D. Hendrycks, K. Gimpel, "A baseline for detecting misclassified and
out-of-distribution examples in neural networks" (2017).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from groundstate.errors import NonFiniteError, UsageError

FAMILIES = ("uniform", "gaussian", "inverted", "permuted", "rotated")


def families(x: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Returns as many outliers as there are samples, by family, in the shape and dtype of x.

    A family that would be the data itself is absent: ``permuted`` of a single feature, ``rotated`` of what is no image.

    Args:
        x: Inputs, ``(B, ...)``; images are ``(B, channels, side, side)`` or ``(B, side * side)``.
        generator: Source of the noise and of the permutation, on the CPU, so that all devices draw the same.

    Raises:
        UsageError: no sample, or integers.
        NonFiniteError: an entry is NaN or infinite.

    >>> x = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    >>> found = families(x, torch.Generator().manual_seed(0))
    >>> found["inverted"].tolist(), found["rotated"].tolist()
    ([[3.0, 2.0, 1.0, 0.0]], [[1.0, 3.0, 0.0, 2.0]])
    """
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.ndim < 2 or not x.numel():
        raise UsageError("outliers are made from real inputs (batch, ...), at least one")
    x = x.detach()
    wide = x.double()
    if not bool(torch.isfinite(wide).all()):
        raise NonFiniteError("the samples have NaN or infinite entries: remove them, they have no range")
    low, high = (float(b) for b in wide.aminmax())
    mean, deviation = float(wide.mean()), float(wide.std(correction=0))

    def noise(draw: Tensor) -> Tensor:
        return draw.to(x.device, x.dtype)

    uniform = torch.rand(x.shape, generator=generator, dtype=torch.float64)
    normal = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    found = {
        "uniform": noise(low + (high - low) * uniform),
        "gaussian": noise(mean + deviation * normal),
        "inverted": (low + high - wide).to(x.dtype),
    }
    features = x[0].numel()
    if features > 1:
        order = torch.randperm(features, generator=generator).to(x.device)
        found["permuted"] = x.flatten(1)[:, order].view(x.shape)
    side = math.isqrt(x.shape[-1])
    if x.ndim == 4 and x.shape[-1] == x.shape[-2] > 1:
        found["rotated"] = x.rot90(1, (-2, -1))
    elif x.ndim == 2 and side * side == x.shape[1] and side > 1:
        found["rotated"] = x.reshape(-1, side, side).rot90(1, (-2, -1)).flatten(1)
    return found
