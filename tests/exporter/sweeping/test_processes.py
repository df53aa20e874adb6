"""Jobs as processes: how many at once, what fails, what an interrupt leaves. Small programs stand in for exports."""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from exporter.config import ExportConfig
from exporter.job import Job
from exporter.sweeping.plan import SweepJob
from exporter.sweeping.processes import THREADS, Ended, environment, run_all

Command = Callable[[SweepJob], list[str]]


def jobs(folder: Path, *names: str) -> list[SweepJob]:
    return [SweepJob(name, {"name": name}, Job(out=str(folder / name)), ExportConfig()) for name in names]


def python(*lines: str) -> Command:
    """Return the command of a program; `bundle` is the job's folder in it."""
    code = "\n".join(["import os, pathlib, signal, sys, time", "bundle = pathlib.Path(sys.argv[1])", *lines])
    return lambda job: [sys.executable, "-ISc", code, str(job.bundle)]


WRITES = "bundle.mkdir(); (bundle / 'manifest.json').touch()"


def test_others_go_on_where_one_fails(tmp_path: Path) -> None:
    program = python(
        "print('working', flush=True)",
        "if bundle.name == 'killed': os.kill(os.getpid(), signal.SIGKILL)",
        "if bundle.name == 'refused': print('error: it cannot be had', file=sys.stderr); sys.exit(3)",
        WRITES,
        "sys.exit(bundle.name == 'gate')",
    )
    ended: list[Ended] = []
    made = jobs(tmp_path / "out", "killed", "refused", "good", "gate")
    run_all(made, program, at_once=2, variables=environment(2), told=ended.append)
    codes = {each.job.key: each.exit_code for each in ended}
    assert codes == {"killed": -signal.SIGKILL, "refused": 3, "good": 0, "gate": 1}
    assert [each.is_finished for each in made] == [False, False, True, True]
    reasons = [json.loads(each.error.read_text()) for each in made[:2]]
    assert reasons[0]["message"] == "ended by SIGKILL; the last line of its log is: working"
    assert reasons[1] == {"exit_code": 3, "message": "it cannot be had"}
    assert made[2].log.read_text() == "working\n" and not made[2].error.exists()


def test_what_another_sweep_ran_meanwhile_is_left_out(tmp_path: Path) -> None:
    program = python(WRITES, "(bundle.parent / 'second').mkdir()", "(bundle.parent / 'second/manifest.json').touch()")
    ended: list[str] = []
    run_all(
        jobs(tmp_path, "first", "second"),
        program,
        at_once=1,
        variables=environment(1),
        told=lambda each: ended.append(each.job.key),
        skipped=lambda job: job.is_finished,
    )
    assert ended == ["first"]


def test_a_reason_is_that_of_the_last_run(tmp_path: Path) -> None:
    (made,) = jobs(tmp_path, "killed")
    made.error.write_text('{"exit_code": 3, "message": "an old one"}')
    program = python("os.kill(os.getpid(), signal.SIGKILL)")
    run_all([made], program, at_once=1, variables=environment(1), told=lambda ended: None)
    assert json.loads(made.error.read_text())["message"] == "ended by SIGKILL"


def test_so_many_run_at_once(tmp_path: Path) -> None:
    program = python("print(time.time(), flush=True); time.sleep(0.3); print(time.time())", WRITES)
    made = jobs(tmp_path, "a", "b", "c")
    run_all(made, program, at_once=2, variables=environment(2), told=lambda ended: None)
    (a, end_a), (b, end_b), (c, _) = sorted(tuple(map(float, each.log.read_text().split())) for each in made)
    assert b < end_a and c >= min(end_a, end_b) and a <= b


def test_an_interrupt_reaches_what_runs_and_starts_nothing_else(tmp_path: Path) -> None:
    program = python(
        "def end(*_): (bundle.parent / f'{bundle.name}.interrupted').touch(); sys.exit(130)",
        "signal.signal(signal.SIGTERM, end)",
        "(bundle.parent / f'{bundle.name}.started').touch()",
        "while bundle.name == 'slow': time.sleep(0.01)",
        "while not (bundle.parent / 'slow.started').exists(): time.sleep(0.01)",
        WRITES,
    )

    def interrupt(ended: Ended) -> None:
        raise KeyboardInterrupt  # in the main thread, as Ctrl-C

    made = jobs(tmp_path, "slow", "quick", "third", "fourth")
    start = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_all(made, program, at_once=2, variables=environment(2), told=interrupt)
    assert time.monotonic() - start < 30
    assert (tmp_path / "slow.interrupted").exists() and made[1].is_finished
    assert not made[0].error.exists() and not (tmp_path / "fourth.started").exists()


def test_each_job_gets_its_share_of_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(THREADS)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(8), raising=False)
    assert [environment(n)[THREADS] for n in (1, 3, 100)] == ["8", "2", "1"]
    monkeypatch.setenv(THREADS, "5")
    assert environment(2)[THREADS] == "5"
