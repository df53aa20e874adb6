"""Nanoseconds per element of the streaming statistic, beside torch.aminmax and np.histogram on the same data.

Run: python benchmarks/observe.py [--threads 2] [--elements 4000000] [--repeats 7]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from calibrators.ranges.histogram import BINS, Statistic


def inputs(elements: int) -> dict[str, Tensor]:
    """Return named activations: after a ReLU, before it, with a heavy tail, and all equal (slowest to count)."""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(elements, generator=generator)
    heavy = normal / torch.randn(elements, generator=generator).abs().clamp(min=0.05)
    return {"relu": normal.relu(), "normal": normal, "heavy tail": heavy, "all equal": torch.full((elements,), 0.7)}


def update(values: Tensor) -> None:
    """Update a new statistic with `values`."""
    Statistic().update(values)


def numpy_histogram(values: Tensor) -> None:
    """Count `values` in the same number of bins with NumPy, as other tools do."""
    np.histogram(values.numpy(), bins=2 * BINS)


CONTESTANTS: dict[str, Callable[[Tensor], object]] = {
    "Statistic.update": update,
    "torch.aminmax": torch.aminmax,
    "np.histogram": numpy_histogram,
}


def nanoseconds(contestant: Callable[[Tensor], object], values: Tensor, repeats: int) -> float:
    """Return the median time of a call in nanoseconds per element, without the first call."""
    contestant(values)
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        contestant(values)
        times.append(time.perf_counter() - start)
    return statistics.median(times) / values.numel() * 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--elements", type=int, default=4_000_000)
    parser.add_argument("--repeats", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    print(f"{options.elements} elements, {options.threads} threads, ns per element (median of {options.repeats})")
    for name, values in inputs(options.elements).items():
        row = (f"{label} {nanoseconds(call, values, options.repeats):6.2f}" for label, call in CONTESTANTS.items())
        print(f"  {name:12s} {'   '.join(row)}")


if __name__ == "__main__":
    main()
