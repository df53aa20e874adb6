"""onnxruntime sessions with every option that changes a number pinned.

Must not know: what a model means, which of its values are codes, how results are compared.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import onnx
import onnxruntime as ort
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
from onnxruntime.capi import onnxruntime_pybind11_state as states

from calibrators.errors import ModelError, UnknownNameError

__all__ = ["loads", "optimized_file", "optimized_model", "readable", "session", "value_names"]

PINNED = {
    "session.disable_double_qdq_remover": "1",
    "session.qdq_matmulnbits_accuracy_level": "0",
    "session.optimized_model_external_initializers_file_name": "weights.bin",
}
"""Entries of every session: by default two QDQ pairs in a row are merged into one with other parameters, and
weight-only MatMuls quantize their activations on the fly. The third keeps optimised models above 2 GB writable."""

MODEL_FOLDER = "session.model_external_initializers_file_folder_path"
LAYOUT_OPTIMIZERS = ["NchwcTransformer"]
LOG_ERRORS = 3
PROTOBUF_LIMIT = 2**31 - 1

REFUSALS = tuple(
    getattr(states, name)
    for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented",
                 "RuntimeException", "NoModel", "EPFail", "NotFound")
)  # fmt: skip
"""What onnxruntime raises when it cannot build a session: unrelated classes without a common root."""


def session(
    model: onnx.ModelProto | str | Path,
    *,
    optimized: bool = True,
    threads: int = 1,
    taps: Sequence[str] = (),
    save_optimized: Path | None = None,
) -> ort.InferenceSession:
    """CPU session of `model`, deterministic, silent below errors.

    model:          a proto below 2 GB, or a path (any size; external data are read from its folder).
    optimized:      all graph optimisations (integer kernels), else none (QDQ executed literally in float32).
    taps:           values made visible as further graph outputs, after the model's own and in this order.
    save_optimized: file that receives the graph as it is executed; large initialisers go to weights.bin beside it.
    raises:         UnknownNameError for a tap that no node or input makes; ModelError if onnxruntime refuses the model.
    """
    options = _options(optimized=optimized, threads=threads)
    if save_optimized is not None:
        options.optimized_model_filepath = str(save_optimized)
    return _create(model, options, taps)


@contextmanager
def optimized_file(model: onnx.ModelProto | str | Path, *, layouts: bool = True) -> Iterator[Path]:
    """File of the graph that onnxruntime really executes with all optimisations on; it exists inside the `with` only.

    layouts: keep the blocked NCHWc layout of float convolutions, whose weights are padded and reordered; without it
             the same nodes run in the same arithmetic and all shapes are the ONNX ones.
    raises:  ModelError if onnxruntime refuses the model.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "optimized.onnx"
        options = _options(optimized=True, threads=1)
        options.optimized_model_filepath = str(path)
        _create(model, options, (), disabled=[] if layouts else LAYOUT_OPTIMIZERS)
        yield path


def optimized_model(model: onnx.ModelProto | str | Path, *, layouts: bool = True) -> onnx.ModelProto:
    """The graph that onnxruntime really executes, weights included; see `optimized_file`."""
    with optimized_file(model, layouts=layouts) as path:
        return onnx.load(path)


def value_names(model: onnx.ModelProto) -> set[str]:
    """Names of all inputs and node outputs of the main graph."""
    return {info.name for info in model.graph.input} | {name for node in model.graph.node for name in node.output}


@functools.cache
def loads(*, opset: int, ir_version: int) -> bool:
    """Whether the installed onnxruntime accepts models of this opset and IR version: tried, not looked up."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "probe", [value("x", 1, [1])], [value("y", 1, [1])]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    model.ir_version = ir_version
    try:
        session(model)
    except ModelError:
        return False
    return True


def _options(*, optimized: bool, threads: int) -> ort.SessionOptions:
    levels = ort.GraphOptimizationLevel
    options = ort.SessionOptions()
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.use_deterministic_compute = True
    options.log_severity_level = LOG_ERRORS
    for key, value in PINNED.items():
        options.add_session_config_entry(key, value)
    return options


def _create(
    model: onnx.ModelProto | str | Path,
    options: ort.SessionOptions,
    taps: Sequence[str],
    disabled: Sequence[str] = (),
) -> ort.InferenceSession:
    what = "the model" if isinstance(model, onnx.ModelProto) else str(model)
    source = _source(model, options, taps)
    try:
        return ort.InferenceSession(
            source, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
        )
    except REFUSALS as error:
        raise ModelError(
            f"onnxruntime {ort.__version__} refuses {what}: {str(error).strip()}. "
            "Check it with `intact lint`, which knows the forms that do not load."
        ) from error


def _source(model: onnx.ModelProto | str | Path, options: ort.SessionOptions, taps: Sequence[str]) -> bytes | str:
    """What InferenceSession loads; weights in external files are never read here."""
    if isinstance(model, onnx.ModelProto):
        if model.ByteSize() > PROTOBUF_LIMIT:
            raise ModelError(
                f"the model in memory has {model.ByteSize() / 2**30:.1f} GiB and protobuf writes no more than 2: "
                "save it with external data and pass the path."
            )
        return bytes(model.SerializeToString()) + _extra_outputs(model, taps)
    if not taps:
        return str(model)
    options.add_session_config_entry(MODEL_FOLDER, str(Path(model).resolve().parent))
    with readable(model):
        content = Path(model).read_bytes()
        return content + _extra_outputs(onnx.ModelProto.FromString(content), taps)


@contextmanager
def readable(model: str | Path) -> Iterator[None]:
    """What cannot be read as an ONNX model inside becomes a ModelError."""
    try:
        yield
    except (OSError, DecodeError) as error:
        raise ModelError(f"{model} cannot be read as an ONNX model: {error}. Export it again.") from error


def _extra_outputs(model: onnx.ModelProto, taps: Sequence[str]) -> bytes:
    """Bytes that, appended to a serialised model, add `taps` to its outputs: protobuf merges concatenated messages."""
    known = value_names(model) if taps else set()
    for tap in taps:
        if tap not in known:
            raise UnknownNameError("value", tap, known)
    present = {info.name for info in model.graph.output}
    new = [onnx.ValueInfoProto(name=tap) for tap in dict.fromkeys(taps) if tap not in present]
    return bytes(onnx.ModelProto(graph=onnx.GraphProto(output=new)).SerializeToString()) if new else b""
