"""The table that `groundstate.measure` fills: one row a tensor, totals, and what the network does to its inputs."""

from __future__ import annotations

import csv
import io
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from groundstate.measure_function import FunctionTable

Status = Literal["analyzed", "skipped", "alias", "non-finite"]
_GROUNDS = ("floor", "random", "gap", "uniformity")
_FIGURES = ("rank", "effective_rank", "stable_rank", "sigma_max", "sigma_min")


@dataclass(frozen=True)
class Row:
    """One tensor.

    Attributes:
        name: Its name; text from a file is untrusted.
        shape: Its shape.
        dtype: Its dtype, empty for what is not a tensor.
        parameters: Its number of entries.
        status: ``analyzed``; ``skipped`` (see ``reason``); ``alias`` of a tensor above it; ``non-finite``.
        reason: Why it is not analyzed; of an analyzed tensor, which energies have no value here and why, else empty.
        values: Energies by their spec.
        grounds: For energies with a known ground state, by spec: ``floor`` (a certified lower bound for this shape),
            ``random`` (the value of random directions), ``gap`` = (E - floor) / |floor| and ``uniformity`` =
            (random - E) / (random - floor), 0 like random and 1 at the floor; ``None`` where not defined.
        alias_of: The tensor whose memory an alias shares.
        matrices: How many matrices it is: 1, or the length of a stack.
        rank: Numerical rank, summed over a stack.
        effective_rank: exp of the entropy of the normalized singular values, averaged over a stack.
        stable_rank: Squared Frobenius over squared spectral norm, averaged over a stack.
        sigma_max: Largest singular value, of the whole stack.
        sigma_min: Smallest singular value, of the whole stack.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    parameters: int
    status: Status
    reason: str = ""
    values: dict[str, float] = field(default_factory=dict)
    grounds: dict[str, dict[str, float | None]] = field(default_factory=dict)
    alias_of: str | None = None
    matrices: int = 1
    rank: int | None = None
    effective_rank: float | None = None
    stable_rank: float | None = None
    sigma_max: float | None = None
    sigma_min: float | None = None


@dataclass(frozen=True)
class Table:
    """What `measure` found.

    Attributes:
        rows: Every tensor, in the order of the model (of a file: by name, numbers as numbers).
        totals: Energies of the whole network by their spec: sums over the analyzed rows, and network energies. One
            that no weight has a value of is absent, and a note says so.
        notes: What the reader should know: energies that are absent, and why.
        evaluation: ``loss`` and ``accuracy`` on the data, where data was given.
        function: What the network does to these data, where data was given.
    """

    rows: list[Row]
    totals: dict[str, float]
    notes: list[str] = field(default_factory=list)
    evaluation: dict[str, float] = field(default_factory=dict)
    function: FunctionTable | None = None

    @property
    def parameters(self) -> int:
        """The number of entries of all tensors, those with several names once."""
        return sum(r.parameters for r in self.rows if r.status != "alias")

    @property
    def non_finite(self) -> list[str]:
        """The names of the tensors that hold NaN, or weights that hold infinities."""
        return [r.name for r in self.rows if r.status == "non-finite"]

    def summary(self) -> dict[str, int]:
        """Returns how many tensors have each status, and ``tensors``, how many there are."""
        counts = Counter(r.status for r in self.rows)
        known = {s: counts[s] for s in ("analyzed", "skipped", "alias", "non-finite")}
        return {"tensors": len(self.rows), **known}

    def to_dict(self) -> dict[str, Any]:
        """Returns plain JSON values; numbers that JSON cannot write (NaN, infinity) become strings."""
        document = {
            "schema": 1,
            "counts": self.summary(),
            "parameters": self.parameters,
            "totals": self.totals,
            "evaluation": self.evaluation,
            "function": None if self.function is None else self.function.to_dict(),
            "notes": self.notes,
            "rows": [asdict(r) for r in self.rows],
        }
        return _plain(document)

    def to_csv(self) -> str:
        """Returns one line a tensor; text cells that a spreadsheet would run as a formula are made inert."""
        energies = list(dict.fromkeys(k for r in self.rows for k in r.values))
        grounded = [(k, what) for k in dict.fromkeys(k for r in self.rows for k in r.grounds) for what in _GROUNDS]
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        head = [
            "name",
            "shape",
            "dtype",
            "parameters",
            "status",
            "reason",
            "alias_of",
            "matrices",
            *_FIGURES,
            *energies,
            *(f"{what} of {k}" for k, what in grounded),
        ]
        writer.writerow([_text(h) for h in head])
        for row in self.rows:
            texts = (row.name, "x".join(map(str, row.shape)), row.dtype)
            more = (row.status, row.reason, row.alias_of or "")
            figures = [getattr(row, f) for f in _FIGURES] + [row.values.get(e) for e in energies]
            cells = [*map(_text, texts), row.parameters, *map(_text, more), row.matrices]
            figures += [row.grounds.get(k, {}).get(what) for k, what in grounded]
            writer.writerow(cells + ["" if f is None else f for f in figures])
        return out.getvalue()


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _text(cell: str) -> str:
    cell = cell.encode("utf-8", "backslashreplace").decode("utf-8")
    cell = re.sub(r"[\x00-\x1f\x7f-\x9f]", lambda m: f"\\x{ord(m[0]):02x}", cell)
    return f"'{cell}" if cell.lstrip().startswith(("=", "+", "-", "@")) else cell
