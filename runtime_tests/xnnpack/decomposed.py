"""Write a reference program with the quantize and dequantize operators that ExecuTorch knows, on int8 codes.

XNNPACK runs an operator on integers if it finds a dequantizer before every operand and a quantizer after the result. So
codes that are moved, padded or clipped get a pair around each such operator, every reader has a dequantizer of its own,
and limits of codes stand as a clip before the quantizer. Biases are floats there, which are the values of their codes.

Must not know: ExecuTorch's packages, files, ONNX.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, fx

from calibrators.errors import ModelError, argument
from calibrators.graph.aten import add_constant, bind, constant, is_constant, shape_of
from calibrators.graph.operators import LISTS, facts
from calibrators.program.qdq_program import DEQUANTIZE, QUANTIZE
from calibrators.targets import xnnpack

__all__ = ["decomposed"]

aten, pairs = torch.ops.aten, torch.ops.quantized_decomposed

SHIFT = 128
"""Difference of a uint8 code and the int8 code of the same value."""
FIRST, LAST = -128, 127
MOVES = xnnpack.TARGET.same_scale_ops
RESHAPES = ("Reshape", "Squeeze", "Unsqueeze")
FUSED_CLIP = (aten.conv1d.default, aten.conv2d.default, aten.linear.default)
"""Operators with whose kernel XNNPACK joins a clip."""


@dataclass(frozen=True)
class _Grid:
    """The grid of int8 codes; low, high: the codes that occur."""

    scale: float
    zero_point: int
    low: int = FIRST
    high: int = LAST

    @property
    def bounds(self) -> tuple[float, float]:
        """The values of the first and the last code."""
        values = torch.tensor([self.low - self.zero_point, self.high - self.zero_point]) * torch.tensor(self.scale)
        return float(values[0]), float(values[1])

    @property
    def is_narrow(self) -> bool:
        return (self.low, self.high) != (FIRST, LAST)

    @property
    def arguments(self) -> tuple[Any, ...]:
        return self.scale, self.zero_point, FIRST, LAST, torch.int8

    def is_like(self, other: _Grid) -> bool:
        """Return whether a code has the same value on both grids."""
        return (self.scale, self.zero_point) == (other.scale, other.zero_point)


@dataclass(frozen=True, eq=False)
class _Coded:
    """A value of which the new graph holds int8 codes."""

    codes: fx.Node
    grid: _Grid


def decomposed(program: fx.GraphModule, probes: Sequence[str] = ()) -> fx.GraphModule:
    """Return a module that computes what the program does; codes among its outputs are int8.

    probes: sites whose codes are further outputs.
    raises: ModelError for codes of other types than 8 bits, and for codes that are read with another scale.
    """
    return _Writer(program).written(probes)


class _Writer:
    """Writes the new graph node by node; `values` holds floats as nodes, and codes as _Coded."""

    def __init__(self, program: fx.GraphModule) -> None:
        self.program, self.module, self.graph = program, fx.GraphModule({}, fx.Graph()), fx.Graph()
        self.values: dict[fx.Node, Any] = {}
        self.sites: dict[str, _Coded] = {}
        self.early = {origin: quantizer for quantizer in program.graph.nodes if (origin := _origin(quantizer))}

    def written(self, probes: Sequence[str]) -> fx.GraphModule:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self.graph.placeholder(node.name)
            elif node.op == "output":
                outputs = [self._output(x) for x in node.args[0]]
                self.graph.output((*outputs, *(self.sites[site].codes for site in probes)))
            elif node.op == "call_function" and node.target not in LISTS:
                self.values[node] = self._early(node, self._value(node))
        self.module.graph = self.graph
        self.module.recompile()
        return self.module

    # --- values ---------------------------------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> Any:
        if node.target is QUANTIZE:
            return self._quantized(node)
        if node.target is DEQUANTIZE:
            return self._dequantized(node)
        if node.target is operator.getitem:
            return self._item(node)
        operands = [self.values.get(x) for x in node.all_input_nodes]
        coded = next((x for x in operands if isinstance(x, _Coded)), None)
        is_quantized = node in self.early or [user.target for user in node.users] == [QUANTIZE]
        if node.target is aten.cat.default and is_quantized:
            _check_joined(node, operands)
        if coded is not None and (node.target in MOVES or self._is_on_codes(node)):
            return self._moved(node, coded)
        return self._called(node)

    def _early(self, node: fx.Node, value: Any) -> Any:
        """Quantize a result before it is moved, where the program quantizes it after that."""
        if node not in self.early or isinstance(value, _Coded):
            return value
        return self._coded(value, self._grid(self.early[node]), node)

    def _quantized(self, node: fx.Node) -> _Coded:
        value, grid = self.values[_source(node)], self._grid(node)
        if isinstance(value, _Coded) and value.grid.is_like(grid):
            coded = self._clipped(value, grid)
        else:
            coded = self._coded(self._floats(value), grid, _source(node))
        self.sites[str(bind(node)["site"])] = coded
        return coded

    def _coded(self, x: fx.Node, grid: _Grid, made_by: Any) -> _Coded:
        """Quantize floats; the limits of the codes are a clip before the quantizer, or after it."""
        if grid.is_narrow and made_by.target in FUSED_CLIP and len(made_by.users) == 1:
            clipped = self._call(aten.hardtanh.default, x, *grid.bounds)
            return _Coded(self._call(pairs.quantize_per_tensor.default, clipped, *grid.arguments), grid)
        full = _Grid(grid.scale, grid.zero_point)
        return self._clipped(_Coded(self._call(pairs.quantize_per_tensor.default, x, *full.arguments), full), grid)

    def _clipped(self, coded: _Coded, grid: _Grid) -> _Coded:
        if grid.low <= coded.grid.low and coded.grid.high <= grid.high:
            return coded
        clipped = self._call(aten.hardtanh.default, self._floats(coded), *grid.bounds)
        return _Coded(self._call(pairs.quantize_per_tensor.default, clipped, *grid.arguments), grid)

    def _dequantized(self, node: fx.Node) -> Any:
        bound = bind(node)
        if is_constant(bound["codes"]):
            return self._constant(node)
        value, scale = self.values[bound["codes"]], float(constant(self.program, bound["scale"]))
        if not isinstance(value, _Coded):
            return self._of_bytes(value, scale, int(constant(self.program, bound["zero_point"])))
        if scale != value.grid.scale:
            raise ModelError(
                f"the codes of {bound['site']!r} are read with another scale than that of their quantizer, which "
                "ExecuTorch cannot express; export the model for the target xnnpack."
            )
        return value

    def _of_bytes(self, codes: fx.Node, scale: float, zero_point: int) -> _Coded:
        """Return an input of bytes that are codes: as int8, by way of their values."""
        floats = self.graph.call_function(aten._to_copy.default, (codes,), {"dtype": torch.float32})
        values = self._call(aten.mul.Tensor, self._call(aten.sub.Tensor, floats, float(zero_point)), scale)
        return self._coded(values, _Grid(scale, zero_point - SHIFT), codes)

    def _constant(self, node: fx.Node) -> Any:
        """Return the dequantized form of a weight or of a constant operand, or the values of a bias."""
        bound = bind(node)
        codes, scale, zero_point = (constant(self.program, bound[name]) for name in ("codes", "scale", "zero_point"))
        if codes.dtype == torch.int32:
            return self._buffer(bound["codes"], _values_of_bias(codes, scale, bound["site"]))
        if codes.dtype not in (torch.uint8, torch.int8) or bound["block_size"] is not None:
            raise ModelError(
                f"the codes of {bound['site']!r} have no kernel in XNNPACK; export for the target xnnpack."
            )
        shift = SHIFT if codes.dtype == torch.uint8 else 0
        held = self._buffer(bound["codes"], (codes.to(torch.int16) - shift).to(torch.int8))
        if scale.ndim == 0:
            return _Coded(held, _Grid(float(scale), int(zero_point) - shift))
        scales = self._buffer(bound["scale"], scale)
        zeros = self._buffer(bound["zero_point"], zero_point.to(torch.int64) - shift)
        return self._call(
            pairs.dequantize_per_channel.default, held, scales, zeros, bound["axis"], FIRST + 1, LAST, torch.int8
        )

    def _item(self, node: fx.Node) -> Any:
        """Return one of several results; a part of what was cut is a slice of it."""
        whole, index = node.args
        assert isinstance(whole, fx.Node) and isinstance(index, int)
        if whole.target not in LISTS:
            return self._call(operator.getitem, self.values[whole], index)
        axis, value = bind(whole)["dim"], self.values[_source(whole)]
        if whole.target is aten.unbind.int:
            part = self._call(aten.select.int, self._floats(value), axis, index)
        else:
            sizes = [shape[axis] for shape in (tuple(part.shape) for part in whole.meta["tensor_meta"])]
            start = sum(sizes[:index])
            part = self._call(aten.slice.Tensor, self._floats(value), axis, start, start + sizes[index])
        return self._again(part, value) if isinstance(value, _Coded) else part

    def _moved(self, node: fx.Node, coded: _Coded) -> _Coded:
        """Move, pad or clip codes: between a dequantizer and a quantizer of one grid."""
        if node.target is aten.clamp.default:
            bound = bind(node)
            low, high = (bound[name] - self._shift(node) for name in ("min", "max"))
            return self._clipped(coded, _Grid(coded.grid.scale, coded.grid.zero_point, low, high))
        if node.target is aten.constant_pad_nd.default:
            moved = self._call(node.target, self._floats(coded), node.args[1], 0.0)
        else:
            moved = self._called(node)
        return self._again(moved, coded)

    def _again(self, x: fx.Node, like: _Coded) -> _Coded:
        """Quantize floats on the grid of codes."""
        return _Coded(self._call(pairs.quantize_per_tensor.default, x, *like.grid.arguments), like.grid)

    def _called(self, node: fx.Node) -> fx.Node:
        """Call an operator on floats, in the form in which XNNPACK knows it."""
        target: Any = node.target
        arguments: Any = fx.map_arg(node.args, lambda x: self._floats(self._read(x)))
        keywords: Any = fx.map_arg(node.kwargs, lambda x: self._floats(self._read(x)))
        if facts(node.target).onnx in RESHAPES:
            return self._call(aten.reshape.default, arguments[0], list(shape_of(node)))
        if target is aten.adaptive_avg_pool2d.default and list(arguments[1]) == [1, 1]:
            return self._call(aten.mean.dim, arguments[0], [2, 3], True)
        return self.graph.call_function(target, arguments, keywords)

    # --- details --------------------------------------------------------------------------------------------------

    def _read(self, node: fx.Node) -> Any:
        if node not in self.values and is_constant(node):
            self.values[node] = self._buffer(node, constant(self.program, node))
        return self.values[node]

    def _output(self, node: fx.Node) -> fx.Node:
        value = self._read(node)
        return value.codes if isinstance(value, _Coded) and node.target is not DEQUANTIZE else self._floats(value)

    def _floats(self, value: Any) -> fx.Node:
        """Return floats, by a dequantizer of their own if there are codes."""
        if not isinstance(value, _Coded):
            assert isinstance(value, fx.Node)
            return value
        return self._call(pairs.dequantize_per_tensor.default, value.codes, *value.grid.arguments)

    def _is_on_codes(self, node: fx.Node) -> bool:
        meta = node.meta.get("tensor_meta")
        return getattr(meta, "dtype", None) in (torch.uint8, torch.int8)

    def _shift(self, node: fx.Node) -> int:
        return SHIFT if node.meta["tensor_meta"].dtype == torch.uint8 else 0

    def _grid(self, quantizer: fx.Node) -> _Grid:
        bound = bind(quantizer)
        zero_point = constant(self.program, bound["zero_point"])
        if zero_point.dtype not in (torch.uint8, torch.int8):
            raise ModelError(
                f"the codes of {bound['site']!r} have more than 8 bits, which XNNPACK does not compute with."
            )
        shift = SHIFT if zero_point.dtype == torch.uint8 else 0
        limits = bound["qmin"] - shift, bound["qmax"] - shift
        return _Grid(float(constant(self.program, bound["scale"])), int(zero_point) - shift, *limits)

    def _buffer(self, node: fx.Node, value: Tensor) -> fx.Node:
        return self.graph.get_attr(add_constant(self.module, str(node.target), value))

    def _call(self, target: Any, *arguments: Any) -> fx.Node:
        return self.graph.call_function(target, arguments)


def _source(node: fx.Node) -> fx.Node:
    """Return the first operand."""
    first = node.args[0]
    assert isinstance(first, fx.Node)
    return first


def _origin(quantizer: fx.Node) -> fx.Node | None:
    """Return the operator whose result is moved before it is quantized; None where nothing moves it."""
    if quantizer.target is not QUANTIZE:
        return None
    node = first = _source(quantizer)
    while node.target in MOVES and node.target is not operator.getitem and len(node.users) == 1:
        node = _source(node)
    is_computed = node.op == "call_function" and node.target is not DEQUANTIZE and len(node.users) == 1
    return node if node is not first and is_computed else None


def _check_joined(node: fx.Node, operands: Sequence[Any]) -> None:
    """Raise ModelError for a concatenation of codes on different grids, which XNNPACK takes for those of one."""
    grids = {x.grid.arguments if isinstance(x, _Coded) else None for x in operands}
    if None not in grids and len(grids) > 1:
        raise ModelError(
            f"{node.name} joins codes of different scales, which XNNPACK cannot; keep it in float "
            f"({argument('exclude', node.name)})."
        )


def _values_of_bias(codes: Tensor, scale: Tensor, site: str) -> Tensor:
    """Return the values of a bias, which XNNPACK quantizes to the same codes.

    raises: ModelError where float32 does not hold them exactly enough.
    """
    values = codes.to(torch.float32) * scale
    if not torch.equal(torch.round(values / scale).to(torch.int32), codes):
        raise ModelError(
            f"the bias {site!r} is too large beside its scale {float(scale.min()):.3g} for the floats "
            "in which ExecuTorch holds biases; use another calibration method, or keep the layer in float."
        )
    return values
