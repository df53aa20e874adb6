"""Measure peak memory and time of calibration with 1x and 10x the batches, each in a process of its own.

    python benchmarks/memory.py file.py:factory --data file.py:callable [--batches 16]

The data is repeated for 10x. The ratio of the peaks must stay below 1.1.
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import resource
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

from torch import Tensor, nn

from calibrators import calibrate
from exporter import capture, fold
from exporter.frontend.load import load_model
from exporter.inputs.open import open_data


def measure(model: str, data: str, batches: int, result: Connection) -> None:
    """Send (peak resident MiB, seconds of calibration)."""
    network = load_model(model)
    assert isinstance(network, nn.Module)
    source = open_data(data)

    def repeated() -> Iterator[Tensor]:
        passes = (batch.inputs[0] for _ in itertools.count() for batch in source)
        return itertools.islice(passes, batches)

    graph = fold(capture(network, source.example().inputs))
    start = time.perf_counter()
    calibrate(graph, repeated())
    seconds = time.perf_counter() - start
    result.send((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, seconds))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--batches", type=int, default=16)
    arguments = parser.parse_args()
    context = multiprocessing.get_context("spawn")
    peaks = []
    for batches in (arguments.batches, 10 * arguments.batches):
        receive, send = context.Pipe()
        process = context.Process(target=measure, args=(arguments.model, arguments.data, batches, send))
        process.start()
        peak, seconds = receive.recv()
        process.join()
        peaks.append(peak)
        print(f"{batches:5d} batches: peak {peak:7.0f} MiB, calibration {seconds:6.1f} s", flush=True)
    print(f"ratio of peaks {peaks[1] / peaks[0]:.3f}")


if __name__ == "__main__":
    main()
