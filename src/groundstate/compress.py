"""A trained network with low-rank factors for the layers that they make smaller.

A weight W (m x n) = U S V^T cut to rank r is B A with B (m x r) and A (r x n): r (m + n) numbers instead of m n. The
relative error ||W - B A||_F / ||W||_F = (sum_{i>r} sigma_i^2 / sum_i sigma_i^2)^{1/2} is the smallest that rank r
allows (Eckart and Young 1936). The ranks come from a rule for each weight, or from what may change of the network's
output on given data (`groundstate.compress_output`). A layer with r (m + n) >= m n is left as it is, with that reason.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from groundstate.blocks import canonical
from groundstate.compress_factors import (
    DENSE,
    Factorized,
    Layer,
    RandomizedError,
    cut,
    frobenius_error,
    replace_layers,
    terms_of,
    truncate,
)
from groundstate.compress_output import Allocation, Data, allocate
from groundstate.errors import UsageError

__all__ = ["DENSE", "Compressed", "Factorized", "LayerRow", "compress", "cut", "latencies", "truncate"]


@dataclass(frozen=True)
class LayerRow:
    """What became of one layer.

    Attributes:
        name: Its name.
        kind: Its class.
        shape: The shape of its weight.
        factored: Whether two factors took its place.
        rank: The rank asked for (``None`` where there was none).
        relative_error: ||W - B A||_F / ||W||_F; 0 where it stayed dense.
        parameters_before: Entries of its weight; 0 where a layer above it shares it.
        parameters_after: Entries of its factors, or of the weight that stayed.
        reason: Why it stayed dense.
        method: ``svd``, ``randomized svd``, ``adaptive svd`` or ``data-aware svd`` where it was factored.
        output_error: With ``output_tolerance``, the relative error of its own output (without bias) on the data.
        network_error: With ``output_tolerance``, the change of the network's output where it alone is factored.
        randomized: Of a randomized or adaptive SVD, what is known of its error beside ``relative_error``.
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
    method: str = ""
    output_error: float | None = None
    network_error: float | None = None
    randomized: RandomizedError | None = None


@dataclass(frozen=True)
class Compressed:
    """A factorized copy of a model, and the account of it.

    Attributes:
        model: The new model, in the mode (train or eval) of the original.
        rows: One per layer with a weight of two or more dimensions.
        totals: ``parameters_before``, ``parameters_after``, ``bytes_before``, ``bytes_after`` (buffers included),
            ``ratio`` of parameters; ``latency_ms_before``, ``latency_ms_after`` (medians) with an example;
            ``accuracy_before``, ``accuracy_after`` with ``evaluate``; ``output_change`` with ``output_tolerance``.
        fine_tune: How the factors were trained afterwards, if they were: the figures above but ``accuracy_after`` and
            the sizes are those of the factors as they were cut.
    """

    model: nn.Module
    rows: list[LayerRow]
    totals: dict[str, float]
    fine_tune: dict[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns rows and totals as plain JSON values."""
        rows = [asdict(r) | {"shape": list(r.shape)} for r in self.rows]
        return {"schema": 1, "totals": self.totals, "rows": rows, "fine_tune": self.fine_tune}

    def save(self, folder: str | Path) -> Path:
        """Writes a new folder that `groundstate.compressed_folder.load_compressed` reads."""
        from groundstate.compressed_folder import save

        return save(self, folder)


def compress(
    model: nn.Module,
    *,
    tolerance: float | None = None,
    energy: float | None = None,
    rank: int | None = None,
    output_tolerance: float | None = None,
    data: Data | None = None,
    data_aware: bool = True,
    evaluate: Callable[[nn.Module], float] | None = None,
    example: Tensor | tuple[Any, ...] | None = None,
    generator: torch.Generator | None = None,
) -> Compressed:
    """Replaces linear and convolution layers by two factors where that makes them smaller.

    Exactly one of ``tolerance``, ``energy``, ``rank`` and ``output_tolerance`` chooses the ranks. The model itself is
    not changed. Layers that share a weight share its factors.

    Args:
        model: Any module; with ``output_tolerance`` one that returns one tensor.
        tolerance: Drop singular values below ``tolerance * sigma_1`` of their layer; in [0, 1).
        energy: Keep this fraction of each layer's squared Frobenius norm; in (0, 1].
        rank: Keep this many singular values in each layer.
        output_tolerance: The largest ||f'(X) - f(X)||_F / ||f(X)||_F on ``data``, in (0, 1), measured in eval mode.
        data: Inputs for that, or a tuple of inputs, samples first. Many more samples than the ranks: what the data do
            not show is not kept, and inputs of another kind may change more.
        data_aware: With ``output_tolerance``, factors that are best for the output of each layer on the data; else
            for its weight.
        evaluate: Called on the model before and after, e.g. the accuracy on held-out data.
        example: An input, or a tuple of inputs: the time of a forward pass before and after is measured.
        generator: For the randomized SVD that ``rank`` and ``energy`` take for large matrices; default: of seed 0.

    Raises:
        UsageError: not exactly one rule, a value out of range, or a model without any such layer.
        NonFiniteError: a weight holds NaN or infinities; names it.

    Cost: one SVD per layer; randomized where ``rank`` is at most an eighth of sides from 1024 on, or the rank that
    ``energy`` takes is at most an eighth of sides from 512 on (and may then be one or two in a hundred above the
    smallest). With ``output_tolerance``, up to about 4 log2(rank) passes over the data for each layer, and the outputs
    in memory.

    >>> model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    >>> smaller = compress(model, rank=8)
    >>> [(r.factored, r.parameters_after) for r in smaller.rows]   # 8 * (64 + 64); 8 * (64 + 10) = 592 < 640
    [(True, 1024), (True, 592)]
    """
    _check(tolerance=tolerance, energy=energy, rank=rank, output_tolerance=output_tolerance)
    if (data is None) != (output_tolerance is None):
        raise UsageError("data and output_tolerance go together: give both or neither")
    new = copy.deepcopy(model)
    owners, reasons, layers = _plan(new)
    change: dict[str, float] = {}
    if data is not None and output_tolerance is not None:
        allocation = allocate(new, list(layers.values()), data, output_tolerance, data_aware)
        change["output_change"] = allocation.change
        made = _allocated(list(layers.values()), allocation)
    else:
        drawn = torch.Generator().manual_seed(0) if generator is None else generator
        made = [_cut(layer, tolerance, energy, rank, drawn) for layer in layers.values()]
    rows = _rows(owners, reasons, dict(zip(layers, (row for row, _ in made))))
    new = replace_layers(new, {k: v for _, factors in made for k, v in factors.items()})
    return Compressed(new, rows, _account(model, new, evaluate, example) | change)


def _check(**rules: Any) -> None:
    given = {k: v for k, v in rules.items() if v is not None}
    if len(given) != 1:
        named = ", ".join(given) or "none"
        raise UsageError(f"give exactly one of tolerance, energy, rank and output_tolerance; got {named}")
    ((rule, value),) = given.items()
    if rule == "tolerance" and not 0 <= value < 1:
        raise UsageError(f"tolerance must be at least 0 and less than 1 (a fraction of sigma_1), got {value!r}")
    if rule == "energy" and not 0 < value <= 1:
        raise UsageError(f"energy must be more than 0 and at most 1 (a fraction of the squared norm), got {value!r}")
    if rule == "output_tolerance" and not 0 < value < 1:
        raise UsageError(f"output_tolerance must be between 0 and 1 (a fraction of the output), got {value!r}")
    if rule == "rank" and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
        raise UsageError(f"rank must be a whole number from 1, got {value!r}")


# ---------------------------------------------------------------------- what can be factored

Owner = tuple[str, nn.Module, nn.Parameter]


def _plan(model: nn.Module) -> tuple[list[Owner], list[str | None], dict[int, Layer]]:
    """Returns all that hold a weight, why each cannot be factored, and the layers that can be, by ``id`` of weight."""
    owners = _owners(model)
    own = [_refusal(module, weight, owners) for _, module, weight in owners]
    first: dict[int, str] = {}
    for (name, _, weight), reason in zip(owners, own):
        if reason is not None:
            first.setdefault(id(weight), f"its weight is shared with {name}, which cannot be factored ({reason})")
    reasons = [reason or first.get(id(weight)) for (_, _, weight), reason in zip(owners, own)]
    layers: dict[int, Layer] = {}
    for (name, module, weight), reason in zip(owners, reasons):
        if reason is None:
            layers.setdefault(id(weight), Layer(name, weight, [])).modules.append(module)
    if not layers:
        listed = "; ".join(f"{o[0]}: {r}" for o, r in zip(owners, reasons))
        raise UsageError(
            "the model has no linear or convolution layer to factor: "
            + (listed or "it has no weight of two or more dimensions")
        )
    return owners, reasons, layers


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


# ---------------------------------------------------------------------- what becomes of it

Made = tuple[LayerRow, dict[int, Factorized]]


def _cut(
    layer: Layer, tolerance: float | None, energy: float | None, rank: int | None, generator: torch.Generator
) -> Made:
    """Factors a layer at the rank that a rule for its weight gives, where that makes it smaller."""
    layer.terms = terms_of(layer.name, layer.weight, generator, rank=rank, energy=energy)
    m, n = layer.sides
    r = layer.terms.chosen or max(cut(layer.terms.s, max(m, n), tolerance=tolerance, energy=energy, rank=rank), 1)
    if r <= layer.largest:
        return _factored(layer, r)
    row = _dense(layer.name, layer.modules[0], layer.weight)
    reason = f"rank {r} would take {r} * ({m} + {n}) = {r * (m + n)} parameters, not fewer than {m * n}"
    return replace(row, rank=r, reason=reason), {}


def _allocated(layers: Sequence[Layer], found: Allocation) -> list[Made]:
    """Factors layers at the ranks that were found for the network."""
    made: list[Made] = []
    for layer, rank, local, alone, silent in zip(layers, found.ranks, found.local, found.alone, found.silent):
        if rank is None:
            reason = "no smaller rank keeps the output within the tolerance"
            if silent:
                reason = "no rank makes it smaller" if layer.largest == 0 else "the data give it no output"
            row, factors = replace(_dense(layer.name, layer.modules[0], layer.weight), reason=reason), {}
        else:
            row, factors = _factored(layer, rank)
        made.append((replace(row, output_error=local, network_error=alone), factors))
    return made


def _dense(name: str, module: nn.Module, weight: nn.Parameter) -> LayerRow:
    size = weight.numel()
    return LayerRow(name, type(module).__name__, tuple(weight.shape), False, None, 0.0, size, size)


def _factored(layer: Layer, rank: int) -> Made:
    factors = layer.factorized(rank)
    a, b = next(iter(factors.values())).factors
    row = replace(
        _dense(layer.name, layer.modules[0], layer.weight),
        factored=True,
        rank=rank,
        relative_error=frobenius_error(layer.weight, a, b),
        parameters_after=layer.parameters(rank),
        method=layer.terms.method if layer.terms else "",
        randomized=layer.terms.error if layer.terms else None,
    )
    return row, factors


def _rows(owners: Sequence[Owner], reasons: Sequence[str | None], made: dict[int, LayerRow]) -> list[LayerRow]:
    """Returns a row for each that holds a weight; a weight that is shared is counted once."""
    rows: list[LayerRow] = []
    counted: set[int] = set()
    for (name, module, weight), reason in zip(owners, reasons):
        row = replace(_dense(name, module, weight), reason=reason) if reason is not None else made[id(weight)]
        row = replace(row, name=name, kind=type(module).__name__)
        if id(weight) in counted:
            note = row.reason or "its factors are those of the layer above that shares the weight"
            row = replace(row, parameters_before=0, parameters_after=0, reason=note)
        counted.add(id(weight))
        rows.append(row)
    return rows


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
