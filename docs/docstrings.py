"""Griffe extension: lines `name: text` of the project's docstrings become list items of the API reference."""

from __future__ import annotations

import re
from typing import Any

import griffe

__all__ = ["NamedLines", "listed"]

ITEM = re.compile(r"^(?P<names>\w+(?:, \w+)*):\s+(?P<text>\S.*)$")


class NamedLines(griffe.Extension):
    """Rewrite every docstring while the sources are read."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one function, class or module."""
        if obj.docstring is not None:
            obj.docstring.value = listed(obj.docstring.value)


def listed(docstring: str) -> str:
    """Return a docstring whose lines `name: text`, with their indented continuations, are a Markdown list."""
    lines: list[str] = []
    in_item = False
    for line in docstring.splitlines():
        found = ITEM.match(line)
        if found:
            names = ", ".join(f"**{name}**" for name in found["names"].split(", "))
            lines += [] if in_item else [""]
            lines.append(f"- {names}: {found['text']}")
        elif in_item and line.startswith("  "):
            lines.append(f"  {line.strip()}")
        else:
            lines.append(line)
        in_item = bool(found) or (in_item and line.startswith("  "))
    return "\n".join(lines)
