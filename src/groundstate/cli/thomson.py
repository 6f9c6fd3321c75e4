"""``groundstate energies mhe --points N``: the ground state of N points on a sphere, found and drawn."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from groundstate.cli.console import Output, figure, table


def thomson(output: Output, points: int, dimension: int, exponent: float, restarts: int, picture: Path | None) -> None:
    """Solves the Thomson problem, prints its energy against the certified floor, and draws the points."""
    import torch
    from rich.text import Text

    from groundstate.norms.sphere.floor import floor, gap
    from groundstate.norms.sphere.thomson import thomson as solve
    from groundstate.report.thomson import draw, terminal

    generator = torch.Generator().manual_seed(0)
    found = solve(points, dimension, exponent, restarts=restarts, generator=generator)
    least = floor(points, dimension, exponent)
    cosines = (found.points @ found.points.mT).fill_diagonal_(-1.0)
    angle = float(torch.acos(cosines.max().clamp(-1, 1)) * 180 / torch.pi)
    body: dict[str, Any] = {
        "points": points,
        "dimension": dimension,
        "exponent": exponent,
        "restarts": restarts,
        "total": found.total,
        "mean": found.mean,
        "floor": least.value,
        "floor_from": least.method,
        "gap": gap(found.mean, least) if least.value else None,
        "smallest_angle": angle,
        "gradient_norm": found.gradient_norm,
        "coordinates": found.points.tolist(),
    }
    if picture is not None:
        body["picture"] = draw(found.points, picture, f"{points} points in {dimension} dimensions, s = {exponent:g}")
    output.document("energies", {"thomson": body})
    above = None if body["gap"] is None else 100 * max(0.0, body["gap"])
    share = "" if above is None else f", so at most {above:.2g} % above the ground state"
    rows = [
        ("sum over pairs", f"{found.total:.9f}"),
        ("mean over pairs", f"{found.mean:.9f}"),
        ("certified floor", f"{least.value:.9f} ({least.method}){share}"),
        ("smallest angle", f"{angle:.4f} degrees"),
        ("gradient norm", figure(found.gradient_norm)),
    ]
    name = "log(1 / r)" if exponent == 0 else f"r^-{exponent:g}"
    title = f"{points} points on the unit sphere in {dimension} dimensions, energy {name}, best of {restarts} starts"
    output.show(table(("", ""), rows, title=title, left=2), Text(terminal(found.points)))
    if picture is not None:
        output.note(f"written: {picture}")
