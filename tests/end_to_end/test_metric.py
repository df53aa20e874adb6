"""Every output is evaluated, and metrics of the user's decide gates, whatever their labels are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from calibrators.errors import DataError, InputError
from exporter import export
from exporter.inputs.metric import Metric, joined, load_metric
from tests.support.networks import randomize

QUICK: dict[str, Any] = {"method": "mse", "latency_runs": 0, "parity_samples": 8, "simplify": False}


class Segmenter(nn.Module):
    """Scores of pixels, and of the whole image."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 3, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        y = F.relu(self.a(x))
        pixels = self.b(y)
        return {"pixels": pixels, "scores": self.head(y.mean((2, 3))), "best": pixels.argmax(1)}


def model() -> nn.Module:
    torch.manual_seed(0)
    return randomize(Segmenter()).eval()


def images() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(8, 3, 8, 8, generator=generator) for _ in range(2)]


def masks() -> list[tuple[Tensor, Tensor]]:
    """The model's own decisions are the truth, so that the float model has a perfect score."""
    with torch.no_grad():
        return [(x, model()(x)["best"]) for x in images()]


def mean_iou(outputs: dict[str, Any], labels: Any) -> float:
    found = outputs["pixels"].argmax(1)
    assert found.shape == labels.shape == (16, 8, 8) or len(found) == 8
    shares = [((found == c) & (labels == c)).sum() / max(((found == c) | (labels == c)).sum(), 1) for c in range(3)]
    return float(np.mean(shares))


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    out = tmp_path_factory.mktemp("metric") / "out"
    gates = ["metric>=0.8", "metric_drop<=0.2", "metric.float==1"]
    found = export(model(), images(), eval_data=masks(), out=out, metric=mean_iou, gates=gates, **QUICK)
    assert found["verdict"] == "pass", found["gates"]
    assert json.loads((out / "report.json").read_text())["metric"] == found["metric"]
    return found


def test_a_metric_is_measured_on_all_samples_at_once(report: dict[str, Any]) -> None:
    metric = report["metric"]
    assert metric["name"] == "mean_iou" and metric["samples"] == 16
    assert metric["float"] == 1.0 > metric["runtime"] > 0.8
    assert report["config"]["metric"] == "mean_iou"
    assert not any("labels" in warning for warning in report["warnings"])


def test_every_output_is_evaluated(report: dict[str, Any]) -> None:
    pixels, scores, best = report["accuracy"]["outputs"]
    assert [each["name"] for each in (pixels, scores, best)] == ["pixels", "scores", "best"]
    assert pixels["runtime"] == pytest.approx(report["accuracy"]["sqnr_db"])
    assert all(15 < each["runtime"] < 60 for each in (pixels, scores))
    assert scores["agreement"] > 0.8
    assert pixels["agreement"] is None and best["agreement"] > 0.9


def test_a_file_names_the_metric(tmp_path: Path) -> None:
    (tmp_path / "metrics.py").write_text("def sure(outputs, labels, least=0.0):\n    return outputs.max() > least\n")
    metric = load_metric(f"{tmp_path / 'metrics.py'}:sure(least=0.5)")
    assert metric is not None
    assert (metric(np.ones(3), None), metric(np.zeros(3), None)) == (1.0, 0.0)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda outputs, labels: {}, "returned a dict, not a number"),
        (lambda outputs, labels: float("nan"), "returned nan; return a finite number"),
        (lambda outputs, labels: outputs["absent"], "raised KeyError: 'absent'"),
    ],
)
def test_what_is_wrong_with_a_metric_is_said_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, function: Any, message: str
) -> None:
    monkeypatch.setattr("exporter.intake.fold", lambda graph: pytest.fail("work began"))
    with pytest.raises(DataError, match=message):
        export(model(), images(), eval_data=masks(), out=tmp_path / "out", metric=function, **QUICK)


def test_a_metric_needs_data_and_its_gate_a_metric(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^metric needs held-out data; give it with eval_data"):
        export(model(), images(), out=tmp_path / "out", metric=mean_iou, **QUICK)
    with pytest.raises(InputError, match=r"'metric_drop<=0.1' needs a metric of yours; give metric='file.py:function'"):
        export(model(), images(), eval_data=masks(), out=tmp_path / "out", gates=["metric_drop<=0.1"], **QUICK)


def test_labels_are_joined_as_they_are() -> None:
    assert joined([None, None], 3) is None
    np.testing.assert_array_equal(joined([torch.zeros(2, 4), np.ones((2, 4))], 3), [[0] * 4, [0] * 4, [1] * 4])
    assert joined([["a", "b"], ["c"]], 2) == ["a", "b"]
    boxes = joined([{"boxes": [1, 2], "size": np.zeros(2)}, {"boxes": [3], "size": np.ones(1)}], 3)
    assert boxes["boxes"] == [1, 2, 3] and boxes["size"].tolist() == [0, 0, 1]
    assert len(joined([np.zeros((2, 3)), np.zeros((2, 4))], 4)) == 2
    assert Metric("m", lambda outputs, labels: torch.tensor(0.5))(None, None) == 0.5
