"""Rules of runtimes and compilers other than onnxruntime on CPUs, as tables: one file per profile of this folder.

A file holds one `PROFILE`. That of a target has its name; the others belong to compilers to which nothing is exported.
"""

from __future__ import annotations

import functools
import importlib
import pkgutil
from collections.abc import Mapping

from runtime_tests.ort.lint.profiles.profile import Profile

__all__ = ["list_profiles"]


@functools.cache
def list_profiles() -> Mapping[str, Profile]:
    """Return every profile of the folder by name."""
    modules = (importlib.import_module(f"{__name__}.{info.name}") for info in pkgutil.iter_modules(__path__))
    profiles = [module.PROFILE for module in modules if hasattr(module, "PROFILE")]
    return {profile.name: profile for profile in sorted(profiles, key=lambda profile: profile.name)}
