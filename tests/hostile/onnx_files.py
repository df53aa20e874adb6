"""Hostile ONNX files: for `lint`, and as the model of a bundle."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from tests.hostile.base import Base, hostile, hostile_each, reseal

Change = Callable[[onnx.ModelProto], Any]

LINTED = frozenset({1, 2, 3})
"""`lint` exits with 1 after an error in the file."""


def small() -> onnx.ModelProto:
    """x -> Relu -> y."""
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [helper.make_node("Relu", ["x"], ["y"], name="relu")], "g", [value("x", 1, [1, 4])], [value("y", 1, [1, 4])]
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def external(location: str, dims: list[int] | None = None, **entries: object) -> TensorProto:
    tensor = TensorProto(name="w", data_type=1, dims=dims or [4], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **entries}.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def tensor(dims: list[int], kind: int = 1, **fields: Any) -> TensorProto:
    return TensorProto(name="w", dims=dims, data_type=kind, **fields)


def before_output(*made: onnx.NodeProto) -> Change:
    """Nodes between the model and its first output; they read `inner` and write `outer`."""

    def change(model: onnx.ModelProto) -> None:
        name = model.graph.output[0].name
        for node in model.graph.node:
            node.output[:] = ["inner" if output == name else output for output in node.output]
        for node in made:
            renamed = model.graph.node.add()
            renamed.CopyFrom(node)
            renamed.output[:] = [name if output == "outer" else output for output in node.output]

    return change


def with_initializer(tensor: TensorProto) -> Change:
    """A tensor that is added to the output."""
    return lambda model: (
        model.graph.initializer.append(tensor),
        before_output(
            helper.make_node("ReduceMax", ["w"], ["m"], keepdims=0), helper.make_node("Add", ["inner", "m"], ["outer"])
        )(model),
    )


def with_constant(tensor: TensorProto) -> Change:
    return before_output(
        helper.make_node("Constant", [], ["w"], value=tensor), helper.make_node("Add", ["inner", "w"], ["outer"])
    )


def nested(levels: int) -> onnx.NodeProto:
    """If in If; the outermost writes `deep`."""
    value = helper.make_tensor_value_info

    def branch(node: onnx.NodeProto) -> onnx.GraphProto:
        return helper.make_graph([node], "b", [], [value(node.output[0], 1, None)])

    node = helper.make_node("Identity", ["inner"], ["o"])
    for index in range(levels):
        name = "deep" if index == levels - 1 else f"o{index}"
        other = helper.make_node("Identity", ["inner"], ["e"])
        node = helper.make_node("If", ["c"], [name], then_branch=branch(node), else_branch=branch(other))
    return node


def _set(path: str, value: Any) -> Change:
    def change(model: onnx.ModelProto) -> None:
        part: Any = model
        *above, last = path.split(".")
        for name in above:
            part = part[int(name)] if name.isdigit() else getattr(part, name)
        setattr(part, last, value)

    return change


def constant(name: str, array: Any) -> onnx.NodeProto:
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(np.array(array), name))


def sparse(index: int) -> Change:
    def change(model: onnx.ModelProto) -> None:
        entry = model.graph.sparse_initializer.add()
        entry.dims.extend([1, 4])
        entry.values.CopyFrom(numpy_helper.from_array(np.float32([1]), "w"))
        entry.indices.CopyFrom(numpy_helper.from_array(np.int64([index]), "i"))
        before_output(helper.make_node("Add", ["inner", "w"], ["outer"]))(model)

    return change


def recursive(model: onnx.ModelProto) -> None:
    """A function that calls itself."""
    function = helper.make_function(
        "own",
        "F",
        ["a"],
        ["b"],
        [helper.make_node("F", ["a"], ["b"], domain="own")],
        [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)],
    )
    model.functions.append(function)
    model.opset_import.add(domain="own", version=1)
    before_output(helper.make_node("F", ["inner"], ["outer"], domain="own"))(model)


def laughing(model: onnx.ModelProto) -> None:
    """Functions that each call the one before twice: 2**40 nodes when they are inlined."""
    model.opset_import.add(domain="own", version=1)
    for index in range(40):
        inner = [
            helper.make_node(f"F{index - 1}", ["a"], ["c"], domain="own"),
            helper.make_node(f"F{index - 1}", ["c"], ["b"], domain="own"),
        ]
        body = inner if index else [helper.make_node("Relu", ["a"], ["b"])]
        model.functions.append(
            helper.make_function(
                "own", f"F{index}", ["a"], ["b"], body, [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
            )
        )
    before_output(helper.make_node("F39", ["inner"], ["outer"], domain="own"))(model)


ANYWHERE: dict[str, Change] = {
    "cycle": before_output(
        helper.make_node("Add", ["inner", "b"], ["a"]),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Add", ["a", "b"], ["outer"]),
    ),
    "domain that is imported": lambda m: (
        m.opset_import.add(domain="evil.example", version=1),
        before_output(helper.make_node("Op", ["inner"], ["outer"], domain="evil.example"))(m),
    ),
    "compiled blob": lambda m: (
        m.opset_import.add(domain="com.microsoft", version=1),
        before_output(
            helper.make_node(
                "EPContext", ["inner"], ["outer"], domain="com.microsoft", embed_mode=0, ep_cache_context="/etc/passwd"
            )
        )(m),
    ),
    "functions that double": laughing,
    "opset of the future": _set("opset_import.0.version", 9999),
    "target that is unknown": lambda m: (
        [m.metadata_props.remove(each) for each in [*m.metadata_props] if each.key == "intact.target"],
        m.metadata_props.add(key="intact.target", value="\x1b[2J../../x"),
    ),
}
"""For a file alone, and for the model of a bundle."""

FAULTY: dict[str, Change] = {
    "reads itself": before_output(
        helper.make_node("Add", ["again", "inner"], ["again"]), helper.make_node("Relu", ["again"], ["outer"])
    ),
    "missing value": before_output(helper.make_node("Add", ["inner", "nowhere"], ["outer"])),
    "output twice": before_output(
        helper.make_node("Relu", ["inner"], ["inner"]), helper.make_node("Relu", ["inner"], ["outer"])
    ),
    "outputs of one name": lambda m: m.graph.output.append(m.graph.output[0]),
    "input twice": lambda m: m.graph.input.append(m.graph.input[0]),
    "no names": lambda m: (m.graph.node[0].ClearField("output"), m.graph.node[0].ClearField("input")),
    "output without a name": _set("graph.output.0.name", ""),
    "unknown operator": before_output(helper.make_node("NoSuch", ["inner"], ["outer"])),
    "unknown domain": before_output(helper.make_node("Op", ["inner"], ["outer"], domain="evil.example")),
    "opset of the past": _set("opset_import.0.version", -5),
    "opset beyond 32 bits": _set("opset_import.0.version", 1 << 40),
    "no opset": lambda m: m.ClearField("opset_import"),
    "IR of the future": _set("ir_version", 1 << 40),
    "no graph": lambda m: m.ClearField("graph"),
    "operator without inputs": before_output(helper.make_node("Conv", [], ["outer"])),
    "dims of a TiB": with_initializer(tensor([1 << 19, 1 << 19], raw_data=bytes(16))),
    "dims that overflow": with_initializer(tensor([1 << 62, 1 << 62], raw_data=bytes(16))),
    "negative dims": with_initializer(tensor([-4], raw_data=bytes(16))),
    "type that is unknown": with_initializer(tensor([4], 99, raw_data=bytes(16))),
    "type that is not stated": with_initializer(tensor([4], 0, raw_data=bytes(16))),
    "texts": with_initializer(tensor([1], 8, string_data=[b"\xff"])),
    "constant of a TiB": with_constant(tensor([1 << 38], raw_data=bytes(16))),
    "constant of another size": with_constant(tensor([5], raw_data=bytes(16))),
    "sparse beyond its shape": sparse(1 << 40),
    "sparse before its shape": sparse(-1),
    "input of huge dims": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", 1 << 62),
    "input of negative dims": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[1], "dim_value", -3),
    "function that calls itself": recursive,
    "attribute of another type": before_output(helper.make_node("Flatten", ["inner"], ["outer"], axis=1.5)),
    "attribute twice": lambda m: m.graph.node[0].attribute.extend([helper.make_attribute("a", 1)] * 2),
    "attribute without a type": lambda m: m.graph.node[0].attribute.add(name="a"),
    "attribute that refers": lambda m: m.graph.node[0].attribute.add(name="a", ref_attr_name="b", type=1),
    "scale of zero": before_output(
        constant("s", np.float32(0)),
        constant("k", np.uint8(0)),
        helper.make_node("QuantizeLinear", ["inner", "s", "k"], ["outer"]),
    ),
    "scale that is not a number": before_output(
        constant("s", np.float32(np.nan)),
        constant("k", np.uint8(0)),
        helper.make_node("QuantizeLinear", ["inner", "s", "k"], ["outer"]),
    ),
    "shapes that contradict": lambda m: setattr(m.graph.output[0].type.tensor_type.shape.dim[1], "dim_value", 5),
    "nested ten deep, a name missing": lambda m: (
        m.graph.initializer.append(numpy_helper.from_array(np.array(True), "c")),
        before_output(nested(10), helper.make_node("Add", ["deep", "nowhere"], ["outer"]))(m),
    ),
}

EXTERNAL: dict[str, TensorProto] = {
    "of the system": external("/etc/passwd"),
    "above": external("../../../../../../etc/passwd"),
    "by a link": external("link"),
    "that is a FIFO": external("fifo"),
    "that is a folder": external("."),
    "that is a device": external("/dev/zero"),
    "that is missing": external("nowhere"),
    "without a place": external(""),
    "with a zero in its place": external("a\x00b"),
    "beyond its end": external("data", offset=1 << 40),
    "before its beginning": external("data", offset=-16),
    "that is too long": external("data", [1 << 38], length=1 << 40),
    "that is no number": external("data", offset="x", length="y"),
    "of a long number": external("data", offset="9" * 5000),
    "of another size": external("data", [5]),
}


def _places(folder: Path) -> None:
    (folder / "data").write_bytes(bytes(16))
    (folder / "link").symlink_to("/etc/passwd")
    os.mkfifo(folder / "fifo")


def _lint(folder: Path, base: Base, change: Change) -> list[str]:
    model = small()
    change(model)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return ["lint", "m.onnx"]


def _lint_external(folder: Path, base: Base, given: Change) -> list[str]:
    _places(folder)
    return _lint(folder, base, given)


hostile_each("onnx", ANYWHERE | FAULTY, _lint, codes=LINTED)
NOTHING = with_initializer(tensor([0, 1 << 62], raw_data=b""))  # legal: it has no elements
hostile_each("onnx", {"dims of nothing": NOTHING}, _lint, codes={0, *LINTED})
hostile_each(
    "onnx", {f"data {name}": with_initializer(t) for name, t in EXTERNAL.items()}, _lint_external, codes=LINTED
)
hostile_each(
    "onnx",
    {
        f"constant {name}": with_constant(t)
        for name, t in EXTERNAL.items()
        if name in ("of the system", "above", "that is a FIFO", "by a link")
    },
    _lint_external,
    codes=LINTED,
)


def _lint_bytes(folder: Path, base: Base, make: Callable[[], bytes]) -> list[str]:
    (folder / "m.onnx").write_bytes(make())
    return ["lint", "m.onnx"]


def _field(number: int, content: bytes) -> bytes:
    size, length = b"", len(content)
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return bytes([number << 3 | 2]) + size + bytes([length]) + content


BYTES: dict[str, Callable[[], bytes]] = {
    "empty": lambda: b"",
    "text": lambda: b"hello",
    "cut off": lambda: small().SerializeToString()[:-9],
    "zeros": lambda: bytes(1000),
    "groups in groups": lambda: b"\x0b" * 100_000,
    "graphs in graphs": lambda: _nested_bytes(2000),
    "length beyond the file": lambda: b"\x3a\xff\xff\xff\xff\x0f",
    "two million empty nodes": lambda: _field(7, b"\x0a\x00" * 2_000_000),
    "two million empty initializers": lambda: _field(7, b"\x2a\x00" * 2_000_000),
    "two million empty metadata": lambda: b"\x72\x00" * 2_000_000,
    "two million empty functions": lambda: b"\xca\x01\x00" * 2_000_000,
    "dimensions": lambda: _field(7, _field(5, b"\x08\x01" * 5_000_000)),
    "narrow values": lambda: _field(7, _field(5, _field(5, bytes(50_000_000)))),
    "names that are no text": lambda: _field(7, _field(1, _field(4, b"\xff\xfe")) + _field(12, _field(1, b"\xff"))),
}


def _nested_bytes(levels: int) -> bytes:
    content = b""
    for _ in range(levels):
        content = _field(1, _field(5, _field(6, content)))  # node, attribute, graph
    return _field(7, content)


hostile_each("onnx", BYTES, _lint_bytes, codes=LINTED)
hostile_each(
    "onnx",
    {
        "FIFO": os.mkfifo,
        "device": lambda path: path.symlink_to("/dev/zero"),
        "link to itself": lambda p: p.symlink_to(p),
    },
    lambda folder, base, make: (make(folder / "m.onnx"), ["lint", "m.onnx"])[1],
)


@hostile("onnx", "release of a long number")
def _release(folder: Path, base: Base) -> list[str]:
    return [*_lint(folder, base, lambda m: None), "--min-ort", "9" * 5000 + ".0"]


# --- the model of a bundle


def _bundled(folder: Path, base: Base, change: Change) -> list[str]:
    bundle = base.bundle(folder)
    model = onnx.load(bundle / "model.onnx")
    change(model)
    (bundle / "model.onnx").write_bytes(model.SerializeToString())
    (bundle / "data").write_bytes(bytes(16))
    reseal(bundle)
    return ["verify", "bundle", "--quiet"]


def _aside(*made: onnx.NodeProto) -> Change:
    """Nodes that compute something besides the outputs, and that no runtime may leave out."""
    return before_output(
        *made,
        helper.make_node("ReduceMax", ["aside"], ["m"], keepdims=0),
        constant("nothing", np.float32(0)),
        helper.make_node("Mul", ["m", "nothing"], ["n"]),
        helper.make_node("Add", ["inner", "n"], ["outer"]),
    )


def steps() -> onnx.GraphProto:
    """The body of a loop that goes on."""
    value = helper.make_tensor_value_info
    return helper.make_graph(
        [helper.make_node("Identity", ["c"], ["d"]), helper.make_node("Relu", ["v"], ["u"])],
        "body",
        [value("i", 7, []), value("c", 9, []), value("v", 1, None)],
        [value("d", 9, []), value("u", 1, None)],
    )


MODELS: dict[str, Change] = {
    "constant of 4 GiB": _aside(
        constant("s", np.int64([1 << 30])), helper.make_node("ConstantOfShape", ["s"], ["aside"])
    ),
    "constant of a TiB": _aside(
        constant("s", np.int64([1 << 38])), helper.make_node("ConstantOfShape", ["s"], ["aside"])
    ),
    "expanded": _aside(
        constant("s", np.int64([1 << 16, 1 << 15, 1])),
        helper.make_node("ReduceMax", ["inner"], ["r"], keepdims=0),
        helper.make_node("Expand", ["r", "s"], ["aside"]),
    ),
    "repeated": _aside(
        constant("s", np.int64([1 << 13, 1 << 13])), helper.make_node("Tile", ["inner", "s"], ["aside"])
    ),
    "padded": _aside(
        constant("s", np.int64([0, 0, 1 << 15, 1 << 15])), helper.make_node("Pad", ["inner", "s"], ["aside"])
    ),
    "range": _aside(
        constant("a", np.float32(0)),
        constant("b", np.float32(1e9)),
        constant("c", np.float32(1)),
        helper.make_node("Range", ["a", "b", "c"], ["aside"]),
    ),
    "enlarged": _aside(
        constant("r", np.float32([])),
        constant("f", np.float32([10000, 10000])),
        helper.make_node("Resize", ["inner", "r", "f"], ["aside"]),
    ),
    "loop without end": before_output(
        constant("n", np.int64(2**62)),
        constant("t", True),
        helper.make_node("Loop", ["n", "t", "inner"], ["outer"], body=steps()),
    ),
    "no nodes": lambda m: m.graph.ClearField("node"),
    "no outputs": lambda m: m.graph.ClearField("output"),
    "another input": lambda m: setattr(m.graph.input[0], "name", "other"),
    "input of another type": lambda m: setattr(m.graph.input[0].type.tensor_type, "elem_type", 11),
    "input of a fixed batch": lambda m: setattr(m.graph.input[0].type.tensor_type.shape.dim[0], "dim_value", 3),
    "weights that are missing": lambda m: m.graph.ClearField("initializer"),
    "dims of a TiB": lambda m: m.graph.initializer[0].dims.extend([1 << 40]),
}
hostile_each("model.onnx", ANYWHERE | MODELS, _bundled, codes={1, 2, 3})
hostile_each(
    "model.onnx",
    {
        f"data {name}": with_initializer(EXTERNAL[name])
        for name in (
            "of the system",
            "above",
            "that is a device",
            "beyond its end",
            "that is too long",
            "that is missing",
        )
    },
    _bundled,
)


@hostile("model.onnx", "data in the golden folder's links")
def _link(folder: Path, base: Base) -> list[str]:
    arguments = _bundled(folder, base, with_initializer(external("golden/link")))
    (folder / "bundle/golden/link").symlink_to("/etc/passwd")
    return arguments
