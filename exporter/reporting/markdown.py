"""Text and tables in GitHub's Markdown.

Must not know: reports.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["escaped", "markdown_table"]


def markdown_table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table; cells may hold any text."""
    head = [escaped(column) for column in columns]
    lines = [head, ["---"] * len(head), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """Return a text on one line, without whatever Markdown or HTML would take for markup."""
    plain = " ".join(text.split()).replace("&", "&amp;").replace("<", "&lt;")
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", plain)
