from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pytest

from calibrators.errors import DataError
from calibrators.intervals import paired_interval, share_interval
from runtime_tests.measure.accuracy import RunningAccuracy

CLASSES, SAMPLES = 12, 300
ROUNDING = 1e-12
"""Relative error of float64 sums of a few thousand terms in another order: far above 3600 * 2^-53 = 4e-13."""


@pytest.fixture(scope="module")
def data() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, SAMPLES)
    float_outputs = rng.normal(size=(SAMPLES, CLASSES)).astype(np.float32)
    float_outputs[np.arange(SAMPLES), labels] += 1.5
    reference = float_outputs + rng.normal(0, 0.3, float_outputs.shape).astype(np.float32)
    runtime = reference + rng.normal(0, 0.3, float_outputs.shape).astype(np.float32)
    return {"outputs": (float_outputs, reference, runtime), "labels": labels}


def measured(data: dict[str, Any], *, batch: int = SAMPLES, labelled: bool = True) -> RunningAccuracy:
    accuracy = RunningAccuracy()
    for start in range(0, SAMPLES, batch):
        part = slice(start, start + batch)
        labels = data["labels"][part] if labelled else None
        accuracy.update(*(each[part] for each in data["outputs"]), labels)
    return accuracy


def oracle_topk(outputs: Any, labels: Any, k: int) -> float:
    """Share of samples whose label is among the k best, by a stable descending sort."""
    best = np.argsort(-outputs.astype(np.float64), axis=1, kind="stable")[:, :k]
    return float(np.mean([label in row for label, row in zip(labels, best, strict=True)]))


def test_top1_and_top5_equal_a_sorted_count(data: dict[str, Any]) -> None:
    content = asdict(measured(data).result())
    assert (content["metric"], content["samples"]) == ("top1", SAMPLES)
    for name, outputs in zip(("float", "reference", "runtime"), data["outputs"], strict=True):
        assert content[name] == oracle_topk(outputs, data["labels"], 1)
        assert content["top5"][name] == oracle_topk(outputs, data["labels"], 5)
    assert content["float"] > content["runtime"] > 0.3


def test_a_reference_that_ran_on_some_samples_is_scored_on_those(data: dict[str, Any]) -> None:
    first = 120
    (truth, reference, runtime), labels = data["outputs"], data["labels"]
    accuracy, everywhere = RunningAccuracy(), measured(data).result()
    accuracy.update(truth[:first], reference[:first], runtime[:first], labels[:first])
    accuracy.update(truth[first:], None, runtime[first:], labels[first:])
    found = accuracy.result()
    assert (found.samples, found.reference_samples, everywhere.reference_samples) == (SAMPLES, first, SAMPLES)
    assert found.reference == oracle_topk(reference[:first], labels[:first], 1)
    there = oracle_topk(truth[:first], labels[:first], 1)
    assert found.reference_drop == pytest.approx(there - found.reference, abs=ROUNDING)
    assert found.reference_drop != pytest.approx(found.float - found.reference, abs=ROUNDING)
    for name in ("float", "runtime", "agreement", "sqnr_db", "mean_kl", "drop_ci"):
        assert getattr(found, name) == pytest.approx(getattr(everywhere, name), rel=ROUNDING)


def test_equal_scores_are_ranked_as_argmax_ranks_them() -> None:
    rng = np.random.default_rng(1)
    outputs = rng.integers(0, 3, (200, 7)).astype(np.float32)
    labels = rng.integers(0, 7, 200)
    accuracy = RunningAccuracy()
    accuracy.update(outputs, outputs, outputs, labels)
    content = asdict(accuracy.result())
    assert content["runtime"] == float(np.mean(outputs.argmax(1) == labels))
    assert content["top5"]["runtime"] == oracle_topk(outputs, labels, 5)


def test_agreement_sqnr_and_divergence_equal_their_definitions(data: dict[str, Any]) -> None:
    truth, _, runtime = (each.astype(np.float64) for each in data["outputs"])
    content = asdict(measured(data).result())
    assert content["agreement"] == np.mean(truth.argmax(1) == runtime.argmax(1))
    sqnr = 10 * np.log10((truth**2).sum() / ((truth - runtime) ** 2).sum())
    np.testing.assert_allclose(content["sqnr_db"], sqnr, rtol=ROUNDING)
    p = np.exp(truth) / np.exp(truth).sum(1, keepdims=True)
    q = np.exp(runtime) / np.exp(runtime).sum(1, keepdims=True)
    np.testing.assert_allclose(content["mean_kl"], (p * np.log(p / q)).sum(1).mean(), rtol=ROUNDING)


@pytest.mark.parametrize("batch", [1, 7, 128])
def test_the_batch_split_does_not_matter(data: dict[str, Any], batch: int) -> None:
    whole, split = asdict(measured(data).result()), asdict(measured(data, batch=batch).result())
    for key in ("metric", "samples", "float", "reference", "runtime", "top5", "agreement", "drop_ci"):
        assert split[key] == whole[key]
    for key in ("sqnr_db", "mean_kl"):
        np.testing.assert_allclose(split[key], whole[key], rtol=ROUNDING)


def test_without_labels_the_metric_is_agreement(data: dict[str, Any]) -> None:
    content = asdict(measured(data, labelled=False).result())
    assert content["metric"] == "agreement"
    assert content["float"] == 1.0
    assert content["runtime"] == content["agreement"] < content["reference"] < 1.0
    assert content["top5"] is None and content["drop_ci"] is None


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 3, 5)], ids=["rank 1", "one column", "rank 3"])
def test_other_outputs_are_measured_by_sqnr_and_labels_are_not_read(shape: tuple[int, ...]) -> None:
    truth = np.random.default_rng(2).normal(size=shape).astype(np.float32)
    accuracy = RunningAccuracy()
    accuracy.update(truth, truth * np.float32(1.5), truth * np.float32(2), ["no", "labels", "at", "all"])
    content = asdict(accuracy.result())
    assert content["metric"] == "sqnr_db"
    np.testing.assert_allclose(
        content["reference"], 20 * np.log10(2), rtol=1e-6
    )  # noise is half the signal, in float32
    assert abs(content["runtime"]) < ROUNDING  # noise equals signal
    assert content["float"] is None and content["agreement"] is None and content["mean_kl"] is None


@pytest.mark.parametrize("column", [False, True])
@pytest.mark.parametrize("batch", [SAMPLES, 7])
def test_indices_of_classes_are_scored_as_the_scores_that_they_come_from(
    data: dict[str, Any], batch: int, column: bool
) -> None:
    indices = tuple(each.argmax(1, keepdims=column) for each in data["outputs"])
    found, scores = (measured(given, batch=batch) for given in ({**data, "outputs": indices}, data))
    for name in ("metric", "float", "reference", "runtime", "agreement", "drop_ci", "reference_drop"):
        assert getattr(found.result(), name) == getattr(scores.result(), name), name
    assert found.result().top5 is None and found.result().mean_kl is None
    assert np.array_equal(found.by_sample.right, scores.by_sample.right)
    assert float(found.by_sample.error.mean()) == pytest.approx(1 - (found.result().agreement or 0.0))
    unlabelled = measured({**data, "outputs": indices}, labelled=False)
    assert unlabelled.metric == "agreement" and unlabelled.value("runtime") == found.result().agreement


def test_identical_outputs_have_no_noise_and_an_interval_around_zero(data: dict[str, Any]) -> None:
    truth = data["outputs"][0]
    accuracy = RunningAccuracy()
    accuracy.update(truth, truth, truth, data["labels"])
    content = asdict(accuracy.result())
    assert content["sqnr_db"] is None
    assert content["float"] == content["runtime"]
    assert content["mean_kl"] == 0.0
    low, high = content["drop_ci"]
    assert low == -high < 0


def test_interval_of_the_drop_uses_discordant_samples_only(data: dict[str, Any]) -> None:
    truth, _, runtime = data["outputs"]
    right = [each.argmax(1) == data["labels"] for each in (truth, runtime)]
    lost, gained = int(np.sum(right[0] & ~right[1])), int(np.sum(right[1] & ~right[0]))
    accuracy = measured(data)
    assert accuracy.drop_interval() == paired_interval(lost, gained, SAMPLES)
    content = asdict(accuracy.result())
    assert content["drop_ci"][0] < content["float"] - content["runtime"] < content["drop_ci"][1]


COVERAGE_SLACK = 0.01
"""Coverage below the nominal 0.95 that passes: three standard errors of 4000 simulated experiments (0.0034 each)."""


@pytest.mark.parametrize(
    ("lost", "gained", "samples", "highest"),
    [(0.04, 0.02, 500, 0.97), (0.01, 0.01, 200, 1.0), (0.3, 0.1, 100, 0.97)],
    ids=["typical", "rare (wide on purpose)", "frequent"],
)
def test_interval_covers_the_true_difference_as_often_as_it_says(
    lost: float, gained: float, samples: int, highest: float
) -> None:
    rng = np.random.default_rng(3)
    counts = rng.multinomial(samples, [lost, gained, 1 - lost - gained], 4000)
    bounds = np.array([paired_interval(int(a), int(b), samples) for a, b, _ in counts])
    covered = np.mean((bounds[:, 0] <= lost - gained) & (lost - gained <= bounds[:, 1]))
    assert 0.95 - COVERAGE_SLACK < covered <= highest


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0, 1, 12]), r"labels of batch 1 hold 12, but the model's classes are 0\.\.11"),
        (np.array([0, -1, 2]), "labels of batch 1 hold -1"),
        (np.array([0.0, 1.0, 2.0]), "labels of batch 1 are float64"),
        (np.array([True, False, True]), "labels of batch 1 are bool"),
        (np.array([0, 1]), r"labels of batch 1 are int64 \[2\]; give 3 integers"),
        (np.eye(3, CLASSES, dtype=np.int64), r"labels of batch 1 are int64 \[3, 12\]"),
        (None, "batch 1 has no labels, unlike the first"),
    ],
    ids=["too high", "negative", "float", "bool", "too few", "one-hot", "missing"],
)
def test_bad_labels_are_refused_with_their_batch(labels: Any, message: str) -> None:
    outputs = np.random.default_rng(4).normal(size=(3, CLASSES))
    accuracy = RunningAccuracy()
    accuracy.update(outputs, outputs, outputs, [0, 1, 2])
    with pytest.raises(DataError, match=message):
        accuracy.update(outputs, outputs, outputs, labels)
    assert accuracy.samples == 3


def test_labels_as_a_column_are_accepted() -> None:
    outputs = np.eye(3)
    accuracy = RunningAccuracy()
    accuracy.update(outputs, outputs, outputs, np.array([[0], [1], [0]]))
    assert accuracy.value("runtime") == 2 / 3


def test_the_same_infinity_in_all_three_is_a_mask() -> None:
    scores = np.array([[1.0, 2.0, -np.inf], [3.0, 1.0, -np.inf]])
    running = RunningAccuracy()
    running.update(scores, scores, scores + 0.1, np.array([1, 0]))
    result = running.result()
    assert (result.runtime, result.agreement) == (1.0, 1.0)
    assert result.sqnr_db == pytest.approx(10 * np.log10(15 / 0.04))
    assert result.mean_kl == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
@pytest.mark.parametrize("position", [0, 1, 2], ids=["float", "reference", "runtime"])
def test_outputs_that_are_not_finite_are_refused_by_name(value: float, position: int) -> None:
    outputs = [np.ones((2, 3)) for _ in range(3)]
    outputs[position][1, 2] = value
    name = ("float", "reference", "runtime")[position]
    with pytest.raises(DataError, match=f"outputs of batch 0 are not finite in: {name};"):
        RunningAccuracy().update(*outputs)


def test_outputs_of_different_shapes_are_refused() -> None:
    with pytest.raises(DataError, match=r"'runtime': \(2, 4\)"):
        RunningAccuracy().update(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 4)))


def test_outputs_that_change_their_kind_are_refused() -> None:
    accuracy = RunningAccuracy()
    accuracy.update(np.ones((2, 3)), np.ones((2, 3)), np.ones((2, 3)))
    with pytest.raises(DataError, match=r"batch 1 have shape .* unlike those of the first"):
        accuracy.update(np.ones((2, 3, 4)), np.ones((2, 3, 4)), np.ones((2, 3, 4)))


@pytest.mark.parametrize("samples", [1, 400, 50000])
def test_an_interval_ends_where_the_share_does(samples: int) -> None:
    assert share_interval(1.0, samples)[1] == 1.0 and share_interval(0.0, samples)[0] == 0.0
    low, high = share_interval(0.5, samples)
    assert 0 < low < 0.5 < high < 1
