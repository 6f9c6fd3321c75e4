"""Bounds of a graph energy anywhere, from one decomposition somewhere.

Idea: E = 2 ||B||_*, B the weights between neurons of even and of odd layers, so B has the bounds of
`groundstate.norms.anchor`. With M = B or B^T, whichever has fewer columns, and v_i orthonormal::

    sum_l <G_l, W_l>  <=  E  <=  2 sum_i ||M v_i||_2

G_l the gradients at the anchor, v_i the eigenvectors of M^T M there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from groundstate.norms.anchor import ROUNDING
from groundstate.norms.graph import energy_and_grad, node_sizes
from groundstate.norms.spectral import prepare, working_dtype
from groundstate.norms.staircase import staircase


def graph_anchor(layers: Sequence[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Decomposes the graph once, for bounds around it.

    Args:
        layers: W_1..W_L, W_l of shape ``(d_l, d_{l-1})``.

    Returns:
        The gradients, minimal-norm, and what `graph_bounds` needs: ``directions`` (the v_i as columns, empty where
        there are no bounds: zero or extreme weights) and ``rounding``, of the bounds as computed.

    Raises:
        UsageError, NonFiniteError: as `groundstate.norms.graph.energy_and_grad`.

    Cost: that of `groundstate.norms.graph.energy_and_grad`, and one more ``eigh`` of the smaller color class.
    """
    energy, grads = energy_and_grad(layers)
    with torch.no_grad():
        work = _working(layers)
        scaled = any(prepare(w)[1] is not None for w in work if bool(w.any()))
        energy = energy.double()
        if scaled or not float(energy) > 0:
            return grads, {"directions": work[0].new_zeros(0, 0), "rounding": energy.new_zeros(())}
        lam, v = torch.linalg.eigh(staircase(tuple(node_sizes(layers))).gram(work))
        spread = 4 + 2 * len(lam) ** 0.5 * lam[-1].double().clamp_min(0).sqrt() / energy
        return grads, {"directions": v, "rounding": ROUNDING * torch.finfo(v.dtype).eps * spread}


def graph_bounds(layers: Sequence[Tensor], gradients: Sequence[Tensor], memory: Mapping[str, Tensor]) -> Tensor:
    """Returns the lower and the upper bound of the energy of ``layers``, a float64 tensor of two.

    Infinite, or NaN, where the layers are not finite or their squares overflow.

    Cost: 2 d_l d_{l-1} n flops per layer, n the smaller color class.
    """
    with torch.no_grad():
        work = _working(layers)
        pairs = zip(gradients, work, strict=True)
        lower = torch.stack([torch.vdot(g.to(w.dtype).reshape(-1), w.reshape(-1)).double() for g, w in pairs]).sum()
        v = memory["directions"]
        if v.numel() == 0:
            return torch.stack([lower.clamp_min(0), torch.full_like(lower, torch.inf)])
        plan = staircase(tuple(node_sizes(layers)))
        squares = torch.zeros(v.shape[1], dtype=torch.float64, device=v.device)
        for row in plan.rows:
            parts = [work[row.before] @ v[plan.columns[row.left]]] if row.before >= 0 else []
            parts += [work[row.after].mT @ v[plan.columns[row.right]]] if row.after >= 0 else []
            squares += torch.linalg.vector_norm(sum(parts[1:], parts[0]), dim=0).double().square()
        upper = 2 * squares.sqrt().sum()
        error = memory["rounding"] * upper
        return torch.stack([(lower - error).clamp_min(0), upper + error])


def _working(layers: Sequence[Tensor]) -> list[Tensor]:
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in layers) else working_dtype(layers[0].dtype)
    return [w.detach().to(dtype) for w in layers]
