"""Dumps of a device are compared with the golden codes whatever their names, types and layouts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from calibrators.errors import InputError, UnknownNameError
from exporter.cli import app
from exporter.handover.check import FORMAT, sampled, save_arrays
from exporter.handover.dump import compare_dump

SHAPES = {"conv": (2, 8, 6, 6), "norm": (2, 8, 6, 6), "head": (2, 300)}
SCALE, ZERO = 0.05, 7


@pytest.fixture
def codes() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.integers(0, 256, shape).astype(np.uint8) for name, shape in SHAPES.items()}


@pytest.fixture
def bundle(tmp_path: Path, codes: dict[str, np.ndarray]) -> Path:
    golden = tmp_path / "bundle/golden"
    golden.mkdir(parents=True)
    some = {f"{name}_quantized": sampled(array) for name, array in codes.items()}
    save_arrays(golden / "codes.npz", {name: array for name, (array, _) in some.items()})
    values: list[dict[str, Any]] = [
        {
            "name": f"{name}_quantized", "layer": f"stage.{name}", "kernel": "QLinearConv", "exact": name != "norm",
            "dtype": "uint8", "shape": list(array.shape), "scale": SCALE, "zero_point": ZERO,
            "stride": some[f"{name}_quantized"][1], "crc32": 0,
        }
        for name, array in codes.items()
    ]  # fmt: skip
    (golden / "values.json").write_text(json.dumps({"format": FORMAT, "values": values, "outputs": []}))
    return tmp_path / "bundle"


def forms(codes: dict[str, np.ndarray]) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """The same values as devices dump them."""
    yield "", {f"{name}_quantized": array for name, array in codes.items()}
    yield "", codes
    floats = {f"{name}_dequantized": (array.astype(np.float32) - ZERO) * SCALE for name, array in codes.items()}
    yield "float32", floats
    yield "int8", {name: (array.astype(np.int16) - 128).astype(np.int8) for name, array in codes.items()}
    yield "NHWC", {name: np.moveaxis(array, 1, -1) if array.ndim == 4 else array for name, array in codes.items()}
    yield "reshaped", {name: array.reshape(2, -1, 4) if array.ndim == 4 else array for name, array in codes.items()}


@pytest.mark.parametrize("index", range(6))
def test_every_form_of_a_dump_agrees(index: int, bundle: Path, codes: dict[str, np.ndarray], tmp_path: Path) -> None:
    read_as, arrays = list(forms(codes))[index]
    save_arrays(tmp_path / "dump.npz", {**arrays, "other": np.zeros(3)})
    layers, strangers, _ = compare_dump(bundle, tmp_path / "dump.npz")
    assert [layer.layer for layer in layers] == ["stage.conv", "stage.norm", "stage.head"]
    assert all(layer.differing == layer.largest == 0 for layer in layers)
    assert layers[0].read_as == read_as and strangers == ["other"]


@pytest.mark.parametrize("form", ["codes", "signed", "NHWC", "float32", "npy"])
def test_raw_files_are_understood(form: str, bundle: Path, codes: dict[str, np.ndarray], tmp_path: Path) -> None:
    folder = tmp_path / "dump"
    folder.mkdir()
    for name, array in codes.items():
        stored = {
            "signed": (array.astype(np.int16) - 128).astype(np.int8),
            "NHWC": np.ascontiguousarray(np.moveaxis(array, 1, -1)),
            "float32": (array.astype(np.float32) - ZERO) * np.float32(SCALE),
        }.get(form, array)
        if form == "npy":
            np.save(folder / f"{name}.npy", stored)
        else:
            stored.tofile(folder / f"{name}.bin")
    layers, *_ = compare_dump(bundle, folder)
    assert len(layers) == 3 and not any(layer.differing for layer in layers)


def test_the_first_layer_that_differs_is_named(
    bundle: Path, codes: dict[str, np.ndarray], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    codes["norm"][0, 0, 0, :3] ^= 1  # after float operators, where codes may differ
    codes["head"] = np.clip(codes["head"], 2, 255) - np.uint8(2)
    save_arrays(tmp_path / "dump.npz", codes)
    layers, *_ = compare_dump(bundle, tmp_path / "dump.npz")
    assert [layer.differing for layer in layers][:2] == [0, 3]
    assert layers[2].largest == 2 and -2 <= layers[2].mean < -1.9
    result = CliRunner().invoke(app, ["compare-dump", str(bundle), str(tmp_path / "dump.npz")])
    assert result.exit_code == 1
    assert "first layer that differs is stage.head" in result.stdout
    codes["head"] = codes["head"] + np.uint8(0)
    save_arrays(tmp_path / "dump.npz", {"conv": codes["conv"], "norm": codes["norm"]})
    result = CliRunner().invoke(app, ["compare-dump", str(bundle), str(tmp_path / "dump.npz")])
    assert result.exit_code == 0 and "Not in the dump: 1 of 3 values" in result.stdout


def test_names_of_their_own_are_translated(bundle: Path, codes: dict[str, np.ndarray], tmp_path: Path) -> None:
    save_arrays(tmp_path / "dump.npz", {"t17": codes["conv"]})
    table = tmp_path / "names.csv"
    table.write_text("t17,conv\n")
    layers, *_ = compare_dump(bundle, tmp_path / "dump.npz", table)
    assert [layer.differing for layer in layers] == [0]
    table.write_text("t17,conf\n")
    with pytest.raises(UnknownNameError, match="conf"):
        compare_dump(bundle, tmp_path / "dump.npz", table)
    table.write_text("t17\n")
    with pytest.raises(InputError, match="a row is"):
        compare_dump(bundle, tmp_path / "dump.npz", table)


def test_what_cannot_be_compared_is_refused(bundle: Path, codes: dict[str, np.ndarray], tmp_path: Path) -> None:
    cases = [
        ({"conv": codes["conv"][:1]}, "dump it for the golden inputs"),
        ({"x": codes["conv"]}, "holds none of the 3 values"),
        ({"conv": codes["conv"].astype(np.complex64)}, "dump numbers"),
    ]
    for arrays, message in cases:
        save_arrays(tmp_path / "dump.npz", arrays)
        with pytest.raises(InputError, match=message):
            compare_dump(bundle, tmp_path / "dump.npz")
    (tmp_path / "dump.npz").write_bytes(b"no archive")
    with pytest.raises(InputError, match=r"not a readable \.npz file"):
        compare_dump(bundle, tmp_path / "dump.npz")
    with pytest.raises(InputError, match="does not exist"):
        compare_dump(bundle, tmp_path / "missing.npz")
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw/conv.bin").write_bytes(b"short")
    with pytest.raises(InputError, match="has 5 bytes"):
        compare_dump(bundle, tmp_path / "raw")
    with pytest.raises(InputError, match="does not exist"):
        compare_dump(tmp_path, tmp_path / "raw")
