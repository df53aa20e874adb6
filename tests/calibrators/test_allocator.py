"""Freed memory stays in the process, unless the environment says otherwise or the C library cannot."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calibrators.allocator import CHOSEN_BY_USER, keep_freed_memory

ROOT = Path(__file__).parents[2]

CHILD = """
import resource, sys
from calibrators.allocator import keep_freed_memory
import numpy as np
print(keep_freed_memory() if sys.argv[1] == "keep" else None)
np.ones(12 << 20, np.float32)  # 48 MiB, more than glibc ever keeps by itself
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    np.ones(12 << 20, np.float32)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

glibc = pytest.mark.skipif(
    not hasattr(os, "confstr") or "CS_GNU_LIBC_VERSION" not in os.confstr_names, reason="the C library is not glibc"
)


def _run(mode: str, **variables: str) -> tuple[str, int]:
    """Return what the function returned in a new process, and the page faults of making an array 20 times."""
    ours = {name: value for name, value in os.environ.items() if name not in (*CHOSEN_BY_USER, "GLIBC_TUNABLES")}
    command = [sys.executable, "-c", CHILD, mode]
    done = subprocess.run(command, cwd=ROOT, env=ours | variables, capture_output=True, text=True, check=True)
    returned, faults = done.stdout.split()
    return returned, int(faults)


@glibc
def test_memory_is_used_again() -> None:
    (kept, fewer), (_, many) = _run("keep"), _run("as it is")
    assert kept == "True"
    assert fewer < many / 10


@glibc
@pytest.mark.parametrize(
    "variables", [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.top_pad=0"}]
)
def test_the_users_own_thresholds_stay(variables: dict[str, str]) -> None:
    assert _run("keep", **variables)[0] == "False"


@pytest.mark.parametrize("refusal", [OSError, TypeError, AttributeError])
def test_other_c_libraries_are_left_alone(refusal: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: object) -> object:
        raise refusal

    for name in (*CHOSEN_BY_USER, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ctypes, "CDLL", refuse)
    assert keep_freed_memory.__wrapped__() is False
