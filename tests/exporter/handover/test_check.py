"""The check that a bundle carries: it needs numpy and onnxruntime alone, and names the first layer that differs."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from exporter import export
from exporter.handover import check
from exporter.handover.check import compared, main, parts_of, read_tensor, sampled, save_arrays


def written(folder: Path, **settings: Any) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()
    )
    pixels = torch.randint(0, 256, (8, 3, 12, 12), dtype=torch.uint8)
    data = pixels if settings else (pixels / 255 - 0.5) / 0.25
    report = export(model, [data], method="minmax", out=folder, latency_runs=0, parity_samples=8, **settings)
    assert report["verdict"] == "pass"
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("check") / "bundle")


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose model takes bytes and gives codes."""
    return written(tmp_path_factory.mktemp("check") / "raw", input="uint8", mean=0.5, std=0.25, output="codes")


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Path:
    shutil.copytree(exported, tmp_path / "bundle")
    return tmp_path / "bundle"


Edit = Callable[[dict[str, onnx.TensorProto]], None]


def edit(bundle: Path, change: Edit) -> None:
    """Change the constants of the model, by name."""
    model = onnx.load(bundle / "model.onnx")
    change({tensor.name: tensor for tensor in model.graph.initializer})
    (bundle / "model.onnx").write_bytes(model.SerializeToString())


def set_array(tensor: onnx.TensorProto, change: Callable[[np.ndarray], np.ndarray]) -> None:
    array = change(numpy_helper.to_array(tensor).copy())
    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))


def test_an_untouched_bundle_passes(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(exported)]) == 0
    shown = capsys.readouterr().out
    assert "parts as exported" in shown and "outputs   identical" in shown and "quantized values identical" in shown


def one_weight(tensors: dict[str, onnx.TensorProto]) -> None:
    def change(codes: np.ndarray) -> np.ndarray:
        place = np.unravel_index(np.abs(codes.astype(int)).argmax(), codes.shape)
        codes[place] = -codes[place]
        return codes

    set_array(tensors["2.weight_quantized"], change)


def one_scale(tensors: dict[str, onnx.TensorProto]) -> None:
    set_array(tensors["2.weight_scale"], lambda scales: scales * np.float32(1.5))


def swapped_layers(tensors: dict[str, onnx.TensorProto]) -> None:
    ours, theirs = (numpy_helper.to_array(tensors[f"{layer}.weight_quantized"]) for layer in (2, 4))
    set_array(tensors["2.weight_quantized"], lambda _: theirs)
    set_array(tensors["4.weight_quantized"], lambda _: ours)


@pytest.mark.parametrize("ends", ["exported", "raw"])
@pytest.mark.parametrize("change", [one_weight, one_scale, swapped_layers])
def test_a_changed_layer_is_named(
    change: Edit, ends: str, tmp_path: Path, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(request.getfixturevalue(ends), bundle)
    assert main(["--bundle", str(bundle)]) == 0
    edit(bundle, change)
    assert main(["--bundle", str(bundle)]) == 1
    shown = capsys.readouterr().out
    assert "changed after the export: 2." in shown
    assert "the first is 2" in shown and "codes differ, by" in shown


def test_a_runtime_that_computes_otherwise_is_found(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is as exported, but one value comes out one step off."""
    run = check._Bundle.run

    def off_by_one(self: check._Bundle, threads: int) -> dict[str, np.ndarray]:
        found = dict(run(self, threads))
        name = self.values["values"][1]["name"]
        found[name] = found[name].copy()
        found[name].reshape(-1)[0] ^= 1
        return found

    monkeypatch.setattr(check._Bundle, "run", off_by_one)
    assert main(["--bundle", str(bundle)]) == 1
    shown = capsys.readouterr().out
    assert "parts as exported" in shown and "1 of" in shown and "by 1 at most" in shown


def test_what_is_no_bundle_exits_2(bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--bundle", str(tmp_path)]) == 2
    for name, content in (("golden/values.json", b"{}"), ("golden/codes.npz", b"PK"), ("golden/probes.pb", None)):
        whole = (bundle / name).read_bytes()
        (bundle / name).unlink()
        if content is not None:
            (bundle / name).write_bytes(content)
        assert main(["--bundle", str(bundle)]) == 2, name
        (bundle / name).write_bytes(whole)
    assert "cannot check" in capsys.readouterr().err


def test_values_and_a_probed_model_are_written(exported: Path, tmp_path: Path) -> None:
    dump, probed = tmp_path / "values.npz", tmp_path / "probed.onnx"
    assert main(["--bundle", str(exported), "--dump", str(dump), "--write-probed", str(probed)]) == 0
    model = onnx.load(probed)
    values = json.loads((exported / "golden/values.json").read_text())["values"]
    names = {value["name"] for value in values}
    assert names < {output.name for output in model.graph.output}
    with np.load(dump) as arrays:
        assert names < {*arrays}
        assert all(list(arrays[value["name"]].shape) == value["shape"] for value in values)


def test_the_script_imports_numpy_and_onnxruntime_alone(exported: Path) -> None:
    tree = ast.parse((exported / "check.py").read_text())
    imported = {
        name.split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert imported - set(sys.stdlib_module_names) == {"numpy", "onnxruntime"}


@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int8, np.int16, np.int64, np.bool_, np.float16])
@pytest.mark.parametrize("shape", [(), (0, 3), (2, 300)])
def test_tensors_are_read_as_onnx_reads_them(dtype: type, shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    name, found = read_tensor(numpy_helper.from_array(np.asarray(array), "x").SerializeToString())
    assert name == "x" and found.dtype == array.dtype and np.array_equal(found, array)


def test_every_part_has_a_checksum(exported: Path) -> None:
    model = onnx.load(exported / "model.onnx")
    names = [node.output[0] for node in model.graph.node] + [tensor.name for tensor in model.graph.initializer]
    assert sorted(parts_of((exported / "model.onnx").read_bytes())) == sorted(names)


@pytest.mark.parametrize("shape", [(3,), (1, 64, 56, 56), (4, 4096, 2), (2, 3, 4097)])
def test_samples_are_spread_and_any_change_shows(shape: tuple[int, ...]) -> None:
    codes = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    some, stride = sampled(codes)
    assert len(some) <= 4096 and (stride == 1 or np.gcd(stride, codes.size) == 1)
    value = {
        "name": "v",
        "layer": "l",
        "shape": list(shape),
        "stride": stride,
        "crc32": check.zlib.crc32(codes.tobytes()),
    }
    assert not compared(value, some, codes)
    for place in (0, codes.size - 1, codes.size // 2):
        other = codes.copy()
        other.reshape(-1)[place] ^= 128
        assert compared(value, some, other)


def test_archives_hold_any_name_and_the_same_bytes(tmp_path: Path) -> None:
    arrays = {"file": np.arange(3), "a/b": np.eye(2)}
    for name in ("one.npz", "two.npz"):
        save_arrays(tmp_path / name, arrays)
    assert (tmp_path / "one.npz").read_bytes() == (tmp_path / "two.npz").read_bytes()
    with np.load(tmp_path / "one.npz") as found:
        assert {*found} == {*arrays} and np.array_equal(found["a/b"], np.eye(2))
