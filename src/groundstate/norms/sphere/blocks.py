"""Sums over all pairs of directions, block by block, the gradient made in the forward pass: no N x N matrix.

Idea: for each pair of blocks I <= J of neurons one product gives the cosines C = U_I U_J^T, elementwise work on C gives
the energies and the slopes H = h'(C), and two products spread them::

    E += sum f(C),    g_I += H U_J,    g_J += H^T U_I

That is half the work of autograd on the whole Gram matrix, and one buffer of a block. A block that holds a near pair is
computed again from differences in float64, and only its tangent part, of H (u_j - u_i), is added.

Reference: W. Liu et al., "Learning towards Minimum Hyperspherical Energy" (2018), for the energy.
"""

from __future__ import annotations

from threading import get_ident
from typing import NamedTuple

import torch
from torch import Tensor

from groundstate.errors import UsageError
from groundstate.norms.sphere.directions import Directions
from groundstate.norms.sphere.law import Exact, Law, exact, fast
from groundstate.norms.sphere.parallel import Progress, rounds, run, serial


class Sums(NamedTuple):
    """Sums of f over pairs; the sum's gradient by each direction, its normal part arbitrary; the pairs clipped."""

    f: Tensor
    gradient: Tensor | None
    clipped: Tensor


class _Side(NamedTuple):
    """One of the two blocks: which rows, their directions, where their gradient goes."""

    rows: slice | Tensor
    u: Tensor
    gradient: Tensor | None


class _Scratch:
    """Three buffers of a block for each thread, made once a call."""

    def __init__(self, like: Tensor, size: int) -> None:
        self._like, self._size = like, size
        self._made: dict[int, Tensor] = {}

    def __call__(self, *shape: int) -> list[Tensor]:
        flat = self._made.get(get_ident())
        if flat is None:
            flat = self._made[get_ident()] = self._like.new_empty(3, self._size)
        count = shape[0] * shape[1] * shape[2]
        return [buffer[:count].view(shape) for buffer in flat]


def block_size(device: torch.device) -> int:
    """Returns the rows of a block: its cosines and their operands should stay in the cache of a core."""
    return 384 if device.type == "cpu" else 4096


def pair_sums(of: Directions, rule: Law, gradient: bool, progress: Progress | None = None) -> Sums:
    """Returns sums over unordered pairs of neurons.

    Args:
        of: ``(groups, N, d)``.
        rule: The law.
        gradient: Whether to make the gradient.
        progress: Called in the calling thread as ``progress(pairs of blocks done, all of them)``.

    Returns:
        f ``(groups,)`` in float64, the gradient ``(groups, N, d)`` or ``None``, clipped ``(groups,)``. The same to the
        last bit for any number of threads.

    Raises:
        UsageError: a duplicate, where the law refuses them.

    Cost: N^2 d flops, 3 N^2 d with the gradient; besides the gradient a few blocks of memory a thread.
    """
    groups, count, _ = of.u.shape
    size = block_size(of.u.device)
    step = max(1, size**2 // count**2)
    if count <= size and 0 < groups <= step and serial(of.u.device):
        return _one_block(of, rule, gradient, progress)
    batches = [slice(k, min(k + step, groups)) for k in range(0, groups, step)]
    pairs = [pair for played in rounds(-(-count // size)) for pair in played]
    g = torch.zeros_like(of.u) if gradient else None
    found = torch.zeros(2, len(pairs), groups, dtype=torch.float64, device=of.u.device)
    scratch = _Scratch(of.u, max(size**2, step * count**2) if count <= size else size**2)

    def task(batch: slice, i: int, j: int, slot: int) -> None:
        left = _side(of, batch, slice(i * size, (i + 1) * size), g)
        right = left if i == j else _side(of, batch, slice(j * size, (j + 1) * size), g)
        f, clipped = _block(of, batch, left, right, None, rule, scratch)
        share = 0.5 if i == j else 1.0
        found[0, slot, batch] = share * f.sum(-1)
        if clipped is not None:
            found[1, slot, batch] = share * clipped.sum(-1)

    games = [({(b.start, i), (b.start, j)}, (b, i, j, slot)) for slot, (i, j) in enumerate(pairs) for b in batches]
    run(task, games, of.u.device, progress)
    return Sums(found[0].sum(0), g, found[1].sum(0).long())


def _one_block(of: Directions, rule: Law, gradient: bool, progress: Progress | None) -> Sums:
    """Returns `pair_sums` of a few neurons, where lists of blocks and games would cost more than the sums."""
    g = torch.zeros_like(of.u) if gradient else None
    groups, count, _ = of.u.shape
    side = _side(of, slice(0, groups), slice(0, count), g)
    f, clipped = _block(of, slice(0, groups), side, side, None, rule, _Scratch(of.u, groups * count**2))
    if progress is not None:
        progress(1, 1)
    none = torch.zeros(groups, dtype=torch.long, device=of.u.device)
    return Sums(f.sum(-1).mul_(0.5), g, none if clipped is None else (0.5 * clipped.sum(-1)).long())


def row_sums(of: Directions, chosen: Tensor, rule: Law, gradient: bool) -> Sums:
    """Returns, for each chosen neuron, the sum over all others.

    Args:
        of: ``(1, N, d)``.
        chosen: Numbers of neurons ``(m,)``, each at most once.
        rule: The law.
        gradient: Whether to make the gradient of the total of all the sums.

    Returns:
        f ``(m,)`` in float64, the gradient ``(1, N, d)`` or ``None``, clipped ``(m,)``.

    Raises:
        UsageError: a duplicate, where the law refuses them.

    Cost: 2 m N d flops, 6 m N d with the gradient; on one thread.
    """
    count, group, size = of.u.shape[1], slice(0, 1), block_size(of.u.device)
    g = torch.zeros_like(of.u) if gradient else None
    found = torch.zeros(2, chosen.shape[0], dtype=torch.float64, device=of.u.device)
    scratch = _Scratch(of.u, size**2)

    def task(part: Tensor, out: Tensor) -> None:
        u = of.u[group, part]
        left = _Side(part, u, torch.zeros_like(u) if gradient else None)
        width = size**2 // part.shape[0]
        for begin in range(0, count, width):
            right = _side(of, group, slice(begin, begin + width), g)
            own = ((part >= begin) & (part < begin + width)).nonzero()[:, 0]
            f, clipped = _block(of, group, left, right, (own, part[own] - begin), rule, scratch)
            out[:1] += f
            if clipped is not None:
                out[1:] += clipped
        if g is not None and left.gradient is not None:
            g[0].index_add_(0, part, left.gradient[0])

    for part, out in zip(chosen.split(size), found.split(size, 1), strict=True):
        run(task, [((), (part, out))], of.u.device)
    return Sums(found[0], g, found[1].long())


def _side(of: Directions, batch: slice, rows: slice, g: Tensor | None) -> _Side:
    return _Side(rows, of.u[batch, rows], None if g is None else g[batch, rows])


def _block(
    of: Directions,
    batch: slice,
    left: _Side,
    right: _Side,
    own: tuple[Tensor, Tensor] | None,
    rule: Law,
    scratch: _Scratch,
) -> tuple[Tensor, Tensor | None]:
    """Adds the gradient of a block; returns sums and numbers of clipped pairs of its rows, float64 ``(groups, rows)``.

    ``own`` are the places where a neuron meets itself, ``None`` for none and, where ``right is left``, for the
    diagonal; there one product gives both gradients. No clipped pairs are ``None``.
    """
    c, *work = scratch(left.u.shape[0], left.u.shape[1], right.u.shape[1])
    torch.bmm(left.u, right.u.mT, out=c)
    _clear(c, own, left is right)
    edge = 1 - rule.near(c.dtype) / 2
    if rule.two_sided:
        low, high = torch.aminmax(c)
        near = float(high) > edge or float(low) < -edge
    else:
        near = float(c.amax()) > edge
    if near:
        return _exact_block(of, batch, left, right, own, rule)
    rows, slopes = fast(c, work, rule, left.gradient is not None)
    if left is right:
        rows -= rule.orthogonal  # a neuron and itself were counted at c = 0
    elif own is not None:
        rows[:, own[0]] -= rule.orthogonal
    if left.gradient is not None and right.gradient is not None:
        _clear(slopes, own, left is right)
        left.gradient.baddbmm_(slopes, right.u)
        if right is not left:
            right.gradient.baddbmm_(slopes.mT, left.u)
    return rows, None


def _clear(x: Tensor, own: tuple[Tensor, Tensor] | None, diagonal: bool) -> None:
    """Sets to zero where a neuron meets itself."""
    if diagonal:
        x.diagonal(dim1=-2, dim2=-1).zero_()
    elif own is not None:
        x[:, own[0], own[1]] = 0.0


def _exact_block(
    of: Directions, batch: slice, left: _Side, right: _Side, own: tuple[Tensor, Tensor] | None, rule: Law
) -> tuple[Tensor, Tensor]:
    x, y = of.exact(batch, left.rows), of.exact(batch, right.rows)
    same = torch.zeros(x.shape[1], y.shape[1], dtype=torch.bool, device=x.device)
    if left is right:
        same.fill_diagonal_(True)
    elif own is not None:
        same[own] = True
    sides = exact(x, y, same, rule)
    if rule.on_duplicate == "error":
        for side in sides:
            _refuse_duplicates(side, of, left, right, rule)
    if left.gradient is not None and right.gradient is not None:
        onto_x, onto_y = torch.zeros_like(x), torch.zeros_like(y)
        for sign, _, h, _ in sides:
            onto_x += sign * (h @ y) - h.sum(-1)[..., None] * x
            onto_y += sign * (h.mT @ x) - h.sum(-2)[..., None] * y
        left.gradient.add_(_tangent(onto_x, x).to(left.u.dtype))
        if right is not left:
            right.gradient.add_(_tangent(onto_y, y).to(right.u.dtype))
    f, clipped = sides[0].f.sum(-1), sides[0].clipped.sum(-1)
    for side in sides[1:]:
        f, clipped = f + side.f.sum(-1), clipped + side.clipped.sum(-1)
    return f, clipped.double()


def _tangent(g: Tensor, u: Tensor) -> Tensor:
    return g - (g * u).sum(-1, keepdim=True) * u


def _refuse_duplicates(side: Exact, of: Directions, left: _Side, right: _Side, rule: Law) -> None:
    found = side.clipped.nonzero()
    if not found.shape[0]:
        return
    numbers = []
    for rows, k in ((left.rows, int(found[0, 1])), (right.rows, int(found[0, 2]))):
        row = int(rows[k]) if isinstance(rows, Tensor) else rows.start + k
        numbers.append(row if of.numbers is None else int(of.numbers[row]))
    what = "point the same way" if side.sign > 0 else "are antipodes, which are duplicates in a half-space"
    raise UsageError(
        f"neurons {min(numbers)} and {max(numbers)} {what} (closer than r_min = {rule.r_min:g}): the energy is "
        "unbounded there; move or remove one, or let on_duplicate='clip' hold the pair at r_min"
    )
