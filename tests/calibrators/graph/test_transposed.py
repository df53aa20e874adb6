"""Transposed convolutions as convolutions: equal up to the order of sums, whatever their geometry."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from calibrators.graph.aten import shape_of
from calibrators.graph.canonical import to_integer_forms
from exporter.frontend.capture import capture
from tests.support.networks import randomize

aten = torch.ops.aten

REORDERED = 1e-13
"""Sums of fewer than a hundred products in another order, in float64."""

GEOMETRIES = {
    "kernel-is-stride": {"kernel_size": 2, "stride": 2},
    "no-bias": {"kernel_size": 3, "stride": 3, "bias": False},
    "decoder": {"kernel_size": 4, "stride": 2, "padding": 1},
    "odd": {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
    "output-padding-alone": {"kernel_size": 2, "stride": 3, "output_padding": 2},
    "kernel-below-stride": {"kernel_size": 1, "stride": 3},
    "deep-padding": {"kernel_size": 5, "stride": 2, "padding": 4},
    "groups": {"kernel_size": 4, "stride": 2, "padding": 1, "groups": 2},
    "stride-1": {"kernel_size": 3, "padding": 1},
    "dilated": {"kernel_size": 3, "padding": 3, "dilation": 2},
    "dilated-and-strided": {"kernel_size": 3, "stride": 2, "padding": 1, "dilation": 3},
    "two-strides": {"kernel_size": (3, 4), "stride": (1, 2), "padding": (0, 1), "output_padding": (0, 1)},
}


@pytest.mark.parametrize("name", GEOMETRIES)
def test_form_is_equal(name: str) -> None:
    module = randomize(nn.ConvTranspose2d(4, 6, **GEOMETRIES[name])).double()
    graph = to_integer_forms(capture(module, torch.randn(2, 4, 5, 6, dtype=torch.float64)))
    assert not graph.graph.find_nodes(op="call_function", target=aten.conv_transpose2d.input)
    x = torch.randn(3, 4, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(graph(x)[0], module(x), rtol=REORDERED, atol=REORDERED)


@pytest.mark.parametrize("groups", [1, 2])
def test_form_of_a_sequence_is_equal(groups: int) -> None:
    module = randomize(nn.ConvTranspose1d(4, 2, 16, 8, 3, groups=groups)).double()
    x = torch.randn(3, 4, 7, dtype=torch.float64)
    graph = to_integer_forms(capture(module, x))
    torch.testing.assert_close(graph(x)[0], module(x), rtol=REORDERED, atol=REORDERED)


@pytest.mark.parametrize("space", [1, 2])
def test_moves_take_five_dimensions_at_most(space: int) -> None:  # more is refused by Qualcomm's HTP
    module = (nn.ConvTranspose1d, nn.ConvTranspose2d)[space - 1](4, 6, 4, 2, 1)
    graph = to_integer_forms(capture(module, torch.randn(2, 4, *[5] * space)))
    assert max(len(shape_of(node)) for node in graph.graph.nodes if node.op == "call_function") == 1 + 2 * space


def test_an_activation_is_part_of_the_convolution() -> None:
    module = randomize(nn.Sequential(nn.ConvTranspose2d(4, 3, 4, 2, 1), nn.ReLU(), nn.Conv2d(3, 2, 1)))
    graph = to_integer_forms(capture(module, torch.randn(2, 4, 5, 6)))
    (relu,) = graph.graph.find_nodes(op="call_function", target=aten.relu.default)
    assert relu.args[0].target is aten.conv2d.default


def test_weights_that_are_computed_stay() -> None:
    class Computed(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return nn.functional.conv_transpose2d(x, x.mean((0, 2), keepdim=True).transpose(0, 1), stride=2)

    graph = to_integer_forms(capture(Computed(), torch.randn(2, 4, 5, 6)))
    assert graph.graph.find_nodes(op="call_function", target=aten.conv_transpose2d.input)
