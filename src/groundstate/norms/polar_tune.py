"""Finds the constants of `polar_table` on the machine at hand, by timing the routes against one another.

Idea: each constant is a place at which one route overtakes another. Both are timed in turns on matrices along the way
there, and the constant is put where the faster one changes. Only speed depends on the answer.
"""

from __future__ import annotations

import math
import statistics
import time

import torch
from torch import Tensor

from groundstate.norms.polar import Route, polar
from groundstate.norms.polar_table import Constants, constants

_SIDES = (16, 32, 48, 64, 96)
_SQUARES = (48, 64, 96, 128, 192)
_TALL = 128  # columns of a tall matrix for the polynomials
_SQUARE = 192
_SHARES = (0.4, 0.5, 0.6, 0.7, 0.8)  # of the singular values that are small, and the share of small pivots they give
_PIVOTS = (0.03, 0.1, 0.25, 0.4, 0.6)
_NEVER = 2.0  # a ratio and a share that no matrix has


def tune(device: str = "cpu", repeat: int = 15) -> Constants:
    """Returns the constants of the dispatch for a kind of device, with the number of threads that torch has now.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        repeat: Timings of each route and matrix, of which the median counts.

    Cost: a few seconds on one core.
    """
    generator = torch.Generator().manual_seed(0)
    found = constants(device)

    def random(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator).to(device)

    def last(sides: tuple[int, ...], rows: int, route: Route, share: float) -> float:
        """The last side up to which a route is faster on average over two spectra."""
        found = 0
        for side in sides:
            w = random(rows * side, side)
            if faster(route, "gram", w, repeat) * faster(route, "gram", _mostly_small(w, share), repeat) < 1:
                break
            found = side
        return float(found)

    tiny = last(_SIDES, 4, "double", 0.5)
    square = last(_SQUARES, 1, "svd", 0.3)
    polynomials = faster("express", "gram", random(6 * _TALL, _TALL), repeat) > 1
    small = _NEVER
    for share, pivots in zip(_SHARES, _PIVOTS):
        if faster("svd", "gram", _mostly_small(random(_SQUARE, _SQUARE), share), max(3, repeat // 3)) > 1:
            small = pivots
            break
    return found._replace(tiny=tiny, square=square, even=Constants().even if polynomials else _NEVER, small=small)


def faster(route: Route, other: Route, w: Tensor, repeat: int) -> float:
    """Returns how many times faster ``route`` is than ``other`` for the polar factor of w, timed in turns."""
    seconds = [(_time(w, other), _time(w, route)) for _ in range(repeat + 1)][1:]  # the first one is warming up
    before, after = (statistics.median(taken) for taken in zip(*seconds))
    return before / after


def _time(w: Tensor, route: Route) -> float:
    start = time.perf_counter()
    polar(w, route)
    if w.is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - start


def _mostly_small(w: Tensor, share: float) -> Tensor:
    """The matrix with a share of its singular values from 1e-2 to 1e-4, the others from 1 to 0.1."""
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    few = math.ceil(share * len(s))
    s = torch.cat((torch.logspace(0, -1, len(s) - few), torch.logspace(-2, -4, few))).to(w)
    return (u * s) @ vh
