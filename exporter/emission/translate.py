"""The reference program becomes QDQ ONNX, one operator to one operator.

torch.onnx translates the ATen operators; quantize and dequantize have their own translation here, because no stock
exporter writes narrow ranges, int32 biases and scalar scales as integer runtimes want them. Afterwards names and
metadata are made readable and free of anything that belongs to the machine that exported.

Must not know: methods, runtimes, files other than the model's.
"""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import onnx
import onnx_ir as ir
import torch
from onnx_ir.passes import common as passes
from onnx_ir.tensor_adapters import from_torch_dtype
from onnxscript import opset20 as op
from onnxscript import opset21
from onnxscript.optimizer import fold_constants
from torch import fx
from torch.onnx._internal.exporter import _registration

from calibrators.errors import ExportError
from calibrators.graph.aten import operator_name, where
from calibrators.program.freeze import CalibrationResult
from calibrators.program.qdq_program import DEQUANTIZE, QUANTIZE
from exporter.emission.packing import pack, set_opset
from exporter.frontend.capture import quiet
from exporter.frontend.reference import export_program

__all__ = ["emit", "emit_float", "needed_opset", "save", "to_onnx"]

WIDE_OPSET = 21
"""First opset whose quantizers write int16."""

BLOCK_OPSET = 21
"""First opset whose dequantizers read scales per block."""

NAME = "intact.name"
"""Metadata key under which a node carries the name its output shall have."""

EXTERNAL_DATA_ABOVE = 2**31 - 2**20
"""Bytes of initialisers above which they leave the protobuf, whose limit is 2 GiB."""


def emit(
    result: CalibrationResult,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    weight_storage: str = "auto",
) -> ir.Model:
    """Write the reference program of `result` as ONNX; returns the model.

    weight_storage: how codes of weights are stored (exporter.emission.packing): auto, int8, int4, int2.
    raises:         ExportError naming the operator that has no ONNX form.
    """
    model = to_onnx(result.program, opset=needed_opset(result), metadata=metadata)
    pack(model, weight_storage)
    save(model, path)
    return model


def needed_opset(result: CalibrationResult) -> int:
    """The target's opset, or the first that has what wide activations and blocks need."""
    needed = [result.placement.target.opset]
    for site in result.placement.sites:
        if site.spec.is_wide:
            needed.append(WIDE_OPSET)
        if site.spec.block_size is not None:
            needed.append(BLOCK_OPSET)
    return max(needed)


def emit_float(graph: fx.GraphModule, path: str | Path) -> ir.Model:
    """Write a float graph as ONNX: the baseline of latency, size and accuracy."""
    model = to_onnx(graph, opset=20)
    save(model, path)
    return model


def save(model: ir.Model, path: str | Path) -> None:
    """Write the model; initialisers go to `<name>.data` beside it when they exceed the protobuf limit."""
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    path = Path(path)
    ir.save(model, path, external_data=f"{path.name}.data" if size > EXTERNAL_DATA_ABOVE else None)


def to_onnx(
    program: fx.GraphModule,
    *,
    opset: int,
    metadata: Mapping[str, str] | None = None,
    exported: torch.export.ExportedProgram | None = None,
) -> ir.Model:
    """Translate a flat graph to a named and annotated ONNX model.

    exported: the program after `export_program`, where the caller has it already; it is exported here otherwise.
    raises:   ExportError naming the operator that has no ONNX form, or the output that ONNX gives another meaning.
    """
    outputs = program.meta["output_names"]
    inputs = program.meta["input_names"]
    distinct = _with_distinct_outputs(program)
    try:
        if exported is None or distinct is not program:
            exported = export_program(distinct)
        with quiet(), torch.no_grad(), _one_registry():
            onnx_program = torch.onnx.export(
                exported,
                opset_version=opset,
                custom_translation_table=_TRANSLATIONS,
                optimize=False,
                verbose=False,
                input_names=inputs,
                output_names=outputs,
            )
    except Exception as error:
        raise ExportError(_refusal(program, error)) from error
    assert onnx_program is not None
    model = onnx_program.model
    _normalise(model)
    _annotate(model, program, metadata or {})
    _check_outputs(model, program)
    return model


def _check_outputs(model: ir.Model, program: fx.GraphModule) -> None:
    """Names, types and static sizes of the outputs are those of the program, in its order.

    raises: ExportError naming the first output that is not.
    """
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    for value, name, node in zip(model.graph.outputs, program.meta["output_names"], output.args[0], strict=True):
        meta = node.meta["tensor_meta"]
        sizes = list(value.shape) if value.shape is not None else []
        same = len(sizes) == len(meta.shape) and value.dtype == from_torch_dtype(meta.dtype) and value.name == name
        fixed = zip(sizes, meta.shape, strict=False)
        if not same or any(isinstance(size, int) and size != expected for size, expected in fixed):
            raise ExportError(
                f"output {name!r} is {meta.dtype} {list(meta.shape)} in the model and {value.name!r}, {value.dtype} "
                f"{value.shape} in the file: {where(node)} has another meaning in ONNX; rewrite it with other operators"
            )


_registry = functools.cache(_registration.ONNXRegistry.from_torchlib)


def _copy_of_registry(*args: Any, **kwargs: Any) -> _registration.ONNXRegistry:
    """Return a copy of the registry of translations, to which an export adds its own.

    torch builds the registry anew at every export, which takes longer than the export of a small network.
    """
    registry = copy.copy(_registry(*args, **kwargs))
    registry.functions = {target: [*entries] for target, entries in registry.functions.items()}
    return registry


_one_registry = partial(patch.object, _registration.ONNXRegistry, "from_torchlib", staticmethod(_copy_of_registry))
"""Context in which every torch.onnx.export of this process shares one registry."""


def _with_distinct_outputs(program: fx.GraphModule) -> fx.GraphModule:
    """A graph whose outputs are different values, none of them an input or constant: a value has one name in ONNX."""
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    results = output.args[0]
    shared = [x.op != "call_function" or x in results[:index] for index, x in enumerate(results)]
    if not any(shared):
        return program
    program = copy.deepcopy(program)
    (output,) = (node for node in program.graph.nodes if node.op == "output")
    with program.graph.inserting_before(output):
        output.args = (
            tuple(
                program.graph.call_function(torch.ops.aten.clone.default, (x,)) if doubled else x
                for x, doubled in zip(output.args[0], shared, strict=True)
            ),
        )
    program.recompile()
    return program


def _refusal(program: fx.GraphModule, error: Exception) -> str:
    """Which operator ONNX cannot express, where it stands, and what to do."""
    messages, cause = [str(error)], error.__cause__
    while cause is not None:
        messages.append(str(cause))
        cause = cause.__cause__
    text = " ".join(messages)
    missing = re.search(r"OpOverload\(op='\w+\.(\w+)'", text) or re.search(r"target=torch\.ops\.\w+\.(\w+)", text)
    advice = "has no ONNX form; rewrite that line of the model with other operators"
    for node in program.graph.nodes:
        name = operator_name(node.target)
        alike = missing is not None and (missing[1] in name or missing[1].startswith(f"{name}_"))
        if node.op == "call_function" and (alike or str(node.target) in text):
            return f"operator {name!r} at {where(node)} {advice}"
    if missing is not None:
        return f"operator {missing[1]!r} {advice}"
    lines = [line for line in messages[-1].splitlines() if line.strip()]
    return f"the program cannot be written as ONNX: {type(error).__name__}: {lines[0] if lines else ''}"


# --- translations of single operators; SymbolicTensor is an ir.Value -----------------------------------------------


def _quantize(x: Any, scale: Any, zero_point: Any, qmin: int, qmax: int, axis: int | None, site: str) -> Any:
    codes = op.QuantizeLinear(x, scale, zero_point)
    container = np.iinfo(zero_point.dtype.numpy())
    if (qmin, qmax) != (container.min, container.max):
        _keep_name(codes, f"{site}_saturated")
        codes = op.Clip(codes, _scalar(qmin, zero_point.dtype), _scalar(qmax, zero_point.dtype))
    return _keep_name(codes, f"{site}_quantized")


def _dequantize(
    codes: Any, scale: Any, zero_point: Any, axis: int | None, site: str, block_size: int | None = None
) -> Any:
    if block_size is not None:  # ONNX names the axis that is cut into blocks
        value = opset21.DequantizeLinear(codes, scale, zero_point, axis=1, block_size=block_size)
    else:
        value = op.DequantizeLinear(codes, scale, zero_point, **({} if axis is None else {"axis": axis}))
    return _keep_name(value, f"{site}_dequantized")


def _keep_name(value: Any, name: str) -> Any:
    """torch.onnx names values itself; the name travels on the node until `_annotate`."""
    value.producer().metadata_props[NAME] = name
    return value


def _scalar(value: float, dtype: ir.DataType) -> Any:
    return _tensor(np.array(value, dtype=dtype.numpy()))


def _tensor(array: np.ndarray[Any, Any]) -> Any:
    tensor: Any = ir.tensor(array)
    return op.Constant(value=tensor)


def _adaptive_avg_pool2d(x: Any, output_size: Any) -> Any:
    """Global pooling, pooling by a divisor, or a product with the matrix of the averages on either side."""
    before, after = list(x.shape)[-2:], list(output_size)
    if after == [1, 1]:
        return op.GlobalAveragePool(x)
    if all(old % new == 0 for old, new in zip(before, after, strict=True)):
        kernel = [old // new for old, new in zip(before, after, strict=True)]
        return op.AveragePool(x, kernel_shape=kernel, strides=kernel)
    rows, columns = (_averages(old, new) for old, new in zip(before, after, strict=True))
    return op.MatMul(_tensor(rows), op.MatMul(x, _tensor(columns.T.copy())))


def _averages(before: int, after: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """[after, before]: row i averages from floor(i * before / after) to ceil((i + 1) * before / after)."""
    matrix = np.zeros((after, before), np.float32)
    for row in range(after):
        start, end = row * before // after, -(-(row + 1) * before // after)
        matrix[row, start:end] = 1 / (end - start)
    return matrix


def _clamp(x: Any, min: Any = None, max: Any = None) -> Any:
    def bound(value: Any) -> Any:
        return None if value is None else _scalar(value, x.dtype)

    return op.Clip(x, bound(min), bound(max))


def _clamp_tensor(x: Any, min: Any = None, max: Any = None) -> Any:
    """Clip codes, as torch.onnx does, where the bounds are scalars; clamp by bounds of any shape elsewhere."""
    lo, hi = (None if bound is None else op.CastLike(bound, x) for bound in (min, max))
    if all(bound is None or not len(bound.shape) for bound in (min, max)):
        return op.Clip(x, lo, hi)
    x = x if lo is None else op.Max(x, lo)
    return x if hi is None else op.Min(x, hi)


def _elu(x: Any, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0) -> Any:
    result = op.Elu(x if input_scale == 1 else op.Mul(x, _scalar(input_scale, x.dtype)), alpha=alpha)
    return result if scale == 1 else op.Mul(result, _scalar(scale, x.dtype))


def _group_norm(
    x: Any, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, cudnn_enabled: bool = True
) -> Any:
    """Instance normalisation of the groups, then scale and shift per channel."""
    channels = (x.shape[1], *[1] * (len(x.shape) - 2))
    ones, zeros = (_tensor(np.full(num_groups, value, x.dtype.numpy())) for value in (1, 0))
    groups = op.Reshape(x, _tensor(np.array([0, num_groups, -1], np.int64)))
    groups = op.InstanceNormalization(groups, ones, zeros, epsilon=eps)
    result = op.Reshape(groups, _tensor(np.array([-1, *x.shape[1:]], np.int64)))
    for combine, factor in ((op.Mul, weight), (op.Add, bias)):
        if factor is not None:
            result = combine(result, op.Reshape(factor, _tensor(np.array(channels, np.int64))))
    return result


def _pad(x: Any, pad: Any, value: Any = 0.0) -> Any:
    """Torch lists (before, after) from the last dimension on, ONNX all befores and then all afters."""
    unpadded = [0] * (len(x.shape) - len(pad) // 2)
    before, after = [*unpadded, *pad[::2][::-1]], [*unpadded, *pad[1::2][::-1]]
    return op.Pad(x, _tensor(np.array(before + after, dtype=np.int64)), _scalar(value, x.dtype))


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    """Gemm for matrices, MatMul and Add otherwise: the forms that integer runtimes fuse.

    A kernel that reads codes of the weight alone is made of [in, out] weights where no quantizer, ReLU or clip stands
    directly after the product: the sum with the bias does, which the kernel absorbs.
    """
    weight_only = _is_dequantized(weight) and not _is_dequantized(x)
    if len(x.shape) == 2 and not weight_only:
        return op.Gemm(x, weight, bias, transB=1)
    columns = op.Transpose(weight, perm=[1, 0])
    product = (op.Gemm if len(x.shape) == 2 else op.MatMul)(x, columns)
    return product if bias is None else op.Add(product, bias)


def _is_dequantized(value: Any) -> bool:
    return value.producer() is not None and value.producer().op_type == "DequantizeLinear"


_TRANSLATIONS: dict[Any, Any] = {
    QUANTIZE: _quantize,
    DEQUANTIZE: _dequantize,
    torch.ops.aten.adaptive_avg_pool2d.default: _adaptive_avg_pool2d,
    torch.ops.aten.clamp.default: _clamp,
    torch.ops.aten.clamp.Tensor: _clamp_tensor,
    torch.ops.aten.constant_pad_nd.default: _pad,
    torch.ops.aten.elu.default: _elu,
    torch.ops.aten.group_norm.default: _group_norm,
    torch.ops.aten.linear.default: _linear,
}


# --- after translation ---------------------------------------------------------------------------------------------


def _normalise(model: ir.Model) -> None:
    """Constants as initialisers, transposed weights stored transposed, static reshapes, nothing unused or double."""
    passes.RemoveUnusedNodesPass()(model)
    fold_constants(model, should_fold=_may_fold)
    _drop_identities(model.graph)
    passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    _store_transposed(model.graph)
    _fold_reshape_targets(model.graph)
    passes.RemoveUnusedNodesPass()(model)
    set_opset(model, model.opset_imports[""])
    model.doc_string = None
    model.graph.doc_string = None
    model.metadata_props.clear()
    model.graph.metadata_props.clear()


def _drop_identities(graph: ir.Graph) -> None:
    """Readers of a copy read the original; a copy that is an output keeps its name and stays."""
    outputs = set(graph.outputs)
    for node in list(graph):
        if node.op_type == "Identity" and node.inputs[0] is not None and node.outputs[0] not in outputs:
            node.outputs[0].replace_all_uses_with(node.inputs[0])
            graph.remove(node, safe=True)


def _may_fold(node: ir.Node) -> bool | None:
    """Codes stay codes: no dequantized weight is ever stored."""
    return False if node.op_type in ("QuantizeLinear", "DequantizeLinear") else None


def _store_transposed(graph: ir.Graph) -> None:
    """Transpose(DequantizeLinear(codes)) of a weight becomes DequantizeLinear of the transposed codes."""
    for codes in list(graph.initializers.values()):
        readers = [use.node for use in codes.uses()]
        transposes = [_transpose_behind(reader, codes) for reader in readers]
        if not transposes or None in transposes:
            continue
        for value in dict.fromkeys(value for reader in readers for value in reader.inputs if value is not None):
            if value.const_value is not None and value.const_value.numpy().ndim > 1:
                _transpose_constant(value)
        for reader, transpose in zip(readers, transposes, strict=True):
            assert transpose is not None
            if "axis" in reader.attributes:
                reader.attributes["axis"] = ir.AttrInt64("axis", 1 - reader.attributes["axis"].as_int())
            transpose.outputs[0].replace_all_uses_with(reader.outputs[0])
            reader.outputs[0].shape = codes.shape
            graph.remove(transpose, safe=True)


def _transpose_behind(reader: ir.Node, codes: ir.Value) -> ir.Node | None:
    """The Transpose that alone reads what `reader` dequantizes from `codes`."""
    uses = reader.outputs[0].uses() if reader.op_type == "DequantizeLinear" and reader.inputs[0] is codes else ()
    nodes = [use.node for use in uses]
    return nodes[0] if len(nodes) == 1 and nodes[0].op_type == "Transpose" else None


def _transpose_constant(value: ir.Value) -> None:
    """Codes, and parameters of blocks; others have one dimension or none."""
    assert value.const_value is not None
    array = np.ascontiguousarray(value.const_value.numpy().T)
    value.const_value = ir.tensor(array, name=value.name)
    value.shape = ir.Shape(array.shape)


def _fold_reshape_targets(graph: ir.Graph) -> None:
    """A Reshape whose computed target has one unknown dimension gets a constant target with -1 there."""
    for node in graph:
        if node.op_type != "Reshape" or node.inputs[1] is None or node.inputs[1].const_value is not None:
            continue
        shape = node.outputs[0].shape
        if shape is None:
            continue
        dims = [dim if isinstance(dim, int) else -1 for dim in shape]
        if dims.count(-1) > 1 or 0 in dims:
            continue
        name = f"{node.outputs[0].name}_shape"
        target = ir.Value(name=name, shape=ir.Shape([len(dims)]), type=ir.TensorType(ir.DataType.INT64))
        target.const_value = ir.tensor(np.array(dims, dtype=np.int64), name=name)
        graph.register_initializer(target)
        node.replace_input_with(1, target)


def _annotate(model: ir.Model, program: fx.GraphModule, metadata: Mapping[str, str]) -> None:
    """Readable names from module paths, and metadata that says where each node comes from."""
    names = _Names(model.graph)
    for buffer, readable in program.meta.get("names", {}).items():
        if buffer in model.graph.initializers:
            names.rename(model.graph.initializers[buffer], readable)
    outputs = set(model.graph.outputs)
    for node in model.graph:
        scopes = _scopes(node)
        path = scopes[-2] if len(scopes) > 1 else ""
        readable = node.metadata_props.get(NAME) or (f"{path}.{node.op_type}" if path else node.op_type)
        if node.outputs[0] not in outputs:
            names.rename(node.outputs[0], readable)
        node.name = names.unique_node(readable)
        node.doc_string = None
        node.metadata_props.clear()
        node.metadata_props["intact.module"] = path
        for value in node.outputs:
            value.metadata_props.clear()
    _name_constants(model, program, names)
    for value in [*model.graph.inputs, *model.graph.initializers.values()]:
        value.metadata_props.clear()
    model.metadata_props.update({"intact." + key: value for key, value in metadata.items()})
    model.producer_name, model.producer_version = "intact", metadata.get("version", "")
    _name_batch(model, program)


def _name_constants(model: ir.Model, program: fx.GraphModule, names: _Names) -> None:
    """Constants that are no parameter of the program are called after the first node and input that read them."""
    own = {name for name, _ in [*program.named_parameters(), *program.named_buffers()]}
    own |= set(program.meta.get("names", {}).values())
    opset = model.opset_imports[""]
    for node in model.graph:
        for index, value in enumerate(node.inputs):
            if value is None or not value.is_initializer() or value.name in own:
                continue
            ports = onnx.defs.get_schema(node.op_type, opset, node.domain).inputs
            names.rename(value, f"{node.name}_{ports[min(index, len(ports) - 1)].name}")
            own.add(str(value.name))


def _scopes(node: ir.Node) -> list[str]:
    text = node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")
    return re.findall(r"'([^']*)'", text)


class _Names:
    """Gives out names that no other value or node of the graph has."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph
        self.values: set[str | None] = {v.name for n in graph for v in n.outputs} | set(graph.initializers)
        self.values |= {v.name for v in graph.inputs}
        self.nodes: set[str | None] = set()

    def rename(self, value: ir.Value, readable: str) -> None:
        if value.name == readable:
            return
        name = self._free(readable, self.values)
        if value.is_initializer():
            initializers = self.graph.initializers
            del initializers[str(value.name)]
            value.name = name
            if value.const_value is not None:
                value.const_value.name = name
            initializers[name] = value
        else:
            value.name = name
        self.values.add(name)

    def unique_node(self, readable: str) -> str:
        name = self._free(readable, self.nodes)
        self.nodes.add(name)
        return name

    @staticmethod
    def _free(name: str, taken: set[str | None]) -> str:
        free, count = name, 0
        while free in taken:
            count += 1
            free = f"{name}_{count}"
        return free


def _name_batch(model: ir.Model, program: fx.GraphModule) -> None:
    """The free dimension is called 'batch'; static shapes stay numbers."""
    if not program.meta["dynamic_batch"]:
        return
    symbols = {str(value.shape[0]) for value in model.graph.inputs if value.shape and len(value.shape)}
    values = [*model.graph.inputs, *(v for n in model.graph for v in n.outputs)]
    for value in values:
        if value.shape is None:
            continue
        for index, dim in enumerate(value.shape):
            if not isinstance(dim, int) and str(dim) in symbols:
                value.shape[index] = ir.SymbolicDim("batch")
