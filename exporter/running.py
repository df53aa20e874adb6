"""Run what `intact export` asks for, print the verdict, and exit with its code.

Must not know: flags, how anything is computed.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console

from exporter.console import check_folder_of, print_json, print_table

if TYPE_CHECKING:
    from calibrators.execution.ranks import Ranks
    from exporter.config import ExportConfig
    from exporter.job import Job

__all__ = ["Shown", "finish", "run_dry", "run_export", "run_for_targets"]


@dataclass(frozen=True)
class Shown:
    """How to show a verdict: as JSON, in a file of Markdown too; page: title of the line that names the page."""

    as_json: bool = False
    summary: Path | None = None
    page: str = "report"


def run_export(job: Job, settings: ExportConfig, ranks: Ranks, *, overwrite: bool, quiet: bool, shown: Shown) -> None:
    """Export, and exit with the verdict; the pipeline checks what it is given before it works.

    ranks: the processes that share the export, of which the first prints.
    """
    arguments = job.arguments()
    if shown.summary is not None:
        check_folder_of(shown.summary)
    from exporter.pipeline import export as run
    from exporter.progress import console_progress

    progress = console_progress(quiet=quiet)
    report = run(**arguments, config=settings, progress=progress, overwrite=overwrite, ranks=ranks)
    if not ranks.is_first:
        raise exit_of(report)
    finish(report, Path(job.out or ""), shown)


def run_for_targets(
    targets: Sequence[str], job: Job, settings: ExportConfig, *, overwrite: bool, quiet: bool, as_json: bool
) -> None:
    """Export for several targets, show what each costs, and exit with 1 unless all pass."""
    arguments = job.arguments()
    from exporter.progress import console_progress
    from exporter.several import COLUMNS, export_for, row_of

    found = export_for(
        targets, **arguments, config=settings, progress=console_progress(quiet=quiet), overwrite=overwrite
    )
    if as_json:
        print_json(found)
    else:
        rows = [*map(row_of, found)]
        print_table(COLUMNS, rows, title=f"Targets, bundles in {job.out}", box=None, padding=(0, 1, 0, 0))
        for cost in found:
            if cost.refused is not None:
                print(f"{cost.target} is refused: {cost.refused}")
    raise typer.Exit(0 if all(cost.verdict == "pass" for cost in found) else 1)


def run_dry(job: Job, settings: ExportConfig, *, overwrite: bool, quiet: bool, as_json: bool) -> None:
    """Show what an export would do, and exit."""
    arguments = job.arguments(writes=False)
    from exporter.dry_run import dry_run
    from exporter.progress import console_progress

    found = dry_run(**arguments, config=settings, progress=console_progress(quiet=quiet), overwrite=overwrite)
    if as_json:
        print_json(found)
    else:
        Console().print(found.panel())
    raise typer.Exit


def finish(report: Any, folder: Path, shown: Shown) -> None:
    """Print the verdict; exit with 1 unless it is pass, even if nobody reads what is printed."""
    from exporter.reporting.ci import job_summary, workflow_commands
    from exporter.reporting.schema import validate_report
    from exporter.reporting.terminal import verdict_panel

    found = validate_report(report)
    with suppress(BrokenPipeError, SystemExit):  # the latter is rich's answer to the former
        if shown.as_json:
            print_json(report)
        else:
            Console().print(verdict_panel(found, folder, page=shown.page))
            if os.environ.get("GITHUB_ACTIONS") == "true":
                print(*map("{}\n".format, workflow_commands(found)), sep="", end="")
    if shown.summary is not None:
        shown.summary.write_text(job_summary(found, folder), encoding="utf-8")
    if page := os.environ.get("GITHUB_STEP_SUMMARY"):
        try:
            with Path(page).open("a", encoding="utf-8") as stream:
                stream.write(job_summary(found, folder))
        except OSError as error:  # the verdict stands
            Console(stderr=True).print(f"no summary: GITHUB_STEP_SUMMARY: {error.strerror}", markup=False)
    raise exit_of(report)


def exit_of(report: Any) -> typer.Exit:
    """Return the exit with the code of a verdict."""
    return typer.Exit(0 if report["verdict"] == "pass" else 1)
