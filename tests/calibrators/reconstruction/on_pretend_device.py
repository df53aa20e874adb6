"""Calibrate a case on the CPU and on the pretend device: plainly, with recorded steps, and where recording fails.

Prints what came out as JSON.

A program of its own: the device has to be there before the first backward pass of the process.
"""

from __future__ import annotations

import hashlib
import json
import sys
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx, nn

from calibrators import PlacementOptions, calibrate
from calibrators.execution.activation_cache import Cache
from calibrators.methods import get_method
from calibrators.program.freeze import CalibrationResult
from calibrators.reconstruction import cuda_graphs, training
from exporter import capture, fold
from tests.calibrators.reconstruction.pretend_device import NAME, Refusing, Tape, pretend_device
from tests.support.folded import folded_network

STEPS = 12

SAMPLES = 16

CASES: dict[str, tuple[str, str, dict[str, object]]] = {
    "brecq": ("residual", "brecq", {"fisher": True}),
    "qdrop": ("residual", "qdrop", {"precision": "bfloat16"}),
    "pdquant": ("residual", "pdquant", {"correct": 3}),
    "repapq": ("residual", "repapq", {}),
    "mrecg": ("residual", "mrecg", {"granularity": "block", "groups": "1-2"}),
    "attention": ("transformer", "qdrop", {}),
    "padded": ("padded", "qdrop", {}),
    "gptq": ("residual", "gptq", {}),
    "lapq": ("mlp", "lapq", {"max_evals": 11}),
}
"""Network, method and its options."""

NOT_TRAINED = {"gptq", "lapq"}

RECORDERS = {"recorded": Tape, "refused": Refusing}

WAYS = ("cpu", "plain", *RECORDERS)

CACHED: set[str] = set()
"""Devices whose memory activations were read from."""


def outcome(result: CalibrationResult) -> dict[str, Any]:
    """A digest of all integers and scales, errors of the units, how many calls were replayed, where caches were."""
    digest = hashlib.sha256()
    for coded in result.weights.values():
        digest.update(coded.codes.numpy().tobytes() + coded.qparams.scale.numpy().tobytes())
    for qparams in result.activations.values():
        digest.update(qparams.scale.numpy().tobytes())
    done = result.record.reconstruction
    units = done.units if done else ()
    return {
        "digest": digest.hexdigest(),
        "errors": [unit.after for unit in units],
        "steps": [unit.steps or 0 for unit in units],
        "replays": Tape.replays,
        "cached": sorted(CACHED),
    }


class Padded(nn.Module):
    """Makes zeros for every sample."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 8), nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).relu()
        y: Tensor = self.second(torch.cat([h, torch.zeros(x.shape[0], 8)], 1))
        return y


def padded() -> tuple[fx.GraphModule, tuple[Tensor, ...]]:
    """The network above and inputs."""
    x = torch.randn(SAMPLES, 6)
    return fold(capture(Padded().eval(), x)), (x,)


def outcomes(network: str, method: str, options: dict[str, object]) -> dict[str, Any]:
    """Of all ways."""
    graph, inputs = padded() if network == "padded" else folded_network(network)
    if method not in NOT_TRAINED:
        ranges = {"ranges": "minmax", "weight_ranges": "minmax"}
        options = {"iters": STEPS, "batch": 8, "warmup": 0.5, **ranges, **options}
    found = {}
    for way in WAYS if method not in NOT_TRAINED else ("cpu", "plain"):
        cuda_graphs.RECORDERS.clear()
        if way in RECORDERS:
            cuda_graphs.RECORDERS[NAME] = RECORDERS[way]
        Tape.replays = 0
        CACHED.clear()
        with nullcontext() if way == "cpu" else pretend_device():
            result = calibrate(
                graph,
                [tuple(x[:SAMPLES] for x in inputs)],
                method=get_method(method, options),
                placement=PlacementOptions(weight_bits=4, activation_bits=4),
                device="cpu" if way == "cpu" else NAME,
            )
        found[way] = outcome(result)
    return found


def main() -> None:
    torch.set_num_threads(1)
    with pretend_device():  # it has to be there before the first backward pass
        pass
    values = Cache._values

    def watched(cache: Cache, rows: Tensor) -> Tensor:
        CACHED.add(rows.device.type)
        return values(cache, rows)

    Cache._values = watched  # type: ignore[method-assign]
    training.generator_on = lambda device, generator: generator  # type: ignore[assignment] # there are none on the device
    print(json.dumps(outcomes(*CASES[sys.argv[1]])))


if __name__ == "__main__":
    main()
