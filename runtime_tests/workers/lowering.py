"""What runtimes share that execute a file which is made of the reference program.

Must not know: which runtimes there are.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from calibrators.errors import ModelError
from runtime_tests.workers.runtime import Array

__all__ = ["check_count", "copied", "unsigned"]

SHIFT = np.uint8(128)
"""Difference of a uint8 code and the int8 code of the same value."""


def copied(path: Path, to: Path) -> None:
    """Copy the file of a bundle; raise ModelError if it cannot be read."""
    try:
        shutil.copyfile(path, to)
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error.strerror}; get a fresh copy of the bundle.") from error


def check_count(found: int, expected: int, name: str) -> None:
    """Raise ModelError if a file gives another number of outputs than expected."""
    if found != expected:
        raise ModelError(f"{name} has another number of outputs than the model; get a fresh copy of the bundle.")


def unsigned(values: Array) -> Array:
    """Return int8 codes as the uint8 codes of the same values; other values as they are."""
    return values.view(np.uint8) ^ SHIFT if values.dtype == np.int8 else values
