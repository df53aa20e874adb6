"""Integer runtimes as data: one file per target, found in this folder.

A file holds one `TARGET`. Adding a runtime is adding a file; nothing else changes.
"""

from __future__ import annotations

import importlib
import pkgutil

from calibrators.errors import UnknownNameError
from calibrators.grid.target import Target

__all__ = ["DEFAULT_TARGET", "get_target", "list_targets"]

DEFAULT_TARGET = "ort-cpu"
"""Name of the target of an export that names none: its files are exact on every processor."""


def list_targets() -> tuple[Target, ...]:
    """Return every target of the folder, by name."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    return tuple(sorted((module.TARGET for module in modules), key=lambda target: target.name))


def get_target(name: str) -> Target:
    """Return the target called `name`; raise UnknownNameError if there is none."""
    targets = {target.name: target for target in list_targets()}
    if name not in targets:
        raise UnknownNameError("target", name, targets)
    return targets[name]
