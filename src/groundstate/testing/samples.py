"""Inputs for the contracts: random, degenerate, badly scaled and oddly laid out weights, each with a name.

Every random input comes from its own seeded generator, so the global generators are never touched.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

SHAPES: tuple[tuple[int, int], ...] = ((6, 4), (4, 6), (5, 5), (1, 5), (5, 1), (1, 1))
WIDTHS: tuple[tuple[int, ...], ...] = ((4, 3), (5, 3, 2), (3, 6, 6, 2), (2, 5, 1, 4, 3))
FLOATS: tuple[torch.dtype, ...] = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
EXTREMES: tuple[float, ...] = (1e25, 1e-25)

Isometry = Callable[[Tensor], Tensor]


def normal(shape: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """Returns independent standard normal entries, the same for the same shape and seed in every dtype."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64, device="cpu").to(dtype)


def signs(shape: Sequence[int], seed: int) -> Tensor:
    """Returns independent entries +1 and -1."""
    return torch.where(normal(shape, seed) < 0, -1.0, 1.0).double()


def orthogonal(n: int, seed: int) -> Tensor:
    """Returns an orthogonal matrix of size n."""
    return torch.linalg.qr(normal((n, n), seed)).Q


def order(n: int, seed: int) -> Tensor:
    """Returns a permutation of 0..n-1."""
    return normal((n,), seed).argsort()


def rank_one(rows: int, columns: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Returns ``(w, u, v)`` with w = u v^T exactly rank one in every dtype: the entries are powers of two."""
    u = signs((rows,), 3) * 2.0 ** (torch.arange(rows) % 3)
    v = signs((columns,), 4) * 2.0 ** -(torch.arange(columns) % 2)
    return (u[:, None] * v).to(dtype), u, v


def shapes(smallest: tuple[int, int] = (0, 0)) -> list[tuple[int, int]]:
    """Returns the shapes that have at least as many rows and columns."""
    return [s for s in SHAPES if s[0] >= smallest[0] and s[1] >= smallest[1]]


def degenerate(dtype: torch.dtype, smallest: tuple[int, int] = (0, 0)) -> dict[str, Tensor]:
    """Returns the matrices at which formulas divide by zero, overflow or meet an empty dimension.

    Args:
        dtype: Their dtype.
        smallest: Fewest rows and columns.
    """
    found = {
        "zero": torch.zeros(4, 3),
        "rank one": rank_one(4, 3)[0],
        "rank two of five": normal((5, 2), 5) @ normal((2, 5), 6),
        "identity": torch.eye(4),
        "twice an orthogonal matrix": 2 * orthogonal(5, 7),
        "tall with repeated singular values": orthogonal(6, 8)[:, :3],
        "one row": normal((1, 5), 9),
        "one column": normal((5, 1), 10),
        "one entry": normal((1, 1), 11),
        "zero row among others": torch.cat([torch.zeros(1, 3), normal((3, 3), 12)]),
        "0 x 4": torch.zeros(0, 4),
        "4 x 0": torch.zeros(4, 0),
        "0 x 0": torch.zeros(0, 0),
    }
    if dtype != torch.float16:  # its range ends at 65504
        for size in EXTREMES:
            found[f"entries near {size:g}"] = size * normal((4, 3), 13)
            found[f"rank one near {size:g}"] = size * rank_one(4, 3)[0]
        found["entries from 1e-25 to 1e25"] = normal((3, 3), 14) * torch.tensor([[1e25], [1.0], [1e-25]]).double()
    fits = {n: w for n, w in found.items() if w.shape[0] >= smallest[0] and w.shape[1] >= smallest[1]}
    return {name: w.to(dtype) for name, w in fits.items()}


def layouts(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Returns matrices that are not laid out row by row in memory."""
    wide = normal((6, 8), 15, dtype)
    return {
        "transposed": wide.mT,
        "every other column": wide[:, ::2],
        "offset into a larger matrix": wide[1:4, 2:7],
        "expanded row": normal((1, 5), 16, dtype).expand(4, 5),
        "expanded entry": normal((1, 1), 17, dtype).expand(3, 4),
        "expanded batch": normal((4, 3), 18, dtype).expand(2, 4, 3),
        "batch last in memory": normal((4, 3, 2), 19, dtype).permute(2, 0, 1),
    }


def isometries(invariance: str, rows: int, columns: int) -> dict[str, Isometry]:
    """Returns linear maps of matrices that leave an energy with this invariance unchanged, by name."""
    p, q = orthogonal(rows, 20), orthogonal(columns, 21)
    i, j = order(rows, 22), order(columns, 23)
    flip = signs((rows, columns), 24)
    known: dict[str, dict[str, Isometry]] = {
        "orthogonal": {"P W": lambda w: p @ w, "W Q": lambda w: w @ q, "P W Q": lambda w: p @ w @ q},
        "permutation": {"rows permuted": lambda w: w[i], "columns permuted": lambda w: w[:, j]},
        "sign": {"signs of entries changed": lambda w: flip * w},
    }
    return known.get(invariance, {})


def network(widths: Sequence[int], seed: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Returns random layers W_1..W_L, W_l of shape ``(widths[l], widths[l - 1])``."""
    return [normal((widths[i + 1], widths[i]), seed + i, dtype) for i in range(len(widths) - 1)]


def degenerate_networks(dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """Returns networks with zero, rank-one, orthogonal, empty or badly scaled layers."""
    found = {
        "zero": [torch.zeros(3, 4), torch.zeros(2, 3)],
        "one zero layer": [normal((3, 4), 30), torch.zeros(2, 3)],
        "rank one": [rank_one(3, 4)[0], rank_one(2, 3)[0]],
        "identities": [torch.eye(3), torch.eye(3), torch.eye(3)],
        "orthogonal layers": [orthogonal(4, 31), orthogonal(4, 32)],
        "one row": [normal((1, 5), 33)],
        "one column": [normal((5, 1), 34)],
        "width one": [normal((1, 4), 35), normal((4, 1), 36)],
        "no hidden neuron": [torch.zeros(0, 4), torch.zeros(2, 0)],
        "0 x 4": [torch.zeros(0, 4)],
    }
    if dtype != torch.float16:
        for size in EXTREMES:
            found[f"entries near {size:g}"] = [size * w for w in network((4, 3, 2), 37)]
    return {name: [w.to(dtype) for w in layers] for name, layers in found.items()}
