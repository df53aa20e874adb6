"""The reconstruction engine and its plain policies: AdaRound, BRECQ, QDrop."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx_ir
import pytest
import torch
from torch import Tensor, fx, nn

from calibrators.calibration import calibrate
from calibrators.errors import DataError, InputError, UnknownNameError
from calibrators.execution.quantizers import Rounding
from calibrators.execution.simulation import Simulation
from calibrators.graph.walk import walk
from calibrators.methods import get_method, list_methods
from calibrators.methods.qdrop import QDrop
from calibrators.placement.place import PlacementOptions
from calibrators.program.freeze import CalibrationResult
from calibrators.program.qdq_program import DEQUANTIZE
from calibrators.reconstruction import training
from calibrators.reconstruction.fisher import importances
from calibrators.reconstruction.policy import BlockReconstruction
from calibrators.reconstruction.reconstruct import Run
from calibrators.reconstruction.training import Unit
from exporter.emission.build_model import to_onnx
from exporter.frontend.capture import capture
from runtime_tests.proof import parity
from tests.support.folded import folded_network, output_error
from tests.support.networks import randomize

METHODS = {
    "adaround": {},
    "brecq": {},
    "brecq fisher": {"fisher": True},
    "qdrop": {},
    "mrecg": {},
    "repapq": {},
    "repapq squares": {"measure": "mse", "affine": False},
    "pdquant": {},
    "pdquant all": {"prediction": 10.0, "reach": "all"},
}
OWN_ERROR = ("adaround", "brecq", "qdrop", "mrecg")
"""Methods whose loss is the squared error of the unit alone."""


def calibrated(name: str, method: Any, bits: tuple[int, int] = (4, 4), **settings: Any) -> CalibrationResult:
    """Calibrate for a target that limits no pairs of weights, so that training alone decides their codes."""
    settings = {"target": "ort-cpu-vnni", **settings}
    graph, inputs = folded_network(name)
    options = settings.pop("options", {})
    if isinstance(method, str):
        options = {"iters": 20, "batch": 16, **METHODS.get(method, {}), **options} if method in METHODS else options
        method = method.split()[0]
    batches = [tuple(x[i : i + 16] for x in inputs) for i in range(0, 64, 16)]
    placement = PlacementOptions(weight_bits=bits[0], activation_bits=bits[1])
    return calibrate(graph, batches, method=method, options=options, placement=placement, **settings)


def absolute_error(result: CalibrationResult, graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> float:
    """Relative mean absolute error of the network's output."""
    with torch.no_grad():
        (wanted,), (y,) = graph(*inputs), result.program(*inputs)
    return float((y - wanted).abs().sum() / wanted.abs().sum())


def divergence(result: CalibrationResult, graph: fx.GraphModule, inputs: tuple[Tensor, ...]) -> float:
    """Mean KL divergence of the network's prediction from the float one."""
    with torch.no_grad():
        (wanted,), (y,) = graph(*inputs), result.program(*inputs)
    return float(torch.nn.functional.kl_div(y.log_softmax(1), wanted.log_softmax(1), log_target=True, reduction="sum"))


MEASURES = {"repapq": absolute_error, "pdquant all": divergence}
"""The error that a method makes small, where that is not the squared error."""


def integers(result: CalibrationResult) -> list[Tensor]:
    coded = [*result.weights.values(), *result.biases.values()]
    scales = [q for p in result.activations.values() for q in (p.scale, p.zero_point)]
    return [*scales, *(c.codes for c in coded), *(c.qparams.scale for c in coded)]


def same(one: CalibrationResult, other: CalibrationResult) -> bool:
    return all(torch.equal(a, b) for a, b in zip(integers(one), integers(other), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_every_method_is_proved_in_the_runtime(method: str) -> None:
    result = calibrated("residual", method)
    report = parity(
        onnx_ir.to_proto(to_onnx(result.program, opset=20)),
        result.program,
        [folded_network("residual")[1]],
        optimized=True,
    )
    assert (report.mismatched, report.outputs_identical) == (0, True)


@pytest.mark.parametrize("name", ["pooled", "mlp", "transformer"])
def test_every_kind_of_network_is_proved_in_the_runtime(name: str) -> None:
    result = calibrated(name, "qdrop")
    report = parity(
        onnx_ir.to_proto(to_onnx(result.program, opset=20)), result.program, [folded_network(name)[1]], optimized=True
    )
    assert report.kernel_mismatched == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["residual", "pooled", "mlp"])
def test_training_improves_on_nearest_rounding(name: str, method: str) -> None:
    measured, network = MEASURES.get(method, output_error), folded_network(name)
    nearest = measured(calibrated(name, "mse", (3, 4)), *network)
    assert measured(calibrated(name, method, (3, 4), options={"iters": 150}), *network) < 0.9 * nearest


@pytest.mark.parametrize("method", METHODS)
def test_units_never_get_worse_and_say_so(method: str) -> None:
    units = calibrated("pooled", method).record.reconstruction.units
    assert all(unit.loss_after <= unit.loss_before for unit in units)
    assert any(unit.loss_after < unit.loss_before for unit in units)
    if method in OWN_ERROR:
        assert all(unit.after == pytest.approx(unit.loss_after, rel=1e-5) for unit in units)


@pytest.mark.parametrize("method", METHODS)
def test_eight_bits_lose_nothing_against_nearest_rounding(method: str) -> None:
    trained = calibrated("residual", method, (8, 8), options={"iters": 100})
    nearest = calibrated("residual", "mse", (8, 8))
    network = folded_network("residual")
    assert output_error(trained, *network) <= 1.02 * output_error(nearest, *network)


def test_same_seed_same_integers_other_seed_others() -> None:
    first = calibrated("residual", "qdrop", seed=3)
    assert same(first, calibrated("residual", "qdrop", seed=3))
    assert not same(first, calibrated("residual", "qdrop", seed=4))


def test_keeping_everything_is_brecq() -> None:
    options = {"keep": 1.0, "iters": 20, "batch": 16}
    assert same(calibrated("residual", "qdrop", options=options), calibrated("residual", "brecq"))


@pytest.mark.parametrize("memory", [4.0, 1e-6])
def test_where_activations_are_cached_changes_nothing(memory: float) -> None:
    result = calibrated("pooled", "qdrop", cache_gib=memory)
    assert (result.record.reconstruction.spilled_bytes > 0) == (memory < 1)
    assert same(result, calibrated("pooled", "qdrop"))


@dataclass(frozen=True)
class _Spy(QDrop):
    """Keeps what every unit reads."""

    def prepare(self, unit: Unit, run: Run) -> Unit:
        everything = torch.arange(64)
        for name, cache in zip(unit.block.inputs, unit.inputs, strict=True):
            SEEN[name] = cache.gather(everything)
        return unit


SEEN: dict[str, Tensor] = {}


@pytest.mark.parametrize("name", ["residual", "pooled", "transformer"])
def test_streamed_activations_equal_a_full_run_from_the_input(name: str) -> None:
    SEEN.clear()
    result = calibrated(name, _Spy(iters=5, batch=16))
    inputs = folded_network(name)[1]
    values: dict[str, Tensor] = {}
    sites = result.placement.by_name

    with torch.no_grad():
        for node, alive in walk(result.program, inputs):
            site = sites.get(str(node.args[-1])) if node.target is DEQUANTIZE else None
            if site is not None and site.kind == "activation":
                values[site.node] = alive[node]
            values.setdefault(node.name, alive[node])
    quantized_inputs = {node.name for node in result.placement.graph.graph.nodes if node.op == "placeholder"}
    crossing = [n for n in SEEN if n not in quantized_inputs]
    assert crossing
    for name in crossing:
        assert torch.equal(SEEN[name], values[name]), name


def test_biases_are_learned_where_the_network_has_none() -> None:
    model = randomize(nn.Sequential(nn.Linear(8, 16, bias=False), nn.ReLU(), nn.Linear(16, 4, bias=False)))
    x = torch.randn(64, 8)
    options = PlacementOptions(weight_bits=2, first_last_bits=None)
    result = calibrate(capture(model, x), [x], method="qdrop", options={"iters": 20}, placement=options)
    assert any(bool(coded.codes.any()) for coded in result.biases.values())


def test_a_unit_is_gone_when_it_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the garbage collector: what it holds may be memory of a GPU, and graphs that must not go at any time."""
    alive: list[weakref.ref[Any]] = []
    create = training._Trainer.__init__

    def watched(self: Any, *arguments: Any) -> None:
        assert not [trainer for trainer in alive if trainer() is not None]
        alive.append(weakref.ref(self))
        create(self, *arguments)

    monkeypatch.setattr(training._Trainer, "__init__", watched)
    gc.disable()
    try:
        calibrated("residual", "qdrop")
    finally:
        gc.enable()
    assert len(alive) > 1


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="this torch has the older flag alone")
@pytest.mark.parametrize("given", ["tf32", "ieee"])
def test_a_gpu_convolves_in_float32(given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a method is at work, whatever stands there; afterwards it stands there again."""
    conv: Any = torch.backends.cudnn.conv
    seen = []
    fit = QDrop.fit
    monkeypatch.setattr(QDrop, "fit", lambda *given: seen.append(conv.fp32_precision) or fit(*given))
    folded_network("mlp")  # torch.export refuses to capture where conv and rnn differ
    before = conv.fp32_precision
    try:
        conv.fp32_precision = given
        calibrated("mlp", "qdrop", options={"iters": 1})
        assert conv.fp32_precision == given
    finally:
        conv.fp32_precision = before
    assert seen == ["ieee"]


def test_the_regularizer_waits_and_then_anneals(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[float, float]] = []
    backward = Rounding.backward

    def spy(self: Rounding, strength: float, beta: Tensor) -> None:
        seen.append((strength, float(beta)))
        backward(self, strength, beta)

    monkeypatch.setattr(Rounding, "backward", spy)
    calibrated("mlp", "brecq", options={"iters": 50, "warmup": 0.2, "chain": 100})
    strengths, betas = zip(*seen[:50], strict=True)
    assert all(s == 0 for s in strengths[:10]) and all(s > 0 for s in strengths[10:])
    assert set(betas[:11]) == {20.0} and betas[-1] < 3.0
    assert all(b > a for a, b in zip(betas[11:], betas[10:], strict=False))


def test_rounding_is_decided_at_the_end() -> None:
    units = calibrated("residual", "brecq", options={"iters": 600}).record.reconstruction.units
    assert max(unit.undecided for unit in units) < 0.2


def test_adaround_has_one_layer_per_unit() -> None:
    units = calibrated("residual", "adaround").record.reconstruction.units
    assert [unit.weights for unit in units] == [1] * len(units)
    assert len(units) == 4


def test_adaround_leaves_activation_scales_alone() -> None:
    one, other = calibrated("residual", "adaround"), calibrated("residual", "mse")
    assert all(torch.equal(one.activations[n].scale, other.activations[n].scale) for n in other.activations)
    trained = calibrated("residual", "brecq", options={"iters": 150})
    assert any(not torch.equal(trained.activations[n].scale, other.activations[n].scale) for n in other.activations)


def test_known_activation_ranges_stay() -> None:
    result = calibrated("pooled", "brecq")
    fixed = [site for site in result.placement.sites if site.fixed is not None]
    assert fixed
    assert all(float(result.activations[site.name].scale) == site.fixed[0] for site in fixed if site.fixed)


def test_divergence_is_one_message() -> None:
    with pytest.raises(DataError, match=r"training diverged: the loss of unit"):
        calibrated("mlp", "brecq", options={"scale_lr": 1e5})


def test_data_that_can_be_read_once_only() -> None:
    graph, inputs = folded_network("mlp")

    def once() -> Iterator[tuple[Tensor, ...]]:
        yield inputs

    with pytest.raises(DataError, match="read again"):
        calibrate(graph, once(), method="qdrop", options={"iters": 1})


@pytest.mark.parametrize("options", [{"iters": -1}, {"batch": 0}, {"keep": 1.5}, {"preset": "slow"}, {"warmup": 1.0}])
def test_options_out_of_range(options: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        get_method("qdrop", options)


def test_options_are_listed_with_defaults() -> None:
    listed = {method.name: {option.name for option in method.options} for method in list_methods()}
    shared = {"preset", "iters", "batch", "lr", "scale_lr", "strength", "chain", "ranges"}
    assert shared | {"keep"} <= listed["qdrop"]
    assert shared | {"fisher"} <= listed["brecq"]


@pytest.mark.parametrize("name", ["chain", "scale_lr"])
def test_an_option_that_a_method_does_not_read_is_refused(name: str) -> None:
    with pytest.raises(UnknownNameError, match="unknown adaround option"):
        get_method("adaround", {name: 2})


def test_more_samples_per_step_than_there_are() -> None:
    assert calibrated("mlp", "qdrop", options={"batch": 1000, "iters": 3}).record.reconstruction.units


def test_importance_is_the_mean_square_of_gradients() -> None:
    """A linear map to one projected output: the gradient of element i is the signed sum of its weights."""
    weight = torch.tensor([[1.0], [2.0], [4.0]])

    class Net(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.unsqueeze((x + 1.0) @ weight, -1)

    graph = fx.symbolic_trace(Net())
    value = next(n for n in graph.graph.nodes if n.op == "call_function").name
    with torch.no_grad():
        plain = fx.GraphModule(graph, graph.graph)
    plain.graph.output_node().args = ((plain.graph.output_node().args[0],),)
    plain.recompile()
    batches = [(torch.randn(5, 3),), (torch.randn(3, 3),)]
    found = importances(plain, [value], batches, torch.Generator().manual_seed(0))[value]
    assert torch.allclose(found.elements, torch.tensor([1.0, 4.0, 16.0]) / 7.0)
    assert torch.allclose(found.samples, torch.ones(8))


def test_base_is_a_policy_of_its_own() -> None:
    settings = BlockReconstruction(iters=40).settings()
    assert (settings.lr, settings.scale_lr, settings.keep) == (0.25, 1 / 40, 1.0)
    assert BlockReconstruction(preset="best").settings().iters > BlockReconstruction().settings().iters


@pytest.mark.parametrize(
    ("fast", "precision", "bits", "wanted"),
    [
        (True, "auto", 4, (torch.bfloat16, torch.bfloat16)),
        (True, "auto", 8, (torch.float32, torch.bfloat16)),
        (False, "auto", 4, (torch.float32, torch.float32)),
        (True, "float32", 4, (torch.float32, torch.float32)),
        (False, "bfloat16", 8, (torch.bfloat16, torch.bfloat16)),
    ],
)
def test_units_train_in_bfloat16_where_it_is_fast_and_does_not_show(
    fast: bool, precision: str, bits: int, wanted: tuple[torch.dtype, torch.dtype], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Values and gradients of the middle unit of the network; the first and last layers have 8 bits."""
    seen: dict[str, tuple[torch.dtype, torch.dtype]] = {}
    train_in = Simulation.train_in

    def note(self: Simulation, values: torch.dtype, gradients: torch.dtype) -> None:
        seen[self.block.name] = values, gradients
        train_in(self, values, gradients)

    monkeypatch.setattr("calibrators.reconstruction.reconstruct.computes_bfloat16", lambda device: fast)
    monkeypatch.setattr(Simulation, "train_in", note)
    calibrated("mlp", "brecq", (bits, 8), options={"iters": 2, "chain": 1, "precision": precision})
    assert [*seen.values()][1] == wanted
