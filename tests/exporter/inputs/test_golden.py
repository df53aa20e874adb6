"""Golden inputs that are not the user's: deterministic, within the ranges, and nothing of the data in the bundle."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from calibrators.errors import DataError, InputError
from exporter import export
from exporter.handover.bundle import read_golden
from exporter.inputs.golden import check_golden, check_outputs, synthetic
from exporter.verify import verify

QUICK: dict[str, Any] = {"method": "minmax", "latency_runs": 0, "simplify": False}


class Lookup(nn.Module):
    """Tokens and an image to scores."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.conv, self.head = nn.Embedding(7, 4), nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, tokens: Tensor, image: Tensor) -> Tensor:
        return self.head(self.table(tokens).mean(1) + torch.relu(self.conv(image)).mean((2, 3)))


def batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(2, 6, (8, 5), generator=generator)
    return [{"tokens": tokens, "image": 3 * torch.randn(8, 1, 6, 6, generator=generator)}]


def model() -> nn.Module:
    torch.manual_seed(0)
    return Lookup()


def test_noise_is_the_same_for_the_same_seed_and_keeps_to_the_limits() -> None:
    like = torch.empty(4, 2, 16, 16), torch.empty(4, 9, dtype=torch.int64), torch.empty(4, 3, dtype=torch.bool)
    limits = [(-1.5, 2.0), (3.0, 7.0), (0.0, 1.0)]
    found, again, other = (synthetic(like, limits, seed) for seed in (0, 0, 1))
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))
    assert not torch.equal(found[0], other[0])
    assert [x.shape for x in found] == [x.shape for x in like] and [x.dtype for x in found] == [x.dtype for x in like]
    image, indices, mask = found
    assert -1.5 <= float(image.min()) < -1.2 and 1.7 < float(image.max()) <= 2.0
    assert set(indices.flatten().tolist()) == {3, 4, 5, 6, 7} and mask.any() and not mask.all()


def test_images_are_coarser_from_sample_to_sample() -> None:
    (image,) = synthetic([torch.empty(5, 1, 16, 16)], [(0.0, 1.0)], 0)
    for number, block in enumerate((1, 2, 4, 8, 1)):
        blocks = image[number, 0].unfold(0, block, block).unfold(1, block, block).flatten(2)
        assert bool((blocks == blocks[..., :1]).all()), "blocks have one value"
        assert len(image[number].unique()) == (16 // block) ** 2


@pytest.mark.parametrize("kind", ["synthetic", "file"])
def test_a_bundle_shows_nothing_of_the_data(kind: str, tmp_path: Path) -> None:
    mine = {"tokens": np.full((2, 5), 3), "image": np.ones((2, 1, 6, 6), np.float32)}
    np.savez(tmp_path / "mine.npz", **mine)
    golden = "synthetic" if kind == "synthetic" else str(tmp_path / "mine.npz")
    report = export(model(), batches(), out=tmp_path / "out", golden=golden, **QUICK)
    ((inputs, outputs),) = read_golden(tmp_path / "out")
    if kind == "file":
        assert all(np.array_equal(inputs[name], array) for name, array in mine.items())
    else:
        assert inputs["tokens"].min() >= 2 and inputs["tokens"].max() <= 5, "indices that the data has"
        observed = next(layer for layer in report["layers"] if layer["site"] == "image")
        assert observed["lo"] <= inputs["image"].min() and inputs["image"].max() <= observed["hi"]
    assert all(np.isfinite(each).all() for each in outputs.values())
    samples = {x[:1].numpy().tobytes() for batch in batches() for x in batch.values()}
    with zipfile.ZipFile(tmp_path / "out" / "golden" / "reference.pt2") as archive:
        parts = [archive.read(name) for name in archive.namelist()]
    assert not any(sample in part for sample in samples for part in parts)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["data"]["golden"] == report["data"]["golden"]
    stated = golden if kind == "file" else "synthetic noise within the calibrated ranges"
    assert report["data"]["golden"]["source"] == stated
    assert stated in (tmp_path / "out" / "golden" / "README.md").read_text()
    assert verify(tmp_path / "out")["verdict"] == "pass"


def test_the_first_samples_are_the_default_and_named(tmp_path: Path) -> None:
    report = export(model(), batches(), out=tmp_path / "out", **QUICK)
    ((inputs, _),) = read_golden(tmp_path / "out")
    assert np.array_equal(inputs["image"], batches()[0]["image"][:4].numpy())
    assert report["data"]["golden"]["source"] == f"first samples of {report['data']['calibration']['source']}"


@pytest.mark.parametrize(
    ("setting", "words"), [("random", "give samples, synthetic or"), ("nowhere.npz", "nowhere.npz does not exist")]
)
def test_other_names_are_refused_before_the_work(setting: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        check_golden(setting)


def test_a_file_for_another_model_is_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "mine.npz", tokens=np.full((2, 5), 3), image=np.ones((2, 2, 6, 6), np.float32))
    with pytest.raises(DataError, match="image"):
        export(model(), batches(), out=tmp_path / "out", golden=str(tmp_path / "mine.npz"), **QUICK)
    assert not (tmp_path / "out").exists()


def test_outputs_that_are_no_numbers_compare_with_nothing() -> None:
    check_outputs([torch.tensor([1.0, torch.inf]), torch.tensor([1])])
    with pytest.raises(DataError, match=r"golden='FILE\.npz'"):
        check_outputs([torch.tensor([1.0, torch.nan])])
