"""Check that this machine computes what the exporter proved: python check.py

Needs numpy and onnxruntime only. Compares every part of model.onnx with the one that was exported, the outputs for the
golden inputs, and the integers of every quantized value inside the network. Exit code 0: everything agrees; 1: it does
not, and the first layer that differs is named; 2: a file is missing or cannot be read.

Must not know: the project, which it cannot import where it runs.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["DTYPES", "FORMAT", "Difference", "compared", "main", "parts_of", "read_tensor", "sampled", "save_arrays"]

FORMAT = 1
"""Version of golden/values.json."""

SAMPLED = 4096
"""Integers of each value that the golden set holds, besides the checksum of all."""

DTYPES = {1: "<f4", 2: "u1", 3: "i1", 5: "<i2", 6: "<i4", 7: "<i8", 9: "?", 10: "<f2", 11: "<f8"}
"""Types of ONNX tensors by their number."""

GRAPH, NODE, INITIALIZER = 7, 1, 5
NODE_OUTPUT = 2
DIMS, DATA_TYPE, NAME, RAW_DATA = 1, 2, 8, 9
"""Fields of ModelProto, GraphProto, NodeProto and TensorProto."""

VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
SHOWN = 5


class Unreadable(Exception):
    """A file of the bundle that is missing or malformed."""


class Difference:
    """The difference of one value from the golden one, in code steps."""

    def __init__(self, name: str, differing: int, compared: int, largest: int, reason: str = "") -> None:
        self.name, self.differing, self.compared, self.largest, self.reason = name, differing, compared, largest, reason

    def __bool__(self) -> bool:
        return bool(self.differing or self.reason)

    def __str__(self) -> str:
        if not self.differing:
            return f"{self.name}: {self.reason or 'no difference'}"
        return f"{self.name}: {self.differing:,} of {self.compared:,} compared codes differ, by {self.largest} at most"


# --- protobuf -----------------------------------------------------------------------------------------------------


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, at
        shift += 7


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """Yield number and content of every field of a message: an integer, or bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == VARINT:
            value, at = _varint(data, at)
            yield number, value
            continue
        if kind == BYTES:
            size, at = _varint(data, at)
        else:
            size = {FIXED64: 8, FIXED32: 4}[kind]
        if at + size > len(data):
            raise IndexError
        yield number, data[at : at + size]
        at += size


def read_tensor(data: bytes) -> tuple[str, np.ndarray[Any, Any]]:
    """Return name and content of a serialized TensorProto with raw data."""
    dims: list[int] = []
    name, kind, raw = "", 0, memoryview(b"")
    for number, value in _fields(memoryview(data)):
        if number == DIMS:
            dims += [value] if isinstance(value, int) else _packed(value)
        elif number == DATA_TYPE:
            kind = value
        elif number == NAME:
            name = bytes(value).decode()
        elif number == RAW_DATA:
            raw = value
    return name, np.frombuffer(raw, DTYPES[kind]).reshape(dims)


def _packed(data: memoryview) -> list[int]:
    found, at = [], 0
    while at < len(data):
        value, at = _varint(data, at)
        found.append(value)
    return found


def parts_of(model: bytes) -> dict[str, int]:
    """Return the checksum (CRC-32) of every node, by its first output, and of every constant, by its name."""
    found: dict[str, int] = {}
    for number, graph in _fields(memoryview(model)):
        if number != GRAPH:
            continue
        for kind, part in _fields(graph):
            if kind in (NODE, INITIALIZER):
                wanted = NODE_OUTPUT if kind == NODE else NAME
                name = next((bytes(value).decode() for field, value in _fields(part) if field == wanted), "")
                found[name] = zlib.crc32(part)
    return found


def save_arrays(path: Path, arrays: Mapping[str, np.ndarray[Any, Any]]) -> None:
    """Write an .npz file; names may be any, and the bytes depend on the arrays alone."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                np.lib.format.write_array(stream, np.ascontiguousarray(array), allow_pickle=False)


# --- comparison ---------------------------------------------------------------------------------------------------


def sampled(codes: np.ndarray[Any, Any]) -> tuple[np.ndarray[Any, Any], int]:
    """Return some codes of a value, [at most SAMPLED], and their distance in the flattened value."""
    stride = max(1, -(-codes.size // SAMPLED))
    while stride > 1 and np.gcd(stride, codes.size) > 1:
        stride += 1  # or else whole rows would never be looked at
    return np.ascontiguousarray(codes).reshape(-1)[::stride], stride


def compared(value: Mapping[str, Any], golden: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> Difference:
    """Return the difference of a value.

    value: its entry in values.json; golden: its codes, as `sampled` returns them; found: all its codes.
    """
    name = f"{value['layer']} ({value['name']})"
    if list(found.shape) != value["shape"] or found.dtype != golden.dtype:
        form = f"{found.dtype} {list(found.shape)} instead of {golden.dtype} {value['shape']}"
        return Difference(name, 0, 0, 0, f"it is {form}")
    flat = np.ascontiguousarray(found).reshape(-1)
    steps = np.abs(flat[:: value["stride"]].astype(np.int64) - golden.astype(np.int64))
    differing = int(np.count_nonzero(steps))
    if not differing and zlib.crc32(flat.tobytes()) != value["crc32"]:
        return Difference(name, 0, len(golden), 0, "codes differ that the golden set does not hold")
    return Difference(name, differing, len(golden), int(steps.max(initial=0)))


def _output_error(golden: np.ndarray[Any, Any], found: np.ndarray[Any, Any]) -> float:
    """Return the largest difference of two outputs; infinite where shapes or what is finite differ."""
    if golden.shape != found.shape or golden.dtype != found.dtype:
        return float("inf")
    if golden.tobytes() == found.tobytes():
        return 0.0
    ours, theirs = golden.astype(np.float64), found.astype(np.float64)
    same = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
    with np.errstate(invalid="ignore"):
        largest = np.abs(ours - theirs)[~same].max(initial=0.0)
    return float("inf") if np.isnan(largest) else float(largest)


# --- the bundle ---------------------------------------------------------------------------------------------------


class _Bundle:
    """The files that the check reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = self._bytes("model.onnx")
        self.values = json.loads(self._bytes("golden/values.json"))
        if self.values.get("format") != FORMAT:
            raise Unreadable(f"golden/values.json has format {self.values.get('format')!r}, not {FORMAT}")
        with np.load(folder / "golden/codes.npz", allow_pickle=False) as codes:
            self.codes = dict(codes)
        self.inputs, self.outputs = (self._tensors(kind) for kind in ("input", "output"))

    def _bytes(self, name: str) -> bytes:
        return (self.folder / name).read_bytes()

    def _tensors(self, kind: str) -> dict[str, np.ndarray[Any, Any]]:
        paths = sorted((self.folder / "golden/test_data_set_0").glob(f"{kind}_*.pb"), key=lambda p: (len(p.name), p))
        return dict(read_tensor(path.read_bytes()) for path in paths)

    @property
    def probed(self) -> bytes:
        """The model with every quantized value as a further output: protobuf merges concatenated messages."""
        return self.model + self._bytes("golden/probes.pb")

    def changed_parts(self) -> list[str]:
        """Return the names of the parts of the model that are not as they were exported."""
        expected, found = self.values["parts"], parts_of(self.model)
        return [name for name in {**expected, **found} if expected.get(name) != found.get(name)]

    def run(self, threads: int) -> dict[str, np.ndarray[Any, Any]]:
        """Return outputs and quantized values for the golden inputs, by name."""
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        options.use_deterministic_compute = True
        for key, value in self.values["session"].items():
            options.add_session_config_entry(key, value)
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(self.folder))
        session = ort.InferenceSession(self.probed, options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, self.inputs), strict=True))


def _check(bundle: _Bundle, found: Mapping[str, np.ndarray[Any, Any]]) -> bool:
    """Print what agrees and what does not; return whether everything does."""
    changed = bundle.changed_parts()
    _say(not changed, "model.onnx", f"all {len(bundle.values['parts']):,} parts as exported" if not changed else
         f"{len(changed):,} part{'s' * (len(changed) > 1)} changed after the export: {_some(changed)}")  # fmt: skip
    errors = {o["name"]: _output_error(bundle.outputs[o["name"]], found[o["name"]]) for o in bundle.values["outputs"]}
    beyond = [o for o in bundle.values["outputs"] if not errors[o["name"]] <= o["tolerance"]]
    for output in beyond:
        _say(False, "output", f"{output['name']} differs by {errors[output['name']]:.3g}, the tolerance is "
             f"{output['tolerance']:g}")  # fmt: skip
    if not beyond:
        worst = max(errors.values(), default=0.0)
        _say(True, "outputs", f"{'identical' if not worst else f'within their tolerances, by {worst:.3g} at most'}")
    entries = bundle.values["values"]
    differences = [compared(value, bundle.codes[value["name"]], found[value["name"]]) for value in entries]
    exact = [d for d, value in zip(differences, entries, strict=True) if d and value["exact"]]
    loose = [d for d, value in zip(differences, entries, strict=True) if d and not value["exact"]]
    count = sum(int(np.prod(value["shape"])) for value in entries)
    if exact:
        _say(False, "integers", f"{len(exact)} of {len(entries)} quantized values differ; the first is {exact[0]}")
        for difference in exact[1:SHOWN]:
            print(f"{'':14}then {difference}")
    else:
        agreeing = f"{len(entries) - len(loose)} of {len(entries)} quantized values identical, {count:,} integers"
        _say(True, "integers", agreeing)
    if loose:
        print(f"{'':14}after float operators, where rare codes may differ: {loose[0]}")
    return not (changed or beyond or exact)


def _say(good: bool, what: str, text: str) -> None:
    print(f"{'ok  ' if good else 'FAIL'} {what:9} {text}")


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")


def main(arguments: Sequence[str] | None = None) -> int:
    """Check the bundle in which this file lies; return the exit code."""
    parser = argparse.ArgumentParser(description="Check that this machine computes what the exporter proved.")
    parser.add_argument("--bundle", type=Path, default=Path(__file__).resolve().parent, help="folder of the bundle")
    parser.add_argument("--threads", type=int, default=1, help="threads of onnxruntime")
    parser.add_argument("--dump", type=Path, help="write outputs and quantized values to this .npz file")
    parser.add_argument("--write-probed", type=Path, help="write the model with every quantized value as an output")
    given = parser.parse_args(arguments)
    try:
        bundle = _Bundle(given.bundle)
        if given.write_probed:
            given.write_probed.write_bytes(bundle.probed)
        import onnxruntime as ort

        print(
            f"onnxruntime {ort.__version__} on {platform.machine()}; the file needs {bundle.values['min_onnxruntime']}"
        )
        found = bundle.run(given.threads)
        if given.dump:
            save_arrays(given.dump, found)
        return 0 if _check(bundle, found) else 1
    except (OSError, ValueError, KeyError, IndexError, TypeError, ImportError, Unreadable) as error:
        print(f"cannot check {given.bundle}: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except Exception as error:  # of onnxruntime, whose errors have no common base
        print(f"FAIL onnxruntime refuses the model: {str(error).strip()}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
