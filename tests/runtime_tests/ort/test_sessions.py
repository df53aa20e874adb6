from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from calibrators.errors import ModelError, UnknownNameError
from runtime_tests.ort import sessions
from runtime_tests.ort.sessions import Model, loads, session
from tests.support import onnx_models as models
from tests.support.onnx_models import optimized_model


@pytest.fixture(scope="module")
def residual() -> onnx.ModelProto:
    return models.residual()


def external(model: onnx.ModelProto, folder: Path) -> Path:
    path = folder / "model.onnx"
    copy = onnx.ModelProto.FromString(model.SerializeToString())
    onnx.save(copy, path, save_as_external_data=True, location="data.bin", size_threshold=0)
    assert (folder / "data.bin").stat().st_size > 0
    return path


def codes(model: onnx.ModelProto) -> list[str]:
    return [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]


def run(ort_session: Any, model: onnx.ModelProto) -> list[Any]:
    return list(ort_session.run(None, models.sample(model)))


@pytest.mark.parametrize("optimized", [True, False], ids=["all", "none"])
def test_probes_follow_the_outputs_in_order_and_change_no_bit(residual: onnx.ModelProto, optimized: bool) -> None:
    probes = codes(residual)[::-1]
    plain = session(residual, optimized=optimized)
    probed = session(residual, optimized=optimized, probes=probes)
    assert [value.name for value in probed.get_outputs()] == [residual.graph.output[0].name, *probes]
    results = run(probed, residual)
    np.testing.assert_array_equal(results[0], run(plain, residual)[0])
    assert all(value.dtype == np.uint8 for value in results[1:])


def test_probes_leave_the_given_model_untouched(residual: onnx.ModelProto) -> None:
    before = residual.SerializeToString(deterministic=True)
    session(residual, probes=codes(residual))
    assert residual.SerializeToString(deterministic=True) == before


def test_a_probe_that_is_an_output_already_is_not_doubled(residual: onnx.ModelProto) -> None:
    name = residual.graph.output[0].name
    assert [value.name for value in session(residual, probes=[name, name]).get_outputs()] == [name]


def test_unknown_probe_is_named_with_near_misses(residual: onnx.ModelProto) -> None:
    name = codes(residual)[0]
    with pytest.raises(UnknownNameError, match=f"unknown value '{name}x'. Did you mean '{name}'"):
        session(residual, probes=[name + "x"])


@pytest.mark.parametrize("probes", [False, True], ids=["plain", "probed"])
def test_external_data_load_by_path(residual: onnx.ModelProto, tmp_path: Path, probes: bool) -> None:
    path = external(residual, tmp_path)
    names = codes(residual) if probes else []
    for given, expected in zip(
        run(session(path, probes=names), residual), run(session(residual, probes=names), residual), strict=True
    ):
        np.testing.assert_array_equal(given, expected)


def test_optimization_levels_run_different_kernels(residual: onnx.ModelProto, tmp_path: Path) -> None:
    session(residual, save_optimized=tmp_path / "on.onnx")
    session(residual, optimized=False, save_optimized=tmp_path / "off.onnx")
    on = {node.op_type for node in onnx.load(tmp_path / "on.onnx").graph.node}
    off = {node.op_type for node in onnx.load(tmp_path / "off.onnx").graph.node}
    assert "QLinearConv" in on and "Conv" not in on
    assert "Conv" in off and "QLinearConv" not in off


def test_results_do_not_depend_on_threads(residual: onnx.ModelProto) -> None:
    one, two = (run(session(residual, threads=threads), residual)[0] for threads in (1, 2))
    np.testing.assert_array_equal(one, two)


def test_two_pairs_in_a_row_are_not_merged() -> None:
    net = models.Net()
    first = net.quantize(net.input("x", ("N", 4)), -1.0, 3.0)
    model = net.model(net.quantize(first.name, -2.0, 2.0).name)
    x = {"x": np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32)}
    np.testing.assert_array_equal(session(model).run(None, x)[0], session(model, optimized=False).run(None, x)[0])


def test_optimized_model_is_the_executed_graph_with_weights(residual: onnx.ModelProto, tmp_path: Path) -> None:
    model = optimized_model(external(residual, tmp_path))
    convs = [node for node in model.graph.node if node.op_type == "QLinearConv"]
    weights = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert len(convs) == 5
    assert all(weights[conv.input[3]].dtype == np.int8 for conv in convs)


def test_optimized_file_runs_as_it_is_and_goes_away(residual: onnx.ModelProto) -> None:
    model = Model(residual)
    again = run(session(model.optimized, optimized=False), residual)[0]
    path = Path(str(model.optimized.source))
    assert path.exists() and model.optimized is model.optimized
    del model
    gc.collect()
    assert not path.exists()
    np.testing.assert_array_equal(again, run(session(residual), residual)[0])


def test_without_layouts_float_convolutions_keep_their_shapes() -> None:
    net = models.Net(seed=3)
    weight = net.constant("w", net.rng.normal(size=(16, 3, 3, 3)).astype(np.float32))
    model = net.model(net.op("Conv", net.input("x", ("N", 3, 8, 8)), weight))
    plain = optimized_model(model, layouts=False)
    assert [node.op_type for node in plain.graph.node] == ["Conv"]
    assert "ReorderOutput" in {node.op_type for node in optimized_model(model).graph.node}


@pytest.mark.parametrize("probes", [(), ("x",)], ids=["plain", "probed"])
@pytest.mark.parametrize("content", [b"not a protobuf", b"", None], ids=["garbage", "empty", "missing"])
def test_files_that_are_no_models_are_refused_in_one_message(
    tmp_path: Path, content: bytes | None, probes: tuple[str, ...]
) -> None:
    path = tmp_path / "bad.onnx"
    if content is not None:
        path.write_bytes(content)
    if content == b"" and probes:
        with pytest.raises(UnknownNameError, match="unknown value 'x'"):
            session(path, probes=probes)
        return
    with pytest.raises(ModelError, match=r"bad\.onnx"):
        session(path, probes=probes)


def test_a_model_above_the_protobuf_limit_asks_for_a_path(
    residual: onnx.ModelProto, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "PROTOBUF_LIMIT", 1000)
    with pytest.raises(ModelError, match="save it with external data"):
        session(residual)


def test_loads_finds_the_limits_of_the_installed_runtime() -> None:
    assert loads(opset=20, ir_version=10)
    assert not loads(opset=200, ir_version=10)
    assert not loads(opset=20, ir_version=200)
