"""Where one way to the polar factor overtakes another: the constants of the dispatch, per kind of device.

Every constant only decides speed: each route of `polar` knows its error and hands on what it cannot do. The defaults
for "cpu" were measured on one core with MKL; those for "cuda" are estimates from the cost of the routes. `tune` in
`polar_tune` measures them on the machine at hand, and `write` keeps the result in a file of the user::

    $GROUNDSTATE_POLAR_TABLE, else $XDG_CONFIG_HOME/groundstate/polar.json, else ~/.config/groundstate/polar.json

which is read once, when the first polar factor is asked for. Another table may change results in their last digits;
runs that must agree bit for bit need the same table, as they need the same machine.
"""

from __future__ import annotations

import json
import math
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from groundstate.errors import DataError


class Constants(NamedTuple):
    """The constants of one kind of device.

    Attributes:
        aspect: Matrices with min(m, n) <= aspect * max(m, n) count as tall.
        work: Tall ones with m n min(m, n) up to this go to the SVD.
        side: So do the others with min(m, n) below this.
        even: Tall matrices go to one Halley step where the evenness (tr G)^2 / (n tr G^2) of their Gram matrix G is
            above this. It is 1 where all n singular values agree, 1 / (1 + n / m) for a random matrix, and small where
            there are few large and many small ones, which cost a Gram matrix its accuracy.
        flat: Nearly square matrices below this evenness, tall ones below ``steep``, go to QDWH
        qdwh_side: from this min(m, n) on,
        steep: and below this evenness and that size nearly square ones go to the SVD. All else takes the eigenvectors
            of G.
        halley_below: QDWH goes over to polynomials once singular values are above this, relative to the largest.
    """

    aspect: float = 0.7
    work: float = 1e6
    side: int = 96
    even: float = 0.58
    flat: float = 0.25
    qdwh_side: int = 400
    steep: float = 0.13
    halley_below: float = 0.45


_DEFAULTS = {"cpu": Constants(), "cuda": Constants(work=1e5, side=32, qdwh_side=32, flat=1.0, halley_below=0.1)}


def location() -> Path:
    """Returns where the user's table is, or would be."""
    named = os.environ.get("GROUNDSTATE_POLAR_TABLE")
    if named:
        return Path(named)
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "groundstate" / "polar.json"


@lru_cache(maxsize=8)
def constants(device: str) -> Constants:
    """Returns the constants for a kind of device: the user's where there is a table, else the defaults.

    Args:
        device: ``"cpu"``, ``"cuda"``, ...; others than these have the defaults of ``"cuda"``.

    Raises:
        DataError: the user's table cannot be read, or holds something else than numbers for these constants.
    """
    default = _DEFAULTS.get(device, _DEFAULTS["cuda"])
    return default._replace(**_read(location()).get(device, {}))


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
    except (OSError, ValueError) as error:
        raise DataError(
            f"the table of polar routes {path} is not readable JSON ({error}): mend or delete it"
        ) from error
    rows = table.values() if isinstance(table, dict) else [None]
    for row in rows:
        if not isinstance(row, dict) or not all(k in Constants._fields and _is_number(v) for k, v in row.items()):
            raise DataError(
                f"the table of polar routes {path} must map devices to numbers for {Constants._fields}, got {row!r}: "
                "mend or delete it"
            )
    return table


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value >= 0
