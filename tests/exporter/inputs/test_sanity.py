"""Data that is legal and looks wrong gets a warning; data that is right gets none."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from calibrators.errors import DataError
from exporter import capture
from exporter.inputs.batches import check_evaluation
from exporter.inputs.open import open_data
from exporter.inputs.sanity import calibration_warnings, range_warnings, score_warnings, split_warning
from runtime_tests.measure.accuracy import RunningAccuracy
from tests.support.networks import randomize

GENERATOR = torch.Generator().manual_seed(0)
IMAGES = torch.rand(16, 3, 12, 12, generator=GENERATOR)
MEAN, STD = torch.tensor([0.5, 0.4, 0.6]).reshape(3, 1, 1), torch.tensor([0.29, 0.3, 0.28]).reshape(3, 1, 1)


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    """Return a network whose batch norm saw normalized images."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, momentum=None), nn.ReLU(), nn.Conv2d(16, 4, 3))
    model.train()
    for _ in range(4):
        model((torch.rand(64, 3, 12, 12) - MEAN) / STD)
    return model.eval()


def warned(model: nn.Module, batch: Tensor) -> str:
    graph = capture(model, batch)
    return " ".join(calibration_warnings(graph, (batch,), "images/"))


@pytest.mark.parametrize(
    ("prepare", "words"),
    [
        (lambda x: (x - MEAN) / STD, ""),
        (lambda x: x * 255, "times as wide"),
        (lambda x: (x * 255 - MEAN) / STD, "times as wide"),
        (lambda x: (x - MEAN) / STD / 255, "times as wide"),
        (lambda x: torch.zeros_like(x), "the same value (0) everywhere"),
        (lambda x: ((x - MEAN) / STD)[:1].expand(16, -1, -1, -1), "are equal"),
    ],
)
def test_calibration_data(trained: nn.Module, prepare: object, words: str) -> None:
    said = warned(trained, prepare(IMAGES))  # type: ignore[operator]
    assert words in said if words else not said
    if words == "times as wide":
        assert "first batch norm, batch_norm (1" in said and "Check that images/ is prepared as in training" in said


def test_a_norm_that_was_never_trained_says_nothing() -> None:
    assert not warned(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)), IMAGES * 255)


def test_ranges_of_calibration_and_evaluation() -> None:
    normalized, tokens = (IMAGES - MEAN) / STD, torch.zeros(4, 3, dtype=torch.int64)
    assert not [*range_warnings(["x"], (normalized,), (normalized[:4] * 1.1,))]
    assert not [*range_warnings(["x"], (tokens,), (tokens + 1000,))]
    for other in (IMAGES * 255, normalized / 10, normalized + 5):
        (text,) = range_warnings(["x"], (normalized,), (other,))
        assert text.startswith("input 'x' is ") and "prepare both in the same way" in text


def scored(right: Iterable[bool], classes: int, used: int) -> list[str]:
    labels = np.arange(len([*right])) % used
    logits = np.zeros((len(labels), classes), np.float32)
    logits[np.arange(len(labels)), np.where([*right], labels, (labels + 1) % classes)] = 1
    accuracy = RunningAccuracy()
    accuracy.update(logits, logits, logits, labels)
    return [*score_warnings(accuracy)]


def test_scores() -> None:
    assert scored([True] * 60 + [False] * 4, 10, 10) == []
    (near,) = scored([index % 10 == 0 for index in range(100)], 10, 10)
    assert "the float model itself is right for 10.0% of 100 samples, and chance for 10.0%" in near
    (fewer,) = scored([True] * 100, 10, 5)
    assert "labels of eval_data are 0..4 in 100 samples, but the model has 10 outputs" in fewer
    assert scored([False] * 8, 10, 10) == []  # too few to tell


def folder(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
        Image.new("RGB", (6, 6)).save(root / name / "a.png")
    return root


def test_class_folders(tmp_path: Path) -> None:
    model = randomize(nn.Sequential(nn.Conv2d(3, 3, 3), nn.Flatten(), nn.Linear(48, 3))).eval()
    data = {count: open_data(folder(tmp_path / str(count), *"abcd"[:count])) for count in (2, 3, 4)}
    graph = capture(model, data[3].example().inputs[0])
    for each in data.values():
        each.named(["input"])
    check_evaluation(graph, data[3], data[3])
    assert not data[3].notes
    check_evaluation(graph, data[3], data[2])
    assert "has 2 class folders, but the model has 3 outputs" in data[2].notes[0]
    with pytest.raises(DataError, match=r"labels of eval_data hold 3, but the model has classes 0\.\.2"):
        check_evaluation(graph, data[3], data[4])


def test_folders_that_are_parts_of_a_data_set(tmp_path: Path) -> None:
    (note,) = open_data(folder(tmp_path / "set", "train", "val")).notes
    assert "(train, val) look like parts of a data set" in note and f"for example {tmp_path / 'set'}/train" in note
    assert split_warning("x", ["cat", "test"]) is None
