"""Show the progress of long work: bars on a terminal and in notebooks, plain lines elsewhere, nothing for library use.

Must not know: what the work is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib.util import find_spec
from typing import TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from calibrators.execution.task import Bar, silent
from exporter.reporting.number_format import duration

__all__ = ["Bar", "Progress", "console_progress", "default_progress"]

LINE_EVERY_S, LINE_EVERY_SHARE, LINE_AT_LEAST_EVERY_S = 5.0, 0.1, 60.0
"""Seconds between two plain lines of one stage; a share of the time so far, if that is longer; and the limit of both.
The log of a long run stays short but still shows progress."""


class Progress:
    """Shows nothing: the base of the others, and the default for library callers outside notebooks."""

    def stage(self, name: str, total: int | None = None) -> AbstractContextManager[Bar]:
        """Open a stage of work with a bar of `total` steps, None where their number is not known."""
        return silent(name, total)


class _Bars(Progress):
    """Shows rich's bars, one stage below the other; finished ones stay, with their time."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: RichProgress | None = None

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Bar]:
        with self._display() as bars:
            task = bars.add_task(name, total=total)
            bar = _RichBar(bars, task)
            yield bar
            bars.update(task, total=max(bar.done, 1), completed=max(bar.done, 1))

    @contextmanager
    def _display(self) -> Iterator[RichProgress]:
        """Yield the live display, which a stage shares with the stages inside it: a terminal can show only one."""
        if self._live is not None:
            yield self._live
            return
        columns = (TextColumn("{task.description:<12}"), BarColumn(32), MofNCompleteColumn(), TimeElapsedColumn(),
                   _Remaining())  # fmt: skip
        with RichProgress(*columns, console=self._console) as self._live:
            try:
                yield self._live
            finally:
                self._live = None


class _Remaining(TimeRemainingColumn):
    """`0:01:23 left`; empty where the end is unknown or reached."""

    def render(self, task: Task) -> Text:
        return Text() if task.total is None or task.finished else super().render(task).append(" left")


class _RichBar:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars, self._task, self.done = bars, task, 0

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        self._bars.advance(self._task, steps)

    def skip(self, steps: int) -> None:
        total = self._bars.tasks[self._task].total
        self._bars.update(self._task, total=None if total is None else total - steps)


class _Lines(Progress):
    """Prints lines such as `reconstruct: 8/16 (3.1 s, 3.1 s left)`, now and then and at the end of a stage."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Bar]:
        bar = _LineBar(self._stream, name, total)
        yield bar
        bar.write("done")


class _LineBar:
    def __init__(self, stream: TextIO, name: str, total: int | None) -> None:
        self._stream, self._name, self._total = stream, name, total
        self._done = 0
        self._start = self._last = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        now = time.monotonic()
        pause = min(max(LINE_EVERY_S, LINE_EVERY_SHARE * (now - self._start)), LINE_AT_LEAST_EVERY_S)
        if now - self._last >= pause:
            self.write()

    def skip(self, steps: int) -> None:
        self._total = None if self._total is None else self._total - steps

    def write(self, end: str = "") -> None:
        self._last = time.monotonic()
        elapsed = self._last - self._start
        count = f"{self._done}/{self._total}" if self._total else str(self._done or "")
        words = " ".join(word for word in (count, end) if word)
        times = duration(elapsed)
        if self._total and 0 < self._done < self._total and not end:
            times += f", {duration(elapsed * (self._total / self._done - 1))} left"
        print(f"{self._name}: {words} ({times})", file=self._stream, flush=True)


def console_progress(stream: TextIO | None = None, *, quiet: bool = False) -> Progress:
    """Return bars if `stream` (stderr) is a terminal, plain lines if not, silence if quiet."""
    stream = sys.stderr if stream is None else stream
    if quiet:
        return Progress()
    return _Bars(Console(file=stream)) if stream.isatty() else _Lines(stream)


def default_progress() -> Progress:
    """Return the progress of a caller in Python that names none: silence, but in a notebook bars.

    Without ipywidgets, by which notebooks show what changes, it is plain lines there.
    """
    console = Console()
    if not console.is_jupyter:
        return Progress()
    return _Bars(console) if find_spec("ipywidgets") else _Lines(sys.stdout)
