"""An upper bound on the nuclear norm of the Jacobian that needs no decomposition: the two halves of a network.

For f = g after h, J = J_g(h(x)) J_h(x), and per sample::

    ||J||_*  <=  ||J_g||_F ||J_h||_F  <=  1/2 (||J_g||_F^2 + ||J_h||_F^2)

The half-sum on the right is what is minimized: its halves are Frobenius norms, so one probe each estimates it without
bias. Minimized over all smooth functions g and h its infimum is that of the nuclear norm; for one given network it is
an upper bound and no more: 2 to 5 times too large in a trained perceptron, more in a new one (`looseness`). The product
in the middle does not change when h is scaled by c and g by 1/c: it is the one to report.

Estimators, per half: ``vjp``, C ||J^T u||^2 with u uniform on the unit sphere of the half's C outputs; ``fd``,
||g(a + sigma e) - g(a)||^2 / sigma^2 with e Gaussian, the published form, biased by O(sigma^2), at kinks O(sigma).
Where a unit of a ReLU network switches between the two points, the gradient of fd has an error of order 1/sigma with
probability of order sigma: its noise grows like 1/sigma. So fd for smooth networks, vjp for those with kinks.

References: N. Srebro, J. Rennie, T. Jaakkola, "Maximum-margin matrix factorization" (2004), lemma 1; C. Scarvelis,
J. Solomon, "Nuclear norm regularization for deep learning" (2024), theorems 3.1 and 3.2.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from groundstate.errors import UsageError
from groundstate.jacobian.cuts import Cut, Split
from groundstate.jacobian.exact import connected
from groundstate.jacobian.function import Function, blame
from groundstate.jacobian.probes import sphere
from groundstate.norms.spectral import singular_values, working_dtype

Estimator = Literal["auto", "exact", "vjp", "fd"]

_KINKED = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.SELU, nn.Threshold, nn.Hardtanh, nn.Hardsigmoid,
    nn.Hardswish, nn.Hardshrink, nn.Softshrink, nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveMaxPool1d,
    nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d,
)  # fmt: skip
_KINKED_FUNCTIONS = (
    functional.relu, functional.relu6, functional.leaky_relu, functional.hardtanh, functional.hardswish, torch.relu,
)  # fmt: skip


def is_kinked(module: nn.Module) -> bool:
    """Returns whether a network has ReLU-like activations or max pooling, where its Jacobian jumps.

    Sees modules, and functions that a module keeps as an attribute (``nn.TransformerEncoderLayer``). Does not see a
    call of ``torch.relu`` or ``max`` inside a forward pass: say ``estimator="vjp"`` for such a network.

    >>> is_kinked(nn.Sequential(nn.Linear(1, 1), nn.ReLU())), is_kinked(nn.Sequential(nn.Linear(1, 1), nn.GELU()))
    (True, False)
    """
    return any(
        isinstance(m, _KINKED)
        or (isinstance(m, nn.ELU) and m.alpha != 1)
        or (isinstance(m, nn.RNNBase) and m.mode == "RNN_RELU")
        or any(value is f for value in vars(m).values() for f in _KINKED_FUNCTIONS)
        for m in module.modules()
    )


def half_sum(
    split: Split,
    x: Tensor,
    *,
    estimator: Estimator = "auto",
    probe: torch.Generator | None = None,
    sigma: float = 1e-2,
    differentiable: bool | None = None,
) -> Tensor:
    """Returns 1/2 (||J_g(h(x))||_F^2 + ||J_h(x)||_F^2) of each sample, or an unbiased estimate of it.

    Args:
        split: The two halves, of the same batch.
        x: The points, ``(B, ...)``.
        estimator: ``exact``; ``vjp``; ``fd``; ``auto``: vjp for networks with kinks (`is_kinked`), fd for smooth ones.
        probe: The generator of the directions; on the CPU, so that all devices draw the same. Not used by ``exact``.
        sigma: Standard deviation of the steps of ``fd``, in the units of x and of a alike.
        differentiable: Keep the graph to the parameters; by default where the function records gradients.

    Returns:
        ``(B,)``, in float64 for float64 and float32 otherwise. At J = 0 zero, with zero gradient.

    Raises:
        UsageError: sigma is not above 0, no generator, an unknown estimator, or the output is detached from x.
        NonFiniteError: the value is not finite; the first bad tensor is named.

    Warns where ``fd`` is differentiated at kinks, and where its steps change the values by little more than rounding.

    Cost: ``fd`` two forward passes, the unmoved one shared by both halves; ``vjp`` one forward and one backward pass,
    and the second derivative when differentiated; ``exact`` one backward pass of a half for each of its outputs, that
    is, as many as the cut is wide.

    >>> from groundstate.jacobian.cuts import check_cut
    >>> from groundstate.jacobian.function import function
    >>> model = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    >>> _ = nn.init.constant_(model[0].weight, 3.0), nn.init.constant_(model[1].weight, 2.0)
    >>> with function(model, torch.ones(1, 1)) as (run, x):
    ...     half_sum(Split(run, check_cut(run, x, "0"), x), x, estimator="exact").detach()  # (3^2 + 2^2) / 2
    tensor([6.5000])
    """
    if estimator not in ("auto", "exact", "vjp", "fd"):
        raise UsageError(f"estimator must be 'auto', 'exact', 'vjp' or 'fd', got {estimator!r}")
    module = split.run.module
    kinked = module is not None and estimator in ("auto", "fd") and is_kinked(module)
    if estimator == "auto":
        estimator = "vjp" if kinked else "fd"
    graph = split.run.grad_wanted if differentiable is None else differentiable
    if estimator == "exact":
        g, h = _exact(split, x, graph)
    elif probe is None:
        raise UsageError(f"estimator={estimator!r} draws directions: give probe, e.g. torch.Generator().manual_seed(0)")
    elif estimator == "vjp":
        g, h = _by_vjp(split, x, probe, graph)
    else:
        if not (sigma > 0 and math.isfinite(sigma)):
            raise UsageError(f"sigma is the length of a step and must be positive and finite, got {sigma!r}")
        if kinked and graph:
            warnings.warn(
                "estimator='fd' on a network with kinks (ReLU, max pooling): the noise of its gradient grows like "
                f"1/sigma, and sigma is {sigma:g}; use estimator='vjp'",
                stacklevel=2,
            )
        g, h = _by_differences(split, x, probe, sigma)
    value = (g + h) / 2
    if not bool(torch.isfinite(value).all()):
        raise blame(split.run.f, x, "the half-sum of the two Jacobians")
    return value if graph else value.detach()


def bounds(split: Split, x: Tensor) -> dict[str, Tensor]:
    """Returns the exact norms of each sample, each ``(B,)``, without a graph.

    Returns:
        ``nuclear`` ||J||_*, ``product`` ||J_g||_F ||J_h||_F, ``half_sum``, ``frobenius_g``, ``frobenius_h``.

    Raises:
        UsageError: the output is detached from x.
        NonFiniteError: a norm is not finite.

    Cost: C backward passes of the network, as many of its first half as the cut is wide, an SVD per sample; memory
    of the Jacobians, B C n.
    """
    leaf = x.detach().requires_grad_()
    a, out = split.both(leaf)
    connected(out)
    rows = [_pulled(out, c, (a, leaf)) for c in range(out.shape[1])]
    g = torch.stack([row[0] for row in rows]).square().sum((0, 2)).sqrt()
    j = torch.stack([row[1] for row in rows], 1)
    h = _squares(a, leaf, False).sqrt()
    if not bool(torch.isfinite(j).all() and torch.isfinite(g).all() and torch.isfinite(h).all()):
        raise blame(split.run.f, x, "the Jacobian of the network or of one of its halves")
    nuclear = singular_values(j).sum(-1)
    return {
        "nuclear": nuclear,
        "product": g * h,
        "half_sum": (g.square() + h.square()) / 2,
        "frobenius_g": g,
        "frobenius_h": h,
    }


def looseness(split: Split, x: Tensor) -> dict[str, float]:
    """Returns the means of `bounds` over the batch, and how many times too large the bounds are.

    Returns:
        The keys of `bounds`, and ``product/nuclear`` and ``half_sum/nuclear``, ratios of means, at least 1 (``inf``
        where J is zero and a half is not; 1 where both halves are).

    Errors and cost as of `bounds`.
    """
    means = {name: float(value.double().mean()) for name, value in bounds(split, x).items()}
    for name in ("product", "half_sum"):
        above, below = means[name], means["nuclear"]
        means[f"{name}/nuclear"] = above / below if below > 0 else (math.inf if above > 0 else 1.0)
    return means


class Tightest(NamedTuple):
    """The cut with the smallest half-sum, and the mean half-sum at every cut that was tried."""

    cut: Cut
    table: list[tuple[Cut, float]]


def tightest(
    run: Function,
    x: Tensor,
    cuts: Sequence[Cut],
    *,
    probe: torch.Generator | None = None,
    estimator: Estimator = "vjp",
    draws: int = 8,
    sigma: float = 1e-2,
) -> Tightest:
    """Returns the cut with the smallest mean half-sum, among those at least min(n, C) wide.

    A narrower cut limits the rank of J, and with it the functions that the bound speaks of; it is in the table only.
    After an activation the half-sum is usually smaller than before it. It depends on how the two halves are scaled, as
    the energy that is minimized does; training changes it, so choose once and keep the cut.

    Args:
        run: A function of `groundstate.jacobian.function.function`.
        x: Its points, ``(B, ...)``; some 100 samples will do.
        cuts: Of `find_cuts`.
        probe: The generator of the directions; not used by ``exact``.
        estimator: As of `half_sum`.
        draws: Directions per sample and half of each cut.
        sigma: As of `half_sum`.

    Raises:
        UsageError: no cut, or none that is wide enough.

    Cost: ``draws`` times that of `half_sum` for each cut.
    """
    if not cuts:
        raise UsageError("there is no cut to choose from: skip connections span the network, or it has one layer only")
    if draws < 1:
        raise UsageError(f"draws must be at least 1, got {draws}")
    times = 1 if estimator == "exact" else draws
    with torch.no_grad():
        outputs = run(x.clone()).shape[1]  # a copy: the network may work in place
    least = min(x[0].numel(), outputs)
    table: list[tuple[Cut, float]] = []
    for cut in cuts:
        split = Split(run, cut, x)
        values = [
            half_sum(split, x, estimator=estimator, probe=probe, sigma=sigma, differentiable=False).double().mean()
            for _ in range(times)
        ]
        table.append((cut, float(torch.stack(values).mean())))
    wide = [entry for entry in table if entry[0].width >= least]
    if not wide:
        found = ", ".join(f"{cut.name} ({cut.width})" for cut in cuts)
        raise UsageError(
            f"no cut is as wide as min(inputs, outputs) = {least}, so every split would limit the rank of the "
            f"Jacobian: {found}; name one of them to have it all the same"
        )
    return Tightest(min(wide, key=lambda entry: entry[1])[0], table)


def _exact(split: Split, x: Tensor, graph: bool) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    a, out = split.both(leaf)
    return _squares(connected(out), a, graph), _squares(a, leaf, graph)


def _by_vjp(split: Split, x: Tensor, probe: torch.Generator, graph: bool) -> tuple[Tensor, Tensor]:
    leaf = x.detach().requires_grad_()
    a, out = split.both(leaf)
    found = []
    for ends, starts in ((connected(out), a), (a, leaf)):
        width = ends[0].numel()
        u = sphere(len(ends), width, 1, probe, working_dtype(ends.dtype)).reshape(ends.shape).to(ends)
        row = _gradient(ends, starts, u, graph)
        found.append(width * row.square().sum(1))
    return found[0], found[1]


def _by_differences(split: Split, x: Tensor, probe: torch.Generator, sigma: float) -> tuple[Tensor, Tensor]:
    a, out = split.both(x)
    moved_a, moved_out = split.both(x + sigma * _normal(x, probe), a + sigma * _normal(a, probe))
    found = []
    for what, start, here, there in (
        ("output", a, out, moved_out),
        (f"cut {split.cut.name!r}", x, a, moved_a),
    ):
        change = _wide(there - here)
        _warn_of_rounding(what, start, here, change, sigma)
        found.append((change / sigma).square().sum(1))
    return found[0], found[1]


def _normal(like: Tensor, probe: torch.Generator) -> Tensor:
    drawn = torch.randn(like.shape, generator=probe, dtype=working_dtype(like.dtype), device=probe.device)
    return drawn.to(like)


def _warn_of_rounding(what: str, start: Tensor, here: Tensor, change: Tensor, sigma: float) -> None:
    moved, size = _rms(change), _rms(here)
    share = 1e3 * torch.finfo(here.dtype).eps
    # No change at all is right where this half is constant, and lost where the step itself is.
    if moved < share * size and (moved > 0 or sigma < share * _rms(start)):
        warnings.warn(
            f"estimator='fd' changes the {what} by {moved:.2g} of {size:.2g}, close to rounding: use a larger sigma "
            f"than {sigma:g}, float64, or estimator='vjp'",
            stacklevel=4,
        )


def _rms(t: Tensor) -> float:
    return float(_wide(t.detach()).square().mean().sqrt())


def _squares(ends: Tensor, starts: Tensor, graph: bool) -> Tensor:
    """Returns the squared Frobenius norm of the Jacobian of ``ends`` by ``starts`` per sample, one VJP per output."""
    total = torch.zeros(len(ends), dtype=working_dtype(ends.dtype), device=ends.device)
    for c in range(ends[0].numel()):
        (row,) = _pulled(ends, c, (starts,), graph)
        total = total + row.square().sum(1)
    return total


def _pulled(ends: Tensor, c: int, starts: tuple[Tensor, ...], graph: bool = False) -> list[Tensor]:
    """Returns row c of the Jacobians by each of ``starts``, ``(B, n)``."""
    one = ends.reshape(len(ends), -1)[:, c].sum()  # samples do not influence one another, so the sum separates them
    grads = torch.autograd.grad(one, starts, retain_graph=True, create_graph=graph, materialize_grads=True)
    return [_wide(grad) for grad in grads]


def _gradient(ends: Tensor, starts: Tensor, u: Tensor, graph: bool) -> Tensor:
    (grad,) = torch.autograd.grad(ends, starts, u, retain_graph=True, create_graph=graph, materialize_grads=True)
    return _wide(grad)


def _wide(t: Tensor) -> Tensor:
    """Returns ``(B, n)`` in a dtype that squares can be summed in."""
    return t.reshape(len(t), -1).to(working_dtype(t.dtype))
