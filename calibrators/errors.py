"""All errors that this project raises on purpose, with the exit codes of the command.

    IntactError
    ├── InputError            exit code 2: unusable input
    │   ├── UnknownNameError  a name that no registry holds (with "did you mean")
    │   ├── ModelError        the model, its factory or its checkpoint
    │   └── DataError         the calibration or evaluation data
    └── ExportError           exit code 3: this model cannot be exported to this target

A message says what was seen, where, and what to do next.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from pathlib import Path

__all__ = [
    "SPELLING",
    "DataError",
    "ExportError",
    "InputError",
    "IntactError",
    "ModelError",
    "UnknownNameError",
    "argument",
    "counted",
    "first_line",
    "is_text",
    "no_file",
    "printable",
]

SHOWN = 40
"""Names listed in a message."""

Spelling = Callable[[str, object], str]
"""A function that writes an argument as the caller gives it: its name, and a value, None for the name alone."""


def _as_keyword(name: str, value: object) -> str:
    return name if value is None else f"{name}={value!r}"


SPELLING: ContextVar[Spelling] = ContextVar("spelling", default=_as_keyword)
"""How messages write arguments: as keywords of Python, unless the command line puts its own way here."""


def argument(name: str, value: object = None) -> str:
    """Return an argument of exporter.export as the caller gives it, for a message.

    In Python that is `weight_bits=4`, on the command line `--weight-bits 4`; without a value, the name alone.
    """
    return SPELLING.get()(name, value)


class IntactError(Exception):
    """Base of all errors; never raised itself."""

    exit_code = 2


class InputError(IntactError):
    """Bad input or usage."""


class ModelError(InputError):
    """The model cannot be loaded or captured as given."""


class DataError(InputError):
    """The data cannot be used: empty, wrong shape or dtype, not finite, labels missing."""


class UnknownNameError(InputError):
    """A name that no registry holds; the message lists near misses first, then the known names."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        known = sorted(known)
        near = difflib.get_close_matches(name, [other for other in known if other != name], n=3)
        guess = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
        shown = f"{', '.join(known[:SHOWN])}{', ...' if len(known) > SHOWN else ''}"
        super().__init__(f"unknown {kind} {name!r}.{guess} Known: {shown or 'none'}.")


class ExportError(IntactError):
    """The model contains something that the target cannot represent."""

    exit_code = 3


def counted(number: int, noun: str) -> str:
    """Return a number and its noun, with a plural s where it is not 1."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not blank, at most 300 characters of it."""
    return next((line.strip()[:300] for line in str(error).splitlines() if line.strip()), "no message")


def printable(text: str) -> str:
    """Return text in which each character that a terminal would obey, or cannot show, is written as an escape.

    Names come from files, which may be anyone's.
    """
    return "".join(c if c.isprintable() or c == "\n" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    byte = ord(character) - 0xDC00  # Python's form of a byte in a name that is no UTF-8
    return f"\\x{byte:02x}" if 0x80 <= byte < 0x100 else character.encode("unicode_escape").decode()


def no_file(path: Path) -> str:
    """Return the sentence that says why `path` names no file, with a guess from the files beside it."""
    folder = path.parent
    if path.is_dir():
        return f"{path} is a folder, not a file."
    if path.exists():
        return f"{path} is not a regular file."
    if not folder.is_dir():
        return f"{path} does not exist: there is no folder {folder}."
    names = [entry.name for entry in folder.iterdir() if entry.name != path.name]  # a link that leads nowhere
    near = difflib.get_close_matches(path.name, names, n=1)
    return f"{path} does not exist{f'; did you mean {str(folder / near[0])!r}?' if near else '.'}"


def is_text(value: str) -> bool:
    """Return whether a file can hold a text: UTF-8, which bytes of a command line may not be, without NUL."""
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in value
