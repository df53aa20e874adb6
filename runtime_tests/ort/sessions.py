"""Read ONNX models once, and open onnxruntime sessions of them with every option that changes a number pinned.

Must not know: what a model means, which of its values are codes, how results are compared.
"""

from __future__ import annotations

import functools
import os
import re
import sys
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import onnxruntime as ort
from google.protobuf.message import DecodeError  # type: ignore[import-untyped, unused-ignore]
from onnxruntime.capi import onnxruntime_pybind11_state as states

from calibrators.errors import ModelError, UnknownNameError, first_line
from calibrators.temporary import TemporaryFolder
from runtime_tests.ort.worker import LAYOUT_OPTIMIZERS, session_options

__all__ = ["Model", "Source", "load_warnings", "loads", "profiling_session", "run", "session"]

MODEL_FOLDER = "session.model_external_initializers_file_folder_path"
LOG_WARNINGS = 2
LOG_NAME = "intact-load"
LOGGED_WARNING = re.compile(rf"\[W:onnxruntime:{LOG_NAME}, [^\]]*\] (.*?)(?:\x1b\[m)?$", re.MULTILINE)
"""A warning of the session with that name, as onnxruntime writes it; a terminal's colours may surround it."""
STDERR = 2
PROTOBUF_LIMIT = 2**31 - 1

REFUSALS = tuple(
    getattr(states, name)
    for name in ("Fail", "InvalidArgument", "InvalidGraph", "InvalidProtobuf", "NoSuchFile", "NotImplemented",
                 "RuntimeException", "NoModel", "EPFail", "NotFound")
)  # fmt: skip
"""Errors of onnxruntime that cannot build a session: classes without a common base."""


class Model:
    """An ONNX model whose forms are each read once, on first use.

    source: a proto below 2 GB, or a path (any size; external data is read from its folder).
    """

    def __init__(self, source: onnx.ModelProto | str | Path) -> None:
        self.source = source

    @classmethod
    def of(cls, source: Source) -> Model:
        """Return `source` as a Model: itself if it is one."""
        return source if isinstance(source, Model) else cls(source)

    @cached_property
    def proto(self) -> onnx.ModelProto:
        """The model as it is stored, external data left where it is.

        raises: ModelError for a file that is not an ONNX model.
        """
        if isinstance(self.source, onnx.ModelProto):
            return self.source
        try:
            return onnx.load(self.source, format="protobuf", load_external_data=False)
        except (OSError, DecodeError) as error:
            raise ModelError(f"{self.source} cannot be read as an ONNX model: {error}; export it again.") from error

    @cached_property
    def graph_model(self) -> ir.Model:
        """The model as a graph; external data is mapped into memory where it is read.

        raises: ModelError for a model whose parts are no graph.
        """
        try:
            model = ir.from_proto(self.proto)
        except ir.serde.SerdeError as error:
            reason = first_line(error.__cause__ or error)
            raise ModelError(f"the model cannot be read as a graph: {reason}; export it again.") from error
        if not isinstance(self.source, onnx.ModelProto):
            for graph in model.graphs():
                ir.external_data.set_base_dir(graph, Path(self.source).parent)
        return model

    @cached_property
    def optimized(self) -> Model:
        """The graph that onnxruntime executes with all optimizations on, in the layouts of ONNX.

        The blocked layout of float convolutions pads and reorders their weights; without it the same nodes run in the
        same arithmetic.

        raises: ModelError if onnxruntime refuses the model.
        """
        folder = TemporaryFolder()
        model = Model(folder.path / "optimized.onnx")
        weakref.finalize(model, folder.remove)
        session(self, save_optimized=folder.path / "optimized.onnx", disabled=LAYOUT_OPTIMIZERS)
        return model

    def with_probes(self, probes: Sequence[str]) -> bytes:
        """Serialize the model with `probes` as further outputs, external data left where it is.

        Protobuf merges concatenated messages.

        raises: UnknownNameError for a probe that no node or input makes.
        """
        return bytes(self.proto.SerializeToString() + self.further_outputs(probes))

    def whole(self, probes: Sequence[str]) -> bytes:
        """Serialize the model as one file with `probes` as further outputs and external data inside.

        raises: UnknownNameError for a probe that no node or input makes; ModelError for a model above 2 GB.
        """
        proto = self.proto
        if not isinstance(self.source, onnx.ModelProto):
            proto = onnx.ModelProto()
            proto.CopyFrom(self.proto)
            onnx.load_external_data_for_model(proto, str(Path(self.source).parent))
        if proto.ByteSize() > PROTOBUF_LIMIT:
            raise ModelError(
                f"the model has {proto.ByteSize() / 1e9:.1f} GB, but only a file of at most 2 GB can be handed to "
                "another runtime."
            )
        return bytes(proto.SerializeToString() + self.further_outputs(probes))

    def further_outputs(self, probes: Sequence[str]) -> bytes:
        """Serialize what makes `probes` further outputs when it is appended to the model.

        raises: UnknownNameError for a probe that no node or input makes.
        """
        graph = self.proto.graph
        known = {info.name for info in graph.input} | {name for node in graph.node for name in node.output}
        for probe in probes:
            if probe not in known:
                raise UnknownNameError("value", probe, known)
        present = {info.name for info in graph.output}
        new = [onnx.ValueInfoProto(name=probe) for probe in dict.fromkeys(probes) if probe not in present]
        return bytes(onnx.ModelProto(graph=onnx.GraphProto(output=new)).SerializeToString()) if new else b""


Source = Model | onnx.ModelProto | str | Path
"""A model, or what names one."""


def session(
    model: Source,
    *,
    optimized: bool = True,
    threads: int = 1,
    probes: Sequence[str] = (),
    save_optimized: Path | None = None,
    disabled: Sequence[str] = (),
) -> ort.InferenceSession:
    """Return a CPU session of `model`, deterministic, silent below errors.

    optimized:      all graph optimizations (integer kernels), else none (QDQ executed literally in float32).
    probes:         values made visible as further graph outputs, after the model's own and in this order.
    save_optimized: file that receives the graph as it is executed; large initializers go to weights.bin beside it.
    disabled:       names of optimizers that do not run.
    raises:         UnknownNameError for a probe that no node or input makes; ModelError if onnxruntime refuses the
                    model.
    """
    options = session_options(optimized=optimized, threads=threads, save_optimized=save_optimized)
    return _create(Model.of(model), options, probes, disabled)


def run(opened: ort.InferenceSession, names: Sequence[str] | None, inputs: Mapping[str, Any]) -> list[Any]:
    """Return the outputs of these names, all of them for None.

    raises: ModelError if onnxruntime cannot compute them.
    """
    try:
        return list(opened.run(names, dict(inputs)))
    except REFUSALS as error:
        raise ModelError(
            f"onnxruntime {ort.__version__} cannot run the model: {first_line(error)}. Check it with `intact lint`, "
            "and the inputs with what it takes."
        ) from error


def profiling_session(model: Source, path: Path, *, threads: int = 1) -> ort.InferenceSession:
    """Return a session as it is deployed that times every node until end_profiling(), which returns the file's name.

    path:   begin of that name.
    raises: ModelError if onnxruntime refuses the model.
    """
    options = session_options(threads=threads)
    options.enable_profiling, options.profile_file_prefix = True, str(path)
    return _create(Model.of(model), options, (), ())


def _create(
    model: Model, options: ort.SessionOptions, probes: Sequence[str], disabled: Sequence[str]
) -> ort.InferenceSession:
    """Create the session; weights in external files are never read here."""
    in_memory = isinstance(model.source, onnx.ModelProto)
    if in_memory and model.proto.ByteSize() > PROTOBUF_LIMIT:
        raise ModelError(
            f"the model in memory has {model.proto.ByteSize() / 1e9:.1f} GB, but protobuf writes at most 2 GB; "
            "save it with external data and pass the path."
        )
    content: str | bytes = str(model.source)
    if in_memory or probes:
        content = model.with_probes(probes)
    if probes:
        options.enable_cpu_mem_arena = False  # it would keep what the values of a run take
    if probes and not in_memory:
        options.add_session_config_entry(MODEL_FOLDER, str(Path(str(model.source)).resolve().parent))
    try:
        return ort.InferenceSession(
            content, options, providers=["CPUExecutionProvider"], disabled_optimizers=list(disabled)
        )
    except REFUSALS as error:
        raise ModelError(
            f"onnxruntime {ort.__version__} refuses {'the model' if in_memory else model.source}: "
            f"{str(error).strip()}. Check it with `intact lint`, which names forms that do not load."
        ) from error


def load_warnings(model: Source) -> tuple[str, ...]:
    """Return what onnxruntime warns of while it loads a model, in its words.

    onnxruntime writes to the file descriptor of stderr, which is replaced meanwhile; what others write there is passed
    on.

    raises: ModelError if onnxruntime refuses the model.
    """
    options = session_options()
    options.log_severity_level, options.logid = LOG_WARNINGS, LOG_NAME
    sys.stderr.flush()
    terminal = os.dup(STDERR)
    with tempfile.TemporaryFile() as sink:
        os.dup2(sink.fileno(), STDERR)
        try:
            _create(Model.of(model), options, (), ())
        finally:
            sys.stderr.flush()
            os.dup2(terminal, STDERR)
            os.close(terminal)
            sink.seek(0)
            text = sink.read().decode(errors="replace")
            sys.stderr.write("".join(line for line in text.splitlines(True) if not LOGGED_WARNING.search(line)))
    return tuple(LOGGED_WARNING.findall(text))


@functools.cache
def loads(*, opset: int, ir_version: int) -> bool:
    """Return whether the installed onnxruntime accepts models of this opset and IR version, by loading one."""
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "empty", [value("x", 1, [1])], [value("y", 1, [1])]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    model.ir_version = ir_version
    try:
        session(model)
    except ModelError:
        return False
    return True
