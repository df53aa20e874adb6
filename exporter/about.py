"""The version of the installed distribution."""

from __future__ import annotations

from importlib import metadata

__all__ = ["__version__"]

DISTRIBUTION = "intact-export"

try:
    __version__ = metadata.version(DISTRIBUTION)
except metadata.PackageNotFoundError:  # run from a checkout that was never installed
    __version__ = "0+unknown"
