"""The result of an export for Python: the content of report.json, which a notebook shows as the verdict box.

Must not know: how anything is computed.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.panel import Panel

from exporter.reporting.schema import validate_report
from exporter.reporting.terminal import verdict_panel

__all__ = ["Boxed", "Outcome"]

WIDTH = 100
HTML = '<pre style="line-height: 1.25; white-space: pre; overflow-x: auto">{code}</pre>'


class Boxed:
    """A result that Python shows as the box of the terminal, and notebooks in colour."""

    def panel(self) -> Panel:
        """Return the box."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return self._recorded().export_text().rstrip()

    def _repr_html_(self) -> str:
        return self._recorded().export_html(inline_styles=True, code_format=HTML)

    def _recorded(self) -> Console:
        console = Console(file=io.StringIO(), width=WIDTH, record=True, force_jupyter=False)  # which would display it
        console.print(self.panel())
        return console


class Outcome(Boxed, dict[str, Any]):
    """The content of report.json with the folder of the bundle; equal to a dict of the same content."""

    def __init__(self, report: dict[str, Any], folder: Path, *, page: str = "report") -> None:
        super().__init__(report)
        self.folder, self._page = folder, page

    @property
    def passed(self) -> bool:
        """Whether every gate passed."""
        return bool(self["verdict"] == "pass")

    def panel(self) -> Panel:
        return verdict_panel(validate_report(self), self.folder, page=self._page)
