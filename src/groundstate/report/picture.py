"""A figure ready for the page, and what several figures draw and say alike."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from groundstate.report.load import Study
from groundstate.report.style import Look, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BAND = "Line: mean over seeds; band: lowest to highest seed. "


@dataclass(frozen=True)
class Picture:
    """A figure ready for the page.

    Attributes:
        key: its anchor, also the prefix of the ids in its SVG.
        title: the question that it answers.
        guide: one sentence on how to read it.
        caption: what is drawn.
        svg: the SVG element.
    """

    key: str
    title: str
    guide: str
    caption: str
    svg: str


def picture(figure: Figure, key: str, title: str, guide: str, caption: str) -> Picture:
    """Returns a drawn figure with its texts."""
    return Picture(key, title, guide, caption, svg(figure, key, f"{title} {guide}"))


def seeds_of(study: Study) -> str:
    """Says how many seeds each energy has."""
    counts = sorted({len(g.runs) for g in study.groups})
    text = " or ".join(str(c) for c in counts)
    return f"{text} seed{'' if counts == [1] else 's'} per energy"


def band(axis: Axes, look: Look, x: np.ndarray, values: np.ndarray, *, every: bool = False) -> None:
    """Draws the mean of ``values`` (seeds, points) and the band from the lowest to the highest seed.

    The marker is at the last point, or at every one.
    """
    if values.shape[0] > 1:
        axis.fill_between(x, values.min(0), values.max(0), color=look.color, alpha=0.14, linewidth=0)
    mean = values.mean(0)
    axis.plot(x, mean, look.dash, color=look.color)
    marked = slice(None) if every else slice(-1, None)
    axis.plot(x[marked], mean[marked], look.marker, color=look.color)
