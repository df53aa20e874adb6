"""Build the ONNX model of the reference program, one operator for one operator, and write it to a file.

torch.onnx translates most ATen operators; `onnx_forms` has the others, and quantize and dequantize, because no stock
exporter writes narrow ranges, int32 biases and scalar scales as integer runtimes need them.

Must not know: methods, runtimes, files other than the model's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from onnxscript import version_converter
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import TensorArgument

from calibrators.allocator import give_back
from calibrators.errors import ExportError, InputError, argument
from calibrators.graph.aten import operator_name, outputs_of, where
from calibrators.grid.target import Target
from calibrators.program.freeze import CalibrationResult
from exporter.emission.packing import pack
from exporter.emission.readable import annotate, normalize
from exporter.emission.streamed import write
from exporter.emission.translate import translate
from exporter.frontend.capture import quiet
from exporter.frontend.reference import export_program
from runtime_tests.ort.onnx_operators import DEQUANTIZE
from runtime_tests.ort.operands import consumers
from runtime_tests.ort.versions import Version, minimum_version, parse_version

__all__ = [
    "check_opset",
    "emit",
    "emit_float",
    "needed_opset",
    "needed_release",
    "save",
    "to_onnx",
    "with_data_apart",
    "without_data_apart",
]

WIDE_OPSET = 21
"""First opset whose quantizers write int16."""

BLOCK_OPSET = 21
"""First opset whose dequantizers read scales per block."""

EXTERNAL_DATA_ABOVE = 2**31 - 2**20
"""Bytes of initializers above which they leave the protobuf, whose limit is 2 GiB."""

FLOAT_DATA_ABOVE = 2**26
"""The same for the float file, which is measured and thrown away: protobuf takes twice its size in memory to write."""

LARGE_WEIGHT = 1 << 20
"""Bytes of codes above which a weight is no part of a proto that other libraries copy several times."""
CODES = (ir.DataType.INT8, ir.DataType.UINT8)


def emit(
    result: CalibrationResult,
    path: str | Path,
    *,
    metadata: Mapping[str, str] | None = None,
    weight_storage: str = "auto",
) -> ir.Model:
    """Write the reference program of `result` as ONNX and return the model.

    weight_storage: how codes of weights are stored (exporter.emission.packing): auto, int8, int4, int2.
    raises:         ExportError naming the operator that has no ONNX form.
    """
    model = to_onnx(result.program, opset=needed_opset(result), metadata=metadata)
    pack(model, weight_storage)
    check_opset(model, result.placement.target)
    save(model, path)
    return model


def needed_opset(result: CalibrationResult) -> int:
    """Return the target's opset, or the first one that has what 16-bit activations and blocks need."""
    specs = [site.spec for site in result.placement.sites]
    wide = [WIDE_OPSET for spec in specs if spec.is_wide]
    blocks = [BLOCK_OPSET for spec in specs if spec.block_size is not None]
    return max([result.placement.target.opsets[0], *wide, *blocks])


def needed_release(model: ir.Model, asked: str | None) -> Version:
    """Return the oldest onnxruntime that runs a finished model.

    raises: InputError if an older one was asked for.
    """
    need = minimum_version(model)
    if asked is not None and need.version > parse_version(asked):
        raise InputError(
            f"min_ort is {asked}, but {need.what} at {need.where} needs onnxruntime {need.version}; give "
            f"{argument('min_ort', str(need.version))}, or choose settings without it."
        )
    return need.version


def check_opset(model: ir.Model, target: Target) -> None:
    """Raise ExportError for a finished model of an opset that the target does not read."""
    opset, highest = model.opset_imports[""], target.opsets[1]
    if opset > highest:
        raise ExportError(
            f"the file has opset {opset}, because packed weights, 16-bit activations or scales per block need it, but "
            f"target {target.name!r} reads at most {highest}; give {argument('weight_storage', 'int8')}, or leave "
            "these settings out"
        )


def emit_float(graph: fx.GraphModule, path: str | Path) -> ir.Model:
    """Write a float graph as ONNX, the baseline of latency, size and accuracy, and return the model."""
    model = to_onnx(graph, opset=20)
    save(model, path, largest=FLOAT_DATA_ABOVE)
    return model


def save(model: ir.Model, path: str | Path, *, largest: int | None = None) -> None:
    """Write the model; initializers of more than `largest` bytes in all go to `<name>.data` beside it.

    largest: None for the limit of protobuf.
    """
    largest = EXTERNAL_DATA_ABOVE if largest is None else largest
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    path = Path(path)
    give_back(size, graphs=size > FLOAT_DATA_ABOVE)
    if size > largest:
        ir.save(model, path, external_data=f"{path.name}.data")
        return
    large = _large_weights(model)
    nowhere = [ir.ExternalTensor("", 0, 0, x.dtype, shape=x.shape, name=name) for name, x in large.items()]  # type: ignore[arg-type]
    proto = _with_tensors(model, large, nowhere)
    for tensor in proto.graph.initializer:
        if tensor.name in large:
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
    write(proto, large, path)


def with_data_apart(model: ir.Model, folder: Path) -> onnx.ModelProto:
    """Return the model as a proto that has the codes of its large weights in a file in `folder`."""
    large = _large_weights(model)
    return _with_tensors(
        model, large, ir.external_data.convert_tensors_to_external([*large.values()], folder, "weights")
    )


def without_data_apart(proto: onnx.ModelProto, model: ir.Model) -> ir.Model:
    """Return a proto that was made of what `with_data_apart` gave, with the weights of the model."""
    whole = ir.from_proto(proto)
    for name, value in whole.graph.initializers.items():
        if isinstance(value.const_value, ir.ExternalTensor):
            value.const_value = model.graph.initializers[name].const_value
    return whole


def _with_tensors(
    model: ir.Model, large: Mapping[str, ir.TensorProtocol], tensors: Iterable[ir.TensorProtocol]
) -> onnx.ModelProto:
    """Return the model as a proto with other tensors for the large weights."""
    values = model.graph.initializers
    try:
        for name, tensor in zip(large, tensors, strict=True):
            values[name].const_value = tensor
        return ir.to_proto(model)
    finally:
        for name, original in large.items():
            values[name].const_value = original


def _large_weights(model: ir.Model) -> dict[str, ir.TensorProtocol]:
    """Return the codes of large weights by name."""
    found = {name: x.const_value for name, x in model.graph.initializers.items() if _is_large_weight(x)}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _is_large_weight(value: ir.Value) -> bool:
    tensor = value.const_value
    is_large = tensor is not None and tensor.nbytes > LARGE_WEIGHT and tensor.dtype in CODES
    return is_large and all(node.op_type == DEQUANTIZE and node.inputs[0] is value for node in consumers(value))


def to_onnx(
    program: fx.GraphModule,
    *,
    opset: int,
    metadata: Mapping[str, str] | None = None,
    exported: ExportedProgram | None = None,
) -> ir.Model:
    """Translate a flat graph to a named and annotated ONNX model.

    exported: what `export_program` made of it, which is used up; it is made here if None.
    raises: ExportError naming the operator that has no ONNX form, or the output whose meaning differs in ONNX.
    """
    try:
        with quiet(), torch.no_grad():
            exported = exported or export_program(program)
            _separate_outputs(exported)
            model = translate(exported, opset=opset)
            version_converter.convert_version(model, opset, fallback=True)
    except Exception as error:
        raise ExportError(_refusal(program, error)) from error
    for values, names in ((model.graph.inputs, "input_names"), (model.graph.outputs, "output_names")):
        for value, name in zip(values, program.meta[names], strict=True):
            value.name = name
    normalize(model)
    annotate(model, program, metadata or {})
    _check_outputs(model, program)
    return model


def _check_outputs(model: ir.Model, program: fx.GraphModule) -> None:
    """Raise ExportError unless the outputs have the names, types and static sizes of the program's, in its order."""
    for value, name, node in zip(model.graph.outputs, program.meta["output_names"], outputs_of(program), strict=True):
        meta = node.meta["tensor_meta"]
        sizes = list(value.shape) if value.shape is not None else []
        same = len(sizes) == len(meta.shape) and value.dtype == from_torch_dtype(meta.dtype) and value.name == name
        fixed = zip(sizes, meta.shape, strict=False)
        if not same or any(isinstance(size, int) and size != expected for size, expected in fixed):
            raise ExportError(
                f"output {name!r} is {meta.dtype} {list(meta.shape)} in the model and {value.name!r}, {value.dtype} "
                f"{value.shape} in the file: {where(node)} has another meaning in ONNX; rewrite it with other operators"
            )


def _separate_outputs(exported: ExportedProgram) -> None:
    """Copy outputs that are also another output, an input or a constant: in ONNX a value has one name."""
    graph = exported.graph
    results: list[fx.Node] = list(outputs_of(exported.graph_module))
    for index, (value, spec) in enumerate(zip(results, exported.graph_signature.output_specs, strict=True)):
        if value.op == "call_function" and value not in results[:index]:
            continue
        with graph.inserting_before(graph.output_node()):
            copied = graph.call_function(torch.ops.aten.clone.default, (value,))
        copied.meta["val"], results[index] = value.meta["val"], copied
        spec.arg = TensorArgument(copied.name)
    graph.output_node().args = (tuple(results),)


def _refusal(program: fx.GraphModule, error: BaseException) -> str:
    """Return the error text: the operator that ONNX cannot express, its place in the model, and what to do."""
    messages, cause = [str(error)], error.__cause__
    while cause is not None:
        messages.append(str(cause))
        cause = cause.__cause__
    text = " ".join(messages)
    missing = re.search(r"OpOverload\(op='\w+\.(\w+)'", text) or re.search(r"target=torch\.ops\.\w+\.(\w+)", text)
    advice = "has no ONNX form; rewrite that line of the model with other operators"
    failed = re.search(r"translating node %(\w+)", text)  # its name, unless the graph was traced again
    for node in program.graph.nodes:
        if failed is not None and node.name == failed[1] and f"target=torch.ops.{node.target}" in text:
            return f"operator {operator_name(node.target)!r} at {where(node)} {advice}"
    for node in program.graph.nodes:
        name = operator_name(node.target)
        named = missing is not None and (missing[1] in name or missing[1].startswith(f"{name}_"))
        if node.op == "call_function" and (named or str(node.target) in text):
            return f"operator {name!r} at {where(node)} {advice}"
    if missing is not None:
        return f"operator {missing[1]!r} {advice}"
    lines = [line for line in messages[-1].splitlines() if line.strip()]
    return (
        f"the program cannot be written as ONNX: {type(error).__name__}: {lines[0] if lines else ''}; please report it"
    )
