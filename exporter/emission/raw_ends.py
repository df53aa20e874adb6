"""Raw ends of a program: inputs that are bytes, which it normalizes itself, and outputs that are codes.

Both come after calibration, so that the network between them is the one that was calibrated, code for code.

Must not know: ONNX, runtimes, data.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from calibrators.graph.aten import add_constant, bind, copy_graph, infer_shapes, is_free, outputs_of, shape_of
from calibrators.graph.rewrite import constant_of, replace_by
from calibrators.program.freeze import CalibrationResult
from calibrators.program.qdq_program import DEQUANTIZE, QUANTIZE
from exporter.inputs.form import LEVELS
from exporter.inputs.raw import RawInput, RawInputs

__all__ = ["input_grids", "read_bytes", "with_raw_ends"]

aten = torch.ops.aten

OPERATORS = {"div": aten.div.Tensor, "sub": aten.sub.Tensor}


def input_grids(graph: fx.GraphModule, raws: RawInputs) -> dict[str, tuple[float, int]]:
    """Return scale and zero point of the inputs whose bytes can be their codes, by the name of the placeholder.

    They can where all channels are normalized alike, and a byte stands for zero.
    """
    grids = {}
    for node, name in zip(_placeholders(graph), graph.meta["input_names"], strict=True):
        raw = raws.by_name.get(name)
        if raw is not None and len({*raw.mean}) == len({*raw.std}) == 1:
            scale, zero_point = 1.0 / (LEVELS * raw.std[0]), round(LEVELS * raw.mean[0])
            limits = torch.iinfo(torch.uint8)
            parameters = torch.tensor(scale), torch.tensor(zero_point), limits.min, limits.max
            if limits.min <= zero_point <= limits.max and _are_codes(raw, parameters):
                grids[node.name] = scale, zero_point
    return grids


def read_bytes(graph: fx.GraphModule, raws: RawInputs) -> fx.GraphModule:
    """Return a copy of a graph that takes some inputs as bytes; the value that was the input keeps its name."""
    if not raws:
        return graph
    graph, before = copy_graph(graph), graph.meta
    free = dict(before.get("free_axes", {}))
    for node, name in zip(_placeholders(graph), before["input_names"], strict=True):
        if (raw := raws.by_name.get(name)) is not None:
            rank = len(shape_of(node))
            _normalize(graph, node, raw, rank)
            free |= {name: {raw.axis(axis, rank): size for axis, size in free[name].items()}} if name in free else {}
    examples = tuple(map(raws.pixels, before.get("other_examples", ())))
    graph.meta = {**before, "example": raws.pixels(before["example"]), "other_examples": examples, "free_axes": free}
    graph.recompile()
    infer_shapes(graph)
    return graph


def with_raw_ends(result: CalibrationResult, raws: RawInputs, coded: Collection[str]) -> CalibrationResult:
    """Return a calibration result whose program reads bytes and gives the outputs `coded` as codes.

    Where the bytes of an input are the codes of its quantizer, the program normalizes and quantizes nothing.
    """
    if not raws and not coded:
        return result
    graph = read_bytes(result.placement.graph, raws)
    result = replace(result, placement=replace(result.placement, graph=graph))
    program = result.program
    nodes = {node.name: node for node in program.graph.nodes}
    for node, name in zip(_placeholders(result.placement.graph), program.meta["input_names"], strict=True):
        if name in raws.by_name:
            _read_codes(nodes[node.name.removesuffix(_BYTES)], raws.by_name[name])
    _give_codes(program, coded)
    program.graph.eliminate_dead_code()
    program.recompile()
    infer_shapes(program)
    return result


_BYTES = "_bytes"
"""Suffix of the name of an input that is bytes."""


def _placeholders(graph: fx.GraphModule) -> list[fx.Node]:
    return [node for node in graph.graph.nodes if node.op == "placeholder"]


def _normalize(graph: fx.GraphModule, node: fx.Node, raw: RawInput, rank: int) -> None:
    """Put bytes and their normalization in the place of an input."""
    nodes, name = graph.graph, node.name
    with nodes.inserting_before(node):
        x = nodes.placeholder(f"{name}{_BYTES}")
    with nodes.inserting_before(_placeholders(graph)[-1].next):
        if raw.order(rank) != tuple(range(rank)):
            x = nodes.call_function(aten.permute.default, (x, list(raw.order(rank))))
        x = nodes.call_function(aten._to_copy.default, (x,), {"dtype": torch.float32})
        for operator, operand in raw.steps(rank):
            value = nodes.get_attr(add_constant(graph, f"{name}_{operator}", _spread(operand, node, raw)))
            x = nodes.call_function(OPERATORS[operator], (x, value))
    x.meta = dict(node.meta)
    replace_by(node, x)
    x.name = name


def _spread(operand: Tensor, node: fx.Node, raw: RawInput) -> Tensor:
    """Return a constant per channel repeated along the last axis of the model's input, for bytes with channels last.

    onnxruntime computes these operators with channels last, where a constant for every column of a row takes 0.8 ms and
    one per channel 2.3 ms (224 x 224 pixels, benchmarks/raw_inputs.py).
    """
    size = shape_of(node)[-1]
    if operand.numel() == 1 or raw.layout == "nchw" or is_free(node, -1):
        return operand
    return operand.expand(*operand.shape[:-1], size).contiguous()


def _read_codes(value: fx.Node, raw: RawInput) -> None:
    """Let the bytes of an input take the place of its quantizer where they are its codes."""
    for node in [user for user in value.users if user.target is QUANTIZE]:
        bound = bind(node)
        scale, zero_point = (constant_of(bound[name]) for name in ("scale", "zero_point"))
        if _are_codes(raw, (scale, zero_point, bound["qmin"], bound["qmax"])):
            source = value
            while source.target is not aten._to_copy.default:
                source = source.args[0]  # type: ignore[assignment]
            node.replace_all_uses_with(source.args[0])  # type: ignore[arg-type]


def _are_codes(raw: RawInput, parameters: tuple[Tensor, Tensor, int, int]) -> bool:
    """Return whether the quantizer of these parameters gives every byte of every channel itself as its code."""
    channels = max(len(raw.mean), len(raw.std))
    every = torch.arange(256, dtype=torch.uint8)[:, None, None].expand(256, channels, 1)
    values = replace(raw, layout="nchw").values(every)
    scale, zero_point, lo, hi = parameters
    codes: Any = QUANTIZE(values, scale.float(), zero_point.to(torch.uint8), lo, hi, None, "")
    return torch.equal(codes, every)


def _give_codes(program: fx.GraphModule, coded: Collection[str]) -> None:
    """Leave the dequantizers of outputs out, and note what their codes stand for in meta["output_codes"].

    Placement made sure that there are any (calibrators.placement.place).
    """
    outputs, grids = list(outputs_of(program)), {}
    for index, name in enumerate(program.meta["output_names"]):
        if name in coded:
            bound = bind(outputs[index])
            assert outputs[index].target is DEQUANTIZE
            grids[name] = float(constant_of(bound["scale"])), int(constant_of(bound["zero_point"]))
            outputs[index] = bound["codes"]
    program.graph.output_node().args = (tuple(outputs),)
    program.meta["output_codes"] = grids
