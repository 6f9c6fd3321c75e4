"""Where the weights of a layered network stand in its biadjacency, and products with it that never build it.

Node layers of one parity are the rows of M, those of the other (the smaller color class) its columns. The rows of node
layer t are ``[W_t, W_{t+1}^T]``, in neighboring columns; everything else is zero. So M^T M is block tridiagonal, and
both it and the blocks of M Z on the edges are sums of products of single weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor


def spans(sizes: tuple[int, ...]) -> list[slice]:
    """The rows (or columns) of each node layer within its own color."""
    found, filled = [], [0, 0]
    for layer, size in enumerate(sizes):
        found.append(slice(filled[layer % 2], filled[layer % 2] + size))
        filled[layer % 2] += size
    return found


@dataclass(frozen=True)
class Row:
    """One node layer of the larger color: its edges to the layers before and after, all of the smaller color.

    ``before`` is the index of W_t (t = this layer), ``after`` that of W_{t+1}, -1 where there is none; the slices are
    their columns in M.
    """

    before: int
    after: int
    before_columns: slice
    after_columns: slice


@dataclass(frozen=True)
class Staircase:
    """Where the blocks of M^T M and of the gradient stand, for given layer sizes.

    Attributes:
        small_side: Columns of M.
        long_side: Rows of M.
        rows: The node layers that make the rows of M.
    """

    small_side: int
    long_side: int
    rows: tuple[Row, ...]

    def gram(self, work: list[Tensor]) -> Tensor:
        """Returns M^T M, the lower triangle being valid."""
        gram = work[0].new_zeros(self.small_side, self.small_side).mT  # column-major, as LAPACK takes it
        for row in self.rows:
            p, q = row.before_columns, row.after_columns
            if row.before >= 0:
                _add_gram(gram[p, p], work[row.before])
            if row.after >= 0:
                _add_gram(gram[q, q], work[row.after].mT)
            if row.before >= 0 and row.after >= 0:
                torch.mm(work[row.after], work[row.before], out=gram[q, p])
        return gram

    def gradients(self, work: list[Tensor], z: Tensor) -> list[Tensor]:
        """Returns the blocks of M Z on the edges, Z = 2 (M^T M)^{-1/2}, in the orientation of the weights."""
        grads: list[Tensor] = [z] * len(work)
        for row in self.rows:
            p, q = row.before_columns, row.after_columns
            if row.before >= 0:
                grads[row.before] = work[row.before] @ z[p, p]
            if row.after >= 0:
                grads[row.after] = z[q, q] @ work[row.after]
            if row.before >= 0 and row.after >= 0:
                grads[row.before].addmm_(work[row.after].mT, z[q, p])
                grads[row.after].addmm_(z[q, p], work[row.before].mT)
        return grads


def _add_gram(out: Tensor, a: Tensor) -> None:
    """Adds a^T a to ``out``, its lower triangle at least: three quarters of the work of all where that pays."""
    n = a.shape[1]
    if n < 64:
        out.addmm_(a.mT, a)
        return
    half = n // 2
    out[half:].addmm_(a[:, half:].mT, a)
    out[:half, :half].addmm_(a[:, :half].mT, a[:, :half])


@lru_cache(maxsize=64)
def staircase(sizes: tuple[int, ...]) -> Staircase:
    """Returns the staircase of a network with d_0, ..., d_L neurons per layer."""
    even, odd = sum(sizes[::2]), sum(sizes[1::2])
    first = 0 if odd <= even else 1  # the parity of the larger color, whose node layers are the rows of M
    places = spans(sizes)
    last = len(sizes) - 1
    rows = tuple(
        Row(
            before=t - 1 if t > 0 else -1,
            after=t if t < last else -1,
            before_columns=places[t - 1] if t > 0 else slice(0),
            after_columns=places[t + 1] if t < last else slice(0),
        )
        for t in range(first, len(sizes), 2)
    )
    return Staircase(small_side=min(even, odd), long_side=max(even, odd), rows=rows)
