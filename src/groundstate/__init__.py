"""groundstate measures and minimizes the energy of neural networks."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "Regularizer": "groundstate.regularizer",
    "measure": "groundstate.measure",
    "compress": "groundstate.compress",
    "load_compressed": "groundstate.compressed_folder",
    "parse": "groundstate.energies.registry",
    "GroundstateError": "groundstate.errors",
}
__all__ = ["GroundstateError", "Regularizer", "__version__", "compress", "load_compressed", "measure", "parse"]

if TYPE_CHECKING:
    from groundstate.compress import compress
    from groundstate.compressed_folder import load_compressed
    from groundstate.energies.registry import parse
    from groundstate.errors import GroundstateError
    from groundstate.measure import measure
    from groundstate.regularizer import Regularizer


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class _Package(ModuleType):
    """Keeps ``groundstate.measure`` the function where importing the module of that name would put the module."""

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _HOME and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
