"""What a verb writes, and where: results to stdout, everything else to stderr.

``--json`` prints one document on stdout and no table; ``--quiet`` leaves only errors (and that document). Text from
files (names of tensors, messages of runs) is untrusted: control characters are dropped, and nothing is read as markup.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress
    from rich.table import Table
    from rich.text import Text

SCHEMA = 1
_LINE_EVERY = 10.0  # seconds between plain lines where nothing else is said
_PIPE_WIDTH = 200
_LABEL = 30  # characters beside a bar


@dataclass(frozen=True)
class Output:
    """The two streams of a verb.

    Attributes:
        json: Print one JSON document in the place of tables.
        quiet: Print no table, progress or note.
    """

    json: bool = False
    quiet: bool = False

    def document(self, verb: str, body: dict[str, Any]) -> None:
        """Prints ``{"schema": 1, "verb": verb, **body}`` where ``--json`` asks for it; NaN and infinity become text."""
        if self.json:
            from groundstate.training.recorder import plain_json

            text = json.dumps({"schema": SCHEMA, "verb": verb, **plain_json(body)}, indent=1, allow_nan=False)
            print(text, flush=True)

    def show(self, *parts: Table | Text | str) -> None:
        """Prints tables and lines of text on stdout, unless ``--json`` or ``--quiet``."""
        if self.json or self.quiet:
            return
        console = _console(stderr=False)
        for part in parts:
            console.print(safe(part, keep_lines=True) if isinstance(part, str) else part)

    def note(self, text: str) -> None:
        """Prints a line on stderr, unless ``--quiet``."""
        if not self.quiet:
            error_line(text)

    @contextmanager
    def progress(self, total: float, unit: str) -> Iterator[Meter]:
        """Yields a `Meter` that goes to ``total``: a bar on a terminal, plain lines elsewhere, nothing if quiet."""
        console = _console(stderr=True)
        if self.quiet or not console.is_terminal or console.is_dumb_terminal:
            yield Meter(total, unit, self.quiet, None)
            return
        with _bar(console) as bar:
            meter = Meter(total, unit, False, bar)
            with _warnings_to(lambda text: bar.console.print(safe(text))):
                yield meter


class Meter:
    """How far the work has come."""

    def __init__(self, total: float, unit: str, quiet: bool, bar: Progress | None) -> None:
        self.total, self.unit, self.quiet, self.bar = total, unit, quiet, bar
        self.began = self.said = time.monotonic()
        self.first: float | None = None
        self.task = bar.add_task(unit, total=total) if bar is not None else None

    def update(self, done: float, text: str = "", total: float | None = None) -> None:
        """Moves to ``done``; off a terminal this says something only every ten seconds."""
        self.total = self.total if total is None else total
        if self.first is None:
            self.first = done
        if self.bar is not None and self.task is not None:
            shown = str(safe(text, longest=_LABEL)) or self.unit
            self.bar.update(self.task, completed=done, total=self.total, description=shown)
        elif time.monotonic() - self.said > _LINE_EVERY:
            self.line(f"{self.unit} {done:g}/{self.total:g}  {text}{self._eta(done)}")

    def line(self, text: str, *, crop: bool = False) -> None:
        """Prints a line of its own, above the bar where there is one; ``crop`` cuts it to the width of a terminal."""
        self.said = time.monotonic()
        if self.quiet:
            return
        if self.bar is not None:
            self.bar.console.print(safe(text), no_wrap=crop, overflow="ellipsis" if crop else None)
        else:
            error_line(text)

    def _eta(self, done: float) -> str:
        first = self.first or 0.0
        if done <= first:
            return ""
        left = (self.total - done) * (time.monotonic() - self.began) / (done - first)
        return f"  {left:.0f} s left"


def _bar(console: Console) -> Progress:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("ETA", markup=False),
        TimeRemainingColumn(),
        console=console,
        transient=True,
    )


def _console(stderr: bool) -> Console:
    import os

    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    piped = not stream.isatty() and "COLUMNS" not in os.environ
    return Console(stderr=stderr, markup=False, highlight=False, emoji=False, width=_PIPE_WIDTH if piped else None)


def width() -> int:
    """Returns the columns of stdout."""
    return _console(stderr=False).width


def safe(text: object, *, keep_lines: bool = False, longest: int = 2000) -> Any:
    r"""Returns untrusted text as a rich ``Text``: no control characters, no markup.

    >>> str(safe("[bold]a\x1b[31m"))
    '[bold]a[31m'
    """
    from rich.text import Text

    from groundstate.report.text import plain

    lines = str(text).split("\n") if keep_lines else [str(text)]
    return Text("\n".join(_indent(line) + plain(line, longest) for line in lines))


def _indent(line: str) -> str:
    return " " * (len(line) - len(line.lstrip(" ")))


def error_line(text: str) -> None:
    """Prints one line of printable text on stderr."""
    from groundstate.report.text import plain

    print(plain(text, 4000), file=sys.stderr, flush=True)


def table(columns: Iterable[str], rows: Iterable[Iterable[object]], *, title: str = "", left: int = 1) -> Table:
    """Returns a rich table of untrusted cells; all columns but the first ``left`` are right-aligned."""
    from rich import box
    from rich.table import Table

    made = Table(box=box.SIMPLE_HEAD, title=safe(title) if title else None, title_justify="left", title_style="bold")
    for i, name in enumerate(columns):
        made.add_column(safe(name), justify="left" if i < left else "right", overflow="fold")
    for row in rows:
        made.add_row(*[safe(cell) for cell in row])
    return made


def figure(value: object) -> str:
    """Returns a number for a table: four significant digits, ``-`` where there is none.

    >>> figure(12.34567), figure(None), figure(7), figure(1234567.0)
    ('12.35', '-', '7', '1.235e+06')
    """
    if value is None or value == "":
        return "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}" if isinstance(value, float) else str(value)


def percent(value: object) -> str:
    """Returns a share as a percentage with two decimals.

    >>> percent(0.97222), percent(None)
    ('97.22 %', '-')
    """
    return f"{100 * value:.2f} %" if isinstance(value, int | float) else "-"


@contextmanager
def _warnings_to(say: Any) -> Iterator[None]:
    before = warnings.showwarning
    warnings.showwarning = lambda message, *_, **__: say(f"warning: {message}")
    try:
        yield
    finally:
        warnings.showwarning = before


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Within this context a warning is one line on stderr, without the place in the code."""
    with _warnings_to(error_line):
        yield
