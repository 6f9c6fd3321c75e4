"""Measures any weights: every tensor is in the table, analyzed or with the reason why it is not.

The singular values of each weight are computed once and shared by all spectral energies and ranks. An energy over
blocks is the sum over them. Besides the energies, each analyzed row has: rank = #{i: sigma_i > max(m, n) eps
sigma_1}; effective rank = exp(-sum_i p_i log p_i), p_i = sigma_i / sum_j sigma_j (Roy and Vetterli 2007); stable rank
= sum_i sigma_i^2 / sigma_1^2.

Which matrix a tensor is: see `groundstate.blocks`. A 3-D tensor that is not a convolution is a stack of matrices (the
experts of a mixture): with a model its module decides; in a file its name (``expert``, ``moe``: stack; ``conv``:
convolution), else its last dimension (at most 16: the kernel of a convolution). The energies of a stack are summed
over it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from groundstate.blocks import as_matrix, by_neurons, last_linear, skip_reason
from groundstate.energies.base import Energy, FunctionEnergy, MatrixEnergy, NetworkEnergy, Sum, Term, summed
from groundstate.energies.capabilities import Grounded, OfModel, OfModule, Spectral
from groundstate.energies.graph import ConvolutionGraphEnergy
from groundstate.energies.registry import parse, registered
from groundstate.errors import NonFiniteError, UsageError
from groundstate.measure_data import evaluate
from groundstate.measure_function import measure_function
from groundstate.measure_table import Row, Status, Table
from groundstate.norms.conv import frequencies
from groundstate.norms.spectral import singular_values
from groundstate.tensors import NamedTensor, TensorList, natural_key, open_tensors

Progress = Callable[[int, int, str], None]
Energies = str | Energy | Term | Sum | Iterable[str | Energy | Term | Sum]

# Nodes of the smaller color class beyond which "all" leaves the graph energy out. Convolutions have a matrix m x n,
# m <= n, for every frequency: m^2 n times their number is the cost, some 3e9 a second on one core.
MAX_GRAPH_NODES = 4096
MAX_QUICK_COST, MAX_COST = MAX_GRAPH_NODES**3, 16 * MAX_GRAPH_NODES**3  # of "all", of those asked for by name


def measure(
    source: nn.Module | Mapping[str, Any] | str | Path,
    energies: Energies = "all",
    data: tuple[Tensor, Tensor | None] | None = None,
    progress: Progress | None = None,
) -> Table:
    """Measures the energies of weights.

    Args:
        source: A module, a state dict, or a path: a ``.safetensors`` or ``.pt`` file, a folder of safetensors files, or
            a run folder (its newest checkpoint). Files are read one tensor at a time.
        energies: A spec such as ``"nuclear + graph"``, energies, or ``"all"``: the first example of every matrix energy
            and of every network energy, and with ``data`` of every energy of the function. Strengths and couplings play
            no part: an energy is measured as it is.
        data: ``(x, y)``, inputs and class labels (or real targets, or ``None``): adds loss and accuracy of a module,
            and what `measure_function` finds on some of the samples. A network with one output has no loss and no
            accuracy by class labels; a note says so.
        progress: Called as ``progress(done, total, name)`` after each tensor, then after each part of the function.

    Returns:
        The table. Weights with NaN or infinities have the status ``non-finite`` and are left out of the totals.

    Raises:
        UsageError: an energy that needs data or training, a model without tensors, data that do not fit the model, or
            only network energies were asked for and none can be had: the order of the layers is not known, say.
        NonFiniteError: the data have NaN or infinite entries.
        DataError: the path is missing or damaged, or holds more than tensors.

    Cost: one set of singular values a weight, O(m n min(m, n)), whatever the number of spectral energies; the memory of
    about three times the largest tensor.

    >>> model = nn.Linear(2, 2, bias=False)
    >>> _ = model.weight.data.copy_(torch.diag(torch.tensor([3.0, 4.0])))
    >>> table = measure(model, "nuclear + squared_frobenius")
    >>> table.totals, table.rows[0].rank
    ({'nuclear': 7.0, 'squared_frobenius': 25.0}, 2)
    """
    wanted = _energies(energies, data is not None)
    tensors = open_tensors(source)
    if not tensors.entries:
        raise UsageError("there is nothing to measure: the model (or state dict) has no tensor")
    matrix = {k: e for k, e in wanted.items() if isinstance(e, MatrixEnergy)}
    of_function = [e for e in wanted.values() if isinstance(e, FunctionEnergy)]
    evaluation, told = ({}, []) if data is None else evaluate(tensors.model, data)
    rows: list[Row] = []
    everything = isinstance(energies, str) and energies.strip() == "all"
    output = _output(tensors)
    with torch.no_grad():
        for done, entry in enumerate(tensors.entries, 1):
            rows.append(_row(entry, matrix, entry.name == output, everything))
            if progress is not None:
                progress(done, len(tensors.entries), entry.name)
        totals = _totals(rows, matrix)
        broken = [r.name for r in rows if r.status == "non-finite"]
        notes = [*tensors.notes, *told, *_left_out(rows, matrix), *_assumed(tensors, rows, matrix)]
        found, absent = _of_several(tensors, rows, wanted, everything)
        totals |= found
        notes += absent
    function = None
    if data is not None and tensors.model is not None and of_function:
        if broken:
            notes.append("the function is not measured: its weights are not finite")
        else:
            function = measure_function(tensors.model, *data, energies=of_function, progress=progress)
    return Table(rows, totals, notes, evaluation, function)


def _energies(energies: Energies, with_data: bool) -> dict[str, Energy]:
    kinds = MatrixEnergy | NetworkEnergy | OfModel
    kinds = kinds | FunctionEnergy if with_data else kinds
    if isinstance(energies, str) and energies.strip() == "all":
        classes = [c for c in registered().values() if issubclass(c, kinds)]
        chosen: list[Energy] = [c.examples()[0] for c in classes]
    else:
        parts = [energies] if isinstance(energies, str | Energy | Term | Sum) else list(energies)
        sums = [parse(p) if isinstance(p, str) else Sum.of(p) for p in parts]
        chosen = [t.energy for s in sums for t in s.terms]
    for energy in chosen:
        if not isinstance(energy, kinds):
            needs = "data: give them" if isinstance(energy, FunctionEnergy) else "training: leave it out here"
            raise UsageError(f"{energy.name!r} is not an energy of weights alone, it needs {needs}")
    return {repr(e): e for e in chosen}


def _left_out(rows: list[Row], energies: Iterable[str]) -> list[str]:
    """Returns what the totals do not have in them, and why."""
    analyzed = [r for r in rows if r.status == "analyzed"]
    without: dict[tuple[str, ...], list[str]] = {}
    for key in energies:
        left = tuple(r.name for r in analyzed if key not in r.values)
        without.setdefault(left, []).append(key)
    notes = []
    for left, keys in without.items():
        if len(left) == len(analyzed):
            why = "no weight has a value; the reason is in the row" if left else "no tensor is an analyzed weight"
            notes.append(f"{', '.join(keys)}: no total: {why}")
        elif left:
            shown = ", ".join(left[:3]) + (f" and {len(left) - 3} more" if len(left) > 3 else "")
            notes.append(f"{', '.join(keys)}: the total is without {shown}; the reason is in the row")
    if broken := [r.name for r in rows if r.status == "non-finite"]:
        notes.append(f"totals leave out the non-finite tensors: {', '.join(broken)}")
    return notes


def _output(tensors: TensorList) -> str | None:
    """Returns the name of the weight of the last linear layer, where the order of the layers is known."""
    if tensors.model is not None:
        return last_linear(tensors.model)
    weights = [
        e.name
        for e in tensors.entries
        if e.read is not None and skip_reason(e.name, torch.empty(e.shape, device="meta")) is None
    ]
    return weights[-1] if tensors.chain and len(weights) > 1 else None


def _row(entry: NamedTensor, energies: Mapping[str, MatrixEnergy], output: bool, quick: bool) -> Row:
    count = math.prod(entry.shape) if entry.dtype else 0

    def row(status: Status, reason: str = "") -> Row:
        return Row(entry.name, entry.shape, entry.dtype, count, status, reason, alias_of=entry.alias_of)

    if entry.alias_of is not None:
        return row("alias", f"shares its memory with {entry.alias_of}")
    if entry.read is None:
        return row("skipped", entry.reason or "cannot be read")
    tensor = entry.read()
    reason = entry.reason or skip_reason(entry.name, tensor, entry.module)
    nans, infinities = _non_finite(tensor)
    if nans or infinities:
        # infinities are ordinary in masks and other tensors that are no weights
        what = f"{nans} NaN and {infinities} infinite of {count} entries"
        return row("non-finite" if nans or reason is None else "skipped", f"{reason}; {what}" if reason else what)
    if reason is not None:
        return row("skipped", reason)
    matrices = _matrices(entry, tensor)
    spectra = singular_values(matrices).double()
    values, grounds = {}, {}
    absent: dict[str, list[str]] = {}
    for key, asked in energies.items():
        energy = asked.at_output() if output else asked
        try:
            if isinstance(energy, OfModule):
                energy = energy.for_module(entry.module, matrices.shape[-2:] if matrices.ndim == 3 else entry.shape)
            seen = matrices if energy.view == "matrix" else by_neurons(matrices, entry.module)
            _refuse_size(energy, seen, quick)
        except UsageError as error:
            absent.setdefault(str(error), []).append(key)
            continue
        of, what = (energy.of_singular_values, spectra) if isinstance(energy, Spectral) else (energy.value, seen)
        values[key] = summed(of, what)
        if isinstance(energy, Grounded) and seen.ndim == 2:
            found = _against_ground(energy, values[key], seen)
            grounds |= {key: found} if found else {}
    figures = _figures(spectra, max(matrices.shape[-2:]), matrices.dtype)
    stack = len(matrices) if matrices.ndim == 3 else 1
    why = "; ".join(f"{', '.join(keys)}: {told}" for told, keys in absent.items())
    return Row(entry.name, entry.shape, entry.dtype, count, "analyzed", why, values, grounds, matrices=stack, **figures)


def _refuse_size(energy: MatrixEnergy, seen: Tensor, quick: bool) -> None:
    """Raises `UsageError` where a matrix is too small to have an energy, or too large to measure it unasked."""
    rows, columns = seen.shape[-2:]
    if rows < energy.smallest[0] or columns < energy.smallest[1]:
        least = "{} x {}".format(*energy.smallest)
        raise UsageError(f"{rows} x {columns} (neurons x weights of each) is too small, it takes {least} at least")
    if quick and energy.quick_rows is not None and rows > energy.quick_rows:
        raise UsageError(f"slow at more than {energy.quick_rows} neurons, here {rows}: ask for it by name")


def _assumed(tensors: TensorList, rows: list[Row], energies: Mapping[str, MatrixEnergy]) -> list[str]:
    """Returns what had to be assumed of weights that come without their modules."""
    if tensors.model is not None:
        return []
    notes = []
    keys = ", ".join(k for k, e in energies.items() if isinstance(e, OfModule))
    kernels = [r.name for r in rows if r.status == "analyzed" and len(r.shape) - (r.matrices > 1) > 2]
    if keys and kernels:
        more = f" and {len(kernels) - 3} more" if len(kernels) > 3 else ""
        listed = ", ".join(kernels[:3]) + more
        notes.append(f"{keys}: strides, dilations and groups are not in the file, 1 is assumed for {listed}")
    keys = ", ".join(k for k, e in energies.items() if e.at_output() != e)
    if keys and not tensors.chain:
        notes.append(
            f"{keys}: which weight is the last layer's, where another form acts, is not in the file: none has it"
        )
    return notes


def _of_several(
    tensors: TensorList, rows: list[Row], energies: Mapping[str, Energy], everything: bool
) -> tuple[dict[str, float], list[str]]:
    """Returns the energies of several weights together, and the notes that say why some are absent.

    Raises:
        UsageError: all are absent, and nothing else is asked for.
    """
    network = {k: e for k, e in energies.items() if isinstance(e, NetworkEnergy)}
    of_model = {k: e for k, e in energies.items() if isinstance(e, OfModel) and k not in network}
    found, notes = _network(tensors, rows, network, everything) if network else ({}, [])
    more, absent = _of_model(tensors.model, of_model)
    notes += [] if everything else absent  # most models have no attention
    if notes and not found and not more and len(network) + len(of_model) == len(energies):
        raise UsageError(notes[0])
    return found | more, notes


def _of_model(model: nn.Module | None, energies: Mapping[str, OfModel]) -> tuple[dict[str, float], list[str]]:
    """Returns the energies of parts of the model itself, or the notes that say why they are absent."""
    found, notes = {}, []
    for key, energy in energies.items():
        try:
            if model is None:
                raise UsageError("its modules are not in the file: give the model itself")
            placed, weights = energy.for_model(model)
            if meta := [name for name, p in weights if p.is_meta]:
                raise UsageError(f"the weight {meta[0]!r} is on the meta device: it has no data")
            found[key] = summed(placed.value, [p.detach() for _, p in weights])
        except (UsageError, NonFiniteError) as error:
            notes.append(f"{key}: {error}")
    return found, notes


def _against_ground(energy: Grounded, value: float, w: Tensor) -> dict[str, float | None]:
    """Returns where a value lies between random directions and the floor; nothing where no floor is known."""
    rows = int((w != 0).any(-1).sum())  # neurons that are zero take no part
    try:
        ground = energy.ground(rows, w.shape[-1])
    except UsageError:
        return {}
    apart = None if ground.random is None else ground.random - ground.floor
    return {
        "floor": ground.floor,
        "random": ground.random,
        "gap": (value - ground.floor) / abs(ground.floor) if ground.floor else None,
        "uniformity": None if apart is None or ground.random is None else (ground.random - value) / apart,
    }


def _non_finite(tensor: Tensor) -> tuple[int, int]:
    if not tensor.is_floating_point() and not tensor.is_complex():
        return 0, 0
    nans = infinities = 0
    for part in tensor.reshape(-1).split(1 << 22):  # in parts: the masks of a large tensor are large
        wide = part.float() if part.dtype.itemsize == 1 else part
        if not bool(torch.isfinite(wide).all()):
            nans += int(torch.isnan(wide).sum())
            infinities += int(torch.isinf(wide).sum())
    return nans, infinities


def _matrices(entry: NamedTensor, tensor: Tensor) -> Tensor:
    """Returns ``(out, in)``, or ``(stack, out, in)``, in float32 or float64."""
    wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
    return wide if wide.ndim == 3 and _is_stack(entry) else as_matrix(wide, entry.module)


def _is_stack(entry: NamedTensor) -> bool:
    if entry.module is not None:
        return not isinstance(entry.module, nn.modules.conv._ConvNd)
    name = entry.name.lower()
    if re.search(r"expert|moe", name):
        return True
    return "conv" not in name and entry.shape[-1] > 16


def _figures(s: Tensor, longest: int, dtype: torch.dtype) -> dict[str, Any]:
    if s.shape[-1] == 0 or s.numel() == 0:
        return {"rank": 0, "effective_rank": 0.0, "stable_rank": 0.0, "sigma_max": 0.0, "sigma_min": 0.0}
    top = s[..., :1]
    relative = s / torch.where(top > 0, top, torch.ones_like(top))
    p = relative / relative.sum(-1, keepdim=True).clamp_min(1.0)  # the sum is at least 1, or the matrix is zero
    effective = torch.where(top[..., 0] > 0, torch.exp(-torch.special.xlogy(p, p).sum(-1)), 0.0)
    return {
        "rank": int((relative > longest * torch.finfo(dtype).eps).sum()),
        "effective_rank": float(effective.mean()),
        "stable_rank": float(relative.square().sum(-1).mean()),
        "sigma_max": float(s.max()),
        "sigma_min": float(s.min()),
    }


def _totals(rows: list[Row], energies: Iterable[str]) -> dict[str, float]:
    """Returns the sums over the weights; an energy without a value at any of them has none."""
    found = {k: [r.values[k] for r in rows if k in r.values] for k in energies}
    return {k: math.fsum(values) for k, values in found.items() if values}


def _network(
    tensors: TensorList, rows: list[Row], energies: Mapping[str, NetworkEnergy], everything: bool
) -> tuple[dict[str, float], list[str]]:
    """Returns the network energies, and notes: why they are absent, or what their order was taken from."""
    values: dict[str, float] = {}
    notes: list[str] = []
    for key, energy in energies.items():
        try:
            placed, layers, told = _placed(energy, tensors, rows)
            _refuse_cost(placed, layers, everything)
        except UsageError as error:
            notes.append(f"{key}: {error}")
            continue
        values[key] = summed(placed.value, layers)
        notes += [f"{key}: {n}" for n in told]
    return values, notes


def _refuse_cost(energy: NetworkEnergy, layers: list[Tensor], everything: bool) -> None:
    """Raises `UsageError` where a network is so large that its energy is left out."""
    widths = [layers[0].shape[1], *(w.shape[0] for w in layers)]
    m, n = sorted((sum(widths[::2]), sum(widths[1::2])))
    if not isinstance(energy, ConvolutionGraphEnergy):
        if everything and m > MAX_GRAPH_NODES:
            raise UsageError(f"left out, an eigenproblem of {m} nodes is slow; ask for it by name")
        return
    grid = [1 if max(taps) == 1 else energy.size for taps in zip(*(shape[2:] for shape in energy.shapes), strict=True)]
    count = len(frequencies(grid)[1])
    what = f"left out, the singular values of {count} matrices of {m} x {n} (one a frequency) are slow"
    if count * m**2 * n > MAX_COST:
        raise UsageError(f"{what}; ask for fewer frequencies, as of energies.graph.ConvolutionGraphEnergy(size=4)")
    if everything and count * m**2 * n > MAX_QUICK_COST:
        raise UsageError(f"{what}; ask for it by name")


def _placed(
    energy: NetworkEnergy, tensors: TensorList, rows: list[Row]
) -> tuple[NetworkEnergy, list[Tensor], list[str]]:
    """Returns the energy that acts on the layers, the layers, and notes."""
    if tensors.model is None or not isinstance(energy, OfModel):
        return energy, *_ordered(tensors, rows)
    _refuse_broken(rows)
    placed, named = energy.for_model(tensors.model)
    return placed, _present(named), []


def _refuse_broken(rows: list[Row]) -> None:
    if broken := [r.name for r in rows if r.status == "non-finite"]:
        raise UsageError(f"the weights of {broken[0]!r} are not finite")


def _present(named: Iterable[tuple[str, nn.Parameter]]) -> list[Tensor]:
    layers = list(named)
    if meta := [name for name, p in layers if p.is_meta]:
        raise UsageError(f"the weight {meta[0]!r} is on the meta device: it has no data")
    return [p.detach() for _, p in layers]


def _ordered(tensors: TensorList, rows: list[Row]) -> tuple[list[Tensor], list[str]]:
    _refuse_broken(rows)
    if tensors.model is not None:
        from groundstate.layers import ordered_layers

        return _present(ordered_layers(tensors.model)), []
    order = sorted((r for r in rows if len(r.shape) >= 2 and r.status != "alias"), key=lambda r: natural_key(r.name))
    found = [re.fullmatch(r"(.*?)(\d+)\.weight", r.name) for r in order]
    chained = all(len(r.shape) == 2 and r.status == "analyzed" for r in order) and all(
        a.shape[0] == b.shape[1] for a, b in pairwise(order)
    )
    if not order or not chained or None in found or len({m[1] for m in found if m}) != 1:
        raise UsageError("the order of the layers is not known from the names alone: give the model itself")
    entries = {e.name: e for e in tensors.entries}
    reads = [entries[r.name].read for r in order]
    listed = ", ".join(r.name for r in order)
    return [read().float() for read in reads if read is not None], [f"order of the layers taken from names: {listed}"]
