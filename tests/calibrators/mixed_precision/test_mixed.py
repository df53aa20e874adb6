"""Sensitivities, and bits by budget: what is read is true of the program, and every budget is kept."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from calibrators.calibration import calibrate
from calibrators.errors import InputError
from calibrators.execution import losses
from calibrators.execution.losses import kl_divergence
from calibrators.execution.network_loss import CHUNK
from calibrators.execution.task import Problem
from calibrators.graph.canonical import to_integer_forms
from calibrators.methods import range_method
from calibrators.methods.adaround import AdaRound
from calibrators.methods.minmax import MinMax
from calibrators.mixed_precision.budgets import Budget
from calibrators.mixed_precision.mixed import CHECKED, measure_sensitivity
from calibrators.mixed_precision.sensitivity import Grids, Meter, tunable_scales
from calibrators.placement.layer_rules import LayerRule, MatchedRule
from calibrators.placement.place import PlacementOptions, place
from calibrators.program.freeze import CalibrationResult
from calibrators.targets import get_target
from exporter.frontend.capture import capture
from tests.support.networks import NETWORKS, build

SAMPLES = 64
TIES = 0.05
"""Share of the loss that codes at a tie may make, for the program adds in another memory layout: up to 0.03 here."""

FREE = PlacementOptions(first_last_bits=None)


def problem(name: str, options: PlacementOptions = FREE, labels: Tensor | None = None) -> Problem:
    model, x = build(name, batch=SAMPLES)
    placement = place(to_integer_forms(capture(model, x[:2])), get_target("ort-cpu"), options)
    return Problem(placement=placement, batches=[(x,)], range_method=range_method, labels=labels)


def mixed(name: str, *budgets: str, options: PlacementOptions = FREE, **more: Any) -> CalibrationResult:
    model, x = build(name, batch=SAMPLES)
    settings = {"method": "minmax", "placement": options, **more}  # the fastest to find ranges
    return calibrate(capture(model, x[:2]), [x], budgets=[Budget.parse(budget) for budget in budgets], **settings)


def weight_bits(result: CalibrationResult) -> dict[str, int]:
    return {site.name: site.spec.bits for site in result.placement.sites if site.kind == "weight"}


def mean_bits(result: CalibrationResult) -> float:
    """Mean bits of a weight, counted from the codes of the result."""
    sizes = {name: coded.codes.numel() for name, coded in result.weights.items()}
    return sum(sizes[name] * bits for name, bits in weight_bits(result).items() if name in sizes) / sum(sizes.values())


# --- which scales are open -------------------------------------------------------------------------------------------


def test_scales_that_a_rule_decides_are_not_open() -> None:
    given = problem("residual")
    names = {scale.site for scale in tunable_scales(given.placement, FREE, ("weight",))}
    assert names == {site.name for site in given.placement.sites if site.kind == "weight"}
    options = PlacementOptions(layers=(LayerRule("point", weight_bits=6),))
    pinned = tunable_scales(problem("residual", options).placement, options, ("weight", "activation"))
    assert {scale.site for scale in pinned if scale.kind == "weight"} == {"depthwise.weight"}
    assert {layer for scale in pinned if scale.kind == "activation" for layer in scale.layers} == {
        "conv2d_1",
        "conv2d_2",
    }


def test_grids_are_those_of_the_placement() -> None:
    given = problem("residual")
    for bits in (3, 8):
        placed = place(given.placement.graph, given.placement.target, FREE.model_copy(update={"weight_bits": bits}))
        for scale in tunable_scales(given.placement, FREE, ("weight",)):
            assert scale.specs[bits] == placed.by_name[scale.site].spec


# --- readings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NETWORKS, ids=str)
def test_readings_are_those_of_the_program(name: str) -> None:
    given = problem(name, labels=torch.arange(SAMPLES) % 3)
    found = tunable_scales(given.placement, FREE, ("weight", "activation"))
    meter = Meter(Grids(given, found, MinMax()), SAMPLES)
    (x,) = given.select(torch.arange(given.samples))
    floats = given.placement.graph(x)[0]
    assert given.labels is not None
    coarse = PlacementOptions(first_last_bits=None, weight_bits=4, activation_bits=4)
    for scale in found:
        reading = meter.read({**dict.fromkeys(meter.grids.scales, 4), scale.site: 3})
        rule = LayerRule("scale", **{f"{scale.kind}_bits": 3})
        allocated = [MatchedRule(rule, frozenset(scale.layers))]
        placement = place(given.placement.graph, given.placement.target, coarse, allocated)
        assert placement.by_name[scale.site].spec == scale.specs[3]
        program = replace(given, placement=placement).solve(MinMax()).program
        y = torch.cat([program(part)[0] for part in torch.split(x, CHUNK)])
        assert reading.loss == pytest.approx(float(kl_divergence(y.double(), floats.double()).mean()), rel=TIES)
        noise = float(floats.square().sum() / (y - floats).square().sum())
        assert reading.sqnr_db == pytest.approx(10 * torch.tensor(noise).log10().item(), abs=0.2)
        drop = ((floats.argmax(1) == given.labels).float() - (y.argmax(1) == given.labels).float()).mean()
        assert reading.accuracy_drop == pytest.approx(float(drop), abs=1.01 / SAMPLES)


def test_without_labels_the_changed_predictions_count() -> None:
    given = problem("pooled")
    meter = Meter(Grids(given, tunable_scales(given.placement, FREE, ("weight",)), MinMax()), SAMPLES)
    reading = meter.read(dict.fromkeys(meter.grids.scales, 2))
    assert reading.accuracy_drop is not None and 0 < reading.accuracy_drop <= 1
    assert meter.read(dict.fromkeys(meter.grids.scales, 2)) is reading, "read once"


def test_the_end_of_the_network_alone_is_computed_where_that_is_enough() -> None:
    given = problem("residual")
    meter = Meter(Grids(given, tunable_scales(given.placement, FREE, ("weight",)), MinMax()), SAMPLES)
    meter.read({})
    last = meter.order[-1]
    meter.read({last: 4})
    before = meter.network_loss.evaluations
    meter.read({last: 3})
    assert meter.network_loss.evaluations - before < 0.5


def test_sensitivities_tell_every_open_scale() -> None:
    given = problem("transformer")
    record = measure_sensitivity(given, FREE, MinMax())
    assert {scale.kind for scale in record.scales} == {"weight", "activation"}
    for scale in record.scales:
        widths = {entry.bits: entry for entry in scale.widths}
        assert [*widths] == sorted(widths) and len(widths) >= 6
        assert widths[2].loss >= widths[8].loss and widths[2].sqnr_db <= widths[8].sqnr_db


# --- budgets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "limit"), [("residual", 2.5), ("residual", 6.0), ("pooled", 3.0), ("transformer", 4.0), ("mlp", 4.0)]
)
def test_mean_bits_are_kept_and_better_than_uniform_ones(name: str, limit: float) -> None:
    result = mixed(name, f"avg_weight_bits<={limit}")
    assert mean_bits(result) <= limit * (1 + 1e-6)
    record = result.record.mixed_precision
    assert record.found.avg_weight_bits == pytest.approx(mean_bits(result))
    fewer = [entry for entry in record.front if (entry.uniform or 99) <= limit]
    assert fewer and all(record.found.loss <= entry.loss * (1 + 1e-9) for entry in fewer)


def test_bytes_count_as_they_are_stored() -> None:
    model, _ = build("residual", batch=SAMPLES)
    total = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    result = mixed("residual", f"weight_bytes<={0.7 * total}", stored=_packed)
    bytes_ = sum(_packed(coded.codes.numel(), bits_of, 0) for (name, coded), bits_of in _with_bits(result))
    assert bytes_ <= 0.7 * total
    assert set(weight_bits(result).values()) <= {4, 8}, "what takes the same bytes has all the bits they hold"


def _packed(size: int, bits: int, taps: int) -> int:
    return -(-size * (4 if bits <= 4 else 8) // 8)


def _with_bits(result: CalibrationResult) -> list[tuple[tuple[str, Any], int]]:
    return [(item, weight_bits(result)[item[0]]) for item in result.weights.items()]


def test_bit_operations_open_the_activations_too() -> None:
    finest = mixed("residual", "bops<=1T").record.mixed_precision.found.bops
    result = mixed("residual", f"bops<={finest / 4}")
    assert result.record.mixed_precision.found.bops <= finest / 4
    activations = {site.spec.bits for site in result.placement.sites if site.kind == "activation"}
    assert min(activations) < 8
    given = mixed("residual", "avg_weight_bits<=4").placement
    assert {site.spec.bits for site in given.sites if site.kind == "activation"} == {8}


def test_a_limit_on_accuracy_takes_the_fewest_bits_that_keep_it() -> None:
    def exact(size: int, bits: int, taps: int) -> int:
        return -(-size * bits // 8)

    loose, tight = (mixed("pooled", f"accuracy_drop<={limit}", stored=exact) for limit in ("30%", "5%"))
    for result, limit in ((loose, 0.30), (tight, 0.05)):
        assert result.record.mixed_precision.found.accuracy_drop <= limit
    sizes = [result.record.mixed_precision.found.weight_bytes for result in (loose, tight)]
    assert sizes[0] < sizes[1]


def test_rules_of_the_user_win() -> None:
    rules = LayerRule("head", weight_bits=8), LayerRule("point", weight_bits=3)
    options = PlacementOptions(first_last_bits=None, layers=rules)
    result = mixed("residual", "avg_weight_bits<=5", options=options)
    assert weight_bits(result)["head.weight"] == 8 and weight_bits(result)["point.weight"] == 3
    assert [rule.match for rule in result.placement.rules][-2:] == ["head", "point"]
    assert "budget" in [rule.match for rule in result.placement.rules]


def test_methods_that_train_start_from_the_bits_found() -> None:
    bits = weight_bits(mixed("residual", "avg_weight_bits<=4", method="mse"))
    trained = mixed("residual", "avg_weight_bits<=4", method=AdaRound(iters=20))
    assert weight_bits(trained) == bits


def test_same_seed_same_bits_and_the_record_tells_the_rest() -> None:
    first, second = (mixed("transformer", "avg_weight_bits<=4", seed=3) for _ in range(2))
    assert weight_bits(first) == weight_bits(second)
    record = first.record.mixed_precision
    assert replace(record, seconds=0) == replace(second.record.mixed_precision, seconds=0)
    assert record.samples == min(SAMPLES, CHECKED)
    assert -1 <= record.rank_correlation <= 1
    chosen = {scale.site: scale.bits for scale in first.record.sensitivity.scales}
    assert chosen.items() <= weight_bits(first).items()


@pytest.mark.parametrize(
    ("budgets", "options", "message"),
    [
        (["avg_weight_bits<=1.9"], FREE, "fewest bits that may be chosen take 2"),
        (["avg_weight_bits<=4"], PlacementOptions(layers=(LayerRule("*", weight_bits=4),)), "layers leaves no layer"),
        (["accuracy_drop<=0.01%", "avg_weight_bits<=2"], FREE, "raise the limit"),
        (["bops<=1k", "avg_weight_bits<=8"], FREE, "cannot be met"),
    ],
)
def test_what_cannot_be_met_is_refused(budgets: list[str], options: PlacementOptions, message: str) -> None:
    with pytest.raises(InputError, match=message):
        mixed("pooled", *budgets, options=options)


def test_accuracy_needs_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "is_logits", lambda output: False)
    with pytest.raises(InputError, match=r"needs a model output of shape \[n, classes\]; limit weight_bytes"):
        mixed("residual", "accuracy_drop<=1%")


@pytest.mark.parametrize("budget", ["avg_weight_bits<=4", "bops<=1T"])
def test_layers_of_which_weights_only_are_quantized_take_part(budget: str) -> None:
    result = mixed("transformer", budget, options=PlacementOptions(first_last_bits=None, weight_only=True))
    weight_only = {site.name for site in result.placement.sites if site.weight_only}
    told = {scale.site: scale.bits for scale in result.record.sensitivity.scales}
    assert weight_only and weight_only <= told.keys()
    assert told.items() <= {site.name: site.spec.bits for site in result.placement.sites}.items()
