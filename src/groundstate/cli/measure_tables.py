"""The tables of ``groundstate measure``: the weights, and what the network does to its inputs."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from groundstate.cli.console import figure, percent, table, width
from groundstate.report.text import TIMES, plus_minus

if TYPE_CHECKING:
    from rich.table import Table as RichTable

    from groundstate.measure import Table
    from groundstate.measure_function import FunctionTable

_WIDE = 120  # columns of a terminal that the widest table needs
_SPECTRUM = {
    "s_1": "s_1",
    "second": "s_2/s_1",
    "s_r": "s_r",
    "rank": "rank",
    "stable_rank": "stable rank",
    "effective_rank": "effective rank",
}


def of_weights(found: Table, shown: tuple[str, ...] | None) -> list[Any]:
    """Returns the tensors, the totals, and a line that counts them; ``shown``: energies with a column, all if None."""
    per_row = list(dict.fromkeys(k for r in found.rows for k in r.values if shown is None or k in shown))
    columns = ("tensor", "shape", "dtype", "status", "rank", "effective rank", "sigma max", *per_row)
    reasons = list(dict.fromkeys(r.reason for r in found.rows if r.reason))
    rows = []
    for r in found.rows:
        status = r.status if not r.reason else f"{r.status} ({reasons.index(r.reason) + 1})"
        shape = "x".join(map(str, r.shape)) or "-"
        figures = [figure(v) for v in (r.rank, r.effective_rank, r.sigma_max)]
        rows.append((r.name, shape, r.dtype, status, *figures, *[figure(r.values.get(e)) for e in per_row]))
    counts = found.summary()
    parts: list[Any] = [_tight(table(columns, rows, left=4)), *(f"({i}) {r}" for i, r in enumerate(reasons, 1))]
    parts += _grounds(found, shown)
    if found.totals:
        parts.append(table(("total over the weights", "value"), [(e, figure(v)) for e, v in found.totals.items()]))
    parts.append(
        f"{counts['tensors']} tensors, {found.parameters:,} parameters: "
        + ", ".join(f"{n} {status}" for status, n in counts.items() if n and status != "tensors")
    )
    if found.evaluation:
        accuracy, loss = percent(found.evaluation["accuracy"]), figure(found.evaluation["loss"])
        parts.append(f"validation accuracy {accuracy}, loss {loss}")
    return parts


def _grounds(found: Table, shown: tuple[str, ...] | None) -> list[Any]:
    """Returns, for energies with a known ground state, where each weight lies between random and that state."""
    specs = list(dict.fromkeys(k for r in found.rows for k in r.grounds))
    if shown is not None:
        specs = specs[:1]  # of all energies, one of those that a ground state is known of
    columns = ("tensor", "energy", "value", "random", "certified floor", "gap", "uniformity")
    rows = []
    for r in found.rows:
        for spec in (s for s in specs if s in r.grounds):
            g = r.grounds[spec]
            cells = [figure(v) for v in (r.values[spec], g["random"], g["floor"])]
            gap, score = g["gap"], g["uniformity"]
            rows.append(
                (r.name, spec, *cells, "-" if gap is None else percent(gap), "-" if score is None else f"{score:.2f}")
            )
    if not rows:
        return []
    title = "Distance to the ground state (uniformity: 0 random, 1 at the floor)"
    return [_tight(table(columns, rows, title=title, left=2))]


def _tight(made: RichTable) -> RichTable:
    """Takes a blank from between the columns, where a narrow terminal would fold their cells."""
    if width() < _WIDE:
        made.padding, made.pad_edge = (0, 1, 0, 0), False
    return made


def of_function(found: FunctionTable) -> list[Any]:
    """Returns the tables of what was measured on the data; parts that are absent have none."""
    return ["", *_energies(found), *_cuts(found), *_robustness(found), *_alignment(found), *_probabilities(found)]


def _energies(found: FunctionTable) -> list[Any]:
    parts: list[Any] = []
    if found.energies:
        rows = [
            (spec, plus_minus(e.value, math.nan if e.standard_error is None else e.standard_error), e.how or "-")
            for spec, e in found.energies.items()
        ]
        title = f"What the network does to {found.samples} samples (± standard error)"
        made = _tight(table(("energy of the function", "value", "how"), rows, title=title))
        made.columns[-1].justify = "left"
        parts.append(made)
    if found.spectrum:
        shown = {title: figure(found.spectrum[key]) for key, title in _SPECTRUM.items() if key in found.spectrum}
        parts.append(table(shown, [shown.values()], title="Singular values of the Jacobian, means", left=0))
    return parts


def _cuts(found: FunctionTable) -> list[Any]:
    if not found.cuts:
        return []
    columns = ("cut after", "layer", "width", "||J_g||_F", "||J_h||_F", "product/nuclear", "half-sum/nuclear")
    rows = []
    for cut in found.cuts:
        norms = [figure(cut.get(key)) for key in ("frobenius_g", "frobenius_h")]
        ratios = [_times(cut.get(f"{key}/nuclear"), "draws" in cut) for key in ("product", "half_sum")]
        rows.append((cut["name"], cut["kind"], cut["width"], *norms, *ratios))
    title = "Bounds on the nuclear norm over cuts f = g after h: how many times too large"
    parts: list[Any] = [table(columns, rows, title=title, left=2)]
    if any("draws" in cut for cut in found.cuts):
        parts += ["~: estimated by random probes; the exact norms would take too many passes", ""]
    return parts


def _times(ratio: float | None, estimated: bool) -> str:
    return "-" if ratio is None else f"{'~' if estimated else ''}{ratio:.2f}{TIMES}"


def _robustness(found: FunctionTable) -> list[Any]:
    if not found.robustness:
        return []
    columns, cells = ["radius, share"], []
    for norm, curve in found.robustness.items():
        columns += [f"{norm} radius", f"{norm} accuracy"]
        cells += [map(figure, curve["epsilon"]), map(percent, curve["accuracy"])]
    shares = next(iter(found.robustness.values()))["share"]
    title = "Accuracy under attack: an upper bound on robust accuracy"
    return [table(columns, zip(map(figure, shares), *cells), title=title, left=0), _SHARE, ""]


_SHARE = "share: of the distance of a sample from the mean, rms (l2); of the deviation of all entries (linf)"


def _alignment(found: FunctionTable) -> list[Any]:
    a = found.alignment
    if not a:
        return []
    columns = ("radius, share", "l2 radius", "theorem regime", "ascent on logits", "attack (cross-entropy)")
    keys = ("share", "epsilon", "theorem", "logits", "cross_entropy")
    title = "|cos| of the perturbation with the top right singular vector of the Jacobian"
    return [table(columns, zip(*(map(figure, a[k]) for k in keys)), title=title, left=0)]


def _probabilities(found: FunctionTable) -> list[Any]:
    parts: list[Any] = []
    c = found.calibration
    if c:
        scaled = f"{percent(c['ece_scaled'])} at temperature {figure(c['temperature'])}"
        parts.append(f"Calibration: expected calibration error {percent(c['ece'])} ({scaled}),")
        parts.append(f"negative log-likelihood {figure(c['nll'])}, Brier score {figure(c['brier'])}")
    if found.outliers:
        shown = {family: percent(value) for family, value in found.outliers.items()}
        parts += ["", table(shown, [shown.values()], title="AUROC of the predictive entropy, by outliers", left=0)]
    return parts
