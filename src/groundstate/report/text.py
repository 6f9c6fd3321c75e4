"""Text from run folders made safe for each place where it appears.

Labels, paths and messages in a run folder may come from anywhere. Control characters (terminal escapes, bidirectional
overrides) are removed once, at loading; what each medium needs beyond that is here. HTML is escaped by jinja2.
"""

from __future__ import annotations

import math
import unicodedata

_FORMULA = ("=", "+", "-", "@", "\t", "\r")
_LONGEST = 300
TIMES = "\N{MULTIPLICATION SIGN}"


def plain(value: object, longest: int = _LONGEST) -> str:
    r"""Returns printable text in one line: control, format and surrogate characters are dropped, long text is cut.

    >>> plain("a\x1b[31mb\nc")
    'a[31mb c'
    """
    text = " ".join(str(value).split())
    text = "".join(c for c in text if unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co", "Cn"))
    return text if len(text) <= longest else text[: longest - 1] + "…"


def csv_cell(value: object) -> object:
    """Returns a CSV cell: numbers stay numbers, missing ones are empty, text cannot start a spreadsheet formula.

    >>> csv_cell("=1+1"), csv_cell(-1.5), csv_cell(float("nan")), csv_cell(None)
    ("'=1+1", -1.5, '', '')
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    if isinstance(value, int | float):
        return value
    text = plain(value)
    return "'" + text if text.startswith(_FORMULA) else text


def figure_label(value: object, longest: int = 44) -> str:
    r"""Returns text for matplotlib: no mathematics mode, and no leading underscore (which hides a label).

    >>> figure_label("_a$b$")
    ' _a\\$b\\$'
    """
    text = plain(value, longest).replace("$", r"\$")
    return " " + text if text.startswith("_") else text


def number(value: object) -> float:
    """Reads a JSON number; a missing one is NaN, a non-finite one may be stored as text.

    >>> number("inf"), number(None), number(3)
    (inf, nan, 3.0)
    """
    if isinstance(value, bool) or value is None:
        return math.nan
    if isinstance(value, int | float | str):
        try:
            return float(value)
        except (ValueError, OverflowError):
            return math.nan
    return math.nan


def show(value: float, digits: int = 3) -> str:
    """Returns a number for people: about ``digits`` significant digits, ``n/a`` where there is none.

    >>> show(0.0001234), show(1234567.0), show(12.345), show(float("nan")), show(0.0)
    ('1.23e-04', '1,234,567', '12.3', 'n/a', '0')
    """
    if math.isnan(value):
        return "n/a"
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e9:
        return f"{value:.{digits - 1}e}"
    if size >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{max(0, digits - 1 - math.floor(math.log10(size)))}f}"


def plus_minus(value: float, error: float) -> str:
    """Returns a number with its error, which has two digits if it begins with 1 or 2, else one.

    A number whose error is not known stands alone.

    >>> plus_minus(180.1698, 1.969), plus_minus(1234.5, 60.0), plus_minus(2.0, math.nan), plus_minus(math.nan, 1.0)
    ('180.2 ± 2.0', '1,230 ± 60', '2.00', 'n/a')
    """
    if not (math.isfinite(value) and math.isfinite(error)):
        return show(value)
    if error <= 1e-6 * abs(value):  # rounding, no spread
        return f"{show(value)} ± 0"
    if not 1e-3 <= abs(value) < 1e6:
        return f"{show(value)} ± {error:.1g}"
    place = math.floor(math.log10(error))
    digits = (1 if error < 3 * 10.0**place else 0) - place
    return f"{round(value, digits):,.{max(0, digits)}f} ± {round(error, digits):,.{max(0, digits)}f}"


def p_value(p: float) -> str:
    """Returns a p value for people.

    >>> p_value(0.0004), p_value(0.0625), p_value(float("nan"))
    ('<0.001', '0.062', 'n/a')
    """
    if math.isnan(p):
        return "n/a"
    return "<0.001" if p < 1e-3 else f"{p:.3f}"
