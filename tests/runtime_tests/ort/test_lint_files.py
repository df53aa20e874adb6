"""Files that are no models, or whose data is not where they say: one finding each, and the command as users call it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest

from calibrators.targets import get_target
from runtime_tests.ort.lint import lint
from tests.support import onnx_models as models

VNNI = get_target("ort-cpu-vnni")


def written(path: Path, *, external: bool = False, edit: Callable[[onnx.ModelProto], object] = lambda _: None) -> Path:
    model = models.residual()
    options: dict[str, Any] = {"save_as_external_data": True, "location": "w.bin", "size_threshold": 0}
    onnx.save(model, path, **(options if external else {}))
    model = onnx.load(path, load_external_data=False)
    edit(model)
    path.write_bytes(model.SerializeToString())
    return path


def empty(path: Path) -> None:
    path.write_bytes(b"")


def text(path: Path) -> None:
    path.write_text("this is not a model\n")


def truncated(path: Path) -> None:
    content = written(path).read_bytes()
    path.write_bytes(content[: len(content) // 2])


def headless(path: Path) -> None:
    """All that is left of a file that was cut after its first fields."""
    path.write_bytes(onnx.ModelProto(ir_version=10, producer_name="x").SerializeToString())


def another_format(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(100))


def no_data(path: Path) -> None:
    written(path, external=True)
    (path.parent / "w.bin").unlink()


def short_data(path: Path) -> None:
    written(path, external=True)
    data = path.parent / "w.bin"
    data.write_bytes(data.read_bytes()[:100])


def data_elsewhere(path: Path) -> None:
    def move(model: onnx.ModelProto) -> None:
        next(e for e in model.graph.initializer[0].external_data if e.key == "location").value = "../w.bin"

    written(path, external=True, edit=move)


def no_number(path: Path) -> None:
    def spell(model: onnx.ModelProto) -> None:
        next(e for e in model.graph.initializer[0].external_data if e.key == "length").value = "many"

    written(path, external=True, edit=spell)


def huge(path: Path) -> None:
    written(path, edit=lambda model: model.graph.initializer[0].dims.append(2**60))


def negative(path: Path) -> None:
    written(path, edit=lambda model: model.graph.initializer[0].dims.append(-3))


def no_type(path: Path) -> None:
    written(path, edit=lambda model: setattr(model.graph.initializer[0], "data_type", 99))


def no_strings(path: Path) -> None:
    written(path, edit=lambda model: setattr(model.graph.initializer[0], "data_type", onnx.TensorProto.STRING))


def no_opset(path: Path) -> None:
    written(path, edit=lambda model: setattr(model.opset_import[0], "version", -3))


def no_text(path: Path) -> None:
    content = written(path, edit=lambda model: setattr(model.graph.node[0], "op_type", "Odd")).read_bytes()
    path.write_bytes(content.replace(b"Odd", b"O\xffd", 1))


def of_another_device(path: Path) -> None:
    def state(model: onnx.ModelProto) -> None:
        model.opset_import.add(domain="com.microsoft", version=1)
        model.graph.node[0].domain, model.graph.node[0].op_type = "com.microsoft", "EPContext"

    written(path, edit=state)


def doubling_functions(path: Path) -> None:
    """Forty functions of two nodes, each of which calls the one before twice."""

    def state(model: onnx.ModelProto) -> None:
        opsets = [model.opset_import[0], model.opset_import.add(domain="own", version=1)]
        for index in range(40):
            name, domain = (f"F{index - 1}", "own") if index else ("Relu", "")
            steps = [onnx.helper.make_node(name, [x], [y], domain=domain) for x, y in (("a", "b"), ("b", "c"))]
            model.functions.append(onnx.helper.make_function("own", f"F{index}", ["a"], ["c"], steps, opsets))
        node = model.graph.node.add()
        node.CopyFrom(onnx.helper.make_node("F39", [model.graph.node[0].output[0]], ["aside"], domain="own"))

    written(path, edit=state)


def no_output_type(path: Path) -> None:
    def state(model: onnx.ModelProto) -> None:
        model.opset_import[0].version = 21
        quantizer = next(node for node in model.graph.node if node.op_type == "QuantizeLinear")
        quantizer.attribute.append(onnx.helper.make_attribute("output_dtype", 99))

    written(path, edit=state)


BROKEN: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "empty": (empty, "unreadable-file", "holds no graph"),
    "text": (text, "unreadable-file", "cannot be read as an ONNX model"),
    "truncated": (truncated, "unreadable-file", "cannot be read as an ONNX model"),
    "headless": (headless, "unreadable-file", "holds no graph"),
    "another format": (another_format, "unreadable-file", "ONNX model"),
    "no data": (no_data, "stored-data", "'w.bin' is missing"),
    "short data": (short_data, "stored-data", "copy the file again"),
    "data elsewhere": (data_elsewhere, "stored-data", "outside the folder"),
    "no number": (no_number, "stored-data", "is no number"),
    "huge": (huge, "stored-data", "bytes, but"),
    "negative": (negative, "stored-data", "negative size"),
    "no type": (no_type, "stored-data", "none of ONNX"),
    "no strings": (no_strings, "stored-data", "strings, but 0 are stored"),
    "no opset": (no_opset, "invalid-model", "domain_version of -3"),
    "no text": (no_text, "unknown-operator", "no such operator"),
    "another device": (of_another_device, "unknown-operator", "no such operator on CPUs"),
    "doubling functions": (doubling_functions, "unreadable-file", "more than any network"),
    "no output type": (no_output_type, "invalid-model", "output_dtype"),
}
"""Faults of a file: the fault, the rule that finds it, and words of its message."""


@pytest.mark.parametrize("name", BROKEN)
def test_a_malformed_file_gets_a_clear_finding(name: str, tmp_path: Path) -> None:
    make, rule, words = BROKEN[name]
    make(tmp_path / "m.onnx")
    findings = lint(tmp_path / "m.onnx", VNNI)
    assert {(finding.rule, finding.severity) for finding in findings} == {(rule, "error")}
    assert words in findings[0].message


@pytest.mark.parametrize("external", [False, True])
def test_the_file_without_the_faults_is_clean(external: bool, tmp_path: Path) -> None:
    assert lint(written(tmp_path / "m.onnx", external=external), VNNI) == []


def test_an_unknown_extension_is_read_as_onnx(tmp_path: Path) -> None:
    assert lint(written(tmp_path / "m.json"), VNNI) == []


def test_values_of_bodies_are_seen_by_the_rules_on_names() -> None:
    """A body may read values of the graph around it, and has to find them there."""
    branch = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["inside"])], "branch", [], [onnx.ValueInfoProto(name="inside")]
    )
    value = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("If", ["c"], ["y"], then_branch=branch, else_branch=branch, name="if")],
        "outer",
        [value("x", 1, [1]), value("c", onnx.TensorProto.BOOL, [])],
        [value("y", 1, [1])],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    assert [finding for finding in lint(model) if finding.rule in ("dangling-value", "duplicate-name")] == []
    model.graph.node[0].attribute[0].g.node[0].input[0] = "gone"
    assert [(found.rule, found.where) for found in lint(model)] == [("dangling-value", "gone")]


def test_the_command_answers_without_torch(tmp_path: Path) -> None:
    program = (
        "import sys; from exporter.cli import app; app(['lint', sys.argv[1]], standalone_mode=False);"
        "print(sorted({'torch', 'onnxscript', 'onnxsim'} & sys.modules.keys()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(written(tmp_path / "n.onnx"))], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
