"""Models and data that are legal and rare: every method takes them, or says in one sentence why not."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from calibrators import LayerRule, PlacementOptions, calibrate
from calibrators.errors import DataError, InputError, ModelError
from calibrators.mixed_precision.budgets import Budget
from exporter import capture, emit, fold
from runtime_tests import validate
from runtime_tests.ort.lint import lint
from runtime_tests.ort.sessions import session
from tests.support.networks import randomize

TRAINING = ("adaround", "brecq", "qdrop", "mrecg", "pdquant", "repapq")
OPTIONS: dict[str, dict[str, Any]] = {
    "mse": {},
    "gptq": {},
    "lapq": {"max_evals": 20, "samples": 16},
    **{name: {"iters": 4, "batch": 8} for name in TRAINING},
}
FOUR_BITS = PlacementOptions(weight_bits=4, activation_bits=4)


class FixedBatch(nn.Module):
    """Its batch is fixed: a reshape holds the number of samples that it was exported with."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.hidden, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8 * 16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.conv(x)).reshape(int(x.shape[0]), -1)
        z: Tensor = self.head(torch.relu(self.hidden(y)))
        return z


def fixed_batch(size: int) -> torch.export.ExportedProgram:
    return torch.export.export(randomize(FixedBatch()).eval(), (torch.randn(size, 3, 6, 6),))


@pytest.mark.parametrize("size", [1, 5])
@pytest.mark.parametrize("method", OPTIONS)
def test_a_fixed_batch(method: str, size: int) -> None:
    graph = capture(fixed_batch(size), torch.randn(size, 3, 6, 6))
    assert not graph.meta["dynamic_batch"]
    batches = [torch.randn(size, 3, 6, 6) for _ in range(40 // size)]
    options = OPTIONS[method] | ({"correct": 2} if method == "pdquant" else {})
    result = calibrate(graph, batches, method=method, options=options, placement=FOUR_BITS, bias_correction=True)
    assert all(bool(torch.isfinite(coded.qparams.scale).all()) for coded in result.weights.values())


class MaskedScores(nn.Module):
    """Attention with the usual causal mask: a buffer of zeros and minus infinities that scores are added to."""

    def __init__(self, mask: float = -math.inf) -> None:
        super().__init__()
        self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("mask", torch.full((5, 5), mask).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        scores = x @ self.key(x).transpose(1, 2) + self.mask
        y: Tensor = scores.softmax(-1) @ self.value(x)
        return y


def test_masks_hold_minus_infinity(tmp_path: Any) -> None:
    graph, batches = capture(randomize(MaskedScores()), torch.randn(4, 5, 8)), [torch.randn(16, 5, 8)]
    result = calibrate(graph, batches)
    emit(result, tmp_path / "model.onnx")
    validate(tmp_path / "model.onnx", reference=result, batches=batches).raise_for_mismatch()
    with pytest.raises(ModelError, match=r"mask' of .*holds NaN or infinity"):
        calibrate(capture(randomize(MaskedScores(math.nan)), torch.randn(4, 5, 8)), batches)


def test_weights_do_not() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model[0].weight.data[1, 1] = math.inf
    with pytest.raises(ModelError, match=r"'0\.weight' of linear .*holds NaN or infinity"):
        calibrate(capture(model, torch.randn(2, 3)), [torch.randn(4, 3)])


class FlattensLater(nn.Module):
    """Tokens are flattened behind a linear layer that reads them: the layer cannot share that reshape."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 6), nn.Linear(8, 4), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = torch.relu(self.a(x))
        z = x.reshape(-1, 8)
        return self.c(y), self.b(z)


class Siamese(nn.Module):
    """Two images stacked in front: a dimension of two that counts no samples."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.stack([x, x * 0.5])
        z = torch.relu(self.b(torch.relu(self.a(z))))
        y: Tensor = self.head(z[0] - z[1])
        return y


class Outputs(nn.Module):
    """Two layers, then what a test makes of them."""

    def __init__(self, make: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head, self.make = nn.Linear(8, 8), nn.Linear(8, 3), make
        self.register_buffer("table", torch.arange(8.0).reshape(2, 4))

    def forward(self, x: Tensor) -> Any:
        return self.make(self.head(torch.relu(self.body(x))))


class WithTable(Outputs):
    """A constant output beside the others, as detectors return their anchors."""

    def forward(self, x: Tensor) -> Any:
        return super().forward(x), self.table * 2


COMPARED: dict[str, Callable[[], nn.Module]] = {
    "row": lambda: Outputs(lambda y: y[:, 0]),
    "squeezed": lambda: Outputs(lambda y: y.mean(1)),
    "with-classes": lambda: Outputs(lambda y: (y, y.argmax(1))),
    "twice": lambda: Outputs(lambda y: (y, y)),
    "with-scalar": lambda: Outputs(lambda y: (y, y.mean())),
    "transposed-too": lambda: Outputs(lambda y: (y.t(), y)),
    "with-table": lambda: WithTable(lambda y: y),
    "siamese": Siamese,
}


@pytest.mark.parametrize("method", ["gptq", "lapq", "qdrop", "pdquant"])
@pytest.mark.parametrize("name", COMPARED)
def test_outputs_of_every_kind(name: str, method: str) -> None:
    graph = fold(capture(randomize(COMPARED[name]()), torch.randn(2, 8)))
    batches = [torch.randn(16, 8), torch.randn(9, 8)]
    calibrate(graph, batches, method=method, options=OPTIONS[method], placement=FOUR_BITS)


@pytest.mark.parametrize("name", COMPARED)
def test_their_sensitivities(name: str) -> None:
    graph = fold(capture(randomize(COMPARED[name]()), torch.randn(2, 8)))
    result = calibrate(graph, [torch.randn(16, 8)], placement=FOUR_BITS, sensitivity=True)
    assert result.record.sensitivity


@pytest.mark.parametrize(
    "make", [lambda y: y.argmax(1), lambda y: y.mean(), lambda y: y.t()], ids=["classes", "mean", "t"]
)
def test_nothing_to_compare_is_said(make: Callable[[Tensor], Any]) -> None:
    graph = capture(randomize(Outputs(make)), torch.randn(2, 8))
    batches = [torch.randn(16, 8)]
    calibrate(graph, batches, method="qdrop", options=OPTIONS["qdrop"])
    for wanted in ({"method": "lapq", "options": OPTIONS["lapq"]}, {"sensitivity": True}):
        with pytest.raises(InputError, match="no floating-point output with one row per sample"):
            calibrate(graph, batches, **wanted)  # type: ignore[arg-type]


def test_a_reshape_of_the_model_behind_the_layer() -> None:
    calibrate(capture(randomize(FlattensLater()), torch.randn(2, 5, 8)), [torch.randn(4, 5, 8)])


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ((torch.randn(4, 8), torch.zeros(4)), "has 2 tensors, but the model takes 1; .* labels"),
        (torch.randn(4, 8).double(), r"holds \[4, 8\] float64, but the model takes \[n, 8\] float32"),
        (torch.randn(4, 7), r"holds \[4, 7\] float32, but the model takes \[n, 8\]"),
        ((torch.randn(4, 8).numpy(),), "holds ndarray, but the model takes"),
    ],
    ids=["labels", "double", "narrow", "numpy"],
)
@pytest.mark.parametrize("method", ["mse", "qdrop", "lapq"])
def test_batches_that_do_not_fit(method: str, batch: Any, message: str) -> None:
    graph = capture(nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8))
    with pytest.raises(DataError, match=f"calibration batch 1 {message}"):
        calibrate(graph, [torch.randn(4, 8), batch], method=method, options=OPTIONS[method])


def test_inputs_of_different_lengths() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 4)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            z: Tensor = self.layer(x + y)
            return z

    graph = capture(Sum(), (torch.randn(2, 8), torch.randn(2, 8)))
    with pytest.raises(DataError, match=r"different numbers of samples: \[4, 1\]"):
        calibrate(graph, [(torch.randn(4, 8), torch.randn(1, 8))])


@pytest.mark.parametrize("method", ["qdrop", "mse"])
def test_a_generator_is_read_once(method: str) -> None:
    """A method that reads the data again says that it cannot."""
    graph = capture(nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8))
    batches = (torch.randn(4, 8) for _ in range(3))
    with pytest.raises(DataError, match="empty when read again"):
        calibrate(graph, batches, method=method, options=OPTIONS[method], bias_correction=True)


def test_the_callers_random_numbers_are_left_alone() -> None:
    graph = capture(nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8))
    torch.manual_seed(7)
    expected = torch.get_rng_state()
    calibrate(graph, [torch.ones(4, 8)], method="qdrop", options=OPTIONS["qdrop"])
    assert torch.equal(torch.get_rng_state(), expected)


def test_as_many_labels_as_samples() -> None:
    graph = capture(nn.Sequential(nn.Linear(8, 4)), torch.randn(2, 8))
    wanted: dict[str, Any] = {"lapq": {"method": "lapq", "options": {"loss": "ce"}}, "budget": {"sensitivity": True}}
    for options in wanted.values():
        with pytest.raises(InputError, match="there are 3 labels for 8 calibration samples"):
            calibrate(graph, [torch.randn(8, 8)], labels=torch.zeros(3, dtype=torch.int64), **options)


def test_sums_of_very_wide_layers_stay_in_int32(tmp_path: Any) -> None:
    """150,000 products of codes near their ends are more than 32 bits hold."""
    inputs = 150_528
    model = nn.Sequential(nn.Linear(inputs, 2))
    model[0].weight.data.fill_(1 / inputs)
    x = 0.9 + 0.1 * torch.rand(4, inputs)
    result = calibrate(capture(model, x), [x])
    emit(result, tmp_path / "model.onnx")
    validate(tmp_path / "model.onnx", reference=result, batches=[x]).raise_for_mismatch()
    [found] = session(tmp_path / "model.onnx").run(None, {"input": x.numpy()})
    assert torch.allclose(torch.from_numpy(found), model(x), rtol=0.02)
    assert [finding for finding in lint(tmp_path / "model.onnx") if finding.severity == "error"] == []


def test_zero_points_by_a_rule_where_bits_are_open() -> None:
    """Eight bits, which are tried as well, cannot have one."""
    graph = capture(randomize(nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))), torch.randn(2, 8))
    options = PlacementOptions(weight_bits=4, first_last_bits=None, layers=(LayerRule("2", symmetric=False),))
    budget = [Budget.parse("avg_weight_bits<=4.5")]
    result = calibrate(graph, [torch.randn(32, 8)], placement=options, budgets=budget)
    assert result.record.sensitivity


class MixedBounds(nn.Module):
    """Its clamp has a bound that is an int and one that is a float, which torch.onnx refuses."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).clamp(-1, 1.5)


def test_bounds_of_two_types(tmp_path: Path) -> None:
    x = torch.randn(8, 3, 6, 6)
    result = calibrate(fold(capture(randomize(MixedBounds()).eval(), x)), [x], method="minmax")
    emit(result, tmp_path / "model.onnx")
    validate(tmp_path / "model.onnx", reference=result, batches=[x]).raise_for_mismatch()


class MeanOfNormalized(nn.Module):
    """Its output is 0 up to rounding, so that no two libraries agree in any digit of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).mean((1, 2, 3), keepdim=True).flatten(1)


def test_outputs_near_zero(tmp_path: Any) -> None:
    batches = [torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))]
    torch.manual_seed(0)
    graph = capture(MeanOfNormalized().eval(), torch.randn(4, 3, 8, 8))
    result = calibrate(fold(graph), batches)
    emit(result, tmp_path / "model.onnx")
    parity = validate(tmp_path / "model.onnx", reference=result, batches=batches)
    parity.raise_for_mismatch()
    assert not parity.optimized.outputs_identical
