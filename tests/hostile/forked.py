"""Run commands of `intact` in forked children of one process that has imported everything, and measure each.

As a script it is that process: it reads one request per line and answers with one line, both JSON.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["Outcome", "Server", "measured"]

POLL_S = 0.01
PAGE = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True)
class Outcome:
    """How a command ended.

    code:    exit code; 128 + N after signal N.
    ended:   why it was ended from outside: "memory" or "time", else empty.
    seconds: processor time; clock: time by the clock.
    peak:    bytes of resident memory above those of the process before the command.
    """

    code: int
    ended: str
    seconds: float
    clock: float
    peak: int
    out: str
    err: str


class Server:
    """The process that forks; a context manager."""

    def __init__(self, folder: Path) -> None:
        root = Path(__file__).parents[2]
        environment = os.environ | {
            "PYTHONPATH": str(root),
            "OMP_NUM_THREADS": "1",
            "NO_COLOR": "1",
            "COLUMNS": "200",
            "TMPDIR": str(folder),
        }
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.forked"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=folder,
            env=environment,
        )

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

    def run(self, arguments: Sequence[str], folder: Path, *, memory: int, seconds: float) -> Outcome:
        """Run `intact *arguments` in `folder`; end it when it takes more memory, or more time by the clock."""
        assert self._process.stdin is not None and self._process.stdout is not None
        request = {"arguments": list(arguments), "folder": str(folder), "memory": memory, "seconds": seconds}
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return Outcome(**json.loads(self._process.stdout.readline()))


def _serve() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    import gc

    import torch.export
    import torch.utils._sympy.functions
    from onnx import checker, shape_inference  # noqa: F401

    import exporter.handover.dump
    import exporter.pipeline
    import exporter.verify  # noqa: F401

    torch.export.load  # noqa: B018 (its imports)
    gc.freeze()
    for line in sys.stdin:
        answers.write(json.dumps(measured(**json.loads(line))) + "\n")
        answers.flush()


def _resident(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * PAGE
    except (OSError, IndexError):
        return 0


def measured(arguments: Sequence[str], folder: str | Path, *, memory: int, seconds: float) -> dict[str, Any]:
    """Run a command in a child of this process; return the fields of an Outcome."""
    texts = [Path(f"{folder}.{name}") for name in ("out", "err")]
    before, start = _resident(os.getpid()), time.monotonic()
    pid = os.fork()
    if pid == 0:
        _run(arguments, folder, texts)
    ended = ""
    while True:
        done, status, usage = os.wait4(pid, os.WNOHANG)
        if done:
            break
        if _resident(pid) - before > memory:
            ended = ended or "memory"
        elif time.monotonic() - start > seconds:
            ended = ended or "time"
        if ended:
            os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_S)
    code = os.waitstatus_to_exitcode(status)
    out, err = (text.read_text(errors="replace") for text in texts)
    for text in texts:
        text.unlink()
    return {
        "code": code if code >= 0 else 128 - code,
        "ended": ended,
        "seconds": usage.ru_utime + usage.ru_stime,
        "clock": time.monotonic() - start,
        "peak": max(0, usage.ru_maxrss * 1024 - before),
        "out": out,
        "err": err,
    }


def _run(arguments: Sequence[str], folder: str | Path, texts: Sequence[Path]) -> None:
    """Run the command in a child; never returns."""
    code: object = 70
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, text in enumerate(texts, 1):
            os.dup2(os.open(text, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        sys.stdout, sys.stderr = (os.fdopen(number, "w", errors="backslashreplace") for number in (1, 2))
        os.chdir(folder)
        sys.argv = ["intact", *(os.fsdecode(os.fsencode(each)) for each in arguments)]
        from exporter.cli import main

        main()
        code = 0
    except SystemExit as error:
        code = error.code
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    _serve()
