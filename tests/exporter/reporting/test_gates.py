"""Gates: what an expression means, what may be asked before the work, what passes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from calibrators.errors import InputError, UnknownNameError
from calibrators.goal import DEFAULT_GOAL
from exporter.reporting.gates import (
    AGREEMENT,
    DEFAULT_GATES,
    DROP,
    SQNR,
    Gate,
    accuracy_gates,
    check_measurable,
    evaluate,
    goal_of,
    judges_accuracy,
    leaves_room,
    parse,
    renamed,
    verdict,
)
from exporter.reporting.metrics import METRICS
from exporter.reporting.schema import GateResult, dump, json_schema, metric_paths, validate_report
from tests.exporter.reporting.sample_report import sample_report


def _result(expression: str, report: dict[str, Any]) -> GateResult:
    return evaluate([parse(expression)], report)[0]


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        pytest.param("accuracy_drop<=0.01", "accuracy_drop<=0.01", id="plain"),
        pytest.param("  accuracy_drop  <=  .01 ", "accuracy_drop<=0.01", id="spaces"),
        pytest.param("accuracy_drop<=0.3%", "accuracy_drop<=0.003", id="percent-without-rounding"),
        pytest.param("outputs_identical==true", "outputs_identical==1", id="boolean"),
        pytest.param("latency_ratio<1", "latency_ratio<1", id="less"),
        pytest.param("integer_macs>0.99", "integer_macs>0.99", id="greater"),
        pytest.param("agreement>=1e-1", "agreement>=0.1", id="exponent"),
        pytest.param("parity.optimized.mismatched==0", "parity.optimized.mismatched==0", id="path"),
        pytest.param("coverage.by_op.QLinearConv>=14", "coverage.by_op.QLinearConv>=14", id="operator-count"),
        pytest.param("accuracy_drop<=0.3pp", "accuracy_drop<=0.003", id="points"),
        pytest.param("size<=300kB", "size<=300000", id="kilobytes"),
        pytest.param("size<=1.5e0 MB", "size<=1500000", id="megabytes"),
        pytest.param("size<=300KiB", "size<=307200", id="kibibytes"),
        pytest.param("latency<2ms", "latency<2", id="milliseconds"),
        pytest.param("latency<0.3s", "latency<300", id="seconds"),
        pytest.param("sqnr_db>=20dB", "sqnr_db>=20", id="decibels"),
    ],
)
def test_parse_reads_every_form(text: str, expression: str) -> None:
    gate = parse(text)
    assert gate.expression == expression
    assert parse(gate.expression) == gate


@pytest.mark.parametrize(
    "text",
    ["", "accuracy_drop", "<=0.01", "accuracy_drop<=", "accuracy_drop=0.01", "accuracy_drop=<1", "accuracy_drop<=a",
     "accuracy_drop<=nan", "accuracy_drop<=inf", "accuracy_drop<=nan%", "accuracy_drop<=0.1<=0.2", "a b<=1",
     "size<=300kg", "size<=3ms", "latency<=2kB", "agreement>=3dB", "sqnr_db>=20%", "size<=kB", "mismatched<=1 1"],
    ids=repr,
)  # fmt: skip
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(InputError) as error:
        parse(text)
    assert not isinstance(error.value, UnknownNameError)


@pytest.mark.parametrize(
    ("text", "guess"),
    [
        pytest.param("acuracy_drop<=0.01", "accuracy_drop", id="short-name"),
        pytest.param("parity.optimised.mismatched==0", "parity.optimized.mismatched", id="path"),
        pytest.param("coverage.integer_mac>=1", "coverage.integer_macs", id="leaf"),
        pytest.param("parity.optimized==0", "parity.optimized.values", id="not-a-number"),
    ],
)
def test_unknown_metric_names_the_near_ones(text: str, guess: str) -> None:
    with pytest.raises(UnknownNameError, match="Did you mean") as error:
        parse(text)
    assert repr(guess) in str(error.value)


def test_short_metrics_equal_what_the_report_says() -> None:
    report = sample_report(9)
    expected = {
        "accuracy_drop": 0.001,
        "accuracy_drop_lower": -0.0012,
        "accuracy_drop_upper": 0.0032,
        "lowest_agreement": None,
        "lowest_sqnr_db": math.inf,
        "reference_drop": 0.001,
        "agreement": 0.991,
        "sqnr_db": 31.4,
        "mismatched": 3,
        "kernel_mismatched": 0,
        "parity_violations": 0,
        "unplanned_kernels": 0,
        "float_mismatch_rate": 3 / 401_408,
        "max_lsb": 1,
        "outputs_identical": 0,
        "integer_macs": 0.9987,
        "weight_only_macs": 0.0,
        "integer_nodes": 14,
        "integer_node_share": 14 / 16,
        "integer_time": 0.62,
        "latency": 3.92,
        "size": 7_991_296,
        "latency_ratio": 0.3159,
        "size_ratio": 7_991_296 / 31_412_224,
        "metric": 0.7,
        "metric_drop": 0.01,
        "unproved_runtimes": 0,
        "inexact_here": 0,
        "lint_errors": 0,
        **dict.fromkeys(name for name in METRICS if name.startswith("baseline_")),
    }
    assert {name: metric.value(report) for name, metric in METRICS.items()} == expected


def test_an_unknown_unit_names_those_of_the_metric() -> None:
    with pytest.raises(InputError, match=r"KB is no unit of size; its units are: B, kB, MB, GB, KiB, MiB, GiB\."):
        parse("size<=300KB")


def test_a_gate_on_a_latency_compares_the_worse_end_of_its_interval() -> None:
    report = sample_report(3)
    report["latency_ms"] |= {"quantized": 3.9, "interval": {"quantized": [3.7, 4.2]}, "ratio_interval": [0.3, 0.35]}
    found = [_result(text, report) for text in ("latency<=4ms", "latency>=3.8", "latency_ratio<0.34", "latency==3.9")]
    assert [(gate.value, gate.passed) for gate in found] == [(4.2, False), (3.7, False), (0.35, False), (3.9, True)]


def _outputs(*agreements: float | None, metric: str = "agreement") -> dict[str, Any]:
    report = sample_report(3)
    outputs = [{"name": str(i), "reference": 9.0, "runtime": 9.0, "agreement": a} for i, a in enumerate(agreements)]
    report["accuracy"] |= {"metric": metric, "outputs": outputs}
    return report


@pytest.mark.parametrize(
    ("report", "expected"),
    [
        pytest.param(_outputs(0.9, metric="top1"), [DROP], id="labels"),
        pytest.param(_outputs(0.9, 0.8, None, metric="top1"), [DROP, AGREEMENT, SQNR], id="labels-of-one-output"),
        pytest.param(_outputs(0.9), [AGREEMENT], id="decisions"),
        pytest.param(_outputs(None, metric="sqnr_db"), [SQNR], id="values"),
        pytest.param(_outputs(None, 0.9, metric="sqnr_db"), [AGREEMENT, SQNR], id="both"),
        pytest.param(sample_report(3) | {"accuracy": None}, [], id="no-data"),
    ],
)
def test_what_was_measured_decides_the_gates_on_accuracy(report: dict[str, Any], expected: list[Gate]) -> None:
    assert accuracy_gates(report) == expected
    values = {"accuracy_drop_lower": -0.0012, "lowest_sqnr_db": 9.0}
    lowest = (
        min((o["agreement"] for o in report["accuracy"]["outputs"][-2:] if o["agreement"]), default=0)
        if expected
        else 0
    )
    for gate in evaluate(expected, report):
        assert gate.value == values.get(gate.name, lowest)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("accuracy_drop<=2pp", True), ("agreement>=0.9", True), ("metric_drop<=0.1", True), ("metric>=0.8", True),
        ("accuracy.runtime>=0.7", True), ("accuracy.float>=0.7", False), ("metric.float>=0.7", False),
        ("accuracy.samples>=100", False), ("data.evaluation.samples>=100", False), ("size<=1MB", False),
    ],
)  # fmt: skip
def test_which_gates_take_the_place_of_those_on_accuracy(text: str, expected: bool) -> None:
    assert judges_accuracy(parse(text)) is expected


@pytest.mark.parametrize(
    ("gates", "default", "expected"),
    [
        ((), True, dict(DEFAULT_GOAL)),
        ((), False, None),
        (("size<=1MB",), True, dict(DEFAULT_GOAL)),
        (("accuracy_drop_lower<=2pp", "sqnr_db>=20"), True, {"agreement": pytest.approx(0.9), "sqnr_db": 20}),
        (("accuracy.agreement>=97%",), False, {"agreement": 0.97}),
        (("metric_drop<=0.1",), True, None),
    ],
)
def test_what_calibration_aims_at_follows_from_the_gates(gates: Any, default: bool, expected: Any) -> None:
    assert goal_of(map(parse, gates), accuracy_gate=default) == expected


@pytest.mark.parametrize(("limit", "agreement"), [("-50pp", 1.0), ("0pp", 1.0), ("60pp", 0.0)])
def test_a_limit_on_the_drop_asks_for_an_agreement_that_there_is(limit: str, agreement: float) -> None:
    assert goal_of([parse(f"accuracy_drop<={limit}")], accuracy_gate=True) == {"agreement": agreement}


@pytest.mark.parametrize(
    ("text", "value", "expected"),
    [
        ("agreement>=0.9", 0.96, True), ("agreement>=0.9", 0.94, False), ("agreement>=0.9", 0.8, False),
        ("sqnr_db>=15", 18.1, True), ("sqnr_db>=15", 17.9, False), ("accuracy_drop<=2pp", 0.009, True),
        ("accuracy_drop<=2pp", 0.011, False), ("metric>=0.5", 0.51, True), ("size<=10", 11.0, True),
    ],
)  # fmt: skip
def test_a_gate_leaves_room_where_half_of_what_it_allows_is_left(text: str, value: float, expected: bool) -> None:
    gate = parse(text)
    passed = value <= gate.limit if "<" in text else value >= gate.limit
    assert leaves_room(GateResult(gate.name, gate.limit, value, passed, gate.expression)) is expected


def test_identical_outputs_have_no_noise_at_all() -> None:
    report = sample_report(9)
    report["accuracy"]["sqnr_db"] = None
    [result] = evaluate([parse("sqnr_db>=60")], report)
    assert (result.passed, result.value) == (True, None)
    report["accuracy"] = None
    [result] = evaluate([parse("sqnr_db>=60")], report)
    assert not result.passed


@pytest.mark.parametrize("text", ["integer_macs>=0", "coverage.integer_macs>=0"])
def test_what_cannot_be_counted_fails_the_gate_on_it(text: str) -> None:
    report = sample_report(9)
    report["coverage"] |= {"integer_macs": None, "uncounted": ["Scan loop"]}
    [result] = evaluate([parse(text)], report)
    assert not result.passed and result.value is None


def test_float_mismatch_rate_is_zero_without_float_values() -> None:
    report = sample_report(9)
    report["parity"]["optimized"].update(float_mismatched=0, float_values=0)
    assert METRICS["float_mismatch_rate"].value(report) == 0.0
    del report["parity"]["optimized"]["float_values"]
    assert METRICS["float_mismatch_rate"].value(report) is None


def test_the_old_name_of_a_metric_is_accepted_with_a_warning() -> None:
    gates = [parse("kernel_surprises==0"), parse("unplanned_kernels==0")]
    assert gates[0] == gates[1]
    assert gates[0].expression == "unplanned_kernels==0"
    [warning] = renamed(gates)
    assert "'kernel_surprises' is now called 'unplanned_kernels'" in warning


@pytest.mark.parametrize(
    ("expression", "passed"),
    [
        ("mismatched<=3", True), ("mismatched<3", False), ("mismatched>=3", True), ("mismatched>3", False),
        ("mismatched==3", True), ("mismatched==2", False), ("outputs_identical==false", True),
        ("coverage.by_op.QLinearConv==13", True), ("coverage.by_op.Conv==0", True), ("coverage.by_op.Conv>=1", False),
        ("parity.optimized.unplanned.QGemm==0", True), ("parity.unoptimized.violations==0", True),
        ("accuracy.drop_ci.1<=0.0032", True), ("simplifier.applied==0", True),
    ],
)  # fmt: skip
def test_every_operator_decides_at_its_border(expression: str, passed: bool) -> None:
    assert _result(expression, sample_report(9)).passed is passed


def test_float_noise_does_not_decide_a_gate() -> None:
    report = sample_report()
    report["accuracy"].update(float=0.9035, runtime=0.8935)
    assert 0.9035 - 0.8935 > 0.01, "the subtraction alone would fail the gate"
    assert _result("accuracy_drop<=0.01", report).passed


@pytest.mark.parametrize("compare", ["<=", "<", ">=", ">", "=="])
@pytest.mark.parametrize("value", [math.nan, None], ids=["nan", "unmeasured"])
def test_what_is_no_number_never_passes(compare: str, value: float | None) -> None:
    report = sample_report()
    report["accuracy"]["runtime"] = value
    result = _result(f"accuracy_drop{compare}0", report)
    assert result.passed is False
    assert result.value is None


@pytest.mark.parametrize(
    ("missing", "name"),
    [
        ("accuracy", "accuracy_drop"),
        ("accuracy", "agreement"),
        ("accuracy", "accuracy.top5.float"),
        ("accuracy", "accuracy.drop_ci.0"),
        ("latency_ms", "latency_ratio"),
        ("latency_ms", "latency_ms.ratio"),
    ],
)
def test_a_missing_block_does_not_pass(missing: str, name: str) -> None:
    report = sample_report()
    assert _result(f"{name}<=1", report).passed
    report[missing] = None
    assert not _result(f"{name}<=1", report).passed


def test_default_gates_pass_the_sample_and_fail_without_a_proof() -> None:
    assert verdict(evaluate(DEFAULT_GATES, sample_report())) == "pass"
    report = sample_report()
    report["parity"]["optimized"] = {"values": 0, "mismatched": 0, "max_lsb": 0}
    failed = [result.name for result in evaluate(DEFAULT_GATES, report) if not result.passed]
    assert failed == ["kernel_mismatched", "parity_violations", "unplanned_kernels"]


@pytest.mark.parametrize(
    ("gate", "value", "change"),
    [
        pytest.param("kernel_mismatched", 1, {"kernel_mismatched": 1}, id="wrong-integer"),
        pytest.param("parity_violations", 2, {"violations": 2}, id="too-many-float-differences"),
        pytest.param("unplanned_kernels", 1, {"unplanned": {"QLinearConv": -1}}, id="left-in-float"),
        pytest.param("unplanned_kernels", 3, {"unplanned": {"QGemm": -1, "QLinearConv": 2}}, id="no-cancelling"),
    ],
)
def test_each_default_gate_fails_alone(gate: str, value: int, change: dict[str, Any]) -> None:
    report = sample_report()
    report["parity"]["optimized"].update(change)
    failed = {result.name: result.value for result in evaluate(DEFAULT_GATES, report) if not result.passed}
    assert failed == {gate: value}


def test_a_lint_error_fails_the_default_gates() -> None:
    report = sample_report()
    report["lint"][0]["severity"] = "error"
    assert [r.name for r in evaluate(DEFAULT_GATES, report) if not r.passed] == ["lint_errors"]


@pytest.mark.parametrize(
    ("expression", "has_eval", "has_labels", "hint"),
    [
        ("accuracy_drop<=0.01", False, False, "eval_data"),
        ("accuracy_drop<=0.01", True, False, "labels"),
        ("accuracy.float>=0.9", True, False, "labels"),
        ("accuracy.agreement>=0.9", False, False, "eval_data"),
        ("agreement>=0.9", False, False, "eval_data"),
        ("accuracy_drop<=0.01", True, True, None),
        ("agreement>=0.9", True, False, None),
        ("accuracy.sqnr_db>=20", True, False, None),
        ("mismatched==0", False, False, None),
    ],
)
def test_unmeasurable_gates_are_refused_before_the_work(
    expression: str, has_eval: bool, has_labels: bool, hint: str | None
) -> None:
    gates = [parse(expression)]
    if hint is None:
        check_measurable(gates, has_eval=has_eval, has_labels=has_labels)
        return
    with pytest.raises(InputError, match=hint) as error:
        check_measurable(gates, has_eval=has_eval, has_labels=has_labels)
    assert expression.split("<")[0].split(">")[0] in str(error.value)


def test_the_sample_report_is_valid_and_every_fixed_key_is_required() -> None:
    validate_report(sample_report())
    for key in ("schema", "verdict", "target", "method", "bits", "fold", "accuracy", "parity", "coverage", "size",
                "latency_ms", "time_s", "gates"):  # fmt: skip
        report = sample_report()
        del report[key]
        with pytest.raises(InputError, match=key):
            validate_report(report)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("schema", 2), ("verdict", "maybe"), ("parity.optimized.values", "many"), ("parity.optimized.values", 1.5),
        ("coverage.macs", None), ("gates.0.passed", "perhaps"), ("fold.refused", "none"),
        ("layers.0.kind", "bias"), ("layers.0.floats", [0.5]),
    ],
)  # fmt: skip
def test_wrong_types_are_named(path: str, value: object) -> None:
    report = sample_report()
    *parents, last = path.split(".")
    here: Any = report
    for part in parents:
        here = here[int(part)] if part.isdigit() else here[part]
    here[last] = value
    with pytest.raises(InputError, match=path.replace(".", r"\.")):
        validate_report(report)


def test_keys_of_a_later_version_are_ignored() -> None:
    report = sample_report()
    report["parity"]["optimized"]["of"] = "mine"
    assert dump(validate_report(report | {"extra": {"of": "mine"}})) == dump(validate_report(sample_report()))


def test_what_is_read_is_what_was_written() -> None:
    report = sample_report()
    del report["coverage"]["accuracy_level"]
    found = dump(validate_report(sample_report()))
    assert found["coverage"].pop("accuracy_level") is None
    assert lost(report, found) == []


def lost(value: Any, found: Any, path: str = "") -> list[str]:
    """Return the paths at which `found` differs from `value`, keys that only `found` has excepted."""
    if isinstance(value, dict):
        assert isinstance(found, dict), path
        return [each for key in value for each in lost(value[key], found.get(key), f"{path}.{key}")]
    if isinstance(value, list):
        assert isinstance(found, list) and len(found) == len(value), path
        return [each for i, pair in enumerate(zip(value, found, strict=True)) for each in lost(*pair, f"{path}.{i}")]
    return [] if value == found else [path]


def test_numbers_that_are_not_finite_are_null() -> None:
    report = sample_report()
    report["layers"][0]["sqnr_db"] = math.inf
    report["reconstruction"]["units"][0]["after"] = math.nan
    found = dump(validate_report(report))
    assert found["layers"][0]["sqnr_db"] is None
    assert found["reconstruction"]["units"][0]["after"] is None
    assert math.isnan(validate_report(found).reconstruction.units[0].after)  # type: ignore[union-attr]


def test_json_schema_lists_the_fixed_keys_and_the_metrics_follow_it() -> None:
    schema = json_schema()
    assert {"verdict", "parity", "gates"} <= set(schema["required"])
    assert "layers" not in schema["required"]
    assert {"parity.optimized.mismatched", "accuracy.drop_ci.1", "size.by_type.*"} <= metric_paths()
    assert not any(path.startswith(("layers", "gates")) for path in metric_paths())
