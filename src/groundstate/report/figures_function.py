"""The figures of what networks do to their inputs: accuracy under attack, alignment, and bounds over cuts."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from groundstate.report.function import CutRow, curve, cuts
from groundstate.report.load import Study
from groundstate.report.picture import BAND, Picture, band, picture, seeds_of
from groundstate.report.style import MUTED, canvas, legend, looks, styled
from groundstate.report.text import figure_label

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_MOST_CUTS = 16


def function_pictures(study: Study) -> list[Picture]:
    """Returns every figure of the function for which the study has numbers."""
    drawers: tuple[Callable[[Study], Picture | None], ...] = (robustness, alignment, looseness)
    with styled():
        return [made for draw in drawers if (made := draw(study)) is not None]


def robustness(study: Study) -> Picture | None:
    """Draws accuracy under attack against the radius, one panel per norm."""
    norms = study.keys("function", "robustness")
    curves = [(norm, *curve(study, ("robustness", norm), "accuracy")) for norm in norms]
    curves = [(norm, radii, stacks) for norm, radii, stacks in curves if len(radii)]
    if not curves:
        return None
    figure, axes = canvas(1, max(2, len(curves)), height=3.0)
    for axis, (norm, radii, stacks) in zip(axes, curves):
        for look, stack in zip(looks(study), stacks):
            if len(stack):
                band(axis, look, radii, 100 * stack, every=True)
        axis.set_title(f"Perturbations in a ball of {figure_label(_NAMES.get(norm, norm))}")
        axis.set_xlabel("radius")
        axis.set_xlim(left=-0.015 * radii.max())  # the marker at 0 stays whole
    for axis in axes[len(curves) :]:
        axis.set_visible(False)
    axes[0].set_ylabel("accuracy under attack, %")
    legend(figure, looks(study))
    return picture(
        figure,
        "robustness",
        "How much perturbation does it bear?",
        "A curve that stays up longer is a network that small perturbations fool less; at radius 0 it is the accuracy.",
        "Projected gradient ascent on the cross-entropy, 20 steps from a random start. A stronger attack may do more, "
        f"so the curves are upper bounds on robust accuracy. {BAND}{seeds_of(study)}; on samples of the test split.",
    )


_NAMES = {"l2": "the 2-norm", "linf": "the maximum norm"}
_ASCENTS = (
    ("theorem", "Logits, long steps (theorem)"),
    ("logits", "Logits, ordinary steps"),
    ("cross_entropy", "Cross-entropy (the attack)"),
)


def alignment(study: Study) -> Picture | None:
    """Draws how far perturbations are top singular vectors of the Jacobian, against their length."""
    curves = [(title, *curve(study, ("alignment",), key)) for key, title in _ASCENTS]
    if not any(len(radii) for _, radii, _ in curves):
        return None
    figure, axes = canvas(1, len(curves), height=2.8)
    for axis, (title, radii, stacks) in zip(axes, curves):
        for look, stack in zip(looks(study), stacks):
            if len(stack):
                band(axis, look, radii, stack, every=True)
        axis.set_title(title)
        if len(radii) and radii.min() > 0:
            axis.set_xscale("log")
        axis.set_ylim(0, 1.04)
        axis.set_xlabel("length of the perturbation, 2-norm")
    axes[0].set_ylabel("mean of |cos|")
    legend(figure, looks(study))
    return picture(
        figure,
        "alignment",
        "Are the worst perturbations singular vectors?",
        "At 1 the perturbation is the top right singular vector of the Jacobian, and robustness a matter of its "
        "spectral norm; where the curves on the left fall, the network is no longer linear at that distance.",
        "Mean of |cos| over samples. Left: ascending the change of the logits with very long steps is the power method "
        "while the network is linear; middle: with ordinary steps it has not converged; right: an attack on the label "
        f"follows other directions too. {BAND}{seeds_of(study)}.",
    )


def looseness(study: Study) -> Picture | None:
    """Draws how many times too large the bounds on the nuclear norm are, one row per cut."""
    rows = cuts(study)
    if len(rows) > _MOST_CUTS:
        rows = [rows[round(i)] for i in np.linspace(0, len(rows) - 1, _MOST_CUTS)]
    if not rows:
        return None
    n, groups = len(rows), len(study.groups)
    figure, axes = canvas(1, 2, height=0.95 + n * (0.3 + 0.11 * groups))
    for axis, (ratio, title) in zip(axes, _BOUNDS):
        for i, row in enumerate(rows):
            _dots(axis, study, row, ratio, n - 1 - i)
        axis.axvline(1, color=MUTED, linewidth=1)
        axis.set_ylim(-0.5, n - 0.5)
        axis.set_xlim(left=min(0.98, axis.get_xlim()[0]))
        axis.grid(axis="y", visible=False)
        axis.set_title(title)
        axis.set_xlabel("bound / nuclear norm")
    axes[0].set_yticks(range(n - 1, -1, -1), [figure_label(row.label) for row in rows])
    axes[1].set_yticks(range(n - 1, -1, -1), [""] * n)
    legend(figure, looks(study))
    return picture(
        figure,
        "cuts",
        "How loose are the bounds over a cut?",
        "At 1 the bound that can be minimized in the place of the nuclear norm of the Jacobian is exact.",
        "The network is split after a layer into g ∘ h. The nuclear norm of J is at most the product of the Frobenius "
        "norms of the Jacobians of g and h, and that at most half the sum of their squares. The half-sum is what the "
        "factorized energy minimizes; the product does not depend on how the two halves are scaled. Large markers: "
        f"means over seeds; small dots: seeds. {seeds_of(study)}.",
    )


_BOUNDS = (("product", "Product of the two norms"), ("half_sum", "Half the sum of their squares"))


def _dots(axis: Axes, study: Study, row: CutRow, ratio: str, y: float) -> None:
    groups = len(study.groups)
    for k, (look, seeds) in enumerate(zip(looks(study), row.times[ratio])):
        if not seeds:
            continue
        place = y + 0.6 * ((groups - 1) / 2 - k) / groups
        if len(seeds) > 1:
            axis.plot(seeds, [place] * len(seeds), "o", color=look.color, alpha=0.5, markersize=3.2, markeredgewidth=0)
        axis.plot([float(np.mean(seeds))], [place], look.marker, color=look.color, markersize=6)
