"""Compare tensors dumped from a device with the golden codes of a bundle, in code steps, layer by layer.

A dump is an .npz file, or a folder of .npy and raw files (.bin, .raw). Its tensors are codes, or the floats that codes
stand for; raw files may be in the layout NHWC, which is recognized by the fewer differences.

Must not know: graphs, torch, how the device ran the model.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
from pydantic import Field, TypeAdapter, ValidationError

from calibrators.errors import InputError, UnknownNameError, no_file
from exporter.handover.check import FORMAT
from exporter.inputs.arrays import open_arrays
from exporter.reporting.schema import read_json

__all__ = ["DumpedLayer", "compare_dump"]

Array = npt.NDArray[Any]

RAW, NUMPY = (".bin", ".raw"), ".npy"
SUFFIXES = ("_quantized", "_dequantized", "")
"""Endings that the names of a value's codes and floats have in a file."""

LARGEST = 1 << 31
"""Bytes of the largest file that is read."""


@dataclass(frozen=True)
class DumpedLayer:
    """The difference of one dumped value from its golden codes.

    exact:     whether every correct runtime computes these codes.
    compared:  number of codes that the golden set holds; differing: of these.
    largest, mean: largest step, and mean step with sign (found less golden), which tells an offset from noise.
    read_as:   how the tensor was understood, where that is not as the file holds it.
    """

    name: str
    layer: str
    kernel: str
    exact: bool
    compared: int
    differing: int
    largest: int
    mean: float
    read_as: str


@dataclass(frozen=True)
class _Value:
    """The entry of a quantized value in values.json."""

    name: str
    layer: str
    kernel: str
    exact: bool
    dtype: str
    shape: tuple[Annotated[int, Field(ge=0)], ...]
    scale: Annotated[float, Field(gt=0)]
    zero_point: Annotated[int, Field(ge=-(2**15), lt=2**16)]
    stride: Annotated[int, Field(ge=1)]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class _GoldenSet:
    """The part of values.json that is read here."""

    values: tuple[_Value, ...]
    outputs: tuple[dict[str, Any], ...]


def compare_dump(bundle: Path, dump: Path, names: Path | None = None) -> tuple[list[DumpedLayer], list[str], list[str]]:
    """Return the dumped values in order of computation, names that the bundle does not know, and values not dumped.

    names:  CSV table with the columns file (or name in the .npz) and value, for dumps with names of their own.
    raises: InputError for a bundle without golden codes, a dump that cannot be read or that holds none of its values,
            or a tensor of another size.
    """
    values, outputs, golden = _golden(bundle)
    renamed = _table(names) if names else {}
    known = {f"{_site(value.name)}{suffix}": value.name for value in values for suffix in SUFFIXES}
    found: dict[str, tuple[Path, str]] = {}
    strangers = []
    for name, path in _tensors(dump):
        wanted = renamed.get(name, name)
        if wanted in known:
            found[known[wanted]] = path, name
        elif name in renamed:
            raise UnknownNameError("value", wanted, [value.name for value in values])
        elif name not in outputs:
            strangers.append(name)
    if not found:
        raise InputError(
            f"{dump} holds none of the {len(values)} values of {bundle}: {', '.join(strangers[:3]) or 'it is empty'}; "
            f"name them as in golden/values.json, for example {values[0].name!r}, or give a table with --names."
        )
    layers = [
        _compared(value, golden[value.name], _read(*found[value.name], value))
        for value in values
        if value.name in found
    ]
    return layers, strangers, [value.layer for value in values if value.name not in found]


def _site(name: str) -> str:
    return name.removesuffix(SUFFIXES[0])


def _golden(bundle: Path) -> tuple[tuple[_Value, ...], set[str], dict[str, Array]]:
    """Return the entries of values.json in order, the names of outputs, and the golden codes by name."""
    path = bundle / "golden/values.json"
    content = read_json(path)
    version = content.get("format") if isinstance(content, dict) else None
    if version != FORMAT:
        raise InputError(f"{path} has format {version!r}, this version reads {FORMAT}; export again.")
    try:
        golden = TypeAdapter(_GoldenSet).validate_python(content)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputError(f"{path} is malformed: {'.'.join(map(str, first['loc']))}: {first['msg']}.") from error
    with open_arrays(bundle / "golden/codes.npz") as arrays:
        if absent := [value.name for value in golden.values if value.name not in arrays]:
            raise InputError(f"{bundle / 'golden/codes.npz'} holds no {absent[0]!r}; get a fresh copy of the bundle.")
        codes = {value.name: arrays[value.name].all() for value in golden.values}
    for value in golden.values:
        found = codes[value.name]
        if found.shape != (-(-value.size // value.stride),) or str(found.dtype) != value.dtype:
            raise InputError(f"the golden codes of {value.name!r} do not fit it; get a fresh copy of the bundle.")
    return golden.values, {output["name"] for output in golden.outputs}, codes


def _table(path: Path) -> dict[str, str]:
    if not path.is_file():
        raise InputError(f"table of names {no_file(path)}")
    try:
        with path.open(newline="", encoding="utf-8") as stream:
            rows = [[cell.strip() for cell in row] for row in csv.reader(stream) if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a readable CSV table: {error}.") from error
    if wrong := [row for row in rows if len(row) != 2]:
        raise InputError(f"{path} has the row {','.join(wrong[0])!r}; a row is: name in the dump,name of the value.")
    return {Path(ours).stem if ours.endswith((*RAW, NUMPY)) else ours: theirs for ours, theirs in rows}


def _tensors(dump: Path) -> Iterator[tuple[str, Path]]:
    """Yield the name of every tensor, and its file."""
    if dump.is_dir():
        files = (path for path in sorted(dump.iterdir()) if path.suffix in (*RAW, NUMPY) and path.is_file())
        yield from ((path.stem, path) for path in files)
        return
    if not dump.is_file():
        raise InputError(f"dump {no_file(dump)}")
    with open_arrays(dump) as arrays:
        names = list(arrays)
    yield from ((name, dump) for name in names)


def _read(path: Path, name: str, value: _Value) -> Array:
    if path.suffix in RAW:
        return _raw(path, value)
    with open_arrays(path) as arrays:
        rows = arrays[name]
        if rows.dtype.kind not in "iufb":
            raise InputError(f"{name} in {path} holds {rows.dtype}; dump numbers.")
        _check_size(value, rows.shape)
        return rows.all()


def _check_size(value: _Value, shape: Sequence[int]) -> None:
    if math.prod(shape) != value.size:
        raise InputError(
            f"the dumped {value.name} is {list(shape)}, but the golden value is {list(value.shape)}; dump it for the "
            "golden inputs, all samples."
        )


def _raw(path: Path, value: _Value) -> Array:
    """Read a file without a header; its size tells codes of one byte from floats."""
    size, count = path.stat().st_size, value.size
    kinds = {count: "u1", 2 * count: "<i2" if value.dtype == "int16" else "<f2", 4 * count: "<f4"}
    if size > LARGEST or size not in kinds:
        raise InputError(
            f"{path} has {size:,} bytes, but {value.name} is {value.shape}: {count:,} bytes as codes, "
            f"{4 * count:,} as float32. Dump the value for the golden inputs, all samples."
        )
    return np.fromfile(path, kinds[size])


def _compared(value: _Value, golden: Array, found: Array) -> DumpedLayer:
    """Compare a value in the layout that agrees best."""
    readings = [(found.dtype, found)]
    if found.dtype == np.uint8 and found.ndim == 1:  # a raw file, which does not tell signed codes
        readings.append((np.dtype("i1"), found.view("i1")))
    candidates = [
        (kind, layout, _steps(value, golden, codes))
        for kind, tensor in readings
        for layout, codes in _layouts(value, tensor)
    ]
    kind, layout, steps = min(candidates, key=lambda each: np.count_nonzero(each[2]))
    kinds = [str(kind)] * (str(kind) != value.dtype) + [layout] * bool(layout)
    return DumpedLayer(
        value.name,
        value.layer,
        value.kernel,
        value.exact,
        len(steps),
        int(np.count_nonzero(steps)),
        int(np.abs(steps).max(initial=0)),
        float(steps.mean()) if len(steps) else 0.0,
        ", ".join(kinds),
    )


def _layouts(value: _Value, found: Array) -> Iterator[tuple[str, Array]]:
    """Yield the tensor as it is and, if it may have its channels last, transposed."""
    shape = list(value.shape)
    last = [shape[0], *shape[2:], shape[1]] if len(shape) > 2 else shape
    if list(found.shape) == shape or found.ndim == 1 or len(shape) < 3:
        yield "", found.reshape(shape)
    if len(shape) > 2 and (list(found.shape) == last or found.ndim == 1):
        yield "NHWC", np.moveaxis(found.reshape(last), -1, 1)
    if list(found.shape) not in (shape, last) and found.ndim != 1 and len(shape) > 2:
        yield "reshaped", found.reshape(shape)


def _steps(value: _Value, golden: Array, found: Array) -> npt.NDArray[np.int64]:
    """Return how many codes the dumped value lies above each golden code."""
    some = np.ascontiguousarray(found).reshape(-1)[:: value.stride]
    if some.dtype.kind == "f":
        codes = np.nan_to_num(some.astype(np.float64) / value.scale, posinf=2.0**31, neginf=-(2.0**31))
        steps: npt.NDArray[np.int64] = (np.rint(codes) + value.zero_point - golden).astype(np.int64)
        return steps
    if golden.dtype.kind == "u" and some.dtype == np.int8:
        some = some.astype(np.int16) + 128  # the same codes in a signed container
    difference: npt.NDArray[np.int64] = some.astype(np.int64) - golden.astype(np.int64)
    return difference
