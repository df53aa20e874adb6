"""The terminal: one message and an exit code for an error, and tables.

Must not know: commands, how anything is computed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import typer
from pydantic_core import to_json
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from calibrators.errors import SPELLING, InputError, IntactError, first_line, printable

__all__ = [
    "INTERNAL_FAULT",
    "INTERRUPTED",
    "check_folder_of",
    "described",
    "exit_code_of",
    "print_json",
    "print_table",
    "reported_errors",
]

INTERNAL_FAULT = 70
"""EX_SOFTWARE of sysexits.h: never one of the codes that say something about the input."""
INTERRUPTED = 130
"""128 + SIGINT, as shells report it."""
LONGEST = 2000
"""Characters of a message; of a longer one, beginning and end are shown."""


@contextmanager
def reported_errors(*, debug: bool) -> Iterator[None]:
    """Turn exceptions into one message on stderr and their exit code; debug: show the traceback first.

    Inside, messages write arguments as flags.
    """
    before = SPELLING.set(_as_flag)
    try:
        yield
    except typer.Exit:
        raise
    except KeyboardInterrupt as interrupt:
        _complain(f"interrupted; {str(interrupt) or 'nothing was written'}.", "")
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise  # nobody reads the output any more: not a fault, see main
    except Exception as error:
        if debug:
            Console(stderr=True).print_exception()
        message, prefix, code = described(error)
        _complain(message, prefix)
        raise typer.Exit(code) from error
    finally:
        SPELLING.reset(before)


def _as_flag(name: str, value: object) -> str:
    from exporter.job import as_flag  # which loads the settings: not before there is something to say

    return as_flag(name, value)


def described(error: Exception) -> tuple[str, str, int]:
    """Return the message of an error, the prefix of the message, and the exit code."""
    if isinstance(error, IntactError):
        return str(error), "error: ", error.exit_code
    if isinstance(error, OSError):
        place = f" ({error.filename})" if error.filename else ""
        reason = (
            f"{error.strerror or error}{place}; nothing was written. Free some space, or check permissions and paths."
        )
        return reason, "error: ", InputError.exit_code
    reason = (
        f"internal error: {type(error).__name__}: {first_line(error)}; run again with --debug and report the traceback."
    )
    return reason, "", INTERNAL_FAULT


def exit_code_of(error: BaseException) -> int:
    """Return the exit code of the command that ends with an error."""
    return described(error)[2] if isinstance(error, Exception) else INTERRUPTED


def _complain(message: str, prefix: str) -> None:
    text = printable(message)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST // 2]} [...] {text[-LONGEST // 2 :]}"
    Console(stderr=True).print(Text.assemble((prefix, "bold red"), text), soft_wrap=True)


def check_folder_of(path: Path) -> None:
    """Check that a file can be put where it is asked for, before any work.

    raises: InputError if its folder does not exist, or if it is a folder itself.
    """
    if path.is_dir():
        raise InputError(f"{path} is a folder; give the name of a file.")
    if not path.absolute().parent.is_dir():
        raise InputError(f"{path} cannot be written: there is no folder {path.parent}; make it first.")


def print_json(value: object) -> None:
    """Print a value as JSON: dataclasses as objects, numbers that are not finite as null."""
    print(to_json(value, indent=2, inf_nan_mode="null").decode())


def print_table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]], *, empty: str = "", **style: Any) -> None:
    """Print a table whose first column is bold, or `empty` if it has no rows; style: arguments of rich's Table."""
    table = Table(title_justify="left", **style)
    for column in columns:
        table.add_column(column, overflow="fold")  # a narrow terminal breaks words rather than cutting them
    for row in rows:
        first, *others = (escape(printable(text)) for text in row)
        table.add_row(f"[bold]{first}[/bold]", *others)
    if rows or empty:
        Console().print(table if rows else empty)
