"""Folders for temporary files. The next run removes those of a run that was killed.

A folder is locked while its process lives; the lock goes with the process, however it ends.

Must not know: what the files are.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # without such locks nobody knows which folders are abandoned, and they stay
    fcntl = None  # type: ignore[assignment, unused-ignore]

__all__ = ["TemporaryFolder", "remove_abandoned"]

PREFIX, SUFFIX = ".intact-", ".tmp"
OURS = re.compile(r"\.intact-\w{8}\.tmp")
"""Names of these folders, which nothing else has."""


class TemporaryFolder:
    """A new folder, removed with this object, on leaving its context, or, after a kill, by the next run.

    path:   the folder. parent: where it is made, by default where temporary files go.
    raises: OSError.
    """

    def __init__(self, parent: Path | None = None) -> None:
        parent = Path(tempfile.gettempdir()) if parent is None else parent
        remove_abandoned(parent)
        while True:
            self.path = Path(tempfile.mkdtemp(dir=parent, prefix=PREFIX, suffix=SUFFIX))
            lock = _locked(self.path, wait=True)
            if fcntl is None or lock is not None or self.path.is_dir():
                break  # else another run took it for abandoned before it was locked
        self._end = weakref.finalize(self, _remove, self.path, lock)

    def __enter__(self) -> Path:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Remove the folder, as far as that is possible."""
        self._end()


def remove_abandoned(parent: Path, rescue: Callable[[Path], object] = str) -> None:
    """Remove the temporary folders in `parent` whose process has ended; rescue: gets each of them before that."""
    with suppress(OSError):  # a folder that cannot be listed has none that can be removed
        for path in [entry for entry in parent.iterdir() if OURS.fullmatch(entry.name)]:
            with suppress(OSError):
                found = path.lstat()
                is_mine = stat.S_ISDIR(found.st_mode) and (not hasattr(os, "getuid") or found.st_uid == os.getuid())
                if is_mine and (lock := _locked(path)) is not None:
                    rescue(path)
                    _remove(path, lock)


def _locked(path: Path, *, wait: bool = False) -> int | None:
    """Return the lock of a folder, None if it cannot be had or the folder is gone; wait: for who holds it."""
    if fcntl is None:
        return None
    try:
        lock = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        if os.path.samestat(os.fstat(lock), path.lstat()):
            return lock
    except OSError:
        pass
    os.close(lock)
    return None


def _remove(path: Path, lock: int | None) -> None:
    shutil.rmtree(path, ignore_errors=True)  # an error here would hide the one for which the folder goes
    if lock is not None:
        os.close(lock)
