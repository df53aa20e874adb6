from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from runtime_tests.ort import simplifier as stage
from runtime_tests.ort.simplifier import changes, simplify
from tests.support import onnx_models as models
from tests.support.onnx_models import Net

Model = onnx.ModelProto


def with_metadata(model: Model) -> Model:
    for part in (model, model.graph, *model.graph.node):
        entry = part.metadata_props.add()
        entry.key, entry.value = "module", f"stage.{part.name}" if isinstance(part, onnx.NodeProto) else "whole"
    return model


def padded(model: Model) -> Model:
    """The model with an Identity, which onnxsim removes, in front of its first quantizer."""
    name = model.graph.input[0].name
    for node in model.graph.node:
        node.input[:] = ["copied" if value == name else value for value in node.input]
    model.graph.node.insert(0, onnx.helper.make_node("Identity", [name], ["copied"], name="copy"))
    return model


def without_reshapes(model: Model) -> Model:
    """The model with every reader of a reshape reading what was reshaped."""
    model = copy(model)
    sources = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Reshape"}
    for node in [node for node in model.graph.node if node.op_type == "Reshape"]:
        model.graph.node.remove(node)
    for node in model.graph.node:
        node.input[:] = [sources.get(name, name) for name in node.input]
    return model


def copy(model: Model) -> Model:
    return Model.FromString(model.SerializeToString())


@pytest.fixture
def residual() -> Model:
    return with_metadata(padded(models.residual()))


def test_what_can_go_goes_and_everything_of_ours_stays(residual: Model) -> None:
    before = copy(residual)
    result, report = simplify(residual, models.sample(residual))
    assert report.applied, report.why
    assert report.nodes_after == len(result.graph.node) == report.nodes_before - 1
    assert "Identity" not in {node.op_type for node in result.graph.node}
    assert all(node.metadata_props[0].value == f"stage.{node.name}" for node in result.graph.node)
    assert result.metadata_props[0].value == result.graph.metadata_props[0].value == "whole"
    assert result.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert residual == before


def test_shapes_are_those_of_the_values_where_reshapes_were_cancelled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Gelu between two reshapes computes on two dimensions without them, under its old name."""
    net = Net()
    rows, flat = (net.constant("shape", np.array(shape, np.int64)) for shape in ([-1, 2, 8], [-1, 8]))
    gemm = net.linear(net.signed(net.input("x", ("N", 4))), 8, 4)
    gelu = net.op("Gelu", net.op("Reshape", gemm, rows))
    value = net.linear(net.signed(net.op("Reshape", gelu, flat)), 8, 8)
    model = onnx.shape_inference.infer_shapes(with_metadata(net.model(value)))

    monkeypatch.setattr(stage, "_run_onnxsim", without_reshapes)
    result, report = simplify(model, models.sample(model))
    assert report.applied, report.why
    ranks = [{i.name: len(i.type.tensor_type.shape.dim) for i in each.graph.value_info} for each in (model, result)]
    assert [rank[gelu] for rank in ranks] == [3, 2]
    onnx.checker.check_model(result, full_check=True)


@pytest.mark.parametrize(
    ("after", "other"),
    [
        (("Relu", "Gelu"), "QGemm 2 -> 1"),
        (("Relu",), "QuantizeLinear 2 -> 1"),
    ],
    ids=["merged-in-float", "merged-on-integers"],
)
def test_a_result_that_the_runtime_computes_otherwise_is_dropped(
    after: tuple[str, ...], other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the reshapes, the runtime merges the Gemm and the Relu after it."""
    net = Net()
    rows, flat = (net.constant("shape", np.array(shape, np.int64)) for shape in ([-1, 2, 8], [-1, 8]))
    value = net.op("Reshape", net.linear(net.signed(net.input("x", ("N", 4))), 8, 4), rows)
    for op in after:
        value = net.op(op, value)
    value = net.linear(net.quantize(net.op("Reshape", value, flat), 0.0, 16.0), 8, 8)
    model = onnx.shape_inference.infer_shapes(with_metadata(net.model(value)))
    monkeypatch.setattr(stage, "_run_onnxsim", without_reshapes)
    result, report = simplify(model, models.sample(model))
    assert result is model
    assert report.why.startswith("dropped: onnxruntime computes it with other operators: ")
    assert other in report.why


def test_sizes_that_inference_does_not_know_stay_open() -> None:
    net = Net()
    rows = net.op("Reshape", net.input("x", ("N", 2, 4)), net.constant("shape", np.array([-1, 4], np.int64)))
    model = padded(net.model(net.linear(net.signed(rows), 8, 4)))
    result, report = simplify(model, models.sample(model))
    assert report.applied, report.why
    shapes = {info.name: info.type.tensor_type.shape.dim for info in result.graph.value_info}
    assert shapes[rows][1].dim_value == 4
    assert shapes[rows][0] == onnx.TensorShapeProto.Dimension()


def test_a_result_that_contradicts_itself_is_dropped(residual: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    def transposed(model: Model) -> Model:
        broken = copy(model)
        gemm = next(node for node in broken.graph.node if node.op_type == "Gemm")
        next(each for each in gemm.attribute if each.name == "transB").i = 0
        return broken

    monkeypatch.setattr(stage, "_run_onnxsim", transposed)
    result, report = simplify(residual, models.sample(residual))
    assert result is residual
    assert report.why.startswith("dropped: the simplified model is not valid: ")


@pytest.mark.parametrize("name", models.NETS)
@pytest.mark.parametrize("opset", [20, 21])
def test_every_toy_passes_the_guards(name: str, opset: int) -> None:
    model = with_metadata(models.NETS[name](opset=opset))
    result, report = simplify(model, models.sample(model))
    assert report.applied or report.why == "nothing to simplify"
    assert changes(model, result) == []


def test_a_simple_model_is_returned_itself() -> None:
    model = models.chain("Tanh", "Exp")
    result, report = simplify(model, models.sample(model))
    assert result is model
    assert (report.applied, report.why) == (False, "nothing to simplify")


def test_a_large_model_is_skipped_with_the_reason(residual: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "MAX_BYTES", 1000)
    result, report = simplify(residual, models.sample(residual))
    assert result is residual
    assert report.why.startswith("skipped: the model has")


def drop_pair(model: Model) -> None:
    node = next(node for node in model.graph.node if node.op_type == "Sigmoid" or node.op_type == "QuantizeLinear")
    model.graph.node.remove(node)


def change_code(model: Model) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if tensor.data_type == onnx.TensorProto.INT8)
    values = onnx.numpy_helper.to_array(tensor).copy()
    values.reshape(-1)[0] ^= 1
    tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))


def change_scale(model: Model) -> None:
    tensor = next(tensor for tensor in model.graph.initializer if ".scale" in tensor.name)
    scale = np.nextafter(onnx.numpy_helper.to_array(tensor), np.float32(1)).astype(np.float32)
    tensor.CopyFrom(onnx.numpy_helper.from_array(np.asarray(scale), tensor.name))


def raise_opset(model: Model) -> None:
    model.opset_import[0].version += 1


def fix_batch(model: Model) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2


def rename_output(model: Model) -> None:
    model.graph.output[0].name = "renamed"
    model.graph.node[-1].output[0] = "renamed"


def rename_values(model: Model) -> None:
    conv = next(node for node in model.graph.node if node.op_type == "Conv")
    for node in model.graph.node:
        node.input[:] = ["renamed" if value == conv.output[0] else value for value in node.input]
    conv.output[0] = "renamed"


SABOTAGE: dict[str, tuple[Callable[[Model], None], str]] = {
    "quantizer dropped": (drop_pair, "the number of QuantizeLinear"),
    "code changed": (change_code, "the integer initializers"),
    "scale changed": (change_scale, "the codes, scales or zero points"),
    "opset raised": (raise_opset, "the opsets"),
    "batch fixed": (fix_batch, "the names, types or shapes"),
    "output renamed": (rename_output, "the names, types or shapes"),
    "value renamed": (rename_values, "the output names of 1 node"),
}


@pytest.mark.parametrize("fault", SABOTAGE)
def test_a_result_that_changed_anything_is_dropped_and_says_what(
    residual: Model, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spoil, why = SABOTAGE[fault]

    def saboteur(model: Model) -> Model:
        changed = copy(model)
        for node in changed.graph.node:
            del node.metadata_props[:]
        spoil(changed)
        return changed

    monkeypatch.setattr(stage, "_run_onnxsim", saboteur)
    result, report = simplify(residual, models.sample(residual))
    assert result is residual
    assert not report.applied
    assert report.why.startswith("dropped: onnxsim changed") and why in report.why


def test_a_result_with_other_outputs_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.chain("Tanh", "Exp")

    def saboteur(model: Model) -> Model:
        changed = copy(model)
        changed.graph.node[1].op_type = "Sigmoid"
        return changed

    monkeypatch.setattr(stage, "_run_onnxsim", saboteur)
    result, report = simplify(model, models.sample(model))
    assert result is model
    assert "outputs on the sample inputs differ" in report.why


def test_a_failure_inside_onnxsim_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: Model) -> Model:
        raise RuntimeError("boom")

    monkeypatch.setattr(stage, "_run_onnxsim", broken)
    model = models.chain("Tanh")
    result, report = simplify(model, models.sample(model))
    assert result is model
    assert report.why == "dropped: onnxsim failed with RuntimeError: boom"


def test_the_stage_prints_nothing() -> None:
    program = (
        "import onnx, numpy as np; from runtime_tests.ort.simplifier import simplify;"
        "from tests.support import onnx_models as models;"
        "m = models.squeeze_excite(); simplify(m, models.sample(m))"
    )
    done: Any = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")


def test_integer_contents_may_be_merged_but_not_lost() -> None:
    net = Net()
    x = net.signed(net.input("x", ("N", 4)))
    model = net.model(net.signed(net.op("Tanh", x.name)).name)
    result, report = simplify(model, models.sample(model))
    assert report.applied  # both quantizers have one scale and one zero point: equal initializers become one
    assert len(result.graph.initializer) < len(model.graph.initializer)
    assert changes(model, result) == []
