"""Finds the constants of `polar_table` on the machine at hand, by timing the routes against one another.

Idea: each constant is a size or an evenness at which one route overtakes another. Both are timed in turns on matrices
of a few sizes, and the constant is put where the faster one changes: at the smallest size from which on the new route
wins at every larger one that was tried. Only speed depends on the answer.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Sequence

import torch
from torch import Tensor

from groundstate.norms.polar import Route, polar
from groundstate.norms.polar_table import Constants, constants

_SIDES = (32, 48, 64, 96, 128, 192, 256)
_LARGE = (256, 384, 512, 768)
_TALL = ((256, 16), (384, 24), (512, 48), (784, 64), (784, 128))


def tune(device: str = "cpu", repeat: int = 7) -> Constants:
    """Returns the constants of the dispatch for a kind of device, with the number of threads that torch has now.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        repeat: Timings of each route and size, of which the median counts.

    Cost: about ten seconds on one core, plus what ``repeat`` adds.
    """
    generator = torch.Generator().manual_seed(0)
    found = constants(device)
    squares = [_random(n, n, generator, device) for n in _SIDES]
    side = _crossing(_SIDES, [_ratio(w, "svd", "gram", repeat) for w in squares])
    sizes = [float(m * n * n) for m, n in _TALL]
    tall = [_random(m, n, generator, device) for m, n in _TALL]
    work = _crossing(sizes, [_ratio(w, "svd", "gram", repeat) for w in tall])
    decaying = [_decaying(n, generator, device) for n in _LARGE]
    qdwh_side = _crossing(_LARGE, [_ratio(w, "gram", "qdwh", max(3, repeat // 3)) for w in decaying])
    return found._replace(side=math.ceil(side), work=work, qdwh_side=math.ceil(qdwh_side))


def _crossing(sizes: Sequence[float], speedups: Sequence[float]) -> float:
    """The least size from which on every speed-up is above 1; twice the largest size where there is none.

    >>> _crossing((10, 20, 30), (0.9, 1.1, 1.2)), _crossing((10, 20, 30), (1.5, 1.1, 0.9))
    (20, 60)
    """
    crossing = 2 * sizes[-1]
    for size, speedup in zip(reversed(sizes), reversed(speedups)):
        if speedup <= 1:
            break
        crossing = size
    return crossing


def _ratio(w: Tensor, old: Route, new: Route, repeat: int) -> float:
    """How many times faster ``new`` is."""
    seconds = [(_time(w, old), _time(w, new)) for _ in range(repeat + 1)][1:]  # the first one is warming up
    before, after = (statistics.median(taken) for taken in zip(*seconds))
    return before / after


def _time(w: Tensor, route: Route) -> float:
    start = time.perf_counter()
    polar(w, route)
    if w.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _random(rows: int, columns: int, generator: torch.Generator, device: str) -> Tensor:
    return torch.randn(rows, columns, generator=generator).to(device)


def _decaying(n: int, generator: torch.Generator, device: str) -> Tensor:
    """Singular values from 1 to 1e-3, where QDWH is at its best beside the eigenvectors of the Gram matrix."""
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for _ in range(2))
    return (u * torch.logspace(0, -3, n) @ v.mT).to(device)
