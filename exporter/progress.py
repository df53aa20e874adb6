"""How far long work is: bars on a terminal, plain lines elsewhere, silence for library use.

Must not know: what the work is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeElapsedColumn
from rich.progress import Progress as RichProgress

__all__ = ["Bar", "Progress", "console_progress"]

LINE_EVERY_S = 5.0
"""Seconds between two plain lines of one stage: a log stays readable, a watcher sees life."""


class Bar(Protocol):
    """One stage under way."""

    def advance(self, steps: int = 1) -> None:
        """`steps` more are done."""


class Progress:
    """Silence: the base of the others, and what library callers get."""

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Bar]:
        """A bar for one stage of work; `total` steps, None where they are not known."""
        yield _Silent()

    def note(self, text: str) -> None:
        """One line that stays."""


class _Silent:
    def advance(self, steps: int = 1) -> None:
        pass


class _Bars(Progress):
    """rich bars; one stage below the other, finished ones stay with their time."""

    def __init__(self, console: Console) -> None:
        self._console = console

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Bar]:
        columns = (TextColumn("{task.description:<12}"), BarColumn(32), MofNCompleteColumn(), TimeElapsedColumn())
        with RichProgress(*columns, console=self._console) as bars:
            task = bars.add_task(name, total=total)
            bar = _RichBar(bars, task)
            yield bar
            bars.update(task, total=max(bar.done, 1), completed=max(bar.done, 1))

    def note(self, text: str) -> None:
        self._console.print(f"[dim]{text}[/dim]", highlight=False)


class _RichBar:
    def __init__(self, bars: RichProgress, task: TaskID) -> None:
        self._bars, self._task, self.done = bars, task, 0

    def advance(self, steps: int = 1) -> None:
        self.done += steps
        self._bars.advance(self._task, steps)


class _Lines(Progress):
    """`calibrate: 8/16 (3.1 s)`, at most every few seconds and once at the end of a stage."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Bar]:
        bar = _LineBar(self._stream, name, total)
        yield bar
        bar.write("done")

    def note(self, text: str) -> None:
        print(text, file=self._stream, flush=True)


class _LineBar:
    def __init__(self, stream: TextIO, name: str, total: int | None) -> None:
        self._stream, self._name, self._total = stream, name, total
        self._done = 0
        self._start = self._last = time.monotonic()

    def advance(self, steps: int = 1) -> None:
        self._done += steps
        if time.monotonic() - self._last >= LINE_EVERY_S:
            self.write()

    def write(self, end: str = "") -> None:
        self._last = time.monotonic()
        count = f"{self._done}/{self._total}" if self._total else str(self._done or "")
        words = " ".join(word for word in (count, end) if word)
        print(f"{self._name}: {words} ({self._last - self._start:.1f} s)", file=self._stream, flush=True)


def console_progress(stream: TextIO | None = None, *, quiet: bool = False) -> Progress:
    """Bars if `stream` (stderr) is a terminal, plain lines if not, silence if quiet."""
    stream = sys.stderr if stream is None else stream
    if quiet:
        return Progress()
    return _Bars(Console(file=stream)) if stream.isatty() else _Lines(stream)
