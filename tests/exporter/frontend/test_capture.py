"""Capture: one flat ATen graph from modules and exported programs; refusals that help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from calibrators.errors import ModelError
from exporter.frontend import functionalize
from exporter.frontend.capture import capture
from exporter.frontend.declared import other_size
from tests.support.networks import NETWORKS, build, randomize

aten = torch.ops.aten


@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_graph_equals_model_at_any_batch(name: str) -> None:
    model, x = build(name)
    graph = capture(model, x)
    assert graph.meta["dynamic_batch"]
    for batch in (1, 3, 8):
        assert torch.equal(graph(x[:batch])[0], model(x[:batch]))
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
    assert torch.equal(graph(x)[0], model(x))


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
def test_embedding_bags_become_a_lookup_and_a_reduction(mode: str) -> None:
    model, x = nn.EmbeddingBag(20, 6, mode=mode), torch.randint(0, 20, (4, 5))  # type: ignore[arg-type]
    graph = capture(model, x)
    assert graph.meta["dynamic_batch"]
    for batch in (1, 4):
        torch.testing.assert_close(graph(x[:batch])[0], model(x[:batch]))
    assert aten.embedding.default in {node.target for node in graph.graph.nodes}


def test_embedding_bags_by_offsets_are_refused() -> None:
    class Offsets(nn.EmbeddingBag):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(x.flatten(), torch.arange(x.shape[0]) * x.shape[1])

    with pytest.raises(ModelError, match="a bag in each row"):
        capture(Offsets(20, 6, mode="sum"), torch.randint(0, 20, (4, 5)))


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

    with pytest.raises(ModelError, match=r"(?s)'inner' at .*test_capture\.py:\d+.*pass the \.pt2 file"):
        capture(Outer(), torch.ones(2, 3))


def test_wrong_input_shape_names_module_and_shape() -> None:
    model, _ = build("residual")
    with pytest.raises(ModelError, match=r"does not run on inputs of shape \[2, 4, 9, 9\]"):
        capture(model, torch.ones(2, 4, 9, 9))


class Calls(nn.Module):
    """A layer, and a function of it and the arguments."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.layer, self.function = nn.Linear(3, 3), function
        self.register_buffer("state", torch.zeros(3))

    def forward(self, *args: Any) -> Any:
        return self.function(self, *args)


def test_outputs_that_are_no_tensors_are_left_out() -> None:
    graph = capture(Calls(lambda m, x: (m.layer(x), 3, None)), torch.ones(2, 3))
    assert graph.meta["output_names"] == ["output_0"]
    assert [note.split(" for")[0] for note in graph.meta["notes"]] == [
        "the output 'output_1' is 3",
        "the output 'output_2' is None",
    ]
    with pytest.raises(ModelError, match="returns no tensor"):
        capture(Calls(lambda m, x: None), torch.ones(2, 3))


def test_nested_outputs_have_the_names_that_lead_to_them() -> None:
    model = Calls(lambda m, x: {"a": m.layer(x), "b": [x + 1, {"c": x + 2}]})
    assert capture(model, torch.ones(2, 3)).meta["output_names"] == ["a", "b_0", "b_1_c"]


def _without_autocast(model: Any, x: Tensor) -> Any:
    with torch.autocast("cpu", enabled=False):
        x = model.layer(x).float() * 2
    return model.layer(x)


def _without_gradients(model: Any, x: Tensor) -> Any:
    with torch.no_grad():
        y = model.layer(x).relu_()
        with torch.autocast("cpu", enabled=False):
            x = y + x
    with torch.enable_grad():
        return model.layer(x), y


@pytest.mark.parametrize("function", [_without_autocast, _without_gradients])
def test_regions_are_inlined(function: Callable[..., Any]) -> None:
    model, x = Calls(function), torch.randn(3, 3)
    graph = capture(model, x)
    assert graph.meta["dynamic_batch"]
    torch.testing.assert_close(graph(x)[0], pytree.tree_leaves(model(x))[0])
    assert {node.op for node in graph.graph.nodes} <= {"placeholder", "get_attr", "call_function", "output"}


def test_regions_in_half_precision_are_computed_in_float32() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model.layer(x)
        result: Tensor = y.float()
        return result

    model, x = Calls(forward), torch.randn(3, 3)
    assert torch.equal(capture(model, x)(x)[0], model.layer(x))


@pytest.mark.parametrize("as_program", [False, True], ids=["module", "program"])
def test_weights_in_float64_are_exported_in_float32(as_program: bool) -> None:
    module, x = nn.Sequential(nn.Linear(3, 4), nn.ReLU()).double(), torch.randn(2, 3)
    graph = capture(torch.export.export(module, (x.double(),)) if as_program else module, x)
    (output,) = graph(x)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output, module(x.double()).float())
    assert "rounded to float32" in " ".join(graph.meta["notes"])


def test_the_length_of_a_batch_is_free() -> None:
    model, x = Calls(lambda m, x: m.layer(x).reshape(len(x), -1) + x.new_zeros(len(x), 1)), torch.randn(4, 3)
    graph = capture(model, x)
    assert graph.meta["dynamic_batch"]
    assert torch.equal(graph(x)[0], model(x))


def test_a_buffer_that_forward_changes_starts_anew_in_every_call() -> None:
    def forward(model: Any, x: Tensor) -> Tensor:
        model.state.mul_(0.5).add_(x.mean(0))
        result: Tensor = model.layer(x) + model.state
        return result

    model, x = Calls(forward), torch.randn(2, 3)
    graph = capture(model, x)
    assert not model.state.any()
    for _ in range(2):
        torch.testing.assert_close(graph(x)[0], model.layer(x) + x.mean(0))
    assert any("changes the buffer 'state'" in note for note in graph.meta["notes"])


def test_an_input_that_the_model_does_not_use_is_named() -> None:
    class Ignores(nn.Module):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x * 2

    graph = capture(Ignores(), (torch.ones(2, 3), torch.ones(2, 3)))
    assert graph.meta["notes"] == ["the model does not use its input 'mask'"]


@pytest.mark.parametrize("wrap", [lambda m: m, lambda m: nn.Sequential(m, nn.ReLU())], ids=["whole", "inside"])
def test_torchscript_is_refused_by_name(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.warns(DeprecationWarning):
        scripted = torch.jit.trace(nn.Linear(3, 3), torch.ones(2, 3))
    with pytest.raises(ModelError, match="is TorchScript"):
        capture(wrap(scripted), torch.ones(2, 3))


def test_randomness_is_called_by_its_name() -> None:
    with pytest.raises(ModelError, match=r"is random \(aten.rand_like.default\)"):
        capture(Calls(lambda m, x: m.layer(x) + torch.rand_like(x)), torch.ones(2, 3))


class Optional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 3)

    def forward(self, x: Tensor, cache: Any = None, *, scale: Tensor | None = None) -> Tensor:
        y: Tensor = self.layer(x if cache is None else x + cache["k"][0])
        return y if scale is None else y * scale


@pytest.mark.parametrize(
    "given",
    [
        pytest.param(lambda x: {"x": x, "scale": x * 2}, id="one left out"),
        pytest.param(lambda x: {"x": x, "cache": {"k": (x + 1,)}}, id="nested"),
        pytest.param(lambda x: {"x": x, "cache": {"k": (x + 1,)}, "scale": x}, id="all"),
    ],
)
def test_arguments_by_name(given: Callable[[Tensor], dict[str, Any]]) -> None:
    model, x = Optional(), torch.randn(4, 3)
    tensors, form = pytree.tree_flatten(given(x))
    graph = capture(model, tensors, form=form)
    assert graph.meta["dynamic_batch"]
    torch.testing.assert_close(graph(*tensors)[0], model(**given(x)))
    program = torch.export.export(model, (), given(x[:2]))
    torch.testing.assert_close(capture(program, tensors)(*(t[:2] for t in tensors))[0], model(**given(x[:2])))


def test_inputs_of_a_program_may_share_their_batch(tmp_path: Path) -> None:
    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a * 2 + b

    x, batch = torch.randn(4, 3), torch.export.Dim("batch")
    program = torch.export.export(Sum(), (x, x), dynamic_shapes=({0: batch}, {0: batch}))
    torch.export.save(program, tmp_path / "m.pt2")
    graph = capture(torch.export.load(tmp_path / "m.pt2"), (x, x))
    assert graph.meta["dynamic_batch"]
    assert torch.equal(graph(x, x)[0], x * 3)


class Body(nn.Module):
    """Two convolutions with a function between them."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.first, self.second, self.function = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), function

    def forward(self, x: Tensor) -> Any:
        return self.function(self, self.first(x))  # type: ignore[call-arg]


def _in_chunk(body: Any, y: Tensor) -> Tensor:
    half, _ = y.chunk(2, 1)
    half.mul_(2)
    result: Tensor = body.second(y)
    return result


def _in_split(body: Any, y: Tensor) -> Tensor:
    left, right = y.split([3, 1], 1)
    right.clamp_(0, 1)
    left.sub_(0.5)
    result: Tensor = body.second(y)
    return result


def _in_unbound(body: Any, y: Tensor) -> Tensor:
    for plane in y.unbind(1):
        plane.mul_(2)
    result: Tensor = body.second(y)
    return result


@pytest.mark.parametrize("function", [_in_chunk, _in_split, _in_unbound])
def test_in_place_on_one_of_several_views_reaches_their_source(function: Any) -> None:
    model, x = Body(function).eval(), torch.randn(3, 4, 6, 6)
    with torch.no_grad():
        assert torch.equal(capture(model, x)(x)[0], model(x))


def test_a_graph_that_computes_something_else_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here because the rewrite of in-place operators is told that nothing is a view."""
    monkeypatch.setattr(functionalize, "_is_view", lambda node: False)
    with pytest.raises(ModelError, match="captured graph computes another 'output' than the model"):
        capture(Body(_in_chunk).eval(), torch.randn(2, 4, 6, 6))


def test_arguments_without_names_have_a_free_batch() -> None:
    class Sum(nn.Module):
        def forward(self, first: Tensor, *others: Tensor) -> Tensor:
            return first + others[0] * others[1]

    graph = capture(Sum(), (torch.ones(2, 3), torch.ones(2, 3), torch.ones(2, 3)))
    assert graph.meta["dynamic_batch"]
    assert float(graph(*torch.ones(3, 5, 3))[0].sum()) == 30


def test_names_of_outputs_are_texts_that_no_input_has() -> None:
    class Named(nn.Module):
        def forward(self, x: Tensor) -> Any:
            return {"x": x + 1, 3: x * 2}

    assert capture(Named(), torch.ones(2, 3)).meta["output_names"] == ["x_", "3"]


@pytest.mark.parametrize("name", ["residual", "mlp", "pooled"])
def test_core_operators_are_those_that_modules_call(name: str) -> None:
    """A program saved after its decompositions has the same layers."""
    model, x = build(name)
    program = torch.export.export(model, (x[:2],), dynamic_shapes=({0: torch.export.Dim("batch")},))
    graph = capture(program.run_decompositions(), x)
    targets = {node.target for node in graph.graph.nodes}
    assert targets.isdisjoint({aten.convolution.default, aten.addmm.default, aten.mm.default})
    layers = (aten.conv2d.default, aten.linear.default)
    numbers = [sum(node.target in layers for node in each.graph.nodes) for each in (graph, capture(model, x))]
    assert numbers[0] == numbers[1] > 0
    tolerance = 1e-5 if name == "pooled" else 0.0  # adaptive pooling is a mean then, with another order of its sum
    torch.testing.assert_close(graph(x)[0], model(x), rtol=tolerance, atol=tolerance)


def test_transposed_convolutions_too() -> None:
    model = nn.Sequential(nn.ConvTranspose2d(3, 4, 3, 2, 1, output_padding=1, groups=1, dilation=2)).eval()
    x = torch.randn(2, 3, 5, 5)
    program = torch.export.export(model, (x,)).run_decompositions()
    graph = capture(program, x)
    assert aten.conv_transpose2d.input in {node.target for node in graph.graph.nodes}
    assert torch.equal(graph(x)[0], model(x))


def test_branches_chosen_at_run_time_are_refused() -> None:
    class Branching(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            chosen: Tensor = torch.cond(x.sum() > 0, lambda y: y.relu(), lambda y: 2 * y, (x,))
            return chosen

    with pytest.raises(ModelError, match=r"cond.*chooses between subgraphs.*torch\.where"):
        capture(Branching(), torch.ones(2, 3))


class Sized(nn.Module):
    """It knows its size as timm's models do."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.pretrained_cfg = {"input_size": (3, size, size), "num_classes": 5}
        self.head = nn.Linear(3 * size * size, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(x.flatten(1))
        return y


def test_images_of_another_size_than_the_model_names() -> None:
    message = (
        r"does not run on .*; the model says that it takes images of 8 x 8, but the data has 6 x 6 \(image_size='8'"
    )
    with pytest.raises(ModelError, match=message):
        capture(Sized(8), torch.randn(2, 3, 6, 6))
    assert other_size(Sized(8), [torch.randn(2, 3, 8, 8)]) is None
    assert other_size(nn.Linear(3, 4), [torch.randn(2, 3, 8, 8)]) is None
    wide = Sized(8)
    wide.pretrained_cfg = {"input_size": (3, 4, 8)}
    assert "image_size='4x8'" in (other_size(wide, [torch.randn(2, 3, 8, 8)]) or "")


@dataclass
class Found:
    """The outputs of a model, of a type that torch.export does not know."""

    boxes: Tensor
    heads: dict[str, Tensor]


def test_outputs_in_a_dataclass_keep_their_names() -> None:
    class Detector(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Found:
            y = self.conv(x)
            return Found(y.mean((2, 3)), {"scores": y.relu(), "masks": y.sigmoid()})

    model, x = randomize(Detector()).eval(), torch.randn(3, 3, 5, 5)
    graph = capture(model, x)
    assert graph.meta["output_names"] == ["boxes", "heads_scores", "heads_masks"]
    assert torch.equal(graph(x)[0], model(x).boxes)


def test_a_model_of_one_batch_size_is_refused() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)
            self.register_buffer("table", torch.randn(16, 4))

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(x) + self.get_buffer("table")

    with pytest.raises(ModelError, match=r"batches of 16 alone: one sample gives an output of shape \[16, 4\]"):
        capture(Fixed(), torch.randn(16, 4))


def test_a_shared_table_that_is_renormalized_is_refused() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.out = nn.Embedding(20, 12, max_norm=0.5), nn.Linear(12, 20)
            self.out.weight = self.table.weight

        def forward(self, x: Tensor) -> Tensor:
            found: Tensor = self.out(torch.relu(self.table(x)))
            return found

    with pytest.raises(ModelError, match="max_norm"):
        capture(Tied().eval(), torch.randint(0, 20, (16, 6)))
