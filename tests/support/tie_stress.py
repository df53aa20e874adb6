"""A file of integer kernels alone, on grids with many ties, and the codes that each family of processors computes.

Sums and products read all pairs of codes, sigmoids all codes, means all sums of an image.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from calibrators.grid.kernel_tables import CodeGrid, add, mul, sigmoid, table
from calibrators.grid.processors import Processor
from runtime_tests.reference.kernels import Grid, PoolGeometry, average_pool, global_average_pool

__all__ = ["TieStress", "tie_stress"]

Array = NDArray[Any]
Expected = Callable[[Processor], Array]

CODES = np.arange(256, dtype=np.uint8)
SIDE = 7
WINDOW = PoolGeometry((3, 3), (2, 2), (1, 1), True)


@dataclass
class TieStress:
    """The nodes so far, their constants, and the codes of every output by family."""

    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)
    expected: dict[str, Expected] = field(default_factory=dict)

    @property
    def feeds(self) -> dict[str, Array]:
        """All pairs of codes as two squares, a column of codes, and images with every sum, by input."""
        first, second = np.meshgrid(CODES, CODES, indexing="ij")
        return {"a": first, "b": second, "column": CODES[:, None], "images": images()}

    def model(self) -> onnx.ModelProto:
        """Return the file."""
        inputs = [helper.make_tensor_value_info(n, TensorProto.UINT8, x.shape) for n, x in self.feeds.items()]
        outputs = [helper.make_tensor_value_info(name, TensorProto.UINT8, None) for name in self.expected]
        graph = helper.make_graph(self.nodes, "ties", inputs, outputs, self.constants)
        opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=9)

    def add(self, kernel: str, inputs: dict[str, CodeGrid], y: CodeGrid, expected: Expected, **attributes: int) -> None:
        """Append a kernel that reads graph inputs on the given grids."""
        name = f"{kernel}_{len(self.nodes)}"
        names = [part for value, grid in inputs.items() for part in (value, *self._parameters(grid))]
        names += self._parameters(y)
        self.nodes.append(helper.make_node(kernel, names, [name], domain="com.microsoft", **attributes))
        self.expected[name] = expected

    def _parameters(self, grid: CodeGrid) -> list[str]:
        names = [f"{what}_{len(self.constants)}" for what in ("scale", "zero_point")]
        for name, value in zip(names, (grid.step, np.uint8(grid.zero_point)), strict=True):
            self.constants.append(numpy_helper.from_array(np.asarray(value), name))
        return names


def images() -> Array:
    """Return images with every sum of codes, as channels [1, sums, SIDE, SIDE]."""
    size = SIDE * SIDE
    quotients, rests = np.divmod(np.arange(255 * size + 1), size)
    flat = quotients[:, None] + (np.arange(size) < rests[:, None])
    return flat.astype(np.uint8).reshape(1, -1, SIDE, SIDE)


def tie_stress(grids: int) -> TieStress:
    """Return a file with `grids` random grids per kernel, as many of powers of two, and as many next to these."""
    stress, rng = TieStress(), np.random.default_rng(0)
    for scale in (lambda: np.exp(rng.uniform(-4, 0)), partial(_power, rng, 0), partial(_power, rng, 3)):
        for _ in range(grids):
            _append(stress, *(CodeGrid(float(np.float32(scale())), int(rng.integers(0, 256))) for _ in range(3)))
    return stress


def _power(rng: np.random.Generator, units: int) -> float:
    """Return a power of two, at most some float32 numbers away from it."""
    return float(2.0 ** rng.integers(-6, 0) * (1 + int(rng.integers(-units, units + 1)) * 2.0**-23))


def _append(stress: TieStress, a: CodeGrid, b: CodeGrid, y: CodeGrid) -> None:
    codes = CODES.astype(np.float32)

    def spread(processor: Processor) -> Array:
        arithmetic = "plain, one b" if processor.add == "plain" else processor.add
        return add(codes, codes[:, None], a, b, y, arithmetic)

    def means(_: Processor) -> Array:
        return global_average_pool(torch.from_numpy(images()), _grid(a), _grid(y)).numpy()

    def averages(_: Processor) -> Array:
        return average_pool(torch.from_numpy(images()), _grid(a), _grid(y), WINDOW).numpy()

    pair = {"a": a, "b": b}
    stress.add("QLinearAdd", pair, y, lambda p: add(codes[:, None], codes, a, b, y, p.add))
    stress.add("QLinearAdd", {"b": a, "column": b}, y, spread)
    stress.add("QLinearAdd", {"column": b, "b": a}, y, spread)
    stress.add("QLinearMul", pair, y, lambda p: mul(codes[:, None], codes, a, b, y, p.mul))
    stress.add(
        "QLinearSigmoid", {"column": a}, y, lambda p: table(lambda x: sigmoid(x, p.sigmoid), codes[:, None], a, y)
    )
    stress.add("QLinearGlobalAveragePool", {"images": a}, y, means, channels_last=0)
    window = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1}
    stress.add("QLinearAveragePool", {"images": a}, y, averages, **window)


def _grid(grid: CodeGrid) -> Grid:
    return Grid(torch.tensor(grid.step), grid.zero_point, grid.qmin, grid.qmax, torch.uint8)
