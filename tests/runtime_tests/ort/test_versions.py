from __future__ import annotations

import onnx
import onnx_ir as ir
import pytest

from calibrators.errors import InputError
from runtime_tests.ort.sessions import loads, session
from runtime_tests.ort.versions import (
    FORMS,
    IR_VERSIONS,
    OPSETS,
    Form,
    Version,
    first_version,
    installed,
    minimum_version,
    parse_version,
    release_of,
)
from tests.support import onnx_models as models
from tests.support.onnx_forms import form_file

DTYPES = [(form, dtype) for form in FORMS for dtype in sorted(form.types or {ir.DataType.INT8})]


def needed(model: onnx.ModelProto) -> str:
    return str(minimum_version(ir.from_proto(model)).version)


@pytest.mark.parametrize("opset", [opset or 13 for opset in OPSETS])
def test_the_installed_runtime_loads_the_opsets_of_its_release(opset: int) -> None:
    assert loads(opset=opset, ir_version=8) == (release_of(opset, 8) <= installed())


@pytest.mark.parametrize("ir_version", [number or 8 for number in IR_VERSIONS])
def test_the_installed_runtime_loads_the_ir_versions_of_its_release(ir_version: int) -> None:
    assert loads(opset=13, ir_version=ir_version) == (release_of(13, ir_version) <= installed())


@pytest.mark.parametrize(("form", "dtype"), DTYPES, ids=lambda each: getattr(each, "op", None) or each.name)
def test_a_form_is_found_and_loads_where_its_release_is_installed(form: Form, dtype: ir.DataType) -> None:
    model = form_file(form, dtype)
    need = minimum_version(ir.from_proto(model))
    assert str(need.version) == form.release
    assert form.op in need.what
    if need.version <= installed():
        session(model)


@pytest.mark.parametrize(("opset", "release"), [(20, "1.18"), (21, "1.18"), (23, "1.24")])
def test_the_release_follows_opset_and_ir_version(opset: int, release: str) -> None:
    model = models.residual(opset=opset)
    model.ir_version = {20: 10, 21: 10, 23: 11}[opset]
    assert needed(model) == release


def test_packed_weights_of_integer_kernels_need_a_later_release_than_those_of_float_kernels() -> None:
    assert str(first_version("Cast", ir.DataType.INT4, 21)) == "1.23"
    assert str(first_version("DequantizeLinear", ir.DataType.INT4, 21)) == "1.19"
    assert str(first_version("Cast", ir.DataType.INT2, 25)) == "1.24"


def test_releases_are_compared_as_numbers() -> None:
    assert parse_version("1.9.2") == Version(1, 9) < parse_version("1.19")


@pytest.mark.parametrize("text", ["1", "new", "1.x", ""])
def test_what_is_no_release_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="not a release of onnxruntime"):
        parse_version(text)
