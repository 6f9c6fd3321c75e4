"""What a trained network is: accuracy, spectra, ranks, and size against accuracy when its layers are truncated."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from groundstate.blocks import select
from groundstate.compress import truncate
from groundstate.norms.spectral import singular_values

TOLERANCES = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2)
RANK_TOLERANCE = 1e-3
"""Singular values above this share of the largest count in the ranks of a summary."""

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
                block.parameter.copy_(low.reshape(block.parameter.shape))
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
