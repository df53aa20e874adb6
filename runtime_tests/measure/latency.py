"""Measure how long models take, in a way that a busy machine disturbs all of them equally.

Must not know: what the models are, which of them should be faster.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray
from onnxruntime import InferenceSession
from scipy.special import bdtr

from calibrators.errors import InputError
from calibrators.temporary import TemporaryFolder
from runtime_tests.measure.profile import NodeTimes, TimeShares, node_times, time_shares
from runtime_tests.ort.coverage import FloatNode
from runtime_tests.ort.sessions import Source, profiling_session, session

__all__ = ["LONGEST_S", "RUNS", "Latency", "Timings", "interleave", "latency", "median_interval", "why_enough"]

Array = NDArray[Any]
Real: TypeAlias = float
"""The builtin, in classes with a field of that name."""

RUNS, WARMUP, PROFILED_RUNS = 200, 5, 6
NANOSECONDS_PER_MS = 1e6
CONFIDENCE = 0.95

LARGEST_SPREAD = 0.2
"""Interquartile range over the median up to which times are reliable; on an idle machine it is 0.01 to 0.1."""

TIGHT = 0.04
"""Width of a 95 % interval over the median at which it is known well enough."""
FEWEST, STEP = 20, 10
"""Rounds before the first look at the intervals, and between two looks: few, so that a lucky one hardly counts."""
LONGEST_S, FEWEST_IN_TIME = 20.0, 6
"""Seconds of timed runs after which a measurement ends, and the rounds that it has at least: an interval needs six."""

Stopped = Literal["interval", "runs", "time"]
"""Why a measurement ended: its intervals were tight, or the limit of runs or of seconds was reached."""


@dataclass(frozen=True)
class Latency:
    """Medians of the float and the quantized model in milliseconds: the "latency_ms" part of report.json.

    ratio:    quantized over float, the median over the rounds.
    batch:    samples of one run.
    iqr:      interquartile range by model, in milliseconds.
    speedup:  of each model over the float model.
    interval: 95 % interval of the median by model, in milliseconds; ratio_interval: that of the ratio.
    reliable: whether the times of both models spread little (LARGEST_SPREAD).
    stopped:  why there were no more runs (Stopped).
    """

    float: Real | None
    quantized: Real | None
    ratio: Real | None
    runs: int
    threads: int
    batch: int
    iqr: dict[str, Real]
    speedup: dict[str, Real]
    interval: dict[str, tuple[Real, Real]] | None = None
    ratio_interval: tuple[Real, Real] | None = None
    reliable: bool | None = None
    stopped: Stopped | None = None

    @property
    def spread(self) -> Real:
        """The larger interquartile range of both models, over the median."""
        medians = {"float": self.float, "quantized": self.quantized}
        return max(self.iqr[name] / median for name, median in medians.items() if median)


@dataclass(frozen=True, eq=False)
class Timings:
    """Times of several models, one column per model, one row per round.

    names:    the models; the first is the baseline of `speedup`.
    times_ms: [rounds, models] float64.
    threads:  intra-op threads of every session.
    nodes:    times by kind of node of the profiled model, if any.
    stopped:  why there are no more rounds.
    """

    names: tuple[str, ...]
    times_ms: Array
    threads: int = 1
    nodes: NodeTimes | None = None
    stopped: Stopped = "runs"

    def median_ms(self, name: str) -> float:
        return float(np.median(self._column(name)))

    def iqr_ms(self, name: str) -> float:
        """Return the interquartile range in milliseconds: the spread of the middle half of the runs."""
        low, high = np.percentile(self._column(name), [25, 75])
        return float(high - low)

    def speedup(self, name: str) -> float:
        """Return the median over the rounds of baseline time / time of `name`, as a slow spell affects both times."""
        return float(np.median(self._column(self.names[0]) / self._column(name)))

    def summary(self, batch: int) -> Latency:
        """Sum up the times of "float", "quantized" and the other models, measured on inputs of `batch` samples."""
        ratios = self._column("quantized") / self._column("float")
        found = Latency(
            float=self.median_ms("float"),
            quantized=self.median_ms("quantized"),
            ratio=float(np.median(ratios)),
            runs=len(self.times_ms),
            threads=self.threads,
            batch=batch,
            iqr={name: self.iqr_ms(name) for name in self.names},
            speedup={name: self.speedup(name) for name in self.names[1:]},
            interval={name: median_interval(self._column(name)) for name in self.names},
            ratio_interval=median_interval(ratios),
            stopped=self.stopped,
        )
        return replace(found, reliable=found.spread <= LARGEST_SPREAD)

    def shares(self, name: str, float_nodes: Iterable[FloatNode]) -> TimeShares | None:
        """Return where the time of the profiled model `name` goes; None if no model was profiled.

        float_nodes: of its coverage.
        """
        return None if self.nodes is None else time_shares(self.nodes, self.median_ms(name), float_nodes)

    def _column(self, name: str) -> Array:
        return np.asarray(self.times_ms[:, self.names.index(name)])


def latency(
    models: Mapping[str, Source],
    inputs: Mapping[str, Array],
    *,
    threads: int = 1,
    runs: int = RUNS,
    warmup: int = WARMUP,
    profiled: str | None = None,
) -> Timings:
    """Measure every model on the same inputs, all optimizations on; report.json wants {"float": , "quantized": }.

    Rounds go on until the interval of every median and of every ratio to the first model is tight, or a limit is hit.

    runs:     the most rounds.
    profiled: the model whose nodes are timed too, in a few runs before the others begin.
    raises: InputError for no model, no runs or inputs that a model does not take; ModelError if one does not load.
    """
    with TemporaryFolder() as folder:
        sessions = {
            name: profiling_session(model, folder / name, threads=threads)
            if name == profiled
            else session(model, threads=threads)
            for name, model in models.items()
        }
        calls = {name: partial(_checked(name, each, inputs).run, None, dict(inputs)) for name, each in sessions.items()}
        for _ in range(PROFILED_RUNS if profiled is not None else 0):
            calls[str(profiled)]()
        nodes = None if profiled is None else node_times(sessions[profiled].end_profiling())
    times = interleave(calls, runs=runs, warmup=warmup, enough=lambda times: why_enough(times) is not None)
    return Timings(tuple(models), times, threads, nodes, why_enough(times) or "runs")


def why_enough(times: Array) -> Stopped | None:
    """Return why no more rounds than these are needed, None if they are.

    times: milliseconds, [rounds, models].
    """
    rounds = len(times)
    if rounds >= FEWEST and rounds % STEP == 0:
        columns = [*times.T, *(times[:, 1:] / times[:, :1]).T]
        if all(high - low <= TIGHT * np.median(x) for x in columns for low, high in [median_interval(x)]):
            return "interval"
    return "time" if rounds >= FEWEST_IN_TIME and times.sum() >= LONGEST_S * 1e3 else None


def median_interval(values: Array) -> tuple[float, float]:
    """Return the 95 % interval of the median of independent values, whatever their distribution: two of the values.

    Fewer than six values are all within it.
    source: the number of values below the median is binomial; Conover, Practical Nonparametric Statistics, 3.2.
    """
    ordered = np.sort(values)
    chances = bdtr(np.arange(len(ordered)), len(ordered), 0.5)  # that at most so many values are below the median
    below = max(int(np.searchsorted(chances, (1 - CONFIDENCE) / 2)), 1)
    return float(ordered[below - 1]), float(ordered[-below])


def _checked(name: str, opened: InferenceSession, inputs: Mapping[str, Array]) -> InferenceSession:
    """Return the session; raise InputError unless it takes these inputs."""
    taken = [value.name for value in opened.get_inputs()]
    if {*taken} != {*inputs}:
        raise InputError(
            f"model {name!r} takes the inputs {', '.join(taken)}, but got {', '.join(inputs) or 'none'}; give each by "
            "name."
        )
    return opened


def interleave(
    calls: Mapping[str, Callable[[], object]],
    *,
    runs: int,
    warmup: int = WARMUP,
    clock: Callable[[], int] = time.perf_counter_ns,
    enough: Callable[[Array], bool] = lambda times: False,
) -> Array:
    """Return the times of calls in milliseconds, [rounds, calls]; each round makes each call once, odd ones in reverse.

    runs:   the most rounds.
    clock:  nanoseconds, monotonic.
    enough: whether the rounds so far, [rounds, calls], are enough.
    """
    if runs < 1 or not calls:
        raise InputError(f"latency needs at least one model and one run, but got {len(calls)} models and {runs} runs.")
    ordered = list(enumerate(calls.values()))
    for _ in range(warmup):
        for _, call in ordered:
            call()
    times = np.empty((runs, len(ordered)))
    for round_index in range(runs):
        for column, call in ordered[:: -1 if round_index % 2 else 1]:
            begin = clock()
            call()
            times[round_index, column] = (clock() - begin) / NANOSECONDS_PER_MS
        if enough(times[: round_index + 1]):
            return times[: round_index + 1]
    return times
