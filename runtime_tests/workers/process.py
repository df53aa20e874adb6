"""A file loaded into a process: it starts once and runs every batch.

The protocol is that of `runtime_tests.ort.worker`: lines of JSON through pipes, arrays as .npy files in a folder of its
own. No shell is involved, and no name from the model becomes the name of a file.

Must not know: which runtimes there are, how they are installed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from calibrators.errors import InputError, ModelError, argument
from calibrators.temporary import TemporaryFolder
from runtime_tests.ort import worker as onnxruntime_worker
from runtime_tests.ort.sessions import Model
from runtime_tests.workers.runtime import Array

__all__ = ["ANSWER_S", "LoadedInWorker", "Worker", "environment", "python_worker"]

ANSWER_S = 1800.0
"""Seconds after which a process that has not answered is ended. On an emulated processor, loading a file takes 5 to
20 s and one batch 150 times as long as on a CPU with VNNI."""

LEFT_OUT = ("PYTHON", "OPENBLAS_", "QEMU_", "LD_PRELOAD")
"""Beginnings of the environment variables that a process does not inherit: they belong to this interpreter and
processor."""


def environment(**values: object) -> dict[str, str]:
    """Return this process's environment without LEFT_OUT, and with `values`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(LEFT_OUT)}
    return kept | {name: str(value) for name, value in values.items()}


def python_worker(
    name: str, *, before: Sequence[str | Path] = (), python: str | Path = sys.executable, **variables: object
) -> Worker:
    """Start the worker for onnxruntime in a Python interpreter.

    before: program and arguments that start the interpreter, such as an emulator.
    """
    script = Path(str(onnxruntime_worker.__file__)).resolve()
    return Worker([*before, python, "-P", script], environment(**variables), name)


class Worker:
    """A process that answers requests, in a temporary folder; both end with this object.

    command: program and arguments; the folder is added as the last one.
    name:    the runtime, as messages show it.
    raises:  InputError if there is no such program.
    """

    def __init__(self, command: Sequence[str | Path], variables: Mapping[str, str], name: str) -> None:
        self.name = name
        folder = TemporaryFolder()
        self.folder = folder.path
        self._log = self.folder / "stderr.txt"
        try:
            with self._log.open("w") as log:
                self._process = subprocess.Popen(
                    [*map(str, command), str(self.folder)],
                    stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                    text=True, encoding="utf-8", env=dict(variables), cwd=self.folder,
                )  # fmt: skip
        except OSError as error:
            folder.remove()
            raise InputError(f"{name} cannot be started: {error}; install it again.") from error
        weakref.finalize(self, _end, self._process, folder)

    def ask(self, request: Mapping[str, Any], within: float = ANSWER_S) -> dict[str, Any]:
        """Send a request and return the answer.

        raises: ModelError if the answer is an error, or if the process ends or gives none within so many seconds.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        timer = threading.Timer(within, self._process.kill)
        started = time.monotonic()
        timer.start()
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        finally:
            timer.cancel()
        if not line and time.monotonic() - started >= within:
            raise ModelError(
                f"{self.name} gave no answer within {within:g} s; compare fewer samples ({argument('parity_samples')})."
            )
        if not line:
            raise ModelError(
                f"{self.name} ended without an answer ({self._end_of_log()}); run it again, or without it."
            )
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError as error:
            raise ModelError(
                f"{self.name} answered {line.strip()[:300]!r} instead of JSON; install it again."
            ) from error
        if "error" in answer:
            raise ModelError(f"{self.name} refuses the model: {str(answer['error']).strip()[:600]}")
        return answer

    def run_batch(self, inputs: Sequence[Array]) -> dict[str, Any]:
        """Write the inputs of a batch as files, let the worker run what it has loaded, and return its answer."""
        for index, array in enumerate(inputs):
            np.save(self.folder / f"in_{index}.npy", np.ascontiguousarray(array).reshape(array.shape))
        return self.ask({"batch": True})

    def outputs(self, count: int) -> list[Array]:
        """Return the first outputs of the last batch."""
        return [np.load(self.folder / f"out_{index}.npy", allow_pickle=False) for index in range(count)]

    def _end_of_log(self) -> str:
        """Return how the process ended, and the last error that it printed, or else its last line."""
        status = self._process.wait()
        lines = [line.strip()[:300] for line in self._log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if "Error" in line]
        return " ".join([f"exit status {status}", *(errors or lines)[-1:]])


class LoadedInWorker:
    """A file loaded into a worker.

    version:     what the worker must report.
    provider:    the execution provider that has to run all of the file (`runtime_tests.ort.worker`); None: the CPU's.
    kernel_rate: share of the codes of an integer kernel that may be one step off.
    raises:      ModelError if the worker cannot be started, refuses the file or has another version.
    """

    kernel_rate, float_factor = 0.0, 1.0

    def __init__(self, worker: Worker, model: Model, probes: Sequence[str], *, threads: int, version: str) -> None:
        self.worker, self.name = worker, worker.name
        self.output_names = [value.name for value in model.proto.graph.output]
        self._count = len(self.output_names) + len(probes)
        (worker.folder / "model.onnx").write_bytes(model.whole(probes))
        inputs = [value.name for value in model.proto.graph.input]
        outputs = [*self.output_names, *probes]
        found = worker.ask(
            {
                "model": "model.onnx",
                "inputs": inputs,
                "outputs": outputs,
                "threads": threads,
                "entries": onnxruntime_worker.PINNED,
                "provider": self.provider,
            }
        )["version"]
        if found != version:
            raise ModelError(f"{self.name} reports version {found} where {version} is installed; install it again.")

    @property
    def provider(self) -> Mapping[str, Any] | None:
        """Return None: the provider for CPUs."""
        return None

    def run(self, inputs: Sequence[Array]) -> tuple[list[Array], list[Array]]:
        """Return the model's outputs and the probes."""
        count = len(self.output_names)
        self.worker.run_batch(inputs)
        found = self.worker.outputs(self._count)
        return found[:count], found[count:]

    def executed(self) -> None:
        """Return None: a worker does not tell which kernels run."""


def _end(process: subprocess.Popen[str], folder: TemporaryFolder) -> None:
    """End a process, whatever it is doing, and remove its folder."""
    process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with suppress(BrokenPipeError):  # of a request that nobody reads any more
                stream.close()
    folder.remove()
