"""LiteRT files: the reference kernels compute every code of the reference in their arithmetic."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from calibrators.grid import kernel_tables
from calibrators.grid.kernel_tables import CodeGrid
from calibrators.grid.processors import FAMILIES
from exporter import export
from exporter.frontend.reference import load_reference
from exporter.verify import REFERENCE, verify
from runtime_tests.runtimes import tflite
from runtime_tests.tflite.builder import Builder, Grid, Value
from tests.support.elsewhere import available
from tests.support.networks import build, randomize
from tests.support.stress import SIDE, grids_of, images_of, network_of

pytestmark = pytest.mark.runtimes

FAMILY = FAMILIES["tflite"]
Array = NDArray[Any]


@pytest.mark.parametrize(
    "network",
    [
        *("residual", "pooled", "mobilenetv3", "detector"),
        *(
            pytest.param(each, marks=pytest.mark.slow)
            for each in ("shufflenet", "efficientnet", "mobilenetv2", "convnext")
        ),
    ],
)
def test_every_code_is_that_of_the_reference(network: str, tmp_path: Path) -> None:
    available("tflite")
    torch.manual_seed(0)
    model, inputs = network_of(network)
    report = export(model, [inputs], target="tflite", method="minmax", latency_runs=0, out=tmp_path / "out")
    assert report["verdict"] == "pass"
    found = next(each for each in report["proved_on"] if each["runtime"] == "tflite")
    assert found["kernel_values"] > 10_000 and found["kernel_mismatched"] == 0 and found["violations"] == 0
    assert {(each["processor"], each["status"]) for each in report["holds"]} >= {("tflite", "proved")}
    assert (tmp_path / "out" / "model.tflite").read_bytes()[4:8] == b"TFL3"


class Images(nn.Module):
    """Operators on images, each an output of its own: on codes, or on floats."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.deep = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=8)
        self.wide, self.rows = nn.Conv2d(8, 4, (1, 3), dilation=(1, 2), padding=(0, 2)), nn.Conv1d(8, 4, 3, padding=1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.stem(x)
        halves = x.chunk(2, 1)
        return (
            self.deep(x),
            self.wide(x),
            self.rows(x.flatten(2)),
            functional.max_pool2d(x, 3, 2, padding=1) + functional.avg_pool2d(x, 2),
            functional.avg_pool2d(x, 3, 1, padding=1, count_include_pad=False),
            functional.avg_pool2d(x, 3, 2, padding=1),
            functional.interpolate(x, scale_factor=2.0),
            functional.interpolate(x, size=(5, 7), mode="bilinear"),
            functional.pixel_shuffle(x, 2),
            torch.cat([halves[1], halves[0]], 1)[:, 1:7, ::2].transpose(1, 3),
            functional.pad(x, (1, 0, 2, 1)).amax((2, 3)),
            functional.leaky_relu(x, 0.1),
            x.clamp(-0.3, 0.4) * torch.sigmoid(x),
        )


class Sequences(nn.Module):
    """Operators on sequences, each an output of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 6)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.first(x)
        y = self.norm(x)
        heads = x.unflatten(2, (2, 4)).transpose(1, 2)
        return (
            self.last(functional.gelu(y)),
            self.last(functional.gelu(x, approximate="tanh")),
            (heads @ heads.transpose(2, 3)).softmax(1) + 0.25,
            y - 2 * x,
            1 - torch.tanh(x),
            torch.exp(-x.abs()),
            torch.rsqrt(x * x + 1) / 3,
            torch.sqrt(y * y + 1).mean((1, 2)),
        )


@pytest.mark.parametrize(
    ("model", "shape"), [(Images(), (3, 8, 8)), (Sequences(), (5, 6))], ids=["images", "sequences"]
)
def test_every_operator_computes_what_the_program_does(
    model: nn.Module, shape: tuple[int, ...], tmp_path: Path
) -> None:
    available("tflite")
    x = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    report = export(randomize(model), [x], target="tflite", method="minmax", latency_runs=0, out=tmp_path / "out")
    found = next(each for each in report["proved_on"] if each["runtime"] == "tflite")
    assert report["verdict"] == "pass"
    assert "refused" not in found and found["kernel_mismatched"] == 0 and found["violations"] == 0


BYTES = {"input": "uint8", "mean": [0.4, 0.5, 0.3]}


@pytest.mark.parametrize(
    ("network", "settings"),
    [
        pytest.param("encoder", {}, id="indices"),
        pytest.param("residual", {"input": "uint8"}, id="codes"),
        pytest.param("residual", BYTES | {"std": [0.2, 0.3, 0.25]}, id="bytes", marks=pytest.mark.slow),
    ],
)
def test_inputs_may_be_integers(network: str, settings: dict[str, Any], tmp_path: Path) -> None:
    available("tflite")
    model, inputs = network_of(network)
    if settings:
        images = torch.randint(0, 256, inputs[0].shape, generator=torch.Generator().manual_seed(0)) / 255
        mean, std = (torch.tensor(settings.get(name, [ordinary])) for name, ordinary in (("mean", 0.0), ("std", 1.0)))
        inputs = ((images - mean.reshape(-1, 1, 1)) / std.reshape(-1, 1, 1),)
    options = {"target": "tflite", "method": "minmax", "latency_runs": 0, **settings}
    report = export(model, [inputs], out=tmp_path / "out", **options)
    found = next(each for each in report["proved_on"] if each["runtime"] == "tflite")
    assert report["verdict"] == "pass" and found["kernel_values"] > 5000
    assert found["kernel_mismatched"] == found["float_mismatched"] == 0 and found["outputs_identical"]


def test_verify_executes_the_file_of_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    available("tflite")
    model, x = build("mlp")
    outs = tmp_path / "one", tmp_path / "other"
    for out, scale in zip(outs, (1.0, 1.5), strict=True):
        export(model, [x * scale], target="tflite", method="minmax", latency_runs=0, out=out)
    program = load_reference(outs[0] / REFERENCE)
    assert tflite.RUNTIME.lower(program, tmp_path / "again.tflite") == ()
    assert (tmp_path / "again.tflite").read_bytes() == (outs[0] / "model.tflite").read_bytes()
    first = verify(outs[0], on=["tflite"])
    assert first["verdict"] == "pass" and [each["runtime"] for each in first["proved_on"]] == ["ort", "tflite"]
    shutil.copyfile(outs[1] / "model.tflite", outs[0] / "model.tflite")
    module = importlib.import_module("exporter.verify")
    monkeypatch.setattr(module, "verify_manifest", lambda folder: None)  # which would name the file
    assert verify(outs[0], on=["tflite"])["verdict"] == "fail"
    (outs[0] / "model.tflite").unlink()
    assert "cannot be read" in verify(outs[0], on=["tflite"])["proved_on"][1]["refused"]


def run(builder: Builder, outputs: list[Value], inputs: list[Array]) -> list[Array]:
    """Return what the reference kernels compute of int8 codes."""
    builder.draft.outputs += [each.tensor for each in outputs]
    worker = tflite._started()
    builder.draft.save(worker.folder, "test")
    worker.ask({"draft": "draft.json", "file": "model.tflite"})
    worker.ask({"load": "model.tflite", "probes": []})
    worker.run_batch(inputs)
    return worker.outputs(len(outputs))


def grid(x: CodeGrid) -> Grid:
    return Grid(x.scale, x.zero_point)


@pytest.mark.parametrize("kernel", ["add", "mul", "mean"])
def test_kernels_compute_the_formulas_of_the_family(kernel: str) -> None:
    available("tflite")
    grids, images = grids_of(kernel), images_of()
    codes = np.arange(-128, 128, dtype=np.int8)
    every_pair = [np.broadcast_to(x, (256, 256)).copy() for x in (codes[:, None], codes[None])]
    outputs, expected, inputs, builder = [], [], [], Builder()
    for a, b, y in grids:
        if kernel == "mean":
            held = builder.input("x", images.shape, "int8", grid(a).parameters)
            axes = builder.plain("axes", [1, 2])
            options = ("ReducerOptions", {"keepDims": True})
            outputs.append(builder.call("MEAN", [held, axes], (*images.shape[:2], 1, 1), grid(y), options))
            inputs.append(images.transpose(0, 2, 3, 1))
            counted = CodeGrid(a.scale, a.zero_point, -128, 127, -128, SIDE * SIDE)
            sums = images.sum((2, 3), dtype=np.int32)
            expected.append(kernel_tables.mean(sums, counted, y, FAMILY.mean))
            continue
        held, other = (builder.input("x", (256, 256), "int8", grid(x).parameters) for x in (a, b))
        kind = {"add": "AddOptions", "mul": "MulOptions"}[kernel]
        outputs.append(builder.call(kernel.upper(), [held, other], (256, 256), grid(y), (kind, {})))
        inputs += every_pair
        function, arithmetic = getattr(kernel_tables, kernel), getattr(FAMILY, kernel)
        expected.append(function(codes[:, None].astype(np.float32), codes.astype(np.float32), a, b, y, arithmetic))
    for index, (found, wanted) in enumerate(zip(run(builder, outputs, inputs), expected, strict=True)):
        assert int((found.reshape(wanted.shape) != wanted).sum()) == 0, index
