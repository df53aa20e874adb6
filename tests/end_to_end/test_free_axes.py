"""Height, width and length left free: the file is proved at several sizes and runs at others."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrators.errors import InputError, ModelError, UnknownNameError
from exporter import capture, export
from exporter.frontend.axes import FreeAxis
from exporter.frontend.free_sizes import Bounds
from exporter.verify import verify
from tests.support.networks import randomize
from tests.support.readme import run_readme

QUICK: dict[str, Any] = {"method": "mse", "latency_runs": 0, "parity_samples": 8, "simplify": False}


class Pyramid(nn.Module):
    """Resizes to sizes that it computes, pools whatever is left, and reshapes with two free sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 3, 2, 1)
        self.out, self.head = nn.Conv2d(8, 4, 3, 1, 1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        fine = F.relu(self.a(x))
        coarse = self.b(fine)
        mixed = self.out(F.interpolate(coarse, size=fine.shape[-2:], mode="nearest") + fine)
        n, c, h, w = mixed.shape
        return {"scores": self.head(coarse.mean((2, 3))), "map": mixed.flatten(2).mT.reshape(n, h, w, c)}


class Attention(nn.Module):
    """Two inputs whose lengths have to agree; linear layers on [batch, length, features]."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.qkv, self.leave = nn.Linear(16, 32), nn.Linear(32, 96), nn.Linear(32, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        y = F.relu(self.enter(x))
        b, n, c = y.shape
        q, k, v = self.qkv(y).reshape(b, n, 3, 4, 8).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, mask[:, None, None, :])
        found: Tensor = self.leave(mixed.transpose(1, 2).reshape(b, n, c))
        return found


def model(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return randomize(make()).eval()


def images(size: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, size, size, generator=generator) for _ in range(2)]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("free") / "out"
    dims = {"x": {2: torch.export.Dim("height", max=128), 3: torch.export.Dim("width")}}
    report = export(model(Pyramid), images(), out=out, dynamic=dims, eval_data=images(48), **QUICK)
    assert report["verdict"] == "pass", report["gates"]
    return out


def test_the_readme_gives_the_bounds_and_runs(bundle: Path) -> None:
    page = (bundle / "README.md").read_text()
    assert re.search(r"- `height`: \d+ to 128\.\n- `width`: at least \d+\.\n", page)
    assert run_readme(bundle).splitlines()[0] == "scores float32 (4, 5)"


def test_a_program_of_multiples_says_so(tmp_path: Path) -> None:
    """No input has the free size itself, only four times it."""
    network, image = model(lambda: nn.Conv2d(3, 4, 3, padding=1)), torch.randn(2, 3, 32, 32)
    sizes = {0: torch.export.Dim("batch"), 2: 4 * torch.export.Dim("quarter", min=2, max=64)}
    graph = capture(torch.export.export(network, (image,), dynamic_shapes=(sizes,)), image)
    assert graph.meta["size_bounds"] == {"input_2": Bounds(low=8, high=256, multiple=4)}
    assert {x.shape[2] % 4 for (x,) in graph.meta["other_examples"]} == {0}


class Halves(nn.Module):
    """Takes even heights and widths alone."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(12, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(F.pixel_unshuffle(x, 2))
        return y


def test_bounds_hold_what_the_model_demands_of_sizes() -> None:
    axes = {"x": {2: FreeAxis("height", low=4, high=64), 3: FreeAxis("width")}}
    bounds = capture(model(Halves), images()[0], axes=axes).meta["size_bounds"]
    assert bounds["height"] == Bounds(low=4, high=64, multiple=2)
    assert bounds["width"].multiple == 2 and bounds["width"].high is None


def test_the_report_says_what_is_free_and_proved(bundle: Path) -> None:
    report = json.loads((bundle / "report.json").read_text())
    sizes = report["sizes"]
    assert sizes["axes"] == {"x": {"2": "height", "3": "width"}}
    proved = {tuple(each["x"]) for each in sizes["proved"]}
    assert {(3, 48, 48), (3, 32, 32)} < proved and len(proved) == 4  # of the data, and two others
    assert any(height != width for _, height, width in proved) and any(height % 2 for _, height, _ in proved)
    assert json.loads((bundle / "manifest.json").read_text())["sizes"] == sizes
    assert report["model"]["inputs"][0]["shape"] == ["batch", 3, "height", "width"]
    assert [each["name"] for each in report["model"]["outputs"]] == ["scores", "map"]
    assert report["coverage"]["integer_macs"] == 1.0


def test_golden_sets_of_every_size_are_verified(bundle: Path) -> None:
    assert len(list((bundle / "golden").glob("test_data_set_*"))) == 4
    report = verify(bundle)
    assert report["verdict"] == "pass" and report["parity"]["optimized"]["samples"] == 16
    assert report["sizes"] == json.loads((bundle / "report.json").read_text())["sizes"]


def test_the_file_runs_at_sizes_that_nobody_tried(bundle: Path) -> None:
    session = ort.InferenceSession(bundle / "model.onnx")
    for batch, height, width in ((1, 20, 90), (3, 77, 31)):
        x = torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            exact = model(Pyramid)(x)
        for name, found in zip(("scores", "map"), session.run(None, {"x": x.numpy()}), strict=True):
            wanted = exact[name].numpy()
            assert found.shape == wanted.shape
            assert 10 * np.log10((wanted**2).sum() / ((wanted - found) ** 2).sum()) > 20


@pytest.mark.slow
def test_lengths_that_have_to_agree_have_one_name(tmp_path: Path) -> None:
    data = [({"x": torch.randn(8, 12, 16), "mask": torch.ones(8, 12, dtype=torch.bool)}, None) for _ in range(2)]
    report = export(model(Attention), data, out=tmp_path / "out", dynamic=["x:1=length", "mask:1"], **QUICK)
    assert report["verdict"] == "pass", report["gates"]
    assert [each["shape"] for each in report["model"]["inputs"]] == [["batch", "length", 16], ["batch", "length"]]
    assert report["model"]["outputs"][0]["shape"] == ["batch", "length", 4]
    assert {tuple(each["mask"]) for each in report["sizes"]["proved"]} == {(12,), (19,), (6,)}


def test_a_program_keeps_its_free_axes() -> None:
    batch, size = torch.export.Dim("batch"), torch.export.Dim("size", min=8)
    dims = ({0: batch, 2: size, 3: torch.export.Dim("other", min=8)},)
    program = torch.export.export(model(Pyramid), (images()[0],), dynamic_shapes=dims)
    graph = capture(program, images()[0])
    assert graph.meta["free_axes"] == {"x": {2: "x_2", 3: "x_3"}}
    assert [tuple(other[0].shape) for other in graph.meta["other_examples"]] == [
        (3, 3, 32, 32),
        (2, 3, 49, 16),
        (2, 3, 16, 64),
    ]


class Flat(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4 * 36, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(F.relu(self.conv(x)).flatten(1))
        return y


class OtherWhereOdd(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x if x.shape[2] % 2 == 0 else x[:, :, 1:])
        return y


def test_sizes_for_which_the_export_does_not_hold_are_named() -> None:
    graph = capture(model(OtherWhereOdd), images()[0], axes={"x": {2: FreeAxis("height")}})
    assert all(other[0].shape[2] % 2 == 0 for other in graph.meta["other_examples"])
    assert any("on samples of shape [3, 49, 32] the model runs, but its export" in note for note in graph.meta["notes"])


class Pixels(nn.Module):
    """A linear layer over all pixels of a channel."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 1), nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.conv(x).flatten(2))
        return y


class Rows(nn.Module):
    """Reads an image row by row."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.mean(1)
        y: Tensor = self.head(sum(rows[:, i] for i in range(rows.shape[1])))
        return y


@pytest.mark.parametrize(
    ("make", "dynamic", "error", "message"),
    [
        (Pixels, ["x:2,3"], ModelError, r"axis 2 of input 'x' .* needs \(x.shape\[3\]\*x.shape\[2\]\) == 64; leave"),
        (Pixels, ["x:3"], ModelError, "axis 3 of input 'x' cannot be free, because the model makes its size"),
        (Rows, ["x:2"], ModelError, r"its size a constant \(8\), for example by .* range\(\)"),
        (Flat, ["x:2"], ModelError, "makes its size a constant"),
        (Flat, ["y:2"], UnknownNameError, "'y'"),
        (Flat, ["x:4"], InputError, "an axis that the input does not have"),
        (Flat, ["x:0"], InputError, "the batch"),
    ],
)
def test_axes_that_cannot_be_free(
    tmp_path: Path, make: Callable[[], nn.Module], dynamic: list[str], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        export(model(make), images(8), out=tmp_path / "out", dynamic=dynamic, **QUICK)
    assert not (tmp_path / "out").exists()


def test_data_of_another_size_than_the_program() -> None:
    program = torch.export.export(model(Flat), (images(8)[0],))
    message = r"takes \[n, 3, 8, 8\], but the data has \[n, 3, 32, 32\]; give data of that shape \(image_size"
    with pytest.raises(ModelError, match=message):
        capture(program, images()[0])
    with pytest.raises(ModelError, match="has a fixed size at axis 2 of 'x'"):
        capture(program, images(8)[0], axes={"x": {2: FreeAxis("height")}})


class Similarities(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.inner(self.a(x), self.b(y)) + torch.tensordot(self.a(y), self.b(x), dims=([1], [1]))


def test_products_of_all_samples_with_all() -> None:
    graph = capture(model(Similarities), (torch.randn(4, 6), torch.randn(4, 6)))
    assert graph.meta["dynamic_batch"]
    targets = {str(node.target) for node in graph.graph.nodes}
    assert "aten.matmul.default" in targets and not targets & {"aten.inner.default", "aten.tensordot.default"}
    x, y = torch.randn(5, 6), torch.randn(5, 6)
    torch.testing.assert_close(graph(x, y)[0], model(Similarities)(x, y))
