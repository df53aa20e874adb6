"""Run a sweep: the jobs without a bundle, each as a process, and the table of all results.

Must not know: the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from calibrators.errors import InputError, argument
from exporter.checks import check_names
from exporter.job import errors_of
from exporter.sweeping.pages import write_tables
from exporter.sweeping.plan import Sweep, read_sweep
from exporter.sweeping.processes import Ended, command, environment, run_all
from exporter.sweeping.results import Gathered, gather

__all__ = ["check_at_once", "run_jobs", "sweep"]

MOST_AT_ONCE = 1024


def sweep(file: str | Path, *, jobs: int = 1, overwrite: bool = False) -> Gathered:
    """Run the jobs of the sweep in a TOML file that have no bundle yet; return the results of all, and write them too.

    jobs:      how many run at once.
    overwrite: run those with a bundle again.
    raises:    InputError for a file that is no sweep; KeyboardInterrupt that says how many bundles there are.
    """
    read = read_sweep(Path(file))
    run_jobs(read, at_once=jobs, overwrite=overwrite)
    found = gather(read)
    write_tables(read, found)
    return found


def check_at_once(jobs: int) -> None:
    """Check how many jobs shall run at once.

    raises: InputError.
    """
    if not 1 <= jobs <= MOST_AT_ONCE:
        raise InputError(f"{argument('jobs', jobs)} is not a number from 1 to {MOST_AT_ONCE}.")


def run_jobs(
    sweep: Sweep, *, at_once: int = 1, overwrite: bool = False, told: Callable[[Ended], object] = lambda ended: None
) -> None:
    """Run the jobs without a bundle, or with `overwrite` all of them; told: is called with each that has ended.

    raises: InputError, before any of them runs; KeyboardInterrupt that says how many bundles there are.
    """
    check_at_once(at_once)
    wanted = [each for each in sweep.jobs if overwrite or not each.is_finished]
    for each in wanted:
        with errors_of(f"{sweep.file}: {each.label}"):
            check_names(each.config)
    try:
        run_all(
            wanted,
            partial(command, sweep, overwrite=overwrite),
            at_once=at_once,
            variables=environment(at_once),
            told=told,
            skipped=lambda job: job.is_finished and not overwrite,
        )
    except KeyboardInterrupt as interrupt:
        finished = sum(each.is_finished for each in sweep.jobs)
        raise KeyboardInterrupt(
            f"{sweep.out} holds {finished} of {len(sweep.jobs)} bundles; run it again to continue"
        ) from interrupt
