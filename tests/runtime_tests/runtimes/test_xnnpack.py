"""Programs for XNNPACK in ExecuTorch: every code of every kernel is that of the reference."""

from __future__ import annotations

import importlib
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.ao.quantization.fx._decomposed
from torch import Tensor, nn

from calibrators.grid import kernel_tables
from calibrators.grid.kernel_tables import CodeGrid
from calibrators.grid.processors import FAMILIES
from exporter import export
from exporter.frontend.reference import load_reference
from exporter.verify import REFERENCE, verify
from runtime_tests.runtimes import xnnpack
from tests.support.elsewhere import available
from tests.support.networks import build
from tests.support.stress import SIDE, Grids, grids_of, images_of, network_of

pytestmark = pytest.mark.runtimes

pairs = torch.ops.quantized_decomposed
FAMILY = FAMILIES["xnnpack"]


@pytest.mark.parametrize(
    "network",
    [
        *("residual", "pooled", "mobilenetv3", "detector", "unet"),
        pytest.param("mobilenetv2", marks=pytest.mark.slow),
    ],
)
def test_every_code_is_that_of_the_reference(network: str, tmp_path: Path) -> None:
    available("xnnpack")
    torch.manual_seed(0)
    model, inputs = network_of(network)
    report = export(model, [inputs], target="xnnpack", method="minmax", latency_runs=0, out=tmp_path / "out")
    assert report["verdict"] == "pass"
    found = next(each for each in report["proved_on"] if each["runtime"] == "xnnpack")
    assert found["kernel_values"] > 10_000 and found["kernel_mismatched"] == 0 and found["violations"] == 0
    assert {(each["processor"], each["status"]) for each in report["holds"]} >= {("xnnpack", "proved")}
    assert (tmp_path / "out" / "model.pte").stat().st_size > 1000


def test_verify_executes_the_program_of_the_bundle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    available("xnnpack")
    start, started = xnnpack._started, list[None]()
    monkeypatch.setattr(xnnpack, "_started", lambda: started.append(None) or start())
    model, x = build("mlp")
    outs = tmp_path / "one", tmp_path / "other"
    for out, scale in zip(outs, (1.0, 1.5), strict=True):
        export(model, [x * scale], target="xnnpack", method="minmax", latency_runs=0, out=out)
    assert len(started) == len(outs), "the process that lowers a program executes it"
    program = load_reference(outs[0] / REFERENCE)
    assert xnnpack.RUNTIME.lower(program, tmp_path / "again.pte") == ()
    assert (tmp_path / "again.pte").read_bytes() == (outs[0] / "model.pte").read_bytes()
    first = verify(outs[0], on=["xnnpack"])
    assert first["verdict"] == "pass" and [each["runtime"] for each in first["proved_on"]] == ["ort", "xnnpack"]
    shutil.copyfile(outs[1] / "model.pte", outs[0] / "model.pte")
    module = importlib.import_module("exporter.verify")
    monkeypatch.setattr(module, "verify_manifest", lambda folder: None)  # which would name the file
    found = verify(outs[0], on=["xnnpack"])
    assert found["verdict"] == "fail"
    assert not found["proved_on"][1]["outputs_identical"]
    (outs[0] / "model.pte").unlink()
    assert "cannot be read" in verify(outs[0], on=["xnnpack"])["proved_on"][1]["refused"]


class Kernels(nn.Module):
    """A sum or product of all pairs of codes, or a mean, on several grids, each with inputs of its own."""

    def __init__(self, kernel: str, grids: list[Grids]) -> None:
        super().__init__()
        self.kernel, self.grids = kernel, grids

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        each = len(inputs) // len(self.grids)
        return tuple(
            quantized(self.computed(*map(values, inputs[each * index :], grids[:each])), grids[2])
            for index, grids in enumerate(self.grids)
        )

    def computed(self, a: Tensor, b: Tensor | None = None) -> Tensor:
        if b is None:
            return a.mean([2, 3], keepdim=True)
        return a + b if self.kernel == "add" else a * b


def values(codes: Tensor, grid: CodeGrid) -> Tensor:
    return pairs.dequantize_per_tensor.default(codes, grid.scale, grid.zero_point, -128, 127, torch.int8)


def quantized(x: Tensor, grid: CodeGrid) -> Tensor:
    return pairs.quantize_per_tensor.default(x, grid.scale, grid.zero_point, -128, 127, torch.int8)


def expected(kernel: str, grids: list[Grids], images: Tensor) -> list[Any]:
    if kernel == "mean":
        sums = images.sum((2, 3)).numpy().astype(np.float32)
        return [kernel_tables.mean(sums, replace(x, count=SIDE * SIDE), y, FAMILY.mean) for x, _, y in grids]
    codes = grids[0][0].codes()
    function, arithmetic = getattr(kernel_tables, kernel), getattr(FAMILY, kernel)
    return [function(codes[:, None], codes[None], x, z, y, arithmetic) for x, z, y in grids]


@pytest.mark.parametrize("kernel", ["add", "mul", "mean"])
def test_kernels_compute_the_formulas_of_the_family(kernel: str) -> None:
    available("xnnpack")
    grids, images = grids_of(kernel), torch.from_numpy(images_of())
    codes = torch.arange(-128, 128, dtype=torch.int8)
    every_pair = [x.expand(256, 256).reshape(1, 1, 256, 256).contiguous() for x in (codes[:, None], codes[None])]
    once = [images] if kernel == "mean" else every_pair
    inputs = tuple(x.clone() for x in once * len(grids))  # inputs of one memory would become one input
    worker = xnnpack._started()
    torch.export.save(torch.export.export(Kernels(kernel, grids), inputs), worker.folder / "program.pt2")
    found = worker.ask({"program": "program.pt2", "lowered": "kernels.pte"})
    assert found["integer"] == {kernel: len(grids)} and not found["outside"]
    worker.ask({"load": ["kernels.pte"]})
    for index, array in enumerate(inputs):
        np.save(worker.folder / f"in_{index}.npy", array.numpy())
    assert worker.ask({"batch": True}) == {"outputs": len(grids)}
    for index, wanted in enumerate(expected(kernel, grids, images)):
        computed = np.load(worker.folder / f"out_{index}.npy").reshape(wanted.shape)
        assert int((computed != wanted).sum()) == 0, index
