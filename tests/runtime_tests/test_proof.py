"""One pass over the data serves every measurement, and gives what separate passes give."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from calibrators.calibration import calibrate
from calibrators.execution.ranks import Ranks
from calibrators.graph.aten import example_batch, shape_of
from calibrators.grid.metrics import decibels
from runtime_tests import proof as module
from runtime_tests.measure.noise import Noise
from runtime_tests.ort.sessions import Model
from runtime_tests.parity.compare import weight_agreements
from runtime_tests.parity.elsewhere import Elsewhere
from runtime_tests.proof import Measurements, Proof, parity
from runtime_tests.reference.execute import plan, run
from runtime_tests.runtimes import get_runtime
from runtime_tests.workers.runtime import Artifact
from tests.support.elsewhere import available
from tests.support.folded import folded_network
from tests.support.noise import noise_of
from tests.support.stored import stored

LEVELS = ("unoptimized", "optimized")


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bool, int]]:
    """Which plan the reference ran, and on how many samples."""
    found: list[tuple[bool, int]] = []

    def counted(kernels: Any, inputs: Any, *rest: Any, **options: Any) -> Any:
        found.append((kernels.integer, len(inputs[0])))
        return run(kernels, inputs, *rest, **options)

    monkeypatch.setattr(module, "run", counted)
    return found


def test_the_reference_runs_once_per_batch(runs: list[tuple[bool, int]]) -> None:
    graph, inputs = folded_network("residual")
    result = calibrate(graph, [inputs])
    model, noise = stored(result), Noise(result)
    measured = Measurements(parity_samples=40, golden_samples=4, noise_samples=20, noise=noise, float_model=graph)
    proof = Proof(model, result.program, LEVELS, measured=measured)
    proof.add(inputs, torch.zeros(len(inputs[0]), dtype=torch.int64).numpy())
    assert len(inputs[0]) == 64
    assert [size for integer, size in runs if integer] == [4, 16, 20, 24]  # accuracy takes all
    assert [size for integer, size in runs if not integer] == [4, 16, 20]
    assert proof.samples == 64 and not proof.is_done
    assert proof.accuracy is not None and proof.accuracy.samples == 64

    parts = [tuple(x[start:end] for x in inputs) for start, end in ((0, 4), (4, 20), (20, 40))]
    for name, level in proof.levels.items():
        assert level == parity(model, result.program, parts, optimized=name == "optimized")
    golden = tuple(x[:4] for x in inputs)
    ((kept, expected),) = proof.golden
    assert all(torch.equal(a, b) for a, b in zip(kept, golden, strict=True))
    _, outputs = run(plan(result.program), golden)
    assert all(torch.equal(a, b) for a, b in zip(expected, outputs, strict=True))
    assert noise.decibels() == pytest.approx(noise_of(result, tuple(x[:20] for x in inputs)), rel=1e-6)


@pytest.mark.parametrize(("few", "taken"), [(8, 40), (48, 48)], ids=["no-fewer-than-are-compared", "others-too"])
def test_the_reference_is_scored_on_as_many_samples_as_are_asked_for(
    runs: list[tuple[bool, int]], few: int, taken: int
) -> None:
    graph, inputs = folded_network("residual")
    result = calibrate(graph, [inputs])
    measured = Measurements(
        parity_samples=40, reference_samples=few, float_model=graph, metric=("mean", lambda x, _: float(x.mean()))
    )
    proof = Proof(stored(result), result.program, ["optimized"], measured=measured)
    proof.add(inputs)
    assert sum(size for _, size in runs) == taken
    scores, metric = proof.scores, proof.metric
    assert scores is not None and metric is not None
    assert (scores.samples, scores.reference_samples) == (64, taken)
    assert metric.result(None).reference is None and metric.result(None).runtime is not None
    _, (logits,) = run(plan(result.program), tuple(x[:taken] for x in inputs))
    expected = decibels(
        *[float((y.double() ** 2).sum()) for y in (graph(*inputs)[0][:taken], graph(*inputs)[0][:taken] - logits)]
    )
    assert scores.outputs is not None and scores.outputs[0].reference == pytest.approx(expected)


def test_values_larger_than_a_cache_run_sample_by_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, inputs = folded_network("residual")
    program = calibrate(graph, [inputs]).program
    sizes = [math.prod(shape_of(node)) for node in program.graph.nodes if node.op == "call_function"]
    largest = max(sizes) // example_batch(program)
    for elements, samples in ((largest - 1, 1), (5 * largest, 5), (100 * largest, module.LARGEST_BATCH)):
        monkeypatch.setattr(module, "IN_CACHE", elements)
        assert module.samples_at_once(program) == samples


def test_without_accuracy_no_more_is_run_than_is_compared(runs: list[tuple[bool, int]]) -> None:
    graph, inputs = folded_network("mlp")
    result = calibrate(graph, [inputs])
    proof = Proof(stored(result), result.program, ["optimized"], measured=Measurements(parity_samples=5))
    for _ in range(3):
        proof.add(inputs)
    assert proof.is_done and proof.samples == 5
    assert runs == [(True, 5)]


def test_golden_samples_stay_in_one_piece(runs: list[tuple[bool, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IN_CACHE", 1)
    graph, inputs = folded_network("mlp")
    result = calibrate(graph, [inputs])
    measured = Measurements(parity_samples=2, golden_samples=4)
    proof = Proof(stored(result), result.program, ["optimized"], measured=measured)
    proof.add(inputs)
    assert [len(inputs[0]) for inputs, _ in proof.golden] == [4]
    assert runs == [(True, 4)]


def test_samples_of_many_codes_are_compared_in_parts(
    runs: list[tuple[bool, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    graph, inputs = folded_network("residual")
    result = calibrate(graph, [inputs])
    model = stored(result)
    whole = parity(model, result.program, [inputs], optimized=True)
    per_sample = sum(node.values for node in whole.nodes) // len(inputs[0])
    monkeypatch.setattr(module, "LARGEST_CODES", 10 * per_sample)
    runs.clear()
    assert parity(model, result.program, [inputs], optimized=True) == whole
    assert {size for _, size in runs[:-1]} == {10} and sum(size for _, size in runs) == len(inputs[0])


@dataclass(frozen=True)
class Meeting(Ranks):
    """A process that meets others whose counts are known, and whose own are kept."""

    others: list[Any] = field(default_factory=list)
    own: list[Any] = field(default_factory=list)

    def gathered(self, value: Any) -> list[Any]:
        self.own.append(value)
        return [value, *self.others]


@pytest.mark.parametrize("level", ["unoptimized", "optimized", "openvino"])
def test_counts_of_processes_add_up_to_those_of_one(level: str) -> None:
    if level == "openvino":
        available("openvino")
    graph, inputs = folded_network("transformer")  # some float operators, whose codes differ in OpenVINO
    result = calibrate(graph, [inputs], method="minmax")

    def proved(*parts: slice, others: Sequence[Any] = ()) -> tuple[Proof, Any]:
        measured, ranks = Measurements(noise_samples=64, noise=Noise(result)), Meeting()
        proof = Proof(stored(result), result.program, [level], measured=measured, ranks=ranks)
        proof.add_all([tuple(x[part] for x in inputs) for part in parts])
        ranks.others.extend(others)
        proof.gather()
        return proof, ranks.own[-1]

    first, second = slice(0, 24), slice(24, 64)
    _, theirs = proved(second)
    (ours, _), (whole, _) = proved(first, others=[theirs]), proved(first, second)
    assert ours.levels == whole.levels and ours.levels[level].samples == 64
    noises = ours.measured.noise, whole.measured.noise
    assert noises[0] is not None and noises[1] is not None
    assert noises[0].decibels() == noises[1].decibels() and noises[0].added() == noises[1].added()
    assert noises[0].histograms() == noises[1].histograms()


def test_what_one_process_is_refused_all_are() -> None:
    graph, inputs = folded_network("residual")
    result = calibrate(graph, [inputs], method="minmax")
    model = Model.of(stored(result))
    weights = weight_agreements(model, result.program)
    ours, other = (
        Elsewhere(get_runtime("ort"), Artifact(model), plan(result.program), weights, samples=math.inf)
        for _ in range(2)
    )
    for each in (ours, other):
        each.add(inputs, *run(plan(result.program), inputs, with_floats=True))
    ours.include(other.counts)
    assert ours.report().samples == 2 * len(inputs[0]) and ours.report().is_proved
    ours.include(("out of memory", {}))
    assert ours.report().refused == "out of memory" and not ours.report().is_proved
