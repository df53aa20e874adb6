"""Griffe extension: lines `name: text` of the project's docstrings become list items of the API reference."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).resolve().parent))

from generate import listed

__all__ = ["NamedLines"]


class NamedLines(griffe.Extension):
    """Rewrite every docstring while the sources are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one function, class or module."""
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)
