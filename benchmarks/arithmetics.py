"""Compare LiteRT's arithmetic with onnxruntime's in the reference: how many codes of a network differ, and its answers.

    python benchmarks/arithmetics.py zoo.py:repvgg zoo.py:mobilenetv2 --data zoo.py:calibration [--samples 32]

Both plans compute one program, calibrated by `mse` for the target tflite. "kernel by kernel" counts codes of integer
kernels that read the codes of onnxruntime's arithmetic, "end to end" those of the whole network.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from calibrators import calibrate
from calibrators.targets import tflite
from exporter import capture, fold
from exporter.frontend.load import load_model
from exporter.inputs.batches import GraphBatches
from exporter.inputs.open import open_data
from runtime_tests.reference.execute import plan, run

CALIBRATION = 32


def row(model: str, data: str, samples: int) -> list[Any]:
    """Return the row of a network."""
    network, source = load_model(model), open_data(data)
    graph = fold(capture(network, source.example().inputs, form=source.example().form))
    (calibration,) = GraphBatches(graph, source.take(1))
    program = calibrate(graph, [[x[:CALIBRATION] for x in calibration]], method="mse", target=tflite.TARGET).program
    inputs = tuple(x[:samples] for x in calibration)
    ours, theirs = plan(program, tflite.TARGET), plan(program, tflite.TARGET, own=True)
    codes, outputs = run(ours, inputs)
    forced, _ = run(theirs, inputs, codes)
    free, others = run(theirs, inputs)
    kernels = [step.site for step in theirs.steps if step.quantized and step.is_integer]
    total = sum(codes[site].numel() for site in kernels)
    counts = [sum(int((codes[site] != found[site]).sum()) for site in kernels) for found in (forced, free)]
    most = max(int((codes[site].int() - forced[site].int()).abs().max()) for site in kernels)
    same = (outputs[0].argmax(1) == others[0].argmax(1)).double().mean()
    shares = (f"{count / total:.3%}" for count in counts)
    return [model.rpartition(":")[2], len(inputs[0]), total, *shares, most, f"{float(same):.1%}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", required=True)
    parser.add_argument("--samples", type=int, default=32)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print("network", "samples", "codes", "kernel by kernel", "end to end", "most steps", "same class", sep=" | ")
    for model in arguments.models:
        print(*row(model, arguments.data, arguments.samples), sep=" | ", flush=True)


if __name__ == "__main__":
    main()
