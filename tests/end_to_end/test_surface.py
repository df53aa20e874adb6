"""The Python surface, used as its documentation shows it."""

from __future__ import annotations

from pathlib import Path

import pytest

import calibrators
import exporter
import runtime_tests
from calibrators import calibrate
from exporter import capture, emit, fold
from runtime_tests import validate
from tests.support.networks import build


def test_from_torch_to_a_proved_file(tmp_path: Path) -> None:
    model, x = build("residual")
    graph = fold(capture(model, x))
    result = calibrate(graph, [x], method="percentile", options={"q": 99.9}, target="ort-cpu", seed=0)
    emit(result, tmp_path / "model.onnx")
    validation = validate(tmp_path / "model.onnx", reference=result, batches=[x])
    validation.raise_for_mismatch()
    assert validation.optimized.outputs_identical


@pytest.mark.parametrize("package", [calibrators, exporter, runtime_tests], ids=lambda package: package.__name__)
def test_every_public_name_exists(package: object) -> None:
    for name in package.__all__:  # type: ignore[attr-defined]
        assert getattr(package, name)
        assert name in dir(package)
    with pytest.raises(AttributeError, match="attribute nothing"):
        package.nothing  # type: ignore[attr-defined]  # noqa: B018
