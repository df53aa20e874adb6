"""Which results others dominate, and how the table says so."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from typing import Any

import pytest

from exporter.sweeping import results
from exporter.sweeping.pages import html_page, markdown_page
from exporter.sweeping.results import QUALITIES, Gathered, Result, failed, main_table, summary
from tests.support.html_page import HtmlPage

ACCURACY, KL, _ = QUALITIES


def result(key: str, **figures: Any) -> Result:
    values = {"latency_ms": 1.0, "latency_interval": (0.9, 1.1), "size_bytes": 1000, "accuracy": 0.9, "kl": 0.1}
    return replace(Result(key, {"m": key}, "net", "pass", bundle=key, evaluation_sha256="e"), **values | figures)


def judged(*found: Result, quality: Any = ACCURACY) -> dict[str, str | None]:
    return {each.key: each.dominated_by for each in results._judged(found, quality)}


def test_better_in_one_figure_and_worse_in_none() -> None:
    found = judged(
        result("a"),
        result("less accurate", accuracy=0.8),
        result("small", accuracy=0.8, size_bytes=500),
        result("fast", accuracy=0.7, latency_ms=0.5, latency_interval=(0.4, 0.6)),
        result("large and inaccurate", accuracy=0.6, size_bytes=2000),
    )
    assert found["a"] is found["small"] is found["fast"] is None
    assert found["less accurate"] == "a"
    assert found["large and inaccurate"] in ("a", "small", "fast")


def test_what_is_measured_as_equal_is_equal() -> None:
    slower = {"latency_ms": 1.05, "latency_interval": (1.0, 1.2)}
    assert judged(result("a"), result("slower by chance", **slower)) == {"a": None, "slower by chance": None}
    assert (
        judged(result("a"), result("less", accuracy=0.8, latency_ms=0.95, latency_interval=(0.8, 1.0)))["less"] == "a"
    )
    slower["latency_interval"] = (1.11, 1.2)
    assert judged(result("a"), result("slower", **slower))["slower"] == "a"
    assert judged(result("a"), result("some bytes", size_bytes=1001)) == {"a": None, "some bytes": None}
    assert judged(result("a"), result("larger", size_bytes=1010))["larger"] == "a"


def test_an_unreliable_latency_says_nothing() -> None:
    slow = {"latency_ms": 9.0, "latency_interval": (8.9, 9.1)}
    assert judged(result("a"), result("slow", **slow))["slow"] == "a"
    assert judged(result("a"), result("slow", **slow, latency_reliable=False))["slow"] is None
    found = judged(result("a", latency_reliable=False), result("slow", **slow), result("less", **slow, accuracy=0.8))
    assert found == {"a": None, "slow": None, "less": "a"}


def test_what_runs_on_another_device_is_compared_with_its_like() -> None:
    unknown = {"latency_ms": None, "latency_interval": None}
    found = judged(result("a"), result("device", accuracy=0.8, **unknown), result("worse", accuracy=0.7, **unknown))
    assert found == {"a": None, "device": None, "worse": "device"}


def test_only_what_compares_is_compared() -> None:
    worse = result("b", accuracy=0.1, kl=9.0)
    assert judged(result("a"), worse)["b"] == "a"
    assert judged(result("a"), replace(worse, evaluation_sha256="other data"))["b"] is None
    assert judged(result("a"), replace(worse, network="another"))["b"] == "a"
    assert judged(result("a"), replace(worse, network="another"), quality=KL)["b"] is None
    assert judged(result("a"), replace(worse, bundle=None))["b"] is None


def gathered() -> Gathered:
    found = (
        result("a|b<i>", latency_reliable=False),
        result("c", accuracy=0.8, state="fail", dominated_by="a|b<i>"),
        Result("d", {"m": "d"}, "net", "error", exit_code=3, message="no <rule> for it"),
        Result("e", {"m": "e"}, "net", "open"),
    )
    return Gathered(("m",), "accuracy", found)


def test_the_table_names_jobs_by_number() -> None:
    table = main_table(gathered())
    assert table.columns == ("#", "m", "verdict", "accuracy", "KL", "size", "latency", "worse\nthan")
    assert table.rows[1] == ("2", "c", "fail", "80.00 %", "0.1", "1 kB", "1 ms", "1")
    assert set(table.columns) - set(main_table(gathered(), brief=True).columns) == {"KL"}
    assert [row[-1] for row in table.rows] == ["–", "1", "–", "–"]
    assert failed(gathered()).rows == (("3", "d", "3", "no <rule> for it"),)
    counts, dominated, unreliable = summary(gathered())
    ends = "1 pass, 1 with a failed gate, 1 without results, 1 not run"
    assert counts == f"4 jobs: {ends}."
    assert "better in accuracy, size or latency" in dominated and "Unreliable latencies: 1." in unreliable


def test_pages_hold_any_text_and_link_to_the_reports() -> None:
    page, text = html_page("s", gathered()), markdown_page("s", gathered())
    HtmlPage(page)
    assert "a|b&lt;i&gt;" in page and "no &lt;rule&gt; for it" in page and "<script" not in page
    assert 'href="c/report.html"' in page and page.count("<svg") == 2
    assert "no &lt;rule> for it" in text and "a\\|b&lt;i>" in text


@pytest.mark.parametrize("quality", ["KL", "SQNR", None])
def test_one_figure_judges_all(quality: str | None) -> None:
    found = replace(gathered(), quality=quality)
    assert html_page("s", found).count("<svg") == {"KL": 2, "SQNR": 0, None: 0}[quality]
    assert any("export all of them with `eval`" in sentence for sentence in summary(found)) == (quality is None)
    assert json.loads(json.dumps(asdict(found)))["quality"] == quality
