"""What evolving energies remember from step to step: learned once in each, however often they are asked.

Idea: a term in the loss is asked once for each micro-batch, and by whoever evaluates; one of gradients once for each
call of a closure. The memory after step t shall be a function of the memory before it and of the weights::

    m_{t+1} = learn(w_t, m_t)

So each request of one step begins at m_t, with the same probes: at the same weights it gives the same value and leaves
the same memory, and the last one counts. A request that shall not learn is given a copy.

What an energy of the function settles (`groundstate.energies.capabilities.Resolving`) is no such memory: the first
batch decides, and no later one changes it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from groundstate.energies.base import Energy
from groundstate.energies.capabilities import Resolving
from groundstate.errors import UsageError
from groundstate.flat_state import below

OfTerm = dict[str, dict[str, Tensor]]  # by name of weight, then by what the energy calls it


class Memories:
    """The memories of all terms, by their keys.

    Args:
        first: What is kept before the first step.

    >>> import torch
    >>> kept = Memories({"e": {"w": {"count": torch.zeros(())}}})
    >>> for step in (0, 0, 1):  # asked twice in step 0
    ...     _ = kept.at("e", step)["w"]["count"].add_(1)
    >>> kept.flat()
    {'e/w/count': tensor(2.)}
    """

    def __init__(self, first: Mapping[str, OfTerm]) -> None:
        self._kept = dict(first)
        self._begun: dict[str, tuple[int, OfTerm]] = {}  # the step, and what was kept before it

    def at(self, key: str, step: int, learning: bool = True) -> OfTerm:
        """Returns what a term is given at a step, to change in place: as it was before the step.

        Args:
            key: Of the term.
            step: Number of the step.
            learning: Whether changes count.
        """
        kept, before = self._kept[key], self._before(key, step)
        if not learning:
            return _copy(before)
        if before is kept:
            self._begun[key] = step, _copy(kept)
        else:
            for name, memory in before.items():
                for k, v in memory.items():
                    kept[name][k].copy_(v)
        return kept

    def flat(self, step: int | None = None) -> dict[str, Tensor]:
        """Returns every tensor by a name of its own: as they are, or as before ``step`` if that has begun."""
        return {
            f"{key}/{name}/{k}": v
            for key in self._kept
            for name, memory in (self._kept[key] if step is None else self._before(key, step)).items()
            for k, v in memory.items()
        }

    def restart(self) -> None:
        """Takes what is kept now as what was kept before the next step."""
        self._begun.clear()

    def _before(self, key: str, step: int) -> OfTerm:
        begun = self._begun.get(key)
        return self._kept[key] if begun is None or begun[0] != step else begun[1]


class Settled:
    """What energies of the function settle at their first batch, by their keys.

    Args:
        terms: The key and the energy of each term that acts.
    """

    def __init__(self, terms: Iterable[tuple[str, Energy]]) -> None:
        self._energies = {key: energy for key, energy in terms if isinstance(energy, Resolving)}
        self._kept = {key: energy.unresolved() for key, energy in self._energies.items()}

    def at(self, key: str, learning: bool = True) -> dict[str, Tensor]:
        """Returns what a term has settled, to settle it in place; a copy, if that shall not count."""
        kept = self._kept.get(key, {})
        return kept if learning else {k: v.clone() for k, v in kept.items()}

    def flat(self) -> dict[str, Tensor]:
        """Returns every tensor by a name of its own."""
        return {f"{key}/{k}": v for key, kept in self._kept.items() for k, v in kept.items()}

    def load(self, state: Mapping[str, Any], begun: bool) -> None:
        """Restores `flat`. What the state does not hold is open again: if training had begun, a warning names it.

        Raises:
            UsageError: the state is of another version.
        """
        for key, kept in self._kept.items():
            saved = below(state, f"{key}/")
            if kept and not saved:
                saved = self._energies[key].unresolved()
                if begun:
                    warnings.warn(
                        f"the saved state does not hold the {' or '.join(kept)} that {key} had chosen (an earlier "
                        "version did not save it): it is chosen anew at the next batch, and may be another one",
                        stacklevel=3,
                    )
            if {k: v.shape for k, v in saved.items()} != {k: v.shape for k, v in kept.items()}:
                raise UsageError(f"the saved state of {key} is of another version: start the run anew")
            for k, v in kept.items():
                v.copy_(saved[k])


def _copy(memories: OfTerm) -> OfTerm:
    return {name: {k: v.clone() for k, v in memory.items()} for name, memory in memories.items()}
