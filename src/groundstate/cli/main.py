"""The command ``groundstate``: its verbs, and how an error becomes one line and an exit code.

Exit codes: 0 done, 1 a threshold failed, 2 usage, 3 data or checksum, 4 non-finite training, 5 disk or memory,
70 an error of groundstate itself, 75 interrupted, saved and resumable, 130 and 143 ended by a signal at once.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from groundstate import __version__
from groundstate.cli import bench, compare, compress, energies, measure, report, train
from groundstate.cli.console import error_line, plain_warnings
from groundstate.errors import GroundstateError, nearest

_UsageException: type[Exception] = typer.BadParameter.__mro__[2]  # the base of all that the option parser raises
_EPILOG = (
    "Exit codes: 0 done, 1 a threshold failed, 2 usage, 3 data or checksum, 4 non-finite training, "
    "5 disk or memory, 70 an error of groundstate itself, 75 interrupted, saved and resumable."
)


class Commands(TyperGroup):
    """The verbs; every error of a verb is one line on stderr."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        """Runs the command line; ends the process with the exit code."""
        arguments = list(sys.argv[1:] if args is None else args)
        if not arguments:
            self.main(["--help"], prog_name, complete_var, standalone_mode=False, **extra)
            sys.exit(2)
        with plain_warnings():
            code = self._code(arguments, prog_name or "groundstate", complete_var, extra)
        if not standalone_mode:
            return code
        sys.exit(code)

    def _code(self, arguments: list[str], prog_name: str, complete_var: str | None, extra: dict[str, Any]) -> int:
        try:
            code = super().main(arguments, prog_name, complete_var, standalone_mode=False, **extra)
            return code if isinstance(code, int) else 0
        except (KeyboardInterrupt, typer.Abort):
            return 130
        except Exception as error:
            if "--debug" in arguments:
                traceback.print_exc()
            message, code = explain(error)
            error_line(f"error: {message}")
            return code


def explain(error: Exception) -> tuple[str, int]:
    """Returns the message and the exit code of an error.

    >>> from groundstate.errors import DataError
    >>> explain(DataError("train-images is damaged"))
    ('train-images is damaged', 3)
    >>> explain(MemoryError())[1]
    5
    """
    if isinstance(error, GroundstateError):
        return str(error), error.exit_code
    if isinstance(error, _UsageException):
        return _usage(error), 2
    if isinstance(error, MemoryError) or _out_of_memory(error):
        return "out of memory: use a smaller --batch-size or model, or fewer --jobs", 5
    if isinstance(error, OSError):
        where = f" {error.filename}" if error.filename else ""
        reason = error.strerror or error
        return f"cannot read or write{where} ({reason}): free some space, or check the path and its permissions", 5
    return f"unexpected {type(error).__name__}: {error} (an error of groundstate: --debug shows where)", 70


def _usage(error: Any) -> str:
    possible = getattr(error, "possibilities", None) or []
    message = str(error.message if possible else error.format_message()).rstrip(".")
    if not possible and "no such option" in message.lower():
        context = getattr(error, "ctx", None)
        known = [o for p in context.command.params for o in p.opts] if context is not None else []
        return f"{message}.{nearest(str(getattr(error, 'option_name', '')), known)}"
    return f"{message}. Did you mean {possible[0]!r}?" if possible else message


def _out_of_memory(error: Exception) -> bool:
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)


app = typer.Typer(
    name="groundstate",
    cls=Commands,
    help="Measure and minimize the energy of neural networks.",
    epilog=_EPILOG,
    pretty_exceptions_enable=False,
    add_completion=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"groundstate {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Measure and minimize the energy of neural networks."""


for _function in (
    train.train,
    compare.compare,
    measure.measure,
    compress.compress,
    energies.energies,
    report.report,
    bench.bench,
):
    app.command()(_function)


def run() -> None:
    """Entry point of the command ``groundstate``."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError, ValueError):
            stream.reconfigure(errors="backslashreplace")  # pyright: ignore[reportAttributeAccessIssue]
    try:
        app()
    except BrokenPipeError:  # whoever read stdout has gone
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
