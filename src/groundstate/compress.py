"""Low-rank factors for the layers that they make smaller.

A weight W (m x n) = U S V^T cut to rank r is B A with B = U_r S_r^{1/2} (m x r) and A = S_r^{1/2} V_r^T (r x n): r (m
+ n) numbers instead of m n. The relative error ||W - B A||_F / ||W||_F = (sum_{i>r} sigma_i^2 / sum_i
sigma_i^2)^{1/2} is the smallest that rank r allows (Eckart and Young 1936). A convolution ``(out, in, *kernel)`` is
cut as ``(out, in * kernel)``: a convolution to r channels, then a 1x1 one. A layer with r (m + n) >= m n is left as
it is, with that reason.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from groundstate.blocks import as_matrix, canonical
from groundstate.errors import NonFiniteError, UsageError
from groundstate.norms.spectral import svd

DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
Dense = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d


class Factorized(nn.Sequential):
    """Two layers in the place of one; their weights are named ``<layer>.0.weight`` and ``<layer>.1.weight``.

    ``weight`` and ``bias`` give the layer they stand for, for code that reads them.
    """

    @property
    def weight(self) -> Tensor:
        """The product of the factors, in the shape of the dense weight."""
        a, b = self._factors()
        return (as_matrix(b) @ as_matrix(a)).reshape(b.shape[0], *a.shape[1:])

    @property
    def bias(self) -> Tensor | None:
        """The bias of the dense layer."""
        bias = self[1].bias
        return bias if isinstance(bias, Tensor) else None

    @property
    def rank(self) -> int:
        """The number of channels between the two factors."""
        return self._factors()[0].shape[0]

    def _factors(self) -> tuple[Tensor, Tensor]:
        a, b = (cast(Tensor, part.weight) for part in self)
        return a, b


@dataclass(frozen=True)
class LayerRow:
    """What became of one layer.

    Attributes:
        name: Its name.
        kind: Its class.
        shape: The shape of its weight.
        factored: Whether two factors took its place.
        rank: The rank asked for (``None`` where the layer was not looked at).
        relative_error: ||W - B A||_F / ||W||_F, from the dropped singular values; 0 where it stayed dense.
        parameters_before: Entries of its weight; 0 where a layer above it shares it.
        parameters_after: Entries of its factors, or of the weight that stayed.
        reason: Why it stayed dense.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    factored: bool
    rank: int | None
    relative_error: float
    parameters_before: int
    parameters_after: int
    reason: str = ""


@dataclass(frozen=True)
class Compressed:
    """A factorized copy of a model, and the account of it.

    Attributes:
        model: The new model, in the mode (train or eval) of the original.
        rows: One per layer with a weight of two or more dimensions.
        totals: ``parameters_before``, ``parameters_after``, ``bytes_before``, ``bytes_after`` (buffers included),
            ``ratio`` of parameters; ``latency_ms_before``, ``latency_ms_after`` (medians) with an example;
            ``accuracy_before``, ``accuracy_after`` with ``evaluate``.
    """

    model: nn.Module
    rows: list[LayerRow]
    totals: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Returns rows and totals as plain JSON values."""
        return {"schema": 1, "totals": self.totals, "rows": [asdict(r) | {"shape": list(r.shape)} for r in self.rows]}

    def save(self, folder: str | Path) -> Path:
        """Writes the weights and a description into a new folder; `groundstate.compressed_folder.load` reads it."""
        from groundstate.compressed_folder import save

        return save(self, folder)


def truncate(w: Tensor, tolerance: float) -> tuple[Tensor, int, int]:
    """Drops the singular values below ``tolerance * sigma_1``.

    Args:
        w: A weight of two or more dimensions, seen as ``(out, in * kernel)``.
        tolerance: Between 0 and 1; at 0 only rounding is dropped (see `cut`).

    Returns:
        ``(w_truncated, rank, parameters)``: the truncated weight in shape and dtype of ``w``, the rank r that is left,
        and min(m n, r (m + n)), the numbers needed to store it.

    >>> cut_weight, rank, parameters = truncate(torch.diag(torch.tensor([4.0, 2.0, 0.1])), 0.1)
    >>> rank, parameters, round(float(cut_weight[2, 2]), 6)
    (2, 9, 0.0)
    """
    _check(tolerance, None, None)
    matrix = as_matrix(w.detach())
    m, n = matrix.shape
    u, s, vh = svd(matrix)
    r = cut(s, max(m, n), tolerance=tolerance)
    cut_matrix = (u[:, :r] * s[:r]) @ vh[:r]
    return cut_matrix.to(w.dtype).reshape(w.shape), r, min(m * n, r * (m + n))


def cut(
    s: Tensor, longest: int, *, tolerance: float | None = None, energy: float | None = None, rank: int | None = None
) -> int:
    """Returns the rank that one rule leaves of singular values in descending order.

    Args:
        s: Singular values ``(r,)``.
        longest: The longer side of the matrix: values up to ``longest * eps * sigma_1`` are rounding and never kept by
            ``tolerance``.
        tolerance: Keep sigma_i >= tolerance * sigma_1.
        energy: Keep the fewest that hold this fraction of sum_i sigma_i^2.
        rank: Keep this many.
    """
    if s.numel() == 0 or float(s[0]) == 0.0:
        return 0
    relative = s.double() / s[0].double()
    if tolerance is not None:
        rounding = longest * torch.finfo(s.dtype).eps
        return int(((relative >= tolerance) & (relative > rounding)).sum())
    if energy is not None:
        mass = relative.square().cumsum(0)
        return min(int((mass < energy * mass[-1] * (1 - 1e-12)).sum()) + 1, len(s))
    return min(rank or 0, len(s))


def compress(
    model: nn.Module,
    *,
    tolerance: float | None = None,
    energy: float | None = None,
    rank: int | None = None,
    evaluate: Callable[[nn.Module], float] | None = None,
    example: Tensor | tuple[Any, ...] | None = None,
) -> Compressed:
    """Replaces linear and convolution layers by two factors where that makes them smaller.

    Exactly one of ``tolerance``, ``energy`` and ``rank`` chooses the ranks. The model itself is not changed. Layers
    that share a weight share its factors.

    Args:
        model: Any module.
        tolerance: Drop singular values below ``tolerance * sigma_1`` of their layer; in [0, 1).
        energy: Keep this fraction of each layer's squared Frobenius norm; in (0, 1].
        rank: Keep this many singular values in each layer.
        evaluate: Called on the model before and after, e.g. the accuracy on held-out data.
        example: An input, or a tuple of inputs: the time of a forward pass before and after is measured.

    Raises:
        UsageError: not exactly one rule, a value out of range, or a model without any such layer.
        NonFiniteError: a weight holds NaN or infinities; names it.

    Cost: one SVD per layer.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> smaller = compress(model, rank=8)
    >>> [(r.factored, r.parameters_after) for r in smaller.rows]   # 8 * (64 + 64); 8 * (64 + 10) = 592 < 640
    [(True, 1024), (True, 592)]
    """
    _check(tolerance, energy, rank)
    new = copy.deepcopy(model)
    owners = _owners(new)
    rows: list[LayerRow] = []
    factors: dict[int, tuple[nn.Parameter, nn.Parameter] | None] = {}
    replaced: dict[int, Factorized] = {}
    for name, module, weight in owners:
        shared = id(weight) in factors
        refusal = _refusal(module, weight, owners)
        if refusal is not None:
            factors[id(weight)] = None
            count = 0 if shared else weight.numel()
            rows.append(
                LayerRow(name, type(module).__name__, tuple(weight.shape), False, None, 0.0, count, count, refusal)
            )
            continue
        row, pair = _factor(name, module, weight, tolerance, energy, rank)
        if shared:
            pair = factors[id(weight)]
            row = _shared(row)
        factors[id(weight)] = pair
        rows.append(row)
        if pair is not None:
            replaced[id(module)] = build_factors(module, *pair)
    if all(r.rank is None for r in rows):
        listed = "; ".join(f"{r.name}: {r.reason}" for r in rows) or "it has no weight of two or more dimensions"
        raise UsageError(f"the model has no linear or convolution layer to factor: {listed}")
    new = replace_layers(new, replaced)
    return Compressed(new, rows, _account(model, new, evaluate, example))


def _check(tolerance: float | None, energy: float | None, rank: int | None) -> None:
    given = {k: v for k, v in (("tolerance", tolerance), ("energy", energy), ("rank", rank)) if v is not None}
    if len(given) != 1:
        raise UsageError(f"give exactly one of tolerance, energy and rank; got {', '.join(given) or 'none'}")
    if tolerance is not None and not 0 <= tolerance < 1:
        raise UsageError(f"tolerance must be at least 0 and less than 1 (a fraction of sigma_1), got {tolerance!r}")
    if energy is not None and not 0 < energy <= 1:
        raise UsageError(f"energy must be more than 0 and at most 1 (a fraction of the squared norm), got {energy!r}")
    if rank is not None and (not isinstance(rank, int) or isinstance(rank, bool) or rank < 1):
        raise UsageError(f"rank must be a whole number from 1, got {rank!r}")


def _owners(model: nn.Module) -> list[tuple[str, nn.Module, nn.Parameter]]:
    """Lists each module that holds a parameter of two or more dimensions; a module that is used twice, once."""
    found = []
    for name, module in model.named_modules():
        for short, parameter in module.named_parameters(recurse=False):
            if not nn.parameter.is_lazy(parameter) and parameter.ndim >= 2:
                full = canonical(name) if short == "weight" else canonical(f"{name}.{short}" if name else short)
                found.append((full, module, parameter))
    return found


def _refusal(
    module: nn.Module, weight: nn.Parameter, owners: Iterable[tuple[str, nn.Module, nn.Parameter]]
) -> str | None:
    """Returns why a layer cannot be factored at all, or ``None``."""
    if type(module) not in DENSE:
        return f"{type(module).__name__}: only Linear and Conv1d to Conv3d are factored"
    if weight is not module.weight:
        return "not the weight of its layer"
    if parametrize.is_parametrized(module) or module._forward_hooks or module._forward_pre_hooks:
        return "it has a parametrization or hooks: remove them first"
    if isinstance(module, nn.modules.conv._ConvNd) and module.groups != 1:
        return f"grouped convolution (groups={module.groups})"
    if weight.is_meta or not weight.is_floating_point():
        return "its weight has no real floating-point data"
    for other, sharing, parameter in owners:
        if parameter is weight and type(sharing) is not type(module):
            return f"its weight is shared with {other} ({type(sharing).__name__})"
    return None


def _factor(
    name: str, module: nn.Module, weight: nn.Parameter, tolerance: float | None, energy: float | None, rank: int | None
) -> tuple[LayerRow, tuple[nn.Parameter, nn.Parameter] | None]:
    matrix = as_matrix(weight.detach())
    if not bool(torch.isfinite(matrix).all()):
        raise NonFiniteError(f"the weight of {name!r} holds NaN or infinities: restore it from an earlier checkpoint")
    m, n = matrix.shape
    kind, shape, before = type(module).__name__, tuple(weight.shape), m * n
    u, s, vh = svd(matrix)
    r = max(cut(s, max(m, n), tolerance=tolerance, energy=energy, rank=rank), 1)
    after = r * (m + n)
    if after >= before:
        reason = f"rank {r} would take {r} * ({m} + {n}) = {after} parameters, not fewer than {before}"
        return LayerRow(name, kind, shape, False, r, 0.0, before, before, reason), None
    root = s[:r].sqrt()
    a = (root[:, None] * vh[:r]).to(weight.dtype).reshape(r, *weight.shape[1:])
    b = (u[:, :r] * root).to(weight.dtype).reshape(m, r, *([1] * (weight.ndim - 2)))
    relative = s.double() / s[0].double().clamp_min(torch.finfo(torch.float64).tiny)
    error = float((relative[r:].square().sum() / relative.square().sum().clamp_min(1.0)).sqrt())
    pair = tuple(nn.Parameter(f.contiguous(), requires_grad=weight.requires_grad) for f in (a, b))
    return LayerRow(name, kind, shape, True, r, error, before, after), (pair[0], pair[1])


def _shared(row: LayerRow) -> LayerRow:
    note = row.reason or "its factors are those of the layer above that shares the weight"
    return LayerRow(row.name, row.kind, row.shape, row.factored, row.rank, row.relative_error, 0, 0, note)


def build_factors(module: nn.Module, a: nn.Parameter, b: nn.Parameter) -> Factorized:
    """Builds the two layers around given factors; draws no random numbers."""
    r = a.shape[0]
    options: dict[str, Any] = {"device": "meta", "dtype": a.dtype}
    first: nn.Module
    second: nn.Module
    if isinstance(module, nn.Linear):
        first = nn.Linear(module.in_features, r, bias=False, **options)
        second = nn.Linear(r, module.out_features, bias=False, **options)
    elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        kind: Any = type(module)
        geometry = {k: getattr(module, k) for k in ("stride", "padding", "dilation", "padding_mode")}
        first = kind(module.in_channels, r, module.kernel_size, bias=False, **geometry, **options)
        second = kind(r, module.out_channels, 1, bias=False, **options)
    else:
        raise UsageError(f"{type(module).__name__} cannot be factored")
    first.weight, second.weight = a, b
    second.register_parameter("bias", cast("nn.Parameter | None", module.bias))
    return Factorized(first, second).train(module.training)


def replace_layers(model: nn.Module, replaced: dict[int, Factorized]) -> nn.Module:
    """Puts each factorized layer in the place of the layer with that ``id``, in place; returns the model."""
    if id(model) in replaced:
        return replaced[id(model)]
    for parent in list(model.modules()):
        for short, child in list(parent._modules.items()):
            if id(child) in replaced:
                setattr(parent, short, replaced[id(child)])
    return model


def _account(
    before: nn.Module,
    after: nn.Module,
    evaluate: Callable[[nn.Module], float] | None,
    example: Tensor | tuple[Any, ...] | None,
) -> dict[str, float]:
    totals: dict[str, float] = {}
    for key, model in (("before", before), ("after", after)):
        parameters = list(model.parameters())
        totals[f"parameters_{key}"] = sum(p.numel() for p in parameters)
        totals[f"bytes_{key}"] = sum(t.numel() * t.element_size() for t in [*parameters, *model.buffers()])
    totals["ratio"] = totals["parameters_after"] / totals["parameters_before"]
    if example is not None:
        inputs = example if isinstance(example, tuple) else (example,)
        totals["latency_ms_before"], totals["latency_ms_after"] = latencies((before, after), inputs)
    if evaluate is not None:
        totals["accuracy_before"] = float(evaluate(before))
        totals["accuracy_after"] = float(evaluate(after))
    return totals


def latencies(models: Iterable[nn.Module], inputs: tuple[Any, ...], repeats: int = 21, warmup: int = 3) -> list[float]:
    """Returns the median time of a forward pass of each model in milliseconds, in eval mode, without gradients.

    The models take turns, so that a change in the load of the machine meets all of them.
    """
    models = list(models)
    modes = [(part, part.training) for model in models for part in model.modules()]
    times: list[list[float]] = [[] for _ in models]
    try:
        with torch.no_grad():
            for turn in range(warmup + repeats):
                for model, record in zip(models, times, strict=True):
                    model.eval()
                    start = time.perf_counter()
                    outputs = model(*inputs)
                    if isinstance(outputs, Tensor) and outputs.is_cuda:
                        torch.cuda.synchronize(outputs.device)
                    if turn >= warmup:
                        record.append(1e3 * (time.perf_counter() - start))
    finally:
        for part, training in modes:
            part.training = training
    return [statistics.median(record) for record in times]
