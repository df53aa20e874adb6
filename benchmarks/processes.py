"""Time a calibration that several processes share, beside that of one process: each with one thread.

    python benchmarks/processes.py zoo.py:mobilenetv2 --data zoo.py:calibration [--counts 1 2 4] [--method gptq]

torchrun starts the processes, as for an export. Wall times say something only where every process has a core to itself;
CPU times of the process that works longest do so elsewhere too, but leave out the time that it waits for others.
`statistics` is the pass in which ranges and histograms are counted, `rounding` the rounding of all layers by GPTQ with
its moments, `all` the whole of `calibrate`. The digest is that of all integers and scales.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from calibrators import calibrate
from calibrators.execution.task import Bar, silent
from calibrators.graph.digest import digest_of
from calibrators.program.freeze import CalibrationResult
from exporter import capture, fold
from exporter.frontend.load import load_model
from exporter.inputs.batches import GraphBatches
from exporter.inputs.open import open_data
from exporter.processes import joined

STAGES = {"calibrate": "statistics", "round": "rounding"}
"""Stages of a calibration by what the table calls them."""

QUIET = 0.5
"""Load average of the machine before the benchmark above which wall times are provisional."""


class Clock:
    """Wall and CPU seconds of named parts."""

    def __init__(self) -> None:
        self.seconds: dict[str, tuple[float, float]] = {}

    @contextmanager
    def timed(self, name: str) -> Iterator[None]:
        """Time the body."""
        start = time.perf_counter(), time.process_time()
        yield
        self.seconds[name] = time.perf_counter() - start[0], time.process_time() - start[1]

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Bar]:
        """Open a stage of the calibration."""
        with self.timed(STAGES.get(name, name)), silent(name, total) as bar:
            yield bar


def work(arguments: argparse.Namespace) -> None:
    """Calibrate as one of the processes; the first writes the times of all and the digest."""
    torch.set_num_threads(1)
    with joined() as ranks:
        data = open_data(arguments.data).without_labels()
        graph = fold(capture(load_model(arguments.model), data.example().inputs))
        batches, clock = [*GraphBatches(graph, data)], Clock()
        ranks.gathered(None)
        with clock.timed("all"):
            result = calibrate(graph, batches, method=arguments.method, stage=clock.stage, ranks=ranks)
        found = ranks.gathered((clock.seconds, digest(result)))
        if ranks.is_first:
            arguments.worker.write_text(json.dumps(found))


def digest(result: CalibrationResult) -> str:
    """Return the digest of all integers and scales."""
    coded = {**result.weights, **result.biases}.items()
    parts = [(name, tensor) for name, each in coded for tensor in (each.codes, each.qparams.scale)]
    return str(digest_of("", [*parts, *((name, each.scale) for name, each in result.activations.items())]))[:16]


def measured(count: int, given: list[str]) -> tuple[dict[str, tuple[float, float]], str]:
    """Return the longest wall and CPU seconds of all processes by part, and the digest that all have."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "found.json"
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
        command = [sys.executable, *launcher, __file__, *given, "--worker", str(file)]
        subprocess.run(command, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
        found: list[Any] = json.loads(file.read_text())
    (same,) = {each for _, each in found}
    return {name: tuple(max(seconds[name][i] for seconds, _ in found) for i in (0, 1)) for name in found[0][0]}, same  # type: ignore[misc]


def main() -> None:
    """Print a table with a row for each number of processes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--counts", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments)
        return
    if os.getloadavg()[0] > QUIET:
        print(f"the machine is busy (load {os.getloadavg()[0]:.1f}): read the CPU times", file=sys.stderr)
    given = [arguments.model, "--data", arguments.data, "--method", arguments.method]
    rows = {count: measured(count, given) for count in arguments.counts}
    parts = [name for name in ("statistics", "rounding", "all") if name in rows[arguments.counts[0]][0]]
    print("| processes |" + "".join(f" {part}: wall | CPU |" for part in parts) + " digest |")
    print("|---|" + "---|---|" * len(parts) + "---|")
    base = rows[arguments.counts[0]][0]
    for count, (seconds, same) in rows.items():
        cells = [
            f" {seconds[part][i]:.1f} s ({base[part][i] / seconds[part][i]:.2f}x) |" for part in parts for i in (0, 1)
        ]
        print(f"| {count} |" + "".join(cells) + f" {same} |")


if __name__ == "__main__":
    main()
