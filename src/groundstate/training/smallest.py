"""The smallest factorized network that keeps its accuracy.

One threshold t for all layers: singular values below t sigma_1 of their layer are dropped. The networks that this gives
change only where t passes a relative singular value, so these are all the thresholds there are; a larger one never
gives a larger network. They are tried from the smallest network upward, and the first that is good enough is taken:
accuracy need not fall steadily with size, size does.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from groundstate.blocks import as_matrix, like_parameter
from groundstate.compress import DENSE, cut
from groundstate.norms.spectral import svd

MAX_TRIALS = 400


@torch.no_grad()
def smallest_within(model: nn.Module, loss: float, accuracy: Callable[[nn.Module], float]) -> float | None:
    """Returns the threshold t of the smallest factorized network that is good enough.

    Args:
        model: The dense network; it is not changed.
        loss: Accuracy that may be lost, as a share (0.005 is half a point).
        accuracy: Returns the accuracy of a network, e.g. on the validation split.

    Returns:
        The ``tolerance`` for `groundstate.compress.compress`, or ``None`` where no smaller network is good enough.

    Cost: one SVD per layer and at most `MAX_TRIALS` evaluations.
    """
    least = accuracy(model) - loss - 1e-9  # a loss of exactly the share asked for is allowed, whatever its rounding
    twin = copy.deepcopy(model)
    weights = [
        p for m in twin.modules() if isinstance(m, DENSE) for n, p in m.named_parameters(recurse=False) if n == "weight"
    ]
    layers = [_Layer.of(w) for w in weights if w.numel()]
    tried: set[tuple[int | None, ...]] = set()
    for threshold in _thresholds(layer.s for layer in layers):
        ranks = tuple(layer.rank(threshold) for layer in layers)
        if ranks in tried or all(r is None for r in ranks):
            continue
        tried.add(ranks)
        for layer, rank in zip(layers, ranks):
            layer.keep(rank)
        if accuracy(twin) >= least:
            return threshold
    return None


@dataclass
class _Layer:
    weight: nn.Parameter
    dense: Tensor
    u: Tensor
    s: Tensor
    vh: Tensor

    @classmethod
    def of(cls, weight: nn.Parameter) -> _Layer:
        return cls(weight, weight.detach().clone(), *svd(as_matrix(weight.detach())))

    def rank(self, threshold: float) -> int | None:
        """Returns the rank that is left, ``None`` where factors of that rank are not smaller."""
        m, n = self.u.shape[0], self.vh.shape[1]
        r = max(cut(self.s, max(m, n), tolerance=threshold), 1)
        return r if r * (m + n) < m * n else None

    def keep(self, rank: int | None) -> None:
        if rank is None:
            self.weight.copy_(self.dense)
        else:
            self.weight.copy_(like_parameter((self.u[:, :rank] * self.s[:rank]) @ self.vh[:rank], self.weight))


def _thresholds(spectra: Iterable[Tensor]) -> list[float]:
    """Returns one threshold between each two neighboring relative singular values, largest first."""
    values = {0.0, 1.0}
    for s in spectra:
        if s.numel() and float(s[0]) > 0:
            values.update((s.double() / s[0].double()).tolist())
    ordered = sorted(values, reverse=True)
    found = [(a + b) / 2 for a, b in pairwise(ordered)]
    if len(found) <= MAX_TRIALS:
        return found
    return [found[i * (len(found) - 1) // (MAX_TRIALS - 1)] for i in range(MAX_TRIALS)]
