"""The table of operators says what torch does, and multiply-accumulates are counted for every kind."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from calibrators.graph.aten import infer_shapes, macs
from calibrators.graph.operators import HOMOGENEOUS, MOVES, ON_FLOATS
from exporter.frontend.capture import capture

aten = torch.ops.aten

ARGUMENTS: dict[Any, tuple[Any, ...]] = {
    aten.view.default: ([2, -1],),
    aten.reshape.default: ([2, -1],),
    aten.permute.default: ([0, 2, 3, 1],),
    aten.transpose.int: (1, 2),
    aten.squeeze.dim: (0,),
    aten.squeeze.dims: ([0],),
    aten.unsqueeze.default: (1,),
    aten.slice.Tensor: (1, 1, 3),
    aten.flatten.using_ints: (1,),
    aten.flip.default: ([1],),
    aten.clone.default: (),
    aten.contiguous.default: (),
    aten.max_pool2d.default: ([2, 2],),
    aten.amax.default: ([2, 3],),
    aten.upsample_nearest2d.vec: (None, [2.0, 2.0]),
    aten.pixel_shuffle.default: (2,),
    aten.avg_pool2d.default: ([2, 2],),
    aten.adaptive_avg_pool2d.default: ([1, 1],),
    aten.mean.dim: ([2, 3],),
    aten.upsample_bilinear2d.vec: (None, False, [2.0, 2.0]),
    aten.leaky_relu.default: (0.1,),
}


@pytest.mark.parametrize("target", ARGUMENTS, ids=str)
def test_columns_hold(target: Any) -> None:
    x = torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(0))
    y = target(x, *ARGUMENTS[target])
    assert (target in HOMOGENEOUS) or target is aten.pixel_shuffle.default
    assert torch.equal(target(2 * x, *ARGUMENTS[target]), 2 * y)
    assert (target in MOVES) == bool(torch.isin(y, x).all())
    if target in MOVES and target not in ON_FLOATS:
        codes = (20 * x).round().to(torch.int8)
        assert torch.equal(target(codes, *ARGUMENTS[target]).float(), target(codes.float(), *ARGUMENTS[target]))


@pytest.mark.parametrize(
    ("layer", "expected"),
    [
        pytest.param(nn.Conv2d(4, 6, 3, groups=2), 2 * 6 * 6 * 6 * 2 * 9, id="grouped convolution"),
        pytest.param(nn.ConvTranspose2d(4, 6, 2, stride=2), 2 * 8 * 8 * 4 * 6 * 4, id="transposed convolution"),
        pytest.param(nn.Linear(8, 5), 2 * 4 * 8 * 5 * 8, id="linear"),
        pytest.param(nn.AvgPool2d(2), 2 * 4 * 4 * 4 * 4, id="average pool"),
        pytest.param(nn.ReLU(), 0, id="none"),
    ],
)
def test_macs(layer: nn.Module, expected: int) -> None:
    graph = capture(layer, torch.randn(2, 4, 8, 8))
    infer_shapes(graph)
    assert sum(macs(node) for node in graph.graph.nodes if node.op == "call_function") == expected
