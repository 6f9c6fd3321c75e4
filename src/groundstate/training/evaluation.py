"""What a network is, in training and after it: energies, accuracy, spectra, ranks, and accuracy against size when its
layers are truncated."""

from __future__ import annotations

import copy
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from groundstate.blocks import select
from groundstate.compress import truncate
from groundstate.energies.base import TrajectoryEnergy
from groundstate.measure_function import measure_function
from groundstate.norms.spectral import singular_values
from groundstate.regularizer import Regularizer

TOLERANCES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
RANK_TOLERANCE = 1e-3
"""Singular values above this share of the largest count in the ranks of a summary."""

FUNCTION_SAMPLES = 256
"""Samples on which energies of the function are estimated at the end of every epoch."""

ANGLE_BINS, MOST_NEURONS = 60, 4096
_BATCH = 8192


@torch.no_grad()
def accuracy_and_loss(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float | None, float | None]:
    """Returns accuracy in [0, 1] and mean cross-entropy on ``x, y``; ``None`` for an empty split."""
    if len(x) == 0:
        return None, None
    training = model.training
    model.eval()
    correct, loss = 0, 0.0
    for start in range(0, len(x), _BATCH):
        logits, target = model(x[start : start + _BATCH]), y[start : start + _BATCH]
        correct += int((logits.argmax(1) == target).sum())
        loss += float(functional.cross_entropy(logits, target, reduction="sum"))
    model.train(training)
    return correct / len(x), loss / len(x)


def spectra(model: nn.Module) -> dict[str, list[float]]:
    """Returns the singular values of every weight matrix, largest first, by name."""
    return {b.name: singular_values(b.matrix).tolist() for b in select(model)}


@torch.no_grad()
def angles(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Returns, for every weight matrix, how its neurons (rows) lie to one another, by name.

    Each entry has ``neurons``, ``inputs`` and ``counts``: pairs of neurons by their angle, in `ANGLE_BINS` equal bins
    from 0 to pi. Neurons that are zero, and layers of fewer than two neurons or of more than 4096, are left out.
    """
    found = {}
    for block in select(model):
        w = block.matrix.double()
        w = w[(w != 0).any(-1)]
        if not 2 <= len(w) <= MOST_NEURONS or w.shape[1] < 2:
            continue
        u = functional.normalize(w, dim=-1)
        pairs = torch.triu_indices(len(u), len(u), 1)
        theta = torch.acos((u @ u.mT)[pairs[0], pairs[1]].clamp(-1, 1))
        counts = torch.histc(theta, ANGLE_BINS, 0.0, math.pi)
        found[block.name] = {"neurons": len(u), "inputs": w.shape[1], "counts": counts.long().tolist()}
    return found


def ranks(values: dict[str, list[float]]) -> dict[str, int]:
    """Returns, by name, how many singular values exceed `RANK_TOLERANCE` times the largest."""
    return {n: sum(s > RANK_TOLERANCE * max(v[:1], default=0.0) for s in v) for n, v in values.items()}


def compression(
    model: nn.Module, x: Tensor, y: Tensor, tolerances: Sequence[float] = TOLERANCES
) -> list[dict[str, Any]]:
    """Returns, per tolerance, the parameters left and the accuracy on ``x, y`` without any further training.

    Singular values below ``tolerance * sigma_1`` of each weight are dropped; a layer counts min(dense, factorized)
    parameters. ``ratio`` is the size as a share of the dense weights; at tolerance 0 only rounding is dropped.
    """
    dense = sum(b.parameter.numel() for b in select(model))
    rows: list[dict[str, Any]] = []
    for tolerance in tolerances:
        twin = copy.deepcopy(model)
        parameters, kept = 0, {}
        for block in select(twin):
            low, rank, count = truncate(block.matrix, tolerance)
            parameters += count
            kept[block.name] = rank
            with torch.no_grad():
                block.parameter.copy_(block.like(low))
        accuracy, _ = accuracy_and_loss(twin, x, y)
        rows.append(
            {
                "tolerance": tolerance,
                "parameters": parameters,
                "ratio": parameters / dense,
                "ranks": kept,
                "test_accuracy": accuracy,
            }
        )
    return rows


def measured(regularizers: Iterable[Regularizer], x: Tensor, y: Tensor) -> tuple[dict[str, float], dict[str, float]]:
    """Returns the energies, by spec, and the figures of the path; of equal keys the last one counts.

    Energies of the function are estimated on the first samples of ``x, y``, with the same probes every time.
    """
    energies: dict[str, float] = {}
    path: dict[str, float] = {}
    for regularizer in regularizers:
        of_path = {p.key for p in regularizer.placed if isinstance(p.energy, TrajectoryEnergy)}
        terms = {p.key for p in regularizer.placed} - of_path
        for key, value in regularizer.values(x[:FUNCTION_SAMPLES], y[:FUNCTION_SAMPLES]).items():
            (energies if key in terms else path)[key] = value
    return energies, path


def summary(
    model: nn.Module, x: Tensor, y: Tensor, records: Sequence[Mapping[str, Any]], durations: Sequence[float]
) -> dict[str, Any]:
    """Returns what is to be said of a trained network.

    Args:
        model: The network after its last step.
        x: The test split, touched here and nowhere else.
        y: Its labels.
        records: The metrics of the run.
        durations: Seconds of single steps.
    """
    last = [r for r in records if r["kind"] == "epoch"][-1]
    test_accuracy, test_loss = accuracy_and_loss(model, x, y)
    values = spectra(model)
    before = next((r for r in records if r["kind"] == "spectra"), {})
    keys = ("val_accuracy", "val_loss", "train_loss", "train_accuracy", "energies", "path")
    return {
        "test_accuracy": test_accuracy,
        "test_loss": test_loss,
        **{k: last[k] for k in keys},
        "spectra_initial": before.get("spectra", {}),
        "spectra": values,
        "angles_initial": before.get("angles", {}),
        "angles": angles(model),
        "ranks": ranks(values),
        "rank_tolerance": RANK_TOLERANCE,
        "parameters": sum(p.numel() for p in model.parameters()),
        "compression": compression(model, x, y),
        "function": measure_function(model, x, y).to_dict(),
        "step_ms": {
            "median": 1e3 * statistics.median(durations) if durations else None,
            "baseline_note": "a step with its energies and what is monitored; compare with a run of energy none",
        },
    }


def kept(regularizer: Regularizer | None, steps: int) -> dict[str, Any]:
    """Returns what the kept gradients of each term took: decompositions, those of exact ones, and more by weight."""
    found: dict[str, Any] = {}
    for key, lines in ({} if regularizer is None else regularizer.wear()).items():
        made = sum(line.refreshes for line in lines)
        by_weight = {line.name: {k: v for k, v in line._asdict().items() if k != "name"} for line in lines}
        found[key] = {"decompositions": made, "exact": steps * len(lines), "weights": by_weight}
    return found
