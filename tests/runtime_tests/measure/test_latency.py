from __future__ import annotations

from itertools import cycle
from pathlib import Path

import numpy as np
import onnx
import pytest
from scipy.stats import binom

from calibrators.errors import InputError
from runtime_tests.measure.latency import Latency, Timings, interleave, latency, median_interval, why_enough
from tests.support import onnx_models as models


class FakeClock:
    """Nanoseconds that only calls move on."""

    def __init__(self) -> None:
        self.now = 0
        self.order: list[str] = []

    def call(self, name: str, milliseconds: int) -> None:
        self.order.append(name)
        self.now += milliseconds * 1_000_000

    def __call__(self) -> int:
        return self.now


def test_rounds_interleave_the_calls_and_turn_around() -> None:
    clock = FakeClock()
    calls = {"a": lambda: clock.call("a", 3), "b": lambda: clock.call("b", 1)}
    times = interleave(calls, runs=3, warmup=1, clock=clock)
    assert clock.order == ["a", "b", "a", "b", "b", "a", "a", "b"]
    np.testing.assert_array_equal(times, [[3, 1]] * 3)


def test_a_slow_spell_does_not_change_the_speedup() -> None:
    times = np.array([[4.0, 2.0], [40.0, 20.0], [4.0, 2.0], [60.0, 30.0], [8.0, 4.0]])
    result = Timings(("float", "quantized"), times)
    assert result.speedup("quantized") == 2.0
    assert result.median_ms("float") == 8.0
    assert result.iqr_ms("quantized") == 18.0


def test_the_summary_holds_medians_and_the_conditions() -> None:
    result = Timings(("float", "quantized", "other"), np.array([[4.0, 2.0, 1.0]]), threads=2)
    assert result.summary(batch=3) == Latency(
        float=4.0,
        quantized=2.0,
        ratio=0.5,
        runs=1,
        threads=2,
        batch=3,
        iqr={"float": 0.0, "quantized": 0.0, "other": 0.0},
        speedup={"quantized": 2.0, "other": 4.0},
        interval={"float": (4.0, 4.0), "quantized": (2.0, 2.0), "other": (1.0, 1.0)},
        ratio_interval=(0.5, 0.5),
        reliable=True,
        stopped="runs",
    )
    assert result.median_ms("other") == 1.0


@pytest.mark.parametrize("count", [1, 5, 6, 20, 50, 101])
def test_the_interval_of_a_median_holds_it_as_often_as_it_says(count: int) -> None:
    """The rank of the true median among independent values is binomial, so the coverage is known exactly."""
    low, high = (int(end) for end in median_interval(np.random.default_rng(0).permutation(count).astype(float)))
    assert low + high == count - 1 and low <= high
    coverage = binom.cdf(high, count, 0.5) - binom.cdf(low, count, 0.5)
    assert coverage >= 0.95 or (low, high) == (0, count - 1)
    narrower = binom.cdf(high - 1, count, 0.5) - binom.cdf(low + 1, count, 0.5)
    assert narrower < 0.95


@pytest.mark.parametrize(
    ("float_ms", "quantized_ms", "rounds", "reason"),
    [
        pytest.param([100], [50], 20, "interval", id="equal-times"),
        pytest.param([100, 130], [50, 65], 50, "runs", id="only-the-ratio-is-tight"),
        pytest.param([100] * 5 + [140] + [100] * 4, [50], 20, "interval", id="a-few-outliers"),
        pytest.param([100, 200], [50, 30], 50, "runs", id="spread"),
        pytest.param([1500, 2500], [500], 8, "time", id="slow"),
        pytest.param([30_000], [1000], 6, "time", id="six-at-least"),
    ],
)
def test_rounds_end_when_intervals_are_tight_or_a_limit_is_hit(
    float_ms: list[int], quantized_ms: list[int], rounds: int, reason: str
) -> None:
    clock = FakeClock()
    times = {"float": cycle(float_ms), "quantized": cycle(quantized_ms)}
    calls = {name: lambda name=name: clock.call(name, next(times[name])) for name in times}
    found = interleave(calls, runs=50, warmup=0, clock=clock, enough=lambda times: why_enough(times) is not None)
    assert (len(found), why_enough(found) or "runs") == (rounds, reason)


def test_times_that_spread_are_unreliable() -> None:
    times = np.stack([np.ones(50), np.linspace(1.0, 2.0, 50)], axis=1)
    found = Timings(("float", "quantized"), times).summary(batch=1)
    assert found.reliable is False and found.spread == pytest.approx(1 / 3)


def test_real_models_are_timed_from_paths_and_protos(tmp_path: Path) -> None:
    small, large = models.chain("Tanh"), models.residual()
    onnx.save(large, tmp_path / "large.onnx")
    renamed = models.mobilenet()
    result = latency(
        {"float": renamed, "quantized": tmp_path / "large.onnx"}, models.sample(large, batch=1), runs=4, warmup=1
    )
    assert result.times_ms.shape == (4, 2)
    assert (result.times_ms > 0).all()
    assert latency({"one": small}, models.sample(small), runs=1).names == ("one",)


def test_inputs_that_a_model_does_not_take_are_named() -> None:
    with pytest.raises(InputError, match="model 'm' takes the inputs x, but got y"):
        latency({"m": models.chain("Tanh")}, {"y": np.zeros((1, 4), np.float32)}, runs=1)


@pytest.mark.parametrize(("count", "runs"), [(0, 1), (1, 0)], ids=["no model", "no runs"])
def test_nothing_to_measure_is_an_error(count: int, runs: int) -> None:
    with pytest.raises(InputError, match=f"got {count} models and {runs} runs"):
        latency({"m": models.chain("Tanh")} if count else {}, {"x": np.zeros((1, 4), np.float32)}, runs=runs)
