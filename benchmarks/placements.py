"""Compare the latency of float files with those of `placement = integer` and `fastest`.

    python benchmarks/placements.py [PNet BCResNet Decoder]
    python benchmarks/placements.py net.py:build --data data.py:calibration

Without a file: networks of the kinds that integers can make slower, with random weights. Batch 1, one thread, all files
interleaved in one process; the least of many runs, as other processes disturb the rest.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from calibrators import PlacementOptions, calibrate
from exporter import capture, emit, fold
from exporter.emission.build_model import emit_float
from exporter.frontend.load import load_model
from exporter.inputs.open import open_data
from runtime_tests.measure.latency import latency

RUNS = 300
PLACEMENTS = ("integer", "fastest")


class PNet(nn.Sequential):
    """The first network of MTCNN: PReLU between thin convolutions."""

    shape = (3, 96, 96)

    def __init__(self) -> None:
        super().__init__(
            *(nn.Conv2d(3, 10, 3), nn.PReLU(10), nn.MaxPool2d(2, 2, ceil_mode=True)),
            *(nn.Conv2d(10, 16, 3), nn.PReLU(16), nn.Conv2d(16, 32, 3), nn.PReLU(32), nn.Conv2d(32, 6, 1)),
        )


class Broadcast(nn.Module):
    """A block of BC-ResNet: a depthwise convolution over frequencies, one over time of their mean, and their sum."""

    def __init__(self, into: int, out: int, stride: int, dilation: int) -> None:
        super().__init__()
        self.widen = nn.Sequential(nn.Conv2d(into, out, 1), nn.ReLU()) if into != out else nn.Identity()
        self.frequency = nn.Conv2d(out, out, (3, 1), (stride, 1), (1, 0), groups=out)
        self.time = nn.Conv2d(out, out, (1, 3), padding=(0, dilation), dilation=(1, dilation), groups=out)
        self.mix = nn.Sequential(nn.SiLU(), nn.Conv2d(out, out, 1))
        self.keeps = into == out and stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.frequency(self.widen(x))
        y = y + self.mix(self.time(y.mean(2, keepdim=True)))
        return nn.functional.relu(y + x if self.keeps else y)


class BCResNet(nn.Sequential):
    """Keyword spotting: many operators on few channels."""

    shape = (1, 40, 101)

    def __init__(self) -> None:
        sizes = [(16, 8, 1, 1), (8, 8, 1, 1), (8, 12, 2, 2), (12, 12, 1, 2), (12, 16, 2, 4), (16, 16, 1, 4)]
        super().__init__(
            *(nn.Conv2d(1, 16, 5, (2, 1), 2), nn.ReLU(), *(Broadcast(*size) for size in sizes)),
            *(Broadcast(16, 20, 1, 8), Broadcast(20, 20, 1, 8), nn.Conv2d(20, 20, 5, padding=(0, 2), groups=20)),
            *(nn.Conv2d(20, 32, 1), nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 12, 1), nn.Flatten()),
        )


class Decoder(nn.Sequential):
    """A generator of images: transposed convolutions."""

    shape = (64,)

    def __init__(self) -> None:
        layers: list[nn.Module] = [nn.Linear(64, 256 * 16), nn.ReLU(), nn.Unflatten(1, (256, 4, 4))]
        for into, out in ((256, 128), (128, 64), (64, 32)):
            layers += [nn.ConvTranspose2d(into, out, 4, 2, 1), nn.ReLU()]
        super().__init__(*layers, nn.ConvTranspose2d(32, 3, 4, 2, 1), nn.Tanh())


NETWORKS: Mapping[str, Callable[[], Any]] = {"PNet": PNet, "BCResNet": BCResNet, "Decoder": Decoder}


def measure(model: nn.Module, batches: list[tuple[Tensor, ...]]) -> dict[str, tuple[float, int]]:
    """Return the least milliseconds and the bytes of the file, by placement."""
    graph = fold(capture(model.eval(), batches[0]))
    with tempfile.TemporaryDirectory() as folder:
        paths = {name: Path(folder) / f"{name}.onnx" for name in ("float", *PLACEMENTS)}
        emit_float(graph, paths["float"])
        for name in PLACEMENTS:
            options: Any = {"placement": name}
            emit(calibrate(graph, batches, method="minmax", placement=PlacementOptions(**options)), paths[name])
        sample = {name: x[:1].numpy() for name, x in zip(graph.meta["input_names"], batches[0], strict=True)}
        timings = latency(paths, sample, runs=RUNS)
        times = timings.times_ms.min(0)
        return {name: (float(ms), paths[name].stat().st_size) for name, ms in zip(paths, times, strict=True)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=[*NETWORKS], help="file.py:factory, or a name of the above")
    parser.add_argument("--data", help="file.py:callable of calibration batches")
    arguments = parser.parse_args()
    print("| network | " + " | ".join(f"{name}, ms" for name in ("float", *PLACEMENTS)) + " | kB |")
    for name in arguments.models:
        torch.manual_seed(0)
        model = NETWORKS[name]() if name in NETWORKS else load_model(name, None)
        if name in NETWORKS:
            batches = [(torch.randn(8, *model.shape),) for _ in range(2)]
        else:
            batches = [batch.inputs for batch in open_data(arguments.data).take(2)]
        found = measure(model, batches)
        times, sizes = (list(column) for column in zip(*found.values(), strict=True))
        cells = [*(f"{ms:.2f}" for ms in times), " / ".join(f"{size / 1000:.0f}" for size in sizes)]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
