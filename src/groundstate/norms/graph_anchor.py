"""Bounds of a graph energy anywhere, from one decomposition somewhere.

Idea: E = 2 ||B||_*, B the weights between neurons of even and of odd layers, so B has the bounds of
`groundstate.norms.anchor`. With M = B or B^T, whichever has fewer columns, they need blocks of the gradient on the
edges, and M^T M::

    sum_l <G_l, W_l>  <=  E  <=  <M^T M, K> + tr K^-1

G_l the gradients at the anchor, K = (M0^T M0 + d^2)^(-1/2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from groundstate.norms.anchor import ROUNDING, SLACK, displacement
from groundstate.norms.graph import energy_and_grad, node_sizes
from groundstate.norms.spectral import prepare, working_dtype
from groundstate.norms.staircase import staircase


def graph_anchor(layers: Sequence[Tensor], gap: float) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Decomposes the graph once, for bounds around it.

    Args:
        layers: W_1..W_L, W_l of shape ``(d_l, d_{l-1})``.
        gap: The relative distance of the bounds that will still be good.

    Returns:
        The gradients, minimal-norm, and what `graph_bounds` needs: ``metric`` (K, empty where there are no bounds:
        zero or extreme weights), ``constant`` (tr K^-1) and ``rounding``, of the bounds as computed.

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
            none = energy.new_zeros(())
            return grads, {"metric": work[0].new_zeros(0, 0), "constant": none, "rounding": none}
        lam, v = torch.linalg.eigh(staircase(tuple(node_sizes(layers))).gram(work))
        s = lam.double().clamp_min(0).sqrt().flip(0)
        held = torch.hypot(s, s.new_tensor(displacement(s, SLACK * gap * float(energy) / 2)))
        metric = (v.flip(1) / held.to(v.dtype)) @ v.flip(1).mT
        rounding = ROUNDING * torch.finfo(v.dtype).eps * (4 + held[0] / held[-1])
        return grads, {"metric": metric, "constant": held.sum(), "rounding": rounding}


def graph_bounds(layers: Sequence[Tensor], gradients: Sequence[Tensor], memory: Mapping[str, Tensor]) -> Tensor:
    """Returns the lower and the upper bound of the energy of ``layers``, a float64 tensor of two.

    Infinite, or NaN, where the layers are not finite or their squares overflow.

    Cost: the Gram matrix of the smaller color class.
    """
    with torch.no_grad():
        work = _working(layers)
        pairs = zip(gradients, work, strict=True)
        lower = torch.stack([torch.vdot(g.to(w.dtype).reshape(-1), w.reshape(-1)).double() for g, w in pairs]).sum()
        metric = memory["metric"]
        if metric.numel() == 0:
            return torch.stack([lower.clamp_min(0), torch.full_like(lower, torch.inf)])
        gram = staircase(tuple(node_sizes(layers))).gram(work).tril()
        quadratic = 2 * (gram * metric).sum(dtype=torch.float64)
        quadratic = quadratic - torch.dot(gram.diagonal(), metric.diagonal()).double()
        upper = quadratic + memory["constant"]
        error = memory["rounding"] * upper.abs()
        return torch.stack([(lower - error).clamp_min(0), upper + error])


def _working(layers: Sequence[Tensor]) -> list[Tensor]:
    dtype = torch.float64 if any(w.dtype == torch.float64 for w in layers) else working_dtype(layers[0].dtype)
    return [w.detach().to(dtype) for w in layers]
