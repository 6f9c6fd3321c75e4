"""How every figure looks, and how it becomes an inline SVG that is the same bytes for the same numbers.

One color and one marker per group through the whole report: gray for the reference, then the Okabe-Ito palette (2008),
which people with the common color deficiencies tell apart; its yellow is left out because it is faint on white. Texts,
axes and grid are drawn in placeholder colors that become CSS variables, so that figures follow light and dark pages.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Any

from groundstate.report.load import Study
from groundstate.report.text import figure_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, RULE = "#1b1f24", "#59636e", "#d8dee4"
_BLUE = "#0072b2"
_VARIABLES = {INK: "var(--ink)", MUTED: "var(--muted)", RULE: "var(--rule)", _BLUE: "var(--blue)"}
_REFERENCE = "#808a94"
_COLORS = (_BLUE, "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c6bb1", "#a6761d")
_MARKERS = ("s", "^", "D", "v", "P", "X", "<", ">")
_DASHES = ("-", "--", ":", "-.")

_RC: dict[Any, Any] = {
    "svg.hashsalt": "groundstate",
    "svg.fonttype": "none",
    "font.family": ["DejaVu Sans"],
    "font.size": 9.0,
    "axes.titlesize": 9.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.0,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": MUTED,
    "axes.titlecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.formatter.useoffset": False,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelsize": 8.5,
    "ytick.labelsize": 8.5,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
    "lines.linewidth": 1.7,
    "lines.markersize": 4.5,
    "legend.frameon": False,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "savefig.facecolor": "none",
    "figure.constrained_layout.use": True,
    "figure.constrained_layout.hspace": 0.06,
    "figure.constrained_layout.wspace": 0.04,
}
_SHORT = re.compile(r"(-?\d+\.\d\d)\d+")


@dataclass(frozen=True)
class Look:
    """Color, marker, dash pattern and safe label of one group."""

    color: str
    marker: str
    dash: str
    label: str

    @property
    def css(self) -> str:
        """The color on the page: a variable where dark pages need a lighter one."""
        return _VARIABLES.get(self.color, self.color)


def looks(study: Study) -> list[Look]:
    """Returns one look per group, in the order of the groups."""
    found, i = [], 0
    for group in study.groups:
        label = figure_label(group.label)
        if group.is_reference:
            found.append(Look(_REFERENCE, "o", "-", label))
            continue
        n = len(_COLORS)
        found.append(Look(_COLORS[i % n], _MARKERS[i % n], _DASHES[(i // n) % len(_DASHES)], label))
        i += 1
    return found


@contextmanager
def styled() -> Iterator[None]:
    """Applies the style of the report, for the block only."""
    import matplotlib

    with matplotlib.rc_context(_RC):
        yield


def canvas(rows: int, columns: int, width: float = 10.4, height: float = 2.7) -> tuple[Figure, list[Axes]]:
    """Returns a figure of ``rows x columns`` panels, each ``height`` inches high, and its axes row by row."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, rows * height))
    grid = figure.subplots(rows, columns, squeeze=False)
    return figure, list(grid.flat)


def legend(figure: Figure, entries: list[Look], extra: list[tuple[str, str]] | None = None) -> None:
    """Writes one legend above all panels; ``extra`` adds thin lines as (label, dash pattern)."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=e.color, marker=e.marker, ls=e.dash) for e in entries]
    names = [e.label for e in entries]
    for name, dash in extra or []:
        handles.append(Line2D([], [], color=INK, ls=dash, lw=0.9))
        names.append(name)
    longest = max((len(n) for n in names), default=1)
    columns = max(1, min(len(names), 150 // (longest + 6)))
    rows = -(-len(names) // columns)
    figure.set_figheight(figure.get_figheight() + 0.2 * (rows - 1))
    figure.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=1.8, columnspacing=1.6)


def log_axis(axis: Axes) -> None:
    """Sets a logarithmic axis whose ticks are plain numbers at 1, 2, 5 where it spans few decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high < 300 * low:
        axis.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.yaxis.set_minor_locator(NullLocator())


def svg(figure: Figure, key: str, description: str) -> str:
    """Returns the figure as an inline SVG element: no prolog, ids prefixed by ``key``, colors as CSS variables."""
    stream = io.StringIO()
    with warnings.catch_warnings():
        # the browser draws the text with its own fonts: a glyph that matplotlib's lacks matters only for the layout
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"), None))
    text = stream.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>\s*", "", text, flags=re.DOTALL)
    text = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{key}-", text)
    text = re.sub(r'(?<=\s)(?:d|x|y)="[^"]*"', lambda m: _SHORT.sub(r"\1", m.group()), text)  # 0.01 pt is enough
    for color, variable in _VARIABLES.items():
        text = text.replace(f": {color}", f": {variable}")
    text = re.sub(r"font: ([^;\"']*?)'DejaVu Sans'[^;\"]*", r"font: \1var(--sans)", text)
    text = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"', "", text, count=1)
    return text.replace("<svg ", f'<svg role="img" aria-label="{escape(description, quote=True)}" ', 1)
