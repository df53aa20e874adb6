"""Compare the latency of exported files with float and with onnxruntime's own static quantization of the folded net.

    python benchmarks/latency.py zoo.py:repvgg zoo.py:vit --data zoo.py:calibration
    python benchmarks/latency.py [RepVGGLike MobileNetLike TransformerMlps]

Without models: RepVGG-like and MobileNet-like stacks at 224x224, and the MLPs of a transformer; random weights.
Batch 1, one thread, all models interleaved in one process, order shuffled every round; medians, and ratios to float.
`static` is onnxruntime's quantize_static (QDQ, uint8 activations, int8 weights per channel) on the file that plain
torch.onnx.export writes for the folded net; `prepared` the same after its optional pre-processing of the float file.
`w4a8` and `w4a4` are `intact` with fewer bits; the share of multiply-accumulates in integer kernels is printed too.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peers import prepare, quantize_statically
from torch import Tensor, nn

from calibrators import PlacementOptions, calibrate
from exporter import capture, emit, fold
from exporter.emission.build_model import emit_float
from exporter.frontend.capture import quiet
from exporter.frontend.load import load_model
from exporter.frontend.reference import export_program
from exporter.inputs.open import open_data
from runtime_tests.ort.coverage import coverage
from runtime_tests.ort.sessions import session

BATCHES = 4
LOW_BITS = {"w4a8": (4, 8), "w4a4": (4, 4)}


class RepVGGLike(nn.Sequential):
    """Thirteen plain 3x3 convolutions, 224x224 input."""

    def __init__(self) -> None:
        layers: list[nn.Module] = []
        channels = 3
        for width, depth in ((32, 1), (48, 2), (96, 4), (192, 5), (384, 1)):
            for index in range(depth):
                layers += [nn.Conv2d(channels, width, 3, 2 if index == 0 else 1, 1), nn.ReLU()]
                channels = width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


class InvertedResidual(nn.Module):
    """1x1 expansion, depthwise 3x3, 1x1 projection, and the sum where shapes allow."""

    def __init__(self, channels: int, width: int, stride: int, expand: int) -> None:
        super().__init__()
        self.keeps = stride == 1 and channels == width
        middle = channels * expand
        self.layers = nn.Sequential(
            nn.Conv2d(channels, middle, 1), nn.ReLU6(), nn.Conv2d(middle, middle, 3, stride, 1, groups=middle),
            nn.ReLU6(), nn.Conv2d(middle, width, 1),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x) if self.keeps else self.layers(x)  # type: ignore[no-any-return]


class MobileNetLike(nn.Sequential):
    """The layers of MobileNetV2 1.0 (Sandler et al. 2018, table 2), 224x224 input."""

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1), nn.ReLU6()]
        channels = 32
        stages = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for expand, width, depth, stride in stages:
            for index in range(depth):
                layers.append(InvertedResidual(channels, width, stride if index == 0 else 1, expand))
                channels = width
        head = [nn.Conv2d(channels, 1280, 1), nn.ReLU6(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
        super().__init__(*layers, *head)


class Mlp(nn.Module):
    """The MLP of a transformer block, with its residual: 384 to 1536 and back."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(384), nn.Linear(384, 1536), nn.GELU(), nn.Linear(1536, 384))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)  # type: ignore[no-any-return]


class TransformerMlps(nn.Sequential):
    """Four of these MLPs on 196 tokens."""

    def __init__(self) -> None:
        super().__init__(*(Mlp() for _ in range(4)))


def files(model: nn.Module, batches: list[Tensor], folder: Path) -> dict[str, Path]:
    """Write all variants of one network to `folder` and return their files by name."""
    graph = fold(capture(model, batches[0]))
    paths = {name: folder / f"{name}.onnx" for name in ("float", "intact", *LOW_BITS, "static", "prepared")}
    emit_float(graph, paths["float"])
    emit(calibrate(graph, batches), paths["intact"])
    for name, (weight, activation) in LOW_BITS.items():
        options = PlacementOptions(weight_bits=weight, activation_bits=activation)
        emit(calibrate(graph, batches, placement=options), paths[name])
    plain, inputs = folder / "plain.onnx", [(batch,) for batch in batches]
    with quiet():
        program = torch.onnx.export(export_program(graph), verbose=False)
    assert program is not None
    program.save(plain)
    quantize_statically(plain, inputs, paths["static"])
    prepare(plain, folder / "ready.onnx")
    quantize_statically(folder / "ready.onnx", inputs, paths["prepared"])
    return paths


def medians_ms(paths: dict[str, Path], x: Tensor, runs: int) -> dict[str, float]:
    """Return the median milliseconds per file.

    The order is shuffled every round, so that no file always runs after the large float model, with cold caches.
    """
    sessions = {name: session(path, threads=1) for name, path in paths.items()}
    feeds = {name: feed(path, x) for name, path in paths.items()}
    times: dict[str, list[float]] = {name: [] for name in paths}
    order = np.random.default_rng(0)
    for run in range(runs + 5):
        for name in order.permutation(list(paths)):
            start = time.perf_counter()
            sessions[name].run(None, feeds[name])
            if run >= 5:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: float(np.median(values)) for name, values in times.items()}


def feed(path: Path, x: Tensor) -> dict[str, Any]:
    """Return the input of a file with one input, by name."""
    return {session(path).get_inputs()[0].name: x.numpy()}


def report(label: str, model: nn.Module, batches: list[Tensor], runs: int) -> None:
    """Measure one network and print one line: medians and ratios."""
    with tempfile.TemporaryDirectory() as folder:
        paths = files(model, batches, Path(folder))
        median = medians_ms(paths, batches[0][:1], runs)
        shares = {
            name: coverage(paths[name], sample=feed(paths[name], batches[0][:1])).integer_macs for name in LOW_BITS
        }
    cells = [f"{name} {median[name]:6.2f} ms ({median[name] / median['float']:.2f})" for name in median]
    faster = ", ".join(f"{median[name] / median['intact']:.2f}x {name}" for name in median if name != "intact")
    told = ", ".join(f"{share:.1%} of {name}" for name, share in shares.items())
    print(f"{label:<14} {'  '.join(cells)}  intact is {faster}; on integer kernels {told}", flush=True)


STACKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "RepVGGLike": (RepVGGLike, (3, 224, 224)),
    "MobileNetLike": (MobileNetLike, (3, 224, 224)),
    "TransformerMlps": (TransformerMlps, (196, 384)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[*STACKS], help="file.py:factory, or the name of a stack")
    parser.add_argument("--data", help="file.py:callable of calibration batches")
    parser.add_argument("--runs", type=int, default=300)
    arguments = parser.parse_args()
    if not arguments.data and not STACKS.keys() >= {*arguments.models}:
        parser.error("models of files need --data")
    torch.manual_seed(0)
    batches = [batch.inputs[0] for batch in open_data(arguments.data).take(BATCHES)] if arguments.data else []
    for spec in arguments.models:
        if spec in STACKS:
            kind, shape = STACKS[spec]
            report(spec, kind().eval(), [torch.randn(4, *shape)], arguments.runs)
            continue
        model = load_model(spec)
        assert isinstance(model, nn.Module)
        report(spec.split(":")[-1], model, batches, arguments.runs)


if __name__ == "__main__":
    main()
