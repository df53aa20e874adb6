"""Resizes of odd sizes have the same meaning in torch and in the file, with and without antialiasing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from exporter import capture
from exporter.emission.build_model import emit_float
from runtime_tests.ort.sessions import session

SMOOTH = ("bilinear", "bicubic")
RESIZES: dict[str, dict[str, Any]] = {
    f"{mode} {how} {antialias}": {"mode": mode, "antialias": antialias}
    | ({"scale_factor": how} if isinstance(how, float) else {"size": how})
    for mode in (*SMOOTH, "nearest", "nearest-exact")
    for how in (1.5, 0.5, 0.7, (5, 5), (13, 14), (1, 1))
    for antialias in ((False, True) if mode in SMOOTH else (False,))
}
FLOAT_ERROR = 1e-5
"""Tens of roundings of float32 values of magnitude 1: sums over the window of a filter."""


class Resizes(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        lines = F.interpolate(x.flatten(2), scale_factor=1.3, mode="linear")
        cubes = F.interpolate(x[:, :, None], size=(2, 5, 7), mode="trilinear")
        return *(F.interpolate(x, **how) for how in RESIZES.values()), lines, cubes


@pytest.mark.filterwarnings("ignore:The default behavior for interpolate")
def test_the_file_computes_what_torch_computes(tmp_path: Path) -> None:
    x = torch.randn(2, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    emit_float(capture(Resizes().eval(), x), tmp_path / "m.onnx")
    found = session(tmp_path / "m.onnx").run(None, {"x": x.numpy()})
    wanted = Resizes()(x)
    far = {
        name: float((y - torch.from_numpy(z)).abs().max()) if y.shape == z.shape else (y.shape, z.shape)
        for name, y, z in zip([*RESIZES, "linear", "trilinear"], wanted, found, strict=True)
    }
    assert {name: error for name, error in far.items() if not isinstance(error, float) or error > FLOAT_ERROR} == {}
