"""``groundstate energies``: what can be measured and minimized."""

from __future__ import annotations

import inspect
from dataclasses import MISSING, fields
from typing import TYPE_CHECKING, Annotated, Any

import typer

from groundstate.cli.console import Output, table
from groundstate.cli.options import verb

if TYPE_CHECKING:
    from groundstate.energies.base import Energy


@verb()
def energies(
    output: Output,
    given: dict[str, Any],
    *,
    name: Annotated[str | None, typer.Argument(help="One energy to explain.", metavar="[NAME]")] = None,
) -> None:
    """List the energies, or explain one: formula, cost, reference, options."""
    from groundstate.energies.registry import get, registered

    if name is not None:
        found = describe(get(name))
        output.document("energies", {"energy": found})
        output.show(*_explained(found))
        return
    listed = [describe(cls) for cls in registered().values()]
    output.document("energies", {"energies": listed})
    rows = [(d["name"], d["formula"], d["cost"], ", ".join(d["couplings"]), d["reference"]) for d in listed]
    output.show(
        table(("energy", "formula", "cost", "couplings", "reference"), rows, left=5),
        "Explain one: groundstate energies nuclear. Use: groundstate train --energy '1e-3*nuclear'",
    )


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
    from groundstate.energies import base

    known = {
        base.MatrixEnergy: "one weight matrix; summed over the matrices",
        base.NetworkEnergy: "the ordered layers of a network",
        base.FunctionEnergy: "the function, on a batch",
        base.TrajectoryEnergy: "the path of the weights in training",
    }
    return next((text for kind, text in known.items() if issubclass(cls, kind)), "")


def couplings(cls: type[Energy]) -> list[str]:
    """Returns the couplings through which an energy can act."""
    from groundstate.energies.base import FunctionEnergy, Proximable, TrajectoryEnergy

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
    return [table(("", ""), rows, title=found["name"], left=2), found["description"]]
