"""Run a sweep: the jobs without a bundle, each as a process, and the table of all results.

Must not know: the command line.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from calibrators.errors import InputError, argument
from exporter.sweeping.pages import write_tables
from exporter.sweeping.plan import Sweep, read_sweep
from exporter.sweeping.processes import Ended, command, environment, run_all
from exporter.sweeping.results import Gathered, gather

__all__ = ["run_jobs", "sweep"]

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


def run_jobs(
    sweep: Sweep, *, at_once: int = 1, overwrite: bool = False, told: Callable[[Ended], object] = lambda ended: None
) -> None:
    """Run the jobs without a bundle, or with `overwrite` all of them; told: is called with each that has ended.

    raises: InputError; KeyboardInterrupt that says how many bundles there are.
    """
    if not 1 <= at_once <= MOST_AT_ONCE:
        raise InputError(f"{argument('jobs', at_once)} is not a number from 1 to {MOST_AT_ONCE}.")
    wanted = [each for each in sweep.jobs if overwrite or not each.is_finished]
    try:
        run_all(
            wanted,
            partial(command, sweep, overwrite=overwrite),
            at_once=at_once,
            variables=environment(at_once),
            told=told,
        )
    except KeyboardInterrupt as interrupt:
        finished = sum(each.is_finished for each in sweep.jobs)
        raise KeyboardInterrupt(
            f"{sweep.out} holds {finished} of {len(sweep.jobs)} bundles; run it again to continue"
        ) from interrupt
