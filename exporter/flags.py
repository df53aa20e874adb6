"""Flags that several commands share.

Must not know: commands, settings of an export.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

__all__ = ["RUNNING", "Debug", "Json", "Memory", "Out", "Overwrite", "Quiet", "Sets", "Summary", "option"]

RUNNING = "Running"


def option(help: str, *names: str, metavar: str = "", panel: str | None = None) -> Any:
    """Return a flag without a shown default."""
    return typer.Option(*names, help=help, metavar=metavar, rich_help_panel=panel, show_default=False)


Out = Annotated[Path, option("Folder for the bundle; it must be empty or not exist yet.", "--out", metavar="DIR")]
Overwrite = Annotated[bool, option("Replace an earlier bundle in DIR.", "--overwrite")]
Quiet = Annotated[bool, option("Show no progress.", "--quiet", "-q", panel=RUNNING)]
Debug = Annotated[bool, option("Show the traceback of an error.", "--debug", panel=RUNNING)]
Json = Annotated[bool, option("Print the result as JSON on stdout, and nothing else.", "--json", panel=RUNNING)]
Memory = Annotated[
    float | None,
    option(
        "Memory in GiB (2^30 bytes) that the file may take; by default 1 GiB and four times its size.",
        "--memory",
        metavar="GIB",
        panel=RUNNING,
    ),
]
Summary = Annotated[
    Path | None,
    option(
        "Write the verdict as Markdown too; on GitHub it goes to the job's summary in any case.",
        "--summary",
        metavar="FILE",
        panel=RUNNING,
    ),
]
Sets = Annotated[
    list[str] | None,
    option(
        "Set any setting of the export or option of the method; repeatable: `--set q=99.99`.",
        "--set",
        metavar="KEY=VALUE",
        panel=RUNNING,
    ),
]
