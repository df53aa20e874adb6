"""Limit the memory that a command takes for the files of a stranger.

Must not know: what the files hold, commands.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from calibrators.errors import InputError

try:
    import resource
except ImportError:  # Windows has no such limits
    resource = None  # type: ignore[assignment, unused-ignore]

__all__ = ["limited_memory"]

LEAST, PER_BYTE = 1 << 30, 4
"""Bytes that any file may take, and further ones for each of its own."""

STACK_BYTES, STACKS = 8 << 20, 4
"""Bytes that the stack of a thread counts, and threads per processor, which libraries start when they please."""

REFUSED = ("allocate memory", "failed to allocate", "bad_alloc", "not enough memory")
"""Words by which libraries say that they got no memory."""


@contextmanager
def limited_memory(path: Path, gib: float | None = None) -> Iterator[None]:
    """Give the process so much memory inside, by default as much as a file, or a folder, of this size should need.

    Import what is needed before. Nothing is limited where the system does not tell how much the process has (only Linux
    does).

    raises: InputError where the body asks for more.
    """
    allowed = LEAST + PER_BYTE * _bytes_of(path) if gib is None else int(gib * 2**30)
    taken = _taken()
    if resource is None or taken is None:
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    limit = taken + allowed + STACK_BYTES * STACKS * (os.cpu_count() or 1)
    resource.setrlimit(resource.RLIMIT_DATA, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))
    try:
        yield
    except Exception as error:
        if not isinstance(error, MemoryError) and not any(words in str(error).lower() for words in REFUSED):
            raise
        raise InputError(
            f"{path} takes more than {allowed / 2**30:.2g} GiB of memory, the limit for files of this size. Large "
            "networks may need more: allow it with --memory GIB, if you know who made the file."
        ) from error
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _taken() -> int | None:
    """Return the bytes of data that the process has, None where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[5]) * os.sysconf("SC_PAGE_SIZE")
    return None


def _bytes_of(path: Path) -> int:
    """Return the bytes on disk of a file or of the files in a folder."""
    paths = [path, *(path.rglob("*") if path.is_dir() else ())]
    return sum(getattr(each.lstat(), "st_blocks", 0) for each in paths) * 512
