"""The verdict where CI services show it: a summary in Markdown, and annotations of the workflow for failed gates.

Must not know: how anything is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from rich.text import Text

from exporter.reporting.headline import verdict_title
from exporter.reporting.markdown import escaped, markdown_table
from exporter.reporting.schema import Report
from exporter.reporting.terminal import summary_rows

__all__ = ["job_summary", "workflow_commands"]


def job_summary(report: Report, folder: Path) -> str:
    """Return the verdict box as Markdown, for the summary page of a CI job; folder: the bundle."""
    rows = [(name, Text.from_markup(value).plain) for name, value in _rows(report)]
    title = f"## {escaped(f'{verdict_title(report)}: {folder.name}')}"
    return f"{title}\n\n{markdown_table(('', ''), rows)}\n"


def workflow_commands(report: Report) -> Iterator[str]:
    """Yield a workflow command of GitHub for every failed gate."""
    for name, value in _rows(report):
        if name == "failed gate":
            yield f"::error title=intact::{_data(Text.from_markup(value).plain)}"


def _rows(report: Report) -> Iterator[tuple[str, str]]:
    for name, value in summary_rows(report):
        yield Text.from_markup(name).plain, value


def _data(text: str) -> str:
    """Escape the data of a workflow command.

    source: GitHub, Workflow commands for GitHub Actions (actions/toolkit, command.ts, escapeData).
    """
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")
