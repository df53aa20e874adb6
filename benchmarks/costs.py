"""Measure what operators cost in onnxruntime, as floats and as integers, and print the table of `placement: fastest`.

    python benchmarks/costs.py > costs.txt
    python benchmarks/costs.py silu 'hard sigmoid'

Every operator stands alone in a file, at several sizes, once in float and once between quantizers. The times are those
of onnxruntime's profiler: for each node the least of many runs, less what the profiler itself adds, on one thread. A
cost is then fitted: nanoseconds per node and per unit of its work
(calibrators.grid.costs), by least squares of the relative errors.

The table in calibrators/grid/x86_costs.py was measured on the machine that it names. Run this on an idle one.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from runs import provenance
from scipy.optimize import nnls

from calibrators.grid.costs import Cost, Work, kind_of_convolution
from runtime_tests.ort.sessions import profiling_session

RUNS = 60
AROUND = {
    "QuantizeLinear": "quantize",
    "DequantizeLinear": "dequantize",
    "Transpose": "layout",
    "ReorderInput": "layout",
    "ReorderOutput": "layout",
}
"""Nodes around the measured operator, and the rows of the table that they belong to."""

CONVOLUTIONS = [
    # input channels, output channels, groups, size, kernel, stride
    *[(3, 8, 1, 64, 3, 2), (3, 16, 1, 96, 3, 2), (3, 32, 1, 112, 3, 2), (1, 16, 1, 64, 5, 2), (8, 8, 1, 48, 3, 1)],
    *[
        (10, 16, 1, 46, 3, 1),
        (16, 16, 1, 32, 3, 1),
        (16, 32, 1, 44, 3, 1),
        (32, 32, 1, 32, 3, 1),
        (48, 48, 1, 28, 3, 1),
    ],
    *[(64, 64, 1, 28, 3, 1), (128, 128, 1, 14, 3, 1), (256, 256, 1, 7, 3, 1), (96, 192, 1, 28, 3, 2)],
    *[(8, 8, 1, 40, 1, 1), (8, 12, 1, 45, 1, 1), (16, 16, 1, 32, 1, 1), (20, 20, 1, 26, 1, 1), (16, 64, 1, 32, 1, 1)],
    *[(64, 16, 1, 32, 1, 1), (24, 72, 1, 28, 1, 1), (40, 240, 1, 14, 1, 1), (96, 576, 1, 7, 1, 1)],
    *[(128, 128, 1, 14, 1, 1), (256, 256, 1, 14, 1, 1), (32, 16, 1, 56, 1, 1), (64, 128, 1, 28, 1, 2)],
    *[
        (8, 8, 8, 48, 3, 1),
        (16, 16, 16, 56, 3, 2),
        (32, 32, 32, 32, 3, 1),
        (64, 64, 64, 28, 3, 1),
        (20, 20, 20, 26, 3, 1),
    ],
    *[(72, 72, 72, 28, 5, 1), (96, 96, 96, 14, 5, 1), (240, 240, 240, 14, 3, 1), (576, 576, 576, 7, 5, 1)],
    *[
        (32, 32, 4, 28, 3, 1),
        (64, 64, 8, 28, 3, 1),
        (128, 128, 32, 14, 3, 1),
        (64, 64, 2, 28, 1, 1),
        (96, 96, 3, 14, 3, 1),
    ],
]
LINEAR = [(1, 64, 64), (1, 256, 256), (1, 1024, 1000), (16, 64, 64), (64, 64, 128), (64, 256, 256), (196, 192, 192)]
IMAGES = [(1, 16, 16, 16), (1, 32, 32, 32), (1, 16, 96, 96), (1, 128, 28, 28)]


@dataclass
class Net:
    """A file under construction with one operator; `integer` puts quantizers around every value."""

    integer: bool

    def __post_init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: list[Any] = []
        self.rng = np.random.default_rng(0)

    def constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        name = f"v{len(self.nodes)}"
        self.nodes.append(helper.make_node(kind, list(inputs), [name], **attributes))
        return name

    def codes(self, value: str, scale: float = 1 / 64, zero: int = 128) -> str:
        """Return the value between quantizers, or itself in a float file."""
        if not self.integer:
            return value
        parameters = [self.constant(np.float32(scale)), self.constant(np.uint8(zero))]
        return self.op("DequantizeLinear", self.op("QuantizeLinear", value, *parameters), *parameters)

    def weight(self, *shape: int, axis: int = 0) -> str:
        codes = self.rng.integers(-50, 50, shape, dtype=np.int8)
        scale = np.full(shape[axis], 2e-3, np.float32)
        if not self.integer:
            return self.constant(codes.astype(np.float32) * np.float32(2e-3))
        zero = self.constant(np.zeros(shape[axis], np.int8))
        return self.op("DequantizeLinear", self.constant(codes), self.constant(scale), zero, axis=axis)

    def bias(self, count: int) -> str:
        if not self.integer:
            return self.constant(np.zeros(count, np.float32))
        scale = self.constant(np.full(count, np.float32(1 / 64) * np.float32(2e-3), np.float32))
        return self.op("DequantizeLinear", self.constant(np.zeros(count, np.int32)), scale,
                       self.constant(np.zeros(count, np.int32)), axis=0)  # fmt: skip

    def model(self, output: str, inputs: Sequence[Sequence[int]]) -> onnx.ModelProto:
        values = [helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, shape) for i, shape in enumerate(inputs)]
        graph = helper.make_graph(self.nodes, "one", values, [onnx.ValueInfoProto(name=output)], self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
        model.ir_version = 10
        return model


@dataclass(frozen=True)
class Sample:
    """One measured node: what it is, its form, its work, its nanoseconds."""

    kind: str
    integer: bool
    work: Work
    nanoseconds: float


def profiled(model: onnx.ModelProto, shapes: Sequence[Sequence[int]]) -> list[tuple[str, int, float]]:
    """Return operator, output elements and least nanoseconds of each node that runs."""
    rng = np.random.default_rng(1)
    feed = {f"x{index}": rng.normal(size=shape).astype(np.float32) for index, shape in enumerate(shapes)}
    with tempfile.TemporaryDirectory() as folder:
        session = profiling_session(model, Path(folder) / "profile")
        for _ in range(RUNS):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    least: dict[tuple[str, str], Any] = {}
    for event in events:
        if event.get("cat") == "Node":
            args = event["args"]
            key = (args["node_index"], event["name"])
            [shape] = args["output_type_shape"][0].values()
            best = min(least[key][2] if key in least else np.inf, 1e3 * event["dur"])
            least[key] = (args["op_name"], int(np.prod(shape)), best)
    return list(least.values())


def profiler_overhead() -> tuple[float, float]:
    """Return what a node that computes nothing takes, and what the profiler adds to it, in nanoseconds."""
    net, count, value = Net(integer=False), 200, "x0"
    for _ in range(count):
        value = net.op("Neg", value)
    model = net.model(value, [(1,)])
    with_profiler = sum(each for _, _, each in profiled(model, [(1,)])) / count
    with tempfile.TemporaryDirectory() as folder:
        session = profiling_session(model, Path(folder) / "profile")
        session.run(None, {"x0": np.ones(1, np.float32)})
        session.end_profiling()
        times = []
        for _ in range(500):
            begin = time.perf_counter_ns()
            session.run(None, {"x0": np.ones(1, np.float32)})
            times.append(time.perf_counter_ns() - begin)
    own = min(times) / count
    return own, with_profiler - own


Build = Callable[[Net], str]
Case = tuple[str, Work, Build, list[Sequence[int]]]
"""Row of the table, work, what builds the file, and the shapes of its inputs."""


def convolutions() -> Iterator[Case]:
    for into, out, groups, size, kernel, stride in CONVOLUTIONS:
        weight, side = (out, into // groups, kernel, kernel), (size + stride - 1) // stride
        attributes = {"group": groups, "strides": [stride, stride], "pads": [kernel // 2] * 4}

        def build(net: Net, weight: Sequence[int] = weight, attributes: dict[str, Any] = attributes) -> str:
            y = net.op("Conv", net.codes("x0"), net.weight(*weight), net.bias(weight[0]), **attributes)
            return net.codes(y, 1 / 16)

        work = Work.of_product((1, out, side, side), weight, groups)
        yield kind_of_convolution(weight, groups), work, build, [(1, into, size, size)]


def linear() -> Iterator[Case]:
    for rows, into, out in LINEAR:

        def build(net: Net, into: int = into, out: int = out) -> str:
            x, weight = net.codes("x0"), net.weight(out, into)
            return net.codes(net.op("Gemm", x, weight, net.bias(out), transB=1), 1 / 16)

        yield "linear", Work.of_product((1, out, rows), (out, into), 1), build, [(rows, into)]


def one(op: str, scale: float = 1 / 64, zero: int = 128, **attributes: Any) -> Build:
    return lambda net: net.codes(net.op(op, net.codes("x0"), **attributes), scale, zero)


def two(op: str, **attributes: Any) -> Build:
    return lambda net: net.codes(net.op(op, net.codes("x0"), net.codes("x1"), **attributes), 1 / 32)


def silu(net: Net) -> str:
    x = net.codes("x0")
    return net.codes(net.op("Mul", x, net.codes(net.op("Sigmoid", x), 1 / 256, 0)), 1 / 32)


def maximum(net: Net) -> str:
    """Return the maximum of two values: of codes themselves, in a file of integers."""
    if not net.integer:
        return net.op("Max", "x0", "x1")
    parameters = [net.constant(np.float32(1 / 64)), net.constant(np.uint8(128))]
    codes = [net.op("QuantizeLinear", name, *parameters) for name in ("x0", "x1")]
    return net.op("DequantizeLinear", net.op("Max", *codes), *parameters)


def after_convolution(op: str, channels: int, **attributes: Any) -> Build:
    """Return the operator after a convolution, whose layout it takes over."""

    def build(net: Net) -> str:
        x = net.op("Conv", net.codes("x0"), net.weight(channels, channels, 1, 1), net.bias(channels))
        return net.codes(net.op(op, net.codes(x), **attributes))

    return build


def elementwise() -> Iterator[Case]:
    halves = {"kernel_shape": [2, 2], "strides": [2, 2]}
    for shape in IMAGES:
        forms: dict[str, tuple[Build, int]] = {
            "add.Tensor": (two("Add"), 2),
            "mul.Tensor": (two("Mul"), 2),
            "sigmoid.default": (one("Sigmoid", 1 / 256, 0), 1),
            "leaky_relu.default": (one("LeakyRelu", alpha=0.1), 1),
            "silu": (silu, 1),
            "relu.default": (one("Relu"), 1),
            "maximum.default": (maximum, 2),
            "hard sigmoid": (one("HardSigmoid", 1 / 256, 0, alpha=1 / 6, beta=0.5), 1),
            "max_pool2d.default": (after_convolution("MaxPool", shape[1], **halves), 1),
            "max pool of planes": (one("MaxPool", **halves), 1),
            "avg_pool2d.default": (after_convolution("AveragePool", shape[1], **halves), 1),
            "adaptive_avg_pool2d.default": (after_convolution("GlobalAveragePool", shape[1]), 1),
        }
        elements = int(np.prod(shape))
        for kind, (build, inputs) in forms.items():
            yield kind, Work(elements), build, [shape] * inputs
        yield "cat.default", Work(2 * elements), two("Concat", axis=1), [shape] * 2


def samples(added: float, rows: Collection[str]) -> Iterator[Sample]:
    """Yield the measured nodes: each operator, and the quantizers and changes of layout around it."""
    cases = (*convolutions(), *linear(), *elementwise())
    for kind, work, build, shapes in (case for case in cases if not rows or case[0] in rows):
        for integer in (False, True):
            net = Net(integer=integer)
            found = profiled(net.model(build(net), shapes), shapes)
            own = 0.0
            for op, elements, nanoseconds in found:
                spent = max(nanoseconds - added, 100.0)
                if op in AROUND:
                    yield Sample(AROUND[op], integer, Work(elements), spent)
                elif "Conv" not in op or not kind.endswith(".default"):
                    own += spent
            print(f"{kind:28} {'integer' if integer else 'float':8} {own / 1e3:9.1f} us {work}", file=sys.stderr)
            yield Sample(kind, integer, work, own)


def fitted(found: Sequence[Sample], least: float) -> tuple[Cost, float]:
    """Return the cost that explains samples best, and its median relative error."""
    times = np.array([sample.nanoseconds for sample in found])
    columns = np.array([(1.0, *astuple(sample.work)) for sample in found])
    solution, _ = nnls(columns / times[:, None], np.ones(len(found)))
    error = np.median(np.abs(columns @ solution / times - 1))
    return Cost(max(float(solution[0]), least), *(float(f"{each:.3g}") for each in solution[1:])), float(error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", help="rows of the table; all by default")
    arguments = parser.parse_args()
    least, added = profiler_overhead()
    print(f"a node takes {least:.0f} ns, the profiler adds {added:.0f} ns", file=sys.stderr)
    by_kind: dict[tuple[str, bool], list[Sample]] = defaultdict(list)
    for sample in samples(added, arguments.rows):
        by_kind[sample.kind, sample.integer].append(sample)
    print(f"# {provenance()}")
    for kind in dict.fromkeys(kind for kind, _ in by_kind):
        forms = {name: fitted(by_kind[kind, integer], least) for name, integer in FORMS if by_kind.get((kind, integer))}
        costs = ", ".join(f"{name}={_written(cost)}" for name, (cost, _) in forms.items())
        errors = ", ".join(f"{error:.0%}" for _, error in forms.values())
        print(f"    {kind!r}: Costs({costs}),  # {errors}")


FORMS = (("float", False), ("integer", True))


def _written(cost: Cost) -> str:
    """Return the cost as the table has it."""
    given = {name: float(f"{value:.3g}") for name, value in asdict(cost).items() if value}
    return f"Cost({', '.join(f'{name}={value:g}' for name, value in given.items())})"


if __name__ == "__main__":
    main()
