"""Which options an energy takes; one that nothing takes is refused.

Idea: an option changes what some energies do and is idle for the others: a trajectory must see every step, an energy of
the network finds its weights itself, few have a prox or certified bounds. Whether a term takes an option depends on its
energy and on its coupling alone, so the spec tells it before there is a model. A sum takes what one of its terms takes,
a comparison what one of its energies takes; each run of it is given only what its own energy takes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from groundstate.energies.base import Coupling, Energy, FunctionEnergy, MatrixEnergy, Sum, Term, TrajectoryEnergy
from groundstate.energies.capabilities import Anchored, OfModel, Proximable
from groundstate.errors import UsageError

WHY: dict[str, str] = {
    "coupling": "no term that leaves its coupling open can act by it",
    "every": "no term acts, or only such as must see every step",
    "gap": "no term has certified bounds and a gradient, by grad or in the loss, as have those of nuclear and graph",
    "schedule": "no term acts",
    "select": "the terms find what they act on in the model itself",
    "final_prox": "no term that acts has a prox",
}
OF_ENERGY: frozenset[str] = frozenset(("coupling", "every", "gap", "select", "final_prox"))
"""Those of a training run, whose ``schedule`` is that of the learning rate."""


def settle(term: Term, default: Coupling) -> Coupling:
    """Returns how a term acts, where the coupling of terms that name none is ``default``."""
    if term.coupling is not None:
        return term.coupling
    return "loss" if isinstance(term.energy, FunctionEnergy) and default != "monitor" else default


def misfit(term: Term, coupling: Coupling) -> str:
    """Returns why a term cannot act by a coupling, and what to write instead; empty where it can."""
    energy, strength = term.energy, term.strength
    of_function = isinstance(energy, FunctionEnergy)
    if coupling == "prox" and not isinstance(energy, Proximable):
        other = "loss" if of_function else "grad"
        return f"{energy!r} has no proximal map: let it act by '{strength:g}*{energy!r}@{other}'"
    if coupling in ("grad", "loss") and not energy.traits.differentiable:
        return f"{energy!r} only measures: write '{energy!r}@monitor'"
    if coupling == "loss" and isinstance(energy, TrajectoryEnergy):
        return f"{energy!r} acts on steps, not in the loss: write '{strength:g}*{energy!r}@grad'"
    if coupling == "grad" and of_function:
        return f"{energy!r} needs the batch: write '{strength:g}*{energy!r}@loss' and add reg.loss(x, y)"
    return ""


def takes(option: str, energy: Energy, coupling: Coupling) -> bool:
    """Whether an energy that acts by ``coupling`` takes an option; of the option ``coupling`` `taken` knows."""
    acts = coupling != "monitor"
    if option == "every":
        return acts and not isinstance(energy, TrajectoryEnergy)
    if option == "gap":
        return coupling in ("grad", "loss") and isinstance(energy, Anchored) and energy.bounded()
    if option == "select":
        return isinstance(energy, MatrixEnergy | TrajectoryEnergy) and not isinstance(energy, OfModel)
    if option == "final_prox":
        return acts and isinstance(energy, Proximable)
    return acts and option == "schedule"


def taken(energy: Sum, coupling: Coupling = "grad") -> frozenset[str]:
    """Returns the options that a sum takes.

    Args:
        energy: The sum; the empty one takes none.
        coupling: The coupling of the terms that name none; if no term takes it, they act by ``grad``.

    >>> from groundstate.energies.registry import parse
    >>> sorted(taken(parse("path_energy"))), sorted(taken(parse("nuclear@prox"), "loss"))
    (['coupling', 'schedule', 'select'], ['every', 'final_prox', 'schedule', 'select'])
    """
    by: list[Coupling] = [settle(t, coupling) for t in energy.terms]
    told = any(c == coupling and not misfit(t, c) for t, c in zip(energy.terms, by, strict=True))
    if not told:
        by = [settle(t, "grad") for t in energy.terms]
    found = {o for o in WHY for t, c in zip(energy.terms, by, strict=True) if takes(o, t.energy, c)}
    return frozenset(found | {"coupling"} if told else found)


def refuse_idle(given: Mapping[str, str], taken: Collection[str], spec: str) -> None:
    """Refuses options that nothing takes.

    Args:
        given: The options that are not at their defaults, and how each is written.
        taken: The options that are taken.
        spec: Of what energies.

    Raises:
        UsageError: names the option, and why it plays no part.
    """
    for option, written in given.items():
        if option not in taken:
            raise UsageError(f"{written} plays no part in {spec}, where {WHY[option]}: leave it out")
