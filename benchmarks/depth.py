"""Measure how the time of an export grows with depth: CPU time per layer of chains of convolutions.

    python benchmarks/depth.py [50 200 1000]

Every depth runs in a process of its own, on one thread, after a short export that imports what is needed. Where the
time is linear, every column is flat.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import nn

from exporter import export
from exporter.progress import Bar, Progress

CHANNELS, SIZE, SAMPLES = 8, 8, 8
WARM = 3
STAGES = ("capture", "fold", "calibrate", "emit", "compare", "measure")
"""Stages of an export that show a bar, in their order; the rest (placement, report, bundle) is "other"."""


class CpuTimes(Progress):
    """Add up the CPU seconds of the stages."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Bar]:
        start = time.process_time()
        with super().stage(name, total) as bar:
            yield bar
        self.seconds[name] += time.process_time() - start


def chain(depth: int) -> nn.Module:
    """Return `depth` convolutions of 3 x 3 with a Relu after each."""
    layers = (nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1) for _ in range(depth))
    return nn.Sequential(*(module for layer in layers for module in (layer, nn.ReLU()))).eval()


def measure(depth: int, result: Connection) -> None:
    """Send the CPU seconds of every stage, and of the whole export."""
    torch.set_num_threads(1)
    for each in (WARM, depth):
        torch.manual_seed(0)
        model, data = chain(each), [torch.randn(SAMPLES, CHANNELS, SIZE, SIZE)]
        times, start = CpuTimes(), time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            export(model, data, method="minmax", latency_runs=0, out=Path(folder) / "out", progress=times)
        whole = time.process_time() - start
    result.send((times.seconds, whole))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("depths", nargs="*", type=int, default=[50, 200, 1000], metavar="DEPTH")
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    print("CPU milliseconds per layer")
    print(f"{'layers':>8s}{''.join(f'{name:>11s}' for name in (*STAGES, 'other', 'all'))}")
    for depth in arguments.depths:
        receive, send = context.Pipe()
        process = context.Process(target=measure, args=(depth, send))
        process.start()
        seconds, whole = receive.recv()
        process.join()
        values = (*seconds.values(), whole - sum(seconds.values()), whole)
        print(f"{depth:8d}{''.join(f'{1000 * value / depth:11.1f}' for value in values)}", flush=True)


if __name__ == "__main__":
    main()
