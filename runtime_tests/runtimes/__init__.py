"""Runtimes in which a file can be proved: one file per runtime, found in this folder.

A file holds one `RUNTIME`. Adding a runtime is adding a file; nothing else changes.

Must not know: which runtimes there are, torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable

from calibrators.errors import InputError, UnknownNameError
from runtime_tests.workers.runtime import Runtime

__all__ = ["available_runtimes", "get_runtime", "list_runtimes"]


def list_runtimes() -> tuple[Runtime, ...]:
    """Return every runtime of the folder, by name, each followed by its variants."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    runtimes = sorted((module.RUNTIME for module in modules), key=lambda runtime: runtime.name)
    return tuple(each for one in runtimes for each in (one, *map(one.variant, one.variants)))


def get_runtime(name: str) -> Runtime:
    """Return the runtime called `name`, or `NAME==VARIANT`.

    raises: UnknownNameError if there is none; InputError for a variant that it does not have.
    """
    base, separator, variant = name.partition("==")
    runtimes = {runtime.name: runtime for runtime in list_runtimes()}
    if base not in runtimes:
        raise UnknownNameError("runtime", name, runtimes)
    return runtimes[base].variant(variant) if separator else runtimes[base]


def available_runtimes(names: Iterable[str]) -> tuple[Runtime, ...]:
    """Return the runtimes called `names`, each once.

    raises: what get_runtime raises; InputError for a runtime that is not available here, saying how to get it.
    """
    runtimes = tuple(map(get_runtime, dict.fromkeys(names)))
    for runtime in runtimes:
        if reason := runtime.missing():
            raise InputError(f"the runtime {runtime.name} is not available: {reason}; {runtime.how_to_get}.")
    return runtimes
