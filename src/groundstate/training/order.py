"""The order of the data: a pure function of seed and epoch, so that a resumed run needs no state of a sampler."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def keyed(*parts: object) -> int:
    """Returns a seed that is a pure function of ``parts``, e.g. ``keyed(seed, "order", epoch)``.

    >>> keyed(0, "order", 1) == keyed(0, "order", 1), keyed(0, "order", 1) == keyed(0, "order", 2)
    (True, False)
    """
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:7], "big")


def batch_order(samples: int, seed: int, epoch: int) -> Tensor:
    """Returns the order of the samples in an epoch, counted from 0: a permutation of ``range(samples)``, int64."""
    return torch.randperm(samples, generator=torch.Generator().manual_seed(keyed(seed, "order", epoch)))
