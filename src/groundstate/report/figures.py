"""The figures of a report: each draws one question from a study and returns an inline SVG with its caption.

Lines are means over seeds and bands reach from the lowest to the highest seed; nothing is smoothed. Runs that are not
done take no part (they are listed on the page).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from groundstate.report import statistics
from groundstate.report.figures_sphere import angles
from groundstate.report.load import Group, Study, compression_points, curve
from groundstate.report.picture import BAND, Picture, band, picture, seeds_of
from groundstate.report.style import INK, MUTED, Look, canvas, legend, log_axis, looks, styled
from groundstate.report.text import TIMES, figure_label, show

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_POINTS = 100  # of a curve: long runs are thinned out, the CSV files have every epoch


def all_pictures(study: Study) -> list[Picture]:
    """Returns every figure for which the study has numbers, in the order of the report."""
    drawers: tuple[Callable[[Study], Picture | None], ...] = (
        outcome,
        learning,
        compression,
        energies,
        spectra,
        angles,
        path,
        cost,
    )
    with styled():
        return [made for draw in drawers if (made := draw(study)) is not None]


def outcome(study: Study) -> Picture | None:
    """Draws test accuracy and its paired difference from the reference, one row per energy."""
    reference = study.reference
    if reference is None:
        return None
    n = len(study.groups)
    figure, (left, right) = canvas(1, 2, height=0.9 + 0.4 * n)
    for row, (group, look) in enumerate(zip(study.groups, looks(study))):
        y = n - 1 - row
        accuracy = {s: 100 * v for s, v in group.by_seed("test_accuracy").items()}
        _interval(left, y, list(accuracy.values()), look)
        if not group.is_reference:
            base = {s: 100 * v for s, v in reference.by_seed("test_accuracy").items()}
            pairs = [accuracy[s] - base[s] for s in sorted(accuracy.keys() & base.keys())]
            _interval(right, y, pairs, look)
    names = [look.label for look in looks(study)]
    left.set_yticks(range(n - 1, -1, -1), names)
    right.set_yticks(range(n - 1, -1, -1), [""] * n)
    for tick, look in zip(left.get_yticklabels(), looks(study)):
        tick.set_color(INK if look.marker == "o" else look.color)
    for axis in (left, right):
        axis.set_ylim(-0.6, n - 0.4)
        axis.grid(axis="y", visible=False)
    left.set_title("Test accuracy")
    left.set_xlabel("%")
    right.axvline(0, color=MUTED, linewidth=1)
    _beside(right, "reference", 0, n - 1, MUTED)
    right.set_title(figure_label(f"Difference from {reference.label}, same seed"))
    right.set_xlabel("points")
    return picture(
        figure,
        "outcome",
        "Which regularizer helps?",
        "An interval on the right that does not touch zero is a difference that the seeds do not explain.",
        "Small dots: seeds; large markers: means; bars: 95 % t-intervals (none with one seed). Left: test accuracy. "
        "Right: the difference of runs that share a seed, each interval for itself; the p values of the table are "
        f"corrected for asking about several energies. {seeds_of(study)}; the test split was used once, at the end.",
    )


def _beside(axis: Axes, text: str, x: float, y: float, color: str) -> None:
    axis.annotate(text, (x, y), (7, 0), textcoords="offset points", va="center", color=color, fontsize=8.5)


def _interval(axis: Axes, y: float, values: Sequence[float], look: Look) -> None:
    found = statistics.sample(values)
    if found.n == 0:
        return
    if len(values) > 1:
        axis.plot(values, [y - 0.27] * len(values), "o", color=look.color, alpha=0.5, markersize=3.6, markeredgewidth=0)
    if math.isfinite(found.low):
        axis.plot([found.low, found.high], [y, y], color=look.color, linewidth=2, solid_capstyle="butt")
    axis.plot([found.mean], [y], look.marker, color=look.color, markersize=7)


def learning(study: Study) -> Picture | None:
    """Draws data loss in training, validation loss and validation accuracy by epoch."""
    panels = [("train_loss", "Training loss (data only)"), ("val_loss", "Validation loss")]
    panels += [("val_accuracy", "Validation accuracy, %")]
    return _curves(
        study,
        [((key,), title, 100.0 if key.endswith("accuracy") else 1.0) for key, title in panels],
        "learning",
        "How does training go?",
        "A regularizer that works against overfitting ends with a higher training loss and a lower validation loss.",
        "The training loss is the data loss alone, without the regularizer's term, averaged over the epoch; "
        "the accuracy axis leaves out the first fifth of training.",
    )


def energies(study: Study) -> Picture | None:
    """Draws every monitored energy by epoch."""
    names: dict[str, None] = {}
    for group in study.groups:
        for run in group.runs:
            for entry in run.epochs:
                if isinstance(entry.get("energies"), dict):
                    names.update(dict.fromkeys(entry["energies"]))
    return _curves(
        study,
        [(("energies", name), name, 1.0) for name in names],
        "energies",
        "What did it do to the energies?",
        "The regularized curves should lie below the reference in the energy they minimize; "
        "the other panels show what came along with it.",
        "Energies of weights are summed over the weight blocks, those of the function (such as dirichlet) are means "
        "over validation samples; neither has its strength in it. Epoch 0 is the network before training. A run has "
        "the energies that it monitors or minimizes.",
    )


_PATH_PANELS = (
    ("path_energy", "Path energy E (step clock)"),
    ("length", "Length L of the path"),
    ("displacement", "Displacement D from the start"),
    ("straightness", "Straightness D² / 2E"),
    ("tortuosity_squared", "First factor (D / L)²"),
    ("speed_uniformity", "Second factor L² / 2E"),
)


def path(study: Study) -> Picture | None:
    """Draws energy, length and displacement of the path of the weights, and its straightness with the two factors."""
    return _curves(
        study,
        [(("path", key), title, 1.0) for key, title in _PATH_PANELS],
        "path",
        "Which path did the weights take?",
        "A low path energy is not yet a straight path: straightness is 1 only for a straight line at constant speed, "
        "and its two factors say whether turning (D/L) or uneven speed costs it.",
        "All quantities are cumulative from the first step. 2E ≥ L² ≥ D², so the lower three lie between 0 and 1.",
    )


def _curves(
    study: Study, panels: list[tuple[tuple[str, ...], str, float]], key: str, title: str, guide: str, caption: str
) -> Picture | None:
    drawn = [p for p in panels if any(curve(run, *p[0]) for g in study.groups for run in g.runs)]
    if not drawn:
        return None
    columns = min(3, len(drawn))
    rows = -(-len(drawn) // columns)
    figure, axes = canvas(rows, columns, height=2.5)
    for axis, (keys, name, factor) in zip(axes, drawn):
        for group, look in zip(study.groups, looks(study)):
            _band(axis, group, look, keys, factor)
        axis.set_title(figure_label(name))
        _scale(axis, 8.0 if name.lower().endswith(("loss", "only)")) else 30.0)
        if keys[-1].endswith("accuracy"):
            _skip_start(axis)
        _whole_epochs(axis)
    for axis in axes[len(drawn) :]:
        axis.set_visible(False)
    for axis in axes[max(0, len(drawn) - columns) : len(drawn)]:
        axis.set_xlabel("epoch")
    legend(figure, looks(study))
    return picture(figure, key, title, guide, f"{BAND}{caption} {seeds_of(study)}.")


def _band(axis: Axes, group: Group, look: Look, keys: tuple[str, ...], factor: float) -> None:
    found = [c for run in group.runs if (c := curve(run, *keys))]
    if not found:
        return
    epochs = sorted(set.intersection(*(set(c) for c in found)))
    if len(epochs) > _MOST_POINTS:
        epochs = [epochs[round(i)] for i in np.linspace(0, len(epochs) - 1, _MOST_POINTS)]
    if epochs:
        band(axis, look, np.array(epochs), factor * np.array([[c[e] for e in epochs] for c in found]))


def _scale(axis: Axes, factor: float) -> None:
    """Takes a logarithmic axis where the values are positive and span more than ``factor``."""
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in axis.lines] or [np.zeros(0)])
    values = values[np.isfinite(values)]
    if len(values) and values.min() > 0 and values.max() > factor * values.min():
        log_axis(axis)


def _skip_start(axis: Axes) -> None:
    """Lets an accuracy axis begin at the lowest mean after a fifth of training, so that the end can be told apart."""
    late = [
        np.asarray(line.get_ydata(), dtype=float)[len(np.asarray(line.get_ydata())) // 5 :]
        for line in axis.lines
        if len(np.asarray(line.get_ydata())) > 1
    ]
    if late:
        low, high = min(float(v.min()) for v in late), max(float(v.max()) for v in late)
        if high > low:
            axis.set_ylim(low - 0.08 * (high - low), high + 0.12 * (high - low))


def _whole_epochs(axis: Axes) -> None:
    from matplotlib.ticker import MaxNLocator

    axis.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def spectra(study: Study) -> Picture | None:
    """Draws the singular values of each layer after training, and of the reference before it."""
    layers = study.keys("spectra")
    if not layers:
        return None
    columns = min(3, len(layers))
    figure, axes = canvas(-(-len(layers) // columns), columns, height=2.8)
    for axis, layer in zip(axes, layers):
        _spectrum(axis, study, layer)
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
    legend(figure, looks(study), [("before training", ":")])
    return picture(
        figure,
        "spectra",
        "What did it do to the singular values?",
        "A curve that drops early is a layer of low rank: its tail can be cut off at little loss.",
        "Singular values of each layer in descending order, logarithmic. Line: median over seeds; band: lowest to "
        "highest seed; dotted: before training. Values below 1e-5 of the largest are drawn at the lower edge. "
        f"{seeds_of(study)}.",
    )


def _spectrum(axis: Axes, study: Study, layer: str) -> None:
    final = [_stack(group, "spectra", layer) for group in study.groups]
    top = max((float(s.max()) for s in final if s.size), default=1.0) or 1.0
    floor = 1e-5 * top
    start = _stack(study.groups[0], "spectra_initial", layer)
    lowest = top
    for stack, look in zip(final, looks(study)):
        if not stack.size:
            continue
        stack = np.maximum(stack, floor)
        lowest = min(lowest, float(stack.min()))
        index = np.arange(1, stack.shape[1] + 1)
        if len(stack) > 1:
            axis.fill_between(index, stack.min(0), stack.max(0), color=look.color, alpha=0.14, linewidth=0)
        few = look.marker if stack.shape[1] <= 40 else ""
        middle = np.median(stack, axis=0)
        axis.plot(index, middle, color=look.color, linestyle=look.dash, marker=few, markersize=3, linewidth=1.3)
    if start.size:
        start = np.maximum(np.median(start, axis=0), floor)
        axis.plot(np.arange(1, len(start) + 1), start, ":", color=INK, linewidth=0.9)
        lowest = min(lowest, float(start.min()))
    axis.set_ylim(lowest / 1.5, top * 1.6)
    log_axis(axis)
    axis.set_title(figure_label(layer, 36))
    axis.set_xlabel("index of the singular value")
    _whole_epochs(axis)


def _stack(group: Group, kind: str, layer: str) -> np.ndarray:
    """Returns the singular values of a layer as (seeds, rank), the finite ones of seeds that have them."""
    found: list[np.ndarray] = []
    for run in group.runs:
        table: Any = run.summary.get(kind)
        values = np.asarray(table.get(layer) or [] if isinstance(table, dict) else [], dtype=float)
        if values.ndim == 1 and values.size and np.isfinite(values).all():
            found.append(values)
    if not found:
        return np.zeros((0, 0))
    shortest = min(len(v) for v in found)
    return np.stack([v[:shortest] for v in found])


def compression(study: Study) -> Picture | None:
    """Draws test accuracy against size and rank when small singular values are cut off."""
    if not any(compression_points(g) for g in study.groups):
        return None
    figure, axes = canvas(1, 2, height=3.2)
    for group, look in zip(study.groups, looks(study)):
        points = compression_points(group)
        if not points:
            continue
        mean = np.array([np.mean([p[1:] for p in seeds], axis=0) for seeds in points.values()])
        every = np.array([p[1:] for seeds in points.values() for p in seeds])
        for axis, column, factor in ((axes[0], 0, 100.0), (axes[1], 1, 1.0)):
            if len(group.runs) > 1:
                axis.plot(
                    factor * every[:, column], 100 * every[:, 2], ".", color=look.color, alpha=0.3, markeredgewidth=0
                )
            axis.plot(
                factor * mean[:, column],
                100 * mean[:, 2],
                look.dash,
                color=look.color,
                marker=look.marker,
                linewidth=1.2,
            )
    axes[0].set_title("Size and accuracy")
    axes[0].set_xlabel("parameters of the factorized network, % of the dense one")
    axes[1].set_title("Rank and accuracy")
    axes[1].set_xlabel("sum of the ranks of all layers")
    axes[0].set_ylabel("test accuracy, %")
    legend(figure, looks(study))
    tolerances = ", ".join(f"{t:g}" for t in sorted({t for g in study.groups for t in compression_points(g)}))
    return picture(
        figure,
        "compression",
        "How small does the network get?",
        "Up and to the left is better: the same accuracy with fewer parameters.",
        "Each marker cuts the singular values below a tolerance times the largest of its layer "
        f"(tolerances {tolerances}, from right to left); a layer counts with two factors only where these are smaller. "
        f"Markers: means over seeds; small dots: seeds. {seeds_of(study)}; without any retraining.",
    )


def cost(study: Study) -> Picture | None:
    """Draws the time of one training step per energy."""
    times = [[v for v in g.by_seed("step_ms", "median").values() if math.isfinite(v)] for g in study.groups]
    if not any(times):
        return None
    n = len(study.groups)
    figure, (axis,) = canvas(1, 1, height=0.8 + 0.32 * n)
    base = float(np.median(times[0])) if times[0] else math.nan
    for row, (values, look) in enumerate(zip(times, looks(study))):
        if not values:
            continue
        y, middle = n - 1 - row, float(np.median(values))
        axis.barh(y, middle, height=0.5, color=look.color, alpha=0.35, linewidth=0)
        axis.plot(values, [y] * len(values), "o", color=look.color, markersize=3.5)
        ratio = f"{show(middle)} ms, {middle / base:.2f}{TIMES}" if base > 0 else f"{show(middle)} ms"
        _beside(axis, ratio, max(values), y, INK)
    axis.set_yticks(range(n - 1, -1, -1), [look.label for look in looks(study)])
    axis.set_xlim(0, 1.22 * max(max(v) for v in times if v))
    axis.set_xlabel("milliseconds per training step")
    axis.grid(axis="y", visible=False)
    return picture(
        figure,
        "cost",
        "What does a step cost?",
        "The factor is the price of the regularizer against the reference.",
        "Bar: median over seeds of each run's median time of a training step; dots: seeds. "
        "Times of runs that shared a busy machine are rough.",
    )
