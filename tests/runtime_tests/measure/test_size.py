from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto

from runtime_tests.measure.size import size_of
from tests.support import onnx_models as models
from tests.support.onnx_models import Net


def mixed() -> onnx.ModelProto:
    net = Net(opset=21)
    x = net.input("x", ("N", 4))
    net.constant("i4", np.arange(-3, 4), dtype=TensorProto.INT4)
    net.constant("i8", np.zeros((10,), np.int8))
    net.constant("f32", np.zeros((2, 3), np.float32))
    net.constant("i64", np.array(7, np.int64))
    return net.model(net.op("Tanh", x))


@pytest.mark.parametrize("external", [False, True], ids=["inside", "external"])
def test_bytes_by_type_and_on_disk(tmp_path: Path, external: bool) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(mixed(), path, save_as_external_data=external, location="data.bin", size_threshold=0)
    size = size_of(path, path)
    assert size.by_type == {"FLOAT": 24, "INT8": 10, "INT64": 8, "INT4": 4}
    assert size.bytes == size.float_bytes == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 1 + external


def test_an_int8_net_is_smaller_than_a_float_one_would_be(tmp_path: Path) -> None:
    onnx.save(models.residual(), tmp_path / "m.onnx")
    size = size_of(tmp_path / "m.onnx", tmp_path / "m.onnx")
    weights = 16 * 27 + 4 * 16 * 144 + 160
    assert size.by_type["INT8"] >= weights
    assert next(iter(size.by_type)) == "INT8"
