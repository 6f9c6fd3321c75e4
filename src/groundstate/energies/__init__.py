"""Every energy, by class name: ``from groundstate.energies import Nuclear``. Names are loaded when first asked for."""

from __future__ import annotations

from typing import Any

from groundstate.energies.base import (
    COUPLINGS,
    Coupling,
    Energy,
    FunctionEnergy,
    MatrixEnergy,
    NetworkEnergy,
    Sum,
    Term,
    Traits,
    TrajectoryEnergy,
)
from groundstate.energies.capabilities import Dualizable, Proximable, Spectral
from groundstate.energies.registry import get, parse, register, registered, unregister

__all__ = [
    "COUPLINGS", "Coupling", "Dualizable", "Energy", "FunctionEnergy", "MatrixEnergy", "NetworkEnergy", "Proximable",
    "Spectral", "Sum", "Term", "Traits", "TrajectoryEnergy", "get", "parse", "register", "registered", "unregister",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name.startswith("_") or not name[:1].isupper():
        raise AttributeError(name)
    for cls in registered().values():
        if cls.__name__ == name:
            return cls
    raise AttributeError(f"module {__name__!r} has no energy {name!r}")
