"""Capture: one flat ATen graph from modules and exported programs; refusals that help."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibrators.errors import ModelError
from exporter.capturing import capture
from tests.networks import NETWORKS, build, randomize

aten = torch.ops.aten


@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_graph_equals_model_at_any_batch(name: str) -> None:
    model, x = build(name)
    graph = capture(model, x)
    assert graph.meta["dynamic_batch"]
    for batch in (1, 3, 8):
        torch.testing.assert_close(graph(x[:batch])[0], model(x[:batch]), rtol=0, atol=0)
    assert {node.op for node in graph.graph.nodes} <= {"placeholder", "get_attr", "call_function", "output"}


def test_in_place_operators_become_functional() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.relu = nn.ReLU6(inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            z = self.relu(y)
            return y + z  # y was overwritten: 2 * relu6(conv(x))

    model = randomize(InPlace())
    x = torch.randn(2, 3, 5, 5)
    graph = capture(model, x)
    assert torch.equal(graph(x)[0], model(x))
    assert not any(node.target._schema.is_mutable for node in graph.graph.nodes if node.op == "call_function")


def test_in_place_on_a_view_of_the_input_leaves_the_input_alone() -> None:
    class WritesInput(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.reshape(x.shape[0], -1).relu_() + 1.0

    x = torch.randn(2, 3, 2)
    before = x.clone()
    graph = capture(WritesInput(), x)
    assert torch.equal(x, before)
    assert torch.equal(graph(x.clone())[0], before.flatten(1).relu() + 1.0)


def test_module_keeps_its_training_flag() -> None:
    model, x = build("residual")
    model.train()
    capture(model, x)
    assert model.training


def test_static_batch_is_said() -> None:
    class Static(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.shape[0] == 1 else x * 3

    graph = capture(Static(), torch.ones(4, 2))
    assert not graph.meta["dynamic_batch"]
    assert "batch is fixed at 1" in graph.meta["notes"][0]


def test_dictionary_of_outputs_gives_names() -> None:
    class Two(nn.Module):
        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"boxes": x + 1, "scores": x * 2}

    assert capture(Two(), torch.ones(2, 2)).meta["output_names"] == ["boxes", "scores"]


def test_two_inputs_by_name() -> None:
    class Sum(nn.Module):
        def forward(self, left: Tensor, right: Tensor) -> Tensor:
            return left + right

    graph = capture(Sum(), (torch.ones(2, 3), torch.ones(2, 3)))
    assert graph.meta["input_names"] == ["left", "right"]


def test_exported_program_from_file(tmp_path: Path) -> None:
    model, x = build("residual")
    batch = torch.export.Dim("batch")
    torch.export.save(torch.export.export(model, (x,), dynamic_shapes=({0: batch},)), tmp_path / "m.pt2")
    graph = capture(torch.export.load(tmp_path / "m.pt2"), x)
    assert graph.meta["dynamic_batch"]
    assert torch.equal(graph(x)[0], model(x))


def test_static_program_keeps_its_batch() -> None:
    model, x = build("residual", batch=3)
    graph = capture(torch.export.export(model, (x,)), x[:1])
    assert not graph.meta["dynamic_batch"]
    assert graph.meta["example"][0].shape[0] == 3


def test_core_aten_batch_norm_is_restored() -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    x = torch.randn(2, 3, 6, 6)
    program = torch.export.export(model, (x,)).run_decompositions({})
    graph = capture(program, x)
    targets = [node.target for node in graph.graph.nodes]
    assert aten.batch_norm.default in targets
    assert torch.equal(graph(x)[0], model(x))


def test_views_become_reshapes_to_constant_sizes() -> None:
    class Shuffle(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            n, c, h, w = x.shape
            return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)

    x = torch.randn(3, 6, 4, 5)
    graph = capture(Shuffle(), x)
    sizes = [node.args[1] for node in graph.graph.nodes if node.target is aten.reshape.default]
    assert sizes == [[-1, 2, 3, 4, 5], [-1, 6, 4, 5]]
    assert torch.equal(graph(x)[0], Shuffle()(x))


@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize(("size", "dilation"), [(3, 1), (4, 1), ((3, 2), (2, 3))], ids=["odd", "even", "mixed"])
@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_padding_by_name_becomes_numbers(size: Any, dilation: Any, padding: str) -> None:
    model = nn.Conv2d(3, 4, size, padding=padding, dilation=dilation)
    x = torch.randn(2, 3, 9, 8)
    graph = capture(model, x)
    (node,) = (node for node in graph.graph.nodes if node.target is aten.conv2d.default)
    assert all(isinstance(amount, int) for amount in node.args[4])
    torch.testing.assert_close(graph(x)[0], model(x), rtol=1e-6, atol=1e-6)


def test_half_precision_is_computed_in_float32() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 3).half()

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            y = self.layer(x)
            return y, y.float().softmax(1)

    model, x = Half(), torch.randn(2, 4).half()
    graph = capture(model, x)
    first, second = graph(x)
    assert (first.dtype, second.dtype) == (torch.float16, torch.float32)
    expected = x.float() @ model.layer.weight.float().T + model.layer.bias.float()
    assert torch.equal(first, expected.half())
    assert model.layer.weight.dtype == torch.float16
    assert graph.meta["notes"] == ["the model computes in float16; it is exported with the same weights in float32"]


def test_control_flow_on_values_names_module_and_line() -> None:
    class Gate(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Gate()

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + 1

    with pytest.raises(ModelError, match=r"(?s)'inner' at .*test_capturing\.py:\d+.*pass the \.pt2 file"):
        capture(Outer(), torch.ones(2, 3))


def test_wrong_input_shape_names_module_and_shape() -> None:
    model, _ = build("residual")
    with pytest.raises(ModelError, match=r"does not run on inputs of shape \[2, 4, 9, 9\]"):
        capture(model, torch.ones(2, 4, 9, 9))


def test_output_that_is_no_tensor() -> None:
    class Number(nn.Module):
        def forward(self, x: Tensor) -> tuple[Tensor, int]:
            return x + 1, 3

    with pytest.raises(ModelError, match="no tensor"):
        capture(Number(), torch.ones(2, 3))
