"""``groundstate energies``: what can be measured and minimized."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import MISSING, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from groundstate.cli.console import Output, table, width
from groundstate.cli.options import verb

if TYPE_CHECKING:
    from groundstate.energies.base import Energy

_WIDE = 140  # columns of a terminal that costs and references need


@verb()
def energies(
    output: Output,
    given: dict[str, Any],
    *,
    name: Annotated[str | None, typer.Argument(help="One energy to explain.", metavar="[NAME]")] = None,
    points: Annotated[
        int | None, typer.Option("--points", help="Of mhe: find and draw the ground state of N points.", metavar="N")
    ] = None,
    dim: Annotated[int, typer.Option("--dim", help="Dimension of the points.", metavar="D")] = 3,
    exponent: Annotated[float, typer.Option("--exponent", help="s of the energy r^-s; 0: -log r.", metavar="S")] = 1.0,
    restarts: Annotated[int, typer.Option("--restarts", help="Random starts of the search.", metavar="K")] = 60,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="Draw the points: .svg, .png or .pdf.", metavar="FILE")
    ] = None,
) -> None:
    """List the energies, or explain one: formula, cost, reference, options."""
    from groundstate.energies.registry import get, registered
    from groundstate.errors import UsageError

    if points is not None:
        from groundstate.cli.thomson import thomson

        if name is None or get(name).name != "mhe":
            raise UsageError("--points is of the hyperspherical energy: groundstate energies mhe --points 12 --dim 3")
        thomson(output, points, dim, exponent, restarts, picture)
        return
    if picture is not None:
        raise UsageError("--picture needs --points: how many points to draw")
    if name is not None:
        found = describe(get(name))
        output.document("energies", {"energy": found})
        output.show(*_explained(found))
        return
    listed = [describe(cls) for cls in registered().values()]
    output.document("energies", {"energies": listed})
    how = "Explain one: groundstate energies nuclear. Use: groundstate train --energy '1e-3*nuclear'"
    output.show(*_listed(listed), how)


def _listed(energies: list[dict[str, Any]]) -> list[Any]:
    """Returns one table per kind of operand; cost and references only where the terminal has room for them."""
    columns = ("name", "formula", "couplings", "cost", "reference")[: 5 if width() >= _WIDE else 3]
    parts: list[Any] = []
    for operand in dict.fromkeys(d["of"] for d in energies):
        mine = [d for d in energies if d["of"] == operand]
        rows = [[", ".join(d[c]) if c == "couplings" else d[c] for c in columns] for d in mine]
        made = table(("energy", *columns[1:]), rows, title=f"Of {operand}", left=5)
        made.columns[0].no_wrap = made.columns[2].no_wrap = True
        parts.append(made)
    return parts


def describe(cls: type[Energy]) -> dict[str, Any]:
    """Returns what is known of an energy, as plain values."""
    traits = cls.traits
    return {
        "name": cls.name,
        "class": f"{cls.__module__}.{cls.__qualname__}",
        "aliases": list(cls.aliases),
        "of": _operand(cls),
        "formula": traits.formula,
        "reference": traits.reference,
        "cost": traits.cost,
        "convex": traits.convex,
        "degree": traits.degree,
        "invariances": list(traits.invariances),
        "smooth": traits.smooth,
        "couplings": couplings(cls),
        "options": {f.name: "required" if f.default is MISSING else f.default for f in fields(cls)},
        "examples": [repr(e) for e in cls.examples()],
        "description": inspect.getdoc(cls) or "",
    }


def _operand(cls: type[Energy]) -> str:
    from groundstate.energies import base, capabilities

    known = {
        base.MatrixEnergy: "one weight matrix; summed over the matrices",
        base.NetworkEnergy: "the ordered layers of a network",
        base.FunctionEnergy: "the function, on a batch",
        base.TrajectoryEnergy: "the path of the weights in training",
        capabilities.OfModel: "the attention modules of a model",
    }
    return next((text for kind, text in known.items() if issubclass(cls, kind)), "")


def couplings(cls: type[Energy]) -> list[str]:
    """Returns the couplings through which an energy can act."""
    from groundstate.energies.base import FunctionEnergy, TrajectoryEnergy
    from groundstate.energies.capabilities import Proximable

    found = ["monitor"]
    if issubclass(cls, Proximable):
        found.insert(0, "prox")
    if cls.traits.differentiable and not issubclass(cls, TrajectoryEnergy):
        found.insert(0, "loss")
    if cls.traits.differentiable and not issubclass(cls, FunctionEnergy):
        found.insert(0, "grad")
    return found


def _explained(found: dict[str, Any]) -> list[Any]:
    options = ", ".join(f"{k} ({v if v == 'required' else f'default {v!r}'})" for k, v in found["options"].items())
    rows = [
        ("formula", found["formula"]),
        ("of", found["of"]),
        ("options", options or "none"),
        ("specs", ", ".join(f"1e-3*{e}" for e in found["examples"])),
        ("couplings", ", ".join(found["couplings"])),
        ("convex", "yes" if found["convex"] else "no"),
        ("homogeneous of degree", "-" if found["degree"] is None else f"{found['degree']:g}"),
        ("invariances", ", ".join(found["invariances"]) or "none"),
        ("cost", found["cost"]),
        ("reference", found["reference"]),
        ("class", found["class"]),
    ]
    return [table(("", ""), rows, title=found["name"], left=2), _reflowed(found["description"], width())]


def _reflowed(text: str, columns: int) -> str:
    """Breaks the lines of a docstring anew; examples and the first line of each entry of a list stay where they are.

    >>> print(_reflowed("One two\\nthree.\\n\\nAttributes:\\n    a: Four\\n        five.", 16))
    One two three.
    <BLANKLINE>
    Attributes:
        a: Four
            five.
    """
    blocks: list[tuple[int, list[str]]] = []
    for line in text.splitlines():
        indent, last = len(line) - len(line.lstrip()), blocks[-1] if blocks else (0, [""])
        example = line.startswith(">>>") or last[1][0].startswith(">>>")
        goes_on = indent == last[0] == 0 or indent > last[0] > 0
        if not line.strip() or not last[1][0] or (goes_on and line.startswith("* ")) or not (goes_on or example):
            blocks.append((indent, [line]))
        else:
            last[1].append(line)
    lines: list[str] = []
    for indent, block in blocks:
        if block[0].startswith(">>>") or not block[0].strip():
            lines += block
            continue
        further = " " * (indent + 4 if indent else 0)
        joined = " ".join(part.strip() for part in block)
        lines += textwrap.wrap(
            joined, columns, initial_indent=" " * indent, subsequent_indent=further, break_on_hyphens=False
        )
    return "\n".join(lines)
