"""Check archives and pickles before torch reads them: what its readers accept may still take all memory or all time.

Must not know: what the files hold.
"""

from __future__ import annotations

import io
import pickletools
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import IO

from calibrators.errors import ModelError

__all__ = ["check_checkpoint", "check_pickle", "check_sizes"]

DEPTH = 8
"""Tuples in tuples of the deepest pickle that is read; those of tensors have 3. A tuple may hold another one twice, so
that each level doubles the time in which it is hashed or written."""

ALLOCATING = frozenset({"builtins bytearray", "__builtin__ bytearray"})
"""Functions that torch allows and that take as much memory as they are told to."""

LEGACY = 5
"""Pickles at the beginning of a checkpoint that is no archive."""


def check_checkpoint(path: Path) -> None:
    """Check the pickles of a checkpoint, and that it is no archive that unfolds.

    raises: ModelError.
    """
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as archive:
                check_sizes(path, archive.infolist())
                for name in archive.namelist():
                    if name.endswith(".pkl"):
                        check_pickle(path, io.BytesIO(archive.read(name)))
        except (zipfile.BadZipFile, OSError, ValueError, RuntimeError, EOFError) as error:
            raise ModelError(f"{path} is damaged or not a checkpoint ({error}); save it again.") from error
        return
    with path.open("rb") as stream:
        for _ in range(LEGACY):
            check_pickle(path, stream)


def check_sizes(path: Path, members: Iterable[zipfile.ZipInfo]) -> None:
    """Refuse an archive whose members unfold to more than it holds; torch stores them as they are.

    raises: ModelError.
    """
    promised, size = sum(info.file_size for info in members), path.stat().st_size
    if promised > size:
        raise ModelError(f"{path} has {size:,} bytes, but its members promise {promised:,}; save it again with torch.")


def check_pickle(path: Path, stream: IO[bytes]) -> None:
    """Read the instructions of one pickle, without executing them; one that is damaged is left to its reader.

    raises: ModelError for tuples in many tuples, and for functions that take memory as they are told to.
    """
    stack: list[int] = []  # for each value how deep tuples are nested in it
    marks: list[int] = []
    memo: dict[object, int] = {}
    try:
        for opcode, argument, _ in pickletools.genops(stream):
            name = opcode.name
            if name == "GLOBAL" and argument in ALLOCATING:
                raise ModelError(f"{path} allocates memory while it is loaded ({argument}); save the state_dict alone.")
            if name == "MARK":
                marks.append(len(stack))
                continue
            if name.endswith("PUT"):
                memo[argument] = stack[-1]
                continue
            taken = _taken(opcode.stack_before, stack, marks)
            depth = 1 + max(taken, default=0) if "TUPLE" in name else memo[argument] if name.endswith("GET") else 0
            if depth > DEPTH:
                raise ModelError(
                    f"{path} holds tuples in {depth} tuples, which no state has; save the state_dict alone."
                )
            stack += [depth] * len(opcode.stack_after)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError):
        return


def _taken(before: list[pickletools.StackObject], stack: list[int], marks: list[int]) -> list[int]:
    """Remove what an instruction takes from the stack, and return it."""
    count = len(before)
    if pickletools.markobject in before:
        count = len(stack) - marks.pop() + before.index(pickletools.markobject)
    if count > len(stack):
        raise IndexError
    taken = stack[len(stack) - count :]
    del stack[len(stack) - count :]
    return taken
