"""Files that take bytes and give codes: between them is the network of the file with float ends, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from calibrators.errors import InputError
from exporter import export
from exporter.handover.check import main as check
from exporter.handover.check import save_arrays
from exporter.handover.dump import compare_dump
from exporter.verify import verify
from runtime_tests.ort.coverage import READS_BYTES
from runtime_tests.ort.worker import session_options
from tests.support.networks import randomize
from tests.support.readme import run_readme

QUICK: dict[str, Any] = {"method": "mse", "latency_runs": 0, "parity_samples": 8, "simplify": False}
IMAGENET: dict[str, Any] = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}


class Padded(nn.Module):
    """A padded convolution first, as in most networks; scores of integers at the end, or a map of them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 1, 1, groups=8)
        self.head, self.out = nn.Linear(8, 5), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = torch.relu(self.body(torch.relu(self.stem(x))))
        return {"scores": self.head(x.mean((2, 3))), "map": self.out(x).flatten(2), "softmax": self.out(x).softmax(1)}


def network() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Padded(), 0).eval()


def pixels(size: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (8, 3, size, size), dtype=torch.uint8, generator=generator)


def normalized(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(IMAGENET[name])[:, None, None] for name in ("mean", "std"))
    return (x / 255.0 - mean) / std


def channels_last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1).contiguous()


def run(bundle: Path, x: Tensor) -> dict[str, np.ndarray]:
    options = session_options(optimized=True, threads=1)
    session = ort.InferenceSession(bundle / "model.onnx", options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, {session.get_inputs()[0].name: x.numpy()}), strict=True))


def operators(bundle: Path) -> list[str]:
    return [node.op_type for node in onnx.load(bundle / "model.onnx").graph.node]


@pytest.fixture(scope="module")
def float_ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("float") / "out"
    assert export(network(), [normalized(pixels())], out=out, **QUICK)["verdict"] == "pass"
    return out


@pytest.fixture(scope="module")
def raw_ends(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Channels last, normalized per channel; two of three outputs are codes."""
    out = tmp_path_factory.mktemp("raw") / "out"
    data, coded = [channels_last(pixels())], ("scores:codes", "map:codes")
    report = export(network(), data, eval_data=data, out=out, input="uint8:nhwc", output=coded, **IMAGENET, **QUICK)
    assert report["verdict"] == "pass"
    assert {entry["status"] for entry in report["holds"]} == {"follows", "proved"}
    return out


@pytest.mark.slow
@pytest.mark.parametrize("given", ["bytes", "floats"])
def test_a_file_that_takes_bytes_computes_the_same_bits(given: str, float_ends: Path, tmp_path: Path) -> None:
    data = [pixels() if given == "bytes" else normalized(pixels())]
    report = export(network(), data, out=tmp_path / "out", input="uint8", **IMAGENET, **QUICK)
    assert report["verdict"] == "pass" and report["parity"]["optimized"]["mismatched"] == 0
    assert report["golden"][0]["tolerance"] == 0
    added = [node for node in report["coverage"]["float_nodes"] if node["op"] in ("Div", "Sub")]
    assert added and all(node["why"] == READS_BYTES for node in added), "nobody is advised to exclude them"
    ours, theirs = run(tmp_path / "out", pixels()), run(float_ends, normalized(pixels()))
    for name, expected in theirs.items():
        assert ours[name].tobytes() == expected.tobytes(), name


def test_what_codes_leave_as_floats_has_the_same_bits(raw_ends: Path, float_ends: Path) -> None:
    ours, theirs = run(raw_ends, channels_last(pixels())), run(float_ends, normalized(pixels()))
    assert ours["softmax"].tobytes() == theirs["softmax"].tobytes()


def test_every_byte_of_every_channel_gets_the_code_of_its_float(raw_ends: Path, float_ends: Path) -> None:
    """All there is to know about the entry: 256 bytes in 3 channels."""
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(1, 3, 16, 16).contiguous()
    codes = []
    for bundle, x in ((raw_ends, channels_last(every)), (float_ends, normalized(every))):
        model = onnx.load(bundle / "model.onnx")
        first = next(node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear")
        model.graph.output.append(onnx.ValueInfoProto(name=first))
        session = ort.InferenceSession(model.SerializeToString(), session_options(optimized=True, threads=1))
        codes.append(session.run([first], {session.get_inputs()[0].name: x.numpy()})[0])
    assert np.array_equal(*codes)


def test_outputs_that_are_codes_stand_for_floats(raw_ends: Path) -> None:
    report = json.loads((raw_ends / "report.json").read_text())
    found, exact = run(raw_ends, channels_last(pixels())), network()(normalized(pixels()))
    ports = {port["name"]: port for port in report["model"]["outputs"]}
    page, manifest = (raw_ends / "README.md").read_text(), json.loads((raw_ends / "manifest.json").read_text())
    assert manifest["outputs"] == report["model"]["outputs"] and manifest["inputs"] == report["model"]["inputs"]
    assert found["softmax"].dtype == np.float32 and "codes" not in ports["softmax"]
    for name in ("scores", "map"):
        assert found[name].dtype == np.uint8
        grid = ports[name]["codes"]
        assert f"zero_point {grid['zero_point']} and scale {grid['scale']!r}" in page
        assert grid["formula"] == "(code - zero_point) * scale"
        values = (found[name].astype(np.float32) - grid["zero_point"]) * np.float32(grid["scale"])
        error = np.abs(values - exact[name].detach().numpy()).max()
        assert error < 8 * grid["scale"]  # of a network with random weights at 8 bits: a few steps
    assert all(output["sqnr_db"] > 20 for output in report["accuracy"]["outputs"] if output.get("sqnr_db"))


def test_a_raw_bundle_is_verified_checked_and_compared(
    raw_ends: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert verify(raw_ends)["verdict"] == "pass"
    dump = tmp_path / "dump.npz"
    assert check(["--bundle", str(raw_ends), "--dump", str(dump)]) == 0
    layers, strangers, absent = compare_dump(raw_ends, dump)
    assert not strangers and not absent and not any(layer.differing for layer in layers)
    assert {"scores", "map"} <= {layer.name for layer in layers}
    with np.load(dump) as arrays:
        board = {**arrays, "map": arrays["map"] + 1}
    save_arrays(dump, board)
    layers, _, _ = compare_dump(raw_ends, dump)
    assert [layer.name for layer in layers if layer.differing] == ["map"]


def test_the_code_of_the_readme_gives_floats(raw_ends: Path) -> None:
    """It feeds the golden input, as nothing is known about images, and dequantizes what is codes."""
    golden = run_readme(raw_ends).splitlines()
    assert golden == ["scores float32 (4, 5)", "map float32 (4, 4, 64)", "softmax float32 (4, 4, 8, 8)"]


@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_bytes_are_the_codes_where_channels_are_normalized_alike(layout: str, tmp_path: Path) -> None:
    """No operator is left between the input and the first kernel but the change of layout."""
    images = tmp_path / "images"
    images.mkdir()
    for index, image in enumerate(channels_last(pixels()).numpy()):
        Image.fromarray(image).save(images / f"{index}.png")
    report = export(network(), str(images), out=tmp_path / "out", input=f"uint8:{layout}", **QUICK)
    assert report["verdict"] == "pass"
    kept = [*(["Transpose"] if layout == "nhwc" else []), "DequantizeLinear"]
    assert operators(tmp_path / "out")[: len(kept)] == kept
    assert {"Cast", "Div", "Sub"}.isdisjoint(operators(tmp_path / "out"))
    expected = network()(pixels() / 255.0)["scores"].detach().numpy()
    given = pixels() if layout == "nchw" else channels_last(pixels())
    assert np.abs(run(tmp_path / "out", given)["scores"] - expected).max() < 0.1 * np.abs(expected).max()


@pytest.mark.slow
def test_height_and_width_stay_free(tmp_path: Path) -> None:
    data, free = [channels_last(pixels())], ("x:2=height", "x:3=width")
    report = export(network(), data, out=tmp_path / "out", input="uint8:nhwc", dynamic=free, **IMAGENET, **QUICK)
    assert report["verdict"] == "pass"
    assert report["model"]["inputs"][0]["shape"] == ["batch", "height", "width", 3]
    assert run(tmp_path / "out", channels_last(pixels(40)))["scores"].shape == (8, 5)


def test_an_output_of_a_float_operator_is_no_codes(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"output 'softmax' cannot be given as codes, because it comes from softmax .*, which is no"
    ):
        export(network(), [normalized(pixels())], out=tmp_path / "out", output="codes", **QUICK)
    assert not (tmp_path / "out").exists()
