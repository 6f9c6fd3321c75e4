"""Errors that say what was expected, what came, and what to do; each knows the exit code of the command line.

Exit codes: 0 done, 1 a threshold failed, 2 usage, 3 data or checksum, 4 non-finite training, 5 disk or memory,
75 interrupted, saved and resumable.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import ClassVar


class GroundstateError(Exception):
    """Base of every error that groundstate raises on purpose."""

    exit_code: ClassVar[int] = 2


class ThresholdError(GroundstateError):
    """A check that the user asked for was not met."""

    exit_code = 1


class UsageError(GroundstateError, ValueError):
    """An argument, a spec, a selection or a configuration that cannot be used."""

    exit_code = 2


class DataError(GroundstateError):
    """Data or a checkpoint that is missing, damaged, or not what its checksum says."""

    exit_code = 3


class NonFiniteError(GroundstateError, ArithmeticError):
    """A loss, an energy or a weight that is NaN or infinite."""

    exit_code = 4


class ResourceError(GroundstateError):
    """Disk or memory ran out."""

    exit_code = 5


class Interrupted(GroundstateError):
    """Training was interrupted by a signal after its state was saved."""

    exit_code = 75


def nearest(name: str, known: Iterable[str]) -> str:
    """Returns ``" Did you mean 'x'?"`` for the known name nearest to ``name``, or an empty string."""
    close = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""
