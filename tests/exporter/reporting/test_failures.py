"""A failed gate says what was found, what causes it and what to try; a pass says what it leaves open."""

from __future__ import annotations

import ast
import io
import re
import shlex
from collections.abc import Iterator
from contextvars import Context
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from calibrators.errors import SPELLING
from calibrators.placement.layer_rules import LayerRule
from exporter.config import make_config
from exporter.job import as_flag
from exporter.reporting.failures import failures
from exporter.reporting.gates import evaluate, parse
from exporter.reporting.headline import verdict_title
from exporter.reporting.html import render_html
from exporter.reporting.metrics import METRICS
from exporter.reporting.schema import Report, dump, validate_report
from exporter.reporting.standing import standing
from exporter.reporting.terminal import verdict_panel
from runtime_tests.measure.accuracy import Accuracy, RunningAccuracy
from tests.exporter.reporting.sample_report import _costly_layers, layer, sample_report


def failing(expression: str, **changes: Any) -> Report:
    """A report with this gate, which fails."""
    report = sample_report(9) | {"verdict": "fail"} | changes
    result = evaluate([parse(expression)], report)[0]
    assert not result.passed
    report["gates"] = [vars(result)]
    return validate_report(report)


def box(report: Report, width: int = 300) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(verdict_panel(report, Path("out")))
    return console.export_text()


@pytest.fixture(autouse=True)
def on_the_command_line() -> Iterator[None]:
    before = SPELLING.set(as_flag)
    yield
    SPELLING.reset(before)


def flags_in(advice: tuple[str, ...]) -> list[list[str]]:
    return [shlex.split(text.partition(": ")[2]) for text in advice]


def test_a_failed_gate_on_accuracy_names_layers_and_flags_to_paste() -> None:
    [failure] = failures(failing("accuracy_drop_lower<=-1pp", method="mse"))
    assert failure.found == "it is −0.12 points, the limit is −1 points"
    assert failure.causes.startswith(
        "layers that add most of the noise: stages.1.2.conv (23 %), stages.1.1.conv (19 %)"
    )
    flags = flags_in(failure.advice)
    assert flags[0] == ["--method", "qdrop"]
    config = make_config({"layers": flags[1][1::2]})
    assert config.layers[0] == LayerRule(match="stages.1.2.conv", weight_bits=8, activation_bits=8)
    assert flags[2] == ["--gate", "accuracy_drop_lower<=0pp"]


def test_in_python_advice_is_arguments_of_export() -> None:
    report = failing("lowest_agreement>=99%", costly_layers=_costly_layers(), method="mse")
    [failure], page = Context().run(failures, report), Context().run(render_html, report)
    keywords = [re.search(r": (\w+)=(\S.*)$", text) for text in failure.advice]
    settings = {found[1]: ast.literal_eval(found[2]) for found in keywords if found}
    assert [*settings] == ["method", "layers", "gates"]
    assert make_config(settings).method == "qdrop"
    assert "--layer" not in page and "layers=[&#39;stages.1.2.conv: weight_bits=8, activation_bits=8&#39;]" in page


def test_layers_are_named_by_what_they_cost_the_prediction() -> None:
    """Where that was measured, noise at the layers' own outputs is not asked, and the flags say what they give."""
    report = failing("lowest_agreement>=99%", costly_layers=_costly_layers(), method="qdrop")
    [failure] = failures(report)
    assert (
        failure.causes
        == "layers that cost the prediction most: stages.1.2.conv (68 %), stages.1.1.conv (23 %), head (9 %)"
    )
    assert failure.advice[0].startswith("finer grids for 2 layers, with lowest_agreement 97 % (94 to 98.5) on 128 cal")
    [flags] = flags_in(failure.advice[:1])
    rules = make_config({"layers": flags[1::2]}).layers
    assert [rule.match for rule in rules] == ["stages.1.2.conv", "stages.1.1.conv"]
    assert {tuple(rule.settings.items()) for rule in rules} == {(("weight_bits", 8), ("activation_bits", 8))}
    assert "Layers that cost most" in render_html(report)


@pytest.mark.parametrize(
    ("advised", "words"), [(None, "for the layers that cost most"), (9, "for 9 layers, of which report.html")]
)
def test_advice_says_where_no_few_layers_suffice(advised: int | None, words: str) -> None:
    layers = _costly_layers()["layers"] * 3
    [failure] = failures(
        failing("lowest_agreement>=99%", costly_layers=_costly_layers() | {"advised": advised, "layers": layers})
    )
    assert words in " ".join(failure.advice)


def test_a_ladder_and_a_gate_that_leaves_little_room_are_in_the_box() -> None:
    text = box(validate_report(sample_report(3) | {"costly_layers": _costly_layers()}))
    assert "mse: 3.2 s, lowest_agreement 81 % (77 to 83), divergence 0.21" in text
    reason = (
        "gptq, 1 layer finer (reaches lowest_agreement 95 % on the 256 of 1,024 calibration samples that were held out)"
    )
    assert f"exported: {reason}" in text
    assert "little room" in text and "--layer 'stages.1.2.conv: weight_bits=8, activation_bits=8'" in text


def test_layers_that_have_8_bits_are_advised_to_stay_in_float() -> None:
    wide = [layer(i, "weight") | {"input_bits": 8} for i in range(4)]
    [failure] = failures(failing("sqnr_db>=40dB", layers=wide, method="gptq"))
    [flags] = flags_in(failure.advice)
    assert [rule.float for rule in make_config({"layers": flags[1::2]}).layers] == [True] * 3


@pytest.mark.parametrize(
    ("expression", "changes", "causes", "advice"),
    [
        pytest.param(
            "size<=300kB", {}, "largest weights: stages.2.0.conv (41,472 of 8 bits)", "'weight_bytes<=", id="size"
        ),
        pytest.param("latency<=2ms", {}, "LayerNormalization (15 % of the time)", "batch norm folds", id="latency"),
        pytest.param("integer_macs>=100%", {}, "head.norm (the runtime has no", "", id="integer-macs"),
        pytest.param("mismatched==0", {}, "values that differ: ", "intact verify DIR --on ort==", id="parity"),
        pytest.param(
            "lint_errors==0",
            {"lint": [{"rule": "axis", "severity": "error", "where": "fc", "message": "axis is 1"}]},
            "findings: axis at fc: axis is 1",
            "",
            id="lint",
        ),
    ],
)
def test_every_kind_of_gate_says_what_causes_it(
    expression: str, changes: dict[str, Any], causes: str, advice: str
) -> None:
    [failure] = failures(failing(expression, **changes))
    assert causes in failure.causes
    assert advice in "; ".join(failure.advice)


@pytest.mark.parametrize("name", METRICS)
def test_no_gate_fails_without_words(name: str) -> None:
    """Whatever a gate is on, and whatever the report lacks, there is a sentence."""
    bare = {key: sample_report(1)[key] for key in ("schema", "target", "method", "bits", "fold", "parity", "coverage",
                                                   "size", "time_s")}  # fmt: skip
    gate = {"name": name, "limit": 1.0, "value": 0.5, "passed": False, "expression": f"{name}>=1"}
    for report in (bare | {"accuracy": None, "latency_ms": None}, sample_report(3)):
        [failure] = failures(validate_report(report | {"verdict": "fail", "gates": [gate]}))
        assert failure.found


def test_the_failure_comes_first_in_terminal_and_page() -> None:
    report = failing("size<=300kB")
    text = box(report)
    assert text.splitlines()[0].startswith("╭─ FAIL ")
    assert "size<=300000: it is 7.9913 MB, the limit is 300 kB" in text.splitlines()[1]
    assert text.index("largest weights") < text.index("--layer") < text.index("top1")
    page = re.sub(r"<[^>]+>", "", render_html(report).partition("<body>")[2])
    assert page.index("it is 7.9913 MB") < page.index("Largest weights") < page.index("--budget") < page.index("top1")


@pytest.mark.parametrize(
    ("found", "words", "css"),
    [
        ("unmeasured", "exact; accuracy not measured", "part"),
        ("ungated", "exact; accuracy not gated", "part"),
        ("uncertain", "exact; accuracy measured on 2000 samples only", "part"),
        ("gated", "", "pass"),
        (None, "", "pass"),
    ],
)
def test_a_pass_that_leaves_accuracy_open_says_so_in_its_own_colour(found: Any, words: str, css: str) -> None:
    report = validate_report(sample_report(3) | {"accuracy_standing": found})
    assert verdict_title(report) == (f"PASS ({words})" if words else "PASS")
    assert box(report).startswith(f"╭─ PASS ({words}) ─" if words else "╭─ PASS ─")
    assert verdict_panel(report, Path("out")).border_style == ("yellow" if words else "green")
    assert f'class="verdict {css}">' in render_html(report)
    assert dump(report).get("accuracy_standing") == found


def test_what_a_verification_did_not_measure_is_marked_as_a_claim() -> None:
    """Accuracy and latency in a bundle are what the exporter wrote, and whoever sealed it again could have changed."""
    claims = {"exported_on": "another CPU, onnxruntime 1.30.0", "accuracy_standing": "gated"}
    text = box(validate_report(sample_report(3) | claims))
    assert text.startswith("╭─ PASS (accuracy as the exporter states it) ─")
    here, there = (text.index(words) for words in ("this machine: ", "by the exporter, measured on another CPU"))
    assert here < text.index("parity ") < text.index("proved on") < there
    assert there < min(text.index(f"│ {name} ") for name in ("top1", "integer time", "portable by", "size", "latency"))


def _accuracy(samples: int, *, labels: bool) -> Accuracy:
    running, outputs = RunningAccuracy(), [[0.0, 1.0]] * samples
    running.update(outputs, outputs, outputs, [1] * samples if labels else None)
    return running.result()


@pytest.mark.parametrize(("labels", "least"), [(True, 54), (False, 35)], ids=["labels", "decisions"])
def test_few_samples_say_little(labels: bool, least: int) -> None:
    assert standing(_accuracy(least, labels=labels), gated=True) == "gated"
    assert standing(_accuracy(least - 1, labels=labels), gated=True) == "uncertain"
    assert standing(_accuracy(least, labels=labels), gated=False) == "ungated"
    assert standing(None, gated=True) == "unmeasured"
