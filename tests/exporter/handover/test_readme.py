"""The README of a bundle and the metadata of its file: enough to run the model on an image, and the same facts."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from torch import nn

from calibrators.errors import InputError
from exporter import export
from exporter.handover.readme import render_readme
from exporter.inputs.form import DataForm
from exporter.inputs.open import open_data
from exporter.reporting.interface import INTERFACE_KEY, Images, Pixels
from exporter.reporting.schema import validate_report
from runtime_tests.ort.sessions import session
from runtime_tests.ort.worker import EXACT
from tests.exporter.reporting.sample_report import sample_report
from tests.support.networks import randomize
from tests.support.readme import run_readme

QUICK: dict[str, Any] = {"method": "mse", "latency_runs": 0, "parity_samples": 4, "simplify": False}
FORM: dict[str, Any] = {"image_size": (12, 20), "mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
LABELS = ("cat", "dog & co", "lynx")


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    return randomize(nn.Sequential(*layers), 0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of several sizes, in a folder per class."""
    root, random = tmp_path_factory.mktemp("images") / "images", np.random.default_rng(0)
    for index in range(6):
        image = Image.fromarray(random.integers(0, 256, (17 + 5 * index, 31 - 2 * index, 3), np.uint8))
        path = root / LABELS[index % 3] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
    return root


def exported(folder: Path, out: Path, **settings: Any) -> dict[str, Any]:
    report = export(network(), str(folder), eval_data=str(folder), out=out, **FORM, **QUICK, **settings)
    assert report["verdict"] == "pass"
    return report


@pytest.fixture(scope="module")
def bundle(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("readme") / "out"
    exported(folder, out)
    return out


def interface(bundle: Path) -> dict[str, Any]:
    metadata = {entry.key: entry.value for entry in onnx.load(bundle / "model.onnx").metadata_props}
    found: dict[str, Any] = json.loads(metadata[INTERFACE_KEY])
    return found


def scores(folder: Path, bundle: Path, tmp_path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Return the scores that the README's code prints for an image, and those of the project for the same image."""
    here = tmp_path / "copy"
    shutil.copytree(bundle, here)
    image = folder / LABELS[0] / "0.png"
    shutil.copy(image, here / "image.png")
    shown = run_readme(here, "np.save('scores.npy', outputs['output'])")
    assert any(f"['{label}']" in shown for label in LABELS)
    x = open_data(folder, DataForm(**FORM)).example().inputs[0][:1]
    port = interface(bundle)["inputs"][0]
    if port["dtype"] == "UINT8":
        mean, std = (np.array(FORM[name])[:, None, None] for name in ("mean", "std"))
        pixels = np.rint((x.numpy() * std + mean) * 255).astype(np.uint8)
        given = pixels.transpose(0, 2, 3, 1) if port["pixels"]["layout"] == "nhwc" else pixels
    else:
        given = x.numpy()
    runtime = session(bundle / "model.onnx")
    return np.load(here / "scores.npy"), runtime.run(["output"], {"input": np.ascontiguousarray(given)})[0]


def test_its_code_runs_the_model_on_an_image(folder: Path, bundle: Path, tmp_path: Path) -> None:
    """Bit for bit what the project computes for the same file."""
    ours, theirs = scores(folder, bundle, tmp_path)
    assert ours.tobytes() == theirs.tobytes()


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["nchw", "nhwc"])
def test_its_code_feeds_bytes(layout: str, folder: Path, tmp_path: Path) -> None:
    report = exported(folder, tmp_path / "out", input=f"uint8:{layout}", output="codes")
    ours, theirs = scores(folder, tmp_path / "out", tmp_path)
    grid = report["model"]["outputs"][0]["codes"]
    values = (theirs.astype(np.float32) - grid["zero_point"]) * np.float32(grid["scale"])
    assert theirs.dtype == np.uint8 and ours.tobytes() == values.tobytes()
    assert interface(tmp_path / "out")["images"]["in_file"] is True


def test_the_metadata_holds_the_facts_of_the_page(bundle: Path) -> None:
    found, report = interface(bundle), json.loads((bundle / "report.json").read_text())
    assert found["inputs"] == [{"name": "input", "shape": ["batch", 3, 12, 20], "dtype": "FLOAT"}]
    assert found["outputs"] == [{"name": "output", "shape": ["batch", 3], "dtype": "FLOAT"}]
    assert found["labels"] == list(LABELS)
    assert found["images"] == report["model"]["images"]
    normalization = {name: list(FORM[name]) for name in ("mean", "std")}
    steps = {"colors": "RGB", "layout": "nchw", "size": [12, 20], "resize": "BILINEAR", "in_file": False}
    assert found["images"] == steps | normalization
    assert found["session"] == EXACT
    page = (bundle / "README.md").read_text(encoding="utf-8")
    for fact in ("batch x 3 x 12 x 20", "0.485, 0.456, 0.406", "`BILINEAR`", "12 x 20", "0 cat, 1 dog  co, 2 lynx",
                 "onnxruntime 1.1", "x86-64 with VNNI", "python check.py"):  # fmt: skip
        assert fact in page, fact


def test_the_page_names_every_file(bundle: Path) -> None:
    page = (bundle / "README.md").read_text(encoding="utf-8")
    names = {f"{path.name}/" if path.is_dir() else path.name for path in bundle.iterdir()} - {"README.md"}
    assert [name for name in sorted(names) if f"`{name}`" not in page] == []


def test_classes_may_be_named_in_a_file(folder: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    with pytest.raises(InputError, match=r"names\.txt names 2 classes, but the model has 3"):
        exported(folder, tmp_path / "out", labels=str(names))
    with pytest.raises(InputError, match=r"labels .*name\.txt does not exist; did you mean .*names\.txt"):
        exported(folder, tmp_path / "out", labels=str(tmp_path / "name.txt"))


@pytest.mark.parametrize(("layout", "shape"), [("nchw", ("batch", 3, 12, 20)), ("nhwc", ("batch", 12, 20, 3))])
def test_images_of_the_right_size_are_said_to_be_fed_as_they_are(layout: str, shape: tuple[int | str, ...]) -> None:
    report = validate_report(sample_report(2))
    assert report.model is not None
    images = Images("RGB", layout, None, None, None, None, in_file=layout == "nhwc")
    port = replace(report.model.inputs[0], shape=shape)
    pixels = Pixels(layout, (0.5,), (0.5,), "") if layout == "nhwc" else None
    port = replace(port, pixels=pixels)
    page = render_readme(replace(report, model=replace(report.model, inputs=(port,), images=images)))
    assert ("np.uint8).reshape(12, 20, 3)" in page) == (layout == "nhwc"), "bytes of a camera need no Pillow"
    assert "had the size of the input, 12 x 20 (height x width)" in page and "is not recorded" in page


@pytest.mark.parametrize(("size", "shown"), [((10, 16), "reshape(10, 16, 3)"), (None, "")])
def test_bytes_of_a_camera_have_the_size_of_the_data_where_that_of_the_input_is_free(
    size: tuple[int, int] | None, shown: str
) -> None:
    report = validate_report(sample_report(2))
    assert report.model is not None
    images = Images("RGB", "nhwc", size, "BILINEAR", None, None, in_file=True)
    pixels = Pixels("nhwc", (0.5,), (0.5,), "")
    port = replace(report.model.inputs[0], shape=("batch", "height", "width", 3), pixels=pixels)
    page = render_readme(replace(report, model=replace(report.model, inputs=(port,), images=images)))
    assert ("np.fromfile" in page) == bool(shown) and shown in page


def test_the_page_of_a_fixed_batch_and_of_a_lowered_file() -> None:
    report = sample_report(3)
    report["model"] |= {"dynamic_batch": False}
    report["data"]["golden"] = {"source": "a.npz", "samples": 1, "sha256": "0"}
    page = render_readme(validate_report(report))
    assert "that of the batch, is fixed" in page and "`batch` may" not in page
    assert "The golden inputs are 1 sample: a.npz." in page and page.count("A quantized ONNX model") == 1
    page = render_readme(validate_report(report | {"target": "xnnpack"}))
    assert "`model.pte` is what its runtime executes" in page and "A quantized ONNX model" not in page
