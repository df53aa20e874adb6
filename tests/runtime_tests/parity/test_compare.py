"""The proof passes on honest files and fails on every kind of dishonest one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from calibrators.calibration import calibrate
from calibrators.errors import DataError
from calibrators.graph.operators import MOVES, facts
from calibrators.program.freeze import CalibrationResult
from exporter import capture, fold
from runtime_tests.ort.sessions import Model
from runtime_tests.ort.simplifier import simplify
from runtime_tests.parity.compare import Comparison, _OutputTally, weight_agreements
from runtime_tests.parity.probes import codes_of, results_of
from runtime_tests.parity.results import (
    FLOAT_CHANCE,
    Agreement,
    Level,
    NodeParity,
    OutputParity,
    ParityError,
    legal_rate,
)
from runtime_tests.proof import LARGEST_BATCH, parity, validate
from runtime_tests.reference.execute import FLOAT, KernelPlan, plan, rounded_in, run
from runtime_tests.reference.kernel_plan import COUNTED
from tests.runtime_tests.reference.programs import NETWORKS, Program, emitted, file_of, network
from tests.support.onnx_models import optimized_model
from tests.support.stored import stored

FLOAT_KERNELS = {"Conv", "FusedConv", "Gemm", "MatMul"}


def honest(name: str, bits: int = 8) -> tuple[CalibrationResult, Tensor, onnx.ModelProto]:
    return *network(name, bits), emitted(name, bits)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("residual", 8), ("mobile", 8), ("gated", 8), ("residual", 4)],
    ids=["residual", "mobile", "gated", "residual-4-bit"],
)
def test_integer_networks_agree_in_every_code_and_bit(name: str, bits: int) -> None:
    result, x, model = honest(name, bits)
    report = parity(model, result.program, [(x,), (x * 1.5,)], optimized=True)
    assert (report.mismatched, report.max_lsb, report.forced) == (0, 0, Agreement(report.values, 0, 0))
    assert report.values > 10_000
    assert all(site.kernel != FLOAT for site in report.nodes), [(s.site, s.reason) for s in report.nodes]
    assert report.outputs_identical
    assert all(output.exact for output in report.outputs)
    assert report.samples == 2 * len(x)
    assert report.worst == ()
    assert (report.violations, report.unplanned) == (0, {})
    report.raise_for_mismatch()


@pytest.mark.parametrize("name", NETWORKS)
def test_both_levels_pass(name: str) -> None:
    result, x, model = honest(name)
    validation = validate(model, reference=result, batches=[x])
    validation.raise_for_mismatch()
    assert validation.optimized.kernel_mismatched == 0
    assert set(validation.unoptimized.kernels) <= {"QuantizeLinear", FLOAT}
    for level in (validation.optimized, validation.unoptimized):
        assert level.values == sum(node.values for node in level.nodes)
    floats = [node for node in validation.optimized.nodes if node.site not in plan(result.program).sites]
    assert validation.optimized.values == validation.unoptimized.values + sum(node.values for node in floats)


def test_floats_of_integer_kernels_are_compared_bit_by_bit() -> None:
    """A bias that is off by one hides within the tolerance of the codes after the float operators that read it."""
    result, x, model = honest("perceptron")
    report = parity(model, result.program, [(x,)], optimized=True)
    floats = {node.site: node for node in report.nodes if node.kernel == "QGemm"}
    assert len(floats) == 2 and all(node.legal and node.rate == 0 and node.values for node in floats.values())
    (name, *_) = (tensor.name for tensor in model.graph.initializer if tensor.name.endswith("bias_quantized"))
    wrong = rewritten(model, name, values(model, name) + np.int32(1))
    found = parity(wrong, result.program, [(x,)], optimized=True)
    differing = [node for node in found.nodes if node.site in floats and node.mismatched]
    (bias,) = (node for node in found.nodes if node.site == name.removesuffix("_quantized"))
    assert len(differing) == 1 and not differing[0].legal and found.violations >= 1
    assert found.kernel_mismatched == differing[0].mismatched + bias.mismatched and bias.mismatched == bias.values


def test_linear_layers_around_float_operators_are_integer_kernels() -> None:
    result, x, model = honest("perceptron")
    report = parity(model, result.program, [(x,)], optimized=True)
    kinds = {node.op_type for node in optimized_model(model).graph.node}
    assert "QGemm" in kinds
    assert not kinds & FLOAT_KERNELS
    assert {site.reason for site in report.nodes if site.kernel == FLOAT} == {
        "layer_norm has no integer kernel",
        "gelu has no integer kernel",
    }


def test_batches_add_up() -> None:
    result, x, model = honest("residual")
    whole = parity(model, result.program, [(x,)], optimized=False)
    parts = parity(model, result.program, ((part,) for part in x.split(1)), optimized=False)
    assert parts.values == whole.values
    assert parts.samples == whole.samples


def test_a_large_batch_is_compared_to_its_last_sample() -> None:
    result, x, model = honest("residual")
    many = x.repeat(LARGEST_BATCH // len(x), 1, 1, 1)
    more = torch.cat([many, x[:1]])
    one, two = (parity(model, result.program, [(batch,)], optimized=True) for batch in (many, more))
    assert (one.samples, two.samples) == (LARGEST_BATCH, LARGEST_BATCH + 1)
    assert two.values * LARGEST_BATCH == one.values * (LARGEST_BATCH + 1)


# --- files that lie --------------------------------------------------------------------------------------------------


def initializer(model: onnx.ModelProto, ending: str) -> onnx.TensorProto:
    (found,) = (tensor for tensor in model.graph.initializer if tensor.name.endswith(ending))
    return found


def rewritten(model: onnx.ModelProto, ending: str, value: np.ndarray) -> onnx.ModelProto:
    model = onnx.ModelProto.FromString(model.SerializeToString())
    tensor = initializer(model, ending)
    tensor.CopyFrom(numpy_helper.from_array(value, tensor.name))
    return model


def values(model: onnx.ModelProto, ending: str) -> np.ndarray:
    return numpy_helper.to_array(initializer(model, ending)).copy()


def perturbed_scale(model: onnx.ModelProto) -> onnx.ModelProto:
    """An activation scale 1 % off."""
    return rewritten(model, "relu_scale", values(model, "relu_scale") * np.float32(1.01))


def weight_scales_almost_right(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every weight scale of one convolution 1e-5 larger, and its bias scale with it."""
    scale = values(model, "body.weight_scale") * np.float32(1 + 1e-5)
    model = rewritten(model, "body.weight_scale", scale)
    return rewritten(model, "body.bias_scale", values(model, "relu_scale") * scale)


def flipped_weight_code(model: onnx.ModelProto) -> onnx.ModelProto:
    codes = values(model, "body.weight_quantized")
    codes[3, 2, 1, 1] = -codes[3, 2, 1, 1] or 1
    return rewritten(model, "body.weight_quantized", codes)


def shifted_zero_point(model: onnx.ModelProto) -> onnx.ModelProto:
    return rewritten(model, "body.conv2d_zero_point", values(model, "body.conv2d_zero_point") + np.uint8(1))


def bias_off_by_one(model: onnx.ModelProto) -> onnx.ModelProto:
    return rewritten(model, "head.bias_quantized", values(model, "head.bias_quantized") + np.int32(1))


def added_to_bias(model: onnx.ModelProto, steps: float = 0.0) -> onnx.ModelProto:
    """A constant of some steps added to the bias of the head, whose product then runs in float."""
    scale = values(model, "head.bias_scale")
    model = onnx.ModelProto.FromString(model.SerializeToString())
    (dequantize,) = (node for node in model.graph.node if "head.bias_quantized" in node.input)
    bias = dequantize.output[0]
    for node in model.graph.node:
        node.input[:] = ["sum" if name == bias else name for name in node.input]
    more = (scale * np.full(len(values(model, "head.bias_quantized")), steps)).astype(np.float32)
    model.graph.initializer.append(numpy_helper.from_array(more, "more"))
    index = [*model.graph.node].index(dequantize) + 1
    model.graph.node.insert(index, onnx.helper.make_node("Add", [bias, "more"], ["sum"]))
    return model


LIES = {
    "scale": perturbed_scale,
    "weight-code": flipped_weight_code,
    "zero-point": shifted_zero_point,
}


@pytest.mark.parametrize("optimized", [True, False], ids=["optimized", "unoptimized"])
@pytest.mark.parametrize("name", LIES)
def test_wrong_codes_are_found_where_they_arise(name: str, optimized: bool) -> None:
    result, x, model = honest("residual")
    report = parity(LIES[name](model), result.program, [(x,)], optimized=optimized)
    assert report.mismatched > 0
    assert report.forced.mismatched > 0
    with pytest.raises(ParityError, match=r"codes of '(relu|body)") as caught:
        report.raise_for_mismatch()
    assert caught.value.exit_code == 1
    assert repr(next(site.site for site in report.nodes if not site.legal)) in str(caught.value)


def test_teacher_forcing_names_the_node_and_not_its_victims() -> None:
    """One flipped weight code spoils all that follows end to end; node by node only itself and its convolution."""
    result, x, model = honest("residual")
    report = parity(flipped_weight_code(model), result.program, [(x,)], optimized=True)
    assert [site.site for site in report.nodes if site.mismatched] == ["body.weight", "body.conv2d"]
    assert len([site for site in report.nodes if site.end_to_end.mismatched]) > 1
    assert {site.site for site in report.worst} == {"body.weight", "body.conv2d"}
    assert all(output.per_node_identical and not output.identical for output in report.outputs)


def test_a_kernel_that_did_not_run_is_named() -> None:
    result, x, model = honest("residual")
    report = parity(added_to_bias(model), result.program, [(x,)], optimized=True)
    assert report.unplanned == {"QGemm": -1}
    assert all(node.legal for node in report.nodes)
    with pytest.raises(ParityError, match="1 fewer QGemm"):
        dataclasses.replace(report, outputs=()).raise_for_mismatch()


def test_a_kernel_that_the_runtime_adds_by_itself_is_named() -> None:
    """Float weights between codes, without the clip that hides the codes: onnxruntime quantizes them on its own."""
    p = Program()
    x = p.quantized(p.input(1, 4, 6, 6))
    weight, bias = p.constant("w", torch.ones(4, 4, 1, 1)), p.constant("b", torch.ones(4))
    program = p.build(p.quantized(p.call(torch.ops.aten.conv2d.default, x, weight, bias)))
    report = parity(file_of(program), program, [tuple(p.example)], optimized=True)
    assert report.unplanned == {"QLinearConv": 1}
    with pytest.raises(ParityError, match=r"1 more QLinearConv|codes of"):
        report.raise_for_mismatch()


def test_every_planned_kernel_is_counted() -> None:
    """A kernel that the plan knows and the count does not would hide."""
    planned = {step.kernel for name in NETWORKS for step in plan(network(name)[0].program).steps if step.is_integer}
    moves = {"QuantizeLinear", *(facts(name).onnx for name in MOVES)}
    assert planned - moves <= set(COUNTED)
    assert {site for name in NETWORKS for site in plan(network(name)[0].program).counts} == set(COUNTED)


def test_wrong_outputs_are_found_although_all_codes_agree() -> None:
    result, x, model = honest("residual")
    report = parity(added_to_bias(model, 0.4), result.program, [(x,)], optimized=True)
    assert report.forced.mismatched == 0
    assert report.violations == 1
    with pytest.raises(ParityError, match="output 'output' differs"):
        report.raise_for_mismatch()


def test_a_bias_is_compared_as_it_is_stored() -> None:
    result, x, model = honest("residual")
    report = parity(bias_off_by_one(model), result.program, [(x,)], optimized=True)
    assert [(node.site, node.mismatched) for node in report.nodes if node.mismatched] == [("head.bias", 10)]
    with pytest.raises(ParityError, match=r"head\.bias"):
        report.raise_for_mismatch()


def test_a_change_of_one_in_a_hundred_thousand_is_found() -> None:
    """No accuracy figure would show it."""
    result, x, model = honest("residual")
    report = parity(weight_scales_almost_right(model), result.program, [(x * 2,)], optimized=True)
    (node,) = (node for node in report.nodes if node.site == "body.conv2d")
    assert 0 < node.mismatched < 1e-2 * node.values and node.max_lsb == 1
    (weight,) = (node for node in report.nodes if node.site == "body.weight")
    assert weight.mismatched == weight.values, "every code stands for another value"
    with pytest.raises(ParityError, match=r"body\.weight"):
        report.raise_for_mismatch()


# --- bad input -------------------------------------------------------------------------------------------------------


def test_nothing_compared_is_no_proof() -> None:
    result, _, model = honest("residual")
    with pytest.raises(DataError, match="no batch"):
        parity(model, result.program, [], optimized=True)
    with pytest.raises(DataError, match="no batch"):
        parity(model, result.program, [(torch.zeros(0, 3, 16, 16),)], optimized=True)
    with pytest.raises(DataError, match="no batch"):
        validate(model, reference=result, batches=[])


def test_number_of_inputs() -> None:
    result, x, model = honest("residual")
    with pytest.raises(DataError, match="2 tensors, but the model has 1 inputs: x"):
        parity(model, result.program, [(x, x)], optimized=True)


def test_a_file_of_another_program_is_refused() -> None:
    with pytest.raises(ParityError, match="belongs to another program"):
        parity(honest("gated")[2], honest("residual")[0].program, [(honest("residual")[1],)], optimized=True)


# --- what is legal ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kernel", "found", "legal"),
    [
        ("QLinearConv", Agreement(10**6, 0, 0), True),
        ("QLinearConv", Agreement(10**6, 1, 1), False),
        (FLOAT, Agreement(100, FLOAT_CHANCE, 1), True),
        (FLOAT, Agreement(100, FLOAT_CHANCE + 1, 1), False),
        (FLOAT, Agreement(10**6, 100, 1), True),
        (FLOAT, Agreement(10**6, 1, 2), False),
        (FLOAT, Agreement(10**6, 1000, 1), False),
    ],
    ids=["integer", "integer-one-off", "few", "too-many-of-few", "rare", "two-steps", "too-many"],
)
def test_legal_differences(kernel: str, found: Agreement, legal: bool) -> None:
    site = NodeParity.of("s", kernel, found, Agreement(found.values, 0, 0), rate=legal_rate(kernel))
    report = Level.of([site], [], samples=1)
    assert site.legal == legal
    assert report.violations == (not legal)
    if legal:
        report.raise_for_mismatch()
    else:
        with pytest.raises(ParityError, match="'s'"):
            report.raise_for_mismatch()


@dataclass(frozen=True)
class _OffByOne:
    """A runtime whose codes at one site are one step off where a function of the floats that are rounded says so."""

    plan: KernelPlan
    keys: Sequence[str]
    site: str
    where: Callable[[Tensor], Tensor]
    name: str = "off by one"
    kernel_rate: float = 0.0
    float_factor: float = 1.0
    output_names: Sequence[str] = ("output",)

    def run(self, inputs: Sequence[np.ndarray]) -> tuple[list[np.ndarray], list[np.ndarray]]:
        batch = [*map(torch.from_numpy, inputs)]
        others = {self.site: run(self.plan, batch)[0][self.site] ^ 1}
        floats = run(self.plan, batch, others, with_floats=True)[0][rounded_in(self.site)]
        flips = self.where(floats).to(torch.uint8)
        codes, outputs = run(
            self.plan,
            batch,
            disturb=lambda site, codes: codes ^ flips if site == self.site else codes,
            with_floats=True,
        )
        codes[self.site] ^= flips
        return [y.numpy() for y in outputs], [codes[key].numpy() for key in self.keys]

    def executed(self) -> None:
        return None


@pytest.mark.parametrize(
    ("where", "legal"),
    [
        pytest.param(lambda floats: floats == floats.flatten()[0], True, id="one-value-often"),
        pytest.param(lambda floats: torch.arange(floats.numel()).reshape(floats.shape) % 97 == 96, False, id="many"),
    ],
)
def test_equal_floats_stand_next_to_the_same_tie(where: Callable[[Tensor], Tensor], legal: bool) -> None:
    """The tokens of padded windows repeat: a tie that is met once differs in all of them."""
    result, x, model = honest("perceptron")
    steps = plan(result.program)
    inputs = torch.cat([x, x[:1].expand(400, *x.shape[1:])])
    site = next(name for name in steps.sites if steps.by_site[name].kernel == FLOAT)
    file = Model(model)
    keys = [*codes_of(steps), *results_of(file, steps)]
    comparison = Comparison(lambda probes: _OffByOne(steps, keys, site, where), file, steps, {})
    comparison.add((inputs,), *run(steps, (inputs,), with_floats=True))
    (found,) = (node for node in comparison.report().nodes if node.site == site)
    assert found.mismatched > FLOAT_CHANCE + found.rate * found.values
    assert found.legal == legal


@pytest.mark.parametrize(
    ("found", "legal"),
    [
        (Agreement(10**6, 20_000, 1), True),
        (Agreement(10**6, 40_000, 1), False),
        (Agreement(10**6, 1, 2), False),
    ],
    ids=["dense-ties", "too-many", "two-steps"],
)
def test_a_grid_of_16_bits_has_256_times_the_ties(found: Agreement, legal: bool) -> None:
    assert NodeParity.of("s", FLOAT, found, found, rate=legal_rate(FLOAT, bits=16)).legal == legal
    assert not NodeParity.of("s", FLOAT, found, found, rate=legal_rate(FLOAT)).legal


@pytest.mark.parametrize(
    ("exact", "identical", "relative", "legal"),
    [(True, True, 0.0, True), (True, False, 1e-9, False), (False, False, 1e-6, True), (False, False, 1e-3, False)],
    ids=["exact", "exact-one-bit", "float", "float-far"],
)
def test_legal_outputs(exact: bool, identical: bool, relative: float, legal: bool) -> None:
    bits = {"identical": identical, "per_node_identical": identical}
    assert OutputParity.of("y", exact=exact, **bits, max_abs=0.0, relative=relative).legal == legal


def test_sums_of_agreements() -> None:
    assert Agreement(10, 1, 3) + Agreement(5, 2, 1) == Agreement(15, 3, 3)


def test_infinities_do_not_hide_a_difference() -> None:
    inf = float("inf")
    cases = (
        ([1.0, 2.0, -inf], [1.0, 2.0, -inf], 0.0),
        ([1.0, 2.0, -inf], [1.0, 1.0, -inf], 1.0),
        ([1.0, 2.0, -inf], [1.0, 2.0, inf], np.inf),
        ([1.0, 2.0, 3.0], [1.0, 2.0, inf], np.inf),
        ([inf, inf, inf], [inf, inf, -inf], np.inf),
    )
    for ours, theirs, relative in cases:
        tally = _OutputTally()
        tally.add(torch.tensor(ours), torch.tensor(ours), torch.tensor(theirs))
        assert tally.relative == relative


def test_outputs_that_are_no_floats_are_compared() -> None:
    tally = _OutputTally()
    tally.add(torch.tensor([True]), torch.tensor([True]), torch.tensor([False]))
    assert tally.relative == np.inf and not tally.identical


def test_outputs_of_zeros_or_nan_do_not_hide_a_difference() -> None:
    zeros, ones, nan = torch.zeros(3), torch.ones(3), torch.full((3,), float("nan"))
    for ours, theirs, relative in ((ones, zeros, np.inf), (nan, nan, 0.0), (ones, nan, np.inf), (nan, ones, np.inf)):
        tally = _OutputTally()
        tally.add(ours, ours, theirs)
        assert tally.relative == relative
        assert tally.identical == (relative == 0)


@pytest.mark.parametrize(("difference", "legal"), [(3e-8, True), (1e-3, False)], ids=["rounding", "wrong"])
def test_an_output_of_cancelled_terms_is_judged_by_the_terms(difference: float, legal: bool) -> None:
    tally = _OutputTally()
    ours = torch.tensor([1e-8, -2e-8])
    tally.add(ours, ours, ours + difference, lambda: 1.0)
    assert tally.relative == pytest.approx(difference, rel=1e-2)
    assert OutputParity.of("y", exact=False, **asdict(tally)).legal == legal


def test_a_bias_of_zeros_is_found_where_the_simplifier_merged_it_with_a_zero_point() -> None:
    torch.manual_seed(0)
    x = torch.randn(8, 3, 6, 6)
    network = nn.Sequential(
        nn.Conv2d(3, 8, 1), nn.GELU(), nn.Conv2d(8, 8, 1, bias=False), nn.GELU(), nn.Conv2d(8, 8, 1)
    )
    result = calibrate(fold(capture(network.eval(), x)), [x], method="minmax")
    simpler, report = simplify(stored(result), {"input": x.numpy()})
    assert report.applied and "2.bias_quantized" not in {value.name for value in simpler.graph.initializer}
    validate(simpler, reference=result, batches=[x]).raise_for_mismatch()
    assert weight_agreements(Model(simpler), result.program) == {}
    [scale] = [value for value in simpler.graph.initializer if value.name == "2.bias_scale"]
    scale.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(scale) * 2, "2.bias_scale"))
    assert weight_agreements(Model(simpler), result.program)["2.bias"].mismatched == 8


def test_layers_whose_codes_the_simplifier_merged_keep_their_own_scales() -> None:
    torch.manual_seed(0)
    first, second, x = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1), torch.randn(8, 4, 6, 6)
    second.weight.data.copy_(first.weight * 2)
    result = calibrate(fold(capture(nn.Sequential(first, nn.GELU(), second).eval(), x)), [x], method="minmax")
    simpler, report = simplify(stored(result), {"input": x.numpy()})
    assert report.applied and sum(value.name.endswith("weight_quantized") for value in simpler.graph.initializer) == 1
    assert weight_agreements(Model(simpler), result.program) == {}
