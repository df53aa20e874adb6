"""Rules about the file as a graph: whether it can be read, is well-formed, and loads.

Must not know: quantization.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from typing import Any

import onnx
from onnx import shape_inference
from onnxruntime.capi import onnxruntime_pybind11_state as states

from calibrators.errors import ModelError, counted, first_line
from runtime_tests.ort.lint.rule import Case, Hits, Rule
from runtime_tests.ort.lint.stored_data import faults
from runtime_tests.ort.lint.subjects import BYTE, NARROW
from runtime_tests.ort.sessions import load_warnings
from runtime_tests.ort.versions import needs

__all__ = [
    "FORM_RULES",
    "GRAPH_RULES",
    "LARGEST_GRAPH",
    "LOADING_RULES",
    "READING_RULES",
    "STRUCTURE_RULES",
    "VALIDITY_RULES",
    "VERSION_RULES",
    "graphs",
    "size_of",
]

LARGEST_GRAPH = 200_000
"""Nodes, constants and other parts of the largest graph that is read."""

CPU = "CPUExecutionProvider"

SHOWN = 5
"""Nodes of a cycle that a message names."""

OP_ERROR = re.compile(r"\(op_type:(\w+)(?:, node name: ([^)]*))?\): (?:\[\w+\] )?(.*)")
"""One error of shape inference: operator, node, message."""


def _unreadable(case: Case) -> Hits:
    try:
        model = case.proto
    except ModelError as error:
        yield str(case.model.source), str(error)
        return
    if (size := size_of(model)) > LARGEST_GRAPH:
        yield "graph", f"it has {size:,} nodes and constants, more than any network; export it again"
    if not model.graph.node and not model.graph.output:
        yield "graph", "the file holds no graph; it is empty, cut off or not an ONNX model: export it again"


def size_of(model: onnx.ModelProto) -> int:
    """Return the number of parts of a model: nodes, constants, stated shapes, functions, metadata.

    Calls of functions count as the nodes that come of them: few functions that call each other can make any number.
    """
    parts = len(model.functions) + len(model.metadata_props)
    made = _nodes_of_functions(model)
    for graph, _ in graphs(model.graph, names=False):
        parts += sum(made.get(_operator(node), 0) for node in graph.node) if made else 0
        parts += len(graph.node) + len(graph.initializer) + len(graph.sparse_initializer) + len(graph.value_info)
        if parts > LARGEST_GRAPH:
            break
    return parts


def _nodes_of_functions(model: onnx.ModelProto) -> dict[tuple[str, str], int]:
    """Return by domain and name the number of nodes that one call of a function comes to; none where they circle."""
    bodies = {
        (_domain(function.domain), function.name): [
            _operator(node) for graph, _ in graphs(function, names=False) for node in graph.node
        ]
        for function in model.functions
    }
    made: dict[tuple[str, str], int] = {}
    try:
        for name in TopologicalSorter(bodies).static_order():
            if name in bodies:
                made[name] = min(sum(1 + made.get(called, 0) for called in bodies[name]), LARGEST_GRAPH + 1)
    except CycleError:
        return {}
    return made


def _operator(node: onnx.NodeProto) -> tuple[str, str]:
    return _domain(node.domain), node.op_type


# ---- structure: each part refers to what is there


def graphs(
    graph: Any, outer: frozenset[str] = frozenset(), *, names: bool = True
) -> Iterator[tuple[Any, frozenset[str]]]:
    """Yield a graph and those inside its nodes, each with the names that it sees from outside, unless nobody asks.

    graph: a GraphProto; without `names` a FunctionProto too.
    """
    yield graph, outer
    inner = outer | _defined(graph) if names else outer
    for node in graph.node:
        for attribute in node.attribute:
            for body in (*attribute.graphs, *([attribute.g] if attribute.HasField("g") else ())):
                yield from graphs(body, inner, names=names)


def _defined(graph: onnx.GraphProto) -> frozenset[str]:
    sparse = (tensor.values.name for tensor in graph.sparse_initializer)
    named = (each.name for each in (*graph.input, *graph.initializer))
    return frozenset((*named, *sparse, *(name for node in graph.node for name in node.output)))


def _duplicate_names(case: Case) -> Hits:
    for graph, _ in graphs(case.proto.graph):
        made = Counter(name for node in graph.node for name in node.output if name)
        made.update({info.name for info in graph.input} | {tensor.name for tensor in graph.initializer})
        listed = Counter(info.name for info in graph.output)
        made.update(name for name, count in listed.items() if count > 1)
        repeated = Counter(tensor.name for tensor in graph.initializer)
        made.update(name for name, count in repeated.items() if count > 1)
        for name, count in made.items():
            if count > 1:
                yield name, f"{count} nodes or initializers have this output name; rename all but one"


def _dangling_values(case: Case) -> Hits:
    for graph, outer in graphs(case.proto.graph):
        known = outer | _defined(graph) | {""}
        readers = {name: node.name or node.op_type for node in graph.node for name in node.input}
        readers |= {info.name: "the graph, as an output" for info in graph.output}
        for name, reader in readers.items():
            if name not in known:
                yield name, f"nothing makes this value, which is read by {reader}; add its node or initializer"


def _cycles(case: Case) -> Hits:
    for graph, _ in graphs(case.proto.graph):
        makers = {name: index for index, node in enumerate(graph.node) for name in node.output if name}
        before = {i: [makers[name] for name in node.input if name in makers] for i, node in enumerate(graph.node)}
        try:
            TopologicalSorter(before).prepare()
        except CycleError as error:
            names = [graph.node[index].name or graph.node[index].op_type for index in error.args[1][1:]]
            yield names[0], f"{len(names)} nodes wait for each other's outputs: {', '.join(names[:SHOWN])}"


def _missing_domains(case: Case) -> Hits:
    used = {_domain(node.domain) for graph, _ in graphs(case.proto.graph) for node in graph.node}
    for domain in sorted(used - _imported(case)):
        yield (
            domain or "ai.onnx",
            "nodes are of this domain, but the file imports no opset of it; add it to opset_import",
        )


def _unknown_operators(case: Case) -> Hits:
    known = _runtime_operators() | {(function.domain, function.name) for function in case.proto.functions}
    used = Counter(_operator(node) for graph, _ in graphs(case.proto.graph) for node in graph.node)
    for (domain, op), count in used.items():
        if (domain, op) in known or domain not in _imported(case):
            continue
        name = f"{domain}.{op}" if domain else op
        nodes = counted(count, "node")
        yield name, f"onnxruntime has no such operator on CPUs ({nodes}); register a library that has it, or rewrite it"


def _imported(case: Case) -> set[str]:
    return {_domain(entry.domain) for entry in case.proto.opset_import}


def _domain(name: str) -> str:
    """Return the one name of a domain: that of ONNX itself has two."""
    return "" if name == "ai.onnx" else name


def _runtime_operators() -> set[tuple[str, str]]:
    """Return domain and name of every operator that the installed onnxruntime runs on CPUs.

    Those of ONNX without a kernel are functions, which it expands.
    """
    kernels = {(each.domain, each.op_name) for each in states.get_all_opkernel_def() if each.provider == CPU}
    return kernels | {("", schema.name) for schema in states.get_all_operator_schema() if not schema.domain}


def _stored_data(case: Case) -> Hits:
    return faults(case.model)


def _no_graph(case: Case) -> Hits:
    try:
        case.graphs  # noqa: B018 (read for the error)
    except ModelError as error:
        yield "graph", str(error)


def _refused_versions(case: Case) -> Hits:
    late = [need for need in needs(case.graphs) if need.version > case.min_ort]
    places = Counter(need.what for need in late)
    for need in {need.what: need for need in reversed(late)}.values():
        others = f" (also at {places[need.what] - 1} other nodes)" if places[need.what] > 1 else ""
        yield (
            need.where,
            f"{need.what}{others} needs onnxruntime {need.version}, but the file has to load in {case.min_ort}",
        )


# ---- validity, by the tools of ONNX


def _invalid(case: Case) -> Hits:
    source = case.model.source  # a path where there is one: the checker finds external data beside it
    try:
        onnx.checker.check_model(source if isinstance(source, onnx.ModelProto) else str(source))
    except (onnx.checker.ValidationError, ValueError) as error:
        yield "model", f"it is no valid ONNX model: {first_line(error)}"
        return
    if _contradictions(case):
        silent = onnx.ModelProto.FromString(case.proto.SerializeToString())
        del silent.graph.value_info[:]
        for place, message in _inferred(silent):
            yield place, f"shapes or types do not fit together: {message}"


def _false_shapes(case: Case) -> Hits:
    for place, message in _contradictions(case):
        yield place, f"the shapes or types that the file states are false: {message}"


@functools.lru_cache(maxsize=1)
def _contradictions(case: Case) -> tuple[tuple[str, str], ...]:
    return _inferred(case.proto)


def _inferred(model: onnx.ModelProto) -> tuple[tuple[str, str], ...]:
    """Return the contradictions that shape inference finds: node, and what it says."""
    try:
        shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    except (shape_inference.InferenceError, ValueError) as error:
        found = [(name or op, f"{op}: {message}") for op, name, message in OP_ERROR.findall(str(error))]
        return tuple(found or [("model", first_line(error))])
    return ()


def _load_warnings(case: Case) -> Hits:
    try:
        for warning in load_warnings(case.model):
            yield "model", f"onnxruntime warns while it loads the file: {warning}"
    except ModelError as error:
        yield "model", str(error)


def _packed_data(case: Case) -> Hits:
    narrow = {dtype.value for dtype in (*BYTE, *NARROW)}
    for tensor in case.proto.graph.initializer:
        if tensor.data_type in narrow and len(tensor.int32_data) > 1:
            yield tensor.name, "its codes are stored in int32_data, one varint per code or pair; store them in raw_data"


LOADING_RULES = (
    Rule("load-warning", "error", "onnxruntime warns of it, or refuses it, when it loads the file.", _load_warnings),
)  # fmt: skip

READING_RULES = (
    Rule("unreadable-file", "error", "It is empty, cut off, or not an ONNX model.", _unreadable),
)  # fmt: skip

STRUCTURE_RULES = (
    Rule("duplicate-name", "error", "Two values share a name: the file is no graph.", _duplicate_names),
    Rule("dangling-value", "error", "A node or the graph reads a value that nothing makes.", _dangling_values),
    Rule("cycle", "error", "Nodes wait for each other, so none can run.", _cycles),
    Rule("missing-domain", "error", "Operators of a domain whose opset the file does not state.", _missing_domains),
    Rule("unknown-operator", "error", "onnxruntime has no operator of this name.", _unknown_operators),
    Rule("stored-data", "error", "Initializers whose values are missing or of another size than their shape.",
         _stored_data),
)  # fmt: skip

GRAPH_RULES = (
    Rule("no-graph", "error", "Attributes, tensors or names are malformed.", _no_graph),
)  # fmt: skip

VERSION_RULES = (
    Rule("runtime-version", "error", "The oldest onnxruntime that has to load it does not.", _refused_versions),
)  # fmt: skip

VALIDITY_RULES = (
    Rule("invalid-model", "error", "The checker of ONNX refuses it, or its nodes do not fit together.", _invalid),
)  # fmt: skip

FORM_RULES = (
    Rule("false-shape", "error", "Runtimes that trust the stated shapes refuse it; onnxruntime warns.", _false_shapes),
    Rule("packed-data", "warning", "int32_data takes up to four bytes per narrow code.", _packed_data),
)  # fmt: skip
