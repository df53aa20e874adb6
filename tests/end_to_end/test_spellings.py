"""However an operator is spelled, the runtime executes the kernels that are planned for its meaning.

Every function stands between integer convolutions and a product of two activations, which the runtime computes on
integers exactly if codes reach it: a move that the plan does not know shows as a kernel that was not planned.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.graph.aten import operator_name
from exporter import capture, emit, fold
from runtime_tests.proof import validate
from tests.support.networks import randomize

Spelling = Callable[[Tensor], Tensor]

VIEWS: dict[str, Spelling] = {
    "flatten": lambda x: x.flatten(2),
    "flatten-to-matrix": lambda x: x.flatten(1),
    "flatten-batch": lambda x: x.flatten(0, 2),
    "view_as": lambda x: x.view_as(x[:, None].flatten(0, 1)),
    "reshape_as": lambda x: x.flatten(1).reshape_as(x),
    "unflatten": lambda x: x.unflatten(1, (2, -1)),
    "squeeze": lambda x: x[:, :, :1].squeeze(),
    "squeeze-axis": lambda x: x[:, :, :1].squeeze(2),
    "squeeze-axes": lambda x: x[:, :1, :1].squeeze((1, 2)),
    "squeeze-nothing": lambda x: x.squeeze(2),
    "new-axis": lambda x: x[:, None],
    "select": lambda x: x[:, 1],
    "narrow": lambda x: x.narrow(1, 1, 2),
    "every-other": lambda x: x[:, ::2],
}
TURNS: dict[str, Spelling] = {
    "mT": lambda x: x.mT,
    "mH": lambda x: x.mH,
    "adjoint": lambda x: x.adjoint(),
    "t": lambda x: x.flatten(1).t(),
    "swapaxes": lambda x: x.swapaxes(1, 2),
    "swapdims": lambda x: x.swapdims(-1, 1),
    "movedim": lambda x: x.movedim(1, -1),
    "moveaxis": lambda x: x.moveaxis((1, 2), (3, 1)),
    "flip": lambda x: x.flip(1),
    "fliplr": lambda x: x.fliplr(),
    "rot90": lambda x: x.rot90(1, (2, 3)),
    "rot180": lambda x: x.rot90(2, (2, 3)),
    "rot270": lambda x: x.rot90(3, (2, 3)),
    "channel_shuffle": lambda x: F.channel_shuffle(x, 2),
    "pixel_shuffle": lambda x: F.pixel_shuffle(x, 2),
    "pixel_unshuffle": lambda x: F.pixel_unshuffle(x, 2),
}
PARTS: dict[str, Spelling] = {
    "stack": lambda x: torch.stack([x, x.flip(1)], -1),
    "hstack": lambda x: torch.hstack([x, x]),
    "vstack": lambda x: torch.vstack([x, x]),
    "dstack": lambda x: torch.dstack([x, x]),
    "concatenate": lambda x: torch.concatenate([x, x], 1),
    "tensor_split": lambda x: torch.tensor_split(x, 3, 1)[1],
    "tensor_split-at": lambda x: torch.tensor_split(x, (1, 5), 1)[1],
    "hsplit": lambda x: torch.hsplit(x, 2)[1],
    "dsplit": lambda x: torch.dsplit(x, [1])[0],
    "unsafe_split": lambda x: torch.unsafe_split(x, 3, 1)[2],
    "unsafe_chunk": lambda x: torch.unsafe_chunk(x, 2, 1)[1],
}
ARITHMETIC: dict[str, Spelling] = {
    "multiply": lambda x: torch.multiply(x, x),
    "subtract": lambda x: torch.subtract(x, x.flip(1)),
    "clip": lambda x: x.clip(-0.5, 0.5),
    "clamp_min": lambda x: x.clamp_min(0),
    "clamp_max": lambda x: x.clamp_max(0.25),
    "threshold": lambda x: F.threshold(x, 0, 0),
    "expit": lambda x: torch.special.expit(x),
    "softmax": lambda x: torch.special.softmax(x, 1),
}


PRODUCTS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "linalg": lambda x, y: torch.linalg.matmul(x, y.mT),
    "inner": lambda x, y: torch.inner(x.flatten(2), y.flatten(2)[0]),
    "inner-of-images": lambda x, y: torch.inner(x, y[0]),
    "tensordot": lambda x, y: torch.tensordot(x, y[0], dims=([1, 3], [0, 2])),
    "addmm": lambda x, y: torch.addmm(y.flatten(1)[:, :1], x.flatten(1), y.flatten(1)[:1].t()),
    "sum-of-matrices": lambda x, y: x[:, 0].flatten(1) @ y[0].reshape(16, 8) + y[:, :, 0, 0],
    "sum-that-is-no-bias": lambda x, y: x[:, 0].flatten(1) @ y[0].reshape(16, 8) + y[0, :1, 0, 0],
    "baddbmm": lambda x, y: torch.baddbmm(x.flatten(2)[:, :, :1], x.flatten(2), y.flatten(2).mT),
    "mv": lambda x, y: torch.mv(x.flatten(1), y[0].ravel()),
    "dot": lambda x, y: torch.dot(x[0].ravel(), y[0].ravel()),
}


Product = Callable[[Tensor, Tensor], Tensor]


def product_after(function: Spelling) -> Product:
    return lambda x, y: function(x) @ function(y).transpose(-1, -2)


FUNCTIONS: dict[str, list[Product]] = {
    "views": [*map(product_after, VIEWS.values())],
    "turns": [*map(product_after, TURNS.values())],
    "parts": [*map(product_after, PARTS.values())],
    "arithmetic": [*map(product_after, ARITHMETIC.values())],
    "products": [*PRODUCTS.values()],
}


class Spelled(nn.Module):
    """Several products of the results of two convolutions."""

    def __init__(self, products: list[Product]) -> None:
        super().__init__()
        self.left, self.right, self.products = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1), products

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(multiply(self.left(x), self.right(x)) for multiply in self.products)


@pytest.mark.parametrize("functions", FUNCTIONS)
def test_spelling_does_not_matter(functions: str, tmp_path: Path) -> None:
    model, x = randomize(Spelled(FUNCTIONS[functions])), torch.randn(4, 3, 4, 4)
    graph = capture(model, x)
    assert graph.meta["dynamic_batch"], graph.meta["notes"]
    for found, expected in zip(graph(x), model(x), strict=True):
        torch.testing.assert_close(found, expected)
    result = calibrate(fold(graph), [x], method="minmax")
    emit(result, tmp_path / "model.onnx")
    validate(tmp_path / "model.onnx", reference=result, batches=[x, torch.randn(3, 3, 4, 4)]).raise_for_mismatch()


def test_few_spellings_are_left() -> None:
    """Nothing after capture has to know more names than these."""
    known = {"reshape", "squeeze", "unsqueeze", "permute", "transpose", "slice", "select", "flip", "pixel_shuffle"}
    for functions in ("views", "turns"):
        nodes = capture(randomize(Spelled(FUNCTIONS[functions])), torch.randn(4, 3, 4, 4)).graph.nodes
        calls = {operator_name(node.target) for node in nodes if node.op == "call_function"}
        assert calls - {"conv2d", "matmul"} <= known


class Lender(nn.Module):
    """A layer `lent` whose values reach no output: others take its type, its sizes or nothing from it."""

    def __init__(self) -> None:
        super().__init__()
        self.lent, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        lent = self.lent(x)
        y = self.b(self.a(x) + lent.new_ones(8, 1, 1) * lent.new_full((1,), 0.5) + torch.zeros_like(lent[0, :, :1, :1]))
        return torch.cat([y, lent[:, :0]], 1)


def test_a_layer_whose_values_nobody_reads_is_not_planned(tmp_path: Path) -> None:
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    result = calibrate(fold(capture(randomize(Lender()), x)), [x])
    emit(result, tmp_path / "model.onnx")
    report = validate(tmp_path / "model.onnx", reference=result, batches=[x])
    report.raise_for_mismatch()
    assert [node.kernel for node in report.optimized.nodes] == ["QuantizeLinear", "QLinearConv"]  # a and b fold
