"""Runtimes that a test needs: it is skipped where one is absent, or fails where that is required."""

from __future__ import annotations

import os

import pytest

from runtime_tests.runtimes import get_runtime
from runtime_tests.workers.runtime import Runtime

__all__ = ["available"]

REQUIRED = "INTACT_REQUIRED_RUNTIMES"
"""Environment variable with the names of the runtimes that have to be here, or `all`."""


def available(name: str) -> Runtime:
    """Return a runtime; skip the test if it is absent, or fail it where it is required."""
    runtime = get_runtime(name)
    if reason := runtime.missing():
        required = os.environ.get(REQUIRED, "").split()
        message = f"{name} is not available: {reason}; {runtime.how_to_get}"
        (pytest.fail if name in required or "all" in required else pytest.skip)(message)
    return runtime
