from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runtime_tests.measure.latency import latency
from runtime_tests.measure.profile import NodeTimes, node_times, time_shares
from runtime_tests.ort.coverage import READS_BYTES, FloatNode, coverage
from tests.support import onnx_models as models


def event(op: str, begin: float, micros: float, output: str = "float") -> dict[str, Any]:
    args = {"op_name": op, "output_type_shape": [{output: [1]}]}
    return {"cat": "Node", "name": f"{op}_1_kernel_time", "ts": begin, "dur": micros, "args": args}


def run(begin: float, conv: float) -> list[dict[str, Any]]:
    """One run of a network: a loop over two nodes among the rest."""
    return [
        {"cat": "Session", "name": "model_run", "ts": begin, "dur": 1000},
        event("QuantizeLinear", begin + 1, 5, "uint8"),
        event("QLinearConv", begin + 10, conv, "uint8"),
        event("Transpose", begin + 200, 7, "uint8"),
        event("Shape", begin + 210, 2, "int64"),
        event("Equal", begin + 215, 1, "bool"),
        event("QGemm", begin + 220, 20),
        event("Tanh", begin + 251, 10),
        event("Tanh", begin + 262, 12),
        event("Scan", begin + 250, 30),
        event("Softmax", begin + 300, 40),
    ]


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profile.json"
    events = [
        {"cat": "Session", "name": "session_initialization", "ts": 0, "dur": 100},
        *run(1000, 5000.0),
        *run(20000, 90.0),
        *run(40000, 110.0),
        *run(60000, 100.0),
    ]
    path.write_text(json.dumps(events), encoding="utf-8")
    return path


def test_times_are_medians_over_the_runs_after_the_first(profile: Path) -> None:
    times = node_times(profile)
    assert times.runs == 3
    assert times.microseconds == {
        ("quantizers", "QuantizeLinear"): 5,
        ("integer", "QLinearConv"): 100,
        ("moves", "Transpose"): 7,
        ("moves", "Shape"): 2,
        ("moves", "Equal"): 1,
        ("integer", "QGemm"): 20,
        ("float", "Tanh"): 22,
        ("float", "Scan"): 8,  # 30, less the nodes that it runs
        ("float", "Softmax"): 40,
    }
    assert times.nodes["float", "Tanh"] == 2 and times.nodes["float", "Scan"] == 1


def test_shares_sum_to_one_and_name_the_slowest_float_operators(profile: Path) -> None:
    nodes = [FloatNode("head", "Softmax", "its output is not quantized", 0)]
    shares = time_shares(node_times(profile), 1.0, nodes)
    assert shares.integer == pytest.approx(120 / 205)
    assert shares.float == pytest.approx(70 / 205)
    assert shares.integer + shares.float + shares.quantizers + shares.moves == pytest.approx(1.0)
    assert [(each.op, each.nodes) for each in shares.slowest] == [("Softmax", 1), ("Tanh", 2), ("Scan", 1)]
    assert "its output is not quantized" in shares.slowest[0].advice
    assert "ReLU" in shares.slowest[1].advice


def test_what_the_profiler_adds_to_each_node_is_taken_off() -> None:
    times = NodeTimes(
        {("integer", "QGemm"): 30.0, ("float", "Tanh"): 50.0, ("moves", "Reshape"): 10.0},
        {("integer", "QGemm"): 1, ("float", "Tanh"): 4, ("moves", "Reshape"): 1},
        runs=5,
    )
    shares = time_shares(times, 0.030, [])  # 60 of 90 microseconds, 10 for each of 6 nodes, are the profiler's
    assert (shares.integer, shares.float, shares.moves) == pytest.approx((20 / 30, 10 / 30, 0.0))


def test_a_slow_profiled_run_does_not_hide_fast_nodes() -> None:
    times = NodeTimes(
        {("integer", "QGemm"): 1000.0, ("float", "Tanh"): 40.0, ("moves", "Reshape"): 3.0},
        {("integer", "QGemm"): 1, ("float", "Tanh"): 4, ("moves", "Reshape"): 1},
        runs=5,
    )
    shares = time_shares(times, 0.2, [])  # 140 microseconds a node more than a run
    assert (shares.integer, shares.float, shares.moves) == pytest.approx((997 / 1025, 28 / 1025, 0.0))


def test_the_profile_of_a_real_network_covers_its_nodes() -> None:
    model = models.transformer_mlp()
    timings = latency({"quantized": model}, models.sample(model, batch=1), runs=3, warmup=1, profiled="quantized")
    found = coverage(model)
    assert timings.nodes is not None
    computing = {key: count for key, count in timings.nodes.nodes.items() if key[0] in ("integer", "float")}
    assert sum(computing.values()) == found.compute_nodes
    assert sum(count for (kind, _), count in computing.items() if kind == "integer") == found.integer_nodes
    shares = timings.shares("quantized", found.float_nodes)
    assert shares is not None and {each.op for each in shares.slowest} <= {node.op for node in found.float_nodes}
    assert latency({"quantized": model}, models.sample(model, batch=1), runs=1).shares("quantized", []) is None


def test_operators_that_read_bytes_get_no_other_advice() -> None:
    times = NodeTimes({("float", "Div"): 10.0, ("float", "Erf"): 5.0}, {("float", "Div"): 1, ("float", "Erf"): 1}, 3)
    nodes = [FloatNode("div", "Div", READS_BYTES, 0), FloatNode("erf", "Erf", "it has no kernel", 0)]
    div, erf = time_shares(times, 0.015, nodes).slowest
    assert div.advice == READS_BYTES and "exclude" not in div.advice
    assert erf.advice.startswith("it has no kernel; ")
