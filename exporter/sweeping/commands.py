"""The command `intact sweep`.

Must not know: how a job is exported, how results are judged.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from calibrators.errors import InputError, counted, printable
from exporter.console import described, print_json, print_table, reported_errors
from exporter.flags import Debug, Json, Quiet, option
from exporter.reporting.number_format import duration
from exporter.running import Shown, run_export

if TYPE_CHECKING:
    from exporter.sweeping.plan import Sweep, SweepJob
    from exporter.sweeping.processes import Ended
    from exporter.sweeping.results import Gathered

__all__ = ["SWEEP_HELP", "sweep"]

SWEEP_HELP = (
    "Export every combination of some settings, and compare what comes out.\n\n"
    "SWEEP.toml is a configuration as `intact init` writes it, whose `out` is the folder for all bundles. Its table "
    r"\[sweep] has a list for everything that varies; a table in a list holds settings that belong together:"
    "\n\n"
    r"[bold]\[sweep][/bold]"
    "\n\n"
    r'[bold]target = \["ort-cpu", "openvino"][/bold]'
    "\n\n"
    r"[bold]bits = \[{weight_bits = 8}, {weight_bits = 4, activation_bits = 8}][/bold]"
    "\n\n"
    "Each job is a process. What has a bundle is not run again, so that an interrupted sweep continues. The table of "
    "results and its page are written beside the bundles. The exit code is 0 if all jobs pass, else 1.\n\n"
    "Example: [bold]intact sweep sweep.toml --jobs 2[/bold]. On other machines "
    "[bold]intact sweep sweep.toml --list | cut -f2 | parallel[/bold], then "
    "[bold]intact sweep sweep.toml --gather[/bold]"
)


def sweep(  # noqa: PLR0913 (a command's arguments are its flags)
    file: Annotated[Path, typer.Argument(metavar="SWEEP.toml", help=r"A configuration with a table \[sweep].")],
    jobs: Annotated[
        int,
        option(r"Run N jobs at once; each gets its share of the cores. \[1]", "--jobs", metavar="N"),
    ] = 1,
    listed: Annotated[
        bool,
        option("Run nothing: print key, command and state of each job, separated by tabs.", "--list"),
    ] = False,
    run: Annotated[
        str | None, option("Run the job with this key alone, in this process.", "--run", metavar="KEY")
    ] = None,
    gathered: Annotated[bool, option("Run nothing: gather the bundles that there are.", "--gather")] = False,
    overwrite: Annotated[bool, option("Run what has a bundle again.", "--overwrite")] = False,
    quiet: Quiet = False,
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Run a sweep, or show it; see SWEEP_HELP."""
    with reported_errors(debug=debug):
        from exporter.sweeping.plan import job_of, read_sweep

        if sum((listed, run is not None, gathered)) > 1:
            raise InputError("--list, --run and --gather each do something else; give one of them.")
        read = read_sweep(file)
        if run is not None:
            _run(job_of(read, run), overwrite=overwrite, quiet=quiet, as_json=as_json)
        elif listed:
            _list(read, as_json=as_json)
        else:
            _all(read, jobs=None if gathered else jobs, overwrite=overwrite, quiet=quiet, as_json=as_json)


def _run(job: SweepJob, *, overwrite: bool, quiet: bool, as_json: bool) -> None:
    """Export one job; keep why it fails for the table."""
    from calibrators.execution.ranks import ALONE
    from exporter.reporting.schema import read_report
    from exporter.sweeping.processes import keep_error

    if job.is_finished and not overwrite:
        Console(stderr=True).print(f"{job.bundle} is finished.", markup=False, highlight=False, soft_wrap=True)
        raise typer.Exit(0 if read_report(job.bundle / "report.json").verdict == "pass" else 1)
    job.error.unlink(missing_ok=True)
    try:
        run_export(job.job, job.config, ALONE, overwrite=True, quiet=quiet, shown=Shown(as_json))
    except typer.Exit:
        raise
    except Exception as error:
        message, _, code = described(error)
        keep_error(job, code, message)
        raise


def _list(sweep: Sweep, *, as_json: bool) -> None:
    from exporter.sweeping.processes import shown_command

    states = {
        each.key: "finished" if each.is_finished else "failed" if each.error.exists() else "open" for each in sweep.jobs
    }
    if as_json:
        keys = ("key", "values", "state", "bundle", "command")
        facts = (
            (each.key, each.values, states[each.key], each.bundle, shown_command(sweep, each)) for each in sweep.jobs
        )
        print_json([dict(zip(keys, each, strict=True)) for each in facts])
    else:
        for each in sweep.jobs:
            label = " ".join(printable(each.label).split())  # the row is one line, its columns separated by tabs
            print(each.key, shown_command(sweep, each), f"{states[each.key]}: {label}", sep="\t")


def _all(sweep: Sweep, *, jobs: int | None, overwrite: bool, quiet: bool, as_json: bool) -> None:
    """Run the jobs without a bundle, none if `jobs` is None, and show the results of all."""
    from exporter.sweeping.pages import write_tables
    from exporter.sweeping.results import gather
    from exporter.sweeping.run import check_at_once, run_jobs

    if jobs is not None:
        check_at_once(jobs)
        told = _Lines(sweep, overwrite=overwrite, quiet=quiet)
        run_jobs(sweep, at_once=jobs, overwrite=overwrite, told=told.ended)
    found = gather(sweep)
    paths = write_tables(sweep, found)
    if as_json:
        print_json(asdict(found))
    else:
        _print(found, paths[-1])
    raise typer.Exit(any(each.state != "pass" for each in found.results))


class _Lines:
    """A line on stderr at the start, and for each job that has ended."""

    def __init__(self, sweep: Sweep, *, overwrite: bool, quiet: bool) -> None:
        self._console = Console(stderr=True, quiet=quiet, highlight=False, soft_wrap=True)
        self._total = len(sweep.jobs)
        self._done = 0 if overwrite else sum(each.is_finished for each in sweep.jobs)
        done = f", {self._done} of them finished before" if self._done else ""
        self._print(f"{counted(self._total, 'job')}{done}; logs are in {sweep.out}")

    def ended(self, ended: Ended) -> None:
        """Say how a job ended."""
        self._done += 1
        how = {0: "pass", 1: "a gate failed"}.get(ended.exit_code, f"exit code {ended.exit_code}")
        if not ended.job.is_finished:
            how = f"no bundle, exit code {ended.exit_code}, see {ended.job.log.name}"
        self._print(f"{self._done}/{self._total} {ended.job.label}: {how} ({duration(ended.seconds)})")

    def _print(self, text: str) -> None:
        self._console.print(printable(text), markup=False)


def _print(found: Gathered, page: Path) -> None:
    from exporter.sweeping.results import failed, main_table, summary

    table = main_table(found, brief=True)
    print_table(table.columns, table.rows, box=None, padding=(0, 1, 0, 0))
    console = Console(highlight=False)
    for sentence in summary(found):
        console.print(sentence, markup=False)
    for number, label, code, message in failed(found).rows:
        text = f"{number} ({label}), exit code {code}: {message}"
        console.print(printable(text), markup=False, soft_wrap=True)
    console.print(f"Page: {page}", markup=False, soft_wrap=True)
