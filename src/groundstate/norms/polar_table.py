"""Where one way to the polar factor overtakes another: the constants of the dispatch, per kind of device.

Every constant only decides speed: each route of `polar` knows what it cannot do and hands it on. The defaults were
measured on one core with MKL. `groundstate bench --tune` measures some of them on the machine at hand (`polar_tune`)
and keeps the result in a file of the user::

    $GROUNDSTATE_POLAR_TABLE, else $XDG_CONFIG_HOME/groundstate/polar.json, else ~/.config/groundstate/polar.json

which is read once, when the first polar factor is asked for. Another table may change results in their last digits;
runs that must agree bit for bit need the same table, as they need the same machine. A file that cannot be read counts
as none, with a warning.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple


class Constants(NamedTuple):
    """The constants of one kind of device.

    Attributes:
        aspect: Matrices with min(m, n) <= aspect * max(m, n) count as tall.
        tiny: Up to this min(m, n) float32 matrices, and batches of them together, go to float64 Gram matrices, which
            cost little more than float32 ones there; float64 matrices to the SVD.
        square: Up to this min(m, n) the others that are not tall go to the SVD.
        even: Tall matrices go to the polynomials where the Cholesky pivots of the Gram matrix of half of their columns
            are all above this times the largest. It is about 1 - n / m for a random matrix of n columns and m rows.
        small: Where a larger share of the pivots is small a tall matrix goes to a float64 Gram matrix, others to the
            SVD.
    """

    aspect: float = 0.7
    tiny: float = 48
    square: float = 96
    even: float = 0.6
    small: float = 0.1


DEFAULTS = {"cpu": Constants(), "cuda": Constants()}


def location() -> Path:
    """Returns where the user's table is, or would be."""
    named = os.environ.get("GROUNDSTATE_POLAR_TABLE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "groundstate" / "polar.json"


@lru_cache(maxsize=8)
def constants(device: str) -> Constants:
    """Returns the constants for a kind of device (``"cpu"``, ``"cuda"``, ...): the user's, else the defaults."""
    return DEFAULTS.get(device, Constants())._replace(**_read(location()).get(device, {}))


def write(device: str, found: Constants) -> Path:
    """Writes the constants of one kind of device to the user's table, from where they count at once."""
    path = location()
    table = _read(path)
    table[device] = found._asdict()
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(".tmp")
    aside.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)
    constants.cache_clear()
    return path


def _read(path: Path) -> dict[str, dict[str, float]]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError) as error:
        return _ignored(path, str(error))
    rows = table.values() if isinstance(table, dict) else [None]
    for row in rows:
        if not isinstance(row, dict) or not all(k in Constants._fields and _is_number(v) for k, v in row.items()):
            return _ignored(path, f"it must map devices to numbers for {', '.join(Constants._fields)}, not {row!r}")
    return table


def _ignored(path: Path, why: str) -> dict[str, dict[str, float]]:
    warnings.warn(
        f"the table of polar routes {path} is not used ({why}): delete it, or run groundstate bench --tune",
        stacklevel=4,
    )
    return {}


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
