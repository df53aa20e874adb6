"""Small reference programs: networks with the min-max ranges of one batch, and programs written node by node."""

from __future__ import annotations

import functools
from typing import Any

import onnx
import onnx_ir
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from calibrators.graph.aten import add_constant, constant, infer_shapes
from calibrators.graph.canonical import to_integer_forms
from calibrators.grid.numerics import qparams_from_range
from calibrators.grid.spec import QParams, QuantSpec
from calibrators.placement.place import PlacementOptions, place
from calibrators.program.freeze import CalibrationResult, freeze
from calibrators.program.qdq_program import DEQUANTIZE, QUANTIZE
from calibrators.targets import get_target
from exporter.emission.build_model import to_onnx
from exporter.frontend.capture import capture


@torch.no_grad()
def calibrated(
    model: nn.Module, *inputs: Tensor, options: PlacementOptions | None = None, target: str = "ort-cpu"
) -> CalibrationResult:
    """Scales, zero points and codes of `model`, from the ranges of one batch."""
    placement = place(to_integer_forms(capture(model.eval(), inputs)), get_target(target), options)
    seen = _Recorder(placement.graph)
    seen.run(*inputs)
    nodes = {node.name: node for node in placement.graph.graph.nodes}
    activations, weights = {}, {}
    for site in placement.sites:
        if site.kind == "activation" and site.fixed is not None:
            scale, zero_point = site.fixed
            activations[site.name] = QParams(
                torch.tensor(scale), torch.tensor(zero_point, dtype=torch.int32), site.spec
            )
        elif site.kind == "activation" and site.shares is None:
            activations[site.name] = _range(seen.values[site.node].flatten(), site.spec)
        elif site.kind == "weight":
            weights[site.name] = _range(constant(placement.graph, nodes[site.node]), site.spec)
    return freeze(placement, activations, weights)


def file_of(program: fx.GraphModule) -> onnx.ModelProto:
    """The ONNX model that the exporter makes of `program`."""
    infer_shapes(program)
    return onnx_ir.to_proto(to_onnx(program, opset=20))


def _range(x: Tensor, spec: QuantSpec) -> QParams:
    if spec.axis is None:
        return qparams_from_range(x.min(), x.max(), spec)
    return qparams_from_range(x.flatten(1).amin(1), x.flatten(1).amax(1), spec)


class _Recorder(fx.Interpreter):
    """Runs a graph and keeps every value."""

    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.values: dict[str, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


# --- programs written node by node -----------------------------------------------------------------------------------

aten = torch.ops.aten
X_SCALE, W_SCALE = 0.02, 0.01


class Program:
    """A reference program under construction; every method returns the node it makes."""

    def __init__(self, seed: int = 0) -> None:
        self.module, self.graph = fx.GraphModule(nn.Module(), fx.Graph()), fx.Graph()
        self.random = torch.Generator().manual_seed(seed)
        self.example: list[Tensor] = []
        self.names: list[str] = []

    def input(self, *shape: int) -> fx.Node:
        self.names.append(f"x{len(self.names)}")
        self.example.append(torch.randn(shape, generator=self.random))
        return self.graph.placeholder(self.names[-1])

    def constant(self, name: str, value: Tensor) -> fx.Node:
        return self.graph.get_attr(add_constant(self.module, name, value))

    def call(self, operator: Any, *args: Any) -> fx.Node:
        return self.graph.call_function(operator, args)

    def quantized(
        self, node: fx.Node, *, scale: float = X_SCALE, zero_point: int = 100, dtype: torch.dtype = torch.uint8
    ) -> fx.Node:
        """Quantize and dequantize behind a value; the site is called like the value."""
        site, limits = f"{node.name}_site", torch.iinfo(dtype)
        scale_node = self.constant(f"{site}_scale", torch.tensor(scale))
        zero = self.constant(f"{site}_zero_point", torch.tensor(zero_point, dtype=dtype))
        codes = self.call(QUANTIZE, node, scale_node, zero, limits.min, limits.max, None, site)
        return self.call(DEQUANTIZE, codes, scale_node, zero, None, site)

    def weight(self, *shape: int) -> fx.Node:
        codes = torch.randint(-127, 128, shape, generator=self.random, dtype=torch.int8)
        scale = torch.full(shape[:1], W_SCALE) * (1 + torch.rand(shape[0], generator=self.random))
        return self._parameter("weight", codes, scale)

    def bias(self, weight: fx.Node, *, factor: float = 1.0) -> fx.Node:
        """A bias behind a weight, for an input of the default scale; `factor` spoils its scale."""
        scale = torch.tensor(X_SCALE) * constant(self.module, weight.args[1]) * factor  # type: ignore[arg-type]
        codes = torch.randint(-9999, 9999, scale.shape, generator=self.random, dtype=torch.int32)
        return self._parameter("bias", codes, scale)

    def _parameter(self, name: str, codes: Tensor, scale: Tensor) -> fx.Node:
        zero = self.constant(f"{name}_zero_point", torch.zeros(scale.shape, dtype=codes.dtype))
        arguments = self.constant(f"{name}_codes", codes), self.constant(f"{name}_scale", scale), zero
        return self.call(DEQUANTIZE, *arguments, 0, name)

    def build(self, *outputs: fx.Node) -> fx.GraphModule:
        self.graph.output(outputs)
        program = fx.GraphModule(self.module, self.graph)
        program.meta = {
            "example": tuple(self.example),
            "dynamic_batch": False,
            "input_names": self.names,
            "output_names": [f"y{index}" for index in range(len(outputs))],
            "names": {},
        }
        return program


# --- networks --------------------------------------------------------------------------------------------------------


class Residual(nn.Module):
    """Convolutions, a residual sum, global pooling, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu(self.stem(x))
        x = functional.relu(x + self.body(x))
        x = functional.adaptive_avg_pool2d(x, 1)
        return self.head(torch.flatten(x, 1))


class Mobile(nn.Module):
    """Depthwise convolutions and ReLU6."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.expand = nn.Conv2d(3, 8, 3, stride=2, padding=1), nn.Conv2d(8, 24, 1)
        self.depthwise, self.project = nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(8, 10)
        with torch.no_grad():
            self.expand.weight *= 12  # beyond 6

    def forward(self, x: Tensor) -> Tensor:
        x = functional.relu6(self.stem(x))
        y = functional.relu6(self.depthwise(functional.relu6(self.expand(x))))
        return self.head((x + self.project(y)).mean((2, 3)))


class Gated(nn.Module):
    """Concatenation, pools, a sigmoid gate over channels, SiLU, leaky ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(3, 8, 1)
        self.gate, self.mix, self.tail = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 3, dilation=2)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([functional.relu(self.left(x)), functional.silu(self.right(x))], 1)
        y = functional.max_pool2d(y, 2)
        pooled = functional.adaptive_avg_pool2d(y, 1)
        y = torch.sigmoid(self.gate(pooled)) * y
        y = functional.leaky_relu(self.mix(y), 0.1)
        y = functional.avg_pool2d(functional.interpolate(y, scale_factor=2), 2)
        return self.tail(functional.adaptive_avg_pool2d(y, 1) + self.mix(y)).flatten(1)


class Perceptron(nn.Module):
    """Tokens, LayerNorm, GELU in float between linear layers, a float residual."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(functional.gelu(self.up(self.norm(x))))


NETWORKS: dict[str, tuple[type[nn.Module], tuple[int, ...]]] = {
    "residual": (Residual, (4, 3, 16, 16)),
    "mobile": (Mobile, (4, 3, 16, 16)),
    "gated": (Gated, (4, 3, 16, 16)),
    "perceptron": (Perceptron, (4, 6, 16)),
}


def network(name: str, bits: int = 8) -> tuple[CalibrationResult, Tensor]:
    """A calibrated network with fixed random weights, and the batch it was calibrated on; made once."""
    return _network(name, bits)


def emitted(name: str, bits: int = 8) -> onnx.ModelProto:
    """The file of a calibrated network; made once, so change copies only."""
    return _emitted(name, bits)


@functools.cache
def _network(name: str, bits: int) -> tuple[CalibrationResult, Tensor]:
    make, shape = NETWORKS[name]
    with torch.random.fork_rng():
        torch.manual_seed(len(name))
        model, x = make(), torch.randn(shape)
    options = PlacementOptions(weight_bits=bits, activation_bits=bits, first_last_bits=None)
    return calibrated(model, x, options=options), x


@functools.cache
def _emitted(name: str, bits: int) -> onnx.ModelProto:
    return file_of(_network(name, bits)[0].program)
