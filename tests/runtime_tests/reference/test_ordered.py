"""Equal values come in the order of their indices, in the reference as in the runtime."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from calibrators.calibration import calibrate
from exporter import capture, emit, fold
from runtime_tests.proof import validate


class BestPlaces(nn.Module):
    """Of scores that are ReLU'd codes, most of which are equal: the best ones in order, and what lies there."""

    def __init__(self) -> None:
        super().__init__()
        self.features, self.boxes, self.scores = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        y = torch.relu(self.features(x))
        scores, boxes = torch.relu(self.scores(y)).flatten(1), self.boxes(y).flatten(2)
        best, places = scores.topk(60)
        ordered, order = scores.sort(1, descending=True)
        least = scores.argsort(1)
        return best, places, boxes.gather(2, places[:, None].expand(-1, 4, -1)), ordered, order, least


def test_ties_are_ordered_by_index(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, x = BestPlaces().eval(), torch.randn(8, 3, 12, 12)
    result = calibrate(fold(capture(model, x)), [x], method="minmax")
    emit(result, tmp_path / "model.onnx")
    validate(tmp_path / "model.onnx", reference=result, batches=[x]).raise_for_mismatch()
