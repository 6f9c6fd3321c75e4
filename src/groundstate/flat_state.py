"""Saved states are flat mappings: tensors and plain values by names with prefixes.

Nothing else survives a file format that runs no code, and a flat mapping compares, prints and saves as it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from groundstate.errors import UsageError


def below(state: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Returns what stands under a prefix, by the rest of its name.

    >>> below({"a/x": 1, "b/x": 2}, "a/")
    {'x': 1}
    """
    return {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}


def restore(into: Mapping[str, Tensor], state: Mapping[str, Any], prefix: str, matrices: Mapping[str, Tensor]) -> None:
    """Copies what was saved under a prefix into tensors of the same names and shapes, all or nothing.

    Raises:
        UsageError: names or shapes differ; ``matrices`` tells the weights that the state should be of.
    """
    saved = below(state, prefix)
    if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in into.items()}:
        raise UsageError(f"the saved {prefix.rstrip('/')} is of other weights than {', '.join(matrices)}")
    for k, v in into.items():
        v.copy_(saved[k])
