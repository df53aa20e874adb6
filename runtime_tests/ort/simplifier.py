"""Simplify a file with onnxsim, whose result is used only if nothing that matters changed and something got simpler.

onnxsim drops the metadata of nodes and of the graph; they are restored by the names of outputs, which it keeps. It
moves reshapes, so a value may keep its name and change its shape: the shapes of inner values are inferred again.

Must not know: which simplifications there are, what the metadata say.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from calibrators.errors import ModelError, counted
from runtime_tests.ort.onnx_operators import DEQUANTIZE, MOVE_DATA, QUANTIZE
from runtime_tests.ort.sessions import Model, session

__all__ = ["Simplifier", "changes", "simplify"]

Array = NDArray[Any]

MAX_BYTES = 1_500_000_000
"""Largest model for onnxsim, whose copies of a larger one come near the 2 GB that protobuf can write."""

MADE_UP_SIZE = "unk__"
"""Start of the names that shape inference gives to sizes it does not know."""

CODE_TYPES = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("INT8", "UINT8", "INT4", "UINT4", "INT2", "UINT2", "INT16", "UINT16", "INT32")
)
QUANTIZERS = (QUANTIZE, DEQUANTIZE)


@dataclass(frozen=True)
class Simplifier:
    """Whether the simplified model was kept.

    applied: whether the simplified model is the one returned.
    why:     the gain, or the reason why it was not kept.
    """

    applied: bool
    why: str
    nodes_before: int | None = None
    nodes_after: int | None = None


def simplify(
    model: onnx.ModelProto, sample_inputs: Mapping[str, Array], folder: Path | None = None
) -> tuple[onnx.ModelProto, Simplifier]:
    """Return `model` simplified by onnxsim if every guard holds, else `model` itself; the argument is never changed.

    sample_inputs: inputs on which the optimized outputs of both models must agree bit for bit.
    folder: where initializers lie that are external data, which stay as they are; None where there are none.
    """
    before = len(model.graph.node)

    def kept(why: str, after: int = before) -> tuple[onnx.ModelProto, Simplifier]:
        return model, Simplifier(False, why, before, after)

    if model.ByteSize() > MAX_BYTES:
        return kept(
            f"skipped: the model has {model.ByteSize() / 1e9:.1f} GB, and the limit is {MAX_BYTES / 1e9:.1f} GB"
        )
    try:
        candidate = _run_onnxsim(model)
    except (
        Exception
    ) as error:  # third-party code may fail in any way; the export goes on without it, and the report says so
        return kept(f"dropped: onnxsim failed with {type(error).__name__}: {error}")
    after = len(candidate.graph.node)
    try:
        candidate = _with_inferred_shapes(candidate)
        _restore(candidate, model)
        if found := changes(model, candidate):
            return kept(f"dropped: onnxsim changed {'; '.join(found)}", after)
        if not _same_outputs(model, candidate, sample_inputs, folder):
            return kept("dropped: the outputs on the sample inputs differ", after)
        if other := _other_operators(model, candidate, folder):
            return kept(f"dropped: onnxruntime computes it with other operators: {other}", after)
    except (onnx.shape_inference.InferenceError, ModelError) as error:
        return kept(f"dropped: the simplified model is not valid: {error}", after)
    if after == before and len(candidate.graph.initializer) == len(model.graph.initializer):
        return kept("nothing to simplify", after)
    constants = len(model.graph.initializer) - len(candidate.graph.initializer)
    gained = f"{counted(before - after, 'node')} and {counted(constants, 'initializer')} fewer"
    return candidate, Simplifier(True, gained, before, after)


def changes(model: onnx.ModelProto, candidate: onnx.ModelProto) -> list[str]:
    """Return what changed although it must not, as one phrase each."""
    guards = {
        "the number of QuantizeLinear or DequantizeLinear nodes": _quantizer_counts,
        "the codes, scales or zero points of a quantizer": _quantizer_contents,
        "the integer initializers": _integer_initializers,
        "the opsets or the IR version": _versions,
        "the names, types or shapes of inputs or outputs": _signature,
        "the metadata of the model or graph": _metadata,
    }
    found = [name for name, read in guards.items() if read(model) != read(candidate)]
    lost = sum(1 for node in candidate.graph.node if not node.metadata_props)
    if lost > sum(1 for node in model.graph.node if not node.metadata_props):
        found.append(f"the output names of {counted(lost, 'node')}, whose metadata is lost")
    return found


def _run_onnxsim(model: onnx.ModelProto) -> onnx.ModelProto:
    import onnxsim  # takes more than a second, and only this stage needs it

    outside = [tensor for tensor in model.graph.initializer if _is_outside(tensor)]
    names = {tensor.name for tensor in outside}
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    _keep(copy.graph.initializer, lambda tensor: tensor.name not in names)
    made = onnx.helper.make_tensor_value_info
    copy.graph.input.extend(made(tensor.name, tensor.data_type, tensor.dims) for tensor in outside)
    result: tuple[onnx.ModelProto, bool] = onnxsim.simplify(copy)
    graph = result[0].graph
    _keep(graph.input, lambda value: value.name not in names)
    place = {tensor.name: index for index, tensor in enumerate(model.graph.initializer)}  # an order that onnxsim keeps
    tensors = sorted([*graph.initializer, *outside], key=lambda tensor: place.get(tensor.name, len(place)))
    del graph.initializer[:]
    graph.initializer.extend(tensors)
    return result[0]


def _keep(entries: Any, is_wanted: Callable[[Any], bool]) -> None:
    """Remove all other entries of a repeated field."""
    kept = [entry for entry in entries if is_wanted(entry)]
    if len(kept) < len(entries):
        del entries[:]
        entries.extend(kept)


def _is_outside(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _readable(model: onnx.ModelProto, folder: Path | None) -> Model:
    """Return what a session can be made of: a file in the folder of the external data, if there are some."""
    if folder is None or not any(map(_is_outside, model.graph.initializer)):
        return Model(model)
    path = folder / "read.onnx"
    path.write_bytes(model.SerializeToString())
    return Model(path)


def _with_inferred_shapes(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the model with the shapes of inner values that follow from its nodes; sizes that do not stay open.

    raises: onnx.shape_inference.InferenceError where nodes contradict each other.
    """
    del model.graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    for info in inferred.graph.value_info:
        for dim in info.type.tensor_type.shape.dim:
            if dim.dim_param.startswith(MADE_UP_SIZE):
                dim.ClearField("dim_param")
    return inferred


def _restore(candidate: onnx.ModelProto, model: onnx.ModelProto) -> None:
    """Restore the metadata that onnxsim drops."""
    del candidate.metadata_props[:]
    candidate.metadata_props.extend(model.metadata_props)
    del candidate.graph.metadata_props[:]
    candidate.graph.metadata_props.extend(model.graph.metadata_props)
    sources = {node.output[0]: node for node in model.graph.node if node.output}
    for node in candidate.graph.node:
        source = sources.get(node.output[0]) if node.output else None
        if source is not None and source.op_type == node.op_type:
            del node.metadata_props[:]
            node.metadata_props.extend(source.metadata_props)


def _quantizer_counts(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node if node.op_type in QUANTIZERS)


def _quantizer_contents(model: onnx.ModelProto) -> dict[str, tuple[str, ...]]:
    """Return digests of the constant inputs of each quantizer, by the name of its output."""
    digests = {tensor.name: _digest(tensor) for tensor in model.graph.initializer}
    quantizers = (node for node in model.graph.node if node.op_type in QUANTIZERS)
    return {node.output[0]: tuple(digests.get(name, "computed") for name in node.input) for node in quantizers}


def _integer_initializers(model: onnx.ModelProto) -> set[str]:
    """Return the contents of all integer initializers that can hold codes; equal ones may be merged."""
    return {_digest(tensor) for tensor in model.graph.initializer if tensor.data_type in CODE_TYPES}


def _digest(tensor: onnx.TensorProto) -> str:
    """Return the SHA-256 of type, shape, values and their storage (raw or typed), or of the place of external data."""
    if _is_outside(tensor):
        return hashlib.sha256(tensor.SerializeToString(deterministic=True)).hexdigest()
    raw = tensor.raw_data or np.ascontiguousarray(onnx.numpy_helper.to_array(tensor)).tobytes()
    return hashlib.sha256(f"{tensor.data_type} {list(tensor.dims)} {bool(tensor.raw_data)} ".encode() + raw).hexdigest()


def _versions(model: onnx.ModelProto) -> tuple[int, dict[str, int]]:
    return model.ir_version, {entry.domain: entry.version for entry in model.opset_import}


def _signature(model: onnx.ModelProto) -> list[bytes]:
    """Return inputs and outputs in order, as bytes: names, types, shapes and the symbols of free dimensions."""
    return [info.SerializeToString(deterministic=True) for info in (*model.graph.input, *model.graph.output)]


def _metadata(model: onnx.ModelProto) -> tuple[dict[str, str], ...]:
    return tuple({entry.key: entry.value for entry in part.metadata_props} for part in (model, model.graph))


def _other_operators(model: onnx.ModelProto, candidate: onnx.ModelProto, folder: Path | None) -> str:
    """Return which operators onnxruntime executes how often of the model and the candidate, `QGemm 12 -> 4`.

    Where two reshapes vanish, for instance, a Gemm and the Relu after it become one kernel, in float or on integers.
    """
    before, after = (_executed(each, folder) for each in (model, candidate))
    names = [name for name in sorted({*before, *after}) if before[name] != after[name]]
    return ", ".join(f"{name} {before[name]} -> {after[name]}" for name in names)


def _executed(model: onnx.ModelProto, folder: Path | None) -> Counter[str]:
    """Return the counts of all operators that compute, quantize or dequantize in the optimized graph."""
    names = (node.op_type for node in _readable(model, folder).optimized.proto.graph.node)
    return Counter(name for name in names if name not in MOVE_DATA or name in QUANTIZERS)


def _same_outputs(
    model: onnx.ModelProto, candidate: onnx.ModelProto, sample_inputs: Mapping[str, Array], folder: Path | None
) -> bool:
    ours, theirs = (session(_readable(each, folder)).run(None, dict(sample_inputs)) for each in (model, candidate))
    pairs = zip(ours, theirs, strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes() for a, b in pairs)
