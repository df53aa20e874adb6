"""Canonical forms compute what the operators that they replace compute: equal bits unless a constant below says why."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from onnxruntime import InferenceSession
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.graph.canonical import clip_bounds, to_integer_forms
from exporter.emission.build_model import emit, emit_float
from exporter.frontend.capture import capture
from runtime_tests.proof import validate
from tests.support.networks import Function, randomize

aten = torch.ops.aten

ONE, ONES, NOTHING = torch.ones(()), torch.ones(1, 3, 1, 1), torch.zeros(1, 1, 1)

FUSED = 1e-6
"""torch's fused activations and attention round in other places, in float32."""

LINEAR = {aten.mul.Tensor, aten.add.Tensor}

REORDERED = 1e-13
"""Sums of fewer than a hundred products in another order, in float64."""

FACTORS = 1e-6
"""A factor that is no power of two is rounded once more, in float32."""


def forms(function: Callable[[Tensor], Tensor], x: Tensor) -> tuple[set[object], Tensor, Tensor]:
    """Operators in the integer form, its result, and the original's."""
    graph = to_integer_forms(capture(Function(function), x))
    return {node.target for node in graph.graph.nodes if node.op == "call_function"}, graph(x)[0], function(x)


@pytest.mark.parametrize(
    ("function", "operators"),
    [
        pytest.param(F.silu, {aten.sigmoid.default, aten.mul.Tensor}, id="silu"),
        pytest.param(F.relu6, {aten.clamp.default}, id="relu6"),
        pytest.param(lambda x: F.hardtanh(x, -2, 1), {aten.clamp.default}, id="hardtanh"),
        pytest.param(F.hardsigmoid, {*LINEAR, aten.clamp.default}, id="hard-sigmoid"),
        pytest.param(F.hardswish, {*LINEAR, aten.clamp.default}, id="hard-swish"),
        pytest.param(lambda x: (x - 3) * 0.5, LINEAR, id="difference"),
        pytest.param(lambda x: torch.sub(1 + x, 2, alpha=3) / 4, LINEAR, id="alpha"),
        pytest.param(lambda x: (x * ONE / ONE + NOTHING - NOTHING).exp(), {aten.exp.default}, id="neutral"),
        pytest.param(lambda x: x[:, :1] * ONES, {aten.slice.Tensor, aten.mul.Tensor}, id="ones-that-repeat-stay"),
        pytest.param(lambda x: 1 - x, {aten.rsub.Scalar}, id="reversed-stays"),
        pytest.param(lambda x: 2 / x, {aten.reciprocal.default, aten.mul.Tensor}, id="reciprocal-stays"),
        pytest.param(lambda x: x.mean((2, 3), keepdim=True), {aten.adaptive_avg_pool2d.default}, id="mean-keepdim"),
        pytest.param(
            lambda x: x.mean((-1, -2)), {aten.adaptive_avg_pool2d.default, aten.flatten.using_ints}, id="mean"
        ),
        pytest.param(
            lambda x: F.adaptive_avg_pool1d(x.flatten(2), 10),
            {aten.reshape.default, aten.unsqueeze.default, aten.avg_pool2d.default, aten.squeeze.dim},
            id="pool-of-sequence",
        ),
        pytest.param(lambda x: F.adaptive_avg_pool1d(x.flatten(2), 30), {aten.reshape.default}, id="pool-of-itself"),
        pytest.param(lambda x: F.adaptive_avg_pool2d(x, (5, 6)) + x, LINEAR - {aten.mul.Tensor}, id="pool-of-image"),
        pytest.param(lambda x: x.mean(1), {aten.mean.dim}, id="mean-over-channels-stays"),
    ],
)
def test_form_is_equal(function: Callable[[Tensor], Tensor], operators: set[object]) -> None:
    found, result, expected = forms(function, torch.randn(3, 4, 5, 6) * 4)
    assert found == operators
    tolerance = FUSED if function in (F.silu, F.hardsigmoid, F.hardswish) else 0.0
    torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("function", "operators"),
    [
        pytest.param(lambda x: F.adaptive_avg_pool3d(x, 1), {aten.mean.dim}, id="mean"),
        pytest.param(lambda x: F.adaptive_avg_pool3d(x, (2, 3, 1)), {aten.avg_pool3d.default}, id="divisor"),
        pytest.param(lambda x: F.adaptive_avg_pool3d(x, (3, 3, 4)), {aten.adaptive_avg_pool3d.default}, id="uneven"),
        pytest.param(lambda x: F.adaptive_max_pool3d(x, 1), {aten.amax.default}, id="maximum"),
        pytest.param(lambda x: F.adaptive_max_pool3d(x, (2, 3, 1)), {aten.max_pool3d.default}, id="maxima"),
    ],
)
def test_pools_of_volumes_are_plain_and_have_an_onnx_form(
    function: Callable[[Tensor], Tensor], operators: set[object], tmp_path: Path
) -> None:
    x = torch.randn(2, 3, 4, 6, 5)
    found, result, expected = forms(function, x)
    assert found == operators
    torch.testing.assert_close(result, expected, rtol=0, atol=FUSED)
    emit_float(capture(Function(function), x), tmp_path / "model.onnx")
    [written] = InferenceSession(tmp_path / "model.onnx").run(None, {"x": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(written), expected, rtol=0, atol=FUSED)


def test_linear_on_tokens_becomes_a_matrix_product() -> None:
    """Layers that share their input share the reshape."""

    class Three(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 5) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return sum(layer(x) for layer in self.layers)

    x = torch.randn(2, 6, 4)
    graph = to_integer_forms(capture(Three(), x))
    linears = [node for node in graph.graph.nodes if node.target is aten.linear.default]
    assert len({node.args[0] for node in linears}) == 1
    assert all(len(node.meta["tensor_meta"].shape) == 2 for node in linears)
    assert graph(torch.randn(5, 6, 4))[0].shape == (5, 6, 5)


def test_matmul_with_a_parameter_is_a_linear_layer() -> None:
    class Product(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.matrix = nn.Parameter(torch.randn(4, 5))

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix

    model, x = Product(), torch.randn(2, 3, 4)
    graph = to_integer_forms(capture(model, x))
    assert aten.linear.default in {node.target for node in graph.graph.nodes}
    assert torch.equal(graph(x)[0], model(x))


def test_attention_is_spelled_out() -> None:
    x = torch.randn(2, 3, 7, 4)
    found, result, expected = forms(lambda q: F.scaled_dot_product_attention(q, q * 2, q + 1), x)
    assert aten.softmax.int in found and aten.scaled_dot_product_attention.default not in found
    torch.testing.assert_close(result, expected, rtol=FUSED, atol=FUSED)


@pytest.mark.parametrize(
    "mask",
    [
        pytest.param(None, id="causal"),
        pytest.param(torch.tensor([[True, False, True, True, False, True, True]]), id="boolean"),
        pytest.param(torch.randn(7, 7), id="additive"),
    ],
)
def test_constant_mask_of_attention_is_added(mask: Tensor | None) -> None:
    x = torch.randn(2, 3, 7, 4)
    attend = partial(F.scaled_dot_product_attention, attn_mask=mask, is_causal=mask is None)
    found, result, expected = forms(lambda q: attend(q, q * 2, q + 1), x)
    assert aten.softmax.int in found and aten.scaled_dot_product_attention.default not in found
    torch.testing.assert_close(result, expected, rtol=FUSED, atol=FUSED)


def test_attention_that_may_see_nothing_is_left_alone() -> None:
    """torch defines such a row as zeros, the spelled-out softmax as NaN."""
    mask = torch.zeros(7, 7, dtype=torch.bool)
    found, _, _ = forms(lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=mask), torch.randn(2, 3, 7, 4))
    assert aten.scaled_dot_product_attention.default in found


MOVES = {aten.slice.Tensor, aten.squeeze.dim, aten.cat.default}


@pytest.mark.parametrize(
    ("function", "operators"),
    [
        pytest.param(lambda x: torch.cat(x.chunk(2, 1)[::-1], 1), MOVES - {aten.squeeze.dim}, id="chunk"),
        pytest.param(lambda x: torch.cat(x.split((1, 3), 1)[::-1], 1), MOVES - {aten.squeeze.dim}, id="split"),
        pytest.param(lambda x: torch.cat(x.unbind(2)[::-1], 1), MOVES, id="unbind"),
        pytest.param(lambda x: x.select(2, -1), MOVES - {aten.cat.default}, id="select"),
        pytest.param(lambda x: x.roll((1, -2), (2, 3)), MOVES - {aten.squeeze.dim}, id="roll"),
        pytest.param(lambda x: x * x[:, :, :1].expand_as(x), {aten.slice.Tensor, aten.mul.Tensor}, id="expand"),
        pytest.param(lambda x: F.adaptive_avg_pool2d(x, (3, 2)), {aten.avg_pool2d.default}, id="adaptive-divisor"),
        pytest.param(lambda x: F.adaptive_avg_pool2d(x, (6, 6)), set(), id="adaptive-same"),
        pytest.param(lambda x: F.adaptive_avg_pool2d(x, 4), {aten.adaptive_avg_pool2d.default}, id="adaptive-other"),
        pytest.param(lambda x: F.adaptive_max_pool2d(x, 1), {aten.amax.default}, id="adaptive-max"),
        pytest.param(lambda x: F.max_pool2d(x, 2, return_indices=True)[0], {aten.max_pool2d.default}, id="max-indices"),
    ],
)
def test_move_is_equal(function: Callable[[Tensor], Tensor], operators: set[object]) -> None:
    found, result, expected = forms(function, torch.randn(3, 4, 6, 6))
    assert found == operators
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("module", "operators"),
    [
        pytest.param(nn.BatchNorm2d(4), {aten.conv2d.default}, id="batch-norm"),
        pytest.param(
            nn.ConvTranspose2d(4, 3, 2, 2),
            {aten.conv2d.default, aten.permute.default, aten.reshape.default},
            id="transposed",
        ),
    ],
)
def test_module_becomes_a_convolution(module: nn.Module, operators: set[object]) -> None:
    module = randomize(module).double()
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    graph = to_integer_forms(capture(module, x))
    assert {node.target for node in graph.graph.nodes if node.op == "call_function"} == operators
    tolerance = REORDERED if aten.conv2d.default in operators else 0.0
    torch.testing.assert_close(graph(x)[0], module(x), rtol=tolerance, atol=tolerance)


class ClampedByBuffers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("low", torch.tensor(-0.25))
        self.register_buffer("high", torch.tensor([0.5]))
        self.register_buffer("each", torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.clamp(torch.clamp(x, self.low, self.high), max=self.each)


def test_clamps_by_constants_of_one_element_are_by_numbers() -> None:
    model, x = ClampedByBuffers(), torch.randn(2, 4, 5, 6)
    graph = to_integer_forms(capture(model, x))
    first, second = (node for node in graph.graph.nodes if node.op == "call_function")
    assert first.target is aten.clamp.default and first.args[1:] == (-0.25, 0.5)
    assert second.target is aten.clamp.Tensor
    assert torch.equal(graph(x)[0], model(x))


def test_resizing_to_a_multiple_names_the_factor() -> None:
    graph = to_integer_forms(capture(Function(lambda x: F.interpolate(x, size=(10, 18))), torch.randn(2, 4, 5, 6)))
    (node,) = (node for node in graph.graph.nodes if node.op == "call_function")
    assert node.args[1:] == (None, [2.0, 3.0])


@pytest.mark.parametrize(
    ("function", "bounds"),
    [
        pytest.param(F.relu, (0.0, float("inf")), id="relu"),
        pytest.param(lambda x: x.clamp(-1, 2), (-1.0, 2.0), id="clamp"),
        pytest.param(lambda x: x.clamp(max=3), (-float("inf"), 3.0), id="clamp-max"),
        pytest.param(torch.sigmoid, None, id="sigmoid"),
    ],
)
def test_clip_bounds(function: Callable[[Tensor], Tensor], bounds: tuple[float, float] | None) -> None:
    graph = capture(Function(function), torch.randn(2, 3))
    [node] = [node for node in graph.graph.nodes if node.op == "call_function"]
    assert clip_bounds(node) == bounds


def test_layer_scale_behind_a_gate_moves_onto_the_gate() -> None:
    class Scaled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * (x * torch.sigmoid(F.adaptive_avg_pool2d(x, 1)))

    model, x = Scaled(), torch.randn(2, 4, 5, 5)
    graph = to_integer_forms(capture(model, x))
    [convolution] = [node for node in graph.graph.nodes if node.target is aten.conv2d.default]
    assert convolution.meta["tensor_meta"].shape[2:] == (1, 1)
    torch.testing.assert_close(graph(x)[0], model(x), rtol=FACTORS, atol=FACTORS)


POOLS: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "resnet-d": (lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False), (4, 8, 8)),
    "resnet-d-odd": (lambda x: F.avg_pool2d(x, 2, 2, ceil_mode=True, count_include_pad=False), (4, 9, 7)),
    "ceiling": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True), (4, 10, 9)),
    "ceiling-uncounted": (lambda x: F.avg_pool2d(x, 3, 2, 1, ceil_mode=True, count_include_pad=False), (4, 10, 9)),
    "ceiling-cut": (lambda x: F.avg_pool2d(x, 2, 3, 1, ceil_mode=True), (4, 7, 8)),
    "divisor": (lambda x: F.avg_pool2d(x, 3, 2, 1, divisor_override=7), (4, 8, 8)),
    "sequence": (lambda x: F.avg_pool1d(x, 3, 2), (4, 19)),
    "sequence-ceiling": (lambda x: F.avg_pool1d(x, 3, 2, 1, True, False), (4, 20)),
}
EXACT_POOLS = {"resnet-d", "resnet-d-odd", "ceiling-cut", "sequence"}
"""Those without factors, or with powers of two."""


class Pooled(nn.Module):
    """An average pool between two convolutions."""

    def __init__(self, pool: Callable[[Tensor], Tensor], dims: int) -> None:
        super().__init__()
        make = nn.Conv2d if dims == 2 else nn.Conv1d
        self.first, self.second, self.pool = make(4, 4, 3, padding=1), make(4, 3, 1), pool

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(self.pool(F.relu(self.first(x))))
        return y


@pytest.mark.parametrize("name", POOLS)
def test_average_pools_of_every_kind_are_plain_ones(name: str, tmp_path: Path) -> None:
    """The runtime takes every average pool for a plain one, whatever its ceiling and divisor."""
    pool, shape = POOLS[name]
    model, x = randomize(Pooled(pool, len(shape) - 1)), torch.randn(5, *shape)
    graph = capture(model, x)
    tolerance = 0.0 if name in EXACT_POOLS else FACTORS
    with torch.no_grad():
        torch.testing.assert_close(to_integer_forms(graph)(x)[0], model(x), rtol=tolerance, atol=tolerance)
    result = calibrate(graph, [x])
    emit(result, tmp_path / "model.onnx")
    report = validate(tmp_path / "model.onnx", reference=result, batches=[x])
    report.raise_for_mismatch()


def test_pooling_of_images_without_channels(tmp_path: Path) -> None:
    model = randomize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1, 3)))
    x = torch.randn(5, 6, 8)
    result = calibrate(capture(model, x), [x])
    emit(result, tmp_path / "model.onnx")
    validate(tmp_path / "model.onnx", reference=result, batches=[x]).raise_for_mismatch()


def test_bounds_that_are_tensors(tmp_path: Path) -> None:
    class Clamped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 1)
            self.register_buffer("least", torch.tensor([-0.1, 0.0, 0.1, 0.2]).reshape(4, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return torch.clamp(self.conv(x), self.least, self.least + 0.5)

    model, x = randomize(Clamped()), torch.randn(5, 3, 4, 4)
    result = calibrate(capture(model, x), [x])
    emit(result, tmp_path / "model.onnx")
    validate(tmp_path / "model.onnx", reference=result, batches=[x]).raise_for_mismatch()
