"""A picture of points on the sphere: the ground states of the Thomson problem."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from groundstate.errors import ResourceError, UsageError
from groundstate.report.style import INK, MUTED, RULE, styled

if TYPE_CHECKING:
    from torch import Tensor

_BLUE = "#0072b2"
FORMATS = (".svg", ".png", ".pdf")


def draw(points: Tensor, path: Path, title: str) -> Path:
    """Draws points on the circle or sphere with the edges between nearest neighbors, and writes the picture.

    Args:
        points: Unit vectors ``(n, d)``; of more than three dimensions the first three principal ones are drawn.
        path: Where to; its suffix decides the format: .svg, .png or .pdf.
        title: Written above it.

    Raises:
        UsageError: another suffix.
        ResourceError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    if path.suffix.lower() not in FORMATS:
        raise UsageError(f"{path} must end in {', '.join(FORMATS)}: the suffix decides the format of the picture")
    x = points.double().numpy()
    edges = _edges(x)
    if x.shape[1] > 3:
        x = x @ np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:3].T
    turned = _turned(x)
    with styled():
        figure = Figure(figsize=(4.2, 4.4))
        axis = figure.subplots()
        axis.set_aspect("equal")
        axis.set_axis_off()
        angle = np.linspace(0, 2 * np.pi, 200)
        axis.plot(np.cos(angle), np.sin(angle), color=RULE, linewidth=1)
        for i, j in edges:
            front = (turned[i, 2] + turned[j, 2]) / 2 >= 0
            style = {
                "color": INK if front else MUTED,
                "linewidth": 1.0 if front else 0.5,
                "alpha": 0.8 if front else 0.5,
            }
            axis.plot(turned[[i, j], 0], turned[[i, j], 1], zorder=2 if front else 1, **style)
        order = np.argsort(turned[:, 2])
        depth = (turned[order, 2] + 1) / 2
        axis.scatter(
            turned[order, 0],
            turned[order, 1],
            s=14 + 40 * depth,
            c=[_mixed(d) for d in depth],
            edgecolors=INK,
            linewidths=0.4,
            zorder=3,
        )
        axis.set_title(title)
        try:
            figure.savefig(path, bbox_inches="tight", dpi=160)
        except OSError as error:
            raise ResourceError(f"cannot write {path}: {error.strerror}; give another path") from None
    return path


def terminal(points: Tensor, rows: int = 21) -> str:
    """Returns a drawing in characters: the points of the front half filled, those behind open."""
    x = points.double().numpy()
    if x.shape[1] > 3:
        x = x @ np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:3].T
    turned = _turned(x)
    half = (rows - 1) / 2
    grid = [[" "] * (2 * rows - 1) for _ in range(rows)]

    def place(a: float, b: float, mark: str) -> None:
        grid[round(half - b * half)][round(2 * half + 2 * a * half)] = mark

    for angle in np.linspace(0, 2 * np.pi, 8 * rows):
        place(float(np.cos(angle)), float(np.sin(angle)), "·")
    for point in turned[np.argsort(turned[:, 2])]:
        place(float(point[0]), float(point[1]), "●" if point[2] >= 0 else "○")
    return "\n".join("".join(line).rstrip() for line in grid)


def _edges(x: np.ndarray) -> list[tuple[int, int]]:
    """Returns the pairs that are nearest neighbors of one another up to a tenth."""
    distances = np.linalg.norm(x[:, None] - x[None], axis=-1)
    np.fill_diagonal(distances, np.inf)
    reach = 1.1 * distances.min(1)
    close = distances <= np.minimum(reach[:, None], reach[None]) if len(x) > 2 else distances < np.inf
    return [(i, j) for i, j in zip(*np.nonzero(close)) if i < j]


def _turned(x: np.ndarray) -> np.ndarray:
    """Returns the points seen a little from above and aside, so that symmetric ones do not hide one another."""
    flat = np.concatenate([x, np.zeros((len(x), 3 - x.shape[1]))], 1) if x.shape[1] < 3 else x
    if x.shape[1] < 3:
        return flat
    a, b = 0.45, 0.3
    turn = np.array([[np.cos(a), 0, np.sin(a)], [0, 1, 0], [-np.sin(a), 0, np.cos(a)]])
    tilt = np.array([[1, 0, 0], [0, np.cos(b), -np.sin(b)], [0, np.sin(b), np.cos(b)]])
    return flat @ turn.T @ tilt.T


def _mixed(depth: float) -> tuple[float, float, float]:
    near = np.array([int(_BLUE[i : i + 2], 16) for i in (1, 3, 5)]) / 255
    return tuple(depth * near + (1 - depth) * 0.85)
