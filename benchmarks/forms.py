"""Time operators in integer forms against the same operators left in float, in onnxruntime.

    python benchmarks/forms.py [hard-swish transposed ...]

Each operator stands between two 1x1 convolutions of 64 channels, 56x56 (28x28 before a transposed one), batch 1, one
thread. Two files of one network: one with all operators on integers, one without this operator. Both are interleaved;
the least of all rounds counts.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import onnx_ir as ir
import torch
from torch import Tensor, nn

from calibrators import PlacementOptions, calibrate
from exporter import capture, fold
from exporter.emission.build_model import needed_opset, to_onnx
from runtime_tests.ort.sessions import session

ROUNDS = 60
CHANNELS = 64


class Form(nn.Module):
    """A function as a module, which can be excluded by its name."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Net(nn.Module):
    """A form between two convolutions."""

    def __init__(self, form: nn.Module) -> None:
        super().__init__()
        self.first, self.form, self.last = nn.Conv2d(CHANNELS, CHANNELS, 1), form, nn.LazyConv2d(CHANNELS, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.form(self.first(x)))


def prelu() -> nn.Module:
    module = nn.PReLU(CHANNELS)
    nn.init.uniform_(module.weight, -0.2, 0.6)
    return module


FORMS: dict[str, Callable[[], nn.Module]] = {
    "hard-sigmoid": nn.Hardsigmoid,
    "hard-swish": nn.Hardswish,
    "quick-gelu": lambda: Form(lambda x: x * torch.sigmoid(1.702 * x)),
    "scaled-branch": lambda: Form(lambda x: x + 0.2 * torch.sigmoid(x)),
    "prelu": prelu,
    "prelu-of-one-slope": nn.PReLU,
    "maxout": lambda: Form(lambda x: torch.maximum(*x.chunk(2, 1))),
    "minimum-along-channels": lambda: Form(lambda x: x.amin(1, keepdim=True)),
    "conv3d": lambda: nn.Sequential(nn.Unflatten(1, (16, 4)), nn.Conv3d(16, 16, 3, padding=1), nn.Flatten(1, 2)),
    "transposed 4x4 s2": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 4, 2, 1),
    "transposed 3x3 s2": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 3, 2, 1, 1),
    "transposed 2x2 s2": lambda: nn.ConvTranspose2d(CHANNELS, CHANNELS, 2, 2),
}


def seconds(name: str) -> tuple[float, float]:
    """Return the least seconds of the file with the form on integers, and of the one with it in float."""
    torch.manual_seed(0)
    size = 28 if name.startswith("transposed") else 56
    model, x = Net(FORMS[name]()).eval(), torch.randn(2, CHANNELS, size, size)
    with torch.no_grad():
        model(x)
    graph = fold(capture(model, (x,)))
    runs = []
    for exclude in ((), ("form",)):
        result = calibrate(
            graph, [x], method="minmax", placement=PlacementOptions(exclude=exclude, placement="integer")
        )
        runs.append(session(ir.to_proto(to_onnx(result.program, opset=needed_opset(result))), threads=1))
    least = [float("inf")] * len(runs)
    feed = {runs[0].get_inputs()[0].name: x[:1].numpy()}
    for _ in range(ROUNDS):
        for index, run in enumerate(runs):
            start = time.perf_counter()
            run.run(None, feed)
            least[index] = min(least[index], time.perf_counter() - start)
    return least[0], least[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FORMS)}; all by default")
    print(f"{'form':24} {'integer':>9} {'float':>9}  ratio")
    for name in parser.parse_args().names or FORMS:
        integer, in_float = seconds(name)
        print(f"{name:24} {integer * 1e3:6.2f} ms {in_float * 1e3:6.2f} ms  {in_float / integer:.2f}", flush=True)


if __name__ == "__main__":
    main()
