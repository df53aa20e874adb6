"""Run jobs, each as a process of its own, several at once.

Must not know: what the jobs compute.
"""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from exporter.sweeping.plan import Sweep, SweepJob

__all__ = ["Ended", "command", "environment", "keep_error", "run_all", "shown_command"]

THREADS = "OMP_NUM_THREADS"
ERROR_PREFIXES = ("error: ", "internal error: ", "interrupted")
"""Beginnings of the message with which `intact` ends."""
TAIL_BYTES = 1 << 14
"""Bytes at the end of a log in which that message is looked for."""


@dataclass(frozen=True)
class Ended:
    """A job whose process has ended: its exit code, negative if a signal ended it, and its time in seconds."""

    job: SweepJob
    exit_code: int
    seconds: float


def command(sweep: Sweep, job: SweepJob, *, overwrite: bool = False) -> list[str]:
    """Return the command that runs a job with this interpreter."""
    return [sys.executable, "-m", "exporter", *_arguments(sweep, job), *["--overwrite"] * overwrite]


def shown_command(sweep: Sweep, job: SweepJob) -> str:
    """Return the command that runs a job, for a shell."""
    return shlex.join(["intact", *_arguments(sweep, job)])


def _arguments(sweep: Sweep, job: SweepJob) -> list[str]:
    return ["sweep", str(sweep.file), "--run", job.key]


def environment(at_once: int) -> dict[str, str]:
    """Return the environment of the jobs: each gets its share of the processor's cores, unless the user decides."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {THREADS: str(max(1, cores // at_once)), **os.environ}


def run_all(
    jobs: Sequence[SweepJob],
    command: Callable[[SweepJob], Sequence[str]],
    *,
    at_once: int,
    variables: Mapping[str, str],
    told: Callable[[Ended], object],
    skipped: Callable[[SweepJob], bool] = lambda job: False,
) -> None:
    """Run a command for every job, `at_once` at a time; what it prints goes to the job's log.

    A process that leaves neither a bundle nor a reason (a signal, no memory) gets the end of its log as the reason. An
    interrupt is passed on to the running processes once, and awaits their end.

    told:    is called with each job whose process has ended.
    skipped: is asked before each job whether it needs no run any more, as another sweep of the same file ran it.
    """
    lock, running, stopped = threading.Lock(), set[subprocess.Popen[bytes]](), threading.Event()

    def run(job: SweepJob) -> Ended | None:
        job.log.parent.mkdir(parents=True, exist_ok=True)
        start = time.monotonic()
        if skipped(job):
            return None
        job.error.unlink(missing_ok=True)
        with job.log.open("wb") as log:
            with lock:
                if stopped.is_set():
                    return None
                process = subprocess.Popen(
                    command(job),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=variables,
                    start_new_session=True,  # so that Ctrl-C reaches them through this process alone
                )
                running.add(process)
            code = process.wait()
        with lock:
            running.remove(process)
        if not stopped.is_set() and not job.is_finished and not job.error.exists():
            keep_error(job, code, _message(job.log, code))
        return Ended(job, code, time.monotonic() - start)

    with ThreadPoolExecutor(at_once) as pool:
        try:
            for future in as_completed([pool.submit(run, job) for job in jobs]):
                if (ended := future.result()) is not None:
                    told(ended)
        except BaseException:
            with lock:
                stopped.set()
                for process in running:
                    process.terminate()  # for `intact` the same as Ctrl-C, which a process in the background may ignore
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def keep_error(job: SweepJob, exit_code: int, message: str) -> None:
    """Write why a job left no bundle."""
    job.error.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"exit_code": exit_code, "message": message}, indent=2, ensure_ascii=False)
    job.error.write_text(text + "\n", encoding="utf-8", errors="backslashreplace")


def _message(log: Path, code: int) -> str:
    """Return the message at the end of a log, or its last line, and the signal that ended the process."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - TAIL_BYTES))
        lines = [line for line in stream.read().decode(errors="replace").splitlines() if line.strip()]
    said = [line.removeprefix("error: ") for line in lines if line.startswith(ERROR_PREFIXES)] or lines or [""]
    if code >= 0:
        return said[-1]
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"ended by {name}; the last line of its log is: {said[-1]}" if said[-1] else f"ended by {name}"
