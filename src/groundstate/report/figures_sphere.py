"""The figure of directions: how the angles between the neurons of each layer are spread, against the random law."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from groundstate.report.load import Group, Study
from groundstate.report.picture import Picture, picture, seeds_of
from groundstate.report.style import INK, MUTED, Look, canvas, legend, looks, styled
from groundstate.report.text import figure_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def angles(study: Study) -> Picture | None:
    """Draws the distribution of pairwise angles of each layer after training, before it, and of random directions."""
    layers = study.keys("angles")
    if not layers:
        return None
    columns = min(3, len(layers))
    with styled():
        figure, axes = canvas(-(-len(layers) // columns), columns, height=2.8)
        for axis, layer in zip(axes, layers):
            _layer(axis, study, layer)
        for axis in axes[len(layers) :]:
            axis.set_visible(False)
        axes[0].set_ylabel("density")
        legend(figure, looks(study), [("before training", ":"), ("random directions", "--")])
        return picture(
            figure,
            "angles",
            "How do the neurons lie to one another?",
            "Mass on the left of the random law is neurons that point the same way: redundancy.",
            "Angles between all pairs of neurons (rows) of each layer, in degrees, all seeds together; dashed: the law "
            f"of independent uniform directions in as many dimensions. {seeds_of(study)}.",
        )


def _layer(axis: Axes, study: Study, layer: str) -> None:
    low, high = 180.0, 0.0
    dimension = 0
    for group, look in zip(study.groups, looks(study)):
        density, dimension = _density(group, "angles", layer)
        if len(density):
            low, high = _widened(low, high, density)
            _line(axis, density, look)
    start, _ = _density(study.groups[0], "angles_initial", layer)
    if len(start):
        low, high = _widened(low, high, start)
        axis.plot(_middles(len(start)), start, ":", color=INK, linewidth=0.9)
    if dimension >= 2:
        theta = np.linspace(1e-3, math.pi - 1e-3, 400)
        law = _random(theta, dimension)
        seen = np.degrees(theta[law > 1e-3 * law.max()])
        low, high = min(low, seen.min()), max(high, seen.max())
        axis.plot(np.degrees(theta), law, "--", color=MUTED, linewidth=0.9)
    axis.set_xlim(max(0.0, low - 3), min(180.0, high + 3))
    axis.set_ylim(bottom=0)
    axis.set_title(figure_label(layer, 36))
    axis.set_xlabel("angle, degrees")


def _line(axis: Axes, density: np.ndarray, look: Look) -> None:
    axis.plot(_middles(len(density)), density, look.dash, color=look.color, linewidth=1.3)


def _middles(bins: int) -> np.ndarray:
    return (np.arange(bins) + 0.5) * 180 / bins


def _widened(low: float, high: float, density: np.ndarray) -> tuple[float, float]:
    seen = _middles(len(density))[density > 0]
    return (min(low, seen.min()), max(high, seen.max())) if len(seen) else (low, high)


def _random(theta: np.ndarray, dimension: int) -> np.ndarray:
    """Returns the density per degree of the angle between two random directions."""
    import torch

    from groundstate.norms.sphere.references import angle_density

    return angle_density(torch.from_numpy(theta), dimension).numpy() * math.pi / 180


def _density(group: Group, kind: str, layer: str) -> tuple[np.ndarray, int]:
    """Returns the density per degree of all seeds together, and the dimension; empty where no run has it."""
    total, dimension = np.zeros(0), 0
    for run in group.runs:
        table: Any = run.summary.get(kind)
        entry = table.get(layer) if isinstance(table, dict) else None
        counts = np.asarray(entry.get("counts") or [] if isinstance(entry, dict) else [], dtype=float)
        if not counts.size or not np.isfinite(counts).all() or counts.ndim != 1 or counts.sum() <= 0:
            continue
        if not total.size:
            total = np.zeros_like(counts)
        if counts.shape == total.shape:
            total, dimension = total + counts, int((entry or {}).get("inputs") or 0)
    return (total / total.sum() * len(total) / 180 if total.size else total), dimension
