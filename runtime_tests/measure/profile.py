"""Say where the time of a run goes: into integer kernels, float operators, quantizers or moves of data.

The times are those of onnxruntime's own profiler, node by node. They differ from run to run and from machine to
machine, so nothing that has to be the same in every export may depend on them.

Must not know: how the file was made, what its codes should be.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from calibrators.errors import argument
from runtime_tests.ort.coverage import READS_BYTES, FloatNode
from runtime_tests.ort.onnx_operators import DEQUANTIZE, INTEGER_INSIDE, MOVE_DATA, QUANTIZE

__all__ = ["NodeTimes", "OperatorTime", "TimeShares", "node_times", "time_shares"]

Real: TypeAlias = float
"""The builtin, in classes with a field of that name."""

Kind = Literal["integer", "float", "quantizers", "moves"]

NAMED = 3
"""Float operators that the report names."""

CODES = ("uint8", "int8")
COMPUTED = (*CODES, "float", "float16", "bfloat16", "double")
"""Types of values that are no indices or conditions, as the profiler calls them."""

RUN, NODE = "model_run", "_kernel_time"
"""Names of the profiler's events: a run, and the end of the name of each node's."""


@dataclass(frozen=True)
class OperatorTime:
    """A kind of float operator: how many nodes, their share of the time, and what helps."""

    op: str
    nodes: int
    share: Real
    advice: str


@dataclass(frozen=True)
class TimeShares:
    """Shares of the time of all nodes of the quantized file: the "time_shares" part of report.json; they sum to 1.

    integer:    integer kernels.
    float:      operators that compute in float.
    quantizers: QuantizeLinear and DequantizeLinear.
    moves:      transposes, reshapes, copies, index arithmetic.
    runs:       profiled runs; each share is one of the medians over them.
    slowest:    the most expensive float operators, with advice.
    nodes:      share of each node by name; left out where a name occurs several times.
    """

    integer: Real
    float: Real
    quantizers: Real
    moves: Real
    runs: int
    slowest: tuple[OperatorTime, ...]
    nodes: dict[str, Real] = field(default_factory=dict)


@dataclass(frozen=True)
class NodeTimes:
    """Times in microseconds, medians over `runs` runs: by kind and operator with the number of nodes, and by node."""

    microseconds: dict[tuple[Kind, str], Real]
    nodes: dict[tuple[Kind, str], int]
    runs: int
    by_name: dict[str, Real] = field(default_factory=dict)


def node_times(path: str | Path) -> NodeTimes:
    """Read the profile that a session wrote; the first run, which allocates memory, is left out."""
    events = json.loads(Path(path).read_text(encoding="utf-8"))
    begins = np.array([event["ts"] for event in events if event["name"] == RUN][1:])
    times: dict[tuple[Kind, str], Any] = defaultdict(lambda: np.zeros(len(begins)))
    calls: dict[tuple[Kind, str], int] = defaultdict(int)
    single: dict[str, list[float]] = defaultdict(list)
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith(NODE)]
    for event, own in zip(nodes, _own_times(nodes), strict=True):
        run = int(np.searchsorted(begins, event["ts"], side="right")) - 1
        if run >= 0:
            key = (_kind(event["args"]), event["args"]["op_name"])
            times[key][run] += own
            calls[key] += 1
            single[event["name"].removesuffix(NODE)].append(own)
    medians = {key: float(np.median(each)) for key, each in times.items()}
    by_name = {name: float(np.median(each)) for name, each in single.items() if len(each) == len(begins)}
    return NodeTimes(medians, {key: round(n / len(begins)) for key, n in calls.items()}, len(begins), by_name)


def _own_times(events: Sequence[Mapping[str, Any]]) -> list[float]:
    """Return the time of each node in microseconds, without that of the nodes which it runs (If, Loop, Scan)."""
    own = [float(event["dur"]) for event in events]
    open_nodes: list[int] = []
    for index in sorted(range(len(events)), key=lambda index: (events[index]["ts"], -events[index]["dur"])):
        event = events[index]
        while open_nodes and _end(events[open_nodes[-1]]) <= event["ts"]:
            open_nodes.pop()
        if open_nodes and _end(event) <= _end(events[open_nodes[-1]]):
            own[open_nodes[-1]] -= event["dur"]
        open_nodes.append(index)
    return own


def _end(event: Mapping[str, Any]) -> int:
    return int(event["ts"] + event["dur"])


def _kind(node: Mapping[str, Any]) -> Kind:
    op, types = node["op_name"], {name for output in node["output_type_shape"] for name in output}
    if op in (QUANTIZE, DEQUANTIZE):
        return "quantizers"
    if op in INTEGER_INSIDE:
        return "integer"
    if op in MOVE_DATA or not types & {*COMPUTED}:
        return "moves"
    return "integer" if types & {*CODES} else "float"


def time_shares(times: NodeTimes, run_ms: float, float_nodes: Iterable[FloatNode]) -> TimeShares:
    """Return the shares of the time, and advice on the float operators that take most of it.

    The profiler adds some microseconds to every node; what all nodes together take longer than a run is taken from
    each of them alike, but no more than the fastest takes: on a busy machine a profiled run takes several times as
    long as others, for reasons that are not the profiler's.

    run_ms:      time of a run without the profiler, in milliseconds.
    float_nodes: of the file's coverage, most expensive first, whose reasons are part of the advice.
    """
    longer = max(sum(times.microseconds.values()) - 1e3 * run_ms, 0.0) / max(sum(times.nodes.values()), 1)
    added = min([longer, *(value / max(times.nodes[key], 1) for key, value in times.microseconds.items())])
    own = {key: value - added * times.nodes[key] for key, value in times.microseconds.items()}
    total = sum(own.values()) or 1.0
    reasons = {node.op: node.why for node in reversed(tuple(float_nodes))}
    floats = {op: value for (kind, op), value in own.items() if kind == "float" and value}
    slowest = sorted(floats, key=lambda op: -floats[op])[:NAMED]
    return TimeShares(
        **{kind: sum(value for (of, _), value in own.items() if of == kind) / total for kind in get_args(Kind)},
        runs=times.runs,
        slowest=tuple(
            OperatorTime(op, times.nodes["float", op], floats[op] / total, _advice(op, reasons.get(op, "")))
            for op in slowest
        ),
        nodes={name: max(value - added, 0.0) / total for name, value in times.by_name.items()},
    )


# ---- advice

ACTIVATION = "ReLU, LeakyReLU, sigmoid and SiLU have integer kernels"
NORM = "batch norm folds into the layer before it and costs nothing"
ADVICE = {
    **dict.fromkeys(["BiasGelu", "Celu", "Elu", "Erf", "FastGelu", "Gelu", "HardSigmoid", "HardSwish"], ACTIVATION),
    **dict.fromkeys(["Mish", "PRelu", "QuickGelu", "Selu", "Softplus", "Softsign", "Tanh"], ACTIVATION),
    **dict.fromkeys(["BatchNormalization", "InstanceNormalization", "LayerNormalization"], NORM),
    **dict.fromkeys(["LpNormalization", "LRN", "RMSNormalization", "SimplifiedLayerNormalization"], NORM),
    **dict.fromkeys(["SkipLayerNormalization", "SkipSimplifiedLayerNormalization"], NORM),
    **dict.fromkeys(["GRU", "LSTM", "RNN"], "convolutions over time have integer kernels"),
    "ConvTranspose": "an upsampling to the nearest value and a convolution have integer kernels",
    "Einsum": "convolutions and linear layers have integer kernels",
}
"""Replacements for a float operator."""


def _advice(op: str, reason: str) -> str:
    otherwise = f"left in float together with the layers around it ({argument('exclude')}), it needs no quantizers"
    return reason if reason == READS_BYTES else "; ".join(filter(None, [reason, ADVICE.get(op, otherwise)]))
