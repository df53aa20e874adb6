"""Measure what the integer reference costs, over the folded float forward pass on the same samples.

    python benchmarks/reference.py zoo.py:repvgg zoo.py:vit --data zoo.py:calibration [--bits 8/8] [--json FILE]

Both run in turns on one thread, on a batch as large as a proof runs at once; times are CPU times, and the ratio is
the median over the rounds. `--profile` prints torch's own operators instead, sorted by the time that they take.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from runs import provenance, write_table
from torch import Tensor

from calibrators import calibrate
from calibrators.allocator import keep_freed_memory
from calibrators.placement.placement_options import PlacementOptions
from exporter import capture, fold
from exporter.frontend.load import load_model
from exporter.inputs.batches import GraphBatches
from exporter.inputs.open import open_data
from runtime_tests.measure.latency import interleave, median_interval
from runtime_tests.proof import samples_at_once
from runtime_tests.reference.execute import plan, run

COLUMNS = [
    {"title": "network"},
    {"title": "bits"},
    {"title": "samples", "format": "{}"},
    {"title": "float", "format": "{:.3g} ms"},
    {"title": "reference", "format": "{:.3g} ms"},
    {"title": "ratio", "format": "{:.2f}"},
    {"title": "95 % interval"},
]


def prepared(model: str, data: str, bits: str, samples: int | None) -> tuple[Callable[[], Any], Callable[[], Any], int]:
    """Return the folded float forward pass and the reference, and the number of samples that both read."""
    network, source = load_model(model), open_data(data)
    graph = fold(capture(network, source.example().inputs, form=source.example().form))
    batches, (weight, activation) = list(GraphBatches(graph, source.take(2))), map(int, bits.split("/"))
    options = PlacementOptions(weight_bits=weight, activation_bits=activation)
    result = calibrate(graph, batches, method="minmax", placement=options)
    inputs: tuple[Tensor, ...] = tuple(
        torch.cat(parts)[: samples or samples_at_once(result.program)] for parts in zip(*batches, strict=True)
    )
    kernels = plan(result.program)
    return partial(graph, *inputs), partial(run, kernels, inputs, with_floats=True), len(inputs[0])


def row(model: str, arguments: argparse.Namespace) -> list[Any]:
    """Return the row of a network."""
    forward, reference, samples = prepared(model, arguments.data, arguments.bits, arguments.samples)
    calls = {"float": forward, "reference": reference}
    with torch.no_grad():
        if arguments.profile:
            print_operators(reference)
        times = interleave(calls, runs=arguments.runs, warmup=2, clock=time.process_time_ns)
    ratios = times[:, 1] / times[:, 0]
    low, high = median_interval(ratios)
    medians = [float(torch.tensor(column).median()) for column in times.T]
    name = model.rpartition(":")[2]
    return [name, arguments.bits, samples, *medians, float(torch.tensor(ratios).median()), f"{low:.2f} to {high:.2f}"]


def print_operators(call: Callable[[], Any]) -> None:
    """Print the operators of torch that a call runs."""
    call()
    with torch.profiler.profile() as profiler:
        call()
    print(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--bits", default="8/8", help="weights/activations")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--samples", type=int, help="of the batch; by default as many as a proof runs at once")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--json", type=Path, help="write the table there")
    arguments = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(1)
    rows = []
    for model in arguments.models:
        rows.append(row(model, arguments))
        cells = (column.get("format", "{}").format(cell) for column, cell in zip(COLUMNS, rows[-1], strict=True))
        print(*(cell.ljust(14) for cell in cells), flush=True)
    if arguments.json is not None:
        command = f"python benchmarks/reference.py {' '.join(arguments.models)} --data {arguments.data}"
        content = {
            "title": "Cost of the integer reference",
            "command": command,
            "measured": provenance(1),
            "methods": [],
        }
        write_table(arguments.json, content | {"notes": [], "columns": COLUMNS, "rows": rows})


if __name__ == "__main__":
    main()
