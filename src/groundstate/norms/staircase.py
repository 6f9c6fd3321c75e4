"""Where the weights of a layered network stand in its biadjacency, and products with it that never build it.

Node layers of one parity are the rows of M, those of the other (the smaller color class) its columns. The rows of node
layer t are ``[W_t, W_{t+1}^T]``, in neighboring columns; everything else is zero. So G = M^T M is block tridiagonal,
and both it and the blocks of M Z on the edges are sums of products of single weights; of Z = 2 G^{-1/2} they need the
blocks on the pattern of G only. A deep network has many small blocks, and Zolotarev's partial fractions::

    G^{-1/2} = sum_j w_j (G + t_j)^{-1},   relative error 4 exp(-pi^2 N / K') for N poles, K' = log(4 sigma_1 / sigma_n)

give them with inverses of single blocks: linear in the depth, where an eigendecomposition of G is cubic.

Reference: N. Hale, N. Higham, L. Trefethen, "Computing A^alpha, log(A), and related matrix functions by contour
integrals" (2008), method 3; A. Erisman, W. Tinney, "On computing certain elements of the inverse of a sparse matrix"
(1975).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import torch
from torch import Tensor

from groundstate.norms.spectral import LinAlgError

Blocks = tuple[list[Tensor], list[Tensor]]  # of a symmetric block tridiagonal matrix: diagonal, below the diagonal

# Entries of all poles together that are inverted at once; more makes several passes.
_AT_ONCE = 1 << 19
# Blocks beyond this size are inverted by halves: matrix products are faster than LAPACK there.
_INVERTED_WHOLE = 48


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

    ``before`` is the index of W_t (t = this layer), ``after`` that of W_{t+1}, -1 where there is none; ``left`` and
    ``right`` are the numbers of the blocks of columns that they stand in, neighbors where there are both.
    """

    before: int
    after: int
    left: int
    right: int


@dataclass(frozen=True)
class Staircase:
    """Where the blocks of M^T M and of the gradient stand, for given layer sizes.

    Attributes:
        small_side: Columns of M.
        long_side: Rows of M.
        rows: The node layers that make the rows of M.
        columns: The columns of each node layer of the smaller color.
    """

    small_side: int
    long_side: int
    rows: tuple[Row, ...]
    columns: tuple[slice, ...]

    @property
    def depth(self) -> float:
        """n^3 over the sum of all n_i^3: what an eigendecomposition of G costs beside the inverses of single blocks."""
        return self.small_side**3 / max(1, sum((c.stop - c.start) ** 3 for c in self.columns))

    def gram(self, work: list[Tensor]) -> Tensor:
        """Returns M^T M, the lower triangle being valid."""
        gram = work[0].new_zeros(self.small_side, self.small_side)
        diagonal, below = self.split(gram)
        for row in self.rows:
            if row.before >= 0:
                _add_gram(diagonal[row.left], work[row.before])
            if row.after >= 0:
                _add_gram(diagonal[row.right], work[row.after].mT)
            if row.before >= 0 and row.after >= 0:
                torch.mm(work[row.after], work[row.before], out=below[row.left])
        return gram

    def split(self, square: Tensor) -> Blocks:
        """Returns views of the blocks of a dense matrix that lie on the pattern."""
        c = self.columns
        return [square[i, i] for i in c], [square[i, j] for j, i in pairwise(c)]

    def gradients(self, work: list[Tensor], diagonal: list[Tensor], below: list[Tensor]) -> list[Tensor]:
        """Returns the blocks of M Z on the edges, from those of Z, in the orientation of the weights."""
        grads: list[Tensor] = list(work)
        for row in self.rows:
            if row.before >= 0:
                grads[row.before] = work[row.before] @ diagonal[row.left]
            if row.after >= 0:
                grads[row.after] = diagonal[row.right] @ work[row.after]
            if row.before >= 0 and row.after >= 0:
                grads[row.before].addmm_(work[row.after].mT, below[row.left])
                grads[row.after].addmm_(below[row.left], work[row.before].mT)
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
            left=(t - 1) // 2 if t > 0 else -1,
            right=(t + 1) // 2 if t < last else -1,
        )
        for t in range(first, len(sizes), 2)
    )
    return Staircase(min(even, odd), max(even, odd), rows, tuple(places[1 - first :: 2]))


def inner(a: Blocks, b: Blocks) -> Tensor:
    """Returns the inner product of two symmetric block tridiagonal matrices."""
    lower = torch.stack([(x * y).sum() for x, y in zip(a[1], b[1], strict=True)]).sum()
    return torch.stack([(x * y).sum() for x, y in zip(a[0], b[0], strict=True)]).sum() + 2 * lower


def selected_inverse(diagonal: list[Tensor], below: list[Tensor]) -> Blocks | None:
    """Returns the blocks of the inverse of a block tridiagonal matrix on its own pattern.

    Args:
        diagonal: ``(*batch, n_i, n_i)``, symmetric; the lower triangles are read.
        below: ``(*batch, n_{i+1}, n_i)`` or without the batch.

    Returns:
        The blocks, or ``None`` where the matrix is not positive definite, up to rounding.

    Cost: about 5 products and one inverse of size n_i per block.
    """
    failed: list[Tensor] = []
    factors: list[Tensor] = []
    try:
        inverses = [_inverse(diagonal[0], failed)]
        for low, block in zip(below, diagonal[1:], strict=True):
            factors.append(low @ inverses[-1])
            inverses.append(_inverse(block - factors[-1] @ low.mT, failed))
    except LinAlgError:  # a pivot of zero
        return None
    if any(bool(info.any()) for info in failed):
        return None
    found, found_below = inverses[-1:], []
    for inverse, factor in zip(inverses[-2::-1], factors[::-1], strict=True):
        minus = found[-1] @ factor
        found_below.append(-minus)
        found.append(inverse + factor.mT @ minus)
    return found[::-1], found_below[::-1]


def _inverse(square: Tensor, failed: list[Tensor]) -> Tensor:
    """Inverse of positive definite matrices from their lower triangles, by halves."""
    n = square.shape[-1]
    if n <= _INVERTED_WHOLE:
        factor, info = torch.linalg.cholesky_ex(square)
        failed.append(info)
        return torch.cholesky_inverse(factor)
    first, last = slice(0, n // 2), slice(n // 2, n)
    upper = _inverse(square[..., first, first], failed)
    low = square[..., last, first]
    factor = low @ upper
    lower = _inverse(square[..., last, last] - factor @ low.mT, failed)
    minus = lower @ factor
    whole = torch.empty_like(square)
    whole[..., first, first] = upper + factor.mT @ minus
    whole[..., last, first] = -minus
    whole[..., first, last] = -minus.mT
    whole[..., last, last] = lower
    return whole


def inverse_root(diagonal: list[Tensor], below: list[Tensor], low: float, high: float, error: float) -> Blocks | None:
    """Returns the blocks of the inverse square root of a block tridiagonal matrix on its own pattern.

    Args:
        diagonal: ``(n_i, n_i)``, symmetric.
        below: ``(n_{i+1}, n_i)``.
        low: Lower bound on the eigenvalues, positive.
        high: Upper bound on the eigenvalues.
        error: Relative error allowed, beside rounding.

    Returns:
        The blocks, or ``None`` where the matrix is not positive definite, up to rounding.

    Cost: that of `selected_inverse` times the number of poles, 6 at high / low = 100 and 13 at 1e6 for error 1e-6.
    """
    weights, shifts = (torch.tensor(x, dtype=torch.float64) for x in zip(*poles(low, high, error), strict=True))
    like = diagonal[0]
    weights, shifts = (x.to(like.device, like.dtype)[:, None, None] for x in (weights, shifts))
    total: Blocks = [torch.zeros_like(d) for d in diagonal], [torch.zeros_like(b) for b in below]
    chunk = max(1, _AT_ONCE // max(1, sum(d.numel() for d in diagonal)))
    eyes = [torch.eye(d.shape[-1], dtype=d.dtype, device=d.device) for d in diagonal]
    for weight, shift in zip(weights.split(chunk), shifts.split(chunk), strict=True):
        found = selected_inverse([d + shift * eye for d, eye in zip(diagonal, eyes)], below)
        if found is None:
            return None
        for sums, parts in zip(total, found, strict=True):
            for block, part in zip(sums, parts, strict=True):
                block += (weight * part).sum(0)
    return total


def poles(low: float, high: float, error: float) -> list[tuple[float, float]]:
    """Returns the ``(w_j, t_j)`` with ``|sqrt(x) sum_j w_j / (x + t_j) - 1| <= error`` on low <= x <= high.

    The best such sum of its length. Elliptic functions by the arithmetic-geometric mean; nodes beyond the middle are
    mirrored, where cn is too small for its rounding.
    """
    k = math.sqrt(min(low / high, 0.99))
    mean, other, levels = 1.0, k, []
    while mean - other > 1e-15 * mean and len(levels) < 40:
        mean, other, half = (mean + other) / 2, math.sqrt(mean * other), (mean - other) / 2
        levels.append(half / mean)
    quarter = math.pi / (2 * mean)
    count = math.ceil(math.log(4 / error) * quarter / math.pi**2)
    found = []
    for j in range(count):
        u = (j + 0.5) * quarter / count
        far = 2 * u > quarter
        angle = before = 2 ** len(levels) * mean * (quarter - u if far else u)
        for ratio in reversed(levels):
            before, angle = angle, (angle + math.asin(ratio * math.sin(angle))) / 2
        sn, cn = math.sin(angle), math.cos(angle)
        dn = cn / math.cos(before - angle)
        weight, shift = (dn / (k * sn**2), (cn / (k * sn)) ** 2) if far else (dn / cn**2, (sn / cn) ** 2)
        found.append((2 * quarter * math.sqrt(low) / (math.pi * count) * weight, low * shift))
    return found
