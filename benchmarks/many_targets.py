"""CPU time of one export for several targets, over that of the slowest of them alone; proofs are left out.

    python benchmarks/many_targets.py zoo.py:mobilenetv2 --data zoo.py:calibration --targets ort-cpu openvino ort-qnn \
        --method gptq

Every export is a process of its own with one thread; its CPU time from the start of Python counts, but for the stages
in which runtimes execute the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from exporter.config import make_config
from exporter.progress import Bar, Progress
from exporter.several import export_for

PROOF = ("compare", "measure")
"""Stages in which runtimes execute the file."""


class WithoutProof(Progress):
    """Adds up the CPU time of the stages of PROOF."""

    seconds = 0.0

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Bar]:
        start = time.process_time()
        with super().stage(name, total) as bar:
            yield bar
        self.seconds += time.process_time() - start if name in PROOF else 0.0


def export(given: argparse.Namespace) -> float:
    """Export here for all targets; return the CPU seconds of this process without proofs."""
    torch.set_num_threads(1)
    progress = WithoutProof()
    config = make_config({"method": given.method, "latency_runs": 0, "parity_samples": 1})
    with tempfile.TemporaryDirectory() as folder:
        for cost in export_for(
            given.targets, given.model, given.data, out=Path(folder) / "out", config=config, progress=progress
        ):
            if cost.refused is not None:
                raise SystemExit(f"{cost.target} is refused: {cost.refused}")
    return time.process_time() - progress.seconds


def elsewhere(given: argparse.Namespace, targets: list[str]) -> float:
    """Return the CPU seconds of an export in a process of its own."""
    command = [sys.executable, __file__, given.model, "--data", given.data, "--method", given.method, "--here"]
    done = subprocess.run([*command, "--targets", *targets], stdout=subprocess.PIPE, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="file.py:factory")
    parser.add_argument("--data", required=True, help="calibration data, as of `intact export`")
    parser.add_argument("--targets", nargs="+", default=["ort-cpu", "openvino", "ort-qnn"])
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--here", action="store_true", help="export in this process and print the seconds alone")
    given = parser.parse_args()
    if given.here:
        print(json.dumps(export(given)))
        return
    alone = {target: elsewhere(given, [target]) for target in given.targets}
    for target, seconds in alone.items():
        print(f"{target} alone: {seconds:.1f} s", flush=True)
    together = elsewhere(given, given.targets)
    print(f"together: {together:.1f} s, {together / max(alone.values()):.2f} times the slowest alone")


if __name__ == "__main__":
    main()
