"""Hostile bundles: manifests, reports and golden tensors of strangers, resealed so that every checksum fits."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from tests.hostile.base import Base, hostile, hostile_each, reseal

VERIFIED = frozenset({1, 2, 3})
VERIFY = ["verify", "bundle", "--quiet"]


# --- the manifest


def _manifest(folder: Path, base: Base, content: str | bytes) -> list[str]:
    path = base.bundle(folder) / "manifest.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return VERIFY


hostile_each(
    "manifest",
    {
        "empty": "",
        "text": "hello",
        "null": "null",
        "a list": "[]",
        "nested 10 000 deep": "[" * 10_000 + "]" * 10_000,
        "nested 100 000 objects": '{"a":' * 100_000 + "1" + "}" * 100_000,
        "NaN": '{"schema": NaN, "files": {}}',
        "a number of 5000 digits": '{"schema": ' + "9" * 5000 + ', "files": {}}',
        "another version": '{"schema": 99, "files": {}}',
        "version of a list": '{"schema": [1], "files": {}}',
        "no files": '{"schema": 1}',
        "files that are a list": '{"schema": 1, "files": []}',
        "files that are numbers": '{"schema": 1, "files": {"model.onnx": 1}}',
        "file outside": '{"schema": 1, "files": {"../../etc/passwd": {}}}',
        "file of the system": '{"schema": 1, "files": {"/etc/passwd": {}}}',
        "file with a zero": '{"schema": 1, "files": {"a\\u0000": {}}}',
        "file that is half a character": '{"schema": 1, "files": {"\\ud800": {}}}',
        "file for the terminal": '{"schema": 1, "files": {"\\u001b[2J": {}}}',
        "bytes that are no text": b"\xff\xfe",
        "forty million brackets": "[" + "[]," * 13_000_000 + "[]]",
        "sizes that are texts": '{"schema": 1, "files": {"model.onnx": {"bytes": "x", "sha256": 3}}}',
    },
    _manifest,
)


def _files(folder: Path, base: Base, change: Callable[[Path], Any]) -> list[str]:
    bundle = base.bundle(folder)
    change(bundle)
    return VERIFY


def _instead(name: str, make: Callable[[Path], Any]) -> Callable[[Path], None]:
    def change(bundle: Path) -> None:
        (bundle / name).unlink()
        make(bundle / name)

    return change


def _sparse(bundle: Path) -> None:
    (bundle / "model.onnx.data").touch()
    os.truncate(bundle / "model.onnx.data", 1 << 40)
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["files"]["model.onnx.data"] = {"bytes": 1 << 40, "sha256": "00" * 32}
    path.write_text(json.dumps(manifest))


hostile_each(
    "files",
    {
        "manifest that is a FIFO": _instead("manifest.json", os.mkfifo),
        "manifest that is a device": _instead("manifest.json", lambda path: path.symlink_to("/dev/zero")),
        "manifest that is a folder": _instead("manifest.json", lambda path: path.mkdir()),
        "manifest that links to itself": _instead("manifest.json", lambda path: path.symlink_to(path)),
        "model that is a FIFO": _instead("model.onnx", os.mkfifo),
        "model that is a link": _instead("model.onnx", lambda path: path.symlink_to("/etc/passwd")),
        "report that is a FIFO": _instead("report.json", os.mkfifo),
        "golden input that is a link": _instead(
            "golden/test_data_set_0/input_0.pb", lambda p: p.symlink_to("/dev/zero")
        ),
        "missing model": lambda bundle: (bundle / "model.onnx").unlink(),
        "missing reference": lambda bundle: (bundle / "golden/reference.pt2").unlink(),
        "missing report": lambda bundle: (bundle / "report.json").unlink(),
        "missing manifest": lambda bundle: (bundle / "manifest.json").unlink(),
        "missing model, resealed": lambda bundle: ((bundle / "model.onnx").unlink(), reseal(bundle)),
        "missing reference, resealed": lambda bundle: ((bundle / "golden/reference.pt2").unlink(), reseal(bundle)),
        "missing report, resealed": lambda bundle: ((bundle / "report.json").unlink(), reseal(bundle)),
        "missing golden output, resealed": lambda bundle: (
            (bundle / "golden/test_data_set_0/output_0.pb").unlink(),
            reseal(bundle),
        ),
        "one more file": lambda bundle: (bundle / "more").write_bytes(b"x"),
        "name that is no text": lambda bundle: (bundle / os.fsdecode(b"\xff")).write_bytes(b"x"),
        "a byte of the model": lambda bundle: (bundle / "model.onnx").write_bytes(
            (bundle / "model.onnx").read_bytes() + b"\x00"
        ),
        "link to a folder": lambda bundle: (bundle / "more").symlink_to("/"),
        "sparse file of a TiB": _sparse,
    },
    _files,
)


# --- the report


def _report(folder: Path, base: Base, change: Callable[[Any], Any]) -> list[str]:
    bundle = base.bundle(folder)
    path = bundle / "report.json"
    report = json.loads(path.read_text())
    changed = change(report)
    report = report if changed is None else changed
    path.write_text(report if isinstance(report, str) else json.dumps(report))
    reseal(bundle)
    return VERIFY


def _at(path: str, value: Any) -> Callable[[Any], None]:
    def change(report: Any) -> None:
        *above, last = path.split(".")
        part = report
        for name in above:
            part = part[int(name)] if name.isdigit() else part[name]
        part[int(last) if last.isdigit() else last] = value

    return change


def _every_number(value: Any) -> Callable[[Any], Any]:
    def visit(part: Any) -> Any:
        if isinstance(part, dict):
            return {key: visit(inner) if key != "schema" else inner for key, inner in part.items()}
        if isinstance(part, list):
            return [visit(inner) for inner in part]
        return value if isinstance(part, (int, float)) and not isinstance(part, bool) else part

    return visit


REPORTS: dict[str, Callable[[Any], Any]] = {
    "empty": lambda report: "",
    "null": lambda report: "null",
    "nested 10 000 deep": lambda report: "[" * 10_000 + "]" * 10_000,
    "a list": lambda report: [],
    "another schema": _at("schema", 99),
    "NaN for every number": _every_number(float("nan")),
    "infinity for every number": _every_number(float("inf")),
    "huge integers for every number": _every_number(10**400),
    "5000 digits for a number": lambda report: json.dumps(report).replace('"samples": 16', f'"samples": {"9" * 5000}'),
    "1e999 for a number": lambda report: json.dumps(report).replace('"tolerance": ', '"tolerance": 1e999, "x": '),
    "gate that is no gate": _at("config.gates", ["rm -rf"]),
    "gates that are numbers": _at("config.gates", [1]),
    "gates that are a text": _at("config.gates", "agreement>=1"),
    "gate on everything": _at("config.gates", [f"{'a.' * 50_000}b>=1"]),
    "threads": _at("config.threads", 10**9),
    "negative threads": _at("config.threads", -1),
    "threads of a truth": _at("config.threads", True),
    "golden that is a number": _at("golden", 3),
    "golden of nobody": _at("golden", [{"name": "x", "tolerance": 1.0, "measured": 0.0, "largest": 1.0}] * 7),
    "config that is a list": _at("config", []),
    "no parity": lambda report: {k: v for k, v in report.items() if k != "parity"},
    "OpenVINO that was never there": lambda report: _at("parity.openvino", report["parity"]["optimized"])(report),
    "layers that are deep": lambda report: json.dumps(report)[:-1] + ', "more": ' + "[" * 5000 + "]" * 5000 + "}",
    "names for the terminal, and a gate": lambda report: (
        _at("model.source", "\x1b]0;owned\x07")(report),
        _at("config.gates", ["agreement>=2"])(report),
        None,
    )[-1],
    "thirty million brackets": lambda report: json.dumps(report)[:-1] + ', "more": [' + "[]," * 10_000_000 + "[]]}",
}
hostile_each("report", REPORTS, _report, codes=VERIFIED)


# --- golden tensors


def _golden(folder: Path, base: Base, given: tuple[str, Callable[[TensorProto], Any]]) -> list[str]:
    bundle = base.bundle(folder)
    path = bundle / "golden/test_data_set_0" / f"{given[0]}_0.pb"
    tensor = onnx.load_tensor(path)
    content = given[1](tensor)
    path.write_bytes(content if isinstance(content, bytes) else tensor.SerializeToString())
    reseal(bundle)
    return VERIFY


def _array(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[TensorProto], None]:
    def apply(tensor: TensorProto) -> None:
        tensor.CopyFrom(
            numpy_helper.from_array(np.ascontiguousarray(change(numpy_helper.to_array(tensor))), tensor.name)
        )

    return apply


def _outside(location: str) -> Callable[[TensorProto], None]:
    def apply(tensor: TensorProto) -> None:
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=location)

    return apply


def _varints(tensor: TensorProto) -> bytes:
    """Fifty million codes of one byte each, which take 4 in memory and more as numbers."""
    made = TensorProto(name=tensor.name, data_type=TensorProto.INT8, dims=[50_000_000])
    size, length = b"", 50_000_000
    while length > 127:
        size, length = size + bytes([length & 127 | 128]), length >> 7
    return made.SerializeToString() + b"\x2a" + size + bytes([length]) + bytes(50_000_000)


INPUTS: dict[str, Callable[[TensorProto], Any]] = {
    "empty": lambda tensor: b"",
    "text": lambda tensor: b"hello",
    "cut off": lambda tensor: tensor.SerializeToString()[:-5],
    "dims of a TiB": lambda tensor: tensor.dims.__setitem__(0, 1 << 40),
    "negative dims": lambda tensor: tensor.dims.__setitem__(0, -1),
    "type that is unknown": lambda tensor: setattr(tensor, "data_type", 99),
    "texts": lambda tensor: tensor.CopyFrom(numpy_helper.from_array(np.array(["a"], object), tensor.name)),
    "data of the system": _outside("/etc/passwd"),
    "data above": _outside("../../../../../etc/passwd"),
    "data in a FIFO": _outside("fifo"),
    "another name": lambda tensor: setattr(tensor, "name", "\x1b[2J"),
    "doubles": _array(lambda x: x.astype(np.float64)),
    "complex": _array(lambda x: x.astype(np.complex64)),
    "halves": _array(lambda x: x.astype(np.float16)),
    "codes in numbers": _varints,
}
hostile_each(
    "golden",
    {
        f"input {name}": ("input", change)
        for name, change in (
            INPUTS
            | {
                "no samples": _array(lambda x: x[:0]),
                "NaN": _array(lambda x: x * np.nan),
                "infinite": _array(lambda x: x + np.inf),
                "another shape": _array(lambda x: x[..., :3]),
                "one more axis": _array(lambda x: x[None]),
                "other values": _array(lambda x: x + 1000),
                "a single number": _array(lambda x: x.reshape(-1)[0]),
            }
        ).items()
    },
    _golden,
    codes=VERIFIED,
)
hostile_each(
    "golden",
    {
        f"output {name}": ("output", change)
        for name, change in (
            INPUTS
            | {
                "NaN": _array(lambda x: x * np.nan),
                "another shape": _array(lambda x: x[..., :1]),
                "another batch": _array(lambda x: x[:1]),
                "one bit": _array(lambda x: x * 2),
                "type of 4 bits": lambda tensor: setattr(tensor, "data_type", TensorProto.FLOAT4E2M1),
                "type of 8 bits": lambda tensor: (
                    setattr(tensor, "data_type", TensorProto.FLOAT8E4M3FN),
                    setattr(tensor, "raw_data", bytes(len(tensor.raw_data) // 4)),
                )[:0],
                "type of 16 bits": lambda tensor: (
                    setattr(tensor, "data_type", TensorProto.BFLOAT16),
                    setattr(tensor, "raw_data", bytes(len(tensor.raw_data) // 2)),
                )[:0],
            }
        ).items()
    },
    _golden,
    codes=VERIFIED,
)


@hostile("golden", "outputs that are missing", codes=VERIFIED)
def _no_outputs(folder: Path, base: Base) -> list[str]:
    bundle = base.bundle(folder)
    (bundle / "golden/test_data_set_1").mkdir()
    (bundle / "golden/test_data_set_1/input_0.pb").write_bytes(
        (bundle / "golden/test_data_set_0/input_0.pb").read_bytes()
    )
    reseal(bundle)
    return VERIFY
