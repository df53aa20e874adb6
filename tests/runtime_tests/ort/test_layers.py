"""The layer of the file that each executed node comes from."""

from __future__ import annotations

import itertools
import re

import onnx
import onnx_ir as ir
import pytest

from calibrators.calibration import calibrate
from runtime_tests.measure.latency import latency
from runtime_tests.ort.coverage import coverage
from runtime_tests.ort.sessions import Model
from runtime_tests.reference.execute import plan
from tests.support.folded import folded_network
from tests.support.stored import stored


@pytest.mark.parametrize("name", ["residual", "transformer"])
def test_kernels_are_found_with_their_layers(name: str) -> None:
    graph, inputs = folded_network(name)
    result = calibrate(graph, [inputs])
    model = stored(result)
    found = coverage(model)
    assert len(found.nodes) == found.compute_nodes
    assert sum(node.integer for node in found.nodes) == found.integer_nodes
    assert sum(node.macs or 0 for node in found.nodes) == found.macs
    layers = [site for site in result.placement.sites if site.kind == "weight"]
    for site in layers:
        (node,) = (node for node in found.nodes if site.name in node.reads)
        assert node.layer.startswith(node.module) and re.search(r"(Conv|Gemm|MatMul)(_\d+)?$", node.layer)
        assert site.name.startswith(node.module)
        assert node.bytes >= result.placement.values(site).numel() * site.spec.bits // 8
    constants = ir.from_proto(model).graph.initializers.values()
    assert sum(node.bytes for node in found.nodes) <= sum(
        value.const_value.nbytes for value in constants if value.const_value
    )
    planned = {step.site: step.kernel for step in plan(result.program).steps if step.quantized and step.is_integer}
    written = {node.writes: node.kernel for node in found.nodes if node.writes in planned}
    assert written and all(planned[site] == kernel for site, kernel in written.items() if site is not None)


def test_the_profiler_calls_nodes_by_the_same_names() -> None:
    graph, inputs = folded_network("residual")
    model = Model(stored(calibrate(graph, [inputs])))
    sample = {value.name: inputs[0][:1].numpy() for value in model.proto.graph.input}
    timings = latency({"quantized": model}, sample, runs=1, warmup=1, profiled="quantized")
    shares, found = timings.shares("quantized", ()), coverage(model)
    assert shares is not None and {node.name for node in found.nodes} <= {*shares.nodes}
    assert any(shares.nodes[node.name] > 0 for node in found.nodes)
    assert all(0.0 <= share <= 1.0 for share in shares.nodes.values())


def test_many_paths_through_a_network_take_no_time() -> None:
    values = [f"x{index}" for index in range(60)]
    nodes = [onnx.helper.make_node("Mul", [x, x], [y], name=y) for x, y in itertools.pairwise(values)]
    ends = [onnx.helper.make_tensor_value_info(x, onnx.TensorProto.FLOAT, [1]) for x in (values[0], values[-1])]
    graph = onnx.helper.make_graph(nodes, "paths", ends[:1], ends[1:])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=9)
    assert [node.bytes for node in coverage(model).nodes] == [0] * len(nodes)
