"""Measure the peak memory of every stage of an export of a transformer with random weights.

    python benchmarks/large.py [--width 1024] [--layers 4] [--method mse] [--bits 8/8] [--weight-only]

A small export comes first, after which everything is imported. Peaks are those of the resident memory above that level,
sampled every 10 ms, in MiB and in sizes of the float weights; the model itself, which the caller holds, is one of
these. What comes after a stage and before the next is counted as a part of it. The data is a few short sequences, so
that weights outweigh activations. 21 layers of width 1024 are 1 GiB.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporter import export
from exporter.progress import Bar, Progress

EVERY_S = 0.01
HEAD, LENGTH, SAMPLES = 64, 16, 4
PAGE = os.sysconf("SC_PAGE_SIZE")


class Layer(nn.Module):
    """A transformer layer that normalizes first; width must be a multiple of HEAD."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        heads = self.qkv(self.norms[0](x)).reshape(n, length, 3, self.heads, HEAD).permute(2, 0, 3, 1, 4)
        y = nn.functional.scaled_dot_product_attention(*heads.unbind(0))
        x = x + self.proj(y.transpose(1, 2).reshape(n, length, width))
        return x + self.down(nn.functional.gelu(self.up(self.norms[1](x))))


def transformer(width: int, layers: int) -> nn.Module:
    """Return a transformer with seeded random weights."""
    torch.manual_seed(0)
    return nn.Sequential(*(Layer(width) for _ in range(layers)), nn.Linear(width, 10)).eval()


def sequences(width: int) -> list[Tensor]:
    """Return two calibration batches."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(SAMPLES, LENGTH, width, generator=generator) for _ in range(2)]


class Peaks(Progress):
    """The highest resident memory from the start of each stage to the start of the next, bytes above the first level.

    What comes before the first stage is "model".
    """

    def __init__(self) -> None:
        super().__init__()
        self.base, self.name, self.peaks = resident(), "model", dict[str, int]()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._thread.start()

    def _sample(self) -> None:
        while not self._done.wait(EVERY_S):
            self.peaks[self.name] = max(self.peaks.get(self.name, 0), resident() - self.base)

    @contextmanager
    def stage(self, name: str, total: int | None = None) -> Iterator[Bar]:
        self.name = name
        with super().stage(name, total) as bar:
            yield bar

    def end(self) -> None:
        """Stop looking."""
        self._done.set()
        self._thread.join()


def resident() -> int:
    """Return the bytes of memory that the process has resident."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * PAGE


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--method", default="mse")
    parser.add_argument("--bits", default="8/8", help="of weights and activations")
    parser.add_argument("--weight-only", action="store_true")
    arguments = parser.parse_args()
    weight_bits, activation_bits = map(int, arguments.bits.split("/"))
    settings: dict[str, Any] = {
        "method": arguments.method,
        "weight_bits": weight_bits,
        "activation_bits": activation_bits,
        "weight_only": arguments.weight_only,
    }
    with tempfile.TemporaryDirectory() as folder:
        export(transformer(HEAD, 1), sequences(HEAD), out=Path(folder) / "small", **settings)
        peaks, start, cpu = Peaks(), time.perf_counter(), time.process_time()
        model = transformer(arguments.width, arguments.layers)
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        outcome = export(
            model, sequences(arguments.width), out=Path(folder) / "large", progress=peaks, **settings
        )  # fmt: skip
        peaks.end()
    print(
        f"weights {size / 2**20:.0f} MiB, imports {peaks.base / 2**20:.0f} MiB, {outcome['verdict']}, "
        f"{time.perf_counter() - start:.0f} s, {time.process_time() - cpu:.0f} s of CPU"
    )
    print("  ".join(f"{name} {seconds:.0f} s" for name, seconds in outcome["time_s"].items()))
    for name, peak in peaks.peaks.items():
        print(f"  {name:12s} {peak / 2**20:6.0f} MiB  {peak / size:.2f} x weights")


if __name__ == "__main__":
    main()
