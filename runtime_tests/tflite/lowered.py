"""Write a reference program as the draft of a LiteRT file.

An operator runs on codes exactly where the plan of the target's own runtime has an integer kernel; what the plan moves,
clips and quantizes is moved, clipped and quantized in the file.

Must not know: LiteRT's packages, how a file is run.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from calibrators.errors import ModelError, argument
from calibrators.graph.aten import bind, constant, is_constant, outputs_of, shape_of
from calibrators.graph.operators import LISTS, MOVES
from calibrators.program.qdq_program import DEQUANTIZE, QUANTIZE
from calibrators.targets import tflite
from runtime_tests.reference.kernel_plan import KernelPlan, plan, site_of
from runtime_tests.reference.kernel_rules import source
from runtime_tests.tflite.builder import FIRST, Builder, Grid, Value
from runtime_tests.tflite.call import Call
from runtime_tests.tflite.draft import Draft
from runtime_tests.tflite.moves import cut, moved, moves
from runtime_tests.tflite.operators import computed

__all__ = ["Lowered", "lowered"]

CODES = (torch.uint8, torch.int8)
INPUTS = {torch.float32: "float32", torch.int64: "int64", torch.uint8: "uint8"}


@dataclass(frozen=True)
class Lowered:
    """The draft of a file, and the tensor that holds the codes of each site, by name.

    outside: operators that run on floats, in order.
    """

    draft: Draft
    sites: Mapping[str, str]
    outside: tuple[str, ...]


def lowered(program: fx.GraphModule) -> Lowered:
    """Return the draft of a program, whose batch is fixed.

    raises: ModelError for an operator or codes that a LiteRT file cannot hold here.
    """
    return _Writer(program, plan(program, tflite.TARGET, own=True)).written()


class _Writer:
    """Walks the program; `values` holds what is in the draft."""

    def __init__(self, program: fx.GraphModule, kernels: KernelPlan) -> None:
        self.program, self.plan, self.builder = program, kernels, Builder()
        self.values: dict[fx.Node, Any] = {}
        self.sites: dict[str, int] = {}
        self.outside: list[str] = []

    def written(self) -> Lowered:
        for node in self.program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = self._input(node)
            elif node.op == "call_function" and node not in self.plan.skipped and node.target not in LISTS:
                self.values[node] = self._value(node)
        names = self.program.meta["output_names"]
        draft = self.builder.draft
        for site, tensor in self.sites.items():
            draft.rename(tensor, site)
        for node, name in zip(outputs_of(self.program), names, strict=True):
            draft.outputs.append(self._output(node, name))
        return Lowered(draft, {site: draft.name(tensor) for site, tensor in self.sites.items()}, (*self.outside,))

    # --- ends -----------------------------------------------------------------------------------------------------

    def _input(self, node: fx.Node) -> Value:
        """Add an input: of floats, of indices, or of bytes, which may be codes."""
        shape, dtype = tuple(map(int, shape_of(node))), node.meta["tensor_meta"].dtype
        name = self.program.meta["input_names"][len(self.builder.draft.inputs)]
        readers = [user.target for user in node.users]
        if dtype == torch.uint8 and readers == [torch.ops.aten.permute.default]:
            raise ModelError(
                f"the input {name!r} has channels last already, where a LiteRT file has them by itself; export it with "
                f"{argument('input', 'uint8')}."
            )
        if dtype == torch.uint8 and readers == [DEQUANTIZE]:
            grid = self._grid_read(next(iter(node.users)))
            parameters = {"scale": [grid.scale], "zeroPoint": [grid.zero_point - FIRST]}
            bytes_ = self.builder.input(name, shape, "uint8", parameters)
            return self.builder.call("QUANTIZE", [bytes_], shape, grid, ("QuantizeOptions", {}))
        if dtype not in INPUTS:
            raise ModelError(f"the input {name!r} is {dtype}, and a LiteRT file holds float32, int64 or bytes here.")
        return self.builder.input(name, shape, INPUTS[dtype])

    def _output(self, node: fx.Node, name: str) -> int:
        """Return the tensor of an output: codes where the program gives codes."""
        value = self._read(node)
        if node.target is DEQUANTIZE or not self._is_codes(node):
            value = self.builder.floats(value)
        self.builder.draft.rename(value.tensor, name)
        return value.tensor

    # --- values ---------------------------------------------------------------------------------------------------

    def _value(self, node: fx.Node) -> Any:
        if node in self.plan.kernels:
            return self._kernel(node)
        if node.target is QUANTIZE:
            return self._quantized(node)
        if node.target is DEQUANTIZE:
            return self._dequantized(node)
        if node.target is operator.getitem:
            return self._item(node)
        if self._is_codes(node):
            return self._on_codes(node)
        if moves(node):
            return self._moved(node, self._read(source(node)))
        self.outside.append(node.name)
        return computed(self._call(node, None))

    def _kernel(self, node: fx.Node) -> Value:
        """Return the result of an integer kernel, limited and moved as the program does it."""
        step = self.plan.by_site[site_of(node)]
        grid = self._grid(node)
        made = self._read(step.op) if step.op.target in MOVES else computed(self._call(step.op, grid))
        made = self.builder.clipped(made, grid)
        for move in self.plan.kernels[node].moves:
            made = self._moved(move, made)
        return self._site(node, made)

    def _quantized(self, node: fx.Node) -> Value:
        value, grid = self._read(source(node)), self._grid(node)
        if value.grid is not None and value.grid.is_like(grid):
            made = self.builder.clipped(value, grid)
        else:
            made = self.builder.quantized(self.builder.floats(value), grid)
        return self._site(node, made)

    def _site(self, node: fx.Node, made: Value) -> Value:
        self.sites[site_of(node)] = made.tensor
        return made

    def _dequantized(self, node: fx.Node) -> Value | None:
        """Return the codes; None for a weight or bias, which the layer reads by itself."""
        bound = bind(node)
        if is_constant(bound["codes"]):
            return None
        value, grid = self._read(bound["codes"]), self._grid_read(node)
        assert value.grid is not None
        if not value.grid.is_like(grid):
            raise ModelError(
                f"the codes of {bound['site']!r} are read with another scale than that of their quantizer, which a "
                "LiteRT file does not here; export the model for the target tflite."
            )
        return value

    def _item(self, node: fx.Node) -> Value:
        """Return a part of a list: a slice of what was cut, if it is cut into ranges."""
        whole, index = node.args
        assert isinstance(whole, fx.Node) and isinstance(index, int)
        call = self._call(node, None)
        if whole.target not in LISTS or whole.target is torch.ops.aten.unbind.int:
            raise call.refused(str(whole.name))
        axis, shapes = bind(whole)["dim"], [tuple(part.shape) for part in whole.meta["tensor_meta"]]
        start = sum(shape[axis] for shape in shapes[:index])
        return cut(call, self._read(source(whole)), axis, start, start + shapes[index][axis])

    def _on_codes(self, node: fx.Node) -> Value:
        """Return codes that are clipped or padded."""
        value = self._read(source(node))
        assert value.grid is not None
        if node.target is torch.ops.aten.clamp.default:
            bound, shift = bind(node), FIRST if node.meta["tensor_meta"].dtype == torch.uint8 else 0
            limits = {"low": bound["min"] + shift, "high": bound["max"] + shift}
            return self.builder.clipped(value, replace(value.grid, **limits))
        return self._moved(node, value)

    def _moved(self, node: fx.Node, value: Value) -> Value:
        return moved(self._call(node, value.grid), value)

    # --- details --------------------------------------------------------------------------------------------------

    def _call(self, node: fx.Node, grid: Grid | None) -> Call:
        read = self._read if grid is not None else lambda x: self.builder.floats(self._read(x))
        return Call(self.builder, self.program, node, read, grid)

    def _read(self, node: fx.Node) -> Value:
        """Return a value, or a constant of floats or codes."""
        if self.values.get(node) is None:
            if node.target is DEQUANTIZE:
                data = _shifted(constant(self.program, bind(node)["codes"]))
                self.values[node] = self.builder.codes(node.name, data, self._grid_read(node))
            elif is_constant(node):
                self.values[node] = self.builder.constant(str(node.target), constant(self.program, node).numpy())
            else:
                raise ModelError(f"{node.name} has no form in a LiteRT file here; export for another target.")
        found: Value = self.values[node]
        return found

    def _is_codes(self, node: fx.Node) -> bool:
        return getattr(node.meta.get("tensor_meta"), "dtype", None) in CODES

    def _grid(self, quantizer: fx.Node) -> Grid:
        bound = bind(quantizer)
        return self._grid_of(bound, bound["qmin"], bound["qmax"])

    def _grid_read(self, dequantizer: fx.Node) -> Grid:
        bound = bind(dequantizer)
        zero = constant(self.program, bound["zero_point"])
        limits = torch.iinfo(zero.dtype)
        return self._grid_of(bound, limits.min, limits.max)

    def _grid_of(self, bound: Mapping[str, Any], low: int, high: int) -> Grid:
        zero = constant(self.program, bound["zero_point"])
        if zero.dtype not in CODES or zero.ndim:
            raise ModelError(
                f"the codes of {bound['site']!r} have more than 8 bits or more than one scale; a LiteRT file holds "
                "activations of 8 bits here."
            )
        shift = FIRST if zero.dtype == torch.uint8 else 0
        return Grid(float(constant(self.program, bound["scale"])), int(zero) + shift, low + shift, high + shift)


def _shifted(codes: Tensor) -> NDArray[Any]:
    """Return 8-bit codes as int8 codes of the same values."""
    return codes.numpy() if codes.dtype == torch.int8 else (codes.to(torch.int16) + FIRST).to(torch.int8).numpy()
